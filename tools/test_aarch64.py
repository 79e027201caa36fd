#!/usr/bin/env python3
"""Does a bundle made here run on a 64-bit Arm board, with the oldest packages that are allowed?

    tools/test_aarch64.py            everything below build/aarch64; some minutes
    tools/test_aarch64.py --write    the table as well, into docs/jetson.md

A Debian for arm64 is unpacked into a folder by debootstrap, and its programs run under qemu-user as
a Cortex-A76 (ARMv8.2, as an Orin's Cortex-A78AE). Its own pip installs the base install from wheels
alone, at the lower bounds of pyproject.toml. Then `doctor`, `inspect`, `ground` on images, `check`
against a golden that was recorded here, and `python -m gap_export.engines` must end as they should,
and answers be those of this machine, token for token.

Needs root, for chroot and mounts of its own, and ``apt-get install debootstrap qemu-user-static``.
Where the kernel is not told of qemu yet, it is told, until the machine is started anew.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomllib
import typer
from pages import DEMO_MODEL, ROOT, note, publish

# Debian's own Python. JetPack 6 has 3.10, which Debian never had in a release; that wheels are
# there for it is asked of pip alone.
SUITE, PYTHON, JETPACK_6_PYTHON = "bookworm", "3.11", "3.10"
_MIRROR = "http://deb.debian.org/debian"
_CPU = "cortex-a76"
_PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014")
_BINFMT = Path("/proc/sys/fs/binfmt_misc")
_RULE = Path("/usr/lib/binfmt.d/qemu-aarch64.conf")
NUM_EXPRESSIONS = 20
_LIMIT_S = 3600.0
# Asks every image of a list; the same program on both machines.
_ASK = """
import json, sys
from pathlib import Path
from gap_export import GroundingSession
bundle, images, form = sys.argv[1:]
with GroundingSession.open(bundle, form=form, num_threads=1) as session:
    for line in Path(images, "expressions.tsv").read_text().splitlines():
        name, expression = line.split("\\t")
        answer = session.ground(Path(images, Path(name).name), expression)
        print(json.dumps([answer.backend, answer.token_ids, answer.box]))
"""


def main(work: Path = ROOT / "build" / "aarch64", write: bool = False) -> None:
    """Prepare, run, compare, print the table; fails where anything is not as it should be."""
    need_tools()
    work = work.absolute()
    shared = work / "root" / "job"
    if not (work / "root" / "usr" / "bin" / "python3").exists():
        note("unpacking a Debian for arm64")
        unpack_debian(work / "root")
    shared.mkdir(exist_ok=True)
    note("making a bundle, images and a golden here")
    make_inputs(shared)
    note("fetching wheels of the lower bounds")
    bounds = lower_bounds()
    fetch_wheels(bounds, shared / "wheels")
    python = "/job/venv/bin/python"
    note("installing them, emulated")
    shutil.rmtree(shared / "venv", ignore_errors=True)
    inside(work, ["python3", "-m", "venv", "/job/venv"])
    (wheel,) = (shared / "bundle").glob("gap_export-*.whl")
    install = ["-m", "pip", "install", "-q", "--no-compile", "--no-index", "--only-binary=:all:"]
    files = ["--find-links", "/job/wheels", f"/job/bundle/{wheel.name}", *bounds]
    inside(work, [python, *install, *files])
    cli = [python, "-m", "gap_export"]
    note("doctor, inspect, engines")
    machine = json.loads(inside(work, [*cli, "doctor", "--json"]).stdout)
    inside(work, [*cli, "inspect", "/job/bundle"])
    engines = [python, "-m", "gap_export.engines", "build", "/job/bundle", "--target", "orin"]
    refused = inside(work, engines, exit_code=2).stderr.strip().splitlines()[-1]
    note("asking both machines")
    compared = [compare(work, python, form) for form in ("base", "ort")]
    note("check against the golden, some minutes")
    check = [*cli, "check", "/job/bundle", "--against", "/job/golden", "--json"]
    report = json.loads(inside(work, check).stdout)
    publish("aarch64", page_of(machine, bounds, compared, report, refused), write=write)


def need_tools() -> None:
    """See that what runs programs of arm64 is there, and tell the kernel of it.

    Raises:
        SystemExit: something is missing.
    """
    missing = [name for name in ("debootstrap", "qemu-aarch64-static") if not shutil.which(name)]
    if os.geteuid() != 0 or missing or not _RULE.is_file():
        raise SystemExit(
            "needs root and apt-get install debootstrap qemu-user-static; missing: "
            f"{', '.join(missing) or 'root, or ' + str(_RULE)}"
        )
    if platform.machine() == "aarch64" or (_BINFMT / "qemu-aarch64").exists():
        return
    if not (_BINFMT / "register").exists():
        do(["mount", "-t", "binfmt_misc", "none", _BINFMT])
    (_BINFMT / "register").write_bytes(_RULE.read_bytes().strip())


def unpack_debian(root: Path) -> None:
    """A Debian whose packages are unpacked and not configured, which takes emulation minutes.

    Raises:
        SystemExit: debootstrap failed.
    """
    partial = root.with_name("root.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    options = ["--arch=arm64", "--variant=minbase", "--include=python3-venv", "--foreign"]
    do(["debootstrap", *options, SUITE, partial, _MIRROR])
    for package in sorted((partial / "var" / "cache" / "apt" / "archives").glob("*.deb")):
        do(["dpkg-deb", "-x", package, partial])
    partial.rename(root)


def make_inputs(shared: Path) -> None:
    """A bundle for an Orin, with the wheel in it, a golden of PyTorch, and images."""
    bundle = shared / "bundle"
    export = ["export", DEMO_MODEL, "--keep", "0.3", "--trt", "orin", "--wheel", "--force", "-q"]
    gap_export = [sys.executable, "-m", "gap_export"]
    do([*gap_export, *export, "--out", bundle])
    samples = ["--samples", str(NUM_EXPRESSIONS), "--force", "-q"]
    do([*gap_export, "check", bundle, "--record", shared / "golden", *samples])
    images = [ROOT / "tools" / "make_images.py", "--out", shared / "images"]
    do([sys.executable, *images, "--count", str(NUM_EXPRESSIONS)])


def lower_bounds() -> list[str]:
    """The base install at its lowest, e.g. ``numpy==1.26``."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [requirement.replace(">=", "==") for requirement in project["dependencies"]]


