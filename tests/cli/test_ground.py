"""``gap-export ground``."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from gap_export.spec.manifest import EngineLimits
from tests.runtime.backends.fake_tensorrt import copy_bundle, use_fakes, write_engines

EXPRESSION = "the red circle"


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image.png"
    pixels = np.random.default_rng(0).integers(0, 255, (24, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_stdout_is_one_json_document(run_cli, tiny_bundle, image):
    outcome = run_cli("ground", tiny_bundle, image, EXPRESSION)
    assert outcome.code == 0
    assert outcome.plain["image"] == str(image)
    assert outcome.plain["expression"] == EXPRESSION
    assert outcome.plain["image_size"] == [40, 24]
    assert len(outcome.plain["keep_indices"]) == 5
    assert outcome.plain["timings_ms"]["total"] > 0
    # Random weights do not speak in boxes: that is worth a warning, and no failure.
    if outcome.plain["box"] is None:
        assert outcome.err.count("warning: the answer holds no box") == 1


def test_provider_threads_and_verify_are_taken(run_cli, tiny_bundle, image):
    flags = ["--provider", "CPUExecutionProvider", "--threads", "1", "--verify", "full"]
    plain = run_cli("ground", tiny_bundle, image, EXPRESSION, "-q", *flags).plain
    assert (
        plain["token_ids"] == run_cli("ground", tiny_bundle, image, EXPRESSION).plain["token_ids"]
    )


def test_backend_trt_gives_the_same_answer(run_cli, tiny_bundle, image, tmp_path, monkeypatch):
    bundle = copy_bundle(tiny_bundle, tmp_path / "bundle")
    limits = EngineLimits(max_prompt=24, max_new_tokens=8, max_batch=1, max_images=1)
    write_engines(bundle, limits)
    device = use_fakes(monkeypatch)
    flags = ["--backend", "trt", "--engines", "desktop-sm89"]
    outcome = run_cli("ground", bundle.path, image, EXPRESSION, *flags)
    assert outcome.code == 0
    assert outcome.plain["backend"].startswith("TensorRT ")
    assert device.calls and device.is_clean
    expected = run_cli("ground", bundle.path, image, EXPRESSION).plain
    assert outcome.plain["token_ids"] == expected["token_ids"]


def test_save_writes_an_image_and_says_so_on_stderr(run_cli, tiny_bundle, image, tmp_path):
    out = tmp_path / "found.png"
    outcome = run_cli("ground", tiny_bundle, image, EXPRESSION, "--save", out)
    assert outcome.code == 0
    assert f"wrote {out}\n" in outcome.err
    with Image.open(out) as saved:
        assert saved.width > 40


def test_a_damaged_image_is_refused_unless_it_is_allowed(run_cli, tiny_bundle, tmp_path):
    path = tmp_path / "damaged.jpg"
    Image.new("RGB", (64, 48), "red").save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-12] + whole[-2:])
    outcome = run_cli("ground", tiny_bundle, path, EXPRESSION)
    assert outcome.code == 2
    assert "damaged or not complete" in outcome.err and "--allow-damaged" in outcome.err
    assert not outcome.out
    out = tmp_path / "found.png"
    outcome = run_cli("ground", tiny_bundle, path, EXPRESSION, "--allow-damaged", "--save", out)
    assert outcome.code == 0
    assert "warning: the image is damaged, and was used all the same: " in outcome.err
    assert "the image is damaged" in outcome.plain["warnings"][0]
    assert out.exists()


def test_save_replaces_another_image_only_with_force(run_cli, tiny_bundle, image, tmp_path):
    photo = tmp_path / "photo.png"
    Image.new("RGB", (30, 20)).save(photo)
    before = photo.read_bytes()
    ground = ["ground", tiny_bundle, image, EXPRESSION, "--save", photo]
    outcome = run_cli(*ground)
    assert (outcome.code, outcome.out) == (2, "")
    assert "that gap-export did not write" in outcome.err
    assert photo.read_bytes() == before
    assert run_cli(*ground, "--force").code == 0
    assert run_cli(*ground).code == 0
    assert run_cli(*ground[:-2], "--force").code == 2
