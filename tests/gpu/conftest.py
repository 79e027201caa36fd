"""What the tests on a GPU share: whether there is one, and engines built for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from gap_export.errors import GapExportError
from gap_export.runtime.backends.device import CudaDevice
from gap_export.spec.requests import EnginesRequest, PruningRequest


@pytest.fixture(scope="session")
def gpu() -> CudaDevice:
    """The GPU at hand; without one the test is skipped."""
    try:
        return CudaDevice()
    except GapExportError as err:
        pytest.skip(f"needs a GPU: {err}")


@pytest.fixture(scope="session")
def target(gpu: CudaDevice) -> str:
    """What engines must be built for to run here, as ``--trt`` has it."""
    from gap_export.engines.library import target_for

    try:
        return target_for(gpu.compute_capability).spec
    except GapExportError as err:
        pytest.skip(str(err))


@pytest.fixture(scope="session", params=["portable", "fused"])
def engine_bundle(
    request: pytest.FixtureRequest, target: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The demo model, 30 % of its tokens kept, with engines for the GPU at hand."""
    from gap_export.bundle import open_bundle
    from gap_export.engines.build import build_engines
    from gap_export.engines.folder import engine_folders
    from gap_export.engines.targets import parse_targets
    from gap_export.exporting import ExportOptions, export_model

    (choice,) = parse_targets([target])
    if all(request.param not in platform.lowerings for platform in choice.target.platforms):
        pytest.skip(f"target {target} does not build the {request.param} lowering")
    options = ExportOptions(
        model="refshapes-llava",
        pruning=PruningRequest(pruner="spatial", keep_ratio=0.3),
        engines=EnginesRequest(targets=(target,), lowering=request.param, max_batch=4),
        out=tmp_path_factory.mktemp("gpu") / "bundle",
    )
    bundle = open_bundle(export_model(options).bundle)
    if not engine_folders(bundle):
        build_engines(bundle, choice)
    return bundle.path
