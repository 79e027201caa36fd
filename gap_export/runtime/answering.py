"""From an image and expressions to groundings: the way that every question takes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from gap_export.bundle.calibration import Calibration
from gap_export.errors import BundleError, ExpressionError, UsageError
from gap_export.runtime.answers import PlacedBox, box_tokens, read_answer
from gap_export.runtime.backends.backend import Backend, FloatArray, KVCache
from gap_export.runtime.box_grammar import BoxGrammar
from gap_export.runtime.byte_store import ByteStore
from gap_export.runtime.clock import StageClock
from gap_export.runtime.expected_tokens import ExpectedTokens, generate_expecting
from gap_export.runtime.generation import (
    DecoderPrompt,
    Generation,
    PromptRow,
    assemble_prompt,
    check_baked,
    embed_tokens,
    generate,
)
from gap_export.runtime.grounding import Grounding, ScoredBox
from gap_export.runtime.image_view import PreparedImage
from gap_export.runtime.images.image import ColorOrder, ImageFrame, ImageInput, read_image
from gap_export.runtime.prompt import EncodedExpression, PromptEncoder
from gap_export.runtime.shared_prefix import (
    KeptPrefix,
    bytes_per_slot,
    choose_length,
    find_prefix,
)
from gap_export.runtime.texts import encode_texts
from gap_export.runtime.visual_tokens import VisualTokens, encode_image
from gap_export.spec.manifest import Manifest
from gap_export.spec.positions import PositionRule
from gap_export.spec.requests import GrammarName

# More than any answer has room for.
MAX_BOXES = 100
_OTHER_CALIBRATION = (
    "no verdict whether it is there: the bundle was calibrated with another grammar or other "
    "positions"
)
# What is asked and its row of the prompt; gives the row that is fed.
EditRow = Callable[[str, PromptRow], PromptRow]


class Answering:
    """Answers with one model; the base of ``GroundingSession``, which see."""

    def __init__(
        self,
        manifest: Manifest,
        assets_folder: str | Path,
        backend: Backend,
        *,
        positions: PositionRule | None,
        edit_row: EditRow | None,
        kept_bytes: int,
        grammar: GrammarName | None,
        calibration: Calibration | None,
        max_boxes: int,
    ) -> None:
        """Join a model's facts, its tokenizers and a backend; see ``GroundingSession``."""
        self.manifest = manifest
        self.backend = backend
        self.positions: PositionRule = positions or manifest.pruning.positions
        if manifest.grid.num_visual_tokens != manifest.pruning.num_visual_tokens:
            raise BundleError(
                "grid and pruning disagree on the number of visual tokens",
                seen=f"{manifest.grid.num_visual_tokens} and {manifest.pruning.num_visual_tokens}",
                fix="the bundle does not hold together; export it again",
            )
        if not 1 <= max_boxes <= MAX_BOXES:
            raise UsageError("no such number of boxes", seen=max_boxes, allowed=f"1 to {MAX_BOXES}")
        self._max_boxes = max_boxes
        self._prompts = PromptEncoder(manifest, Path(assets_folder))
        self._edit_row = edit_row
        self._backend_name = backend.name
        self._expected = ExpectedTokens(self._prompts.has_digit)
        self._grammar: BoxGrammar | None = None
        if grammar is not None:
            if grammar not in get_args(GrammarName):
                raise UsageError("no such grammar", seen=repr(grammar), allowed="box, or none")
            pieces, ends = self._prompts.pieces(), manifest.decoder.eos_token_ids
            self._grammar = BoxGrammar(manifest.box, pieces, ends)
        self._threshold: float | None = None
        self._own_warnings: tuple[str, ...] = ()
        if calibration is not None:
            if (calibration.positions, calibration.grammar) == (self.positions, grammar):
                self._threshold = calibration.threshold
            else:
                self._own_warnings = (_OTHER_CALIBRATION,)
        self._store = ByteStore(kept_bytes, what="kept_bytes")

    def _encode(self, expressions: Sequence[str]) -> list[EncodedExpression]:
        if isinstance(expressions, str) or not expressions:
            raise ExpressionError(
                "no list of expressions", seen=repr(expressions), allowed="at least one, in a list"
            )
        return [self._prompts.encode(expression) for expression in expressions]

    def _prepare(
        self,
        image: ImageInput | PreparedImage,
        frame: ImageFrame,
        color: ColorOrder,
        *,
        allow_damaged: bool,
    ) -> PreparedImage:
        if isinstance(image, PreparedImage):
            return image
        pad_color = self.manifest.image.pad_color
        loaded = read_image(
            image, pad_color=pad_color, frame=frame, allow_damaged=allow_damaged, color=color
        )
        return PreparedImage.of(loaded, self.manifest)

    def _ask(
        self,
        seen: PreparedImage,
        encoded: Sequence[EncodedExpression],
        clock: StageClock,
        *,
        keeps: bool = False,
    ) -> list[Grounding]:
        """Answer expressions; what is computed of the image alone is looked up and kept."""
        if seen.num_tiled_tokens is not None:
            # Its size decides how long the prompt is.
            for row in encoded:
                self._prompts.check_context(row, seen.num_tiled_tokens)
        visual = self._see(seen, encoded, clock, keeps=keeps)
        with clock.stage("embed_tokens"):
            rows = self._rows(encoded, visual)
            kept = self._place(seen, encoded, visual) if keeps else None
            prompt = assemble_prompt(
                rows,
                positions=self.positions,
                position_axes=self.manifest.decoder.position_axes,
                num_shared=choose_length(rows, self.backend, kept),
            )
            if self.manifest.pruning.baked_positions:
                check_baked(prompt, self.manifest.pruning.baked_positions)
        started = time.perf_counter()
        prefix = None
        if prompt.num_shared:
            prefix = find_prefix(self.backend, prompt, kept, self.manifest.decoder)
        prefix_ms = 1e3 * (time.perf_counter() - started)
        answer = self._generate(prompt, prefix)
        clock.add("prefill", prefix_ms + answer.prefill_ms)
        clock.add("decode", answer.decode_ms)
        return self._answers(seen, encoded, visual, answer, clock)

    def _generate(self, prompt: DecoderPrompt, prefix: KVCache | None) -> Generation:
        """Greedy decoding, in as few steps as the backend can verify."""
        limits: dict[str, Any] = {
            "max_new_tokens": self.manifest.prompt.max_new_tokens,
            "eos_token_ids": self.manifest.decoder.eos_token_ids,
            "prefix": prefix,
        }
        if self._grammar is not None:
            return generate(self.backend, prompt, grammar=self._grammar, **limits)
        if len(prompt.inputs_embeds) == 1 and self.backend.num_logits > 1:
            answer = generate_expecting(self.backend, prompt, self._expected, **limits)
        else:
            answer = generate(self.backend, prompt, **limits)
        for tokens in answer.token_ids:
            self._expected.learn(tokens)
        return answer

    def _see(
        self,
        seen: PreparedImage,
        encoded: Sequence[EncodedExpression],
        clock: StageClock,
        *,
        keeps: bool,
    ) -> Sequence[VisualTokens]:
        """What the decoder gets to see of the image, for each expression."""
        text_embeds: FloatArray | None = None
        if self.manifest.text_encoder is not None:
            # What is kept of the image depends on the text.
            keeps = False
            with clock.stage("text_encoder"):
                text_embeds = encode_texts(self.backend, encoded, self.manifest)
        found: VisualTokens | None = self._store.get(seen.key) if keeps else None
        if found is not None:
            return [found] * len(encoded)
        with clock.stage("vision_encoder"):
            visual = encode_image(
                self.backend,
                seen.pixel_values,
                text_embeds,
                manifest=self.manifest,
                geometry=seen.geometry,
                num_rows=len(encoded),
            )
        if keeps:
            self._store.put(seen.key, visual[0], visual[0].features.nbytes)
        return visual

    def _rows(
        self, encoded: Sequence[EncodedExpression], visual: Sequence[VisualTokens]
    ) -> list[PromptRow]:
        rows = []
        weighs = self.manifest.pruning.attention == "proportional"
        for row, tokens in zip(encoded, visual, strict=True):
            start = len(row.prefix_ids)
            ids = np.concatenate([row.prefix_ids, row.suffix_ids])
            (embeds,) = embed_tokens(self.backend, ids[None])
            rows.append(
                PromptRow(
                    prefix_embeds=embeds[:start],
                    suffix_embeds=embeds[start:],
                    image_features=tokens.features,
                    keep_indices=tokens.keep_indices,
                    num_visual_tokens=tokens.num_visual_tokens,
                    grid=tokens.shape,
                    counts=tokens.counts if weighs else None,
                )
            )
        if self._edit_row is None:
            return rows
        return [self._edit_row(one.expression, row) for one, row in zip(encoded, rows, strict=True)]

    def _place(
        self,
        seen: PreparedImage,
        encoded: Sequence[EncodedExpression],
        visual: Sequence[VisualTokens],
    ) -> KeptPrefix | None:
        """Where the beginning of a prompt is kept; None where it would not fit."""
        if self._edit_row is not None:
            return None
        prefix_ids, image_key, length = encoded[0].prefix_ids, None, len(encoded[0].prefix_ids)
        if self.manifest.text_encoder is None:
            image_key, length = seen.key, length + len(visual[0].features)
        num_bytes = length * bytes_per_slot(self.manifest.decoder, self.backend.dtype)
        if not self._store.has_room(num_bytes):
            return None
        key = (image_key, prefix_ids.tobytes(), self.positions)
        return KeptPrefix(store=self._store, key=key, length=length)

    def _answers(
        self,
        seen: PreparedImage,
        encoded: Sequence[EncodedExpression],
        visual: Sequence[VisualTokens],
        answer: Generation,
        clock: StageClock,
    ) -> list[Grounding]:
        texts = [self._prompts.decode(token_ids) for token_ids in answer.token_ids]
        timings, geometry = clock.read(), seen.geometry
        found = []
        for row, text in enumerate(texts):
            token_ids = answer.token_ids[row]
            placed, problems = read_answer(
                text, token_ids, self.manifest, geometry, max_boxes=self._max_boxes
            )
            boxes = tuple(
                self._score(one, token_ids, answer.log_probabilities[row]) for one in placed
            )
            found.append(
                Grounding(
                    expression=encoded[row].expression,
                    box=boxes[0].box if boxes else None,
                    score=boxes[0].score if boxes else None,
                    found=boxes[0].found if boxes else self._is_found(None),
                    boxes=boxes,
                    text=text,
                    token_ids=token_ids,
                    keep_indices=tuple(visual[row].keep_indices.tolist()),
                    num_visual_tokens=visual[row].num_visual_tokens,
                    tokens=visual[row].grids,
                    image_size=(geometry.width, geometry.height),
                    timings_ms=timings,
                    backend=self._backend_name,
                    orientation=seen.orientation,
                    warnings=(
                        *self._own_warnings,
                        *seen.warnings,
                        *encoded[row].warnings,
                        *problems,
                    ),
                )
            )
        return found

    def _score(
        self, placed: PlacedBox, token_ids: tuple[int, ...], log_probabilities: Sequence[float]
    ) -> ScoredBox:
        """A box with the probability of its tokens."""
        tokens = box_tokens(token_ids, placed.span, self._prompts.decode)
        score = math.exp(math.fsum(log_probabilities[tokens]))
        return ScoredBox(box=placed.box, score=score, found=self._is_found(score))

    def _is_found(self, score: float | None) -> bool | None:
        """Whether a score, or an answer without a box, is that of an object that is there."""
        if self._threshold is None:
            return None
        return score is not None and score >= self._threshold
