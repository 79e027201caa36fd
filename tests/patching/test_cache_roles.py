"""A decoder whose cache is not what its names say is not patched."""

from __future__ import annotations

import pytest

from gap_export.errors import UsageError
from tests.cli.conftest import *  # noqa: F403 - its fixtures
from tests.patching.cache_faults import SEEN, UNSEEN, break_cache, swapped_throughout

DECODER = "decoder_model_merged.onnx"


@pytest.mark.parametrize("fault", SEEN)
def test_a_cache_under_wrong_names_is_refused(own_export, run_cli, tmp_path, fault):
    break_cache(own_export / DECODER, fault)
    outcome = run_cli("patch", own_export, "--out", tmp_path / "bundle")
    assert outcome.code == 2 and SEEN[fault][1] in outcome.err
    assert "a tensor of the decoder's KV cache is not what its name says" in outcome.err
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"attention": "eager"},
        pytest.param({"dynamo": True, "opset": 18}, marks=pytest.mark.full),
    ],
    ids=str,
)
def test_values_under_the_name_of_keys_are_refused_in_and_out(make_export, patch, tmp_path, how):
    import shutil

    export = tmp_path / "export"
    shutil.copytree(make_export(**how), export)
    patch(export)
    break_cache(export / DECODER, swapped_throughout)
    with pytest.raises(UsageError, match=r"past_key_values.0.key is used as the values; allowed"):
        patch(export)


@pytest.mark.parametrize("fault", UNSEEN)
def test_what_only_a_run_shows_is_left_to_the_check(own_export, run_cli, tmp_path, fault):
    break_cache(own_export / DECODER, fault)
    assert run_cli("patch", own_export, "--out", tmp_path / "bundle").code == 0
    outcome = run_cli("check", tmp_path / "bundle", "--against", own_export, "--samples", "1")
    assert outcome.code == 3 and "logits (cached)" in outcome.out
