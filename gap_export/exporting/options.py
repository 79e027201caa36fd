"""What to export, and how; and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from gap_export.engines.folder import EngineFolder
from gap_export.engines.targets import TargetChoice, parse_targets
from gap_export.errors import UsageError
from gap_export.extras import require_extra
from gap_export.spec.manifest import Activations, Manifest, PruningSpec, QuantizationSpec
from gap_export.spec.manifest.block_sizes import check_block_size
from gap_export.spec.recipe import Recipe
from gap_export.spec.requests import (
    DEFAULT_PRUNING,
    NO_ENGINES,
    Dtype,
    EnginesRequest,
    PruningRequest,
)

if TYPE_CHECKING:
    from gap_export.runtime.images.image import ImageInput

DTYPES: tuple[Dtype, ...] = get_args(Dtype)
# Held so, a file takes no room of its own.
_SHARED = ("linked", "cloned")


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to export, and how.

    Attributes:
        model: Recipe name, alias, hub id, or a checkpoint folder.
        pruning: Which visual tokens survive.
        out: Bundle folder; None for ``./<model>-<pruner>-<keep>``.
        force: Replace a bundle that is already there. Other folders are never replaced.
        recipe: Recipe for a checkpoint folder that has no recipe.yaml of its own.
        checkpoint: Parts of the checkpoint by role, where they are not to be looked for.
        dtype: Dtype of all weights and of the graphs' interfaces; None for the checkpoint's own.
        quantization: How the decoder's linear layers are quantized; None to leave them as they are.
        activations: What goes into layers of quantized weights in ONNX Runtime on a CPU.
        vision_dtype: ``int8``: the tower's layers multiply 8-bit integers; None: its floats.
        bake_positions: Have the decoder hold ``kept_positions``, so that it is no input.
        calibration: Images and expressions that AWQ looks at, at least one; meant for it alone.
        copy_weights: Copy weights that could be linked, so that the bundle is a folder like any
            other: some ONNX tools refuse links.
        random_weights: Take no checkpoint; draw weights of the true shape from the seed.
        engines: What is prepared for TensorRT.
    """

    model: str
    pruning: PruningRequest = DEFAULT_PRUNING
    out: Path | None = None
    force: bool = False
    recipe: str | None = None
    checkpoint: Mapping[str, Path] = field(default_factory=dict)
    dtype: Dtype | None = None
    quantization: QuantizationSpec | None = None
    activations: Activations = "float"
    vision_dtype: Literal["int8"] | None = None
    bake_positions: bool = False
    calibration: tuple[tuple[ImageInput, str], ...] | None = None
    copy_weights: bool = False
    random_weights: bool = False
    engines: EnginesRequest = NO_ENGINES

    def target_choices(self) -> tuple[TargetChoice, ...]:
        """The targets as rows of the table.

        Raises:
            UsageError: an unknown one, one that takes no such weights, or an option that means
                nothing without a target.
        """
        engines = self.engines
        if self.bake_positions and engines.targets:
            raise UsageError(
                "engines are run by our own sessions, which feed kept_positions",
                seen="--bake-positions with --trt",
                allowed="--bake-positions without --trt",
                fix="export two bundles, or leave out --bake-positions",
            )
        for flag, value in (("--lowering", engines.lowering), *_limits(engines)):
            if not engines.targets and value is not None:
                raise UsageError(
                    f"{flag} is about TensorRT engines, and none are asked for",
                    seen=value,
                    fix=f"add --trt, or leave out {flag}",
                )
        choices = parse_targets(engines.targets)
        if self.vision_dtype is not None and choices:
            raise UsageError(
                "TensorRT does not round a tower's inputs at run time, as ours does: it has no "
                "DynamicQuantizeLinear",
                seen=f"--vision-dtype {self.vision_dtype} with --trt",
                allowed="--vision-dtype without --trt",
                fix="export two bundles, or leave out --vision-dtype",
            )
        if engines.wheel and not any(choice.target.built_on == "device" for choice in choices):
            raise UsageError(
                "--wheel is for bundles whose engines another machine builds",
                seen=", ".join(f"--trt {target}" for target in engines.targets) or "no --trt",
                allowed="with --trt orin, thor, desktop, or --trt alone",
                fix="leave out --wheel",
            )
        if self.quantization is not None:
            for choice in choices:
                choice.check_weights(self.quantization.dtype)
        return choices


def _limits(engines: EnginesRequest) -> tuple[tuple[str, int | None], ...]:
    return (
        ("--max-prompt", engines.max_prompt),
        ("--max-new-tokens", engines.max_new_tokens),
        ("--batch", engines.max_batch),
    )


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
            "AWQ looks at images, and nothing else does",
            seen=f"{len(options.calibration or ())} calibration samples",
            allowed="at least one for method awq, none otherwise",
        )
    if options.quantization is not None:
        check_block_size(options.quantization.block_size)
    for flag, number in _limits(options.engines):
        if number is not None and number < 1:
            raise UsageError(f"no such {flag}", seen=number, allowed=">= 1")
    if options.random_weights and options.checkpoint:
        raise UsageError(
            "random weights need no checkpoint",
            seen=", ".join(options.checkpoint),
            fix="leave out one of the two",
        )
    from gap_export.families import resolve_pruning

    return resolve_pruning(recipe, options.pruning)
