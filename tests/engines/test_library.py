"""Which TensorRT is taken, and what is said where there is none that fits."""

from __future__ import annotations

import importlib
import re
import sys
import types
from typing import Any

import pytest

from gap_export.engines.library import (
    TensorRT,
    describe_versions,
    elsewhere,
    import_tensorrt,
    installed_targets,
    library_for,
    target_for,
)
from gap_export.engines.targets import TARGETS
from gap_export.errors import MissingDependencyError, UsageError
from gap_export.extras import pip_install


def install(monkeypatch: pytest.MonkeyPatch, name: str, version: str | None) -> None:
    module = types.ModuleType(name)
    if version is not None:
        module.__version__ = version  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, module)


def uninstall(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    real = importlib.import_module

    def import_module(wanted: str, *args: Any) -> Any:
        if wanted == name:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(wanted, *args)

    monkeypatch.setattr(importlib, "import_module", import_module)


@pytest.mark.parametrize(
    ("target", "version"),
    [
        ("rtx", "1.7.1.116"),
        ("orin", "10.3.0"),
        ("orin", "10.16.2"),
        ("orin", "11.4.0.1"),
        ("thor", "10.13.0"),
        ("desktop", "11.5.1"),
    ],
)
def test_a_version_that_the_target_has_is_taken(monkeypatch, target, version):
    install(monkeypatch, TARGETS[target].library, version)
    library = library_for(TARGETS[target])
    assert (library.version, library.module.__version__) == (version, version)
    assert library.release == tuple(map(int, version.split(".")[:2]))
    assert library.is_rtx is (target == "rtx")


@pytest.mark.parametrize("version", ["10.4.0", "8.6.2", "11.5.0"])
def test_a_version_that_the_target_has_not_got_is_refused(monkeypatch, version):
    install(monkeypatch, "tensorrt", version)
    with pytest.raises(
        MissingDependencyError,
        match=rf"this version of tensorrt: {version}; allowed: 10\.3 \(JetPack 6\.2\), .*; "
        r"copy the bundle to .* and run there: python3 -m gap_export.engines build BUNDLE "
        "--target orin",
    ):
        library_for(TARGETS["orin"])


def test_a_missing_package_of_a_board_is_had_on_the_board(monkeypatch):
    uninstall(monkeypatch, "tensorrt")
    with pytest.raises(
        MissingDependencyError,
        match=r"target orin needs a package that is not installed: tensorrt; allowed: 10\.3 .*; "
        r"copy the bundle to",
    ):
        library_for(TARGETS["orin"])


@pytest.mark.parametrize(("target", "extra"), [("rtx", "trt-rtx"), ("desktop", "trt")])
def test_a_missing_package_of_a_desktop_is_installed(monkeypatch, target, extra):
    uninstall(monkeypatch, TARGETS[target].library)
    with pytest.raises(MissingDependencyError, match=re.escape(pip_install(extra))):
        library_for(TARGETS[target])


@pytest.mark.parametrize(
    "err",
    [
        ImportError("libnvinfer.so.10: cannot open shared object file"),
        ModuleNotFoundError("No module named 'tensorrt_libs'", name="tensorrt_libs"),
        OSError("libcudart.so.12: cannot open shared object file"),
    ],
)
def test_a_package_without_its_libraries_is_refused_with_what_is_missing(monkeypatch, err):
    def fail(name: str) -> Any:
        raise err

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(MissingDependencyError, match=r"installed but cannot be loaded: .*lib"):
        import_tensorrt("tensorrt", purpose="running engines")


@pytest.mark.parametrize("version", [None, "ten"])
def test_a_package_without_a_version_is_refused(monkeypatch, version):
    install(monkeypatch, "tensorrt", version)
    with pytest.raises(MissingDependencyError, match="tensorrt without a version"):
        import_tensorrt("tensorrt", purpose="running engines")


def test_targets_that_can_be_imported_are_listed(monkeypatch):
    install(monkeypatch, "tensorrt_rtx", "1.7.1.116")
    install(monkeypatch, "tensorrt", "10.16.2")
    assert installed_targets() == ("rtx", "desktop", "orin", "thor")
    install(monkeypatch, "tensorrt", "10.14.0")
    assert installed_targets() == ("rtx", "desktop")
    uninstall(monkeypatch, "tensorrt_rtx")
    assert installed_targets() == ("desktop",)


def test_versions_and_places_are_told_for_people():
    assert TensorRT(name="tensorrt", module=None, version="10.16.2.post1").release == (10, 16)
    assert describe_versions(TARGETS["orin"]).startswith("10.3 (JetPack 6.2), 10.16 to ")
    assert elsewhere(TARGETS["rtx"]) is None
    assert "the machine that has the GPU" in str(elsewhere(TARGETS["desktop"]))


def test_a_board_has_its_own_target_and_any_other_gpu_that_of_its_tensorrt(monkeypatch):
    install(monkeypatch, "tensorrt", "10.16.0")
    uninstall(monkeypatch, "tensorrt_rtx")
    assert [target_for(sm).spec for sm in (87, 110, 90)] == ["orin:sm87", "thor:sm110", "desktop"]
    uninstall(monkeypatch, "tensorrt")
    with pytest.raises(UsageError, match=r"rtx has no SM 90.*desktop: building engines"):
        target_for(90)
