"""Sessions on the graphs that engines are built from, both lowerings, against PyTorch.

ONNX Runtime stands in for TensorRT. All else is as on a GPU: float16 graphs with the ``concat`` or
the ``in_place`` cache, profiles from the export's own limits, buffers, phases, CUDA graphs.
"""

from __future__ import annotations

import shutil

import pytest

from gap_export.bundle import Bundle, open_bundle
from gap_export.checkpoint.find.bundle_source import resolve_source
from gap_export.evaluation.refshapes import iter_samples
from gap_export.parity.check import check_bundle
from gap_export.parity.golden import open_golden
from gap_export.parity.question import Question
from gap_export.parity.record import record_truth
from gap_export.parity.truth import GoldenTruth, TorchTruth
from gap_export.runtime.session import GroundingSession
from tests.parity.checking import check_with_torch, statuses
from tests.runtime.backends.fake_tensorrt import use_fakes, write_engines
from tests.shared import SharedExports


@pytest.fixture(scope="module", params=[pytest.param("portable", marks=pytest.mark.full), "fused"])
def bundle(
    request: pytest.FixtureRequest, exports: SharedExports, tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    """The demo model with engines of one lowering, for batches of up to 3."""
    exported = exports.bundle(
        model="refshapes-llava",
        pruner="spatial",
        keep_ratio=0.3,
        targets=("desktop",),
        lowering=request.param,
        max_batch=3,
    )
    own = tmp_path_factory.mktemp("lowered") / "bundle"
    opened = open_bundle(shutil.copytree(exported, own))
    limits = opened.manifest.engine_limits
    assert limits is not None
    write_engines(opened, limits)
    return opened


def test_lowered_graphs_pass_the_check(bundle, monkeypatch):
    device = use_fakes(monkeypatch)
    recipe, checkpoint = resolve_source(bundle.manifest, {})
    samples = iter_samples(seed=0, num_samples=4)
    report = check_with_torch(
        bundle.path,
        recipe,
        checkpoint,
        [Question(image=s.image, expression=s.expression.text, box=s.box) for s in samples],
        backends=("trt",),
    )
    assert report.passed, report.to_plain()
    assert set(statuses(report).values()) == {"passed"}
    assert "float16" in report.backends[0].name
    assert device.calls and device.is_clean


def test_a_golden_for_tensorrt_has_the_dtype_of_its_graphs(bundle, tmp_path, monkeypatch):
    use_fakes(monkeypatch)
    recipe, checkpoint = resolve_source(bundle.manifest, {})
    questions = [
        Question(image=sample.image, expression=sample.expression.text)
        for sample in iter_samples(seed=0, num_samples=2)
    ]
    truth = TorchTruth(recipe, checkpoint, questions)
    folder = record_truth(bundle, truth, tmp_path / "golden", backend="trt")
    golden = open_golden(folder, bundle.manifest)
    assert golden.spec.dtype == "float16"
    report = check_bundle(
        bundle, reference=GoldenTruth(golden), backends=("ort", "trt"), levels=("tensor", "token")
    )
    # The base graphs are of another dtype.
    assert set(statuses(report, backend=0).values()) == {"not_run"}
    assert set(statuses(report, backend=-1).values()) == {"passed"}


def test_a_batch_and_recorded_steps_change_no_answer(bundle, monkeypatch):
    device = use_fakes(monkeypatch)
    samples = list(iter_samples(seed=1, num_samples=3))
    texts = [sample.expression.text for sample in samples]
    in_place = bundle.manifest.graphs[-1].kv_contract == "in_place"
    with GroundingSession.open(bundle.path, backend="tensorrt") as session:
        alone = [session.ground(samples[0].image, text).token_ids for text in texts]
    with GroundingSession.open(bundle.path, backend="tensorrt", cuda_graphs=in_place) as session:
        for _ in range(2):
            together = session.ground_batch(samples[0].image, texts)
            assert [answer.token_ids for answer in together] == alone
    assert ("launch" in device.calls) == in_place


def test_engines_of_a_copied_bundle_run_as_well(bundle, tmp_path, monkeypatch):
    use_fakes(monkeypatch)
    copied = tmp_path / "elsewhere"
    shutil.copytree(bundle.path, copied)
    sample = next(iter(iter_samples(seed=1, num_samples=1)))
    answers = []
    for path in (bundle.path, copied):
        with GroundingSession.open(path, backend="tensorrt") as session:
            answers.append(session.ground(sample.image, sample.expression.text).token_ids)
    assert answers[0] == answers[1]
