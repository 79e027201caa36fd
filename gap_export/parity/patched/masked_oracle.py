"""Check a patched bundle against the graphs it was patched from: exact, and without PyTorch.

Logits of the pruned run with original position ids equal those of the *unpruned* run in which no
query may attend to a dropped visual token. Weights need not be trained for it. Re-numbered
("compact") positions break the equality, which shows that the comparison would notice.

Shape letters: N visual tokens, K kept, L prompt tokens before pruning, P after, H hidden size,
V vocabulary, T steps.

Both sides decode with the same cache. Whether that cache is right is asked of the unpruned run: its
last step gives what one prefill of all tokens gives, without a cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from gap_export.bundle import Bundle, open_bundle
from gap_export.errors import ComputationError, ParityError, UsageError
from gap_export.parity.patched.unpatched import UnpatchedBackend
from gap_export.parity.replay import RecordingBackend
from gap_export.parity.results import TensorRow
from gap_export.parity.tally import Pair, tensor_row
from gap_export.parity.uncached import decode_uncached, uncached_row
from gap_export.progress import Progress, SilentProgress
from gap_export.runtime.backends.backend import DECODER, VISION, Backend, FloatArray
from gap_export.runtime.backends.onnxruntime_backend import OnnxRuntimeBackend
from gap_export.runtime.generation import (
    DecoderPrompt,
    PromptRow,
    assemble_prompt,
    embed_tokens,
    generate,
)
from gap_export.runtime.images.image import ImageInput, load_image, prepare_image
from gap_export.runtime.prompt import PromptEncoder
from gap_export.spec.manifest import Manifest
from gap_export.spec.positions import Int64Array, compact_positions
from gap_export.spec.tolerances import Tolerance, tolerances_of


@dataclass(frozen=True, kw_only=True)
class MaskedOracleReport:
    """The verdict on a patched bundle.

    Attributes:
        candidate: What ran both, with its version.
        reference: The export it was compared with, in words.
        outputs: One row for the features, one each for logits of prefill and of decode steps, and
            one for the last step beside a prefill without a cache.
        compact_max_abs_diff: How far logits are off with re-numbered positions, in the question
            where that shows least; None where nothing was dropped.
    """

    candidate: str
    reference: str
    outputs: tuple[TensorRow, ...]
    compact_max_abs_diff: float | None

    @property
    def is_sensitive(self) -> bool:
        """Whether re-numbered positions would have been noticed in every question."""
        rows = [row for row in self.outputs if row.tensor.startswith("logits")]
        allowed = max(row.atol + row.rtol * row.max_abs_reference for row in rows)
        return self.compact_max_abs_diff is None or self.compact_max_abs_diff > allowed

    @property
    def passed(self) -> bool:
        """Every output within tolerance, and the comparison would have noticed."""
        return all(row.passed for row in self.outputs) and self.is_sensitive


def compare_with_unpatched(
    patched: str | Path | Bundle,
    original: str | Path,
    images: Sequence[ImageInput],
    expressions: Sequence[str],
    *,
    num_steps: int = 8,
    progress: Progress | None = None,
) -> MaskedOracleReport:
    """Compare a patched bundle with the export it was patched from.

    Both run in ONNX Runtime, the bundle with original position ids even where its manifest says
    otherwise, and both are held in memory at a time. Tokens are those that the unpruned run
    prefers.

    Args:
        patched: The bundle; every byte of it is hashed first, if it has not been opened.
        original: Folder of the export; every file that was patched is hashed first.
        images: At least one.
        expressions: One for each image.
        num_steps: T, logits compared in each question: one of prefill, the rest of decode steps.
        progress: Progress reporter.

    Raises:
        UsageError: no questions, the bundle or the export is not usable, or the unpruned decoder
            does not hide what is masked in the middle of a prompt (as attention that reads the
            mask's sum alone), so that there is nothing to compare with.
        ParityError: the unpruned decoder gives NaN or infinity.
    """
    if not images or len(images) != len(expressions) or num_steps < 1:
        raise UsageError(
            "nothing to compare with",
            seen=f"{len(images)} images, {len(expressions)} expressions, {num_steps} steps",
            allowed="at least one of each, and an expression for each image",
        )
    bundle = patched if isinstance(patched, Bundle) else open_bundle(patched, verify="full")
    manifest = bundle.manifest
    progress = progress or SilentProgress()
    found = _Found()
    with (
        OnnxRuntimeBackend(bundle, ["CPUExecutionProvider"]) as candidate,
        UnpatchedBackend(manifest, Path(original), candidate) as reference,
        progress.stage("comparing with the unpatched graphs", total=len(images)) as advance,
    ):
        prompts = PromptEncoder(manifest, bundle.path)
        for image, expression in zip(images, expressions, strict=True):
            question = _ask(manifest, prompts, candidate, reference, image, expression)
            if not found.features:
                _check_hidden(reference, question.masked)
            found.add(question, candidate, reference, num_steps)
            advance(1)
        name = candidate.name
    return MaskedOracleReport(
        candidate=name,
        reference=f"the unpatched graphs of {original}, dropped tokens masked out",
        outputs=found.rows(tolerances_of(manifest.dtype)),
        compact_max_abs_diff=min(found.compact) if found.compact else None,
    )


@dataclass(frozen=True, kw_only=True)
class _Question:
    """One image and expression, on both sides.

    Attributes:
        features: What the unpatched encoder gives for the kept tokens, and what the patched one
            does: twice [K, H].
        pruned: The prompt as the patched decoder takes it.
        renumbered: The same with compact positions; None where nothing was dropped.
        masked: The unpruned prompt, dropped tokens masked out.
    """

    features: Pair
    pruned: DecoderPrompt
    renumbered: DecoderPrompt | None
    masked: DecoderPrompt


class _Found:
    """What both sides gave, pairwise: the reference's first.

    Attributes:
        features: [K, H].
        prefill: Logits [1, V].
        decode: Logits [T - 1, V].
        uncached: Logits [1, V] of a prefill of all tokens, and of the last step; both the
            reference's.
        compact: How far logits are off with re-numbered positions, where something was dropped.
    """

    def __init__(self) -> None:
        self.features: list[Pair] = []
        self.prefill: list[Pair] = []
        self.decode: list[Pair] = []
        self.uncached: list[Pair] = []
        self.compact: list[float] = []

    def add(
        self, question: _Question, candidate: Backend, reference: Backend, num_steps: int
    ) -> None:
        """Run one question on both sides."""
        self.features.append(question.features)
        recorder = RecordingBackend(reference)
        try:
            truth, tokens = _run(recorder, question.masked, num_steps)
        except ComputationError as err:
            raise ParityError(
                "the unpatched graphs do not compute this model in numbers",
                seen=f"{err.what}: {err.seen}",
            ) from err
        judged, _ = _run(candidate, question.pruned, num_steps, forced=tokens)
        self.prefill.append((truth[:1], judged[:1]))
        if pair := decode_uncached(reference, recorder.calls):
            self.decode.append((truth[1:], judged[1:]))
            self.uncached.append(pair)
        if question.renumbered is not None:
            renumbered, _ = _run(candidate, question.renumbered, num_steps, forced=tokens)
            self.compact.append(float(np.abs(renumbered - truth).max()))

    def rows(self, tolerances: Mapping[str, Tolerance]) -> tuple[TensorRow, ...]:
        """The verdict on each output."""
        features, logits = tolerances["image_features"], tolerances["logits"]
        rows = [
            tensor_row(VISION, "image_features", self.features, features),
            tensor_row(DECODER, "logits (prefill)", self.prefill, logits),
        ]
        if self.decode:
            rows.append(tensor_row(DECODER, "logits (decode)", self.decode, logits))
            rows.append(uncached_row(self.uncached, logits))
        return tuple(rows)


def _ask(
    manifest: Manifest,
    prompts: PromptEncoder,
    candidate: Backend,
    reference: Backend,
    image: ImageInput,
    expression: str,
) -> _Question:
    encoded = prompts.encode(expression)
    loaded = load_image(image, pad_color=manifest.image.pad_color)
    feed = {"pixel_values": prepare_image(loaded, manifest.image)[0]}
    given = candidate.run(VISION, feed)
    kept, keep = given["image_features"][0], given["keep_indices"][0]
    every = reference.run(VISION, feed)["image_features"][0]
    num_visual = manifest.pruning.num_visual_tokens
    if len(every) != num_visual or keep.min() < 0 or keep.max() >= num_visual:
        raise UsageError(
            "the bundle and the export disagree on the number of visual tokens",
            seen=f"{len(every)}, of which {keep.min()}..{keep.max()} are kept",
            allowed=f"{num_visual}",
        )
    ids = np.concatenate([encoded.prefix_ids, encoded.suffix_ids])
    text, start = embed_tokens(candidate, ids[None])[0], len(encoded.prefix_ids)
    row = PromptRow(
        prefix_embeds=text[:start],
        suffix_embeds=text[start:],
        image_features=kept,
        keep_indices=keep,
        num_visual_tokens=num_visual,
        grid=(manifest.grid.rows, manifest.grid.cols),
    )
    axes = manifest.decoder.position_axes
    pruned = assemble_prompt([row], positions="gap", position_axes=axes)
    compact = assemble_prompt([row], positions="compact", position_axes=axes)
    unpruned = replace(row, image_features=every, keep_indices=compact_positions(num_visual))
    whole = assemble_prompt([unpruned], positions="gap", position_axes=axes)
    mask = np.zeros_like(whole.attention_mask)
    mask[0, pruned.kept_positions[0]] = 1
    return _Question(
        features=(every[keep], kept),
        pruned=pruned,
        renumbered=compact if len(keep) < num_visual else None,
        masked=replace(whole, attention_mask=mask),
    )


def _run(
    backend: Backend, prompt: DecoderPrompt, num_steps: int, *, forced: Int64Array | None = None
) -> tuple[FloatArray, Int64Array]:
    """Logits [T, V], and the tokens [T] they prefer; fed these, or those that are given."""
    answer = generate(
        backend,
        prompt,
        max_new_tokens=num_steps,
        eos_token_ids=(),
        forced_tokens=None if forced is None else forced[None],
        keep_logits=True,
    )
    assert answer.logits is not None, "they were asked for"
    return answer.logits[0], np.array(answer.token_ids[0], dtype=np.int64)


def _check_hidden(reference: Backend, masked: DecoderPrompt) -> None:
    """See that what is masked has no part in the logits: other vectors there change nothing.

    Raises:
        UsageError: it has.
    """
    hidden = masked.attention_mask[0] == 0
    other = masked.inputs_embeds.copy()
    other[0, hidden] = -other[0, hidden][::-1]
    one, changed = (
        reference.decode(
            {**masked.feed, "inputs_embeds": embeds}, reference.new_cache(1, hidden.size)
        )
        for embeds in (masked.inputs_embeds, other)
    )
    if not np.array_equal(one, changed):
        raise UsageError(
            "the unpatched decoder does not hide tokens that its attention_mask blocks in the "
            "middle of a prompt, so there is no unpruned run to compare with",
            seen=f"logits change by {np.abs(one - changed).max():.1e} with what is hidden",
            fix="compare with the checkpoint instead: gap-export check",
        )
