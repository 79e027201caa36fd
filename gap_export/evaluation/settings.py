"""What an evaluation asks of a model: which bundle, and what is done to its positions."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from gap_export.runtime.generation import PromptRow
from gap_export.runtime.session import BackendName
from gap_export.spec.manifest import ImageSpec, PrunerText, PruningSpec
from gap_export.spec.positions import Int64Array, PositionRule

MisalignmentKind = Literal["permuted", "shifted"]
MISALIGNMENTS: tuple[MisalignmentKind, ...] = ("permuted", "shifted")
SettingPositions = Literal[
    "none",
    "compact",
    "text-shifted",
    "gap",
    "gap+proportional",
    "permuted",
    "shifted",
    "smaller-image",
]
_UNPRUNED = "unpruned"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One row of an evaluation.

    Attributes:
        name: ``unpruned``, ``spatial keep 0.3 gap``, ``permuted``, ...; unique in an evaluation.
        pruner: Its pruner; ``none`` where nothing is dropped.
        keep_ratio: 1.0 where nothing is dropped.
        positions: ``none``: nothing is dropped and nothing misaligned; ``compact``,
            ``text-shifted`` or ``gap``: of what pruning left, see ``spec.positions``;
            ``gap+proportional``: and kept tokens count as often as the bundle has it, while those
            before let each count as one, see ``spec.proportional``; ``permuted``
            or ``shifted``: nothing is dropped, see :class:`Misalignment`; ``smaller-image``:
            neither, of a smaller image, see ``evaluation.smaller_image``.
        backend: What runs it, where that is not what the runner's options say.
        pruner_text: What the pruner reads of the text: the ``expression`` or the ``question``; None
            where it reads none.
    """

    name: str
    bundle: Path
    pruner: str
    keep_ratio: float
    positions: SettingPositions
    backend: BackendName | None = None
    pruner_text: PrunerText | None = None

    @property
    def rule(self) -> PositionRule:
        """How its session gives ids to what is fed."""
        rules: dict[str, PositionRule] = {rule: rule for rule in get_args(PositionRule)}
        return rules.get(self.positions, "gap")

    @property
    def slug(self) -> str:
        """The name as part of a file's name; different names have different ones."""
        plain = re.sub(r"[^A-Za-z0-9._+-]+", "-", self.name)
        if plain == self.name.replace(" ", "-"):
            return plain
        return f"{plain}-{hashlib.sha256(self.name.encode()).hexdigest()[:8]}"


def naive_rules(position_axes: int) -> tuple[PositionRule, ...]:
    """Naive baselines that pruned tokens are asked with, beside GAP.

    On one axis ``compact`` alone, as the paper has it. On three there is a second mistake that a
    careful implementer makes, which OpenVINO GenAI's CDPruner does for Qwen-VL: ``text-shifted``.
    """
    return ("compact",) if position_axes == 1 else ("compact", "text-shifted")


def whole_arms(position_axes: int) -> tuple[SettingPositions, ...]:
    """What is asked with all tokens kept.

    On one axis compact positions are then the model's own. On three they take rows and columns
    away, which is no effect of pruning, so they are asked as well.
    """
    return ("none",) if position_axes == 1 else ("none", "compact")


def whole_settings(bundle: Path, positions: Sequence[SettingPositions]) -> list[Setting]:
    """Settings of a bundle that keeps all tokens, one for each of these positions."""
    return [
        Setting(
            name={"none": _UNPRUNED, "compact": f"{_UNPRUNED} compact"}.get(mode, mode),
            bundle=bundle,
            pruner="none",
            keep_ratio=1.0,
            positions=mode,
            # An unpruned bundle has no engines of its own.
            backend="onnxruntime",
        )
        for mode in positions
    ]


