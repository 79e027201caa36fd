"""The node of dora: with its own stand-in, and in a real dataflow."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import yaml
from PIL import Image

from gap_export.errors import ImageError
from gap_export.runtime.grounding import ScoredBox
from gap_export.runtime.session import GroundingSession
from gap_export.streaming import dora_node
from tests.programs import run_program

PIXELS = np.random.default_rng(0).integers(0, 255, (24, 40, 3), dtype=np.uint8)
SIZE = {"width": 40, "height": 24}


class Asked:
    """A session that notes what it was asked, and finds one box."""

    def __init__(self):
        self.questions = []

    def ground_batch(self, image, expressions, *, frame):
        self.questions.append((image, tuple(expressions), frame))
        box = ScoredBox(box=(1.0, 2.0, 3.0, 4.0), score=0.5, found=None)
        return [type("Found", (), {"expression": one, "boxes": (box,)}) for one in expressions]


def image_input(pixels=PIXELS, **metadata):
    value = pyarrow.array(pixels.reshape(-1))
    return {"type": "INPUT", "id": "image", "value": value, "metadata": {**SIZE, **metadata}}


def answers_of(*events, expressions=("the star",)):
    testing = pytest.importorskip("dora.testing", reason="dora-rs is not installed")
    node, session = testing.MockNode(list(events)), Asked()
    dora_node.run(node, session, expressions)
    return session, [one.to_pylist()[0] for one in node.outputs.get("boxes2d", [])]


def test_boxes_are_sent_in_the_form_of_dora():
    session, (boxes,) = answers_of(image_input(encoding="rgb8"))
    assert boxes == {"bbox": [1.0, 2.0, 3.0, 4.0], "conf": [0.5], "labels": ["the star"]}
    np.testing.assert_array_equal(session.questions[0][0], PIXELS)


def test_expressions_are_replaced_and_without_any_images_are_left_alone():
    words = pyarrow.array(["the mug", " ", "the pen"])
    session, answers = answers_of(
        image_input(encoding="rgb8"),
        {"type": "INPUT", "id": "expressions", "value": words, "metadata": {}},
        image_input(encoding="bgr8"),
        expressions=(),
    )
    assert [one["labels"] for one in answers] == [["the mug", "the pen"]]
    np.testing.assert_array_equal(session.questions[0][0], PIXELS[..., ::-1])


def test_an_image_that_cannot_be_used_is_logged_and_the_next_is_answered(caplog):
    _, answers = answers_of(
        image_input(encoding="yuv422"),
        image_input(encoding="rgb8", width=41),
        image_input(encoding="rgb8"),
    )
    assert len(answers) == 1
    assert ["not read" in text or "fewer bytes" in text for text in caplog.messages] == [True] * 2


def test_compressed_images_are_decoded_by_the_session():
    stream = io.BytesIO()
    Image.fromarray(PIXELS).save(stream, format="PNG")
    value = np.frombuffer(stream.getvalue(), np.uint8)
    image = dora_node.image_of_event(value, {"encoding": "png"})
    assert image.data == stream.getvalue()
    with pytest.raises(ImageError, match="encoding"):
        dora_node.image_of_event(value, {})


def test_a_wrong_command_line_is_one_line(capsys):
    assert dora_node.main([]) == 2
    assert capsys.readouterr().err.startswith("error: name the bundle")


SENDER = """
import time, numpy as np, pyarrow as pa
from dora import Node
node = Node()
pixels = np.load("pixels.npy")
node.send_output("words", pa.array(["the red circle", "the star"]))
for number in range(3):
    # One at a time: the queue of the node that answers has room for one.
    time.sleep(1.0)
    told = {"width": 40, "height": 24, "encoding": "rgb8", "number": number}
    node.send_output("image", pa.array(pixels.reshape(-1)), told)
time.sleep(1.0)
"""
RECEIVER = """
import json
from dora import Node
found = []
for event in Node():
    if event["type"] == "INPUT":
        boxes = event["value"].to_pylist()[0]
        found.append({"number": event["metadata"]["number"], **boxes})
open("found.json", "w").write(json.dumps(found))
"""


@pytest.mark.full
def test_a_real_dataflow_carries_images_and_boxes(demo_bundle, tmp_path):
    dora = shutil.which("dora", path=str(Path(sys.executable).parent)) or shutil.which("dora")
    if dora is None:
        pytest.skip("dora-rs-cli is not installed, which runs dataflows")
    (tmp_path / "sender.py").write_text(SENDER)
    (tmp_path / "receiver.py").write_text(RECEIVER)
    np.save(tmp_path / "pixels.npy", PIXELS)
    arguments = f"-m gap_export.streaming.dora_node {demo_bundle}"
    answers = {
        "id": "answers",
        "path": sys.executable,
        "args": arguments,
        "inputs": {
            "image": {"source": "sender/image", "queue_size": 1},
            "expressions": "sender/words",
        },
        "outputs": ["boxes2d"],
    }
    sender = {
        "id": "sender", "path": sys.executable, "args": "sender.py", "outputs": ["image", "words"]
    }  # fmt: skip
    receiver = {
        "id": "receiver", "path": sys.executable, "args": "receiver.py",
        "inputs": {"boxes": "answers/boxes2d"},
    }  # fmt: skip
    (tmp_path / "flow.yml").write_text(yaml.safe_dump({"nodes": [sender, answers, receiver]}))
    done = run_program([dora, "run", "flow.yml"], cwd=tmp_path, seconds=120)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert [one["number"] for one in found] == [0, 1, 2]
    with GroundingSession.open(demo_bundle) as session:
        expected = session.ground_batch(PIXELS, ["the red circle", "the star"])
    for one in found:
        assert one["labels"] == ["the red circle", "the star"]
        assert one["bbox"] == [value for each in expected for value in each.box]
        assert one["conf"] == pytest.approx([each.score for each in expected], rel=1e-5)
