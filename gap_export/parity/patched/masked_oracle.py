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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gap_export.bundle import Bundle, open_bundle
from gap_export.errors import UsageError
from gap_export.parity.patched.unpatched import UnpatchedGraphs
from gap_export.parity.results import TensorRow, plain_values
from gap_export.parity.tally import tensor_row
from gap_export.parity.uncached import uncached_row
from gap_export.progress import Progress, SilentProgress
from gap_export.runtime.backends.backend import VISION, FloatArray
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
from gap_export.spec.positions import Int64Array, compact_positions, gap_remap
from gap_export.spec.tolerances import Tolerance, tolerances_of

_Pairs = list[tuple[NDArray[Any], NDArray[Any]]]


@dataclass(frozen=True, kw_only=True)
class MaskedOracleReport:
    """The verdict on a patched bundle.

    Attributes:
        bundle: Its folder.
        candidate: What ran both, with its version.
        reference: The export it was compared with, in words.
        outputs: One row for the features, one each for logits of prefill and of decode steps, and
            one for the last step beside a prefill without a cache.
        num_questions: Pictures with their expressions.
        compact_max_abs_diff: How far logits are off with re-numbered positions, in the question
            where that shows least; None where nothing was dropped.
    """

    bundle: str
    candidate: str
    reference: str
    outputs: tuple[TensorRow, ...]
    num_questions: int
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

    def to_plain(self) -> dict[str, Any]:
        """JSON form; a difference that is not finite becomes null."""
        return {
            "passed": self.passed,
            "bundle": self.bundle,
            "candidate": self.candidate,
            "reference": self.reference,
            "outputs": [plain_values(asdict(row)) for row in self.outputs],
            "num_questions": self.num_questions,
            "compact_max_abs_diff": self.compact_max_abs_diff,
            "is_sensitive": self.is_sensitive,
        }


def compare_with_unpatched(
    patched: str | Path | Bundle,
    original: str | Path,
    pictures: Sequence[ImageInput],
    expressions: Sequence[str],
    *,
    num_steps: int = 8,
    progress: Progress | None = None,
) -> MaskedOracleReport:
    """Compare a patched bundle with the export it was patched from.

    Both run in ONNX Runtime, the bundle with original position ids whatever its manifest says, and
    both are held in memory at a time. Tokens are those that the unpruned run prefers.

    Args:
        patched: The bundle; every byte of it is hashed first, if it has not been opened.
        original: Folder of the export; every file that was patched is hashed first.
        pictures: At least one.
        expressions: One for each picture.
        num_steps: T, logits compared in each question: one of prefill, the rest of decode steps.
        progress: Told what is done.

    Raises:
        UsageError: no questions, the bundle or the export is not usable, or the unpruned decoder
            does not hide what is masked in the middle of a prompt (as attention that reads the
            mask's sum alone), so that there is nothing to compare with.
    """
    _check_arguments(pictures, expressions, num_steps)
    bundle = patched if isinstance(patched, Bundle) else open_bundle(patched, verify="full")
    manifest = bundle.manifest
    tolerances = tolerances_of(manifest.dtype)
    progress = progress or SilentProgress()
    reference = UnpatchedGraphs(manifest, Path(original))
    found = _Found()
    with (
        OnnxRuntimeBackend(bundle, ["CPUExecutionProvider"]) as candidate,
        progress.stage("comparing with the unpatched graphs", total=len(pictures)) as advance,
    ):
        prompts = PromptEncoder(manifest, bundle.path)
        for picture, expression in zip(pictures, expressions, strict=True):
            question = _Question(manifest, prompts, candidate, reference, picture, expression)
            if not found.features:
                question.check_hidden()
            found.add(question, num_steps)
            advance(1)
        name = candidate.name
    return MaskedOracleReport(
        bundle=str(bundle.path),
        candidate=name,
        reference=f"the unpatched graphs of {original}, dropped tokens masked out",
        outputs=found.rows(tolerances),
        num_questions=len(pictures),
        compact_max_abs_diff=min(found.compact) if found.compact else None,
    )


