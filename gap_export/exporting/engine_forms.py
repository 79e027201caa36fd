"""What the export makes for TensorRT: which forms of the graphs, how large, and the verdicts.

The engines themselves are built from the finished bundle, by ``gap_export.engines``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gap_export.engines.targets import Lowering, Platform, TargetChoice
from gap_export.errors import UsageError
from gap_export.graph.onnx_file import OnnxFile
from gap_export.spec.manifest import (
    EngineLimits,
    GraphSpec,
    ImageSpec,
    Manifest,
    PreflightVerdict,
    TargetSpec,
)
from gap_export.spec.requests import LimitsRequest

_SLACK = 4


@dataclass(frozen=True, kw_only=True)
class GraphForm:
    """One form of all graphs of a bundle.

    Attributes:
        lowering: What operators they are made of.
        dtype: Of their floats.
    """

    lowering: str
    dtype: str


def choose_form(
    choices: Sequence[TargetChoice], *, base_dtype: str, lowering: Lowering | None
) -> dict[str, GraphForm]:
    """The form of the graphs each target's engines are built from, by target name.

    Args:
        choices: Targets; several may be of one name.
        base_dtype: Of the bundle; a target that has not got it takes its own first.
        lowering: What the user wants; None for the best that all of a target's platforms build.

    Raises:
        UsageError: no platform of the target builds that lowering.
    """
    forms: dict[str, GraphForm] = {}
    for choice in choices:
        target = choice.target
        known = {name for platform in target.platforms for name in platform.lowerings}
        if lowering is not None and lowering not in known:
            raise UsageError(
                f"target {target.name} builds no such lowering",
                seen=lowering,
                allowed=", ".join(sorted(known)),
            )
        dtypes = [name for name in target.dtypes if choice.supports(name)]
        dtype = base_dtype if base_dtype in dtypes else dtypes[0]
        known_form = forms.get(target.name)
        if known_form is not None and known_form.dtype != dtype:
            # One generation has not got the others' dtype, and a target has one form.
            dtype = target.dtypes[0]
        forms[target.name] = GraphForm(lowering=lowering or target.lowering, dtype=dtype)
    return forms


def find_limits(
    manifest: Manifest,
    *,
    num_template_tokens: int,
    request: LimitsRequest,
) -> EngineLimits:
    """The sizes engines are built for: the largest the bundle can be asked for, if not said.

    Args:
        manifest: Of the bundle to be.
        num_template_tokens: Of the prompt, without image and expression.
        request: What is asked for.

    Raises:
        UsageError: too small to ask anything, or beyond the model's context.
    """
    visual = _max_visual_tokens(manifest)
    # In the middle of a prompt a text may take some tokens more than alone.
    largest = num_template_tokens + visual + manifest.prompt.max_expression_tokens + _SLACK
    smallest = num_template_tokens + visual + 1
    context = manifest.decoder.max_position_embeddings
    chosen = min(largest, context) if request.max_prompt is None else request.max_prompt
    if not smallest <= chosen <= context:
        raise UsageError(
            "no such --max-prompt",
            seen=chosen,
            allowed=f"{smallest}..{context}: the template takes {num_template_tokens} tokens, the "
            f"image {visual}, the expression at least one, the model's context is {context}",
        )
    answer, batch = request.max_new_tokens, request.max_batch
    answer = manifest.prompt.max_new_tokens if answer is None else answer
    batch = 1 if batch is None else batch
    if not 1 <= answer <= context:
        raise UsageError("no such --max-new-tokens", seen=answer, allowed=f"1..{context}")
    if batch < 1:
        raise UsageError("no such --batch", seen=batch, allowed=">= 1")
    # Beside the base tile, which an image that is not cut is alone.
    tiles = max((rows * columns for rows, columns in _tilings(manifest.image)), default=0)
    return EngineLimits(
        max_prompt=chosen,
        max_new_tokens=answer,
        max_batch=batch,
        max_images=max(1 + tiles, batch),
    )


def describe_targets(
    folder: Path,
    choices: Sequence[TargetChoice],
    forms: Mapping[str, GraphForm],
    graphs: Iterable[GraphSpec],
) -> tuple[TargetSpec, ...]:
    """What the bundle has for each target, with a verdict where it is built elsewhere.

    Args:
        folder: Where the graphs lie.
        choices: The targets.
        forms: By target name.
        graphs: All graphs of the bundle.
    """
    graphs = tuple(graphs)
    specs: dict[str, TargetSpec] = {}
    for choice in choices:
        target, form = choice.target, forms[choice.target.name]
        if target.name in specs:
            continue
        able = [p for p in target.platforms if form.lowering in p.lowerings]
        verdicts = [
            _preflight(folder / graph.file, graph.component, able[0])
            for graph in graphs
            if target.built_on == "device" and (graph.lowering, graph.dtype) == _key(form)
        ]
        specs[target.name] = TargetSpec(
            name=target.name, lowering=form.lowering, dtype=form.dtype, preflight=tuple(verdicts)
        )
    return tuple(specs.values())


def _preflight(path: Path, component: str, platform: Platform) -> PreflightVerdict:
    """What can be said, before it travels, of building a graph with a platform's TensorRT.

    The lowering itself has refused every operator that no TensorRT of the platform takes.
    """
    file = OnnxFile.read(path)
    used = {node.op_type for node in (*file.all_nodes, *file.function_nodes)}
    notes = {name: why for name, why in platform.undocumented.items() if name in used}
    return PreflightVerdict(
        component=component,
        verdict="unverified" if notes else "fine",
        operators=tuple(notes),
        reasons=tuple(f"{platform.name}: {why}" for why in notes.values()),
    )


def _key(form: GraphForm) -> tuple[str, str]:
    return form.lowering, form.dtype


def _tilings(image: ImageSpec) -> list[tuple[int, int]]:
    """Rows and columns of tiles an image may be cut into; none where images are not cut."""
    if image.tiles is None:
        return []
    return [
        (height // image.height, width // image.width) for height, width in image.tiles.resolutions
    ]


def _max_visual_tokens(manifest: Manifest) -> int:
    """Visual tokens of one image after pruning, at most."""
    emitted = manifest.pruning.num_emitted_tokens
    # Each row of a joined grid ends in a newline token.
    newlines = manifest.grid.rows if manifest.image.has_newlines else 0
    return max(
        (
            emitted * (1 + rows * columns) + newlines * rows
            for rows, columns in _tilings(manifest.image)
        ),
        default=emitted,
    )
