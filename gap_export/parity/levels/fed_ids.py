"""A second opinion on the ids that a session feeds.

PyTorch and a bundle are fed by the same session, so wrong arithmetic of positions would be wrong on
both sides alike. Here the ids are counted one token after the other, from what was recorded: where
the text's embeddings stand around the image's, and which visual tokens survived.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gap_export.parity.replay import Call
from gap_export.parity.truth import Recorded
from gap_export.runtime.grounding import Grounding
from gap_export.spec.manifest import Manifest
from gap_export.spec.positions import Int64Array


def wrong_fed_ids(calls: Sequence[Call], answer: Grounding, manifest: Manifest) -> str:
    """What is wrong with the ids of a question's prompt, in one sentence; empty where nothing is.

    Args:
        calls: Of one question, in order.
        answer: To it.
        manifest: The bundle's.
    """
    at = next(place for place, call in enumerate(calls) if call.is_decode)
    prefill = calls[at]
    # The last one before it: a pruner may have read the words of the text by themselves.
    text = next(call for call in reversed(calls[:at]) if call.component == "embed_tokens")
    embeds, fed = text.outputs["inputs_embeds"][0], prefill.inputs["inputs_embeds"][0]
    num_kept, num_text = len(answer.keep_indices), len(embeds)
    before = next(
        (
            start
            for start in range(num_text, -1, -1)
            if np.array_equal(fed[:start], embeds[:start])
            and np.array_equal(fed[start + num_kept :], embeds[start:])
        ),
        None,
    )
    if before is None or len(fed) != num_text + num_kept:
        return (
            f"the prompt fed is not its {num_text} text tokens around {num_kept} visual tokens, "
            f"but {len(fed)} tokens"
        )
    visual = fed[before : before + num_kept]
    if misplaced := _wrong_stack(calls[:at], visual, answer, manifest):
        return misplaced
    counted = count_ids(
        before=before,
        keep_indices=answer.keep_indices,
        num_visual_tokens=answer.num_visual_tokens,
        after=num_text - before,
        grid=(answer.tokens[0].rows, answer.tokens[0].cols),
        position_axes=manifest.decoder.position_axes,
        is_compact=manifest.pruning.positions == "compact",
    )
    table = prefill.inputs["kept_positions"][..., 0, :].reshape(counted.shape[0], -1)
    if table.shape != counted.shape:
        return f"a table of {table.shape[1]} ids is fed for a prompt of {counted.shape[1]} tokens"
    wrong = np.argwhere(table != counted)
    if not len(wrong):
        return ""
    axis, token = wrong[0]
    return (
        f"token {token} of the prompt is fed with id {table[axis, token]}, counted by hand it is "
        f"{counted[axis, token]}; {len(wrong)} of {counted.size} ids are wrong"
    )


def _wrong_stack(
    calls: Sequence[Call], visual: NDArray[Any], answer: Grounding, manifest: Manifest
) -> str:
    """What is wrong with the order of tiles that follow each other; empty where nothing is.

    Args:
        calls: Of one question, those before the prefill.
        visual: [K', H], the visual tokens that are fed.
        answer: To the question.
        manifest: The bundle's.
    """
    if manifest.image.tiles is None or manifest.image.has_newlines:
        return ""
    vision = next(call for call in reversed(calls) if call.component == "vision_encoder")
    walked = [
        tile * manifest.grid.num_visual_tokens + index
        for tile, kept in enumerate(vision.outputs["keep_indices"].tolist())
        for index in kept
    ]
    if walked != list(answer.keep_indices):
        said = list(answer.keep_indices)[:5]
        return f"the first visual tokens fed are said to be {said}, tile by tile {walked[:5]}"
    if not np.array_equal(visual, vision.outputs["image_features"].reshape(visual.shape)):
        return "the visual tokens fed do not follow each other as the tiles do"
    return ""


def first_wrong_fed_ids(recorded: Recorded, manifest: Manifest) -> str:
    """The same of all that a reference was asked; the first question that is wrong is named."""
    for calls, answer in zip(recorded.calls, recorded.answers, strict=True):
        if wrong := wrong_fed_ids(calls, answer, manifest):
            return f"{answer.expression!r}: {wrong}"
    return ""


def count_ids(
    *,
    before: int,
    keep_indices: Sequence[int],
    num_visual_tokens: int,
    after: int,
    grid: tuple[int, int],
    position_axes: int,
    is_compact: bool,
) -> Int64Array:
    """Ids int64 [A, P] of a prompt with one image, one token after the other.

    Args:
        before: Text tokens before the image.
        keep_indices: Index of each kept visual token.
        num_visual_tokens: How many there were.
        after: Text tokens after the image.
        grid: Rows and columns of the visual tokens; read with three axes alone, where the text goes
            on behind the longer side (M-RoPE, arXiv 2409.12191).
        position_axes: A, 1 or 3.
        is_compact: Number what is fed, on all axes.
    """
    if is_compact:
        ids = [(slot,) * position_axes for slot in range(before + len(keep_indices) + after)]
        return np.array(ids, dtype=np.int64).T
    ids = [(token,) * position_axes for token in range(before)]
    for index in keep_indices:
        if position_axes == 1:
            ids.append((before + index,))
        else:
            ids.append((before, before + index // grid[1], before + index % grid[1]))
    end = before + (num_visual_tokens if position_axes == 1 else max(grid))
    ids += [(token,) * position_axes for token in range(end, end + after)]
    return np.array(ids, dtype=np.int64).T