def fetch_wheels(bounds: Sequence[str], folder: Path) -> None:
    """Wheels for aarch64 of the Python here, after pip found them for that of JetPack 6, too.

    Raises:
        SystemExit: one has no wheel.
    """
    pip = [sys.executable, "-m", "pip"]
    wheels = ["--only-binary=:all:", "--implementation=cp", "-q"]
    wheels += [f"--platform={name}_aarch64" for name in _PLATFORMS]
    asked = ["install", "--dry-run", "--ignore-installed", "--target", folder]
    do([*pip, *asked, *wheels, f"--python-version={JETPACK_6_PYTHON}", *bounds])
    do([*pip, "download", "-d", folder, *wheels, f"--python-version={PYTHON}", *bounds])


def compare(work: Path, python: str, form: str) -> dict[str, Any]:
    """The same questions here and there: how many answers are equal, and how many were asked.

    Raises:
        SystemExit: an answer differs.
    """
    shared = work / "root" / "job"
    asked = inside(work, [python, "-c", _ASK, "/job/bundle", "/job/images", form], allowed=True)
    if asked.returncode != 0:
        return {"form": form, "refused": asked.stderr.strip().splitlines()[-1]}
    command = [sys.executable, "-c", _ASK, shared / "bundle", shared / "images", form]
    here = [json.loads(line) for line in do(command).stdout.splitlines()]
    there = [json.loads(line) for line in asked.stdout.splitlines()]
    if len(here) != NUM_EXPRESSIONS or [a[1:] for a in here] != [a[1:] for a in there]:
        raise SystemExit(f"form {form}: answers differ:\n{here}\n{there}")
    return {"form": form, "n": len(here), "here": here[0][0], "there": there[0][0]}


def inside(
    work: Path, command: Sequence[object], *, exit_code: int = 0, allowed: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run a program of the Debian for arm64, with mounts that end with it.

    ONNX Runtime aborts on aarch64 where /sys does not tell it of processors.

    Args:
        work: The tool's folder.
        command: Program and arguments.
        exit_code: What it must end with.
        allowed: Whether it may end with any other.
    """
    root = work / "root"
    script = 'mount --bind /sys "$0/sys" && mount -t proc proc "$0/proc" && exec chroot "$0" "$@"'
    outer = ["unshare", "--mount", "sh", "-c", script, root, *command]
    env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "QEMU_CPU": _CPU}
    return do(outer, env=env, exit_code=None if allowed else exit_code)


def do(
    command: Sequence[object], *, env: dict[str, str] | None = None, exit_code: int | None = 0
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end.

    Raises:
        SystemExit: it ended with another exit code; None takes any.
    """
    done = subprocess.run(
        list(map(str, command)),
        env=env,
        capture_output=True,
        text=True,
        timeout=_LIMIT_S,
        check=False,
    )
    if exit_code is not None and done.returncode != exit_code:
        told = f"{' '.join(map(str, command))} ended with exit code {done.returncode}"
        raise SystemExit(f"{told}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return done


def page_of(
    machine: dict[str, Any],
    bounds: Sequence[str],
    compared: Sequence[dict[str, Any]],
    report: dict[str, Any],
    refused: str,
) -> str:
    """What ran and how it agreed, as Markdown."""
    lines = [
        f"`tools/test_aarch64.py`: {machine['platform']['machine']} by emulation (qemu-user, "
        f"{_CPU}), Debian {SUITE}, Python {machine['python']['version']}; {', '.join(bounds)}. pip "
        f"finds wheels of the same for Python {JETPACK_6_PYTHON}.",
        "",
        "| what | result |",
        "|---|---|",
        "| `doctor`, `inspect` | run |",
    ]
    for found in compared:
        if "refused" in found:
            told = f"refused: {found['refused']}"
        else:
            told = (
                f"{found['n']} of {found['n']} answers the same, token for token: {found['there']} "
                f"there, {found['here']} on {platform.machine()}"
            )
        lines.append(f"| `ground`, form {found['form']} | {told} |")
    for backend in report["backends"]:
        for level in backend["levels"]:
            title = f"`check --against GOLDEN`, {backend['name'] or backend['backend']}"
            told = level["reason"] or figures_of(level)
            lines.append(
                f"| {title}, {level['level']} | {level['status'].replace('_', ' ')}: {told} |"
            )
    lines.append(f"| `python -m gap_export.engines build` | {refused} |")
    return "\n".join(lines)


def figures_of(level: dict[str, Any]) -> str:
    """What sums a level up; of tensors the largest difference to what is allowed."""
    if level["level"] == "tensor":
        rows = [row for row in level["rows"] if row["tensor"].startswith("logits")]
        worst = max(rows, key=lambda row: row["max_abs_diff"])
        return (
            f"logits differ by {worst['max_abs_diff']:.1e} at most, of {worst['atol']:.0e} + "
            f"{worst['rtol']:.0e} of the value allowed"
        )
    figures = level["figures"]
    names = ("questions", "equal", "ties", "calls", "readers")
    return ", ".join(f"{figures[name]} {name}" for name in names if name in figures)


if __name__ == "__main__":
    typer.run(main)
