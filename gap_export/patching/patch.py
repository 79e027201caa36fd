"""The job as explicit steps: find the graphs, read them, choose, patch, write a bundle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from gap_export.bundle import BundleDraft, write_bundle
from gap_export.bundle.files import ENGINES_FOLDER, HASH_NAME
from gap_export.checkpoint.find.hub_cache import read_object
from gap_export.checkpoint.find.source import MAIN, Checkpoint
from gap_export.checkpoint.find.unprunable import refuse_unprunable
from gap_export.errors import BundleError, CheckpointError, PassError, UsageError
from gap_export.exporting.describe import check_prompt, describe_source
from gap_export.graph.id_readers import PositionReach, find_position_reach
from gap_export.graph.onnx_file import OnnxFile
from gap_export.graph.passes.graph_pass import GraphPass
from gap_export.graph.passes.insert_gap_remap import DOMAIN as GAP_DOMAIN
from gap_export.graph.passes.insert_gap_remap import POSITION_IDS, InsertGapRemap
from gap_export.graph.passes.matching import all_nodes, static_dim
from gap_export.graph.pipelines import run_pipeline
from gap_export.patching.cache_roles import check_cache_roles
from gap_export.patching.choose_pruner import pruning_pass, settle_pruning
from gap_export.patching.decoder_interface import DecoderFacts, read_decoder_interface
from gap_export.patching.describe import PatchedGraph, check_special_tokens, describe_patch
from gap_export.patching.find_export import COMPONENTS, FoundExport
from gap_export.patching.fix_canvas import FixCanvas, reads_any_grid, takes_patches
from gap_export.patching.model_facts import (
    CONFIG,
    GENERATION,
    PREPROCESSOR,
    ModelFacts,
    choose_recipe,
    read_facts,
)
from gap_export.patching.options import PatchOptions, PatchReport
from gap_export.patching.prune_features import FEATURES, check_opset
from gap_export.patching.read_graph import (
    ForeignGraph,
    read_graph,
    save_patched,
    with_shapes,
)
from gap_export.progress import Progress
from gap_export.spec.canvas import choose_canvas
from gap_export.spec.manifest import (
    MANIFEST_NAME,
    Manifest,
    SourceSpec,
    parse_manifest,
)
from gap_export.spec.recipe import Recipe

VISION, EMBED, DECODER = COMPONENTS
TOKENIZER = "tokenizer.json"
# Functions in a model, of which GapRemap is one, came with this version of the format.
_MIN_IR_VERSION = 8
# float16 holds whole numbers up to here.
_EXACT_IN_16_BITS = 2048


def patch_found(found: FoundExport, options: PatchOptions, progress: Progress) -> PatchReport:
    """Patch an export whose files are found and whose options are no slip.

    See :func:`gap_export.patching.patch_export`, also for what it raises.
    """
    refuse_unprunable(found.folder, read_object(found.folder / CONFIG))
    graphs = _read_graphs(found, progress)
    vision, embed, decoder = (graphs[component] for component in COMPONENTS)
    facts = read_facts(found.folder)
    with _blaming(decoder):
        sizes, reach = _look_at_decoder(decoder)
    with _blaming(embed):
        _check_embedding(embed.model.graph)
    # Those that the decoder's graph shows.
    names = ("hidden_size", "num_layers", "num_key_value_heads", "head_dim")
    known = {name: getattr(sizes, name) for name in names if getattr(sizes, name) is not None}
    recipe = choose_recipe(found.folder, facts, known, name=options.recipe)
    takes_any = takes_patches(vision.model.graph)
    recipe = choose_canvas(recipe, options.pruning.canvas, takes_any=takes_any)
    if recipe.image.grids:
        raise UsageError(
            "a patched vision encoder reads one canvas",
            seen=", ".join(f"{rows}x{cols} tokens" for rows, cols in recipe.image.grids),
            fix="patch the export once for each canvas",
        )
    pruning = settle_pruning(recipe, options.pruning)
    warnings = _of_one_canvas(vision, recipe)
    with _blaming(vision):
        canvas = FixCanvas(image=recipe.image, grid=recipe.grid, facts=facts)
        run_pipeline(vision.model, [canvas])
        _check_vision(vision.model, recipe)
        run_pipeline(vision.model, [pruning_pass(recipe.grid, pruning)])
    with _blaming(decoder):
        run_pipeline(decoder.model, DECODER_PASSES)
    patched = (
        PatchedGraph(component=VISION, graph=vision),
        PatchedGraph(component=EMBED, graph=embed),
        PatchedGraph(component=DECODER, graph=decoder, kv_contract="concat"),
    )
    manifest = describe_patch(recipe, pruning, facts, sizes, patched)
    out = options.out or Path(f"{recipe.name}-{pruning.pruner}-{pruning.keep_ratio:g}")
    if out.resolve().is_relative_to(found.folder):
        raise UsageError(
            "the bundle would lie within the export, which stays as it is",
            seen=out,
            fix="choose another place with --out",
        )
    with write_bundle(out, force=options.force) as draft:
        _write_tokenizer(draft, found.folder, recipe, facts, manifest)
        for each in patched:
            for location, path in each.graph.weight_files.items():
                if not (draft.folder / location).exists():
                    draft.place(path, location, hold="copy" if options.copy_weights else "link")
            if each.component == EMBED:
                draft.place(embed.path, each.file, hold="copy")
            else:
                save_patched(each.graph, draft.folder / each.file)
        with progress.stage("hashing"):
            source = _describe_source(draft, found, graphs)
            manifest = replace(manifest, source=source)
            _check_readable(manifest, found.folder)
            manifest = draft.commit(manifest)
    warnings += _rounding(reach, manifest)
    return PatchReport(bundle=out, manifest=manifest, rotary=reach.rotary, warnings=tuple(warnings))


def _of_one_canvas(vision: ForeignGraph, recipe: Recipe) -> list[str]:
    """That an encoder was made for a canvas that nothing in it shows, where it was."""
    graph = vision.model.graph
    if not takes_patches(graph) or reads_any_grid(graph):
        return []
    # As many patches in other rows and columns give features, and wrong ones.
    return [
        "the vision encoder is not told the rows and columns of its patches, so it was made for "
        f"one canvas; that this is {recipe.image.width}x{recipe.image.height} pixels is taken from "
        "recipe and --canvas, and cannot be seen in the export"
    ]


def _rounding(reach: PositionReach, manifest: Manifest) -> list[str]:
    """That ids are rounded before RoPE, where it changes any."""
    if not reach.rounded or manifest.decoder.max_position_embeddings <= _EXACT_IN_16_BITS:
        return []
    return [
        f"the export rounds position ids to 16 bits before RoPE ({', '.join(reach.rounded)}): "
        f"above {_EXACT_IN_16_BITS} they are not exact, there as here"
    ]


def _read_graphs(found: FoundExport, progress: Progress) -> dict[str, ForeignGraph]:
    """All graphs; no two weight files have one name in the bundle, and none a name of its own."""
    graphs: dict[str, ForeignGraph] = {}
    with progress.stage("reading graphs", total=len(found.graphs)) as advance:
        for component, path in found.graphs.items():
            graphs[component] = read_graph(path)
            advance(1)
    taken: dict[str, Path] = {}
    reserved = {MANIFEST_NAME, HASH_NAME, TOKENIZER, *(f"{name}.onnx" for name in COMPONENTS)}
    for graph in graphs.values():
        for location, path in graph.weight_files.items():
            is_other = taken.setdefault(location, path.resolve()) != path.resolve()
            if location in reserved or location.startswith(f"{ENGINES_FOLDER}/") or is_other:
                raise UsageError(
                    "a file of weights has a name that a bundle needs for something else",
                    seen=f"{location}, read by {graph.path}",
                    fix="export the model again with other names",
                )
    return graphs


class _RaiseIrVersion(GraphPass):
    """Declares the first version of the file format that knows functions."""

    def apply(self, model: ir.Model) -> bool:
        """Raise it where it is lower."""
        before = model.ir_version
        model.ir_version = max(before, _MIN_IR_VERSION)
        return model.ir_version != before


DECODER_PASSES: tuple[GraphPass, ...] = (_RaiseIrVersion(), InsertGapRemap())


@contextmanager
def _blaming(graph: ForeignGraph) -> Iterator[None]:
    """What a pass declines, the export's maker or its user must mend: usage, not a failure."""
    try:
        yield
    except PassError as err:
        raise UsageError(
            f"{graph.path} cannot be patched: {err.what}",
            seen=err.seen,
            allowed=err.allowed,
            fix=err.fix,
        ) from err


