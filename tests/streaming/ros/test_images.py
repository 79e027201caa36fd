"""Images of messages, serialized and read back by rosbags' definitions."""

from __future__ import annotations

from array import array
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gap_export.errors import ImageError
from gap_export.runtime.images.image import load_image
from gap_export.streaming.ros.images import ENCODINGS, image_of
from tests.streaming.ros.bag_files import (
    COMPRESSED,
    IMAGE,
    ROS1,
    ROS2,
    compressed_message,
    image_message,
)

RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
GRAY = RGB[..., 0].copy()
DEEP = np.random.default_rng(1).integers(0, 65536, (5, 7), dtype=np.uint16)


def sent(message, kind=IMAGE, store=ROS2):
    """The message as it arrives."""
    if store is ROS1:
        return ROS1.deserialize_ros1(ROS1.serialize_ros1(message, kind), kind)
    return ROS2.deserialize_cdr(ROS2.serialize_cdr(message, kind), kind)


@pytest.mark.parametrize("store", [ROS1, ROS2], ids=["ros1", "ros2"])
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize(
    ("encoding", "pixels", "expected"),
    [
        ("rgb8", RGB, RGB),
        ("bgr8", RGB[..., ::-1], RGB),
        ("rgba8", np.dstack([RGB, GRAY]), RGB),
        ("bgra8", np.dstack([RGB[..., ::-1], GRAY]), RGB),
        ("mono8", GRAY, GRAY),
        ("8UC1", GRAY, GRAY),
        ("mono16", DEEP, DEEP >> 8),
        ("16UC1", DEEP, DEEP >> 8),
    ],
)
def test_pixels_are_those_that_were_sent(encoding, pixels, expected, padding, store):
    message = image_message(pixels, encoding, padding=padding, store=store)
    found = image_of(sent(message, store=store))
    assert found.dtype == np.uint8 and found.flags.c_contiguous
    np.testing.assert_array_equal(found, expected)


def test_every_encoding_is_tested():
    assert set(ENCODINGS) == {
        "rgb8", "bgr8", "rgba8", "bgra8", "mono8", "8UC1", "mono16", "16UC1"
    }  # fmt: skip


@pytest.mark.parametrize("encoding", ["mono16", "16UC1"])
def test_the_big_end_may_come_first(encoding):
    found = image_of(sent(image_message(DEEP, encoding, big=True, padding=4)))
    np.testing.assert_array_equal(found, DEEP >> 8)


def test_the_last_row_may_come_without_its_padding():
    found = image_of(sent(image_message(RGB, padding=9, cut=9)))
    np.testing.assert_array_equal(found, RGB)
    with pytest.raises(ImageError, match="fewer bytes than its size needs"):
        image_of(sent(image_message(RGB, padding=9, cut=10)))


@given(
    height=st.integers(0, 2**32 - 1),
    width=st.integers(0, 2**32 - 1),
    step=st.integers(0, 2**32 - 1),
    encoding=st.sampled_from([*ENCODINGS, "bayer_rggb8", ""]),
    size=st.integers(0, 64),
)
def test_fields_that_contradict_each_other_are_refused(height, width, step, encoding, size):
    message = SimpleNamespace(
        height=height, width=width, step=step, encoding=encoding, is_bigendian=1, data=bytes(size)
    )
    try:
        found = image_of(message)
    except ImageError:
        return
    # All of it lies within the bytes that came.
    assert found.shape[:2] == (height, width) and height * width <= size


def test_data_may_be_what_rclpy_has():
    message = image_message(RGB)
    message.data = array("B", RGB.tobytes())
    np.testing.assert_array_equal(image_of(message), RGB)


@pytest.mark.parametrize("store", [ROS1, ROS2], ids=["ros1", "ros2"])
@pytest.mark.parametrize(("form", "tolerance"), [("jpeg", 40), ("png", 0)])
def test_compressed_images_are_decoded_by_the_session(form, tolerance, store):
    pixels = np.repeat(np.repeat(RGB, 8, 0), 8, 1)
    message = sent(compressed_message(pixels, form, store=store), COMPRESSED, store)
    message.format = f"rgb8; {form} compressed bgr8"
    decoded = np.asarray(load_image(image_of(message), pad_color=(0, 0, 0)))
    middle = decoded[4::8, 4::8].astype(int) - RGB
    assert np.abs(middle).max() <= tolerance or np.abs(middle).mean() < tolerance / 4


def test_what_is_no_image_file_is_refused_with_its_format():
    depth = compressed_message(np.repeat(GRAY[..., None], 3, 2), "png")
    depth.format = "16UC1; compressedDepth png"
    with pytest.raises(ImageError, match="compressedDepth"):
        image_of(depth)
    text = compressed_message(RGB)
    text.data = np.frombuffer(b"no image at all", np.uint8)
    with pytest.raises(ImageError, match=r"the message \(jpeg\)"):
        load_image(image_of(text), pad_color=(0, 0, 0))