def _check_arguments(
    pictures: Sequence[ImageInput], expressions: Sequence[str], num_steps: int
) -> None:
    if not pictures or len(pictures) != len(expressions) or num_steps < 1:
        raise UsageError(
            "nothing to compare with",
            seen=f"{len(pictures)} pictures, {len(expressions)} expressions, {num_steps} steps",
            allowed="at least one of each, and an expression for each picture",
        )


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
        self.features: _Pairs = []
        self.prefill: _Pairs = []
        self.decode: _Pairs = []
        self.uncached: _Pairs = []
        self.compact: list[float] = []

    def add(self, question: _Question, num_steps: int) -> None:
        """Run one question on both sides."""
        self.features.append(question.features)
        truth, tokens = question.masked_logits(num_steps)
        judged = question.pruned_logits(question.prompt, tokens)
        self.prefill.append((truth[:1], judged[:1]))
        if num_steps > 1:
            self.decode.append((truth[1:], judged[1:]))
            self.uncached.append((question.uncached_logits(tokens), truth[-1:]))
        if question.drops:
            renumbered = question.pruned_logits(question.renumbered, tokens)
            self.compact.append(float(np.abs(renumbered - truth).max()))

    def rows(self, tolerances: Mapping[str, Tolerance]) -> tuple[TensorRow, ...]:
        """The verdict on each output."""
        decoder, logits = "decoder_model_merged", tolerances["logits"]
        rows = [
            tensor_row(
                "vision_encoder", "image_features", self.features, tolerances["image_features"]
            ),
            tensor_row(decoder, "logits (prefill)", self.prefill, logits),
        ]
        if self.decode:
            rows.append(tensor_row(decoder, "logits (decode)", self.decode, logits))
            rows.append(uncached_row(self.uncached, logits))
        return tuple(rows)


