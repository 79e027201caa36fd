"""Real engines on a real GPU against PyTorch; skipped where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gap_export.checkpoint.find.bundle_source import resolve_source
from gap_export.evaluation.refshapes import iter_samples
from gap_export.parity.question import Question
from gap_export.runtime.backends.device import CudaDevice, DeviceMemory
from gap_export.runtime.session import GroundingSession
from tests.parity.checking import check_with_torch, level_of

NUM_EXPRESSIONS = 50


@pytest.fixture
def memory(gpu: CudaDevice) -> Iterator[DeviceMemory]:
    held = DeviceMemory(gpu)
    yield held
    held.close()


def test_what_is_copied_to_the_gpu_comes_back(memory: DeviceMemory) -> None:
    given = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    found = np.empty_like(given)
    buffer = memory.allocate(given.nbytes)
    device, stream = memory.device, memory.stream
    device.upload(buffer.address, given, stream)
    device.download(found, buffer.address, stream)
    device.synchronize(stream)
    np.testing.assert_array_equal(found, given)
    device.clear(buffer.address, buffer.num_bytes, stream)
    device.download(found, buffer.address, stream)
    device.synchronize(stream)
    assert not found.any()


def test_work_that_was_recorded_is_done_when_launched(memory: DeviceMemory) -> None:
    buffer = memory.allocate(64)
    device, stream = memory.device, memory.stream
    found = np.zeros(64, np.uint8)
    device.upload(buffer.address, np.full(64, 7, np.uint8), stream)
    device.synchronize(stream)
    device.begin_capture(stream)
    device.clear(buffer.address, 64, stream)
    graph = device.end_capture(stream)
    memory.keep_graph(graph)
    device.download(found, buffer.address, stream)
    device.synchronize(stream)
    assert (found == 7).all()
    device.launch(graph, stream)
    device.download(found, buffer.address, stream)
    device.synchronize(stream)
    assert not found.any()


def test_engines_answer_token_for_token_as_pytorch(engine_bundle: Path) -> None:
    with GroundingSession.open(engine_bundle, backend="tensorrt") as session:
        manifest = session.manifest
    recipe, checkpoint = resolve_source(manifest, {})
    samples = iter_samples(seed=0, num_samples=NUM_EXPRESSIONS)
    report = check_with_torch(
        engine_bundle,
        recipe,
        checkpoint,
        [Question(image=s.image, expression=s.expression.text, box=s.box) for s in samples],
        backends=("trt",),
        required=("trt",),
    )
    assert report.passed, report.to_plain()
    figures = level_of(report, "token").figures
    assert figures["equal"] + figures["ties"] == NUM_EXPRESSIONS


def test_a_batch_on_a_gpu_answers_as_its_rows_alone(engine_bundle: Path) -> None:
    samples = list(iter_samples(seed=2, num_samples=4))
    texts = [sample.expression.text for sample in samples]
    with GroundingSession.open(engine_bundle, backend="tensorrt") as session:
        together = session.ground_batch(samples[0].image, texts)
        alone = [session.ground(samples[0].image, text) for text in texts]
    assert [a.token_ids for a in together] == [a.token_ids for a in alone]


def test_cuda_graphs_on_a_gpu_change_no_answer(engine_bundle: Path) -> None:
    from gap_export.errors import UsageError

    samples = list(iter_samples(seed=3, num_samples=4))
    try:
        graphs = GroundingSession.open(engine_bundle, backend="tensorrt", cuda_graphs=True)
    except UsageError as err:
        pytest.skip(f"these engines take no CUDA graphs: {err.what}")
    with graphs, GroundingSession.open(engine_bundle, backend="tensorrt") as direct:
        for sample in samples * 2:
            given = graphs.ground(sample.image, sample.expression.text)
            wanted = direct.ground(sample.image, sample.expression.text)
            assert given.token_ids == wanted.token_ids
