"""``gap-export doctor``: what this machine can do, what is missing, and how to get it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from gap_export.cli._options import JsonOption, QuietOption, VerboseOption, terminal_of
from gap_export.cli._terminal import format_size
from gap_export.extras import pip_install

_HOW_TO_GET = {
    # Not the extra: the two packages overwrite each other's files.
    "gpu": "pip uninstall -y onnxruntime && pip install onnxruntime-gpu",
}
# Extras that only people who work on gap-export itself want, or that bring the others together.
_NOT_SHOWN = ("all", "dev", "docs", "full")


def doctor(
    ctx: typer.Context,
    as_json: JsonOption = False,
    report: Annotated[
        bool,
        typer.Option(
            "--report",
            help="JSON to send to others: without names, paths, addresses and serial numbers.",
        ),
    ] = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Say what this machine can do, and what is missing."""
    terminal = terminal_of(ctx)
    terminal.begin("looking at this machine")
    from gap_export.cli._machine import describe_machine

    machine = describe_machine()
    machine["packages"] = {k: v for k, v in machine["packages"].items() if k not in _NOT_SHOWN}
    machine["problems"] = _problems(machine)
    if report:
        from gap_export.cli._redact import redact

        terminal.json(redact(machine))
    elif as_json:
        terminal.json(machine)
    else:
        lines = [*_describe_platform(machine), "", *_describe_tensorrt(machine["tensorrt"])]
        lines += [_describe_openvino(machine["openvino"]), ""]
        terminal.result("\n".join([*lines, *_describe_packages(machine)]))
        for problem in machine["problems"]:
            terminal.warning(problem)


def _problems(machine: dict[str, Any]) -> list[str]:
    packages = machine["packages"]
    problems = [
        f"{name} is missing, nothing runs without it: {pip_install()}"
        for name, found in packages["base"].items()
        if found is None and not (name == "onnxruntime" and _gpu_runtime(machine))
    ]
    on_cpu = packages["base"].get("onnxruntime")
    if on_cpu and _gpu_runtime(machine):
        problems.append(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files: "
            "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install the one you want"
        )
    if not machine["execution_providers"]:
        problems.append(
            "onnxruntime does not import, no bundle can run: pip install --force-reinstall "
            "onnxruntime"
        )
    return problems


def _gpu_runtime(machine: dict[str, Any]) -> str | None:
    """Version of onnxruntime-gpu, which takes the place of onnxruntime."""
    found: str | None = machine["packages"].get("gpu", {}).get("onnxruntime-gpu")
    return found


def _describe_platform(machine: dict[str, Any]) -> list[str]:
    facts = machine["platform"]
    cuda = machine["torch_cuda"]
    lines = [
        f"python     {machine['python']['version']} ({machine['python']['executable']})",
        f"platform   {facts['system']}, {facts['cpus']} CPUs",
        f"memory     {_size(facts['memory_bytes'])}, {_size(facts['memory_free_bytes'])} free",
        f"swap       {_size(facts['swap_bytes'])}",
        f"disk here  {_size(facts['disk_free_bytes'])} free",
    ]
    if facts["board"]:
        lines.append(f"board      {facts['board']}")
    if facts["l4t"]:
        lines.append(f"L4T        {facts['l4t']}")
    lines += [f"GPU        {', '.join(gpu.values())}" for gpu in machine["gpus"]]
    if not machine["gpus"]:
        lines.append("GPU        none found (nvidia-smi is missing or has no driver)")
    lines.append(f"runs on    {', '.join(machine['execution_providers']) or 'nothing'}")
    if "CPUExecutionProvider" in machine["execution_providers"]:
        lines.append(f"on a CPU   {_on_a_cpu(machine)}")
    if cuda is not None:
        built = f"built for CUDA {cuda['built_for']}" if cuda["built_for"] else "a CPU build"
        lines.append(f"torch CUDA {'available' if cuda['available'] else 'not available'}, {built}")
    return lines


def _on_a_cpu(machine: dict[str, Any]) -> str:
    """Which bundles run well."""
    best = "bundles made with --for cpu run best, with --dtype int4 fastest"
    has_gpu = "CUDAExecutionProvider" in machine["execution_providers"]
    return best if has_gpu else f"{best}; float16 ones take twice as long a token"


def _describe_tensorrt(found: dict[str, Any]) -> list[str]:
    versions = [f"{name} {text or 'missing'}" for name, text in found["libraries"].items()]
    lines = [f"TensorRT   {', '.join(versions)}"]
    for name, target in found["targets"].items():
        verdict = "can be built here" if target["builds_here"] else f"needs {target['needs']}"
        lines.append(f"  {name}: {target['summary']}: {verdict}")
    return lines


def _describe_openvino(found: dict[str, Any]) -> str:
    devices = (f"{name} ({title})" for name, title in found["devices"].items())
    return f"OpenVINO   {found['version'] or 'missing'}{': ' if found['devices'] else ''}" + (
        ", ".join(devices)
    )


def _describe_packages(machine: dict[str, Any]) -> list[str]:
    lines = []
    for group, packages in machine["packages"].items():
        missing = [name for name, found in packages.items() if found is None]
        how = _HOW_TO_GET.get(group) or pip_install(*([] if group == "base" else [group]))
        verdict = f"missing: {how}" if missing else "installed"
        lines.append(f"{group}: {verdict}")
        lines += [f"  {name} {found or 'missing'}" for name, found in packages.items()]
    return lines


def _size(size: int | None) -> str:
    return "unknown" if size is None else format_size(size)
