"""What to export, and how; and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gap_export.engines.folder import EngineFolder
from gap_export.engines.targets import Lowering, TargetChoice, parse_targets
from gap_export.errors import UsageError
from gap_export.extras import require_extra
from gap_export.spec.manifest import (
    Budget,
    ExtraPosition,
    ExtraToken,
    Manifest,
    Order,
    PrunerText,
    PruningSpec,
    QuantizationSpec,
)
from gap_export.spec.manifest.block_sizes import check_block_size
from gap_export.spec.positions import PositionMode
from gap_export.spec.recipe import Recipe

if TYPE_CHECKING:
    from gap_export.runtime.images.image import ImageInput

Dtype = Literal["float32", "float16", "bfloat16"]
DTYPES: tuple[Dtype, ...] = ("float32", "float16", "bfloat16")
# Held so, a file takes no room of its own.
_SHARED = ("linked", "cloned")


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to export, and how.

    Attributes:
        model: Recipe name, alias, hub id, or a checkpoint folder.
        keep_ratio: Share of the visual tokens to keep, in (0, 1]; None for the recipe's default,
            and for no bound where the budget is adaptive.
        pruner: Name; None for the recipe's default.
        order: ``raster``: kept tokens ascend; ``score``: best first; None for the pruner's.
        extra_token: What stands for the dropped tokens: ``none``, their ``mean``, or their sum
            ``weighted`` by score; None for the pruner's.
        extra_position: Its id: that of the ``last`` visual token, which None is, or of the
            ``centroid``; meant for an extra token alone.
        budget: ``fixed``: the share of every picture; ``adaptive``: what stands out of each, that
            share at most; None for the pruner's where no share is given, else fixed.
        pruner_text: What a pruner that reads the text reads: the ``expression``, or the whole
            ``question``; None for the pruner's.
        positions: ``gap``, or ``compact`` for the naive baseline.
        seed: For pruners that draw, and for random weights.
        out: Bundle folder; None for ``./<model>-<pruner>-<keep>``.
        force: Replace a bundle that is already there. Other folders are never replaced.
        recipe: Recipe for a checkpoint folder that has no recipe.yaml of its own.
        checkpoint: Parts of the checkpoint by role, where they are not to be looked for.
        dtype: Of all weights and of the graphs' interfaces; None for the checkpoint's own.
        copy_weights: Copy weights that could be linked, so that the bundle is a folder like any
            other: some ONNX tools refuse links.
        random_weights: Take no checkpoint; draw weights of the true shape from the seed.
        quantization: Of the decoder's linear layers; None to leave them as they are.
        calibration: Pictures and expressions that AWQ looks at, at least one; meant for it alone.
        targets: What TensorRT is to build for, as ``--trt`` has it, e.g. ``rtx:sm89``; ``auto``:
            all, building what can be built here.
        lowering: Form of the graphs for TensorRT; None for the best each target builds.
        max_prompt: Longest prompt after pruning that engines take; None: the longest there can be.
        max_new_tokens: Longest answer that engines' caches have room for; None: the recipe's.
        max_batch: Most expressions at a time that engines take.
        wheel: Put the running gap-export into the bundle, for devices that build its engines.
    """

    model: str
    keep_ratio: float | None = None
    pruner: str | None = None
    order: Order | None = None
    extra_token: ExtraToken | None = None
    extra_position: ExtraPosition | None = None
    budget: Budget | None = None
    pruner_text: PrunerText | None = None
    positions: PositionMode = "gap"
    seed: int = 0
    out: Path | None = None
    force: bool = False
    recipe: str | None = None
    checkpoint: Mapping[str, Path] = field(default_factory=dict)
    dtype: Dtype | None = None
    copy_weights: bool = False
    random_weights: bool = False
    quantization: QuantizationSpec | None = None
    calibration: tuple[tuple[ImageInput, str], ...] | None = None
    targets: tuple[str, ...] = ()
    lowering: Lowering | None = None
    max_prompt: int | None = None
    max_new_tokens: int | None = None
    max_batch: int = 1
    wheel: bool = False

    def target_choices(self) -> tuple[TargetChoice, ...]:
        """The targets as rows of the table.

        Raises:
            UsageError: an unknown one, one that takes no such weights, or an option that means
                nothing without a target.
        """
        for flag, value, unset in (
            ("--lowering", self.lowering, None),
            ("--max-prompt", self.max_prompt, None),
            ("--max-new-tokens", self.max_new_tokens, None),
            ("--batch", self.max_batch, 1),
        ):
            if not self.targets and value != unset:
                raise UsageError(
                    f"{flag} is about TensorRT engines, and none are asked for",
                    seen=value,
                    fix=f"add --trt, or leave out {flag}",
                )
        choices = parse_targets(self.targets)
        if self.wheel and not any(choice.target.built_on == "device" for choice in choices):
            raise UsageError(
                "--wheel is for bundles whose engines another machine builds",
                seen=", ".join(f"--trt {target}" for target in self.targets) or "no --trt",
                allowed="with --trt orin, thor, desktop, or --trt alone",
                fix="leave out --wheel",
            )
        if self.quantization is not None:
            for choice in choices:
                choice.check_weights(self.quantization.dtype)
        return choices


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What an export left behind.

    Attributes:
        bundle: The bundle's folder.
        manifest: Its manifest.
        seconds: Wall time of each step.
        engines: What was built, one for each target.
        prepared: By folder of a target, why its engines are to be built elsewhere.
    """

    bundle: Path
    manifest: Manifest
    seconds: dict[str, float]
    engines: tuple[EngineFolder, ...] = ()
    prepared: Mapping[str, str] = field(default_factory=dict)

    def to_plain(self) -> dict[str, Any]:
        """JSON form."""
        pruning = self.manifest.pruning
        return {
            "bundle": str(self.bundle),
            "model": self.manifest.model.name,
            "pruner": pruning.pruner,
            "order": pruning.order,
            "extra_token": pruning.extra_token,
            "budget": pruning.budget,
            "positions": pruning.positions,
            "keep_ratio": pruning.keep_ratio,
            "num_visual_tokens": pruning.num_visual_tokens,
            "num_kept_tokens": pruning.num_kept_tokens,
            "dtype": self.manifest.dtype,
            "graphs": [graph.file for graph in self.manifest.graphs],
            "size_bytes": sum(f.size for f in self.manifest.files),
            "new_bytes": sum(f.size for f in self.manifest.files if f.held not in _SHARED),
            "engines": [folder.path.name for folder in self.engines],
            "prepared": dict(self.prepared),
            "seconds": self.seconds,
        }


def resolve_options(recipe: Recipe, options: ExportOptions) -> PruningSpec:
    """What the options mean for a model; nothing is exported yet.

    Raises:
        UsageError: an option is out of range, or the model cannot serve the pruner.
        MissingDependencyError: the ``export`` extra is not installed.
    """
    require_extra("export", "exporting a model")
    if options.dtype is not None and options.dtype not in DTYPES:
        raise UsageError("no such dtype", seen=repr(options.dtype), allowed=", ".join(DTYPES))
    calibrates = options.quantization is not None and options.quantization.method == "awq"
    if calibrates != bool(options.calibration):
        raise UsageError(
            "AWQ looks at pictures, and nothing else does",
            seen=f"{len(options.calibration or ())} calibration samples",
            allowed="at least one for method awq, none otherwise",
        )
    if options.quantization is not None:
        check_block_size(options.quantization.block_size)
    for flag, number in (
        ("--max-prompt", options.max_prompt),
        ("--max-new-tokens", options.max_new_tokens),
        ("--batch", options.max_batch),
    ):
        if number is not None and number < 1:
            raise UsageError(f"no such {flag}", seen=number, allowed=">= 1")
    if options.random_weights and options.checkpoint:
        raise UsageError(
            "random weights need no checkpoint",
            seen=", ".join(options.checkpoint),
            fix="leave out one of the two",
        )
    from gap_export.families import resolve_pruning

    return resolve_pruning(
        recipe,
        pruner=options.pruner,
        keep_ratio=options.keep_ratio,
        order=options.order,
        positions=options.positions,
        seed=options.seed,
        extra_token=options.extra_token,
        extra_position=options.extra_position,
        budget=options.budget,
        pruner_text=options.pruner_text,
    )
