"""README.md and docs/: their commands and Python run, their links and images are there."""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib
import torch
from PIL import Image

from gap_export.evaluation.refshapes import generate_scene
from gap_export.pruning import VisionState, find_pruner, presets
from tests.contract.snippets import PAGES, ROOT, Block, blocks_of, run_block
from tests.contract.typed_commands import unknown_flags
from tests.programs import run_program

DOCS = ROOT / "docs"
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def runs(page: Path, *, slow: bool) -> list[Block]:
    """What is run of a page: slow blocks come with the quick ones that they build on."""
    blocks = [b for b in blocks_of(page) if b.language in {"sh", "python"}]
    found = [block for block in blocks if not (block.left_out or block.source)]
    if slow and not any(block.is_slow for block in found):
        return []
    return [block for block in found if slow or not block.is_slow]


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """Makes the folder that pages speak of, but for what a page makes itself; it is entered."""
    monkeypatch.chdir(tmp_path)
    # Otherwise reports of a job's own checks would be added to its summary.
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)

    def make(text: str, request: pytest.FixtureRequest) -> Path:
        (tmp_path / "docs").symlink_to(DOCS)
        scene = generate_scene(split="heldout", seed=0, index=0)
        target = scene.objects[scene.expressions[0].target]
        Image.fromarray(scene.image).save("image.png")
        Path("my-images").mkdir()
        shutil.copy("image.png", "my-images")
        question = {
            "image": "image.png",
            "expression": scene.expressions[0].text,
            "box": list(target.box),
        }
        Path("my-images/questions.jsonl").write_text(f"{json.dumps(question)}\n")
        if "bundle" in text and not re.search(r"--out bundle(?![\w-])", text):
            shutil.copytree(request.getfixturevalue("demo_bundle"), "bundle")
        if "--baseline unpruned" in text:
            shutil.copytree(request.getfixturevalue("demo_whole_bundle"), "unpruned")
        if "llava-onnx" in text:
            from tests.patching.exports import Recipe, shared_export

            checkpoint = request.getfixturevalue("tiny_checkpoint")
            shared = request.getfixturevalue("shared")
            shutil.copytree(shared_export(shared, checkpoint, Recipe()), "llava-onnx")
        return tmp_path

    return make


@pytest.mark.parametrize("page", [p for p in PAGES if runs(p, slow=False)], ids=name_of)
def test_commands_and_python_of_a_page_run(page, workspace, request):
    blocks = runs(page, slow=False)
    folder = workspace("".join(block.text for block in blocks), request)
    for block in blocks:
        run_block(block, folder)


@pytest.mark.full
@pytest.mark.parametrize("page", [p for p in PAGES if runs(p, slow=True)], ids=name_of)
def test_slow_commands_of_a_page_run(page, workspace, request):
    blocks = runs(page, slow=True)
    folder = workspace("".join(block.text for block in blocks), request)
    for block in blocks:
        run_block(block, folder)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_is_not_run_is_a_command_all_the_same(page):
    left_out = [block for block in blocks_of(page) if block.left_out]
    for block in left_out:
        for line in block.commands() if block.language == "sh" else ():
            words = shlex.split(line, comments=True)
            if words[0] == "gap-export":
                assert unknown_flags(line) == set(), line
            if words[0].startswith("tools/"):
                assert (ROOT / words[0]).stat().st_mode & 0o111, line
        if block.language == "python":
            assert ast.parse(block.text).body


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_parts_of_a_file_are_in_it(page):
    for block in blocks_of(page):
        if block.source:
            assert block.text in (ROOT / block.source).read_text(), block.source


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_tools_and_files_that_a_page_names_exist(page):
    named = re.findall(r"`((?:tools|tests|models|gap_export)/[\w./-]+)", page.read_text())
    missing = [name for name in named if not (ROOT / name.rstrip("/.")).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_to_files_and_images_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    files = [link.partition("#")[0] for link in LINK.findall(text) if "://" not in link]
    assert [file for file in files if file and not (page.parent / file).exists()] == []


def test_every_page_is_in_the_navigation_once():
    def pages(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        values = entry.values() if isinstance(entry, dict) else entry
        return [page for value in values for page in pages(value)]

    nav = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"]
    assert sorted(pages(nav)) == sorted(str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md"))


def test_the_site_builds_without_warnings_and_asks_no_other_server(tmp_path):
    program = Path(sys.executable).with_name("zensical")
    if not program.exists():
        pytest.skip("zensical is not installed: it comes with the extra docs")
    # Not the repository's own out/.
    shutil.copytree(DOCS, tmp_path / "docs")
    shutil.copy(ROOT / "zensical.toml", tmp_path)
    done = run_program([program, "build", "--strict"], cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    loaded = re.compile(r"""<(?:script|link|img|iframe)[^>]+(?:src|href)=["']?(?:https?:)?//""")
    pages = list((tmp_path / "out/docs").rglob("*.html"))
    assert len(pages) > 20
    assert [page.name for page in pages if loaded.search(page.read_text())] == []


def test_the_package_of_the_own_pruner_installs_as_printed_and_is_found(tmp_path, monkeypatch):
    blocks = blocks_of(DOCS / "add-a-pruner.md")
    (code,) = [b.text for b in blocks if b.text.startswith('"""my_pruners.py"""')]
    (project,) = [b.text for b in blocks if b.language == "toml"]
    (tmp_path / "my_pruners.py").write_text(code)
    (tmp_path / "pyproject.toml").write_text(project)
    site = tmp_path / "site"
    # --no-build-isolation: hatchling is here, and no index is asked for it.
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(site), str(tmp_path)], check=True, timeout=300)
    monkeypatch.syspath_prepend(site)
    presets.OTHER_PRESETS.forget()
    try:
        features = torch.tensor([[[1.0, 0.0], [3.0, 0.1], [0.0, 1.0], [2.0, 0.0]]])
        scores = find_pruner("unusual").scores(VisionState(patch_features=features))
    finally:
        presets.OTHER_PRESETS.forget()
        sys.modules.pop("my_pruners", None)
    assert int(scores.argmax()) == 2
