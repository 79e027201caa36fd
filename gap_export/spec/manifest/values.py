"""Which values a manifest may hold, beyond their types.

A bundle may come from anywhere: a number out of range is refused here, by name, before anything
computes or allocates with it.
"""

from __future__ import annotations

import math
import re
from pathlib import PurePosixPath

from gap_export.errors import BundleError
from gap_export.spec.manifest.facts import MAX_TOKENS, wrong_facts, wrong_template
from gap_export.spec.manifest.graphs import GraphSpec
from gap_export.spec.manifest.sizes import decoder_sizes, engine_sizes, image_sizes
from gap_export.spec.manifest.specs import Manifest, PruningSpec
from gap_export.spec.preparations import WITH_NEWLINE

DTYPES = ("float32", "float16", "bfloat16")
_DECODER = "decoder_model_merged"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_VISUAL_TOKENS = 1_000_000
_MAX_OPSET = 26
# Far above any model there is; they keep arithmetic and allocations sane, no more.
_MAX_LAYERS = 10_000
_MAX_WIDTH = 1 << 20
_MAX_VOCABULARY = 1 << 24
# Ids are turned into float32 for RoPE, which holds integers exactly up to here.
_MAX_POSITIONS = 1 << 24
_MAX_DIMENSION = 1 << 31
_MAX_RANK = 8
_MAX_INT64 = (1 << 63) - 1


def check_values(manifest: Manifest) -> None:
    """Refuse a manifest whose values are of the right type but make no sense.

    Raises:
        BundleError: a value out of its range, or two that contradict each other.
    """
    for name, seen, allowed in wrong_facts(
        manifest.grid, manifest.image, manifest.prompt, manifest.box
    ):
        raise _refuse(name, seen, allowed)
    _check_tokens(manifest)
    _check_texts(manifest)
    _check_decoder(manifest)
    _check_baked(manifest)
    _check_sizes(manifest)
    _check_newline(manifest)
    _check_graphs(manifest)
    _check_engines(manifest)
    _check_files(manifest)


def check_member_path(path: str) -> PurePosixPath:
    """A relative POSIX path that stays within the bundle.

    Raises:
        BundleError: absolute, with ``..``, a backslash, a drive, or empty parts.
    """
    pure = PurePosixPath(path)
    unsafe = "\\" in path or ":" in path or "\0" in path or pure.is_absolute()
    if unsafe or not pure.parts or ".." in pure.parts or str(pure) != path:
        raise BundleError(
            "a path in the bundle leaves its folder or is not plain",
            seen=repr(path),
            allowed="relative paths with forward slashes and no '..'",
            fix="do not use this bundle; get it again from a source you trust",
        )
    return pure


def _refuse(name: str, seen: object, allowed: str) -> BundleError:
    return BundleError(
        f"gap.json: {name} is not a sensible value",
        seen=repr(seen),
        allowed=allowed,
        fix="export the bundle again",
    )


