from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from gap_export.errors import ImageError
from gap_export.evaluation.questions import ImageSource
from gap_export.runtime.images.image import load_image
from tests.evaluation.datasets.builders import save_image


def test_file_is_left_to_the_session(tmp_path: Path) -> None:
    path = tmp_path / "gone.png"
    assert ImageSource(path=path).load() == path


def test_encoded_bytes_become_the_image(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (5, 4), (10, 20, 30)).save(buffer, "PNG")
    loaded = load_image(ImageSource(encoded=buffer.getvalue()).load(), pad_color=(0, 0, 0))
    assert loaded.size == (5, 4)
    assert loaded.getpixel((0, 0)) == (10, 20, 30)


def test_encoded_bytes_of_an_unlisted_format_are_refused() -> None:
    source = ImageSource(encoded=b"%!PS-Adobe-3.0 EPSF-3.0\n")
    with pytest.raises(ImageError, match="not an image that can be read"):
        load_image(source.load(), pad_color=(0, 0, 0))


@pytest.mark.parametrize("cut", [0, 10, 60])
def test_encoded_bytes_cut_off_are_refused(tmp_path: Path, cut: int) -> None:
    raw = save_image(tmp_path / "a.png").read_bytes()[:cut]
    with pytest.raises(ImageError):
        load_image(ImageSource(encoded=raw).load(), pad_color=(0, 0, 0))


def test_two_sources_are_a_bug() -> None:
    with pytest.raises(AssertionError):
        ImageSource(path=Path("a"), encoded=b"a")
    with pytest.raises(AssertionError):
        ImageSource()
