"""The node of tools/ros2, with a stand-in for rclpy and real messages."""

from __future__ import annotations

import ast
import importlib.util
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

from gap_export.runtime.grounding import Grounding
from gap_export.runtime.session import GroundingSession
from gap_export.streaming.ros.detections import DETECTIONS_TYPE
from tests.streaming.ros import rclpy_stand_in
from tests.streaming.ros.bag_files import STAMPS, compressed_message, image_message, scene

PACKAGE = Path(__file__).resolve().parents[3] / "tools/ros2/gap_export_ros"
STORE = rclpy_stand_in.STORE
SUCCESS, FAILURE = rclpy_stand_in.Transition


@pytest.fixture
def module(monkeypatch):
    for name, made in rclpy_stand_in.modules().items():
        monkeypatch.setitem(sys.modules, name, made)
    path = PACKAGE / "gap_export_ros/ground_node.py"
    spec = importlib.util.spec_from_file_location("ground_node", path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture
def node(module, tiny_bundle, monkeypatch):
    """A node of the tiny bundle; every answer has a box, which random weights do not give."""
    ground_batch = GroundingSession.ground_batch

    def with_boxes(session, image, expressions, **options):
        box = {"box": [2, 4, 12, 10], "score": 0.5, "found": None}
        found = ground_batch(session, image, expressions, **options)
        plain = [{**one.to_plain(), "box": box["box"], "boxes": [box]} for one in found]
        return [Grounding.from_plain(one) for one in plain]

    monkeypatch.setattr(GroundingSession, "ground_batch", with_boxes)
    made = module.GroundNode()
    made.set("bundle", str(tiny_bundle))
    yield made
    made.free()
    made.destroy_node()


def start(node, *expressions):
    if expressions:
        assert node.set("expressions", list(expressions)).successful
    assert node.on_configure(None) is SUCCESS
    assert node.on_activate(None) is SUCCESS


def wait_for(condition):
    ends = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.005)


def detections_of(node, count):
    sent = node.publishers["~/detections"].sent
    wait_for(lambda: len(sent) >= count)
    # As they go over the wire.
    return [
        STORE.deserialize_cdr(STORE.serialize_cdr(one, DETECTIONS_TYPE), DETECTIONS_TYPE)
        for one in sent
    ]


def test_detections_have_the_header_of_their_image(node):
    start(node, "the red circle", "the star")
    images = node.subscriptions["image"]
    assert images.qos == node.publishers["~/detections"].qos == "sensor data"
    for count, stamp in enumerate(STAMPS, 1):
        images.callback(image_message(scene(), "rgb8", stamp=stamp))
        detections_of(node, count)
    found = detections_of(node, 3)
    assert [(one.header.stamp.sec, one.header.stamp.nanosec) for one in found] == list(STAMPS)
    assert found[0].header.frame_id == "camera_optical"
    names = [one.results[0].hypothesis.class_id for one in found[0].detections]
    assert names == ["the red circle", "the star"]
    assert found[0].detections[0].bbox.center.position.x == 7.0


def test_compressed_images_are_taken_where_the_parameter_says_so(node):
    node.set("compressed", True)
    start(node, "the star")
    images = node.subscriptions["image"]
    assert images.kind.__name__ == "sensor_msgs/msg/CompressedImage"
    images.callback(compressed_message(scene()))
    assert len(detections_of(node, 1)[0].detections) == 1


def test_expressions_come_by_topic_and_by_parameter(node):
    start(node)
    assert ("warning", "no expression yet: images are dropped") in node.log.said
    words, images = node.subscriptions["~/expressions"], node.subscriptions["image"]
    assert words.qos.durability == "transient local"
    words.callback(words.kind(data="the mug\nthe red box\n"))
    images.callback(image_message(scene()))
    names = [one.results[0].hypothesis.class_id for one in detections_of(node, 1)[0].detections]
    assert names == ["the mug", "the red box"]
    assert node.set("expressions", ["the star"]).successful
    images.callback(image_message(scene()))
    (one,) = detections_of(node, 2)[1].detections
    assert one.results[0].hypothesis.class_id == "the star"
    words.callback(words.kind(data="  "))
    assert node.log.said[-1][0] == "error" and "no expression" in node.log.said[-1][1]


def test_the_node_goes_through_its_states_and_back(node):
    assert node.on_configure(None) is SUCCESS
    assert "image" not in node.subscriptions
    assert node.on_activate(None) is SUCCESS
    assert node.on_deactivate(None) is SUCCESS
    assert "image" not in node.subscriptions and not node.is_active
    assert node.on_activate(None) is SUCCESS
    assert node.on_deactivate(None) is SUCCESS
    assert node.on_cleanup(None) is SUCCESS
    assert not (node.publishers or node.subscriptions or node.timers)
    start(node, "the star")
    assert node.on_shutdown(None) is SUCCESS
    assert not (node.publishers or node.subscriptions or node.timers)


def test_a_bundle_that_cannot_be_opened_is_said_and_the_node_stays_unconfigured(node):
    node.set("bundle", "/nowhere")
    assert node.on_configure(None) is FAILURE
    assert node.log.said[0][0] == "error" and "/nowhere" in node.log.said[0][1]
    assert not node.publishers


def test_what_is_read_once_cannot_be_changed_while_the_bundle_is_open(node):
    assert node.on_configure(None) is SUCCESS
    result = node.set("bundle", "/other")
    assert not result.successful and "clean it up first" in result.reason


def test_diagnostics_say_what_became_of_images(node):
    def told():
        node.timers[0]()
        message = node.publishers["/diagnostics"].sent[-1]
        raw = STORE.serialize_cdr(message, "diagnostic_msgs/msg/DiagnosticArray")
        read = STORE.deserialize_cdr(raw, "diagnostic_msgs/msg/DiagnosticArray")
        assert read.header.stamp.sec == 3
        (status,) = read.status
        return int(status.level), status.message, {one.key: one.value for one in status.values}

    assert node.on_configure(None) is SUCCESS
    assert told()[:2] == (0, "not active")
    assert node.on_activate(None) is SUCCESS
    assert told()[:2] == (1, "no expression")
    node.set("expressions", ["the star"])
    assert told()[:2] == (1, "no image yet")
    images = node.subscriptions["image"]
    images.callback(image_message(scene()))
    detections_of(node, 1)
    wait_for(lambda: told()[2]["answered"] == "1")
    assert told()[:2] == (0, "answering")
    images.callback(image_message(scene(), "bayer_rggb8"))
    wait_for(lambda: told()[2]["failed"] == "1")
    level, said, values = told()
    assert (level, values["received"]) == (2, "2") and "bayer_rggb8" in said
    assert any(kind == "error" and "bayer_rggb8" in text for kind, text in node.log.said)


def test_every_package_that_is_imported_is_declared():
    declared = {one.text for one in ElementTree.parse(PACKAGE / "package.xml").iter("exec_depend")}
    imported = set()
    for path in PACKAGE.rglob("*.py"):
        # Humble has Python 3.10.
        for found in ast.walk(ast.parse(path.read_text(), feature_version=(3, 10))):
            if isinstance(found, ast.ImportFrom) and found.module:
                imported.add(found.module.partition(".")[0])
    known = {"__future__", "importlib", "typing", "setuptools", "gap_export"}
    # rclpy depends on rcl_interfaces, and so on.
    assert imported - known - {"rcl_interfaces"} <= declared
    assert (PACKAGE / "resource/gap_export_ros").exists()