def _between(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise _refuse(name, value, f"{low}..{high}")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise _refuse(name, value, ", ".join(allowed))


def _check_tokens(manifest: Manifest) -> None:
    grid, pruning = manifest.grid, manifest.pruning
    total = grid.num_visual_tokens
    _between("grid.rows x grid.cols", total, 1, _MAX_VISUAL_TOKENS)
    if pruning.num_visual_tokens != total:
        raise _refuse(
            "pruning.num_visual_tokens", pruning.num_visual_tokens, f"{total}, as the grid has"
        )
    _between("pruning.num_kept_tokens", pruning.num_kept_tokens, 1, total)
    _between(
        "pruning.num_emitted_tokens",
        pruning.num_emitted_tokens,
        pruning.num_kept_tokens,
        _MAX_VISUAL_TOKENS,
    )
    _check_extra(pruning)
    if not 0 < pruning.keep_ratio <= 1:
        raise _refuse("pruning.keep_ratio", pruning.keep_ratio, "above 0, at most 1")
    for name, seed in (
        ("pruning.seed", pruning.seed),
        ("source.random_seed", manifest.source.random_seed),
    ):
        if seed is not None:
            _between(name, seed, 0, _MAX_INT64)
    if (manifest.source.random_seed is None) != bool(manifest.source.parts):
        raise _refuse("source", manifest.source.random_seed, "parts of a checkpoint, or a seed")
    if pruning.text_similarity_sign not in (None, 1, -1):
        raise _refuse("pruning.text_similarity_sign", pruning.text_similarity_sign, "1, -1 or null")


def _check_baked(manifest: Manifest) -> None:
    baked, decoder = manifest.pruning.baked_positions, manifest.decoder
    if not baked:
        return
    lengths = {len(row) for row in baked}
    if len(baked) != decoder.position_axes or len(lengths) != 1 or lengths == {0}:
        wanted = f"{decoder.position_axes} rows of one length, 1 or more"
        raise _refuse("pruning.baked_positions", [len(row) for row in baked], wanted)
    for row in baked:
        for position in row:
            _between("pruning.baked_positions", position, 0, decoder.max_position_embeddings - 1)


def _check_extra(pruning: PruningSpec) -> None:
    extra = pruning.num_emitted_tokens - pruning.num_kept_tokens
    if extra != int(pruning.extra_token != "none"):
        raise _refuse(
            "pruning.num_emitted_tokens",
            pruning.num_emitted_tokens,
            f"num_kept_tokens, and one more with an extra token ({pruning.extra_token})",
        )
    buckets = pruning.kept_buckets
    if buckets and pruning.budget != "adaptive":
        raise _refuse("pruning.kept_buckets", buckets, "empty without an adaptive budget")
    if buckets and (
        list(buckets) != sorted(set(buckets))
        or buckets[0] < 1
        or buckets[-1] != pruning.num_kept_tokens
    ):
        raise _refuse("pruning.kept_buckets", buckets, "ascending, up to num_kept_tokens")


def _check_newline(manifest: Manifest) -> None:
    newline = manifest.newline
    if (newline is not None) != manifest.image.has_newlines:
        named = " or ".join(WITH_NEWLINE)
        raise _refuse("newline", newline, f"a tensor with preparation {named}, and only there")
    if newline is None:
        return
    if newline.shape != (manifest.decoder.hidden_size,):
        raise _refuse("newline.shape", newline.shape, f"[{manifest.decoder.hidden_size}]")
    _one_of("newline.dtype", newline.dtype, DTYPES)
    _between("newline.offset", newline.offset, 0, _MAX_INT64)


def _check_texts(manifest: Manifest) -> None:
    tower = manifest.text_encoder
    if tower is not None:
        _between("text_encoder.max_tokens", tower.max_tokens, 1, MAX_TOKENS)
        for name, seen, allowed in wrong_template("text_encoder.template", tower.template):
            raise _refuse(name, seen, allowed)
    if manifest.pruning.pruner_text == "question":
        question = manifest.prompt.question_template()
        if question is None or tower is None or tower.template != question:
            raise _refuse(
                "pruning.pruner_text",
                "question",
                "expression, unless text_encoder.template is the question of prompt.template",
            )


def _check_decoder(manifest: Manifest) -> None:
    spec = manifest.decoder
    for name, value, most in (
        ("num_layers", spec.num_layers, _MAX_LAYERS),
        ("num_key_value_heads", spec.num_key_value_heads, _MAX_WIDTH),
        ("head_dim", spec.head_dim, _MAX_WIDTH),
        ("hidden_size", spec.hidden_size, _MAX_WIDTH),
        ("vocab_size", spec.vocab_size, _MAX_VOCABULARY),
        ("max_position_embeddings", spec.max_position_embeddings, _MAX_POSITIONS),
    ):
        _between(f"decoder.{name}", value, 1, most)
    if not spec.eos_token_ids:
        raise _refuse("decoder.eos_token_ids", [], "at least one id")
    for index, token in enumerate(spec.eos_token_ids):
        _between(f"decoder.eos_token_ids[{index}]", token, 0, _MAX_VOCABULARY)
    _between("decoder.num_taps", spec.num_taps, 0, spec.num_layers)
    if spec.num_heads is not None:
        _between("decoder.num_heads", spec.num_heads, 1, _MAX_WIDTH)
    if spec.position_axes > 1 and manifest.image.tiles is not None:
        raise _refuse("decoder.position_axes", spec.position_axes, "1 with image.tiles")
    most = spec.head_dim // 2 if spec.position_axes > 1 else 0
    _between("number of decoder.rope_axes", len(spec.rope_axes), 0, most)
    for index, axis in enumerate(spec.rope_axes):
        _between(f"decoder.rope_axes[{index}]", axis, 0, spec.position_axes - 1)


def _check_sizes(manifest: Manifest) -> None:
    """Refuse sizes that are sensible one by one and not together."""
    image, grid, decoder = manifest.image, manifest.grid, manifest.decoder
    products = [*image_sizes(image, grid), *decoder_sizes(image, grid, manifest.prompt, decoder)]
    if manifest.engine_limits is not None:
        products += engine_sizes(manifest.engine_limits, image, decoder)
    for name, seen, most in products:
        _between(name, seen, 1, most)


def _check_graphs(manifest: Manifest) -> None:
    _one_of("dtype", manifest.dtype, DTYPES)
    _between("opset", manifest.opset, 1, _MAX_OPSET)
    for graph in manifest.graphs:
        _one_of(f"dtype of {graph.file}", graph.dtype, DTYPES)
        if graph.quantization is not None:
            block = graph.quantization.block_size
            _between(f"quantization.block_size of {graph.file}", block, 2, _MAX_WIDTH)
        for tensor in (*graph.inputs, *graph.outputs):
            where = f"shape of {tensor.name} in {graph.file}"
            _between(f"rank of {where}", len(tensor.shape), 0, _MAX_RANK)
            fixed = [size for size in tensor.shape if isinstance(size, int)]
            for size in fixed:
                _between(where, size, 0, _MAX_DIMENSION)
            _between(f"numbers of {where}", math.prod(fixed), 0, _MAX_DIMENSION)
        if graph.component == _DECODER:
            _check_cache(graph, num_layers=manifest.decoder.num_layers)
            axes = manifest.decoder.position_axes
            for tensor in graph.inputs:
                has_axes = len(tensor.shape) == 3 and tensor.shape[0] == axes
                if tensor.name == "kept_positions" and has_axes != (axes > 1):
                    wanted = f"[{axes}, batch, prompt]" if axes > 1 else "[batch, prompt]"
                    raise _refuse(f"shape of {tensor.name} in {graph.file}", tensor.shape, wanted)


def _check_engines(manifest: Manifest) -> None:
    limits = manifest.engine_limits
    if (limits is not None) != bool(manifest.targets):
        raise _refuse("engine_limits", limits, "there with targets, and only there")
    if limits is None:
        return
    for name, value in vars(limits).items():
        _between(f"engine_limits.{name}", value, 1, MAX_TOKENS)
    for target in manifest.targets:
        made = {(graph.lowering, graph.dtype) for graph in manifest.graphs}
        if manifest.graphs and (target.lowering, target.dtype) not in made:
            raise _refuse(
                f"targets: graphs of {target.name}",
                f"{target.lowering} {target.dtype}",
                ", ".join(f"{lowering} {dtype}" for lowering, dtype in sorted(made)),
            )


def _check_cache(graph: GraphSpec, *, num_layers: int) -> None:
    """A key and a value per layer, or the cache that is fed back would not fit the graph."""
    seen = sum(tensor.name.startswith("past_key_values.") for tensor in graph.inputs)
    if seen != 2 * num_layers:
        raise _refuse(
            f"number of past_key_values inputs of {graph.file}",
            seen,
            f"{2 * num_layers}, a key and a value for each of decoder.num_layers",
        )


def _check_files(manifest: Manifest) -> None:
    for name, path, size in (
        *(
            (f"source.{part.role}", file.path, file.size)
            for part in manifest.source.parts
            for file in part.files
        ),
        *(("files", file.path, file.size) for file in manifest.files),
    ):
        _between(f"{name}: size of {path}", size, 0, _MAX_INT64)
    for file in manifest.files:
        if _SHA256.fullmatch(file.sha256) is None:
            raise _refuse(f"files: sha256 of {file.path}", file.sha256, "64 hex digits, lower case")
