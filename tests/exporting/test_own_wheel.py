"""The running gap-export as a wheel file."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

from gap_export import extras
from gap_export.errors import UsageError
from gap_export.exporting import ExportOptions, own_wheel
from gap_export.exporting.own_wheel import wheel_name, write_own_wheel
from gap_export.extras import pip_install
from gap_export.spec.requests import EnginesRequest
from gap_export.version import SOURCE


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return write_own_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """Python of an environment into which pip put the wheel, without any index."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    run(
        sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index",
        wheel,
    )  # fmt: skip
    return python


def run(*command: object) -> str:
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_installed(python: Path, code: str) -> str:
    """With what pip brought alone in front, this environment's packages behind it."""
    here = str(Path(pytest.__file__).parent.parent)
    path = f"import sys; sys.path.append({here!r})\n"
    return run(python, "-I", "-c", path + code)


def test_pip_installs_it_without_an_index_and_it_runs(installed):
    code = "from gap_export.cli import main; import gap_export; print(gap_export.__file__); "
    answer = run_installed(installed, code + "main(['models', '--json'])")
    file, _, models = answer.partition("\n")
    assert Path(file).is_relative_to(installed.parent.parent)
    weights = {model["name"]: model["weights"] for model in json.loads(models)["models"]}
    assert weights["refshapes-llava"] == "bundled"


def test_an_installed_one_packs_itself_to_the_same_bytes(wheel, installed, tmp_path):
    code = (
        "from pathlib import Path; from gap_export.exporting.own_wheel import write_own_wheel; "
        f"write_own_wheel(Path({str(tmp_path)!r}))"
    )
    run_installed(installed, code)
    assert (tmp_path / wheel_name()).read_bytes() == wheel.read_bytes()


def test_a_file_that_was_changed_since_it_was_installed_is_not_packed(installed, tmp_path):
    (changed,) = installed.parent.parent.glob("lib/*/site-packages/gap_export/spec/places.py")
    before = changed.read_bytes()
    code = (
        "from pathlib import Path; from gap_export.errors import UsageError; "
        "from gap_export.exporting.own_wheel import write_own_wheel\n"
        f"try: write_own_wheel(Path({str(tmp_path)!r}))\n"
        "except UsageError as err: print(err)"
    )
    try:
        changed.write_bytes(before + b"\n")
        said = run_installed(installed, code)
    finally:
        changed.write_bytes(before)
    assert "is not what was installed" in said and "places.py" in said
    assert list(tmp_path.iterdir()) == []


def test_every_member_is_listed_with_its_hash(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (record,) = [name for name in names if name.endswith("/RECORD")]
        rows = [line.rsplit(",", 2) for line in archive.read(record).decode().splitlines()]
    assert sorted(row[0] for row in rows) == sorted(names)
    assert [row for row in rows if not row[1].startswith("sha256=")] == [[record, "", ""]]


def test_what_is_not_installed_cannot_be_packed(monkeypatch, tmp_path):
    def nothing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(own_wheel, "distribution", nothing)
    with pytest.raises(UsageError, match="none is"):
        write_own_wheel(tmp_path)


def test_another_version_than_runs_is_not_packed(monkeypatch, tmp_path):
    monkeypatch.setattr(own_wheel, "__version__", "9.9")
    with pytest.raises(UsageError, match=r"9\.9 runs"):
        write_own_wheel(tmp_path)


@pytest.mark.parametrize("targets", [(), ("rtx:sm89",)], ids=str)
def test_a_bundle_that_no_device_builds_from_takes_no_wheel(targets):
    options = ExportOptions(
        model="refshapes-llava", engines=EnginesRequest(targets=targets, wheel=True)
    )
    with pytest.raises(UsageError, match="--wheel is for bundles whose engines another machine"):
        options.target_choices()


@pytest.mark.parametrize(
    ("noted", "line"),
    [
        ({"url": "file:///a%20b", "dir_info": {"editable": True}}, "pip install '/a b[export]'"),
        ({"url": "file:///w.whl", "archive_info": {}}, "pip install '/w.whl[export]'"),
        (
            {"url": "https://host/x", "vcs_info": {"vcs": "git", "commit_id": "abc"}},
            "pip install 'gap-export[export] @ git+https://host/x@abc'",
        ),
        ({"url": "https://host/w.whl"}, "pip install 'gap-export[export] @ https://host/w.whl'"),
        (None, f"pip install '{SOURCE}[export]'"),
    ],
    ids=["checkout", "wheel", "git", "url", "unknown"],
)
def test_messages_say_to_install_from_where_this_one_is_from(monkeypatch, noted, line):
    class Noted:
        def read_text(self, name):
            assert name == "direct_url.json"
            return None if noted is None else json.dumps(noted)

    monkeypatch.setattr(extras, "distribution", lambda name: Noted())
    assert pip_install("export") == line


def test_this_one_is_from_somewhere():
    assert SOURCE not in pip_install() or not distribution("gap-export").read_text(
        "direct_url.json"
    )