def _look_at_decoder(graph: ForeignGraph) -> tuple[DecoderFacts, PositionReach]:
    if any(node.domain == GAP_DOMAIN for node in all_nodes(graph.model)):
        raise PassError(
            "the decoder is patched already",
            seen=f"a node of domain {GAP_DOMAIN}",
            fix="patch the export as its maker left it",
        )
    facts = read_decoder_interface(graph.model.graph)
    check_cache_roles(graph.model.graph, facts.num_layers)
    return facts, find_position_reach(OnnxFile.read(graph.path), POSITION_IDS)


def _check_embedding(graph: ir.Graph) -> None:
    seen = [[str(v.name) for v in graph.inputs], [str(v.name) for v in graph.outputs]]
    if seen != [["input_ids"], ["inputs_embeds"]]:
        raise PassError(
            "the word embedding takes or gives something else",
            seen=f"{', '.join(seen[0])} -> {', '.join(seen[1])}",
            allowed="input_ids -> inputs_embeds",
        )


def _check_vision(model: ir.Model, recipe: Recipe) -> None:
    """See that an image of the recipe's goes in, and a grid of its tokens comes out.

    The number of tokens is worked out from the graph: indices of another grid would select
    something, without an error.
    """
    # First, since shapes of another opset's operators cannot be worked out.
    check_opset(model)
    for value in model.graph.inputs:
        height, width = static_dim(value, 2), static_dim(value, 3)
        image = recipe.image
        if height not in (None, image.height) or width not in (None, image.width):
            raise PassError(
                "the vision encoder reads images of another size",
                seen=value.shape,
                allowed=f"[images, 3, {image.height}, {image.width}], as in recipe {recipe.name}",
            )
    features = next((v for v in model.graph.outputs if v.name == FEATURES), None)
    if features is None or static_dim(features, 1) is not None:
        return  # the pass itself has the numbers it needs
    shape = next(v.shape for v in with_shapes(model).graph.outputs if v.name == FEATURES)
    tokens = None if shape is None or shape.rank() != 3 else shape[1]
    if tokens != recipe.grid.num_visual_tokens:
        raise PassError(
            f"{FEATURES} has not got the shape that recipe {recipe.name} says, or none that can be "
            "worked out",
            seen=shape,
            allowed=f"[images, {recipe.grid.num_visual_tokens}, width]",
        )


