"""What a user may name, and what is delivered of it."""

from __future__ import annotations

import av
import numpy as np
import pytest
from PIL import Image

from gap_export.errors import MissingDependencyError, UsageError
from gap_export.runtime.images.image import load_image
from gap_export.streaming.sources import find_source
from tests.streaming.videos import COLORS, rtsp_server, write_video


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("video") / "five.mp4")


def colors_of(frames):
    """The middle of each frame."""
    return [tuple(int(value) for value in frame.image[24, 32]) for frame in frames]


def is_near(found, expected):
    return np.allclose(found, expected, atol=12)


def test_a_video_has_its_frames_with_their_times(video):
    source = find_source(str(video))
    assert (source.is_live, source.has_times, source.files) == (False, True, (video,))
    frames = list(source.frames(1, False))
    assert [frame.index for frame in frames] == [0, 1, 2, 3, 4]
    assert [frame.time_s for frame in frames] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert frames[0].image.shape == (48, 64, 3)
    assert is_near(colors_of(frames), COLORS)


def test_the_first_of_every_two_frames(video):
    frames = list(find_source(str(video)).frames(2, False))
    assert [frame.index for frame in frames] == [0, 2, 4]
    assert is_near(colors_of(frames), COLORS[::2])


def test_files_of_a_folder_come_in_the_order_people_count_in(tmp_path):
    for name in ("frame10.png", "frame2.PNG", "frame1.jpg"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "sub").mkdir()
    source = find_source(str(tmp_path))
    names = [path.name for path in source.files]
    assert names == ["frame1.jpg", "frame2.PNG", "frame10.png"]
    assert not source.has_times
    frames = list(source.frames(2, False))
    assert [frame.index for frame in frames] == [0, 2]
    assert load_image(frames[1].image, pad_color=(0, 0, 0)).size == (4, 4)


def test_a_pattern_takes_what_it_matches(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b.png", "deep/a.png", "a.jpg"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    found = find_source(f"{tmp_path}/**/*.png").files
    assert sorted(path.name for path in found) == ["a.png", "b.png"]


def test_a_file_whose_name_is_a_pattern_or_a_number_is_that_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("[1].png", "0"):
        Image.new("RGB", (4, 4)).save(name, format="PNG")
        assert find_source(name) is None


@pytest.mark.parametrize("text", ["image.png", "nowhere.png", "a\0b", "x" * 5000, "-1", "\u0663"])
def test_all_else_is_meant_as_one_image(text):
    assert find_source(text) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("http://127.0.0.1/a.png", "no frames are read from such an address"),
        ("file:///etc/passwd", "no frames are read from such an address"),
        ("nothing/*.png", "no file matches the pattern"),
    ],
)
def test_what_is_no_source_is_refused(text, words):
    with pytest.raises(UsageError, match=words):
        find_source(text)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no image in the folder"):
        find_source(str(tmp_path))


def test_a_missing_package_is_named_with_its_extra(video, monkeypatch):
    monkeypatch.setattr("gap_export.extras.missing_modules", lambda extra: ["av"])
    with pytest.raises(MissingDependencyError, match=r"\[stream\]"):
        find_source(str(video))


def test_a_camera_is_video4linux_of_that_number(video, monkeypatch):
    opened = []
    open_real = av.open

    def open_instead(place, **options):
        opened.append((place, options.pop("format")))
        return open_real(str(video), **options)

    source = find_source("3")
    assert (source.name, source.is_live) == ("camera 3", True)
    monkeypatch.setattr(av, "open", open_instead)
    assert is_near(colors_of(source.frames(1, False)), COLORS)
    assert opened == [("/dev/video3", "v4l2")]


@pytest.mark.parametrize("place", ["77", "rtsp://user:secret@127.0.0.1:1/x"])
def test_a_live_source_that_is_not_there_is_one_clear_error(place):
    source = find_source(place)
    with pytest.raises(UsageError, match="the source cannot be opened") as failed:
        next(source.frames(1, False))
    assert "secret" not in str(failed.value) + source.name


def test_a_file_that_is_no_video_is_one_clear_error(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_text("no video")
    with pytest.raises(UsageError, match="the source cannot be opened"):
        next(find_source(str(path)).frames(1, False))


def test_frames_come_from_a_server_of_rtsp():
    with rtsp_server() as address:
        source = find_source(address)
        assert source.is_live and "secret" not in source.name
        found = list(source.frames(1, False))
    assert is_near(colors_of(found), COLORS)


def test_a_turned_video_is_delivered_as_displayed(tmp_path):
    path = tmp_path / "turned.mp4"
    half = np.zeros((48, 64, 3), np.uint8)
    half[:, :32] = 250
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(half, format="rgb24")))
        container.mux(stream.encode(None))
    turn_clockwise(path)
    (frame,) = find_source(str(path)).frames(1, False)
    # A quarter clockwise brings the left side up.
    assert frame.image.shape == (64, 48, 3)
    assert frame.image[:28].min() > 200 and frame.image[36:].max() < 50


def turn_clockwise(path):
    """Write the matrix of a quarter turn into the track's header (ISO 14496-12, 8.3.2)."""
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 4 + 40
    one, zero, minus = 0x00010000, 0, 0xFFFF0000
    matrix = (zero, one, zero, minus, zero, zero, zero, zero, 0x40000000)
    data[place : place + 36] = b"".join(value.to_bytes(4, "big") for value in matrix)
    path.write_bytes(data)


def test_a_frame_that_is_too_large_is_refused(video, monkeypatch):
    monkeypatch.setattr("gap_export.streaming.video.MAX_PIXELS", 64 * 48 - 1)
    with pytest.raises(UsageError, match="frames are too large"):
        next(find_source(str(video)).frames(1, False))


def test_damaged_frames_are_named_and_not_made_up(tmp_path):
    path = write_video(tmp_path / "damaged.avi")
    data = bytearray(path.read_bytes())
    # What is left of the first JPEG frame ends before its pixels do.
    end = data.index(b"\xff\xd9")
    data[end - 12 : end] = bytes(12)
    path.write_bytes(data)
    source = find_source(str(path))
    first, *others = source.frames(1, False)
    assert first.image is None and "the frame is damaged" in first.error
    assert is_near(colors_of(others), COLORS[1:])
    assert [frame.error for frame in source.frames(1, True)] == [None] * 5
