"""What a decoder is fed when a model is asked: the samples that AWQ calibrates with."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from gap_export.bundle import BundleDraft
from gap_export.checkpoint.weights import SAFETENSORS_NAMES
from gap_export.exporting.quantization import (
    SCALES_NAME,
    ChannelScale,
    find_scales,
    loaded,
    scale_channels,
    store_scales,
)
from gap_export.exporting.torch_backend import TorchBackend, TorchCache, to_torch
from gap_export.families import Reference
from gap_export.progress import Progress
from gap_export.runtime.backends.backend import Feed, FloatArray, KVCache
from gap_export.runtime.images.image import ImageInput
from gap_export.runtime.session import GroundingSession
from gap_export.spec.manifest import Manifest

_DECODER = "decoder_model_merged"
Question = tuple[ImageInput, str]


def calibration_inputs(
    reference: Reference,
    manifest: Manifest,
    assets_folder: Path,
    questions: Iterable[Question],
) -> Generator[tuple[torch.Tensor, ...], None, None]:
    """Prompts as the decoder gets them, one after the other.

    All but the decoder is run, in PyTorch and float32; of the decoder no weight is read.

    Args:
        reference: On the meta device.
        manifest: Of the model; graphs and files are not needed.
        assets_folder: Where its tokenizers are.
        questions: Images and expressions, as ``GroundingSession.ground`` takes them.

    Yields:
        The inputs of the decoder component, in order, for a batch of one with an empty cache.

    Raises:
        UsageError: an image or an expression cannot be used.
    """
    components = []
    for component in reference.components:
        inputs = (
            replace(spec, dtype="float32") if spec.dtype in SAFETENSORS_NAMES else spec
            for spec in component.inputs
        )
        components.append(replace(component, inputs=tuple(inputs)))
    wide = replace(reference, dtype="float32", components=tuple(components))
    with ExitStack() as stack:
        for component in wide.components:
            if component.name != _DECODER:
                stack.enter_context(loaded(component))
        recorder = _PromptRecorder(wide)
        session = stack.enter_context(GroundingSession(manifest, assets_folder, recorder))
        for image, expression in questions:
            session.ground(image, expression)
            yield from recorder.taken
            recorder.taken.clear()


def calibrate(
    reference: Reference,
    manifest: Manifest,
    assets_folder: Path,
    questions: Iterable[Question],
    *,
    block_size: int,
    progress: Progress,
) -> tuple[ChannelScale, ...]:
    """Find what to scale the decoder's channels by, so that rounding loses less (AWQ).

    The caller applies them with :func:`scale_decoder` to each of the export's references.

    Args:
        reference: On the meta device.
        manifest: Of the model; graphs and files are not needed.
        assets_folder: Where its tokenizers are.
        questions: Images and expressions, as ``GroundingSession.ground`` takes them.
        block_size: That the weights will be quantized with.
        progress: Progress reporter.

    Raises:
        UsageError: no question, or an image or an expression that cannot be used.
        CheckpointError: a weight cannot be read.
    """
    samples = calibration_inputs(reference, manifest, assets_folder, questions)
    with closing(samples):
        return find_scales(
            reference.component(_DECODER), samples, block_size=block_size, progress=progress
        )


def keep_scales(draft: BundleDraft, scales: Iterable[ChannelScale]) -> None:
    """Write the scales of :func:`calibrate` into the bundle, which can be checked by them.

    Raises:
        OutputError: the disk is full or cannot be written.
    """
    store_scales(draft.folder / SCALES_NAME, scales, of=_DECODER)


def scale_decoder(reference: Reference, scales: Iterable[ChannelScale]) -> Reference:
    """The same model with the scales of :func:`calibrate` folded into its decoder's weights."""
    return scale_channels(reference, scales, of=_DECODER)


class _PromptRecorder(TorchBackend):
    """A backend whose decoder, asked anything, keeps the prompt and ends the answer at once."""

    continues_prompts = False

    def __init__(self, reference: Reference) -> None:
        super().__init__(reference)
        self.taken: list[tuple[torch.Tensor, ...]] = []
        self._spec = reference.decoder_spec
        self._decoder = reference.component(_DECODER)

    def decode(self, feed: Feed, cache: KVCache) -> FloatArray:
        """See Backend."""
        assert isinstance(cache, TorchCache), "a cache belongs to the backend that made it"
        given = to_torch(self._decoder, feed) | cache.values
        self.taken.append(tuple(given[spec.name] for spec in self._decoder.inputs))
        logits = np.zeros((cache.batch_size, self._spec.vocab_size), dtype=np.float32)
        logits[:, list(self._spec.eos_token_ids)] = 1.0
        return logits
