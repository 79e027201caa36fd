"""``optimum-cli export gap``."""

from __future__ import annotations

import os
import shutil
import sys
import typing
from pathlib import Path
from typing import Any

import pytest

from gap_export import exporting
from gap_export.bundle import open_bundle
from gap_export.cli._app import build_command
from gap_export.cli.optimum_command import build_optimum_command, run_export
from gap_export.errors import ParityError
from gap_export.exporting import ExportOptions
from gap_export.extras import missing_modules
from gap_export.spec.requests import EnginesRequest, PruningRequest
from tests.programs import Finished, run_program

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = ROOT / "gap_export" / "optimum_plugin"
STUB = Path("optimum/commands/register/gap_export.py")
RUN_OPTIMUM = "from optimum.commands.optimum_cli import main; main()"

needs_optimum = pytest.mark.skipif(
    bool(missing_modules("optimum")),
    reason='optimum is not installed: pip install -e ".[optimum]"',
)


@pytest.fixture
def run_gap(own_log, capsys):
    """Runs what is handed over, in this process."""

    def run(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run_export([str(arg) for arg in argv])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def run_optimum(own_log, capsys, monkeypatch):
    """Runs all of ``optimum-cli export gap``, in this process."""
    # optimum's own parser must hand words over as they are, so it is not left out here.
    cli = pytest.importorskip("optimum.commands.optimum_cli", reason="optimum is not installed")

    def run(*argv: object) -> tuple[Any, str, str]:
        # What it registers is read once in a process.
        sys.modules.pop("optimum.commands.register.gap_export", None)
        monkeypatch.setattr(sys, "argv", ["optimum-cli", "export", "gap", *map(str, argv)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code, *capsys.readouterr()

    return run


def run_process(*argv: str, path: Path | None = None) -> Finished:
    """A fresh optimum-cli, which prints the modules that it has imported to stderr."""
    report = "import sys; print('\\n'.join(sys.modules), file=sys.stderr)"
    code = f"import atexit, sys\natexit.register(lambda: exec({report!r}))\n"
    code += f"sys.argv = {['optimum-cli', *argv]}\n{RUN_OPTIMUM}"
    environment = {**os.environ, "PYTHONPATH": str(path)} if path else None
    return run_program([sys.executable, "-c", code], env=environment)


def describe(command: Any) -> list[dict[str, Any]]:
    """All that typer knows of a command's parameters, but for objects made for each command."""
    hints = typing.get_type_hints(command.callback)
    made_anew = {"type_descriptor", "callback", "_runtime_param"}
    return [
        {key: value for key, value in vars(parameter).items() if key not in made_anew}
        | {"hint": hints[parameter.name]}
        for parameter in command.params
        if parameter.name != "help"
    ]


def test_every_flag_of_export_is_there_and_is_the_same():
    model, *ours = describe(build_command().commands["export"])
    its_model, *its = describe(build_optimum_command())
    assert len(ours) > 20
    assert its == ours
    assert [one["opts"] for one in (model, its_model)] == [["model"], ["--model", "-m"]]
    assert {key: its_model[key] for key in ("name", "help", "metavar", "hint", "required")} == {
        key: model[key] for key in ("name", "help", "metavar", "hint", "required")
    }


@pytest.mark.parametrize("runner", ["run_gap", "run_optimum"])
def test_flags_reach_the_export(request, seen_options, tmp_path, runner):
    run = request.getfixturevalue(runner)
    flags = "--keep 0.3 --pruner cls --positions compact --checkpoint base=llm --checkpoint weights"
    code, out, err = run("--model", "llava", *flags.split(), "--trt", "--out", tmp_path)
    assert (code, out, err) == (2, "", "exporting llava ...\nerror: far enough\n")
    run("-m", "llava", "--trt", "rtx:sm89", "--force", "-q")
    assert seen_options == [
        ExportOptions(
            model="llava",
            pruning=PruningRequest(keep_ratio=0.3, pruner="cls", positions="compact"),
            engines=EnginesRequest(targets=("auto",)),
            checkpoint={"base": Path("llm"), "main": Path("weights")},
            out=tmp_path,
        ),
        ExportOptions(model="llava", engines=EnginesRequest(targets=("rtx:sm89",)), force=True),
    ]


def test_wrong_usage_is_said_as_export_says_it(run_optimum):
    code, out, err = run_optimum("--model", "refshape-lava")
    assert (code, out) == (2, "")
    assert "error: no model of that name: refshape-lava" in err and "Traceback" not in err


def test_exit_codes_are_those_of_export(run_optimum, monkeypatch):
    def fail(options, *, progress, warn):
        raise ParityError("it differs")

    monkeypatch.setattr(exporting, "export_model", fail)
    assert run_optimum("--model", "llava", "-q") == (3, "", "error: it differs\n")


def test_help_is_gap_exports_own(run_optimum):
    code, out, err = run_optimum("-h")
    assert (code, err) == (0, "")
    assert out.startswith("Usage: optimum-cli export gap [OPTIONS]")
    assert "--model MODEL" in out and "--max-new-tokens" in out


@pytest.mark.full  # an export like any other; what is optimum's part of it is tested above
def test_optimum_exports_a_bundle(run_optimum, tiny_checkpoint, tmp_path):
    out = tmp_path / "bundle"
    code, printed, _ = run_optimum("--model", tiny_checkpoint, "--keep", "0.25", "--out", out)
    assert (code, printed) == (0, f"{out}\n")
    assert open_bundle(out, verify="full").manifest.pruning.num_kept_tokens == 4


@needs_optimum
def test_optimums_start_imports_nothing_of_ours():
    answer = run_process("export", "--help")
    assert answer.returncode == 0
    assert "Export a grounding vision-language model" in answer.stdout
    loaded = answer.stderr.split()
    assert "optimum.commands.register.gap_export" in loaded
    ours = {name for name in loaded if name.partition(".")[0] in {"gap_export", "torch", "typer"}}
    assert ours == set()


@needs_optimum
def test_a_second_install_on_the_path_does_not_end_optimum(tmp_path):
    copy = tmp_path / STUB
    copy.parent.mkdir(parents=True)
    shutil.copy(PLUGIN / STUB, copy)
    answer = run_process("export", "gap", "-h", path=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith("Usage: optimum-cli export gap")


def test_the_folder_of_the_stub_is_not_taken_for_optimum(monkeypatch):
    names = [name for name in sys.modules if name.partition(".")[0] == "optimum"]
    for name in names:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(ROOT), str(PLUGIN)])
    assert missing_modules("optimum") == ["optimum.commands.optimum_cli"]
    for name in [name for name in sys.modules if name.partition(".")[0] == "optimum"]:
        monkeypatch.delitem(sys.modules, name)
