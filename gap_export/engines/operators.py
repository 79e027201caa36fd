"""Which ONNX operators each TensorRT takes, as data: the ground of the pre-flight.

Sources, in the order in which they win:

- TensorRT-RTX 1.7: measured. Each operator of this file was parsed and built for SM 89 by
  TensorRT-RTX 1.7.1, as a model of one node, for each dtype; a test does it again.
- TensorRT 10.4 to 10.15: ``docs/operators.md`` and ``docs/Changelog.md`` of
  https://github.com/onnx/onnx-tensorrt, its releases 10.6 and 10.15.
- TensorRT 10.3: the table of 10.6, less what the changelog says was added between; 10.0's table
  gives the range of opsets.
- TensorRT 11: opset range from the "ONNX Opset Guide" of its documentation, operators as in 10.15.

INT4 weights are DequantizeLinear with blocks, of opset 21. TensorRT has INT4 since 10.0, and the
parser of 10.6 takes the blocks from the shape of the scales, whatever the opset; that of 10.3 was
seen by nobody here, and its documentation ends at opset 20. So there they are unverified.

The parser compares no opset number with what it knows (1.7.1 reads a model that declares opset 99),
so an opset out of the documented range is a question of what the operators have come to mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from gap_export.engines.targets import Platform, Version

_FLOATS = ("float32", "float16", "bfloat16")
_HALVES = ("float16", "bfloat16")
_NUMBERS = (*_FLOATS, "int32", "int64")
_ANY = (*_NUMBERS, "bool")
# Of the tensors that carry no arithmetic; the others of ONNX's are no TensorRT types.
_QUANTIZED = ("int8", "float8e4m3fn", "int4")


@dataclass(frozen=True, kw_only=True)
class Operator:
    """What a release takes of one operator.

    Attributes:
        dtypes: Of the data; empty: the operator is refused.
        data: The input that is its data; None: the first output.
        constants: Inputs that have to be known when the engine is built.
        absent: Inputs that have to be left out.
        num_outputs: How many it may have; None: all.
        attributes: The values it may have; one that is not set has its default, which is fine.
        limits: Greatest value of a constant input, by its place.
    """

    dtypes: tuple[str, ...] = ()
    data: int | None = 0
    constants: tuple[int, ...] = ()
    absent: tuple[int, ...] = ()
    num_outputs: int | None = None
    attributes: Mapping[str, tuple[int | float | str, ...]] = field(default_factory=dict)
    limits: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Release:
    """What a release of TensorRT is known to take.

    Attributes:
        name: For people.
        version: The lowest it stands for.
        known_opset: The highest opset of the ONNX it is built with: it can read what it does not
            document.
        evidence: Where the rows are from, in a few words.
        is_measured: Whether it is from building, not from documentation: what is not there is not
            built.
        operators: Rows by name, standard operators alone. Nobody knows of what is not there.
    """

    name: str
    version: Version
    known_opset: int
    evidence: str
    is_measured: bool
    operators: Mapping[str, Operator]


# -- What is documented ---------------------------------------------------------------------------

_DOCUMENTED: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        _FLOATS,
        "Acos Acosh Asin Asinh Atan Atanh AveragePool BatchNormalization Ceil Celu Conv "
        "ConvTranspose Cos Cosh CumSum Dropout Einsum Elu Erf Exp Floor GRU Gemm "
        "GlobalAveragePool GlobalLpPool GlobalMaxPool GroupNormalization HardSigmoid HardSwish "
        "Hardmax InstanceNormalization IsInf LRN LSTM LayerNormalization LeakyRelu Log LogSoftmax "
        "LpNormalization LpPool MatMul MaxPool MeanVarianceNormalization PRelu QuantizeLinear "
        "RMSNormalization RNN RandomNormal RandomNormalLike RandomUniform RandomUniformLike "
        "Reciprocal Resize RotaryEmbedding Round Scan Selu Sigmoid Sin Sinh Softmax Softplus "
        "Softsign Sqrt Tan Tanh ThresholdedRelu Upsample",
    ),
    (
        _NUMBERS,
        "Abs Add ArgMax ArgMin Clip DepthToSpace Div Equal Gelu Greater GreaterOrEqual IsNaN Less "
        "LessOrEqual Max Mean Min Mod Mul Neg Pad Pow Range ReduceL1 ReduceL2 ReduceLogSum "
        "ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu "
        "Scatter ScatterElements ScatterND Shrink Sign SpaceToDepth Sub Sum TopK",
    ),
    (
        _ANY,
        "Concat Constant ConstantOfShape Expand EyeLike Flatten Gather GatherElements GatherND "
        "Identity If Loop OneHot Reshape ReverseSequence Shape Size Slice Split Squeeze Tile "
        "Transpose Trilu Unsqueeze Where",
    ),
    ((*_ANY, "uint8"), "Cast CastLike"),
    (("bool",), "And Not Or Xor"),
    (
        ("float32", "float16"),
        "BlackmanWindow DeformConv GridSample HammingWindow HannWindow Mish NonMaxSuppression "
        "NonZero RoiAlign",
    ),
    (("float32",), "STFT"),
    ((*_FLOATS, "int8", "float8e4m3fn"), "Attention"),
    ((*_FLOATS, "int32"), "TensorScatter"),
    (_QUANTIZED, "DequantizeLinear"),
    (
        (),
        "AffineGrid Bernoulli BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor CenterCropPad "
        "Col2Im Compress ConcatFromSequence ConvInteger DFT Det DynamicQuantizeLinear ImageDecoder "
        "MatMulInteger MaxRoiPool MaxUnpool MelWeightMatrix Multinomial NegativeLogLikelihoodLoss "
        "Optional OptionalGetElement OptionalHasElement QLinearConv QLinearMatMul RegexFullMatch "
        "SequenceAt SequenceConstruct SequenceEmpty SequenceErase SequenceInsert SequenceLength "
        "SequenceMap SoftmaxCrossEntropyLoss SplitToSequence StringConcat StringNormalizer "
        "StringSplit TfIdfVectorizer Unique",
    ),
)

# The first release that has it, where that is later than 10.3.
_ADDED: Mapping[str, Version] = MappingProxyType(
    {
        "BlackmanWindow": (10, 4),
        "HammingWindow": (10, 4),
        "HannWindow": (10, 4),
        "STFT": (10, 5),
        "Attention": (10, 14),
        "RMSNormalization": (10, 15),
        "RotaryEmbedding": (10, 15),
        "TensorScatter": (10, 15),
    }
)

# Dtypes that came later than the operator, by the release that brought them.
_DTYPES_BEFORE: Mapping[str, tuple[Version, tuple[str, ...]]] = MappingProxyType(
    {"Pow": ((10, 12), _FLOATS)}
)

# Restrictions that were lifted later, by the release that lifted them.
_RULES_BEFORE: Mapping[str, tuple[Version, Operator]] = MappingProxyType(
    {"Pad": ((10, 4), Operator(constants=(3,)))}
)

_REDUCTIONS = (
    "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd "
    "ReduceSum ReduceSumSquare"
).split()

# Beside the dtypes; what is not here has no rule. Each is a restriction in operators.md, and
# TensorRT-RTX refuses what breaks it, but for those in _LIFTED.
_RULES: Mapping[str, Operator] = MappingProxyType(
    {
        "Attention": Operator(
            absent=(4, 5, 6),
            num_outputs=1,
            attributes={"softcap": (0.0,), "qk_matmul_output_mode": (0,)},
        ),
        "BatchNormalization": Operator(num_outputs=1, attributes={"training_mode": (0,)}),
        "ConstantOfShape": Operator(data=None),
        "Constant": Operator(data=None),
        "CumSum": Operator(constants=(1,)),
        "EyeLike": Operator(data=None),
        "LayerNormalization": Operator(num_outputs=1),
        "MaxPool": Operator(num_outputs=1),
        "OneHot": Operator(data=2, constants=(1,)),
        "Resize": Operator(attributes={"mode": ("nearest", "linear"), "antialias": (0,)}),
        "ScatterND": Operator(attributes={"reduction": ("none",)}),
        "Squeeze": Operator(constants=(1,)),
        "TensorScatter": Operator(attributes={"axis": (-2,), "mode": ("linear",)}),
        # The layer's own page allows K = 3840, and 1.7.1 builds it; operators.md says "less than".
        "TopK": Operator(attributes={"sorted": (1,)}, limits={1: 3840}),
        "Unsqueeze": Operator(constants=(1,)),
        "Where": Operator(data=1),
        **{name: Operator(constants=(1,)) for name in _REDUCTIONS},
    }
)

# -- What was measured with TensorRT-RTX 1.7.1 ----------------------------------------------------

_MEASURED: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        _FLOATS,
        "Acos Acosh Asin Asinh Atan Atanh AveragePool BatchNormalization Ceil Conv Cos Cosh "
        "Einsum Elu Erf Exp Floor Gelu Gemm GridSample GroupNormalization HardSigmoid Hardmax "
        "InstanceNormalization IsInf IsNaN LRN LayerNormalization LeakyRelu Log LogSoftmax MatMul "
        "MaxPool Mean PRelu QuantizeLinear Reciprocal ReduceL2 ReduceLogSum ReduceLogSumExp Resize "
        "RotaryEmbedding Round Selu Sigmoid Sin Sinh Softmax Softplus Softsign Sqrt Swish Tan Tanh "
        "TensorScatter ThresholdedRelu Upsample",
    ),
    (
        _NUMBERS,
        "Abs Add ArgMax ArgMin Clip CumSum DepthToSpace Div GlobalAveragePool GlobalMaxPool "
        "Greater GreaterOrEqual Less LessOrEqual Max Min Mul Neg Pow RMSNormalization ReduceL1 "
        "ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Sign SpaceToDepth Sub "
        "Sum TopK",
    ),
    (
        _ANY,
        "Concat Constant ConstantOfShape Dropout Equal Expand EyeLike Flatten Gather "
        "GatherElements GatherND Identity If OneHot Pad Reshape ReverseSequence Scan Scatter "
        "ScatterElements ScatterND Shape Size Slice Split Squeeze Tile Transpose Trilu Unsqueeze "
        "Where",
    ),
    ((*_ANY, "uint8"), "Cast CastLike"),
    (("bool",), "And Not Or Xor"),
    (
        ("float32", "float16"),
        "ConvTranspose GlobalLpPool HardSwish LpNormalization LpPool Mish RandomNormalLike "
        "RandomUniformLike",
    ),
    (("float32",), "Celu MeanVarianceNormalization"),
    (_HALVES, "Attention"),
    ((*_FLOATS, "int64"), "Relu"),
    (("float32", "float16", "int32", "int64"), "Shrink"),
    (("int32", "int64"), "Mod Range"),
    (("int8", "int4"), "DequantizeLinear"),
    (
        (),
        "Bernoulli BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Col2Im Compress DFT Det "
        "DynamicQuantizeLinear MatMulInteger Multinomial NonMaxSuppression NonZero RoiAlign Unique",
    ),
)

# Documented rules that TensorRT-RTX 1.7.1 does not have.
_LIFTED: Mapping[str, Operator] = MappingProxyType(
    {"Resize": Operator(attributes={"antialias": (0,)}), "TopK": Operator(limits={1: 3840})}
)


def _rows(
    groups: Iterable[tuple[tuple[str, ...], str]], rules: Mapping[str, Operator]
) -> dict[str, Operator]:
    return {
        name: replace(rules.get(name, Operator()), dtypes=dtypes)
        for dtypes, names in groups
        for name in names.split()
    }


def _documented(version: Version) -> Mapping[str, Operator]:
    rows = _rows(_DOCUMENTED, _RULES)
    for name, added in _ADDED.items():
        if version < added:
            rows[name] = Operator()
    for name, (until, dtypes) in _DTYPES_BEFORE.items():
        if version < until:
            rows[name] = replace(rows[name], dtypes=dtypes)
    for name, (until, rule) in _RULES_BEFORE.items():
        if version < until:
            rows[name] = replace(rule, dtypes=rows[name].dtypes)
    return MappingProxyType(rows)


_BY_NVIDIA = "onnx-tensorrt's operators.md"

RELEASES: tuple[Release, ...] = (
    Release(
        name="TensorRT-RTX 1.7",
        version=(1, 7),
        known_opset=25,
        evidence="our measurements of TensorRT-RTX 1.7.1",
        is_measured=True,
        operators=MappingProxyType(_rows(_MEASURED, {**_RULES, **_LIFTED})),
    ),
    *(
        Release(
            name=f"TensorRT {version[0]}.{version[1]}",
            version=version,
            known_opset=known_opset,
            evidence=_BY_NVIDIA,
            is_measured=False,
            operators=_documented(version),
        )
        # ONNX 1.16 brought INT4 and opset 21, and TensorRT has INT4 since 10.0; the changelog names
        # ONNX 1.17 for 10.6 and 1.18 for 10.11.
        for version, known_opset in (
            ((10, 3), 21),
            ((10, 13), 23),
            ((10, 15), 24),
            ((10, 16), 24),
            ((11, 4), 25),
        )
    ),
)


def oldest_release(platform: Platform) -> Release:
    """The release that a graph has to suit to build on every TensorRT of a platform.

    TensorRT and TensorRT-RTX count apart: the versions of the one are above 10, of the other below.
    """
    return max(
        (release for release in RELEASES if release.version <= platform.min_version),
        key=lambda release: release.version,
    )
