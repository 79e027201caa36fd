"""``gap-export inspect BUNDLE``: what it is, and where the GapRemap node sits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from gap_export.cli._describe import (
    describe_engines,
    describe_shared,
    describe_targets,
    describe_tokens,
    find_engines,
)
from gap_export.cli._options import (
    BundleArgument,
    JsonOption,
    QuietOption,
    VerboseOption,
    terminal_of,
)
from gap_export.cli._terminal import format_size, format_table
from gap_export.visible import visible, visible_strings

if TYPE_CHECKING:
    from gap_export.bundle import Bundle
    from gap_export.spec.manifest import FileSpec, Manifest, TensorSpec

GAP_REMAP = "GapRemap"


def inspect_bundle(
    ctx: typer.Context,
    bundle: BundleArgument,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Say what a bundle is, and where GapRemap sits."""
    from gap_export.bundle import open_bundle
    from gap_export.spec.manifest import to_plain

    terminal = terminal_of(ctx)
    opened = open_bundle(bundle)
    tokens = _token_accounting(opened.manifest)
    remaps = _find_remaps(opened)
    engines = find_engines(opened)
    if as_json:
        terminal.json(
            {
                "bundle": str(opened.path),
                "size_bytes": _total_size(opened.manifest),
                "tokens": tokens,
                "gap_remap": remaps,
                "engines": engines,
                "manifest": to_plain(opened.manifest),
            }
        )
        return
    shown = visible_strings(opened.manifest)
    sections = [
        _describe_model(opened, shown),
        _describe_tokens(tokens, shown),
        _describe_graphs(shown),
        _describe_remaps(visible_strings(remaps)),
        *describe_targets(shown),
        *describe_engines(visible_strings(engines)),
        _describe_files(opened),
    ]
    terminal.result("\n\n".join(sections))


def _total_size(manifest: Manifest) -> int:
    return sum(file.size for file in manifest.files)


def _token_accounting(manifest: Manifest) -> dict[str, int]:
    """What pruning saves in the KV cache, in tokens and bytes of one row."""
    pruning, decoder = manifest.pruning, manifest.decoder
    width = {"float32": 4, "float16": 2, "bfloat16": 2}[manifest.dtype]
    per_token = 2 * decoder.num_layers * decoder.num_key_value_heads * decoder.head_dim * width
    dropped = pruning.num_visual_tokens - pruning.num_emitted_tokens
    return {
        "num_visual_tokens": pruning.num_visual_tokens,
        "num_kept_tokens": pruning.num_kept_tokens,
        "num_emitted_tokens": pruning.num_emitted_tokens,
        "kv_cache_bytes_per_token": per_token,
        "kv_cache_bytes_saved": dropped * per_token,
        "max_position_embeddings": decoder.max_position_embeddings,
    }


def _find_remaps(bundle: Bundle) -> list[dict[str, Any]]:
    """Every GapRemap node, read from the graphs themselves, with the nodes that read its output."""
    from gap_export.graph.onnx_file import OnnxFile

    found = []
    for graph in bundle.manifest.graphs:
        nodes = OnnxFile.read(bundle.file(graph.file)).nodes
        for node in nodes:
            if node.op_type != GAP_REMAP:
                continue
            readers = [n for n in nodes if set(n.inputs) & set(node.outputs)]
            found.append(
                {
                    "file": graph.file,
                    "node": node.name,
                    "domain": node.domain,
                    "inputs": list(node.inputs),
                    "outputs": list(node.outputs),
                    "consumers": [{"node": n.name, "op_type": n.op_type} for n in readers],
                }
            )
    return found


def _describe_model(bundle: Bundle, manifest: Manifest) -> str:
    """Of a bundle; the manifest is its own, cleaned to be shown."""
    model, pruning, tower = manifest.model, manifest.pruning, manifest.text_encoder
    size = format_size(_total_size(manifest))
    shared = describe_shared(file for file in bundle.manifest.files if not _is_copy(bundle, file))
    lines = [
        f"{model.name} (family {model.family}, {model.license}): {model.summary}",
        f"bundle     {visible(str(bundle.path))}",
        f"size       {size}, of which {shared or 'nothing shared'}",
        f"graphs     {manifest.dtype}, opset {manifest.opset}",
        f"pruning    {pruning.pruner}, keep {pruning.keep_ratio:g}, order {pruning.order}, "
        f"extra token {pruning.extra_token}"
        + ("" if pruning.seed is None else f", seed {pruning.seed}"),
        f"positions  {pruning.positions}",
        *(
            [f"text       {tower.component} reads the {pruning.pruner_text}: {tower.template!r}"]
            if tower
            else []
        ),
        *_describe_source(manifest),
        "made with  " + ", ".join(f"{name} {text}" for name, text in manifest.tools.items()),
    ]
    return "\n".join(lines)


