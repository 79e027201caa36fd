"""Which engines of a bundle run here, and what is said where none does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gap_export.bundle import Bundle, open_bundle
from gap_export.engines.library import import_tensorrt
from gap_export.engines.plan import hash_plan
from gap_export.errors import (
    BundleError,
    EngineError,
    GapExportError,
    MissingDependencyError,
    UsageError,
)
from gap_export.runtime.backends.device import DeviceMemory
from gap_export.runtime.backends.tensorrt_loading import ChosenEngines, EngineLoader, choose_engines
from gap_export.runtime.session import GroundingSession
from gap_export.spec.manifest import EngineLimits
from tests.runtime.backends.fake_gpu import FakeDevice
from tests.runtime.backends.fake_tensorrt import (
    FakeModule,
    copy_bundle,
    fake_library,
    use_fakes,
    write_engines,
)

LIMITS = EngineLimits(max_prompt=24, max_new_tokens=8, max_batch=1, max_images=1)


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Bundle:
    return copy_bundle(tiny_bundle, tmp_path / "bundle")


def choose(bundle: Bundle, *, sm: int = 89, **options: Any) -> ChosenEngines:
    device = FakeDevice(compute_capability=sm)
    defaults: dict[str, Any] = {
        "open_device": lambda: device,
        "import_library": lambda name: fake_library(FakeModule(device), name),
    }
    return choose_engines(bundle, **defaults | options)


def no_gpu() -> Any:
    raise UsageError("no NVIDIA GPU can be used here", seen="no driver", fix="get one")


def test_the_folder_for_the_gpu_at_hand_is_taken(bundle):
    for sm in (86, 89):
        write_engines(bundle, LIMITS, folder=f"desktop-sm{sm}", compute_capability=sm)
    assert choose(bundle).folder.path.name == "desktop-sm89"
    assert choose(bundle, sm=86).folder.path.name == "desktop-sm86"


def test_a_damaged_folder_for_another_gpu_does_not_matter(bundle):
    other = write_engines(bundle, LIMITS, folder="desktop-sm86", compute_capability=86)
    (other / "embed_tokens.engine").write_bytes(b"")
    write_engines(bundle, LIMITS)
    assert choose(bundle).folder.path.name == "desktop-sm89"


def test_engines_for_another_gpu_are_refused_by_number(bundle):
    write_engines(bundle, LIMITS)
    with pytest.raises(UsageError, match=r"another GPU generation: SM 120 here.*SM 89"):
        choose(bundle, sm=120)


def test_engines_of_another_version_are_refused_by_version(bundle):
    write_engines(bundle, LIMITS, library_version="10.3.0")
    with pytest.raises(UsageError, match=r"another version.*10\.16\.0 here.*10\.3\.0"):
        choose(bundle)


def test_several_folders_none_of_which_fits_are_all_told(bundle):
    write_engines(bundle, LIMITS, folder="desktop-sm86", compute_capability=86)
    write_engines(bundle, LIMITS, folder="old", library_version="10.3.0")
    with pytest.raises(UsageError, match=r"desktop-sm86.*SM 89 here; old:.*10\.16\.0") as caught:
        choose(bundle)
    assert "gap-export build" in str(caught.value)


def test_the_folder_that_was_named_is_the_only_one_looked_at(bundle):
    write_engines(bundle, LIMITS)
    write_engines(bundle, LIMITS, folder="desktop-sm86", compute_capability=86)
    with pytest.raises(UsageError, match="SM 86"):
        choose(bundle, engines="desktop-sm86")
    with pytest.raises(BundleError, match="no such engines: orin"):
        choose(bundle, engines="orin")
    with pytest.raises(BundleError, match="not the name of a folder"):
        choose(bundle, engines="../..")


def test_a_truncated_engine_is_refused_by_name(bundle):
    path = write_engines(bundle, LIMITS) / "decoder_model_merged.engine"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"decoder_model_merged\.engine is cut short"):
        choose(bundle)


def test_an_engine_of_another_graph_is_refused_by_name(bundle):
    path = write_engines(bundle, LIMITS) / "engine.json"
    plan = json.loads(path.read_text())
    plan["engines"][0]["graph_sha256"] = "0" * 64
    del plan["plan_sha256"]
    plan["plan_sha256"] = hash_plan(plan)
    path.write_text(json.dumps(plan))
    with pytest.raises(BundleError, match="was built from another graph"):
        choose(bundle)


def test_a_library_that_is_not_installed_is_named(bundle):
    write_engines(bundle, LIMITS)

    def missing(name: str) -> Any:
        raise MissingDependencyError("running engines needs a package", seen=name)

    with pytest.raises(MissingDependencyError, match="needs a package: tensorrt"):
        choose(bundle, import_library=missing)


def test_one_message_names_all_that_is_missing(bundle):
    with pytest.raises(
        UsageError, match=r"holds no engines and no NVIDIA GPU.*\(no driver\); build them.*get one"
    ):
        choose(bundle, open_device=no_gpu)
    with pytest.raises(BundleError, match="holds no engines; build them: gap-export build"):
        choose(bundle)
    write_engines(bundle, LIMITS)
    with pytest.raises(UsageError, match=r"^no NVIDIA GPU can be used here: no driver; get one$"):
        choose(bundle, open_device=no_gpu)


def test_a_session_opens_with_tensorrt(bundle, image, monkeypatch):
    write_engines(bundle, LIMITS)
    device = use_fakes(monkeypatch)
    with GroundingSession.open(
        bundle.path, backend="tensorrt", engines="desktop-sm89", verify="full"
    ) as session:
        given = session.ground(image, "the star")
        assert given.backend.startswith("TensorRT ")
    assert device.is_clean
    with GroundingSession.open(bundle.path) as session:
        assert session.ground(image, "the star").token_ids == given.token_ids


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backend": "tensorrt", "num_threads": 1}, "threads cannot be used with tensorrt"),
        ({"backend": "tensorrt", "execution_providers": ["x"]}, "execution providers cannot"),
        ({"engines": "x"}, "engines cannot be used with onnxruntime"),
        ({"cuda_graphs": True}, "CUDA graphs cannot be used with onnxruntime"),
    ],
)
def test_arguments_of_the_other_backend_are_refused(bundle, options, words):
    with pytest.raises(UsageError, match=words):
        GroundingSession.open(bundle.path, **options)


def test_nothing_is_hashed_before_it_is_known_to_fit(bundle, monkeypatch):
    write_engines(bundle, LIMITS, compute_capability=86)

    def read(*args: Any, **options: Any) -> Any:
        raise GapExportError("hashed")

    monkeypatch.setattr("gap_export.runtime.backends.tensorrt_loading.read_engine_folder", read)
    with pytest.raises(UsageError, match="SM 86"):
        choose(bundle)
    assert open_bundle(bundle.path)


def test_every_name_that_is_used_is_one_of_tensorrt():
    trt = pytest.importorskip("tensorrt_rtx", reason="needs the extra trt-rtx")
    used = {
        "ICudaEngine": "num_io_tensors get_tensor_name get_tensor_dtype get_tensor_shape "
        "weight_streaming_budget_v2 get_weight_streaming_automatic_budget "
        "is_shape_inference_io create_execution_context create_runtime_config",
        "IExecutionContext": "set_optimization_profile_async set_input_shape set_tensor_address "
        "execute_async_v3",
        "Runtime": "deserialize_cuda_engine",
        "Refitter": "refit_cuda_engine",
        "OnnxParserRefitter": "refit_from_file",
        "IRuntimeConfig": "cuda_graph_strategy set_execution_context_allocation_strategy",
        "CudaGraphStrategy": "WHOLE_GRAPH_CAPTURE",
        "ExecutionContextAllocationStrategy": "ON_PROFILE_CHANGE",
    }
    for owner, names in used.items():
        for name in names.split():
            assert hasattr(getattr(trt, owner), name), (owner, name)


def test_a_file_that_is_no_engine_is_refused_by_the_real_library(bundle):
    pytest.importorskip("tensorrt_rtx", reason="needs the extra trt-rtx")
    library = import_tensorrt("tensorrt_rtx", purpose="testing")
    write_engines(bundle, LIMITS, library="tensorrt_rtx", library_version=library.version)
    chosen = choose(bundle, import_library=lambda name: library)
    memory = DeviceMemory(FakeDevice())
    loader = EngineLoader(bundle, chosen, memory)
    with pytest.raises(EngineError, match=r"TensorRT cannot load embed_tokens\.engine: .*\w"):
        loader.load(chosen.folder.engine("embed_tokens"))
