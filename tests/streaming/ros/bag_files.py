"""Messages and bags for tests, by rosbags' own definitions and writers."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rosbags.rosbag1 import Writer as Ros1Writer
from rosbags.rosbag2 import StoragePlugin
from rosbags.rosbag2 import Writer as Ros2Writer
from rosbags.typesys import Stores, get_typestore

ROS2 = get_typestore(Stores.ROS2_HUMBLE)
ROS1 = get_typestore(Stores.ROS1_NOETIC)
IMAGE, COMPRESSED = "sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage"
STAMPS = ((1_700_000_000, 5), (1_700_000_000, 100_000_005), (1_700_000_001, 0))


def header(store=ROS2, stamp=STAMPS[0], frame_id="camera_optical") -> Any:
    time = store.types["builtin_interfaces/msg/Time"](sec=stamp[0], nanosec=stamp[1])
    given = {"stamp": time, "frame_id": frame_id}
    if store is ROS1:
        given["seq"] = 7
    return store.types["std_msgs/msg/Header"](**given)


def image_message(
    pixels: np.ndarray, encoding="rgb8", *, store=ROS2, padding=0, big=False, cut=0, **given: Any
) -> Any:
    """``sensor_msgs/Image`` of rows of pixels, with bytes of padding at the end of each."""
    height, width = pixels.shape[:2]
    rows = pixels.reshape(height, -1)
    if rows.dtype == np.uint16:
        rows = rows.astype(">u2" if big else "<u2").view(np.uint8)
    rows = np.pad(rows, ((0, 0), (0, padding)), constant_values=99)
    data = rows.reshape(-1)
    return store.types[IMAGE](
        header=header(store, **given),
        height=height,
        width=width,
        encoding=encoding,
        is_bigendian=int(big),
        step=rows.shape[1],
        data=data[: data.size - cut],
    )


def compressed_message(pixels: np.ndarray, form="jpeg", *, store=ROS2, **given: Any) -> Any:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format=form.upper(), quality=95)
    data = np.frombuffer(stream.getvalue(), np.uint8)
    return store.types[COMPRESSED](header=header(store, **given), format=form, data=data)


def scene(shift=0) -> np.ndarray:
    pixels = np.full((24, 32, 3), 90, np.uint8)
    pixels[4:12, 4 + shift : 12 + shift] = (250, 40, 40)
    return pixels


def write_bag(path: Path, form: str, *, compressed=False, others=()) -> Path:
    """Three images, the second of them like the first, and a message of text after each.

    Args:
        path: Of the bag, without a suffix.
        form: ``ros1``, ``sqlite3`` or ``mcap``.
        compressed: Images as JPEG.
        others: Topics with one image each besides.
    """
    store = ROS1 if form == "ros1" else ROS2
    serialize = store.serialize_ros1 if form == "ros1" else store.serialize_cdr
    if form == "ros1":
        path = path.with_suffix(".bag")
        writer: Any = Ros1Writer(path)
    else:
        plugin = StoragePlugin.MCAP if form == "mcap" else StoragePlugin.SQLITE3
        writer = Ros2Writer(path, version=8, storage_plugin=plugin)
    kind = COMPRESSED if compressed else IMAGE
    make = compressed_message if compressed else image_message
    text = "std_msgs/msg/String"
    with writer:
        images = writer.add_connection("/camera/image", kind, typestore=store)
        words = writer.add_connection("/words", text, typestore=store)
        for number, stamp in enumerate(STAMPS):
            time_ns = 1_800_000_000_000_000_000 + number
            message = make(scene(0 if number < 2 else 15), store=store, stamp=stamp)
            writer.write(images, time_ns, serialize(message, kind))
            writer.write(words, time_ns, serialize(store.types[text](data=f"word {number}"), text))
        for topic in others:
            other = writer.add_connection(topic, kind, typestore=store)
            writer.write(other, time_ns, serialize(make(scene(), store=store), kind))
    return path
