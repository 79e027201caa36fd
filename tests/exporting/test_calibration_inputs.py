"""What AWQ is calibrated with is what the decoder is fed, and costs no weight of the decoder."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gap_export.bundle import open_bundle
from gap_export.checkpoint.find.source import Checkpoint
from gap_export.errors import ExpressionError
from gap_export.exporting.calibration import calibrate, calibration_inputs, scale_decoder
from gap_export.exporting.quantization import loaded
from gap_export.exporting.torch_backend import TorchBackend
from gap_export.families import build_reference
from gap_export.parity.replay import RecordingBackend
from gap_export.progress import SilentProgress
from gap_export.runtime.session import GroundingSession
from gap_export.spec.positions import gap_remap
from gap_export.spec.recipe import load_recipe
from gap_export.spec.tolerances import TOLERANCES

IMAGE = np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8)
QUESTIONS = [(IMAGE, "the red circle"), (IMAGE, "the small blue square left-most")]


@pytest.fixture(params=["float32", "float16"])
def references(request, tiny_checkpoint, tiny_text_bundle):
    """The manifest of a bundle whose pruner reads the text, and its model: meta, and loaded."""
    manifest = open_bundle(tiny_text_bundle).manifest
    recipe = load_recipe(tiny_checkpoint / "recipe.yaml")
    checkpoint = Checkpoint.of(tiny_checkpoint)
    meta = build_reference(recipe, checkpoint, manifest.pruning, device="meta", dtype=request.param)
    return manifest, meta, build_reference(recipe, checkpoint, manifest.pruning, device="cpu")


def test_samples_are_the_prompts_of_a_session(references, tiny_text_bundle):
    manifest, meta, loaded = references
    samples = list(calibration_inputs(meta, manifest, tiny_text_bundle, QUESTIONS))
    recorder = RecordingBackend(TorchBackend(loaded))
    with GroundingSession(manifest, tiny_text_bundle, recorder) as session:
        for image, expression in QUESTIONS:
            session.ground(image, expression)
    steps = [call.inputs for call in recorder.calls if call.is_decode]
    prompts = [step for step in steps if step["inputs_embeds"].shape[1] > 1]
    assert len(samples) == len(prompts) == 2
    for sample, prompt in zip(samples, prompts, strict=True):
        assert len(sample) == 3 + 2 * manifest.decoder.num_layers
        embeds, mask, ids, *cache = sample
        assert torch.equal(embeds, torch.from_numpy(prompt["inputs_embeds"]))
        assert torch.equal(mask, torch.from_numpy(prompt["attention_mask"]))
        original = gap_remap(prompt["position_ids"], prompt["kept_positions"])
        assert np.array_equal(ids.numpy(), original)
        assert not np.array_equal(original, prompt["position_ids"])
        assert {tuple(part.shape) for part in cache} == {(1, 2, 0, 8)}
        # As they are, these are inputs of the decoder.
        assert loaded.decoder(*sample)[0].isfinite().all()


def test_no_weight_stays_in_memory(references, tiny_text_bundle):
    manifest, meta, _ = references
    samples = calibration_inputs(meta, manifest, tiny_text_bundle, QUESTIONS)
    next(samples)
    assert all(p.is_meta for p in meta.decoder.parameters())
    samples.close()
    for component in meta.components:
        assert all(p.is_meta for p in component.module.parameters()), component.name


def test_expression_that_cannot_be_used_is_the_users_error(references, tiny_text_bundle):
    manifest, meta, _ = references
    with pytest.raises(ExpressionError):
        list(calibration_inputs(meta, manifest, tiny_text_bundle, [(IMAGE, " ")]))


def test_scales_found_fit_the_references_of_every_dtype(references, tiny_text_bundle):
    """One search for an export: folded in, PyTorch computes what it did, in either dtype."""
    manifest, meta, exact = references
    scales = calibrate(
        meta, manifest, tiny_text_bundle, QUESTIONS, block_size=32, progress=SilentProgress()
    )
    assert len(scales) == 6
    scaled = scale_decoder(meta, scales)
    assert [c.name for c in scaled.components] == [c.name for c in meta.components]
    samples = list(calibration_inputs(meta, manifest, tiny_text_bundle, QUESTIONS))
    tolerance = TOLERANCES["float32"]["logits"]
    with loaded(scaled.component("decoder_model_merged")), torch.inference_mode():
        for sample in samples:
            torch.testing.assert_close(
                scaled.decoder(*sample)[0],
                exact.decoder(*sample)[0],
                atol=tolerance.atol,
                rtol=tolerance.rtol,
            )
