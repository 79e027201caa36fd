"""Patches joined to tokens, and projectors with a norm and with taps."""

from __future__ import annotations

import pytest
import torch

from gap_export.families.common.modules.joining import join_patches
from gap_export.families.common.modules.projector import build_projector, embeds_of
from gap_export.spec.architecture import ProjectorShape


def test_patches_of_a_token_stand_row_by_row_and_tokens_in_raster_order():
    numbers = torch.arange(4 * 6).reshape(1, 24)
    joined = join_patches(numbers, (4, 6), (2, 2))
    assert joined.shape == (1, 6, 4)
    assert joined[0, 1].tolist() == [2, 3, 8, 9]
    assert joined[0, 3].tolist() == [12, 13, 18, 19]
    assert join_patches(numbers, (4, 6), (1, 3))[0, 2].tolist() == [6, 7, 8]


def _projector(**more):
    shape = ProjectorShape(width=16, hidden_size=6, activation="gelu", joined_rows=2, **more)
    torch.manual_seed(0)
    return build_projector(shape).apply(_fill)


@torch.no_grad()
def _fill(module):
    for parameter in module.parameters(recurse=False):
        parameter.normal_()


@pytest.mark.parametrize("norm_width", [4, None])
def test_the_norm_goes_over_a_patch_or_over_a_token(norm_width):
    projector = _projector(norm="layer_norm", norm_width=norm_width, norm_eps=1e-6)
    features = torch.randn(2, 3, 16)
    width = norm_width or 16
    normal = torch.nn.functional.layer_norm(
        features.reshape(2, 3, -1, width),
        (width,),
        projector.norm.weight,
        projector.norm.bias,
        1e-6,
    )
    hidden = torch.nn.functional.gelu(projector.linear_1(normal.reshape(2, 3, 16)))
    assert torch.allclose(projector(features), projector.linear_2(hidden), atol=1e-5)


def test_each_tap_has_its_plane_and_a_norm_over_all_of_a_token():
    projector = _projector(norm="rms_norm", norm_width=4, num_taps=2, inner_size=16)
    features = torch.randn(2, 3, 48)
    projected = projector(features)
    assert projected.shape == (2, 3, 18)
    assert torch.equal(projected[..., :6], embeds_of(projector, features))
    assert torch.equal(projected[..., 12:], projector.taps[1](features[..., 32:]))
    assert projector.main.norm_width == 4
    assert projector.taps[0].norm_width == 16
    assert not torch.allclose(projected[..., 6:12], projector.taps[0](features[..., 32:]))
