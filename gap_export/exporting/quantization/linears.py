"""Which weights of a component are those of linear layers."""

from __future__ import annotations

from torch import nn

from gap_export.families import Component


def linear_keys(component: Component, *, lm_head: bool) -> tuple[str, ...]:
    """Keys of the weights [out, in] of a decoder's linear layers, in the module's order.

    Args:
        component: A decoder, with a stack of layers.
        lm_head: Whether linear layers outside that stack count, too: the LM head is one.
    """
    stack = "" if lm_head else f"{component.repeated}."
    return tuple(
        f"{name}.weight"
        for name, module in component.module.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(stack)
    )
