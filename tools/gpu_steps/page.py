"""A session's figures as Markdown: a table for each step, and what was not run, with the reason."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gpu_steps.steps import STEPS

NOT_YET = (
    "**Not yet run**: no machine with an NVIDIA GPU has run `tools/gpu_session.py run` so far, and "
    "nothing about one is claimed."
)
_PARITY = ("runs", "same tokens", "lowest IoU", "hits", "answer ms", "tower ms", "prefill ms")
_TORCH = ("runs", "prompt tokens", "prefill ms", "a token, ms")
_BENCH = ("runs", "keep", "answer ms", "prefill ms", "a token, ms", "times as fast", "J", "n")
_Row = tuple[str, ...]


def page_of(results: Mapping[str, Any] | None) -> str:
    """The whole section.

    Args:
        results: Of a session, see ``tools/gpu_session.py``; None: there was none.
    """
    if results is None:
        return NOT_YET
    lines = [
        f"`tools/gpu_session.py run`, gap-export {results['gap_export']}, on {results['gpu']}."
    ]
    if results["rehearsal"]:
        lines[0] += " **A rehearsal: the CPU stood for a GPU, so that no figure means anything.**"
    lines += [
        "",
        "Milliseconds are medians with quartiles; a token's and PyTorch's are medians. Hits are "
        "boxes with IoU above 0.5, those of float32 on the CPU in brackets.",
    ]
    for name, step in STEPS.items():
        found = results["steps"].get(name)
        lines += ["", f"### {step.title}", ""]
        lines += ["Not run: not begun."] if found is None else _step(name, found)
    return "\n".join(lines)


def _step(name: str, found: Mapping[str, Any]) -> Iterator[str]:
    ran = [item for item in found["items"] if item["outcome"] == "ran"]
    headings, rows = _table(name, ran)
    if rows:
        yield from _markdown(headings, rows)
        yield ""
    # What is missing is missing for many.
    alike: dict[tuple[str, str], list[str]] = {}
    for item in found["items"]:
        if item["outcome"] != "ran":
            alike.setdefault((item["outcome"], item["reason"]), []).append(item["name"])
    for (outcome, reason), names in alike.items():
        yield f"- {outcome}: {'; '.join(names)}: {reason}"
    yield f"- {found['seconds']:.0f} s; {_gpu(found['gpu'])}"


def _table(name: str, ran: Sequence[Mapping[str, Any]]) -> tuple[_Row, list[_Row]]:
    """Headings and rows of one step."""
    if name in ("cuda", "dtypes"):
        return _PARITY, [_compared(item) for item in ran]
    if name == "engines":
        # Built first, then run: one table of each would be two of three rows.
        built = [_built(item) for item in ran if "engines" in item["figures"]]
        compared = [_compared(item) for item in ran if "ms" in item["figures"]]
        return _PARITY, [*built, *compared]
    if name == "check":
        return ("runs", "levels", "n"), [
            _checked(item, form) for item in ran for form in item["figures"]["forms"]
        ]
    if name == "torch":
        return _TORCH, [_in_torch(item) for item in ran]
    if name.startswith("bench"):
        return _BENCH, [_benched(item, row) for item in ran for row in item["figures"]["rows"]]
    return ("s",), [(item["name"], f"{item['seconds']:.1f}") for item in ran]


def _compared(item: Mapping[str, Any]) -> _Row:
    figures = item["figures"]
    n, ms = figures["n"], figures["ms"]
    return (
        item["name"],
        figures["runs"],
        f"{figures['same_tokens']} of {n}",
        f"{figures['lowest_iou']:.2f}",
        f"{figures['hits']} ({figures['hits_of_the_reference']}) of {n}",
        *(_spread(ms[stage]) for stage in ("total", "vision_encoder", "prefill")),
    )


def _built(item: Mapping[str, Any]) -> _Row:
    engines = item["figures"]["engines"]
    size = sum(engine["size_bytes"] for engine in engines) / 1e6
    seconds = sum(engine["build_seconds"] for engine in engines)
    peak = max(engine["peak_memory_bytes"] for engine in engines) / 1e9
    told = f"{len(engines)} engines, {size:.1f} MB, {seconds:.1f} s, {peak:.1f} GB at most"
    return (item["name"], f"{item['figures']['target']}: {told}", *[""] * (len(_PARITY) - 1))


def _checked(item: Mapping[str, Any], form: Mapping[str, Any]) -> _Row:
    levels = ", ".join(f"{name} {status}" for name, status in form["levels"].items())
    return (item["name"], form["runs"], levels, str(item["figures"]["n"]))


def _in_torch(item: Mapping[str, Any]) -> _Row:
    figures = item["figures"]
    times = (f"{figures[name]:.2f}" for name in ("prefill_ms", "decode_ms"))
    return (item["name"], figures["runs"], str(figures["prompt_tokens"]), *times)


def _benched(item: Mapping[str, Any], row: Mapping[str, Any]) -> _Row:
    stages, energy = row["stages"], row["energy_j"]
    faster = row["speedup"].get("total")
    return (
        f"{item['name']}, {row['bundle']}",
        row["runs"],
        f"{row['keep_ratio']:g}",
        _spread(stages["total"]),
        _spread(stages["prefill"]),
        f"{stages['decode_token']['median']:.2f}" if "decode_token" in stages else "",
        _spread(faster, "x") if faster else "",
        _spread(energy) if energy else "",
        str(stages["total"]["n"]),
    )


def _gpu(figures: Mapping[str, Any]) -> str:
    if "not_measured" in figures:
        return f"memory and power not measured: {figures['not_measured']}"
    told = []
    for key, words, unit in (
        ("memory_peak_bytes", "GB in use at most", 1e9),
        ("power_mean_w", "W on average", 1),
        ("power_max_w", "W at most", 1),
        ("energy_j", "J", 1),
        ("temperature_max_c", "°C at most", 1),
    ):
        value = figures[key]
        told.append(f"{words}: not told" if value is None else f"{value / unit:.1f} {words}")
    return f"all {figures['gpus']} GPUs: {', '.join(told)}; {figures['samples']} samples"


def _spread(spread: Mapping[str, Any], unit: str = "") -> str:
    median, low, high = (f"{spread[key]:.2f}{unit}" for key in ("median", "low", "high"))
    return f"{median} ({low}-{high})"


def _markdown(headings: _Row, rows: Sequence[_Row]) -> Iterator[str]:
    yield f"| | {' | '.join(headings)} |"
    yield f"|---|{'---|' * len(headings)}"
    yield from (f"| {' | '.join(row)} |" for row in rows)