class _Question:
    """One picture and expression, on both sides.

    Attributes:
        features: What the unpatched encoder gives for the kept tokens, and what the patched one
            does: twice [K, H].
        prompt: As the patched decoder takes it.
        renumbered: The same with compact positions.
        drops: Whether a token was dropped.
    """

    def __init__(
        self,
        manifest: Manifest,
        prompts: PromptEncoder,
        candidate: OnnxRuntimeBackend,
        reference: UnpatchedGraphs,
        picture: ImageInput,
        expression: str,
    ) -> None:
        self._candidate = candidate
        self._reference = reference
        self._eos = manifest.decoder.eos_token_ids
        encoded = prompts.encode(expression)
        image = load_image(picture, pad_color=manifest.image.pad_color)
        pixel_values, _ = prepare_image(image, manifest.image)
        given = candidate.run(VISION, {"pixel_values": pixel_values})
        kept, keep = given["image_features"], given["keep_indices"]
        every = reference.encode_image(pixel_values)[0]
        num_visual = manifest.pruning.num_visual_tokens
        if len(every) != num_visual or keep.min() < 0 or keep.max() >= num_visual:
            raise UsageError(
                "the bundle and the export disagree on the number of visual tokens",
                seen=f"{len(every)}, of which {keep.min()}..{keep.max()} are kept",
                allowed=f"{num_visual}",
            )
        self.features = (every[keep[0]], kept[0])
        self.drops = len(keep[0]) < num_visual
        ids = np.concatenate([encoded.prefix_ids, encoded.suffix_ids])
        text = embed_tokens(candidate, ids[None])[0]
        start = len(encoded.prefix_ids)
        row = PromptRow(
            prefix_embeds=text[:start],
            suffix_embeds=text[start:],
            image_features=kept[0],
            keep_indices=keep[0],
            num_visual_tokens=num_visual,
            grid=(manifest.grid.rows, manifest.grid.cols),
        )
        axes = manifest.decoder.position_axes
        self.prompt = assemble_prompt([row], positions="gap", position_axes=axes)
        self.renumbered = assemble_prompt([row], positions="compact", position_axes=axes)
        unpruned = replace(row, image_features=every, keep_indices=compact_positions(num_visual))
        whole = assemble_prompt([unpruned], positions="gap", position_axes=axes)
        self._full, self._all_ids = whole.inputs_embeds, whole.id_table

    def _ids(self, start: int, length: int) -> Int64Array:
        """Ids of so many tokens of the unpruned prompt and its answer, as RoPE reads them."""
        return gap_remap(np.arange(start, start + length, dtype=np.int64)[None], self._all_ids)

    def pruned_logits(self, prompt: DecoderPrompt, tokens: Int64Array) -> FloatArray:
        """The patched decoder's [T, V], fed these tokens int64 [T]."""
        answer = generate(
            self._candidate,
            prompt,
            max_new_tokens=len(tokens),
            eos_token_ids=self._eos,
            forced_tokens=tokens[None],
            keep_logits=True,
        )
        assert answer.logits is not None
        logits: FloatArray = answer.logits[0]
        return logits

    def masked_logits(self, num_steps: int) -> tuple[FloatArray, Int64Array]:
        """The unpatched decoder's [T, V], dropped tokens masked out, and the tokens it prefers."""
        length = self._full.shape[1]
        mask, ids = self._mask(), self._ids(0, length)
        cache = self._reference.new_cache()
        embeds, every = self._full, []
        tokens: list[int] = []
        for step in range(num_steps):
            logits, cache = self._reference.decode(
                inputs_embeds=embeds, attention_mask=mask, position_ids=ids, cache=cache
            )
            every.append(logits[0])
            tokens.append(int(logits[0].argmax()))
            embeds = self._embed(np.array([tokens[-1:]], dtype=np.int64))
            mask = np.concatenate([mask, np.ones((1, 1), dtype=np.int64)], axis=1)
            ids = self._ids(length + step, 1)
        return np.stack(every), np.array(tokens, dtype=np.int64)

    def uncached_logits(self, tokens: Int64Array) -> FloatArray:
        """The unpatched decoder's [1, V] behind all but the last of these tokens int64 [T]."""
        fed = self._embed(tokens[None, :-1])
        embeds = np.concatenate([self._full, fed], axis=1)
        mask = np.concatenate([self._mask(), np.ones(fed.shape[:2], dtype=np.int64)], axis=1)
        return self._reference.decode(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=self._ids(0, embeds.shape[1]),
            cache=self._reference.new_cache(),
        )[0]

    def _embed(self, ids: Int64Array) -> FloatArray:
        return embed_tokens(self._candidate, ids, may_be_constant=True)

    def _mask(self) -> Int64Array:
        """int64 [1, L], 0 for dropped tokens."""
        mask = np.zeros(self._full.shape[:2], dtype=np.int64)
        mask[0, self.prompt.kept_positions[0]] = 1
        return mask

    def check_hidden(self) -> None:
        """See that what is masked has no part in the logits: other vectors there change nothing.

        Raises:
            UsageError: it has.
        """
        if not self.drops:
            return
        mask, ids = self._mask(), self._ids(0, self._full.shape[1])
        other = self._full.copy()
        hidden = mask[0] == 0
        other[0, hidden] = -other[0, hidden][::-1]
        one, other_one = (
            self._reference.decode(
                inputs_embeds=embeds,
                attention_mask=mask,
                position_ids=ids,
                cache=self._reference.new_cache(),
            )[0]
            for embeds in (self._full, other)
        )
        if not np.array_equal(one, other_one):
            raise UsageError(
                "the unpatched decoder does not hide tokens that its attention_mask blocks in the "
                "middle of a prompt, so there is no unpruned run to compare with",
                seen=f"logits change by {np.abs(one - other_one).max():.1e} with what is hidden",
                fix="compare with the checkpoint instead: gap-export check",
            )
