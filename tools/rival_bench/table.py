"""The page of speed: a table of medians, ratios to ours of the same run, and the bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from rival_bench.ours import MANY_EXPRESSIONS, PRUNED

Found = Mapping[str, Any]
STAGES = (
    *("tower", "prefill 692", "prefill 289", "decode 692", "decode 289"),
    *("answer", "next answer"),
)
_BACKENDS = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}


def page_of(found: Sequence[Found], missing: Mapping[str, str], alone: Found) -> str:
    """The tables, and what of the bars is reached.

    Args:
        found: What was measured with each rival, see ``tools/bench_rivals.py``.
        missing: Why others were not, by name.
        alone: What was measured of ours alone.
    """
    lines = [
        "`tools/bench_rivals.py`; milliseconds, medians of the rounds; answer: image and "
        "expression to 32 tokens, rivals unpruned, ours at keep 0.3; peak memory of the process.",
        "",
        f"| | {' | '.join(STAGES)} | peak GB | logits, cosine to float32 |",
        f"|---|{'---|' * (len(STAGES) + 2)}",
    ]
    lines += [_rival_row(one) for one in found]
    lines += [_our_row(backend, found, alone) for backend in _BACKENDS]
    lines += ["", "Times as fast as each rival, ours measured between its rounds:", ""]
    lines += [
        f"| | ours in | {' | '.join(STAGES)} |",
        f"|---|---|{'---|' * len(STAGES)}",
        *(_ratio_row(one, backend) for one in found for backend in _BACKENDS),
    ]
    lines += ["", "| bar | asked for | reached |", "|---|---|---|", *_bars(found, alone)]
    shares = [(share, one["rival"]) for one in found for share in one["others"]]
    others, (most, beside) = median(share for share, _ in shares), max(shares)
    lines += [
        "",
        f"Other processes took {100 * others:.0f} % of the processors meanwhile (median), and "
        f"{100 * most:.0f} % at most, beside {beside}."
        + (" The machine was busy: only ratios mean something." if others > 0.1 else ""),
        *(f"Not measured: {name}: {why}." for name, why in missing.items()),
    ]
    return "\n".join(lines)


def ours_of(one: Found, stage: str, backend: str) -> list[float]:
    """Milliseconds of ours in one rival's run, by round: pruned but for what says otherwise."""
    keep = "1.0" if stage.endswith("692") else PRUNED
    return [turn[stage] for turn in one["turns"][f"{keep} {backend}"]]


def ratio(one: Found, stage: str, backend: str) -> float | None:
    """How many times as fast as that rival: of each round by itself, the median."""
    theirs = [turn[stage] for turn in one["turns"]["rival"] if stage in turn]
    if not theirs:
        return None
    ours = ours_of(one, stage, backend)
    return median(slow / fast for slow, fast in zip(theirs, ours, strict=True))


def best_ratio(found: Sequence[Found], stage: str, backend: str) -> float | None:
    """Against the best of the rivals."""
    ratios = [ratio(one, stage, backend) for one in found]
    return min((value for value in ratios if value is not None), default=None)


def _rival_row(one: Found) -> str:
    cells = []
    for stage in STAGES:
        values = [turn[stage] for turn in one["turns"]["rival"] if stage in turn]
        cells.append(_digits(median(values)) if values else "")
    peak = one["peaks"]["rival"] / 1e9
    return f"| {one['runs']} | {' | '.join(cells)} | {peak:.1f} | {one['cosine']:.4f} |"


def _our_row(backend: str, found: Sequence[Found], alone: Found) -> str:
    cells = [
        _digits(median(value for one in found for value in ours_of(one, stage, backend)))
        for stage in STAGES
    ]
    peak, cosine = alone["peaks"][backend] / 1e9, alone["cosines"][backend]
    name = f"**ours, INT4, {_BACKENDS[backend]}**"
    return f"| {name} | {' | '.join(cells)} | {peak:.1f} | {cosine:.4f} |"


def _ratio_row(one: Found, backend: str) -> str:
    values = [ratio(one, stage, backend) for stage in STAGES]
    cells = ["" if value is None else f"{value:.2f}x" for value in values]
    return f"| {one['rival']} | {_BACKENDS[backend]} | {' | '.join(cells)} |"


def _bars(found: Sequence[Found], alone: Found) -> list[str]:
    """A line for each bar, with what each backend reaches."""
    quick = [one for one in found if not one["rival"].startswith("torch")]
    torch = [one for one in found if one["rival"] == "torch-bfloat16"]
    asked = [
        *((f"{stage}, against the best", found, stage, 1.0) for stage in STAGES[1:5]),
        ("tower, against the best", found, "tower", 0.9),
        ("answer, against the best unpruned", quick, "answer", 1.3),
        ("answer, against torch bfloat16", torch, "answer", 3.0),
        ("next answer, against the best", quick, "next answer", 1.3),
    ]
    lines = []
    for name, rivals, stage, bar in asked:
        reached = {b: best_ratio(rivals, stage, b) for b in _BACKENDS}
        lines.append(f"| {name} | {bar:g}x | {_told(reached, 'x')} |")
    many = f"{MANY_EXPRESSIONS} answers"
    shares = {
        backend: median(turn[many] / turn["answer"] for turn in alone["turns"][backend])
        for backend in _BACKENDS
    }
    lines.append(f"| {MANY_EXPRESSIONS} expressions, of one | <= 3.5x | {_told(shares, 'x')} |")
    whole = [one["peaks"]["rival"] for one in quick if "answer" in one["turns"]["rival"][0]]
    if whole:
        sizes = {backend: alone["peaks"][backend] / min(whole) for backend in _BACKENDS}
        told = _told(sizes, "x")
        lines.append(f"| peak memory, of the smallest rival's whole model | <= 1.2x | {told} |")
    return lines


def _told(values: Mapping[str, float | None], unit: str) -> str:
    told = (
        f"{_BACKENDS[name]} " + ("not measured" if value is None else f"{value:.2f}{unit}")
        for name, value in values.items()
    )
    return ", ".join(told)


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
