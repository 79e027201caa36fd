"""``gap-export ground`` with many frames or expressions."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from tests.streaming.videos import COLORS, video_frames, write_video


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "frames"
    path.mkdir()
    for number, color in enumerate(COLORS):
        Image.new("RGB", (40, 24), color).save(path / f"{number}.png")
    return path


def lines_of(outcome):
    return [json.loads(line) for line in outcome.out.splitlines()]


def test_a_line_a_frame(run_cli, tiny_bundle, folder):
    outcome = run_cli("ground", tiny_bundle, folder, "the red circle", "the star", "--every", "2")
    assert outcome.code == 0
    lines = lines_of(outcome)
    assert [line["frame"] for line in lines] == [0, 2, 4]
    assert lines[1]["source"] == str(folder / "2.png")
    for line in lines:
        assert [one["expression"] for one in line["groundings"]] == ["the red circle", "the star"]
        assert line["groundings"][0]["image_size"] == [40, 24]
    assert "frames: 3 answered\n" in outcome.err


def test_frames_of_one_image_answer_as_the_image_alone(run_cli, tiny_bundle, folder):
    alone = run_cli("ground", tiny_bundle, folder / "0.png", "the red circle").plain
    (line,) = lines_of(run_cli("ground", tiny_bundle, f"{folder}/0*.png", "the red circle"))
    assert line["groundings"][0]["token_ids"] == alone["token_ids"]
    (line,) = lines_of(run_cli("ground", tiny_bundle, folder / "0.png", "the red circle", "a star"))
    assert line["groundings"][0]["token_ids"] == alone["token_ids"]


def test_a_video_is_saved_with_every_frame_that_was_looked_at(run_cli, tiny_bundle, tmp_path):
    video, saved = write_video(tmp_path / "in.mp4", size=(62, 46)), tmp_path / "out.mp4"
    argv = ["ground", tiny_bundle, video, "the red circle", "--save", saved]
    outcome = run_cli(*argv, "--same-frame", "0.98")
    assert outcome.code == 0
    assert [line.get("same_as") for line in lines_of(outcome)] == [None, None, None, 2, None]
    assert f"wrote {saved}\nframes: 4 answered, 1 skipped\n" in outcome.err
    frames = video_frames(saved)
    assert len(frames) == 5 and frames[0].shape == (46, 62, 3)
    for frame, color in zip(frames, COLORS, strict=True):
        assert np.allclose(np.median(frame, axis=(0, 1)), color, atol=16)
    # One of ours is replaced.
    assert run_cli(*argv).code == 0


def test_a_video_that_is_not_ours_is_replaced_only_with_force(run_cli, tiny_bundle, tmp_path):
    video, other = write_video(tmp_path / "in.mp4"), write_video(tmp_path / "other.mp4")
    before = other.read_bytes()
    argv = ["ground", tiny_bundle, video, "the red circle", "--save"]
    assert "that gap-export did not write" in run_cli(*argv, other).err
    assert other.read_bytes() == before
    outcome = run_cli(*argv, video, "--force")
    assert outcome.code == 2 and "would replace a file that the command reads" in outcome.err
    assert run_cli(*argv, other, "--force").code == 0


def test_frames_that_cannot_be_used_are_lines_and_the_exit_code_says_so(
    run_cli, tiny_bundle, folder
):
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:50])
    outcome = run_cli("ground", tiny_bundle, folder, "the red circle")
    assert outcome.code == 2
    lines = lines_of(outcome)
    assert ["error" in line for line in lines] == [False, True, False, False, False]
    assert "error: 1 of 5 frames could not be used" in outcome.err


def test_several_expressions_are_drawn_on_one_image(run_cli, tiny_bundle, folder, tmp_path):
    saved = tmp_path / "found.png"
    argv = ["ground", tiny_bundle, folder / "0.png", "the red circle", "the star"]
    assert run_cli(*argv, "--save", saved).code == 0
    with Image.open(saved) as drawing:
        assert drawing.size == (40, 24)


@pytest.mark.parametrize(
    ("source", "flags", "words"),
    [
        ("image", ["--every", "2"], "--every cannot be used here: SOURCE is one image"),
        ("image", ["--newest"], "--newest cannot be used here: SOURCE is one image"),
        ("folder", ["--newest"], "the frames of SOURCE have no times"),
        ("folder", ["--same-frame", "1.5"], "--same-frame is no share"),
        ("folder", ["--same-frame", "nan"], "--same-frame is no share"),
        ("folder", ["--save", "out.png"], "videos are saved in one format"),
        ("folder", ["--force"], "no file is to be written"),
    ],
)
def test_what_has_no_meaning_is_refused(run_cli, tiny_bundle, folder, source, flags, words):
    place = folder if source == "folder" else folder / "0.png"
    outcome = run_cli("ground", tiny_bundle, place, "the red circle", *flags)
    assert (outcome.code, outcome.out) == (2, "")
    assert words in outcome.err