def pruned_settings(
    bundle: Path, pruning: PruningSpec, *, position_axes: int = 1
) -> tuple[Setting, ...]:
    """A pruned bundle with naive positions, ``compact`` first, with GAP, and last as it is.

    All but the last let each kept token count as one.
    """
    keep = f"{pruning.keep_ratio:g}"
    # As short as can be, without two being the same.
    exact = keep if float(keep) == pruning.keep_ratio else repr(pruning.keep_ratio)
    modes: tuple[SettingPositions, ...] = (*naive_rules(position_axes), "gap")
    if pruning.attention == "proportional":
        modes = (*modes, "gap+proportional")
    return tuple(
        Setting(
            name=f"{pruning.pruner} keep {exact} {mode}",
            bundle=bundle,
            pruner=pruning.pruner,
            keep_ratio=pruning.keep_ratio,
            positions=mode,
            pruner_text=None if pruning.text_similarity_sign is None else pruning.pruner_text,
        )
        for mode in modes
    )


def smaller_setting(bundle: Path, image: ImageSpec) -> Setting:
    """A bundle that keeps all tokens of a smaller image, in ONNX Runtime as the unpruned one."""
    (setting,) = whole_settings(bundle, ["smaller-image"])
    return replace(setting, name=f"smaller-image {image.width}x{image.height}")


def describe_positions(position_axes: int) -> dict[str, str]:
    """What naive positions of more than one axis do, in words, by how rows name it."""
    if position_axes == 1:
        return {}
    return {
        f"{_UNPRUNED} compact": "no token is dropped; on each axis the id of a token is the number "
        "of its slot, so that rows and columns are lost",
        "text-shifted": "visual tokens keep their ids, and the text behind them goes on after the "
        "largest id that is left; with no token dropped that is the unpruned model",
    }


def describe_attention(settings: Sequence[Setting]) -> dict[str, str]:
    """What proportional attention does, in words, where a setting has it."""
    arm: SettingPositions = "gap+proportional"
    if all(setting.positions != arm for setting in settings):
        return {}
    return {
        arm: "as gap, and each visual token counts as so many in attention as there were for each "
        "that is left; in all other rows it counts as one"
    }


def count_as_one(_expression: str, row: PromptRow) -> PromptRow:
    """A row each of whose tokens counts as one."""
    return replace(row, counts=None)


@dataclass(frozen=True, kw_only=True)
class Misalignment:
    """Positions that no longer say where a visual token is, though no token is dropped.

    Attributes:
        kind: ``permuted``: the visual tokens enter in a random order, and ids are given by the
            order of input; ``shifted``: every id from the first visual token on is moved.
        seed: Seed of the random order, which differs by expression.
        shift: By how much ids are moved.
    """

    kind: MisalignmentKind
    seed: int = 0
    shift: int = 0

    def edit(self, expression: str, row: PromptRow) -> PromptRow:
        """Misalign the row of an expression, which holds all visual tokens in raster order."""
        if self.kind == "shifted":
            return replace(row, shift=self.shift)
        order = random_order(self.seed, expression, len(row.image_features))
        return replace(row, image_features=row.image_features[order])

    def describe(self) -> str:
        """What is done, in words."""
        if self.kind == "shifted":
            return (
                "no token is dropped; every position id from the first visual token on is "
                f"{self.shift} higher"
            )
        return (
            "no token is dropped; the visual tokens enter in a random order, another one for each "
            f"expression (seed {self.seed}), and ids are given by the order of input"
        )


def random_order(seed: int, expression: str, num_visual_tokens: int) -> Int64Array:
    """A permutation, int64 [N], that seed and expression decide, with every numpy the same."""
    words = hashlib.sha256(expression.encode("utf-8", "surrogatepass")).digest()
    # The raw stream does not change between versions, what Generator makes of it may (NEP 19).
    stream = np.random.PCG64([seed, *np.frombuffer(words, dtype="<u4").tolist()])
    return np.argsort(stream.random_raw(num_visual_tokens), kind="stable").astype(np.int64)
