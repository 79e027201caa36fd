"""How far each output may be from its reference, by dtype: the one place that says so.

float32 graphs differ from PyTorch only in the order of sums. The tolerance is relative to each
output's own size, with an absolute floor for values near zero.

float16 graphs differ in where they round. PyTorch rounds the result of every operation to float16;
ONNX Runtime on the CPU keeps float32 from one to the next. One rounding is off by up to u = 2**-11
of the *largest* values of a residual stream, whatever the size of the resulting element,
and a stream is rounded some ten times a layer: u * sqrt(10 * 32 layers) = 18 u for the largest
models here, if the roundings are independent. Measured on the demo model, of 4 layers and trained:
2.7 u (features) and 3.4 u (logits) of the largest value.

INT4 decoders may have what goes into their layers rounded to 8 bits (``activations`` of a graph):
half a step of 127 is u = 2**-8 of the largest value of a block. Four such roundings a layer (before
query, key and value; before the output; before gate and up; before down), independent of each other
in 32 layers, make sqrt(4 * 32) u = 11.3 u of the largest logit, beside what the graph's dtype is
off by. Measured on the demo model, of 4 layers: 2.4 u.

OpenVINO may compute in bfloat16 what a float32 graph says (``inference_precision``), of which the
same holds with u = 2**-8. Measured on the demo model: 1.6 u (features) and 3.6 u (logits).

The form ``ort`` of a graph (operators of ONNX Runtime's own) sums in another order and rounds in
other places, which is what these tolerances are of, so that it has no others. Measured on the demo
model in float32: logits 1.0e-5 off PyTorch's, as the base form's are (1.2e-5).

What is selected rests on scores computed from such features, so that of two tokens whose scores are
closer than that either may be kept: of 375 images of the demo model (43 of 144 tokens kept by
``cls``) 11 had one token that was not PyTorch's, none had two. Hence a few kept tokens may have
changed in float16, and none in float32. Greedy pruners decide between two tokens at every choice,
and what they choose next hangs on it: in float32 PyTorch's own margin says whether a choice was a
tie, which rounding decides, and then some tokens may have changed. In float16 every image has such
a tie, which would excuse any selection: there greedy pruners are held to the rule of all the
other pruners.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from gap_export.errors import UsageError
from gap_export.spec.manifest import Activations
from gap_export.spec.requests import InferencePrecision


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """|reference - candidate| <= atol + largest_fraction * max|reference| + rtol * |reference|.

    Attributes:
        atol: Absolute, in the output's units.
        rtol: Relative to each element.
        largest_fraction: Relative to the largest element of all that is compared.
        max_changed_fraction: Fraction of an image's or tile's kept tokens that may have changed;
            one may in any case where this is above 0.
        tie_margin: Where tokens are chosen one by one: an image or tile whose closest choice was
            decided by no more than this, in units of a cosine, has a tie; 0: none has.
        max_changed_fraction_in_tie: As ``max_changed_fraction``, of an image with a tie; one token
            may have changed in any case.
        why: Where it is from, in one sentence for reports.
    """

    atol: float
    rtol: float
    largest_fraction: float = 0.0
    max_changed_fraction: float = 0.0
    tie_margin: float = 0.0
    max_changed_fraction_in_tie: float = 0.0
    why: str

    def absolute(self, largest: float) -> float:
        """Its part that is the same for all elements, of values of at most ``largest``."""
        return self.atol + self.largest_fraction * largest

    def max_changed_in_tie(self, num_kept_tokens: int) -> int:
        """Tokens that may have changed in an image with a tie; 0 where there are no ties."""
        if self.tie_margin <= 0:
            return 0
        return max(1, int(self.max_changed_fraction_in_tie * num_kept_tokens))


_READ = Tolerance(atol=0.0, rtol=0.0, why="read from a table, not computed: the same to the bit")
_SELECTED = Tolerance(
    atol=0.0,
    rtol=0.0,
    tie_margin=2.0**-20,
    max_changed_fraction_in_tie=0.125,
    why="float32 has not been seen to decide between scores: no token may have changed, unless "
    "tokens are chosen one by one and two were closer than 16 units in the last place of a cosine",
)
_SELECTED_HALF = Tolerance(
    atol=0.0,
    rtol=0.0,
    max_changed_fraction=0.02,
    why="of two tokens whose scores are closer than roundings of float16 either may be kept; "
    "measured: one changed token in 11 of 375 images, never two",
)
_FLOAT32 = Tolerance(
    atol=1e-4,
    rtol=1e-4,
    why="the order of sums is all that differs, and the floor is for values near zero",
)
_FLOAT16 = Tolerance(
    atol=0.0,
    rtol=0.0,
    largest_fraction=18 * 2.0**-11,
    why="18 roundings of float16, of the largest value: 10 a layer in 32 layers, independent of "
    "each other; measured on the demo model: 3.4",
)

_COMPUTED = (
    "text_embeds", "token_scores", "patch_features", "patch_keys", "image_features", "logits",
)  # fmt: skip
TOLERANCES: Mapping[str, Mapping[str, Tolerance]] = {
    dtype: {
        **dict.fromkeys(_COMPUTED, computed),
        **dict.fromkeys(("image_newline", "inputs_embeds"), _READ),
        "keep_indices": selected,
    }
    for dtype, computed, selected in (
        ("float32", _FLOAT32, _SELECTED),
        ("float16", _FLOAT16, _SELECTED_HALF),
    )
}


_INT8_STEPS = 12.6 * 2.0**-8
_INT8_TOWER = Tolerance(
    atol=0.0,
    rtol=0.0,
    largest_fraction=_INT8_STEPS,
    why="4 roundings to 8 bits a layer in 40 layers, each off by a step where sums before it "
    "differ in the last place, independent of each other; measured on the demo model: 1.1 %",
)
_INT8_SELECTED = Tolerance(
    atol=0.0,
    rtol=0.0,
    max_changed_fraction=0.05,
    why="of two tokens whose scores are closer than a step of 8 bits either may be kept; measured: "
    "one changed token in 4 of 50 images of the demo model, and in 4 of 8 of the small Qwen3-VL, "
    "so that two in one image are to be expected",
)
_INT8_ANSWER = Tolerance(
    atol=0.0,
    rtol=0.0,
    largest_fraction=2.0**-8,
    why="features that are off by a step of 8 bits move logits by less than such a step; measured: "
    "choices between logits that were 0.16 % of the largest apart came out otherwise",
)


def with_int8_tower(tolerances: Mapping[str, Tolerance]) -> dict[str, Tolerance]:
    """Those of a float graph, with a tower of 8-bit integers before it.

    The reference rounds as the graph does. Where sums differ in their last place a value may be
    rounded to the next integer, though: then it is off by a whole step, 2**-8 of what the layer's
    input spans. ``answer_logits`` is how far logits may be off in answers, where a decoder reads
    such features; fed the reference's own, it is held to what it was.
    """
    computed = ("image_features", "patch_features", "patch_keys", "token_scores")
    return {
        **tolerances,
        **{name: _widest(_INT8_TOWER, tolerances[name]) for name in computed},
        "keep_indices": _INT8_SELECTED,
        "answer_logits": _widest(_INT8_ANSWER, tolerances["logits"]),
    }


_INT8 = Tolerance(
    atol=0.0,
    rtol=0.0,
    largest_fraction=11.3 * 2.0**-8,
    why="what goes into an INT4 layer is rounded to 8 bits: 11.3 roundings of half a step, of "
    "the largest value: 4 a layer in 32 layers, independent of each other; measured on the "
    "demo model: 2.4",
)
_BFLOAT16 = Tolerance(
    atol=0.0,
    rtol=0.0,
    largest_fraction=18 * 2.0**-8,
    why="18 roundings of bfloat16, of the largest value: 10 a layer in 32 layers, independent of "
    "each other; measured on the demo model: 3.6",
)
_SELECTED_BFLOAT16 = replace(
    _SELECTED_HALF,
    why="of two tokens whose scores are closer than roundings of bfloat16 either may be kept; "
    "measured: one changed token in 8 of 60 images, never two",
)


def tolerances_of(
    dtype: str,
    activations: Activations = "float",
    *,
    inference_precision: InferencePrecision = "float32",
) -> Mapping[str, Tolerance]:
    """By name of output.

    Args:
        dtype: Of the graphs' floats.
        activations: What goes into the decoder's quantized layers.
        inference_precision: What is computed in; float32 is no worse than the graphs' floats.

    Raises:
        UsageError: there are none for this dtype.
    """
    if dtype not in TOLERANCES:
        raise UsageError(
            "how far results may be off has not been measured for this dtype",
            seen=dtype,
            allowed=", ".join(TOLERANCES),
            fix="export with another dtype",
        )
    found = dict(TOLERANCES[dtype])
    if inference_precision == "bfloat16":
        found |= dict.fromkeys(_COMPUTED, _BFLOAT16) | {"keep_indices": _SELECTED_BFLOAT16}
    if activations == "int8":
        found["logits"] = _with(found["logits"], _INT8)
    return found


def _widest(one: Tolerance, other: Tolerance) -> Tolerance:
    return max(one, other, key=lambda each: each.largest_fraction)


def _with(tolerance: Tolerance, other: Tolerance) -> Tolerance:
    """What is rounded twice may be off by both."""
    return replace(
        tolerance,
        largest_fraction=tolerance.largest_fraction + other.largest_fraction,
        why=other.why,
    )


@dataclass(frozen=True, kw_only=True)
class RoundingTolerance:
    """When an INT4 weight is what a checkpoint's weight rounds to.

    Attributes:
        scales: How far a scale may be off, relative to it.
        ulps: How near to halfway between two integers a value must be for either of them to be
            right, relative to an integer of 1, in units of the last place of the weight's dtype.
        why: Where it is from, in one sentence for reports.
    """

    scales: float
    ulps: float
    why: str


# Rounding is the same on any machine, sums of products (a merged adapter) are not: they may be off
# in the last place, of which the largest integer, 7, makes 7; and a scale, of 8 significant bits,
# that was computed from such a sum may be the next one.
READ_WEIGHT = RoundingTolerance(
    scales=0.0, ulps=0.0, why="rounding a weight is the same on any machine: the same to the bit"
)
COMPUTED_WEIGHT = RoundingTolerance(
    scales=2.0**-7,
    ulps=8.0,
    why="these weights are sums of products, which may be off in the last place: a value halfway "
    "between two integers may be either",
)
