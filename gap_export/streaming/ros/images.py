"""``sensor_msgs/Image`` and ``sensor_msgs/CompressedImage``, as a session takes images."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gap_export.errors import ImageError
from gap_export.runtime.images.files import MAX_PIXELS, EncodedImage


class _Layout(NamedTuple):
    """How pixels of an encoding lie: channels, bytes a channel, and where red, green, blue are."""

    num_channels: int
    num_bytes: int
    order: tuple[int, ...] | None


# sensor_msgs/image_encodings.hpp; of a depth image or a gray one all channels are one.
ENCODINGS = {
    "rgb8": _Layout(3, 1, (0, 1, 2)),
    "bgr8": _Layout(3, 1, (2, 1, 0)),
    "rgba8": _Layout(4, 1, (0, 1, 2)),
    "bgra8": _Layout(4, 1, (2, 1, 0)),
    "mono8": _Layout(1, 1, None),
    "8UC1": _Layout(1, 1, None),
    "mono16": _Layout(1, 2, None),
    "16UC1": _Layout(1, 2, None),
}
# What image_transport's compressedDepth puts before its PNG is no image file's beginning.
_COMPRESSED = "jpeg or png, as image_transport's compressed has it"


def image_of(message: Any) -> NDArray[np.uint8] | EncodedImage:
    """The image that a message holds; a compressed one is decoded later, by the session.

    Alpha is left out. Of 16 bits the upper 8 are kept, as of image files (65535 is white): a depth
    image in millimeters is nearly black then.

    Args:
        message: ``sensor_msgs/Image`` or ``sensor_msgs/CompressedImage``, of any library that has
            their fields.

    Returns:
        uint8 [H, W, 3] in the order RGB, uint8 [H, W], or the bytes of an image file.

    Raises:
        ImageError: another encoding, or fields that contradict each other.
    """
    if not hasattr(message, "encoding"):
        return _encoded(message)
    layout = ENCODINGS.get(message.encoding)
    if layout is None:
        raise ImageError(
            "messages of this encoding are not read",
            seen=f"{message.encoding!r}",
            allowed=", ".join(ENCODINGS),
        )
    height, width, step = int(message.height), int(message.width), int(message.step)
    pixel = layout.num_channels * layout.num_bytes
    data = np.frombuffer(message.data, np.uint8) if len(message.data) else np.zeros(0, np.uint8)
    # The last row may come without what fills the others up.
    least = step * (height - 1) + width * pixel
    if height < 1 or width < 1 or width * height > MAX_PIXELS:
        raise ImageError(
            "the message's size is no image's",
            seen=f"{width}x{height}",
            allowed=f"1 to {MAX_PIXELS:,} pixels",
        )
    if step < width * pixel or data.size < least:
        raise ImageError(
            "the message holds fewer bytes than its size needs",
            seen=f"{width}x{height} {message.encoding}, step {step}, {data.size:,} bytes",
            allowed=f"a step of at least {width * pixel}, and {least:,} bytes",
        )
    rows = np.lib.stride_tricks.as_strided(
        data, (height, width, pixel), (step, pixel, 1), writeable=False
    )
    if layout.num_bytes == 2:
        # Of each number the first byte is the upper one where the big end comes first.
        rows = rows[..., 0 if message.is_bigendian else 1, None]
    return np.ascontiguousarray(rows[..., 0] if layout.order is None else rows[..., layout.order])


def _encoded(message: Any) -> EncodedImage:
    if "compressedDepth" in message.format:
        raise ImageError(
            "messages of this format are not read", seen=message.format, allowed=_COMPRESSED
        )
    return EncodedImage(data=bytes(message.data), name=f"the message ({message.format})")
