"""What a user may ask of an export: each option is declared here, once.

The Python API takes these requests as they are. The command line makes its flags, their help and
their types out of the fields; see ``gap_export.cli._requests``. A request says what is wanted, and
is settled against a model later: ``gap_export.families.resolve_pruning`` makes a ``PruningSpec``
out of a :class:`PruningRequest`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    TypeAlias,
    get_args,
    get_origin,
    get_type_hints,
)

from gap_export.errors import UsageError
from gap_export.spec.manifest import (
    Activations,
    Attention,
    Budget,
    ExtraPosition,
    ExtraToken,
    FormName,
    Order,
    PrunerText,
    QuantizationSpec,
)

BLOCK_SIZE = 32
# Measured on the demo models: docs/results/quantization.md.
DEFAULT_ACTIVATIONS: Activations = "int8"

Dtype: TypeAlias = Literal["float32", "float16", "bfloat16"]
WeightsDtype: TypeAlias = Literal["float32", "float16", "bfloat16", "int4"]
Positions: TypeAlias = Literal["gap", "compact"]
# How far off results are is in spec.tolerances.
InferencePrecision: TypeAlias = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Option:
    """What the command line needs to know of a field beside its type and its default.

    Attributes:
        help: What the option means.
        flag: Its name on the command line; None: the field's.
        metavar: The name of its value there, unless it is a choice.
        min: Its lowest value.
        max: Its highest value.
    """

    help: str
    flag: str | None = None
    metavar: str | None = None
    min: int | None = None
    max: int | None = None


class Declared(NamedTuple):
    """A field of a request, as it was declared; ``flag`` with its dashes."""

    name: str
    flag: str
    type: Any
    default: Any
    option: Option

    @property
    def is_many(self) -> bool:
        """Whether it may be given several times."""
        return get_origin(self.type) is tuple


def options_of(request: type[Any]) -> tuple[Declared, ...]:
    """The options that a request class declares, in their order."""
    hints = get_type_hints(request, include_extras=True)
    found = []
    for one in fields(request):
        of_type, option = get_args(hints[one.name])
        flag = option.flag or f"--{one.name.replace('_', '-')}"
        found.append(Declared(one.name, flag, of_type, one.default, option))
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class PruningRequest:
    """Which visual tokens are to survive, and how they are fed.

    Every None is settled by the recipe or by the pruner.

    Example:
        >>> from gap_export import PruningRequest
        >>> PruningRequest(keep_ratio=0.3, pruner="cls").positions
        'gap'
    """

    keep_ratio: Annotated[
        float | None,
        Option(
            "Share of the visual tokens to keep, in (0, 1]. "
            "[default: the recipe's; with an adaptive budget 1]",
            flag="--keep",
            metavar="SHARE",
        ),
    ] = None
    pruner: Annotated[
        str | None,
        Option(
            "Which tokens survive: see `gap-export pruners`. [default: the recipe's]",
            metavar="NAME",
        ),
    ] = None
    order: Annotated[Order | None, Option("Order of the kept tokens. [default: the pruner's]")] = (
        None
    )
    extra_token: Annotated[
        ExtraToken | None,
        Option(
            "One token for all that is dropped: their mean, or their sum weighted by score. "
            "[default: the pruner's]"
        ),
    ] = None
    extra_position: Annotated[
        ExtraPosition | None,
        Option(
            "Position id of the extra token: the last visual token's, or the center's of all that "
            "is dropped. [default: last]"
        ),
    ] = None
    budget: Annotated[
        Budget | None,
        Option(
            "fixed: --keep of every image; adaptive: exactly as many as stand out in each (by the "
            "pruner's scores), at least 1 and at most --keep. "
            "[default: the pruner's where --keep is not given, else fixed]"
        ),
    ] = None
    pruner_text: Annotated[
        PrunerText | None,
        Option(
            "What a pruner that reads the text reads: the expression alone, or the whole question "
            "that the model is asked. [default: as the pruner's authors have it]"
        ),
    ] = None
    positions: Annotated[
        Positions,
        Option("gap: original position ids; compact: re-numbered, the naive baseline."),
    ] = "gap"
    attention: Annotated[
        Attention,
        Option(
            "plain: each kept visual token counts as one; proportional: it counts as N/K tokens, "
            "whose log is added to its attention scores, so that the image weighs as much as "
            "unpruned."
        ),
    ] = "plain"
    canvas: Annotated[
        str | None,
        Option(
            "Width x height in pixels of what the model sees, for models that take any: whole "
            "visual tokens, which it decides the number of. Several of one number, with commas: an "
            "image takes the one of its aspect. [default: the recipe's]",
            metavar="WxH",
        ),
    ] = None
    seed: Annotated[
        int,
        Option("Seed of samples, of pruners that draw, and of random weights.", metavar="N", min=0),
    ] = 0

    def variants(
        self, pruners: Sequence[str] = (), keep_ratios: Sequence[float] = ()
    ) -> tuple[PruningRequest, ...]:
        """This request with each of the keep ratios and each of the pruners.

        Args:
            pruners: Names; empty for this request's own.
            keep_ratios: In (0, 1]; empty for this request's own.
        """
        return tuple(
            replace(self, pruner=pruner, keep_ratio=keep_ratio)
            for keep_ratio in keep_ratios or (self.keep_ratio,)
            for pruner in pruners or (self.pruner,)
        )


class ResolvedWeights(NamedTuple):
    """What a :class:`WeightsRequest` comes to.

    Attributes:
        dtype: Of the graphs' floats; None for the checkpoint's.
        quantization: How weights are quantized; None where they are not.
        activations: What goes into layers of quantized weights on a CPU.
    """

    dtype: Dtype | None
    quantization: QuantizationSpec | None
    activations: Activations


@dataclass(frozen=True, kw_only=True)
class WeightsRequest:
    """In which dtype a bundle's weights are stored, and how they are quantized.

    Example:
        >>> from gap_export import WeightsRequest
        >>> WeightsRequest(dtype="int4", block_size=64).dtype
        'int4'
    """

    dtype: Annotated[
        WeightsDtype | None,
        Option(
            "Dtype of weights, graph inputs and outputs; int4: of the decoder's weights alone. "
            "[default: the checkpoint's]"
        ),
    ] = None
    block_size: Annotated[
        int | None,
        Option(
            "With --dtype int4: weights that share a scale, 32, 64 or 128. "
            f"[default: {BLOCK_SIZE}]",
            metavar="N",
        ),
    ] = None
    quantizer: Annotated[
        Literal["rtn", "awq"] | None,
        Option(
            "With --dtype int4. rtn: round to nearest; awq: scale channels first, by what images "
            "show of them. [default: rtn]"
        ),
    ] = None
    vision_dtype: Annotated[
        Literal["int8"] | None,
        Option(
            "int8: the vision tower's layers multiply 8-bit integers, which a CPU does three times "
            "as fast as float32. Needs float32 graphs. [default: as --dtype says]"
        ),
    ] = None
    quantize_lm_head: Annotated[bool, Option("With --dtype int4: the LM head as well.")] = False
    activations: Annotated[
        Activations | None,
        Option(
            "With --dtype int4: what a CPU multiplies INT4 weights with. int8: values rounded to "
            "8 bits in blocks, faster; float: values as they are. [default: int8]"
        ),
    ] = None
    runs_on: Annotated[
        Literal["cpu"] | None,
        Option(
            "cpu: float32 in place of the checkpoint's float16 or bfloat16, which a CPU casts at "
            "every step. [default: as --dtype says]",
            flag="--for",
        ),
    ] = None

    def resolve(self) -> ResolvedWeights:
        """What it comes to.

        Raises:
            UsageError: an option about quantization without ``int4``, or a dtype that a CPU is
                slow with.
        """
        dtype: Dtype | None = None if self.dtype == "int4" else self.dtype
        if self.runs_on == "cpu":
            if dtype not in (None, "float32"):
                raise UsageError(
                    "a CPU is slow with this dtype",
                    seen=f"--dtype {dtype} --for cpu",
                    allowed="--for cpu with --dtype float32, --dtype int4, or alone",
                )
            dtype = "float32"
        if self.dtype == "int4":
            quantization = QuantizationSpec(
                dtype="int4",
                block_size=BLOCK_SIZE if self.block_size is None else self.block_size,
                method=self.quantizer or "rtn",
                lm_head=self.quantize_lm_head,
            )
            return ResolvedWeights(dtype, quantization, self.activations or DEFAULT_ACTIVATIONS)
        for flag, is_given in (
            ("--block-size", self.block_size is not None),
            ("--quantizer", self.quantizer is not None),
            ("--quantize-lm-head", self.quantize_lm_head),
            ("--activations", self.activations is not None),
        ):
            if is_given:
                raise UsageError(
                    f"{flag} is about quantized weights",
                    seen=f"--dtype {self.dtype}" if self.dtype else "no --dtype",
                    fix=f"add --dtype int4, or leave out {flag}",
                )
        return ResolvedWeights(dtype, None, "float")


@dataclass(frozen=True, kw_only=True)
class LimitsRequest:
    """The largest inputs that TensorRT engines are to take; None: as the model or bundle has it."""

    max_prompt: Annotated[
        int | None,
        Option(
            "Longest pruned prompt an engine takes, in tokens. "
            "[default: the longest there can be; of a bundle, its own]",
            metavar="N",
        ),
    ] = None
    max_new_tokens: Annotated[
        int | None,
        Option(
            "Longest answer an engine's cache has room for. "
            "[default: the recipe's; of a bundle, its own]",
            metavar="N",
        ),
    ] = None
    max_batch: Annotated[
        int | None,
        Option(
            "Most expressions at a time an engine takes. [default: 1; of a bundle, its own]",
            flag="--batch",
            metavar="N",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class EnginesRequest(LimitsRequest):
    """The TensorRT engines that an export prepares, and builds where this machine can.

    Example:
        >>> from gap_export import EnginesRequest
        >>> EnginesRequest(targets=("orin",), max_batch=4).targets
        ('orin',)
    """

    targets: Annotated[
        tuple[str, ...],
        Option(
            "TensorRT engines for rtx, rtx:sm89, desktop, orin or thor. Repeatable. "
            "Alone: build what can be built here, prepare the rest.",
            flag="--trt",
            metavar="[TARGET]",
        ),
    ] = ()
    lowering: Annotated[
        Literal["portable", "fused"] | None,
        Option(
            "Form of the graphs for TensorRT. portable: primitive operators; fused: Attention, "
            "RoPE and a cache in place. [default: the best a target builds]"
        ),
    ] = None
    wheel: Annotated[
        bool,
        Option(
            "With --trt for another machine: put this gap-export itself into the bundle, as a "
            "wheel file (42 MB) that the device installs without asking any package index."
        ),
    ] = False


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How TensorRT is to build engines."""

    weights: Annotated[
        Literal["included", "streamed", "stripped"],
        Option(
            "included in the engines; streamed: may partly stay in the host's memory; stripped: "
            "put in when an engine is loaded."
        ),
    ] = "included"
    workspace_mib: Annotated[
        int | None,
        Option(
            "Most memory a layer may take for itself. [default: all there is]",
            flag="--workspace",
            metavar="MIB",
            min=1,
        ),
    ] = None
    optimization_level: Annotated[
        int | None,
        Option(
            "How long TensorRT looks for fast kernels. [default: TensorRT's own]",
            metavar="N",
            min=0,
            max=5,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class OpenVinoOptions:
    """How OpenVINO is to run a bundle.

    Example:
        >>> from gap_export import OpenVinoOptions
        >>> OpenVinoOptions(device="GPU").device
        'GPU'
    """

    device: Annotated[
        str,
        Option(
            "With --backend openvino: CPU, GPU or NPU, or one of several, as GPU.1; see "
            "`gap-export doctor`.",
            metavar="NAME",
        ),
    ] = "CPU"
    inference_precision: Annotated[
        InferencePrecision,
        Option(
            "With --backend openvino: what it computes in; bfloat16, of 8 significant bits, is "
            "faster where a CPU has it."
        ),
    ] = "float32"


# How answers may be constrained.
GrammarName = Literal["box"]


@dataclass(frozen=True, kw_only=True)
class BackendOptions:
    """How a backend is to run a bundle; each reads what is its own.

    Attributes:
        engines: With TensorRT: which of a bundle's engines; None for the first that fits.
        openvino: With OpenVINO: how it runs.
        form: With ONNX Runtime: of the graphs, ``base`` or ``ort``; None for the fastest that runs,
            and for a check of each.
    """

    engines: str | None = None
    form: FormName | None = None
    openvino: OpenVinoOptions = OpenVinoOptions()


DEFAULT_OPENVINO = OpenVinoOptions()
DEFAULT_BACKEND = BackendOptions()
DEFAULT_PRUNING = PruningRequest()
AS_STORED = WeightsRequest()
NO_ENGINES = EnginesRequest()
OWN_LIMITS = LimitsRequest()
DEFAULT_BUILD = BuildOptions()
