"""Optimization profiles: which shapes an engine is built for, from a graph's named dimensions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from gap_export.engines.plan import ProfileName, ProfileSpec, ShapeRange
from gap_export.errors import BundleError, UsageError
from gap_export.spec.manifest import EngineLimits, GraphSpec, Manifest

# Smallest, usual and largest size of a dimension.
Sizes = tuple[int, int, int]
_PAST, _SLOTS = "past_key_values.", 2


def make_profiles(
    manifest: Manifest, graph: GraphSpec, limits: EngineLimits
) -> tuple[ProfileSpec, ...]:
    """The profiles of a graph's engine.

    A graph with a KV cache has two: ``prefill`` reads a whole prompt into an empty cache,
    ``decode`` one token after at least one slot. Another graph has one, ``only``. In each, the
    shapes of all inputs belong together: the attention mask is as long as past and new tokens are.
    An input of a dimension's name holds the size of that dimension.

    Args:
        manifest: The bundle's.
        graph: One of its graphs.
        limits: The largest sizes; the manifest's own, or smaller ones.

    Returns:
        In the order the engine is to have them.

    Raises:
        BundleError: the graph has a dimension of a name that nothing is known of.
    """
    if graph.kv_contract == "none":
        return (_profile("only", graph, _plain_sizes(manifest, graph, limits)),)
    capacity, usual = cache_capacity(limits), limits.max_prompt
    # Most of a prompt are visual tokens, whose number hardly varies: it is close to the largest.
    whole = (1, limits.max_prompt, limits.max_prompt)
    common = {
        "batch_size": (1, 1, limits.max_batch),
        "prompt_length": (1, usual, usual),
        "cache_capacity": (capacity,) * 3,
    }
    prefill = {
        "sequence_length": whole,
        "past_sequence_length": (0, 0, 0),
        "total_sequence_length": whole,
    }
    decode = {
        "sequence_length": (1, 1, 1),
        "past_sequence_length": (1, usual, capacity - 1),
        "total_sequence_length": (2, usual + 1, capacity),
    }
    return (
        _profile("prefill", graph, common | prefill),
        _profile("decode", graph, common | decode),
    )


def cache_capacity(limits: EngineLimits) -> int:
    """Slots of the KV cache: those of the prompt and of the answer."""
    return limits.max_prompt + limits.max_new_tokens


def check_cache_capacity(graphs: Iterable[GraphSpec], limits: EngineLimits) -> None:
    """See that the caches of graphs that are written in place have room for what is asked.

    Their number of slots is in the graph, as TensorRT demands; engines of fewer can be built from
    it, of more not. Caches that grow have no such bound.

    Args:
        graphs: Graphs of the bundle.
        limits: The sizes engines are to be built for.

    Raises:
        UsageError: more slots than a graph has.
    """
    wanted = cache_capacity(limits)
    for graph in graphs:
        if graph.kv_contract != "in_place":
            continue
        slots = [t.shape[_SLOTS] for t in graph.inputs if t.name.startswith(_PAST)]
        held = min((size for size in slots if isinstance(size, int)), default=wanted)
        if wanted > held:
            raise UsageError(
                f"the cache of {graph.file} has a fixed number of slots, too few for this prompt "
                "and answer",
                seen=f"--max-prompt {limits.max_prompt} and --max-new-tokens "
                f"{limits.max_new_tokens}, {wanted} slots",
                allowed=f"{held} slots together",
                fix=f"export again with --max-prompt {limits.max_prompt} --max-new-tokens "
                f"{limits.max_new_tokens}, or with --lowering portable, whose cache grows",
            )


def _plain_sizes(manifest: Manifest, graph: GraphSpec, limits: EngineLimits) -> dict[str, Sizes]:
    prompt, images = limits.max_prompt, limits.max_images
    text = prompt if manifest.text_encoder is None else manifest.text_encoder.max_tokens
    names = {dim for tensor in graph.inputs for dim in tensor.shape}
    # Tiles come each with its own copy of the text; a whole image with all that is asked of it.
    tiled = "num_images" in names and manifest.image.tiles is not None
    batch = images if tiled else limits.max_batch
    # The tiles of an image come all at once; whole images mostly one at a time.
    usual = 1 if manifest.image.tiles is None else images
    most = manifest.pruning.num_kept_tokens
    return {
        "batch_size": (1, usual if tiled else 1, batch),
        "num_images": (1, usual, images),
        "sequence_length": (1, max(1, prompt // 2), prompt),
        "text_length": (1, max(1, text // 2), text),
        # The number is an input, so that one profile takes every one of its range.
        "num_kept_tokens": (1, max(1, most // 2), most),
    }


def _profile(name: ProfileName, graph: GraphSpec, sizes: Mapping[str, Sizes]) -> ProfileSpec:
    shapes, values = {}, {}
    for tensor in graph.inputs:
        dims = []
        for dim in tensor.shape:
            known = (dim, dim, dim) if isinstance(dim, int) else sizes.get(dim)
            if known is None:
                raise BundleError(
                    f"{graph.file} has a dimension that no engine size is known for",
                    seen=f"{dim} of input {tensor.name}",
                    allowed=", ".join(sizes),
                    fix="export the bundle again with this version of gap-export",
                )
            dims.append(known)
        shapes[tensor.name] = _range(dims)
        if tensor.name in sizes:
            values[tensor.name] = _range([sizes[tensor.name]])
    return ProfileSpec(name=name, shapes=shapes, values=values)


def _range(dims: Sequence[Sizes]) -> ShapeRange:
    low, usual, high = (tuple(size[place] for size in dims) for place in range(3))
    return ShapeRange(min=low, opt=usual, max=high)