def _check_readable(manifest: Manifest, export: Path) -> None:
    """See that a bundle of these sizes would be read, before it gets its name."""
    try:
        parse_manifest(manifest.to_json())
    except BundleError as err:
        raise UsageError(
            f"{export} cannot be patched: {err.what.removeprefix('gap.json: ')}",
            seen=err.seen,
            allowed=err.allowed,
            fix="its graphs or its configs say so; get the export again, or export the model again",
        ) from err


def _write_tokenizer(
    draft: BundleDraft, folder: Path, recipe: Recipe, facts: ModelFacts, manifest: Manifest
) -> None:
    source = folder / TOKENIZER
    if not source.is_file():
        raise CheckpointError(
            "the export has no tokenizer",
            seen=source,
            fix=f"copy the model's {TOKENIZER} there",
        )
    draft.place(source, TOKENIZER, hold="copy")
    check_prompt(manifest, draft.folder, facts.image_token_id, str(folder))
    check_special_tokens(recipe, draft.folder / TOKENIZER)


def _describe_source(
    draft: BundleDraft, found: FoundExport, graphs: dict[str, ForeignGraph]
) -> SourceSpec:
    files = [found.folder / name for name in (CONFIG, GENERATION, PREPROCESSOR, TOKENIZER)]
    files += [
        path for graph in graphs.values() for path in (graph.path, *graph.weight_files.values())
    ]
    here = [path for path in dict.fromkeys(files) if path.is_file()]
    for path in here:
        draft.hasher.start(path)
    return describe_source(draft, Checkpoint.of(found.folder), [(MAIN, path) for path in here])
