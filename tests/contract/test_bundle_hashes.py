"""Bundles are the bytes that they were before the code's structure changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.shared import SharedExports
from tools.bundle_hashes import CASES, RECORDED, differing, export_case, hash_bundle, tools_of

DEFAULT = "llava-fixed"


def check_recorded(name: str, bundle: Path) -> None:
    """Compare with the record, where the bundle was made by the versions that the record names."""
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    used = tools_of(bundle)
    if used != {tool: recorded["tools"].get(tool) for tool in used}:
        pytest.skip(f"recorded with {recorded['tools']}, this bundle was made with {used}")
    assert differing(recorded["bundles"][name], hash_bundle(bundle)) == []


def test_a_bundle_has_the_recorded_bytes(exports: SharedExports) -> None:
    model, options = CASES[DEFAULT]
    check_recorded(DEFAULT, exports.bundle(model=model, keep_ratio=0.3, **options))


@pytest.mark.full
@pytest.mark.parametrize("name", sorted(set(CASES) - {DEFAULT}))
def test_every_option_set_has_the_recorded_bytes(name: str, tmp_path: Path) -> None:
    check_recorded(name, export_case(name, tmp_path))


def test_another_byte_and_another_file_are_seen(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"one")
    (tmp_path / "b.onnx").write_bytes(b"two")
    recorded = hash_bundle(tmp_path)
    assert differing(recorded, recorded) == []
    (tmp_path / "a.onnx").write_bytes(b"onE")
    (tmp_path / "c.onnx").write_bytes(b"two")
    assert differing(recorded, hash_bundle(tmp_path)) == ["a.onnx", "c.onnx"]
    (tmp_path / "b.onnx").unlink()
    assert differing(recorded, hash_bundle(tmp_path)) == ["a.onnx", "b.onnx", "c.onnx"]
