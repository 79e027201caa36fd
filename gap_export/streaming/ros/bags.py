"""Bags of ROS 1 and ROS 2, read and written by rosbags."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rosbags.highlevel import AnyReader
from rosbags.rosbag1 import Writer as Ros1Writer
from rosbags.rosbag2 import StoragePlugin
from rosbags.rosbag2 import Writer as Ros2Writer
from rosbags.typesys import Stores, get_types_from_msg, get_typestore

from gap_export.errors import ImageError, OutputError, UsageError
from gap_export.outputs import OutputRule
from gap_export.runtime.session import GroundingSession
from gap_export.streaming.answering import FrameAnswer, answer_frames
from gap_export.streaming.ros.detections import (
    DETECTIONS_TYPE,
    ROS1_DEFINITIONS,
    ROS2_DEFINITIONS,
    build_detections,
    build_ros1_detections,
)
from gap_export.streaming.ros.images import image_of
from gap_export.streaming.sources import SourceFrame

BAG = "the bag"
IMAGE_TYPES = ("sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage")
_STRING = "std_msgs/msg/String"


@dataclass(frozen=True, kw_only=True)
class BagTopics:
    """Which topics of a bag are read and written.

    Attributes:
        images: Of the images; None for the only one that has images.
        detections: Of the detections that are written.
        copies: Write all messages of the bag as well, as they are.
    """

    images: str | None = None
    detections: str = "/gap_export/detections"
    copies: bool = True


def answer_bag(
    session: GroundingSession,
    bag: Path,
    out: Path,
    expressions: Sequence[str],
    *,
    topics: BagTopics,
    every: int = 1,
    same_frame: float | None = None,
    rule: OutputRule,
) -> Generator[FrameAnswer]:
    """Read a bag, and write one of the same form with detections; answers as they are found.

    The new bag is in its place when all is done, and not before. A skipped image has the
    detections of the one that it is the same as.

    Args:
        session: Answers.
        bag: A ``.bag`` file of ROS 1, or of ROS 2 a folder, an ``.mcap`` or a ``.db3`` file.
        out: What is written; nothing of that name may be there.
        expressions: What to look for.
        topics: Which topics.
        every: Ask about the first of every N images.
        same_frame: See :func:`answer_frames`.
        rule: What the new bag must stay away from.

    Raises:
        UsageError: no bag, one that is damaged, no such topic, or several with images.
        OutputError: the place is taken, or cannot be written.
    """
    check_bag_output(out, bag, rule)
    with _opened(bag) as reader:
        images = _image_topic(reader, topics.images)
        if any(each.topic == topics.detections for each in reader.connections):
            raise UsageError(
                "the bag has a topic of that name", seen=topics.detections, fix="name another one"
            )
        with _new_bag(reader, out) as writer:
            write = _detections_writer(reader, writer, topics.detections, expressions)
            # Of the image that is asked about.
            now: list[tuple[Any, int]] = []
            frames = _frames(reader, writer, images, now, topics=topics, every=every)
            answers = answer_frames(
                session, frames, expressions, same_frame=same_frame, image_frame="raw"
            )
            for answer in answers:
                if answer.error is None:
                    write(*now[-1], answer.groundings)
                yield answer


def check_bag_output(out: Path, bag: Path, rule: OutputRule) -> None:
    """Refuse a place where no new bag can be written.

    Raises:
        OutputError: it is taken, of another form, inside a bundle, or in no folder.
    """
    is_ros1 = bag.suffix == ".bag"
    if is_ros1 != (out.suffix == ".bag"):
        raise OutputError(
            "a bag is written in the form of the one that is read",
            seen=out,
            allowed="a name that ends in .bag for one of ROS 1, and in nothing of that kind else",
        )
    if out.is_symlink() or out.exists():
        raise OutputError("there is something at the bag's place", seen=out, fix="name another one")
    rule.check_outside(BAG, out)
    rule.check({BAG: out})


@contextmanager
def _opened(bag: Path) -> Iterator[AnyReader]:
    # Bags of ROS 2 before Iron hold no definitions, unless they are of MCAP.
    known = get_typestore(Stores.ROS2_HUMBLE)
    with _reading(bag):
        reader = AnyReader([bag], default_typestore=known)
        reader.open()
    try:
        yield reader
    finally:
        reader.close()


@contextmanager
def _reading(bag: Any) -> Iterator[None]:
    """What rosbags says of a damaged bag, as one clear error."""
    try:
        yield
    except Exception as err:
        # Its own errors, and those of its libraries of JSON, YAML, SQLite and compression.
        raise UsageError(
            "the bag cannot be read",
            seen=f"{bag}: {str(err) or type(err).__name__}",
            allowed="a .bag file of ROS 1, or of ROS 2 a bag's folder, an .mcap or a .db3 file",
        ) from err


def _image_topic(reader: AnyReader, wanted: str | None) -> str:
    there = sorted({one.topic for one in reader.connections if one.msgtype in IMAGE_TYPES})
    if wanted is None and len(there) == 1:
        return there[0]
    if wanted in there:
        return str(wanted)
    if not there:
        raise UsageError("the bag holds no images", allowed=" or ".join(IMAGE_TYPES))
    raise UsageError(
        "several topics hold images" if wanted is None else "no images of such a topic",
        seen=wanted,
        allowed=", ".join(there),
        fix="name one with --topic",
    )


@contextmanager
def _new_bag(reader: AnyReader, out: Path) -> Iterator[Any]:
    """A bag that is written beside its place, and moved there when all went well."""
    # The files of a bag are named after its folder, which therefore has its name from the start.
    beside = out.absolute().parent / f".gap-export-{secrets.token_hex(8)}.part"
    try:
        beside.mkdir()
        with _writer(reader, beside / out.name) as writer:
            yield writer
        (beside / out.name).rename(out)
    except OSError as err:
        raise OutputError(
            "the bag cannot be written", seen=f"{out}: {err.strerror or err}", fix="make room"
        ) from err
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _writer(reader: AnyReader, place: Path) -> Any:
    if not reader.is2:
        return Ros1Writer(place)
    is_mcap = any(path.suffix == ".mcap" for path in _files_of(reader.paths[0]))
    plugin = StoragePlugin.MCAP if is_mcap else StoragePlugin.SQLITE3
    # Version 8 is read by Humble, and by what came later.
    return Ros2Writer(place, version=8, storage_plugin=plugin)


def _files_of(place: Any) -> list[Path]:
    path = Path(str(place))
    return list(path.iterdir()) if path.is_dir() else [path]


def _detections_writer(
    reader: AnyReader, writer: Any, topic: str, expressions: Sequence[str]
) -> Callable[[Any, int, Any], None]:
    """What writes the detections of an image, by its header and its time in the bag."""
    store = get_typestore(Stores.ROS2_HUMBLE if reader.is2 else Stores.ROS1_NOETIC)
    definitions = ROS2_DEFINITIONS if reader.is2 else ROS1_DEFINITIONS
    for name, text in definitions.items():
        store.register(get_types_from_msg(text, name))
    connection = writer.add_connection(topic, DETECTIONS_TYPE, typestore=store)
    if reader.is2:

        def write(header: Any, time_ns: int, groundings: Any) -> None:
            message = build_detections(store.types.__getitem__, header, groundings)
            writer.write(connection, time_ns, store.serialize_cdr(message, DETECTIONS_TYPE))

        return write
    # There a class is a number: what the numbers mean stands at the beginning.
    named = writer.add_connection(f"{topic}/expressions", _STRING, typestore=store)
    listed = store.types[_STRING](data=json.dumps(list(expressions)))
    start = reader.start_time
    writer.write(named, start, store.serialize_ros1(listed, _STRING))

    def write_ros1(header: Any, time_ns: int, groundings: Any) -> None:
        message = build_ros1_detections(store.types.__getitem__, header, groundings)
        writer.write(connection, time_ns, store.serialize_ros1(message, DETECTIONS_TYPE))

    return write_ros1


def _frames(
    reader: AnyReader,
    writer: Any,
    images: str,
    headers: list[tuple[Any, int]],
    *,
    topics: BagTopics,
    every: int,
) -> Iterator[SourceFrame]:
    """The images, in order; each message is copied when it is passed."""
    copies = {}
    if topics.copies:
        copies = {one.id: _copied(reader, writer, one) for one in reader.connections}
    wanted = [one for one in reader.connections if topics.copies or one.topic == images]
    index = -1
    first: int | None = None
    for connection, time_ns, data in _messages(reader, wanted):
        if topics.copies:
            writer.write(copies[connection.id], time_ns, data)
        if connection.topic != images or connection.msgtype not in IMAGE_TYPES:
            continue
        index += 1
        if index % every:
            continue
        with _reading(reader.paths[0]):
            message: Any = reader.deserialize(data, connection.msgtype)
        stamp = message.header.stamp
        stamp_ns = stamp.sec * 1_000_000_000 + stamp.nanosec
        first = stamp_ns if first is None else first
        headers[:] = [(message.header, time_ns)]
        try:
            image, error = image_of(message), None
        except ImageError as err:
            image, error = None, str(err)
        yield SourceFrame(
            index=index,
            time_s=(stamp_ns - first) / 1e9,
            name=images,
            image=image,
            error=error,
        )


def _messages(reader: AnyReader, wanted: Sequence[Any]) -> Iterator[tuple[Any, int, Any]]:
    messages = reader.messages(wanted)
    while True:
        with _reading(reader.paths[0]):
            found = next(messages, None)
        if found is None:
            return
        yield found


def _copied(reader: AnyReader, writer: Any, connection: Any) -> Any:
    """The same topic in the new bag.

    Raises:
        UsageError: the bag does not define its messages, and they are none of ROS's own.
    """
    there = connection.ext
    given: dict[str, Any] = {"msgdef": connection.msgdef.data, "rihs01": connection.digest}
    if not reader.is2:
        given = {"msgdef": connection.msgdef.data, "md5sum": connection.digest}
        given |= {"callerid": there.callerid, "latching": there.latching}
    elif not (connection.msgdef.data and connection.digest):
        if connection.msgtype not in reader.typestore.types:
            raise UsageError(
                "the bag does not define the messages of a topic, so that it cannot be copied",
                seen=f"{connection.topic}: {connection.msgtype}",
                fix="leave the bag's messages out with --detections-only",
            )
        given = {"typestore": reader.typestore}
    if reader.is2:
        given["serialization_format"] = there.serialization_format
        given["offered_qos_profiles"] = there.offered_qos_profiles
    return writer.add_connection(connection.topic, connection.msgtype, **given)
