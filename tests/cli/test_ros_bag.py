"""``gap-export ros-bag``."""

from __future__ import annotations

import json
import sqlite3

import pytest
from mcap.reader import make_reader
from mcap_ros2.decoder import DecoderFactory
from rosbags.highlevel import AnyReader

from gap_export.runtime.grounding import Grounding
from gap_export.runtime.session import GroundingSession
from tests.streaming.ros.bag_files import STAMPS, scene, write_bag

DETECTIONS = "/gap_export/detections"
EXPRESSIONS = ["the red circle", "the star"]


@pytest.fixture
def boxes(monkeypatch):
    """Random weights do not speak in boxes; here every answer has one."""
    ground_batch = GroundingSession.ground_batch

    def with_boxes(session, image, expressions, **options):
        found = ground_batch(session, image, expressions, **options)
        box = {"box": [2, 4, 12, 10], "score": 0.5, "found": None}
        plain = [{**one.to_plain(), "box": box["box"], "boxes": [box]} for one in found]
        return [Grounding.from_plain(one) for one in plain]

    monkeypatch.setattr(GroundingSession, "ground_batch", with_boxes)


def read(path):
    """Messages by topic: time in the bag, and the message."""
    found = {}
    with AnyReader([path]) as reader:
        for connection, time_ns, data in reader.messages():
            message = reader.deserialize(data, connection.msgtype)
            found.setdefault(connection.topic, []).append((time_ns, message))
    return found


def stamps(messages):
    return [(one.header.stamp.sec, one.header.stamp.nanosec) for _, one in messages]


