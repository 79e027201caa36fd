"""Stacks of layers, some of which cannot be stamped out."""

from __future__ import annotations

import torch
from torch import nn

LAYERS = 5


class Layer(nn.Module):
    def __init__(self, gain: float = 2.0) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.gain = gain

    def forward(self, hidden: torch.Tensor, common: torch.Tensor) -> torch.Tensor:
        return hidden + torch.tanh(self.linear(hidden)) * common * self.gain


class OtherLayer(Layer):
    def forward(self, hidden: torch.Tensor, common: torch.Tensor) -> torch.Tensor:
        return hidden + torch.relu(self.linear(hidden)) * common * self.gain


class Stack(nn.Module):
    """A few layers; ``odd`` holds those that are not like the others."""

    def __init__(self, odd: dict[int, nn.Module] | None = None) -> None:
        super().__init__()
        odd = odd or {}
        self.layers = nn.ModuleList([odd.get(i, Layer()) for i in range(LAYERS)])

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        hidden, common = values, values.mean(dim=-1, keepdim=True)
        for layer in self.layers:
            hidden = layer(hidden, common)
        return hidden * 2.0


class ReadsAnEarlierLayer(Stack):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        states = [values]
        for layer in self.layers:
            states.append(layer(states[-1], values))
        return states[-1] + states[-2]


class GivesOutAnEarlierLayer(Stack):
    def forward(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        states = [values]
        for layer in self.layers:
            states.append(layer(states[-1], values))
        return states[-1], states[-2]


class DoesWithoutTheLastLayer(Stack):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        hidden = values
        for layer in self.layers[:-1]:
            hidden = layer(hidden, values)
        return hidden


class WorksBetweenLayers(Stack):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        hidden = values
        for layer in self.layers:
            hidden = torch.sin(layer(hidden, values))
        return hidden


class ReachesBackTwoLayers(Stack):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        before, hidden = values, values
        for layer in self.layers:
            before, hidden = hidden, layer(hidden, before)
        return hidden


class ReadsTheFirstLayer(Stack):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        hidden = first = self.layers[0](values, values)
        for layer in self.layers[1:]:
            hidden = layer(hidden, first)
        return hidden


class ReadsAWeightOfALayer(Stack):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return super().forward(values) + self.layers[1].linear.bias
