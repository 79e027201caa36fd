"""The built wheel, in an environment that has the base install and nothing else."""

from __future__ import annotations

import json
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable
from functools import partial
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from PIL import Image

from gap_export.evaluation.refshapes import generate_scene
from gap_export.exporting.own_wheel import write_own_wheel
from tests.programs import run_program

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    out = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT])
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def linked_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bare environment with the wheel; its dependencies are links to this environment's.

    That needs no network, and leaves out all that the wheel's own metadata does not ask for.
    """
    python = make_venv(tmp_path_factory.mktemp("linked"))
    site = site_packages(python)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (built,) = distributions(path=[str(site)])
    for name in needed_distributions(requirements_of(built)):
        link_distribution(name, site)
    return python


@pytest.fixture(scope="module")
def installed_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bare environment into which pip installed the wheel, from the network or its cache."""
    python = make_venv(tmp_path_factory.mktemp("installed"))
    run([sys.executable, "-m", "pip", "--python", python, "install", "-q", wheel])
    return python


def make_venv(folder: Path) -> Path:
    venv.create(folder, with_pip=False, symlinks=True)
    return folder / "bin" / "python"


def run_python(python: Path, *args: object) -> str:
    """Run it isolated: neither this folder nor PYTHONPATH may lend it a module."""
    return run([python, "-I", *args])


def run(command: list[object]) -> str:
    answer = run_program(command, seconds=600)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def site_packages(python: Path) -> Path:
    return Path(
        run_python(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    )


def requirements_of(dist: Distribution) -> list[str]:
    """Names that a distribution needs without any extra and on this Python."""
    wanted = map(Requirement, dist.requires or [])
    return [r.name for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]


def needed_distributions(roots: list[str]) -> set[str]:
    """Those, and what they need in turn."""
    found: set[str] = set()
    todo = list(roots)
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += requirements_of(distribution(name))
    return found


def link_distribution(name: str, site: Path) -> None:
    """Link each top-level file and folder of an installed distribution."""
    files = distribution(name).files or []
    for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
        target = site / top
        if not target.exists():
            target.symlink_to(Path(str(distribution(name).locate_file(top))).resolve())


def test_the_wheel_holds_the_package_the_models_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"gap_export", "optimum"}
    page = [f"serving/page/{name}" for name in ("index.html", "page.css", "page.js")]
    for wanted in ("cli/ground.py", "py.typed", "_models/refshapes-llava/recipe.yaml", *page):
        assert f"gap_export/{wanted}" in names
    assert [n for n in names if n.endswith((".pyc", ".part"))] == []
    # One file in Optimum's namespace, and no __init__.py, which would hide Optimum itself.
    assert [n for n in names if n.startswith("optimum/")] == [
        "optimum/commands/register/gap_export.py"
    ]
    # Of other models there are recipes and no weights.
    models = [n for n in names if n.startswith("gap_export/_models/")]
    demos = {n.split("/")[2] for n in models if n.endswith("/model.safetensors")}
    assert demos == {
        "refshapes-llava",
        "refshapes-shikra",
        "refshapes-minigpt-v2",
        "refshapes-internvl",
        "refshapes-qwen3-vl",
    }
    others = [n for n in models if n.split("/")[2] not in demos]
    assert len(others) == len(list((ROOT / "models").glob("*/recipe.yaml"))) - len(demos)
    assert all(n.endswith("/recipe.yaml") for n in others)
    (license_file,) = [n for n in names if n.endswith("licenses/LICENSE")]
    assert license_file.startswith("gap_export-")


def test_the_wheel_of_export_is_what_the_build_backend_makes(wheel, tmp_path):
    own = write_own_wheel(tmp_path)
    assert own.name == wheel.name
    with zipfile.ZipFile(wheel) as built, zipfile.ZipFile(own) as packed:
        assert set(packed.namelist()) == set(built.namelist())
        # Of the metadata a checkout has what was there when it was installed.
        left_out = ("/RECORD", "/METADATA")
        files = [name for name in built.namelist() if not name.endswith(left_out)]
        assert [name for name in files if built.read(name) != packed.read(name)] == []


def test_optimum_finds_the_command_in_the_wheel(wheel, tmp_path):
    pytest.importorskip(
        "optimum.commands.optimum_cli", reason="optimum is not installed: pip install optimum"
    )
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    # Without site (-S) the checkout, which an editable install puts on the path, is not there.
    path = [str(tmp_path), sysconfig.get_path("purelib")]
    code = f"import sys; sys.path += {path}; sys.argv = ['optimum-cli', 'export', 'gap', '-h']\n"
    code += "from optimum.commands.optimum_cli import main\n"
    code += "try: main()\nfinally: import gap_export; print(gap_export.__file__)"
    answer = run([sys.executable, "-I", "-S", "-c", code])
    assert answer.startswith("Usage: optimum-cli export gap")
    assert Path(answer.splitlines()[-1]).is_relative_to(tmp_path)


@pytest.mark.parametrize(
    "environment",
    ["linked_python", pytest.param("installed_python", marks=pytest.mark.full)],
)
def test_the_wheel_grounds_from_a_bare_environment(
    environment: str, request: pytest.FixtureRequest, demo_bundle: Path, tmp_path: Path
):
    python = request.getfixturevalue(environment)
    for missing in ("torch", "transformers", "onnx", "onnx_ir", "pytest"):
        find = f"import importlib.util as u; print(u.find_spec({missing!r}))"
        assert run_python(python, "-c", find) == "None\n"
    where = run_python(python, "-c", "import gap_export; print(gap_export.__file__)")
    assert Path(where.strip()).is_relative_to(site_packages(python))

    program: Callable[..., str] = partial(run_python, python, "-m", "gap_export")
    models = {model["name"]: model for model in json.loads(program("models", "--json"))["models"]}
    assert {"refshapes-llava", "llava-1.5-7b", "minigpt-v2"} <= set(models)
    assert models["refshapes-llava"]["weights"] == "bundled"

    scene = generate_scene(split="heldout", seed=0, index=0)
    picture = tmp_path / "picture.png"
    Image.fromarray(scene.image).save(picture)
    drawing = tmp_path / "found.png"
    answer = json.loads(
        program("ground", demo_bundle, picture, scene.expressions[0].text, "--save", drawing)
    )
    assert len(answer["keep_indices"]) == 43
    assert answer["image_size"] == [96, 96]
    x1, y1, x2, y2 = answer["box"]
    assert 0 <= x1 < x2 <= 96
    assert 0 <= y1 < y2 <= 96
    with Image.open(drawing) as saved:
        assert min(saved.size) >= 96
    assert "GapRemap" in program("inspect", demo_bundle)
    assert "missing" in program("doctor")
