"""Where published figures stand: sections between markers, which only tools write.

A section begins with ``<!-- figures:NAME -->`` and ends with ``<!-- /figures:NAME -->``. It holds
the command that wrote it. Every tool of a section prints it, and puts it there with ``--write``.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
DOCS = ROOT / "docs"
IMAGES = DOCS / "images"
DEMO_MODEL = "refshapes-llava"
DEMO_MODELS = (
    DEMO_MODEL,
    "refshapes-shikra",
    "refshapes-minigpt-v2",
    "refshapes-qwen3-vl",
    "refshapes-internvl",
)
SECTIONS = {
    "summary": README,
    "accuracy": DOCS / "results" / "index.md",
    "paper": DOCS / "results" / "paper.md",
    "lost": DOCS / "results" / "lost.md",
    "counted": DOCS / "results" / "lost.md",
    "extent": DOCS / "results" / "lost.md",
    "literature": DOCS / "results" / "lost.md",
    "few-tokens": DOCS / "results" / "few-tokens.md",
    "refshapes-2": DOCS / "results" / "refshapes-2.md",
    "parity": DOCS / "results" / "parity.md",
    "mutants": DOCS / "results" / "parity.md",
    "family-mutants": DOCS / "results" / "parity.md",
    "tolerances": DOCS / "results" / "parity.md",
    "quantization": DOCS / "results" / "quantization.md",
    "activations": DOCS / "results" / "quantization.md",
    "absence": DOCS / "results" / "absence.md",
    "export": DOCS / "results" / "cost.md",
    "export-qwen3-vl": DOCS / "results" / "cost.md",
    "engines": DOCS / "results" / "cost.md",
    "speed": DOCS / "results" / "speed.md",
    "serve-load": DOCS / "results" / "serve.md",
    "serve-trouble": DOCS / "results" / "serve.md",
    "gpu": DOCS / "results" / "gpu.md",
    "aarch64": DOCS / "jetson.md",
    "serve-overhead": DOCS / "results" / "serve.md",
    "plan-cpu": DOCS / "results" / "plan.md",
    "plan-published": DOCS / "results" / "plan.md",
    "multiply-adds": DOCS / "results" / "cost.md",
}


def publish(name: str, content: str, *, write: bool) -> None:
    """Print a section, and put it into its page where that is asked for."""
    print(content)
    if write:
        write_section(SECTIONS[name], name, content)


def write_section(page: Path, name: str, content: str) -> None:
    """Replace one section of a page.

    Raises:
        SystemExit: the page has no such section, or several.
    """
    start, end = f"<!-- figures:{name} -->", f"<!-- /figures:{name} -->"
    text = page.read_text(encoding="utf-8")
    if text.count(start) != 1 or text.count(end) != 1:
        raise SystemExit(f"{page} must hold {start} and {end} exactly once")
    head, rest = text.split(start)
    tail = rest.split(end)[1]
    page.write_text(f"{head}{start}\n{content}\n{end}{tail}", encoding="utf-8")


def called_as(tool: str) -> str:
    """The command of this process without ``--write``, which changes no figure."""
    return " ".join([f"tools/{tool}", *(word for word in sys.argv[1:] if word != "--write")])


def note(text: str) -> None:
    """Say on stderr what is being measured."""
    print(text, file=sys.stderr, flush=True)


def percent(share: float) -> str:
    """0.934 -> "93.4 %"."""
    return f"{100 * share:.1f} %"


def interval(ends: list[float]) -> str:
    """[0.9, 0.95] -> "90.0-95.0 %"."""
    return f"{100 * ends[0]:.1f}-{100 * ends[1]:.1f} %"
