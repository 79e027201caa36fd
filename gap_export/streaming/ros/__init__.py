"""Messages of ROS in, messages of ROS out, without ROS.

What is here reads and fills messages by the names of their fields. Those names are the same in
rclpy's classes, in rosbags' and in those of ROS 1, so that a node, a bag and a test share it.
"""

from __future__ import annotations

from gap_export.streaming.ros.detections import build_detections, parse_expressions
from gap_export.streaming.ros.images import image_of
from gap_export.streaming.ros.newest_answerer import AnswererStatus, NewestAnswerer

__all__ = [
    "AnswererStatus",
    "NewestAnswerer",
    "build_detections",
    "image_of",
    "parse_expressions",
]
