"""Small data sets in the layouts of the real ones, written as their authors' tools wrote them."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

SIZE = (64, 48)
TREE = "data/images/mscoco/images/train2014"


def coco_name(number: int) -> str:
    """The name of an image of COCO."""
    return f"COCO_train2014_{number:012d}.jpg"


def save_image(path: Path, size: tuple[int, int] = SIZE) -> Path:
    """A grey image; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (90, 90, 90)).save(path)
    return path


def reference(
    number: int, image: int, split: str, *sentences: str, ann: int | None = None
) -> dict[str, Any]:
    """One reference; its sentences are numbered 10 * number, 10 * number + 1, ..."""
    object_id = number + 500 if ann is None else ann
    return {
        "ref_id": number,
        "ann_id": object_id,
        "image_id": image,
        "category_id": 1,
        "split": split,
        "file_name": f"COCO_train2014_{image:012d}_{object_id}.jpg",
        "sent_ids": [10 * number + n for n in range(len(sentences))],
        "sentences": [
            {
                "sent_id": 10 * number + n,
                "sent": text,
                "raw": text.upper(),
                "tokens": text.split(),
            }
            for n, text in enumerate(sentences)
        ],
    }


def instances(boxes: dict[int, tuple[int, list[float]]]) -> dict[str, Any]:
    """``instances.json``: the image and the box [x, y, w, h] of each object."""
    images = sorted({image for image, _ in boxes.values()})
    return {
        "info": {"description": "made for a test"},
        "images": [
            {"id": n, "file_name": coco_name(n), "width": SIZE[0], "height": SIZE[1]}
            for n in images
        ],
        "annotations": [
            {"id": number, "image_id": image, "bbox": box, "category_id": 1, "iscrowd": 0}
            for number, (image, box) in boxes.items()
        ],
        "categories": [{"id": 1, "name": "thing"}],
    }


REFS = [
    reference(1, 7, "val", "left man", "man on the left"),
    reference(2, 8, "val", "red bus"),
    reference(3, 7, "val", "right man"),
    reference(4, 9, "testA", "child"),
]
BOXES = {
    501: (7, [4.0, 5.0, 10.0, 20.0]),
    502: (8, [0.0, 0.0, 64.0, 48.0]),
    503: (7, [30.5, 5.25, 8.0, 9.5]),
    504: (9, [1.0, 2.0, 3.0, 4.0]),
}


def write_refer(
    root: Path,
    *,
    folder: str = "data/refcoco",
    split_by: str = "unc",
    refs: Any = REFS,
    boxes: dict[int, tuple[int, list[float]]] = BOXES,
    images: Sequence[int] = (7, 8, 9),
) -> Path:
    """The tree of the refer repository; returns ROOT."""
    place = root / folder
    place.mkdir(parents=True, exist_ok=True)
    (place / f"refs({split_by}).p").write_bytes(pickle.dumps(refs, protocol=2))
    (place / "instances.json").write_text(json.dumps(instances(boxes)))
    for number in images:
        save_image(root / TREE / coco_name(number))
    return root


def python2_pickle(value: Any, protocol: int) -> bytes:
    """A pickle as Python 2 wrote it, whose texts are byte strings, in protocol 0 or 2."""
    head = b"\x80\x02" if protocol == 2 else b""
    return head + _python2(value, protocol) + b"."


def _python2(value: Any, protocol: int) -> bytes:
    if isinstance(value, list):
        items = b"".join(_python2(item, protocol) + b"a" for item in value)
        return (b"]" if protocol == 2 else b"(l") + items
    if isinstance(value, dict):
        pairs = b"".join(
            _python2(key, protocol) + _python2(item, protocol) + b"s" for key, item in value.items()
        )
        return (b"}" if protocol == 2 else b"(d") + pairs
    if isinstance(value, int):
        number = value.to_bytes(4, "little", signed=True)
        return b"J" + number if protocol == 2 else b"I%d\n" % value
    raw: bytes = value.encode()
    if protocol == 2:
        return b"U" + bytes([len(raw)]) + raw
    return b"S" + repr(raw)[1:].encode() + b"\n"
