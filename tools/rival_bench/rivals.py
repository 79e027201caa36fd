"""Who is measured beside us: how each is made ready, and why one is skipped."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# The longest, which builds llama.cpp, takes half an hour on two busy cores.
_PREPARING_SECONDS = 7200.0
_HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, kw_only=True)
class RivalSpec:
    """One rival.

    Attributes:
        name: Of its folder, and in the table.
        script: Beside this file, with its arguments.
        packages: What its environment holds; empty: that of gap-export.
        convert: Commands that make its model, in its folder; ``{shape}`` and ``{decoder}``, among
            others, are filled in.
        made: File that is there when its model is.
        least_cosine: Of its logits and torch's in float32: INT4 rounds weights, and random ones
            round worse than trained ones. Another model's logits have about 0.
    """

    name: str
    script: tuple[str, ...]
    packages: tuple[str, ...] = ()
    convert: tuple[str, ...] = ()
    made: str | None = None
    least_cosine: float = 0.7


RIVALS = (
    RivalSpec(name="torch-float32", script=("run_torch.py", "float32"), least_cosine=0.9999),
    RivalSpec(name="torch-bfloat16", script=("run_torch.py", "bfloat16"), least_cosine=0.99),
    RivalSpec(
        name="onnxruntime-genai",
        script=("run_genai.py",),
        packages=("onnxruntime-genai==0.18.*", "onnxruntime==1.32.*"),
        convert=(
            "{python} -m onnxruntime_genai.models.builder -i {decoder} -o model -p int4 -e cpu "
            "-c cache",
        ),
        made="model/model.onnx",
    ),
    RivalSpec(
        name="openvino-genai",
        script=("run_openvino.py",),
        packages=(
            *(
                "openvino==2026.4.1",
                "openvino-genai==2026.4.1.*",
                "openvino-tokenizers==2026.4.1.*",
            ),
            *("openvino-telemetry", "optimum-intel==2.2.*", "optimum==2.3.*", "nncf==3.4.*"),
            # What those two need, but for torch, which is that of gap-export.
            *("transformers>=5.5,<5.6", "huggingface-hub<1.22", "tabulate", "pydot", "scipy"),
            *("scikit-learn", "joblib", "threadpoolctl", "psutil", "narwhals", "ninja"),
            *("cloudpickle", "pymoo", "rich", "natsort", "jsonschema"),
        ),
        convert=(
            "{bin}/optimum-cli export openvino --model {shape} --task image-text-to-text "
            "--weight-format int4 model",
        ),
        made="model/openvino_language_model.xml",
    ),
    RivalSpec(
        name="llama.cpp",
        script=("run_llama.py",),
        packages=("llama-cpp-python==0.3.*", "gguf", "typing-extensions", "diskcache", "jinja2"),
        convert=("{python} {here}/write_gguf.py {decoder} model.gguf",),
        made="model.gguf",
    ),
)


def find_rival(name: str) -> RivalSpec:
    """The rival of that name.

    Raises:
        SystemExit: there is none.
    """
    for rival in RIVALS:
        if rival.name == name:
            return rival
    sys.exit(f"no rival {name}; there are {', '.join(rival.name for rival in RIVALS)}")


def python_of(rival: RivalSpec, work: Path) -> Path:
    """The interpreter that runs it."""
    return work / rival.name / "venv/bin/python" if rival.packages else Path(sys.executable)


def why_missing(rival: RivalSpec, work: Path) -> str | None:
    """Why it cannot be run; None where it can."""
    if not python_of(rival, work).is_file():
        return "no environment"
    if rival.made is not None and not (work / rival.name / rival.made).is_file():
        return "no model: see prepare.log in its folder"
    return None


def prepare(rival: RivalSpec, work: Path, shape: Path, decoder: Path) -> None:
    """Make its environment and its model, as far as they are not there.

    Raises:
        subprocess.CalledProcessError: a step failed; prepare.log in its folder says how.
    """
    folder = work / rival.name
    folder.mkdir(parents=True, exist_ok=True)
    python = python_of(rival, work)
    with (folder / "prepare.log").open("ab") as log:
        if not python.is_file():
            _run([sys.executable, "-m", "venv", folder / "venv"], folder, log)
            # Two at a time, whatever a source package would like.
            limits = {"CMAKE_BUILD_PARALLEL_LEVEL": "2", "MAKEFLAGS": "-j2"}
            pip = [python, "-m", "pip", "install", "--no-input", "--no-deps", *rival.packages]
            _run(pip, folder, log, limits)
            ours = Path(sys.executable).parent.parent
            site = next((folder / "venv/lib").glob("python*/site-packages"))
            # Torch and what else it has not got come from here.
            shared = next((ours / "lib").glob("python*/site-packages"))
            (site / "zz_gap_export.pth").write_text(f"{shared}\n")
        if rival.made is not None and not (folder / rival.made).is_file():
            names = {"python": python, "bin": python.parent, "here": _HERE}
            names |= {"shape": shape.absolute(), "decoder": decoder.absolute()}
            for command in rival.convert:
                _run([word.format(**names) for word in command.split()], folder, log)


def _run(
    command: Sequence[str | Path], folder: Path, log: object, more: dict[str, str] | None = None
) -> None:
    subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **(more or {})},
        stdout=log,  # type: ignore[call-overload]
        stderr=log,
        check=True,
        timeout=_PREPARING_SECONDS,
    )


def script_of(rival: RivalSpec) -> tuple[str, ...]:
    """Its worker's file and arguments."""
    name, *arguments = rival.script
    return (str(_HERE / name), *arguments)
