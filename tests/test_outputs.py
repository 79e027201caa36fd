"""No output replaces what is read or what is not ours, by whatever name it is reached."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from PIL import Image

from gap_export.bundle.files import HASH_NAME
from gap_export.bundle.writing import check_output
from gap_export.cli._outputs import output_rule
from gap_export.errors import OutputError
from gap_export.outputs import OutputRule
from gap_export.parity.golden.format import GOLDEN_NAME
from gap_export.parity.golden.format import HASH_NAME as GOLDEN_HASH_NAME
from gap_export.parity.golden.recording import check_golden_place
from gap_export.runtime.drawing import save_drawing
from gap_export.spec.manifest import MANIFEST_NAME
from tests.report.made_up_checks import check_report
from tests.report.made_up_evaluations import evaluation_report

WHAT = "the JSON report"
NOT_OURS = {
    "a.json": b'{"images": [], "annotations": []}',
    "b.json": b'{"about": {"schema": "gap-export-check"}}',
    "c.jsonl": b'{"format": "gap-export-records", "format_version": 1}\n',
    "d.xml": b'<?xml version="1.0"?>\n<testsuites name="pytest"/>',
    "e.html": b"<!DOCTYPE html>\n<title>my notes on gap-export check: fine</title>",
    "f.md": b"# gap-export check: notes of mine\n\nThey quote no report.\n",
    "g.md": b"# gap-export check: passed\n<!-- written by gap-export -->\nand notes of mine",
    "h.png": b"\x89PNG\r\n\x1a\n" + bytes(5000),
    "i.txt": b"x",
}


def test_every_report_and_drawing_may_be_replaced_by_the_next(tmp_path: Path) -> None:
    from gap_export.report import write_reports

    for _ in range(2):
        write_reports(
            check_report(),
            json=tmp_path / "c.json", junit=tmp_path / "c.xml",
            markdown=tmp_path / "c.md", html=tmp_path / "c.html",
        )  # fmt: skip
        write_reports(
            evaluation_report(),
            json=tmp_path / "e.json", markdown=tmp_path / "e.md", html=tmp_path / "e.html",
        )  # fmt: skip
        for suffix in ("png", "jpg", "webp"):
            noise = Image.effect_noise((300, 300), 90).convert("RGB")
            save_drawing(noise, tmp_path / f"d.{suffix}")
    assert len(list(tmp_path.iterdir())) == 10
    assert json.loads((tmp_path / "c.json").read_bytes())["schema"] == "gap-export-check"
    assert ET.parse(tmp_path / "c.xml").getroot().tag == "testsuites"
    (tmp_path / "empty").touch()
    OutputRule().write(WHAT, tmp_path / "empty", b"of mktemp")


@pytest.mark.parametrize("name", NOT_OURS)
def test_what_is_not_ours_needs_force(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(NOT_OURS[name])
    for act in (OutputRule().check, lambda named: OutputRule().write(WHAT, path, b"new")):
        with pytest.raises(OutputError, match=r"that gap-export did not write: .*with --force"):
            act({WHAT: path})
    assert path.read_bytes() == NOT_OURS[name]
    OutputRule(force=True).write(WHAT, path, b"new")
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def _hard_link(folder: Path) -> Path:
    os.link(folder / "data" / "deep" / "annotations.json", folder / "report.json")
    return folder / "report.json"


def _through_a_linked_folder(folder: Path) -> Path:
    (folder / "link").symlink_to(folder / "data")
    return folder / "link" / "deep" / "annotations.json"


WAYS: dict[str, Callable[[Path], Path]] = {
    "its own name": lambda folder: folder / "data" / "deep" / "annotations.json",
    "with ..": lambda folder: folder / "data" / "deep" / ".." / "deep" / "annotations.json",
    "a hard link": _hard_link,
    "a linked folder": _through_a_linked_folder,
}


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("given", ["data", "data/deep/annotations.json"])
@pytest.mark.parametrize("way", WAYS)
def test_what_is_read_is_never_replaced(tmp_path: Path, way: str, given: str, force: bool) -> None:
    (tmp_path / "data" / "deep").mkdir(parents=True)
    (tmp_path / "data" / "deep" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "deep" / "annotations.json").write_bytes(b"dear")
    rule = OutputRule(inputs={"--data": tmp_path / given}, force=force)
    path = WAYS[way](tmp_path)
    with pytest.raises(OutputError, match="would replace a file that the command reads: --data"):
        rule.write(WHAT, path, b"new")
    assert path.read_bytes() == b"dear"
    rule.write(WHAT, tmp_path / "data" / "new.json", b"new")


def test_input_that_is_an_earlier_drawing_is_not_replaced(tmp_path: Path) -> None:
    drawn = save_drawing(Image.new("RGB", (9, 9)), tmp_path / "drawn.png")
    rule = OutputRule(inputs={"IMAGE": drawn}, force=True)
    with pytest.raises(OutputError, match="the command reads: IMAGE"):
        save_drawing(Image.new("RGB", (9, 9)), drawn, rule=rule)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("leads_to", ["file", "missing", "loop"])
def test_links_are_not_followed(tmp_path: Path, leads_to: str, force: bool) -> None:
    (tmp_path / "file").write_bytes(b"dear")
    (tmp_path / "loop").symlink_to(tmp_path / ("loop" if leads_to == "loop" else leads_to))
    rule = OutputRule(force=force, outside={"the bundle": tmp_path / "bundle"})
    with pytest.raises(OutputError, match=r"is not written through a link: .*/loop -> "):
        rule.write(WHAT, tmp_path / "loop", b"new")
    assert (tmp_path / "file").read_bytes() == b"dear"
    assert not (tmp_path / "missing").exists()


def test_two_outputs_in_one_file_are_refused_by_whatever_names(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    os.link(tmp_path / "a", tmp_path / "b")
    (tmp_path / "link").symlink_to(tmp_path)
    for other in (tmp_path / "b", tmp_path / "link" / "a", tmp_path / "x" / ".." / "a"):
        with pytest.raises(OutputError, match="two outputs would be one file"):
            OutputRule().check({WHAT: tmp_path / "a", "the HTML report": other})


def test_long_name_is_no_reason_to_fail(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 250 + ".json")
    OutputRule().write(WHAT, path, b"new")
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("force", [False, True])
def test_what_a_link_in_the_data_leads_to_is_never_replaced(tmp_path: Path, force: bool) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"dear")
    (tmp_path / "data" / "images").symlink_to(tmp_path / "images")
    rule = OutputRule(inputs={"--data": tmp_path / "data"}, force=force)
    with pytest.raises(OutputError, match="would replace a file that the command reads: --data"):
        rule.write(WHAT, tmp_path / "images" / "a.png", b"new")


@pytest.mark.parametrize("name", [f"{MANIFEST_NAME}.sha256", f"{GOLDEN_NAME}.sha256"])
def test_nothing_is_put_into_any_folder_that_lists_all_it_holds(tmp_path: Path, name: str) -> None:
    """Whether or not the command has to do with it."""
    assert name in {HASH_NAME, GOLDEN_HASH_NAME}
    (tmp_path / "listing" / "deep").mkdir(parents=True)
    (tmp_path / "listing" / name).touch()
    (tmp_path / "link").symlink_to(tmp_path / "listing" / "deep")
    for place in ("listing", "listing/deep", "link"):
        path = tmp_path / place / "new"
        acts = (
            lambda path: OutputRule(force=True).write(WHAT, path, b"new"),
            lambda path: OutputRule(force=True).check_outside("--records", path),
            lambda path: check_output(path, force=True),
            lambda path: check_golden_place(path, force=True),
        )
        for act in acts:
            with pytest.raises(OutputError, match=r"would be inside a (bundle|golden), which"):
                act(path)
    with pytest.raises(OutputError, match="--records would be inside"):
        OutputRule().check_outside("--records", tmp_path / "listing")


def test_every_part_of_a_data_set_s_name_that_exists_is_looked_at(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("refcoco", "root", "val", "home/here"):
        (tmp_path / name).mkdir(parents=True)
    inputs = {"--data": ["refcoco:root:val"], "--checkpoint": ["main=~/here"]}
    rule = output_rule(force=False, inputs=inputs, outside={})
    here = tmp_path / "home" / "here"
    assert {path.absolute() for path in rule.inputs.values()} == {
        here, *(tmp_path / name for name in ("refcoco", "root", "val")),
    }  # fmt: skip
