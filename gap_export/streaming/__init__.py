"""Frames that keep coming: folders, videos, cameras and robots, asked the same expressions.

No session is opened here, and no framework of robots is imported: what delivers messages brings
them, and what publishes takes answers.
"""

from __future__ import annotations

from gap_export.streaming.answering import FrameAnswer, answer_frames
from gap_export.streaming.newest import newest_frames
from gap_export.streaming.sources import FrameSource, SourceFrame, find_source

__all__ = [
    "FrameAnswer",
    "FrameSource",
    "SourceFrame",
    "answer_frames",
    "find_source",
    "newest_frames",
]
