"""The reference of a quantized bundle: PyTorch with the weights that the bundle holds.

Rounding to INT4 changes what a model answers, and no tolerance of a float graph has room for that.
So the reference's decoder computes with the bundle's own integers and scales: whether graphs read
them rightly is then held to the same tolerances as ever. Whether they are the right ones is another
question, answered by rounding the checkpoint's weights once more.

Where AWQ has scaled channels before, so is done here, by the scales that the bundle tells of. What
was not rounded, as the norms that undo the scaling, is the checkpoint's, scaled likewise: by other
scales than those the weights were made with, neither weights nor answers are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from gap_export.checkpoint.weights import (
    QUANTIZED_NAME,
    SAFETENSORS_NAMES,
    TORCH_DTYPES,
    DerivedWeight,
    Weight,
    dequantize,
    quantize_columns,
    read_header,
)
from gap_export.checkpoint.weights.weight import READABLE_DTYPES
from gap_export.errors import BundleError
from gap_export.exporting.quantization import SCALES_NAME, linear_keys, read_scales, scale_channels
from gap_export.families import Component, Reference
from gap_export.parity.compare import Differences, measure_differences
from gap_export.parity.results import TensorRow
from gap_export.progress import Progress
from gap_export.spec.manifest import QuantizationSpec
from gap_export.spec.tolerances import COMPUTED_WEIGHT, READ_WEIGHT

_DECODER = "decoder_model_merged"
# Values of a weight that are rounded at a time; a few float32 copies of that size are in memory.
_PIECE = 1 << 22


def use_quantized_weights(
    reference: Reference, bundle: Path, spec: QuantizationSpec, *, progress: Progress
) -> tuple[TensorRow, ...]:
    """Have a reference's decoder compute with the weights that a bundle holds.

    Args:
        reference: On the CPU; the weights of its decoder are replaced, one at a time.
        bundle: Its folder, of which every byte has been hashed.
        spec: How the decoder's graph is quantized.
        progress: Progress reporter.

    Returns:
        One row: what the bundle holds beside what the checkpoint's weights round to.

    Raises:
        BundleError: a weight is not there, or not of the shape and blocks it must have; or, with
            ``awq``, the scales of channels are not there or cannot be any.
        CheckpointError: a weight cannot be read.
    """
    component = reference.component(_DECODER)
    # The weights as they were when they were rounded.
    scaled: Mapping[str, Weight] = component.weight_refs
    if spec.method == "awq":
        scales = read_scales(bundle / SCALES_NAME, component)
        scaled = scale_channels(reference, scales, of=_DECODER).component(_DECODER).weight_refs
    file = bundle / QUANTIZED_NAME
    keys = linear_keys(component, lm_head=spec.lm_head)
    held = _check_held(file, component, keys, spec.block_size)
    findings = _Findings()
    with progress.stage("reading quantized weights", total=len(keys)) as advance:
        for key in keys:
            floats = dequantize(file, f"{_DECODER}.{key}")
            source = component.weight_refs[key]
            findings.add(key, source, scaled[key], floats, held[key], spec.block_size)
            _replace(component, key, floats, reference.dtype)
            advance(1)
    for key, weight in scaled.items():
        if key not in held and weight is not component.weight_refs[key]:
            _replace(component, key, weight.load(), reference.dtype)
    return (findings.row(),)


class _Findings:
    """What the comparison with the checkpoint has found so far."""

    def __init__(self) -> None:
        self._count = 0
        self._computed = False
        self._parts: list[tuple[int, int, Differences]] = []
        self._largest = 0.0
        self._reason = ""

    def add(
        self,
        key: str,
        source: Weight,
        weight: Weight,
        held: torch.Tensor,
        scales: tuple[torch.Tensor, ...],
        block_size: int,
    ) -> None:
        """Compare one weight.

        Args:
            key: Its name.
            source: The checkpoint's, [N, K].
            weight: The same, its channels scaled where they were before it was rounded.
            held: What the bundle's integers and scales stand for, float32 [N, K].
            scales: The bundle's, [K / block_size, N], in each dtype that graphs read them in.
            block_size: Values along K that share a scale.
        """
        self._count += 1
        floats = weight.load()
        # What is read from a file, scaled number by number and rounded, is the same on any machine.
        computed = isinstance(source, DerivedWeight)
        tolerance = COMPUTED_WEIGHT if computed else READ_WEIGHT
        self._computed |= computed
        halfway = 0.5 + tolerance.ulps * torch.finfo(READABLE_DTYPES[source.dtype]).eps
        wrong, wrong_scales = 0, 0
        per_piece = max(1, _PIECE // (floats.shape[0] * block_size))
        for first in range(0, floats.shape[1] // block_size, per_piece):
            blocks = slice(first, first + per_piece)
            columns = slice(first * block_size, (first + per_piece) * block_size)
            wanted = floats[:, columns].to(torch.float32)
            steps, factors = quantize_columns(wanted, block_size=block_size)
            for stored in scales:
                piece = stored[blocks].T.to(torch.float32)
                wanted_scales = factors[..., 0]
                # Asked so, what is not a number is off.
                near = (piece - wanted_scales).abs() <= tolerance.scales * wanted_scales
                wrong_scales += int((~near).sum())
            rounded, found = steps * factors, held[:, columns].reshape(steps.shape)
            differs = ~(found == rounded)
            if tolerance.ulps:
                off = (found - wanted.reshape(steps.shape)).abs()
                differs &= ~(off <= halfway * factors * (1 + tolerance.scales))
            wrong += int(differs.sum())
            same = torch.equal(rounded, found)
            measured = _NONE if same else measure_differences([(rounded.numpy(), found.numpy())])
            self._parts.append((rounded.numel(), int(rounded.count_nonzero()), measured))
            self._largest = max(self._largest, float(rounded.abs().max()))
        if (wrong or wrong_scales) and not self._reason:
            self._reason = (
                f"{key} is not what the checkpoint's weight rounds to: {wrong} of {held.numel()} "
                f"values and {wrong_scales} of {sum(s.numel() for s in scales)} scales differ"
            )

    def row(self) -> TensorRow:
        """All of it as a row of the report; a 99th percentile is that of the worst part."""
        parts = [part for _, _, part in self._parts]
        num_values = sum(size for size, _, _ in self._parts)
        num_relative = max(1, sum(size for _, size, _ in self._parts))
        differences = Differences(
            max_abs_diff=max(part.max_abs_diff for part in parts),
            mean_abs_diff=sum(n * part.mean_abs_diff for n, _, part in self._parts) / num_values,
            p99_abs_diff=max(part.p99_abs_diff for part in parts),
            max_rel_diff=max(part.max_rel_diff for part in parts),
            mean_rel_diff=sum(n * part.mean_rel_diff for _, n, part in self._parts) / num_relative,
            p99_rel_diff=max(part.p99_rel_diff for part in parts),
            cosine=min(part.cosine for part in parts),
            num_nonfinite=sum(part.num_nonfinite for part in parts),
        )
        return TensorRow(
            component=_DECODER,
            tensor="int4 weights",
            calls=self._count,
            **differences._asdict(),
            max_abs_reference=self._largest,
            atol=0.0,
            rtol=0.0,
            why=(COMPUTED_WEIGHT if self._computed else READ_WEIGHT).why,
            passed=not self._reason,
            reason=self._reason,
        )


# Of values that are the same to the bit, which is all there are in an honest bundle.
_NONE = Differences(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, cosine=1.0, num_nonfinite=0)


def _check_held(
    file: Path, component: Component, keys: tuple[str, ...], block_size: int
) -> dict[str, tuple[torch.Tensor, ...]]:
    """The scales of each weight, in every dtype they are held in.

    Raises:
        BundleError: a weight is missing, or not as the model and the manifest have it.
        CheckpointError: the file is damaged.
    """
    refs = read_header(file)
    found: dict[str, tuple[torch.Tensor, ...]] = {}
    for key in keys:
        name = f"{_DECODER}.{key}"
        rows, width = component.weight_refs[key].shape
        packed = refs.get(f"{name}.int4")
        scales = [ref for k, ref in refs.items() if k.startswith(f"{name}.scales.")]
        shape = (width // block_size, rows)
        if (
            packed is None
            or (packed.dtype, packed.shape) != ("U8", (rows * width // 2,))
            or not scales
            or any(ref.dtype not in TORCH_DTYPES or ref.shape != shape for ref in scales)
        ):
            raise BundleError(
                f"{file.name} does not hold {name} as the manifest says",
                seen=", ".join(f"{r.key} {r.dtype} {list(r.shape)}" for r in (packed, *scales) if r)
                or "nothing of that name",
                allowed=f"{rows * width // 2} bytes of INT4, and scales {list(shape)}",
                fix="export the bundle again",
            )
        found[key] = tuple(ref.load() for ref in scales)
    return found


def _replace(component: Component, key: str, values: torch.Tensor, dtype: str) -> None:
    """Give a module's parameter other values, in the reference's dtype.

    Raises:
        BundleError: they are of another shape.
        CheckpointError: they do not fit the dtype.
    """
    parameter = component.module.get_parameter(key)
    if parameter.shape != values.shape:
        raise BundleError(
            f"the bundle holds {key} with another shape",
            seen=list(values.shape),
            allowed=str(list(parameter.shape)),
            fix="export the bundle again",
        )
    # By way of a weight, which refuses what overflows.
    cast = DerivedWeight(
        dtype=SAFETENSORS_NAMES[dtype],
        shape=tuple(values.shape),
        sources=(),
        compute=lambda: values,
        origin=f"{key} of the bundle",
    )
    parameter.data = cast.load()