def _describe_source(manifest: Manifest) -> list[str]:
    source = manifest.source
    if source.random_seed is not None:
        return [f"source     none: RANDOM weights, seed {source.random_seed}; answers are noise"]
    return [
        f"source     {part.role}: {part.location} ({len(part.files)} files, "
        f"{format_size(sum(file.size for file in part.files))})"
        for part in source.parts
    ]


def _describe_tokens(tokens: dict[str, int], manifest: Manifest) -> str:
    grid, tiles = manifest.grid, manifest.image.tiles
    unit = "an image" if tiles is None else "a tile"
    whose = f", tiles as of {tiles.follows}" if tiles and manifest.image.has_newlines else ""
    # Rows and columns of each canvas, where there are several.
    sides = manifest.image.grids or ((grid.rows, grid.cols),)
    shape = " or ".join(f"{rows}x{cols}" for rows, cols in sides)
    least = "at least " if manifest.pruning.budget == "adaptive" else ""
    return (
        f"tokens     {describe_tokens(manifest)}, {shape} grid{whose}; "
        f"ids up to {tokens['max_position_embeddings'] - 1}\n"
        f"KV cache   {format_size(tokens['kv_cache_bytes_per_token'])} a token, "
        f"{least}{format_size(tokens['kv_cache_bytes_saved'])} {unit} saved"
    )


def _describe_graphs(manifest: Manifest) -> str:
    lines = []
    for graph in manifest.graphs:
        quantized = "" if graph.quantization is None else f", {graph.quantization.dtype} weights"
        quantized += ", int8 layers" if graph.linear_layers == "int8" else ""
        form = f"{graph.lowering}, {graph.dtype}{quantized}"
        lines.append(f"{graph.file} ({graph.component}, {form})")
        for arrow, specs in (("<-", graph.inputs), ("->", graph.outputs)):
            lines += [f"  {arrow} {line}" for line in _merge_layers(specs)]
    return "\n".join(lines)


def _merge_layers(specs: tuple[TensorSpec, ...]) -> list[str]:
    """One line a tensor; the cache tensors of all layers as one, with ``{i}`` for the layer."""
    merged: dict[str, int] = {}
    for spec in specs:
        name = ".".join("{i}" if part.isdigit() else part for part in spec.name.split("."))
        shape = ", ".join(map(str, spec.shape))
        line = f"{name} [{shape}] {spec.dtype}"
        merged[line] = merged.get(line, 0) + 1
    return [line if count == 1 else f"{line} (x{count})" for line, count in merged.items()]


def _describe_remaps(remaps: list[dict[str, Any]]) -> str:
    if not remaps:
        return f"{GAP_REMAP}: in no graph; position ids reach the decoder as they are fed"
    lines = []
    for remap in remaps:
        readers = ", ".join(f"{c['node'] or '?'} ({c['op_type']})" for c in remap["consumers"])
        lines += [
            f"{GAP_REMAP} in {remap['file']}: node {remap['node']}, domain {remap['domain']}",
            f"  <- {', '.join(remap['inputs'])}",
            f"  -> {', '.join(remap['outputs'])}, read by {readers or 'nothing'}",
        ]
    return "\n".join(lines)


def _is_copy(bundle: Bundle, file: FileSpec) -> bool:
    """Whether a file that was linked when exported is the bundle's alone, by a copy of it."""
    return file.held == "linked" and bundle.file(file.path).stat().st_nlink == 1


def _describe_files(bundle: Bundle) -> str:
    rows = [
        [
            file.path,
            format_size(file.size),
            "was linked" if _is_copy(bundle, file) else file.held,
            file.sha256[:12],
        ]
        for file in bundle.manifest.files
    ]
    return format_table(["file", "size", "held", "sha256"], rows)
