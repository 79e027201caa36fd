"""The TensorRT backend on a GPU made of host memory: buffers, profiles, cache, limits, clean-up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gap_export.bundle import Bundle, open_bundle
from gap_export.engines.plan import EngineSpec, parse_plan
from gap_export.errors import BundleError, GapExportError, UsageError
from gap_export.evaluation.refshapes import iter_samples
from gap_export.runtime.backends.onnxruntime_backend import OnnxRuntimeBackend
from gap_export.runtime.backends.tensorrt_backend import TensorRTBackend
from gap_export.runtime.backends.tensorrt_engine import MAX_CAPTURED_GRAPHS
from gap_export.runtime.backends.tensorrt_loading import choose_engines
from gap_export.runtime.session import GroundingSession
from gap_export.spec.manifest import EngineLimits
from tests.runtime.backends.fake_gpu import FakeDevice
from tests.runtime.backends.fake_tensorrt import (
    CudaGraphStrategy,
    ExecutionContextAllocationStrategy,
    FakeModule,
    FakeRtxModule,
    copy_bundle,
    fake_library,
    write_engines,
)

LIMITS = EngineLimits(max_prompt=24, max_new_tokens=8, max_batch=4, max_images=1)
EXPRESSIONS = ["the star", "the small red circle above the big blue square", "green object"]


@dataclass
class Setup:
    """A bundle with engines, and the fakes that run them."""

    bundle: Bundle
    device: FakeDevice
    module: FakeModule

    def open(self, *, cuda_graphs: bool = False) -> TensorRTBackend:
        chosen = choose_engines(
            self.bundle,
            open_device=lambda: self.device,
            import_library=lambda name: fake_library(self.module, name),
        )
        return TensorRTBackend(self.bundle, chosen, cuda_graphs=cuda_graphs)

    def session(self, **options: Any) -> GroundingSession:
        return GroundingSession(self.bundle.manifest, self.bundle.path, self.open(**options))


MakeSetup = Callable[..., Setup]


@pytest.fixture
def make_setup(tiny_bundle: Path, tmp_path: Path) -> MakeSetup:
    def make(
        contract: str = "concat",
        *,
        source: Path = tiny_bundle,
        limits: EngineLimits = LIMITS,
        rtx: bool = False,
        **engines: Any,
    ) -> Setup:
        bundle = copy_bundle(source, tmp_path / "bundle", in_place=contract == "in_place")
        library = {"library": "tensorrt_rtx"} if rtx else {}
        write_engines(bundle, limits, **library, **engines)
        device = FakeDevice()
        return Setup(bundle, device, (FakeRtxModule if rtx else FakeModule)(device))

    return make


@pytest.fixture(params=["concat", "in_place"])
def setup(request: pytest.FixtureRequest, make_setup: MakeSetup) -> Setup:
    return make_setup(request.param)


@pytest.fixture
def expected(tiny_bundle: Path) -> Iterator[OnnxRuntimeBackend]:
    with OnnxRuntimeBackend(open_bundle(tiny_bundle), num_threads=1, form="base") as backend:
        yield backend


def prompt_of(bundle: Bundle, length: int, rows: int = 1) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    hidden = bundle.manifest.decoder.hidden_size
    mask = np.ones((rows, length), np.int64)
    # The last rows are padded on the left.
    mask[1:, :2] = 0
    return {
        "inputs_embeds": rng.normal(size=(rows, length, hidden)).astype(np.float32),
        "attention_mask": mask,
        "position_ids": np.maximum(mask.cumsum(axis=1) - 1, 0),
        "kept_positions": np.sort(rng.permutation(40)[:length])
        .astype(np.int64)[None]
        .repeat(rows, axis=0),
    }


def step_of(prompt: dict[str, Any], number: int) -> dict[str, Any]:
    """What is fed in the ``number``-th decode step."""
    rows = len(prompt["inputs_embeds"])
    ones = np.ones((rows, number + 1), np.int64)
    return {
        "inputs_embeds": prompt["inputs_embeds"][:, number : number + 1] * 0.5,
        "attention_mask": np.concatenate([prompt["attention_mask"], ones], axis=1),
        "position_ids": prompt["position_ids"][:, -1:] + 1 + number,
        "kept_positions": prompt["kept_positions"],
    }


def answers(backend: Any, prompt: dict[str, Any], steps: int = 3) -> list[Any]:
    """Logits of the prefill and of some steps."""
    cache = backend.new_cache(len(prompt["inputs_embeds"]), 99)
    fed = [prompt, *(step_of(prompt, number) for number in range(steps))]
    return [backend.decode(one, cache) for one in fed]


@pytest.mark.parametrize("contract", ["concat", "in_place"])
def test_boxes_of_the_demo_model_are_those_of_onnx_runtime(make_setup, demo_bundle, contract):
    limits = EngineLimits(max_prompt=80, max_new_tokens=8, max_batch=2, max_images=1)
    setup = make_setup(contract, source=demo_bundle, limits=limits)
    samples = list(iter_samples(seed=1, num_samples=6))
    with GroundingSession.open(demo_bundle) as other, setup.session() as session:
        for sample in samples:
            given = session.ground(sample.image, sample.expression.text)
            wanted = other.ground(sample.image, sample.expression.text)
            assert given.box is not None
            assert (given.box, given.token_ids) == (wanted.box, wanted.token_ids)
    assert given.backend == "TensorRT 10.16.0 (Fake GPU, desktop-sm89, float32)"


def test_prefill_and_steps_of_a_padded_batch_equal_onnx_runtime(setup, expected):
    prompt = prompt_of(setup.bundle, 9, rows=3)
    with setup.open() as backend:
        for _ in range(2):
            given, wanted = answers(backend, prompt), answers(expected, prompt)
            np.testing.assert_array_equal(np.stack(given), np.stack(wanted))
    assert not np.array_equal(given[0], given[1])


def test_text_reading_pruner_and_batch_equal_onnx_runtime(make_setup, tiny_text_bundle, image):
    setup = make_setup(source=tiny_text_bundle)
    with GroundingSession.open(tiny_text_bundle) as other, setup.session() as session:
        given = session.ground_batch(image, EXPRESSIONS)
        wanted = other.ground_batch(image, EXPRESSIONS)
    for one, two in zip(given, wanted, strict=True):
        assert (one.token_ids, one.keep_indices) == (two.token_ids, two.keep_indices)


def test_each_phase_runs_in_a_context_with_its_own_profile(setup):
    with setup.open() as backend:
        answers(backend, prompt_of(setup.bundle, 9))
        contexts = [c for c in setup.module.contexts if "inputs_embeds" in c.shapes]
        assert [context.profile for context in contexts] == [0, 1]
        prefill, decode = contexts
        assert prefill.shapes["inputs_embeds"][1] == 9
        assert decode.shapes["inputs_embeds"][1] == 1
        # One length for all prompts, whatever theirs is.
        assert decode.shapes["kept_positions"] == (1, LIMITS.max_prompt)
        assert {context.options for context in setup.module.contexts} == {
            ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        }


def test_the_cache_never_crosses_the_bus(setup):
    with setup.open() as backend:
        prompt = prompt_of(setup.bundle, 9)
        cache = backend.new_cache(1, 8)
        backend.decode(prompt, cache)
        setup.device.calls.clear()
        backend.decode(step_of(prompt, 0), cache)
    calls = setup.device.calls
    # Four inputs in, the logits out.
    assert (calls.count("upload"), calls.count("download")) == (4, 1)
    assert calls.count("allocate") == 0


def test_joined_caches_take_turns_and_an_in_place_cache_stays(make_setup):
    setup = make_setup("concat")
    name = "past_key_values.0.key"
    with setup.open() as backend:
        prompt = prompt_of(setup.bundle, 5)
        cache = backend.new_cache(1, 8)
        seen = []
        for fed in (prompt, step_of(prompt, 0), step_of(prompt, 1)):
            backend.decode(fed, cache)
            context = setup.module.contexts[-1 if cache.length > 5 else -2]
            seen.append((context.addresses[name], context.addresses["present.0.key"]))
    assert seen[0] == seen[1][::-1] == seen[2]
    assert seen[0][0] != seen[0][1]


@pytest.mark.parametrize(("dtype", "atol"), [("float16", 0.02), ("bfloat16", 0.2)])
def test_engines_of_half_precision_are_fed_and_read_in_it(make_setup, expected, dtype, atol):
    setup = make_setup("in_place", dtype=dtype)
    prompt = prompt_of(setup.bundle, 6)
    with setup.open() as backend:
        assert backend.dtype == dtype
        given = answers(backend, prompt)
        # The buffers have half the size, and the fake would not let more be written.
        assert given[0].dtype == (np.float16 if dtype == "float16" else np.float32)
    np.testing.assert_allclose(np.stack(given), np.stack(answers(expected, prompt)), atol=atol)


def test_buffers_for_a_larger_batch_replace_the_smaller_ones(setup, expected):
    with setup.open() as backend:
        sizes = []
        for rows in (1, 3, 2):
            prompt = prompt_of(setup.bundle, 4, rows=rows)
            np.testing.assert_array_equal(
                np.stack(answers(backend, prompt)), np.stack(answers(expected, prompt))
            )
            sizes.append(backend.num_device_bytes)
        assert sizes[0] < sizes[1] == sizes[2]
        assert sizes[2] == sum(len(memory) for memory in setup.device.memory.values())


def test_a_cache_whose_memory_went_to_a_newer_one_is_refused(setup):
    with setup.open() as backend:
        prompt = prompt_of(setup.bundle, 4)
        old = backend.new_cache(1, 8)
        backend.new_cache(1, 8)
        with pytest.raises(UsageError, match="went to a newer one"):
            backend.decode(prompt, old)


def test_a_prompt_longer_than_the_profile_is_refused_and_the_longest_is_not(setup):
    with setup.open() as backend:
        answers(backend, prompt_of(setup.bundle, LIMITS.max_prompt), steps=LIMITS.max_new_tokens)
        with pytest.raises(UsageError, match=r"prompt longer.*25 tokens.*at most 24.*--max-prompt"):
            answers(backend, prompt_of(setup.bundle, LIMITS.max_prompt + 1), steps=0)
        with pytest.raises(UsageError, match=r"answer longer.*33.*at most 32.*--max-new-tokens"):
            answers(backend, prompt_of(setup.bundle, LIMITS.max_prompt), steps=9)


def test_a_batch_over_the_profile_is_refused_and_the_session_goes_on(setup, image):
    with setup.session() as session:
        before = session.ground(image, "the star")
        with pytest.raises(UsageError, match=r"5.*1\.\.4.*--batch"):
            session.ground_batch(image, ["the star"] * 5)
        assert session.ground(image, "the star").token_ids == before.token_ids


@pytest.mark.parametrize(
    ("pixels", "words"), [(2, r"num_images.*2 in pixel_values.*1\.\.1.*--batch")]
)
def test_images_over_the_profile_are_refused(setup, pixels, words):
    image = setup.bundle.manifest.image
    with setup.open() as backend, pytest.raises(UsageError, match=words):
        backend.run(
            "vision_encoder",
            {"pixel_values": np.zeros((pixels, 3, image.height, image.width), np.float32)},
        )


def test_a_prompt_is_not_continued(setup):
    with setup.open() as backend:
        assert not backend.continues_prompts
        with pytest.raises(UsageError, match="reads a prompt at once"):
            backend.fork_cache(backend.new_cache(1, 8), 2, 16)


def test_several_tokens_after_the_prompt_are_refused(setup):
    with setup.open() as backend:
        prompt = prompt_of(setup.bundle, 4)
        cache = backend.new_cache(1, 8)
        backend.decode(prompt, cache)
        two = step_of(prompt, 1) | {"inputs_embeds": prompt["inputs_embeds"][:, :2]}
        with pytest.raises(UsageError, match="one token at a time"):
            backend.decode(two, cache)
        assert cache.length == 4


def test_everything_is_given_back_on_exit(setup):
    with setup.open() as backend:
        answers(backend, prompt_of(setup.bundle, 4))
        assert not setup.device.is_clean
    assert setup.device.is_clean
    backend.__exit__(None, None, None)


@pytest.mark.parametrize(
    "call", ["deserialize", "create_execution_context", "set_optimization_profile_async"]
)
def test_a_failure_while_loading_gives_everything_back(setup, call):
    setup.module.fails.add(call)
    with pytest.raises(GapExportError, match=f"{call} is out of order"):
        setup.open()
    assert setup.device.is_clean


def test_a_gpu_without_room_gives_everything_back(setup):
    setup.device.fails.add("allocate")
    with pytest.raises(GapExportError, match="fails in allocate"):
        setup.open()
    assert setup.device.is_clean


@pytest.mark.parametrize("method", ["upload", "download", "synchronize"])
def test_a_failure_while_running_gives_everything_back(setup, method):
    backend = setup.open()
    setup.device.fails.add(method)
    with pytest.raises(GapExportError, match=f"fails in {method}"), backend:
        answers(backend, prompt_of(setup.bundle, 4))
    assert setup.device.is_clean


def test_an_engine_that_does_not_run_is_an_error_that_names_it(setup):
    with setup.open() as backend:
        setup.module.fails.add("execute_async_v3")
        with pytest.raises(
            GapExportError, match=r"cannot run.*decoder_model_merged\.engine.*execute"
        ):
            answers(backend, prompt_of(setup.bundle, 4))
    assert setup.device.is_clean


def test_a_gpu_that_refuses_to_take_memory_back_does_not_hide_the_error(setup, caplog):
    backend = setup.open()
    setup.device.fails.add("free")
    with pytest.raises(ValueError, match="the first error"), backend:
        raise ValueError("the first error")
    assert "the fake GPU fails in free" in caplog.text


def rewrite_plan(setup: Setup, change: Callable[[EngineSpec], EngineSpec | None]) -> None:
    """Change what ``engine.json`` says of each engine, or leave the engine out."""
    folder = setup.bundle.path / "engines" / "desktop-sm89"
    plan = parse_plan((folder / "engine.json").read_bytes())
    changed = {spec.file: change(spec) for spec in plan.engines}
    for file, spec in changed.items():
        if spec is None:
            (folder / file).unlink()
    kept = tuple(spec for spec in changed.values() if spec is not None)
    (folder / "engine.json").write_bytes(replace(plan, engines=kept).to_json())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensor: replace(tensor, shape=(*tensor.shape[:-1], 3)), r", 3\)\)"),
        (lambda tensor: replace(tensor, dtype="float16"), r"'float16'"),
        (lambda tensor: replace(tensor, name="other"), r"other: \('float32'"),
    ],
    ids=["shape", "dtype", "name"],
)
def test_an_engine_that_engine_json_does_not_describe_is_refused(make_setup, change, words):
    def spoil(spec: EngineSpec) -> EngineSpec:
        first, *rest = spec.outputs
        return replace(spec, outputs=(change(first), *rest))

    setup = make_setup()
    rewrite_plan(setup, spoil)
    with pytest.raises(BundleError, match=rf"engine\.json describes.*allowed: .*{words}"):
        setup.open()
    assert setup.device.is_clean


def test_a_missing_component_is_named(make_setup):
    setup = make_setup()
    rewrite_plan(setup, lambda spec: None if spec.component == "embed_tokens" else spec)
    with pytest.raises(BundleError, match="no engine of this component was built: embed_tokens"):
        setup.open()
    assert setup.device.is_clean


def test_stripped_engines_get_their_weights_from_the_bundle(make_setup, expected):
    setup = make_setup(weights="stripped")
    prompt = prompt_of(setup.bundle, 4)
    with setup.open() as backend:
        np.testing.assert_array_equal(
            np.stack(answers(backend, prompt)), np.stack(answers(expected, prompt))
        )
    setup.module.fails.add("refit_from_file")
    with pytest.raises(GapExportError, match="the weights of"):
        setup.open()
    assert setup.device.is_clean


def test_streamed_engines_keep_as_many_weights_on_the_gpu_as_fit(make_setup):
    setup = make_setup(weights="streamed")
    with setup.open():
        budgets = [c.engine.weight_streaming_budget_v2 for c in setup.module.contexts]
        assert budgets and set(budgets) == {12345}
    # Too late for contexts that are there already.
    calls = setup.module.calls
    assert calls.index("get_weight_streaming_automatic_budget") < calls.index(
        "create_execution_context"
    )


def test_cuda_graphs_are_recorded_once_for_each_length_and_then_launched(make_setup, expected):
    setup = make_setup("in_place")
    with setup.open(cuda_graphs=True) as backend:
        for rows, length in ((1, 6), (1, 6), (1, 7)):
            prompt = prompt_of(setup.bundle, length, rows=rows)
            given = answers(backend, prompt, steps=3)
            np.testing.assert_array_equal(np.stack(given), np.stack(answers(expected, prompt)))
        # Lengths 7, 8, 9 and, of the longer prompt, 10; all else was recorded before.
        assert setup.device.calls.count("begin_capture") == 4
        assert setup.device.calls.count("launch") == 3 + 2
    assert setup.device.is_clean


def test_cuda_graphs_beyond_the_limit_are_run_directly(make_setup, expected, monkeypatch):
    assert MAX_CAPTURED_GRAPHS > 1
    monkeypatch.setattr("gap_export.runtime.backends.tensorrt_engine.MAX_CAPTURED_GRAPHS", 1)
    setup = make_setup("in_place")
    prompt = prompt_of(setup.bundle, 5)
    with setup.open(cuda_graphs=True) as backend:
        given = answers(backend, prompt, steps=4)
    np.testing.assert_array_equal(np.stack(given), np.stack(answers(expected, prompt, steps=4)))
    assert setup.device.calls.count("begin_capture") == 1


def test_a_failed_recording_leaves_no_stream_capturing(make_setup):
    setup = make_setup("in_place")
    with setup.open(cuda_graphs=True) as backend:
        setup.device.fails.add("begin_capture")
        with pytest.raises(GapExportError, match="begin_capture"):
            answers(backend, prompt_of(setup.bundle, 5))
    assert setup.device.is_clean


def test_tensorrt_rtx_records_by_itself(make_setup):
    setup = make_setup("in_place", rtx=True)
    with setup.open(cuda_graphs=True) as backend:
        assert backend.name.startswith("TensorRT-RTX ")
        answers(backend, prompt_of(setup.bundle, 5))
        (config,) = [c.options for c in setup.module.contexts if hasattr(c.options, "allocation")]
    assert config.cuda_graph_strategy is CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    assert config.allocation is ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
    assert "begin_capture" not in setup.device.calls


def test_cuda_graphs_for_a_joined_cache_are_refused_with_the_reason(make_setup):
    setup = make_setup("concat")
    with pytest.raises(UsageError, match=r"another shape.*concat.*fused"):
        setup.open(cuda_graphs=True)
    assert setup.device.is_clean
