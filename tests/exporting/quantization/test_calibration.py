"""What is seen of a decoder's inputs, and that nothing of it stays behind."""

from __future__ import annotations

import pytest
import torch

from gap_export.errors import UsageError
from gap_export.exporting.quantization import loaded
from gap_export.exporting.quantization.calibration import MAX_ROWS, Observed, observe_inputs
from tests.exporting.quantization.small_decoder import build_decoder, draw_prompts

NAMES = ("layers.0.self_attn.q_proj", "layers.1.self_attn.o_proj", "layers.1.mlp.down_proj")


def watched(component, prompts) -> dict[str, torch.Tensor]:
    """The same by hooks on a decoder that is all in memory, padding left out."""
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in NAMES}
    mask = torch.ones(0)

    def note(name):
        return lambda _, given: rows[name].append(given[0][mask.reshape(-1) != 0])

    with loaded(component), torch.inference_mode():
        handles = [
            component.module.get_submodule(name).register_forward_pre_hook(note(name))
            for name in NAMES
        ]
        for prompt in prompts:
            mask = prompt[1]
            component.module(*prompt)
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts) for name, parts in rows.items()}


def test_inputs_are_those_of_the_whole_model_without_padding():
    prompts = draw_prompts()
    component = build_decoder()
    seen = observe_inputs(component, NAMES, prompts)
    wanted = watched(component, prompts)
    assert set(seen) == set(NAMES)
    for name in NAMES:
        assert seen[name].num_rows == len(wanted[name]) == 4 * (12 + 9)
        assert torch.equal(seen[name].rows, wanted[name])
        torch.testing.assert_close(seen[name].mean_size, wanted[name].abs().mean(dim=0))


def test_no_weight_and_no_hook_stays_behind():
    prompts = draw_prompts()
    component = build_decoder()
    observe_inputs(component, NAMES, prompts)
    assert all(parameter.is_meta for parameter in component.module.parameters())
    for module in component.module.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks


def test_module_is_as_before_where_a_sample_fails():
    prompts = draw_prompts()
    component = build_decoder()
    with pytest.raises(RuntimeError):
        observe_inputs(component, NAMES, [(prompts[0][0][..., :5], *prompts[0][1:])])
    assert all(parameter.is_meta for parameter in component.module.parameters())
    assert not any(module._forward_pre_hooks for module in component.module.modules())


def test_no_sample_is_refused():
    with pytest.raises(UsageError, match="nothing to calibrate with"):
        observe_inputs(build_decoder(), NAMES, [])


@pytest.mark.parametrize("piece", [1, 7, 100, 5000])
def test_rows_are_thinned_out_evenly_whatever_pieces_they_come_in(piece):
    rows = torch.arange(5000, dtype=torch.float32).reshape(-1, 1)
    observed = Observed(total=torch.zeros(1, dtype=torch.float64))
    for start in range(0, 5000, piece):
        observed.add(rows[start : start + piece])
    assert observed.stride == 16
    assert torch.equal(observed.rows, rows[::16])
    assert len(observed.rows) <= MAX_ROWS
    assert float(observed.mean_size) == pytest.approx(2499.5)
