"""A node of dora-rs: images in, boxes out. ``python -m gap_export.streaming.dora_node BUNDLE``.

    inputs      image          uint8, with the metadata width, height, encoding (rgb8, bgr8, mono8,
                               jpeg or png); give it ``queue_size: 1``, and the newest image wins
                expressions    strings, which replace those of the environment
    output      boxes2d        one struct: bbox (float32, x1 y1 x2 y2 of each), conf, labels; its
                               metadata are those of the image, and primitive and format

What to look for at first stands in the environment variable ``EXPRESSIONS``, one a line.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from gap_export.errors import ExitCode, GapExportError, ImageError, UsageError
from gap_export.extras import require_extra
from gap_export.runtime.grounding import Grounding
from gap_export.runtime.images.files import EncodedImage
from gap_export.runtime.images.image import ImageInput
from gap_export.runtime.session import GroundingSession
from gap_export.streaming.ros.images import image_of

_CHANNELS = {"rgb8": 3, "bgr8": 3, "mono8": 1}
_COMPRESSED = ("jpeg", "jpg", "png")
_logger = logging.getLogger(__name__)


def run(node: Any, session: GroundingSession, expressions: Sequence[str]) -> None:
    """Answer images until the dataflow ends.

    Args:
        node: A ``dora.Node``.
        session: Answers.
        expressions: What to look for at first; without any, images are left alone.
    """
    import pyarrow

    wanted = tuple(expressions)
    for event in node:
        if event["type"] == "STOP":
            return
        if event["type"] != "INPUT":
            continue
        if event["id"] == "expressions":
            wanted = tuple(text.strip() for text in event["value"].to_pylist() if text.strip())
        elif wanted:
            metadata = event["metadata"]
            try:
                image = image_of_event(event["value"].to_numpy(), metadata)
                found = session.ground_batch(image, wanted, frame="raw")
            except GapExportError as err:
                # The next image may be fine.
                _logger.error("%s", err)  # noqa: TRY400 - the user sees a line
                continue
            told = {**metadata, "primitive": "boxes2d", "format": "xyxy"}
            node.send_output("boxes2d", pyarrow.array([boxes_of(found)]), told)


def image_of_event(value: Any, metadata: Mapping[str, Any]) -> ImageInput:
    """The image of an input.

    Args:
        value: uint8 [bytes].
        metadata: Of the input.

    Raises:
        ImageError: another encoding, or a size that the bytes do not have.
    """
    encoding = str(metadata.get("encoding", "")).lower()
    if encoding in _COMPRESSED:
        return EncodedImage(data=value.tobytes(), name=f"the image ({encoding})")
    if encoding not in _CHANNELS:
        allowed = ", ".join((*_CHANNELS, *_COMPRESSED))
        raise ImageError(
            "images of this encoding are not read", seen=repr(encoding), allowed=allowed
        )
    width = int(metadata.get("width", 0))
    return image_of(
        SimpleNamespace(
            encoding=encoding,
            width=width,
            height=int(metadata.get("height", 0)),
            step=width * _CHANNELS[encoding],
            is_bigendian=0,
            data=value,
        )
    )


def boxes_of(groundings: Sequence[Grounding]) -> dict[str, list[Any]]:
    """Boxes in the form that other nodes of dora take; what was not found is left out."""
    found = [
        (grounding.expression, one)
        for grounding in groundings
        for one in grounding.boxes
        if one.found is not False
    ]
    return {
        "bbox": [float(value) for _, one in found for value in one.box],
        "conf": [float("nan") if one.score is None else one.score for _, one in found],
        "labels": [expression for expression, _ in found],
    }


def main(arguments: Sequence[str]) -> int:
    """Run the node; the exit code."""
    try:
        if len(arguments) != 1:
            raise UsageError("name the bundle", seen=" ".join(arguments) or "nothing")
        require_extra("dora", "a node of dora")
        from dora import Node

        with GroundingSession.open(arguments[0]) as session:
            words = os.environ.get("EXPRESSIONS", "").splitlines()
            run(Node(), session, [one.strip() for one in words if one.strip()])
    except GapExportError as err:
        sys.stderr.write(f"error: {err}\n")
        return int(err.exit_code)
    return int(ExitCode.OK)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
