"""``vision_msgs/Detection2DArray``, from what a session answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from gap_export.errors import ExpressionError
from gap_export.runtime.grounding import Grounding, ScoredBox
from gap_export.runtime.images.geometry import Box

DETECTIONS_TYPE = "vision_msgs/msg/Detection2DArray"
# Of vision_msgs 4, since ROS 2 Humble. https://github.com/ros-perception/vision_msgs
ROS2_DEFINITIONS = {
    "vision_msgs/msg/Point2D": "float64 x\nfloat64 y\n",
    "vision_msgs/msg/Pose2D": "vision_msgs/Point2D position\nfloat64 theta\n",
    "vision_msgs/msg/BoundingBox2D": (
        "vision_msgs/Pose2D center\nfloat64 size_x\nfloat64 size_y\n"
    ),
    "vision_msgs/msg/ObjectHypothesis": "string class_id\nfloat64 score\n",
    "vision_msgs/msg/ObjectHypothesisWithPose": (
        "vision_msgs/ObjectHypothesis hypothesis\ngeometry_msgs/PoseWithCovariance pose\n"
    ),
    "vision_msgs/msg/Detection2D": (
        "std_msgs/Header header\nvision_msgs/ObjectHypothesisWithPose[] results\n"
        "vision_msgs/BoundingBox2D bbox\nstring id\n"
    ),
    DETECTIONS_TYPE: "std_msgs/Header header\nvision_msgs/Detection2D[] detections\n",
}
# Of ROS 1, where a class is a number and a detection may bring its part of the image.
ROS1_DEFINITIONS = {
    "vision_msgs/msg/BoundingBox2D": (
        "geometry_msgs/Pose2D center\nfloat64 size_x\nfloat64 size_y\n"
    ),
    "vision_msgs/msg/ObjectHypothesisWithPose": (
        "int64 id\nfloat64 score\ngeometry_msgs/PoseWithCovariance pose\n"
    ),
    "vision_msgs/msg/Detection2D": (
        "std_msgs/Header header\nvision_msgs/ObjectHypothesisWithPose[] results\n"
        "vision_msgs/BoundingBox2D bbox\nsensor_msgs/Image source_img\n"
    ),
    DETECTIONS_TYPE: ROS2_DEFINITIONS[DETECTIONS_TYPE],
}

FindType = Callable[[str], Any]


def build_detections(find_type: FindType, header: Any, groundings: Sequence[Grounding]) -> Any:
    """A ``vision_msgs/Detection2DArray`` of ROS 2, with the image's own header.

    What was not found has no detection: a box that is missing, or one that a calibrated bundle
    calls not found. ``class_id`` is the expression, and ``score`` NaN where there is none.

    Args:
        find_type: The class of a message by its name, such as ``vision_msgs/msg/Detection2D``; it
            takes all its fields by name.
        header: Of the image that was asked about; it is used as it is.
        groundings: Of each expression.
    """
    hypothesis = find_type("vision_msgs/msg/ObjectHypothesis")
    with_pose = find_type("vision_msgs/msg/ObjectHypothesisWithPose")
    box_type = find_type("vision_msgs/msg/BoundingBox2D")
    pose_type = find_type("vision_msgs/msg/Pose2D")
    point_type = find_type("vision_msgs/msg/Point2D")
    detection = find_type("vision_msgs/msg/Detection2D")
    detections = []
    for number, found in _detected(groundings):
        x, y, width, height = _center_and_size(found.box)
        detections.append(
            detection(
                header=header,
                results=[
                    with_pose(
                        hypothesis=hypothesis(
                            class_id=groundings[number].expression, score=_score(found)
                        ),
                        pose=_no_pose(find_type),
                    )
                ],
                bbox=box_type(
                    center=pose_type(position=point_type(x=x, y=y), theta=0.0),
                    size_x=width,
                    size_y=height,
                ),
                id="",
            )
        )
    return find_type(DETECTIONS_TYPE)(header=header, detections=detections)


def build_ros1_detections(find_type: FindType, header: Any, groundings: Sequence[Grounding]) -> Any:
    """A ``vision_msgs/Detection2DArray`` of ROS 1: ``id`` is the expression's number, from 0.

    Args:
        find_type: See :func:`build_detections`, and likewise the rest.
        header: See there.
        groundings: See there.
    """
    with_pose = find_type("vision_msgs/msg/ObjectHypothesisWithPose")
    box_type = find_type("vision_msgs/msg/BoundingBox2D")
    pose_type = find_type("geometry_msgs/msg/Pose2D")
    detection = find_type("vision_msgs/msg/Detection2D")
    no_image = find_type("sensor_msgs/msg/Image")(
        header=header, height=0, width=0, encoding="", is_bigendian=0, step=0,
        data=np.zeros(0, np.uint8),
    )  # fmt: skip
    detections = []
    for number, found in _detected(groundings):
        x, y, width, height = _center_and_size(found.box)
        result = with_pose(id=number, score=_score(found), pose=_no_pose(find_type))
        box = box_type(center=pose_type(x=x, y=y, theta=0.0), size_x=width, size_y=height)
        detections.append(detection(header=header, results=[result], bbox=box, source_img=no_image))
    return find_type(DETECTIONS_TYPE)(header=header, detections=detections)


def parse_expressions(text: str) -> tuple[str, ...]:
    """The expressions of a ``std_msgs/String``, one a line; lines without words are left out.

    Raises:
        ExpressionError: there are none.
    """
    found = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not found:
        raise ExpressionError("no expression", seen=repr(text[:80]), allowed="one a line")
    return found


def _detected(groundings: Sequence[Grounding]) -> Iterator[tuple[int, ScoredBox]]:
    """The boxes that are to be published, each with the number of its expression."""
    for number, grounding in enumerate(groundings):
        for one in grounding.boxes:
            if one.found is not False:
                yield number, one


def _score(found: ScoredBox) -> float:
    return float("nan") if found.score is None else found.score


def _center_and_size(box: Box) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = (float(value) for value in box)
    return (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1


def _no_pose(find_type: FindType) -> Any:
    """A pose of which nothing is known: at the origin, not turned."""
    point = find_type("geometry_msgs/msg/Point")(x=0.0, y=0.0, z=0.0)
    turn = find_type("geometry_msgs/msg/Quaternion")(x=0.0, y=0.0, z=0.0, w=1.0)
    pose = find_type("geometry_msgs/msg/Pose")(position=point, orientation=turn)
    return find_type("geometry_msgs/msg/PoseWithCovariance")(pose=pose, covariance=np.zeros(36))
