"""Made-up reports of evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gap_export.evaluation.questions import ImageSource, Unusable
from gap_export.evaluation.results import (
    Accuracy,
    Comparison,
    DataSummary,
    EvaluationReport,
    GalleryAnswer,
    GalleryItem,
    SettingRow,
)

TEXT = "the red circle"
TOKENS = 144
KINDS = {"attribute": 290, "superlative": 130, "relation": 80}
SCENE = ImageSource(scene=("heldout", 0, 3, 2))
SHARES = {
    ("random", 0.3): (0.022, 0.787),
    ("spatial", 0.3): (0.016, 0.93),
    ("spatial", 0.1): (0.004, 0.332),
}


def accuracy(share: float, n: int = 500, **changes: Any) -> Accuracy:
    return Accuracy(**{**_measured(share, n), **changes})


def _measured(share: float, n: int) -> dict[str, Any]:
    return {
        "n": n,
        "num_images": 63,
        "acc_at_50": share,
        "ci95": (max(0.0, share - 0.03), min(1.0, share + 0.025)),
        "mean_iou": 0.8 * share,
        "parse_failures": 3,
        "curve": {
            f"0.{tenth}": round(min(1.0, share * (1.02 - (0.12 * tenth / 5) ** 2)), 4)
            for tenth in range(1, 10)
        },
    }


def setting_row(share: float = 0.93, **changes: Any) -> SettingRow:
    plain: dict[str, Any] = {
        **_measured(share, 500),
        "name": "spatial keep 0.3 gap",
        "model": "refshapes-llava",
        "pruner": "spatial",
        "keep_ratio": 0.3,
        "positions": "gap",
        "seed": 0,
        "protocol": "unpad",
        "recovered": share / 0.992,
        "mean_visual_tokens": 43.0,
        "by_split": {"heldout": accuracy(share)},
        "by_kind": {
            kind: accuracy(max(0.0, share - 0.04 * place), n)
            for place, (kind, n) in enumerate(KINDS.items())
        },
        "latency_ms": {
            "total": {"median": 61.2, "p95": 70.1},
            "vision_encoder": {"median": 9.5, "p95": 11.0},
            "prefill": {"median": 21.0, "p95": 29.5},
            "decode": {"median": 30.7, "p95": 33.3},
        },
        "mean_batch_size": 7.9,
        "other_protocols": {"lmms": share, "shikra": max(0.0, share - 0.002)},
        "backend": "ONNX Runtime 1.32.0 (CPUExecutionProvider)",
    }
    return SettingRow(**{**plain, **changes})


def whole_row(name: str = "unpruned", share: float = 0.992, **changes: Any) -> SettingRow:
    plain: dict[str, Any] = {
        "name": name,
        "pruner": "none",
        "keep_ratio": 1.0,
        "positions": "none",
        "recovered": None,
        "mean_visual_tokens": float(TOKENS),
    }
    return setting_row(share, **{**plain, **changes})


def gallery_item(text: str = TEXT, **changes: Any) -> GalleryItem:
    box = (20.0, 30.0, 50.0, 62.5)
    answers = (
        GalleryAnswer(setting="unpruned", text=f"[0.21, {text}]", box=box, iou=0.97),
        GalleryAnswer(setting="spatial keep 0.3 compact", text=text, box=None, iou=0.0),
        GalleryAnswer(
            setting="spatial keep 0.3 gap", text=text, box=(21.0, 29.0, 52.0, 60.0), iou=0.84
        ),
        GalleryAnswer(
            setting="random keep 0.3 compact", text=text, box=(-5.0, 70.0, 40.0, 120.0), iou=0.1
        ),
        GalleryAnswer(
            setting="random keep 0.3 gap", text=text, box=(25.0, 33.0, 47.0, 58.0), iou=0.56
        ),
    )
    plain: dict[str, Any] = {
        "kind": "flipped by GAP",
        "question_id": "0-3-1",
        "expression": text,
        "image": SCENE,
        "box": box,
        "answers": answers,
    }
    return GalleryItem(**{**plain, **changes})


def unusable(reason: str = "missing picture", text: str = TEXT) -> Unusable:
    return Unusable(
        question_id=f"17-{text}",
        image_id="17",
        split="heldout",
        kind=None,
        reason=reason,  # type: ignore[arg-type]
        detail=f"images/{text}.jpg",
    )


def evaluation_report(text: str = TEXT, **changes: Any) -> EvaluationReport:
    """Three configurations, both misalignments, and all else that a report can hold.

    ``text`` stands where a data set, a user or a model has a say.
    """
    rows = [whole_row()]
    comparisons = []
    for (pruner, keep_ratio), shares in SHARES.items():
        for positions, share in zip(("compact", "gap"), shares, strict=True):
            name = f"{pruner} keep {keep_ratio:g} {positions}"
            row = setting_row(
                share,
                name=name,
                pruner=pruner,
                keep_ratio=keep_ratio,
                positions=positions,
                mean_visual_tokens=TOKENS * keep_ratio,
            )
            rows.append(row)
        comparisons.append(_comparison(name, name.replace(" gap", " compact")))
    rows.append(whole_row("permuted", 0.022, positions="permuted", recovered=0.022))
    rows.append(whole_row(text, 0.038, positions="shifted", recovered=0.038))
    rows = [_with_text(row, text) for row in rows]
    plain: dict[str, Any] = {
        "model": "refshapes-llava",
        "family": "llava",
        "data": DataSummary(
            spec=f"refshapes:{text}",
            name="refshapes",
            layout="refshapes",
            splits=("heldout", text),
            num_expressions=503,
            num_images=63,
            num_excluded=1,
            unusable=(unusable(text=text), unusable(text="other"), unusable("empty box", text)),
            fingerprint="ab" * 32,
        ),
        "protocol": "unpad",
        "protocol_summary": "pixels of the original image, plain IoU, > 0.5",
        "prompt": f"USER: <image> {text} {{expression}} ASSISTANT:",
        "seed": 0,
        "backend": "onnxruntime",
        "rows": tuple(rows),
        "misalignments": {text: f"{text}: every id from the first visual token on, by 6"},
        "comparisons": tuple(comparisons),
        "gallery": (
            gallery_item(text),
            gallery_item(text, kind="best", question_id="0-4-0"),
            gallery_item(text, kind="worst", image=ImageSource(path=Path(f"/no/{text[:20]}.jpg"))),
        ),
    }
    return EvaluationReport(**{**plain, **changes})


def unpruned_report() -> EvaluationReport:
    """The least there can be: one row, one kind, and nothing to compare or to show."""
    row = whole_row(
        by_kind={},
        by_split={},
        latency_ms={},
        other_protocols={},
        curve={},
        backend="",
        ci95=(0, 1),
    )
    data = DataSummary(
        spec="refshapes", name="refshapes", layout="refshapes", splits=("heldout",),
        num_expressions=500, num_images=63,
    )  # fmt: skip
    return evaluation_report(data=data, rows=(row,), misalignments={}, comparisons=(), gallery=())


def _with_text(row: SettingRow, text: str) -> SettingRow:
    plain = {name: getattr(row, name) for name in row.__dataclass_fields__}
    plain |= {
        "by_split": {"heldout": accuracy(row.acc_at_50), text: accuracy(row.acc_at_50, 7)},
        "by_kind": {**row.by_kind, text: accuracy(row.acc_at_50, 9)},
        "latency_ms": {**row.latency_ms, text: {"median": 1.0, "p95": 2.0}},
        "other_protocols": {**row.other_protocols, text: row.acc_at_50},
        "num_unusable": 2,
        "num_tolerant": 4,
        "acc_at_50_usable": min(1.0, row.acc_at_50 * 1.004),
    }
    return SettingRow(**plain)


def _comparison(first: str, second: str) -> Comparison:
    return Comparison(
        first=first,
        second=second,
        n=500,
        both=8,
        only_first=457,
        only_second=0,
        neither=35,
        difference=0.914,
        ci95=(0.886, 0.936),
        mcnemar_p=0.0 if first.startswith("random") else 5.4e-138,
    )
