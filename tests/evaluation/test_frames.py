"""Images that carry an EXIF orientation: asked in the frame that their annotations are in."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gap_export.bundle import open_bundle
from gap_export.errors import UsageError
from gap_export.evaluation.datasets import open_dataset
from gap_export.evaluation.evaluate import Asking, evaluate_bundle
from gap_export.evaluation.measure import Runner, RunnerOptions
from gap_export.evaluation.refshapes import generate_scene
from gap_export.evaluation.settings import pruned_settings
from gap_export.evaluation.workers import Shard


def write(folder: Path, *, orientation: int, layout: str, suffix: str = ".jpg", **row: Any) -> str:
    """A set of four scenes whose images carry an orientation and are annotated as stored."""
    folder.mkdir()
    rows = []
    for index in range(4):
        scene = generate_scene(split="heldout", seed=0, index=index, num_expressions=1)
        exif = Image.Exif()
        exif[0x0112] = orientation
        # Two sides, so that an image on its side is seen to be.
        image = Image.fromarray(scene.image).crop((0, 0, 96, 88))
        name = f"COCO_train2014_{index:012d}{suffix}"
        image.save(folder / name, exif=exif)
        left, top = 4.0, 6.0
        text = scene.expressions[0].text
        if layout == "own":
            rows.append({"image": name, "expression": text, "box": [left, top, 60, 70], **row})
        else:
            rows.append(
                {
                    "img_id": name,
                    "sents": text,
                    "bbox": [left, top, 56, 64],
                    "width": 96,
                    "height": 88,
                }
            )
    if layout == "own":
        (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return str(folder)
    (folder / "refcoco_val.json").write_text(json.dumps(rows))
    return f"refcoco:{folder}:val"


@pytest.fixture(scope="module")
def answers(demo_bundle: Path) -> Iterator[Callable[[str], list[dict[str, Any]]]]:
    setting = pruned_settings(demo_bundle, open_bundle(demo_bundle).manifest.pruning)[1]
    with Runner(RunnerOptions()) as runner:

        def answers_to(data: str) -> list[dict[str, Any]]:
            questions = open_dataset(data, samples=None, seed=0).questions
            records = runner.answer(Shard(setting=setting, index=0, questions=questions))
            return [asdict(replace(one, timings_ms={}, orientation=1)) for one in records]

        yield answers_to


@pytest.mark.parametrize(
    ("layout", "options", "suffix"),
    [("per split", {}, ".jpg"), ("own", {"frame": "raw"}, ".png")],
    ids=["coco", "own"],
)
def test_boxes_are_those_of_the_image_without_an_orientation(
    answers: Any, tmp_path: Path, layout: str, options: Any, suffix: str
) -> None:
    plain = write(tmp_path / "plain", orientation=1, layout=layout, suffix=suffix, **options)
    expected = answers(plain)
    assert {record["image_size"] for record in expected} == {(96, 88)}
    for orientation in range(2, 9):
        folder = tmp_path / str(orientation)
        data = write(folder, orientation=orientation, layout=layout, suffix=suffix, **options)
        assert answers(data) == expected


def test_frame_of_lines_is_upright_unless_they_say_otherwise(tmp_path: Path) -> None:
    data = write(tmp_path / "a", orientation=6, layout="own")
    found = open_dataset(data, samples=None, seed=0)
    assert found.frame == "upright"
    assert {one.image_size for one in found.questions} == {(88, 96)}
    data = write(tmp_path / "b", orientation=6, layout="own", frame="raw")
    found = open_dataset(data, samples=None, seed=0)
    assert found.frame == "raw"
    assert {one.image_size for one in found.questions} == {(96, 88)}


@pytest.mark.parametrize("frame", ["stored", "RAW", "", None, 1, ["raw"]])
def test_another_frame_is_refused(tmp_path: Path, frame: Any) -> None:
    data = write(tmp_path / "a", orientation=6, layout="own", frame=frame)
    with pytest.raises(UsageError, match=r"frame of an annotation .*line 1.*allowed: upright, raw"):
        open_dataset(data, samples=None, seed=0)


def test_lines_about_one_image_have_one_frame(tmp_path: Path) -> None:
    data = write(tmp_path / "a", orientation=6, layout="own")
    lines = tmp_path / "a" / "questions.jsonl"
    again = {**json.loads(lines.read_text().splitlines()[0]), "frame": "raw"}
    lines.write_text(lines.read_text() + "\n" + json.dumps(again))
    with pytest.raises(UsageError, match=r"line 5.*allowed: upright, as in the lines before"):
        open_dataset(data, samples=None, seed=0)


def test_report_names_the_frame_and_counts_images_that_carry_an_orientation(
    tiny_bundle: Path, tiny_whole_bundle: Path, tmp_path: Path
) -> None:
    data = write(tmp_path / "a", orientation=8, layout="per split")
    report = evaluate_bundle(tiny_bundle, baseline=tiny_whole_bundle, asking=Asking(data=data))
    assert (report.data.frame, report.data.num_turned) == ("raw", 4)
    assert not report.data.unusable
    plain = report.to_plain()["data"]
    assert (plain["frame"], plain["num_turned"]) == ("raw", 4)


@pytest.mark.parametrize("suffix", [".webp", ".tif", ".tiff"])
def test_images_of_a_published_set_may_be_of_other_formats(tmp_path: Path, suffix: str) -> None:
    data = write(tmp_path / "a", orientation=6, layout="per split", suffix=suffix)
    found = open_dataset(data, samples=None, seed=0)
    assert (found.frame, len(found.questions)) == ("raw", 4)