@pytest.mark.parametrize("compressed", [False, True], ids=["raw", "jpeg"])
@pytest.mark.parametrize("form", ["ros1", "sqlite3", "mcap"])
def test_a_bag_with_detections_is_written(run_cli, tiny_bundle, tmp_path, boxes, form, compressed):
    bag = write_bag(tmp_path / "in", form, compressed=compressed)
    out = tmp_path / f"out{bag.suffix}"
    outcome = run_cli("ros-bag", tiny_bundle, bag, *EXPRESSIONS, "--out", out)
    assert outcome.code == 0, outcome.err
    assert f"wrote {out}\nframes: 3 answered\n" in outcome.err
    lines = [json.loads(line) for line in outcome.out.splitlines()]
    assert [line["time_s"] for line in lines] == [0.0, 0.1, 1.0]
    before, after = read(bag), read(out)
    detections = after.pop(DETECTIONS)
    named = after.pop(f"{DETECTIONS}/expressions", None)
    assert stamps(detections) == list(STAMPS)
    assert [time for time, _ in detections] == [time for time, _ in before["/camera/image"]]
    for _, message in detections:
        assert message.header.frame_id == "camera_optical"
        assert len(message.detections) == 2
        assert (message.detections[1].bbox.size_x, message.detections[1].bbox.size_y) == (10, 6)
    results = [one.results[0] for one in detections[0][1].detections]
    if form == "ros1":
        assert [one.id for one in results] == [0, 1]
        assert json.loads(named[0][1].data) == EXPRESSIONS
    else:
        assert [one.hypothesis.class_id for one in results] == EXPRESSIONS
    # All else is there as it was.
    assert after.keys() == before.keys()
    for topic, messages in before.items():
        assert [time for time, _ in after[topic]] == [time for time, _ in messages]
    assert [one.data for _, one in after["/words"]] == ["word 0", "word 1", "word 2"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_another_reader_of_mcap_reads_it(run_cli, tiny_bundle, tmp_path, boxes):
    bag, out = write_bag(tmp_path / "in", "mcap"), tmp_path / "out"
    argv = ["ros-bag", tiny_bundle, bag, "the star", "--out", out, "--detections-only"]
    assert run_cli(*argv).code == 0
    (file,) = out.glob("*.mcap")
    with file.open("rb") as stream:
        reader = make_reader(stream, decoder_factories=[DecoderFactory()])
        found = [message for *_, message in reader.iter_decoded_messages()]
    assert [one.header.stamp.sec for one in found] == [stamp[0] for stamp in STAMPS]
    assert found[0].detections[0].bbox.center.position.x == 7.0


def test_a_bag_of_humble_is_one_database_and_its_description(run_cli, tiny_bundle, tmp_path, boxes):
    bag, out = write_bag(tmp_path / "in", "sqlite3"), tmp_path / "out"
    assert run_cli("ros-bag", tiny_bundle, bag, "the star", "--out", out).code == 0
    assert sorted(path.name for path in out.iterdir()) == ["metadata.yaml", "out.db3"]
    with sqlite3.connect(out / "out.db3") as database:
        topics = dict(database.execute("SELECT name, type FROM topics"))
    assert topics[DETECTIONS] == "vision_msgs/msg/Detection2DArray"


def test_an_image_that_is_the_same_has_the_same_detections(run_cli, tiny_bundle, tmp_path, boxes):
    bag, out = write_bag(tmp_path / "in", "mcap"), tmp_path / "out"
    argv = ["ros-bag", tiny_bundle, bag, "the star", "--out", out, "--same-frame", "0.98"]
    outcome = run_cli(*argv)
    assert "frames: 2 answered, 1 skipped" in outcome.err
    detections = read(out)[DETECTIONS]
    assert stamps(detections) == list(STAMPS)
    assert [len(one.detections) for _, one in detections] == [1, 1, 1]


def test_every_second_image(run_cli, tiny_bundle, tmp_path, boxes):
    bag, out = write_bag(tmp_path / "in", "mcap"), tmp_path / "out"
    assert run_cli("ros-bag", tiny_bundle, bag, "a star", "--out", out, "--every", 2).code == 0
    assert stamps(read(out)[DETECTIONS]) == [STAMPS[0], STAMPS[2]]


def test_of_several_topics_one_is_named(run_cli, tiny_bundle, tmp_path, boxes):
    bag, out = write_bag(tmp_path / "in", "mcap", others=["/other"]), tmp_path / "out"
    argv = ["ros-bag", tiny_bundle, bag, "the star", "--out", out]
    outcome = run_cli(*argv)
    assert outcome.code == 2 and "allowed: /camera/image, /other" in outcome.err
    assert not out.exists()
    assert "no images of such a topic: /words" in run_cli(*argv, "--topic", "/words").err
    assert run_cli(*argv, "--topic", "/other").code == 0
    assert len(read(out)[DETECTIONS]) == 1


def test_what_is_no_bag_or_no_place_is_refused(run_cli, tiny_bundle, tmp_path):
    bag = write_bag(tmp_path / "in", "mcap")
    text = tmp_path / "text.bag"
    text.write_text("no bag")
    half = write_bag(tmp_path / "half", "ros1")
    half.write_bytes(half.read_bytes()[:3000])
    cases = [
        (tmp_path / "nowhere", "out", "the bag cannot be read"),
        (text, "out.bag", "the bag cannot be read"),
        (half, "out.bag", "the bag cannot be read"),
        (bag, "out.bag", "in the form of the one that is read"),
        (bag, "in", "there is something at the bag's place"),
        (bag, "nowhere/out", "a folder that does not exist"),
        (bag, tiny_bundle / "out", "inside the bundle"),
    ]
    before = sorted(path.name for path in tmp_path.iterdir())
    for given, out, words in cases:
        outcome = run_cli("ros-bag", tiny_bundle, given, "the star", "--out", tmp_path / out)
        assert (outcome.code, words in outcome.err) == (2, True), (given, out, outcome.err)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_bag_that_fails_in_the_middle_leaves_nothing(run_cli, tiny_bundle, tmp_path):
    bag, out = write_bag(tmp_path / "in", "mcap"), tmp_path / "out"
    outcome = run_cli("ros-bag", tiny_bundle, bag, "  ", "--out", out)
    assert outcome.code == 2 and "expression" in outcome.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_the_scene_is_asked_about_as_it_was_sent(run_cli, tiny_bundle, tmp_path):
    bag, out = write_bag(tmp_path / "in", "mcap"), tmp_path / "out"
    outcome = run_cli("ros-bag", tiny_bundle, bag, "the star", "--out", out)
    line = json.loads(outcome.out.splitlines()[2])
    with GroundingSession.open(tiny_bundle) as session:
        expected = session.ground(scene(15), "the star")
    assert line["groundings"][0]["token_ids"] == list(expected.token_ids)
