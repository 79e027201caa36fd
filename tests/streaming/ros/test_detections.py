"""Detections, serialized and read back."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
from rosbags.typesys import Stores, get_types_from_msg, get_typestore

from gap_export.errors import ExpressionError
from gap_export.runtime.grounding import ScoredBox
from gap_export.streaming.ros.detections import (
    DETECTIONS_TYPE,
    ROS1_DEFINITIONS,
    ROS2_DEFINITIONS,
    build_detections,
    build_ros1_detections,
    parse_expressions,
)
from tests.streaming.ros.bag_files import ROS1, ROS2, header


def answer(expression, *boxes):
    return SimpleNamespace(expression=expression, boxes=boxes)


ANSWERS = (
    answer("the mug", ScoredBox(box=(10.0, 20.0, 30.0, 60.0), score=0.75, found=True)),
    answer("no box"),
    answer("not there", ScoredBox(box=(1.0, 1.0, 2.0, 2.0), score=0.01, found=False)),
    answer("no score", ScoredBox(box=(0.0, 0.0, 4.0, 2.0), score=None, found=None)),
)


def store_of(version, definitions):
    store = get_typestore(version)
    for name, text in definitions.items():
        store.register(get_types_from_msg(text, name))
    return store


def test_boxes_have_the_images_header_and_their_expressions():
    store = store_of(Stores.ROS2_HUMBLE, ROS2_DEFINITIONS)
    message = build_detections(store.types.__getitem__, header(ROS2), ANSWERS)
    raw = store.serialize_cdr(message, DETECTIONS_TYPE)
    found = store.deserialize_cdr(raw, DETECTIONS_TYPE)
    assert found.header == header(store)
    first, last = found.detections
    assert first.header == last.header == found.header
    (result,) = first.results
    assert (result.hypothesis.class_id, result.hypothesis.score) == ("the mug", 0.75)
    assert (first.bbox.center.position.x, first.bbox.center.position.y) == (20.0, 40.0)
    assert (first.bbox.size_x, first.bbox.size_y) == (20.0, 40.0)
    assert result.pose.pose.orientation.w == 1.0
    assert last.results[0].hypothesis.class_id == "no score"
    assert math.isnan(last.results[0].hypothesis.score)


def test_classes_are_numbers_in_ros_1():
    store = store_of(Stores.ROS1_NOETIC, ROS1_DEFINITIONS)
    message = build_ros1_detections(store.types.__getitem__, header(ROS1), ANSWERS)
    found = store.deserialize_ros1(store.serialize_ros1(message, DETECTIONS_TYPE), DETECTIONS_TYPE)
    assert found.header.seq == 7
    assert [one.results[0].id for one in found.detections] == [0, 3]
    assert found.detections[0].bbox.center.x == 20.0


def test_the_definition_of_ros_1_is_the_published_one():
    # As other implementations of vision_msgs for ROS 1 have it.
    store = store_of(Stores.ROS1_NOETIC, ROS1_DEFINITIONS)
    assert store.generate_msgdef(DETECTIONS_TYPE)[1] == "402071f61477de256df9f1aa45e6e4c8"


def test_expressions_are_lines():
    assert parse_expressions(" the mug \n\nthe red box\r\n") == ("the mug", "the red box")


@pytest.mark.parametrize("text", ["", " \n\t\n"])
def test_no_expression_is_an_error(text):
    with pytest.raises(ExpressionError):
        parse_expressions(text)
