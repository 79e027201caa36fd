"""What a family takes and gives: a checkpoint's tensors in, PyTorch modules and facts out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from numpy.typing import NDArray
from torch import nn

from gap_export.checkpoint.find.source import Checkpoint
from gap_export.checkpoint.weights import SAFETENSORS_NAMES, Weight, cast
from gap_export.families.common.decoder_kind import ChannelGroup
from gap_export.spec.architecture import Architecture
from gap_export.spec.manifest import (
    DecoderSpec,
    ImageSpec,
    TensorSpec,
    TextEncoderSpec,
    TilesSpec,
)
from gap_export.spec.recipe import Recipe

Device = Literal["meta", "cpu"]
Expected = Callable[[Architecture], Mapping[str, tuple[int, ...]]]


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A checkpoint by the names of a family's modules, whichever names its files use.

    Attributes:
        layout: Name of the layout it was read by.
        architecture: Its sizes.
        weights: By our names: ``tower.*``, ``projector.*``, ``decoder.*``, ``lm_head.weight``, and
            ``image_newline`` where the family has one. Exactly those of ``expected_tensors``.
        dtype: float32, float16 or bfloat16: the decoder's, which is the model's.
        eos_token_ids: Each ends an answer.
        image_token_id: What stands for the image in a prompt; None where nothing does.
        tokenizer: A tokenizer.json, or the content of one.
        files: Every file that was read, with the part it belongs to.
        notes: What the user should know of how it was read, a sentence each.
        tiles: How the checkpoint's own code cuts tiles, where that is not the recipe's way.
    """

    layout: str
    architecture: Architecture
    weights: Mapping[str, Weight]
    dtype: str
    eos_token_ids: tuple[int, ...]
    image_token_id: int | None
    tokenizer: Path | bytes
    files: tuple[tuple[str, Path], ...]
    notes: tuple[str, ...] = ()
    tiles: TilesSpec | None = None


class Layout(Protocol):
    """One way in which a family's checkpoints are stored."""

    @property
    def name(self) -> str:
        """For messages, e.g. ``llava-hf``."""
        ...

    def recognizes(self, checkpoint: Checkpoint) -> bool:
        """Whether the main part looks like this; cheap, and never raises for a strange folder."""
        ...

    def read(self, recipe: Recipe, checkpoint: Checkpoint, expected: Expected) -> ModelSource:
        """Read headers and configs; no tensor is loaded.

        Args:
            recipe: What the model is.
            checkpoint: Its parts.
            expected: Gives the shape of every tensor of a model of the sizes that were read.

        Raises:
            CheckpointError: a part is missing or damaged, does not fit the recipe, or its tensors
                are not exactly the model's.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Component:
    """One graph to be.

    Attributes:
        name: ``vision_encoder``, ``text_encoder``, ``embed_tokens`` or ``decoder_model_merged``.
        module: Takes the inputs in order and returns the outputs in order. Its parameters may lie
            on the meta device.
        inputs: Names, dtypes and shapes; a named dimension is dynamic.
        outputs: As inputs; a named dimension also occurs in an input, or is a sum of some.
        example_sizes: For each named input dimension a size to trace with, each another and >= 2.
        weight_refs: For each key of the module's state dict, what it is made of.
        constants: For each non-persistent buffer, its value.
        kv_contract: ``concat`` where a KV cache goes in and comes out.
        prunes: Whether the graph depends on the pruning; only the vision encoder's does.
        repeated: Dotted name of the module's list of equal layers, which need not be traced one by
            one; None where there is none.
        num_leading: How many of those come first and are followed by something of their own.
        channel_groups: What AWQ may scale in each of those layers.
    """

    name: str
    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    example_sizes: Mapping[str, int]
    weight_refs: Mapping[str, Weight]
    constants: Mapping[str, NDArray[Any]]
    kv_contract: Literal["none", "concat"] = "none"
    prunes: bool = False
    repeated: str | None = None
    num_leading: int = 0
    channel_groups: tuple[ChannelGroup, ...] = ()


def spec(name: str, *shape: int | str, dtype: str) -> TensorSpec:
    """The input or output of a component, its dimensions one by one."""
    return TensorSpec(name=name, dtype=dtype, shape=shape)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A pruned model in PyTorch: what everything else is compared with.

    Attributes:
        components: In the order vision_encoder, text_encoder if there is one, embed_tokens,
            decoder_model_merged.
        dtype: float32, float16 or bfloat16, of all weights and of the graphs' interfaces.
        decoder_spec: Facts of the decoder for the manifest.
        text_encoder_spec: None where the pruner reads no text.
        image_token_id: What stands for the image in a prompt; None where nothing does.
        newline_weight: [H], ends each row of a tiled image; None without tiles.
        assets: For each name in a bundle a file to copy, or what to write: the tokenizers.
        checkpoint_files: Every file of the checkpoint that was read, with its part.
        notes: What the user should know of how it was read, a sentence each.
        tiles: How the checkpoint's own code cuts tiles, where that is not the recipe's way.
    """

    components: tuple[Component, ...]
    dtype: str
    decoder_spec: DecoderSpec
    text_encoder_spec: TextEncoderSpec | None
    image_token_id: int | None
    newline_weight: Weight | None
    assets: Mapping[str, Path | bytes]
    checkpoint_files: tuple[tuple[str, Path], ...]
    notes: tuple[str, ...] = ()
    tiles: TilesSpec | None = None

    def image(self, recipe: Recipe) -> ImageSpec:
        """How an image is prepared for this checkpoint."""
        return recipe.image if self.tiles is None else replace(recipe.image, tiles=self.tiles)

    @property
    def vision_encoder(self) -> nn.Module:
        """(pixel_values [, text_embeds]) -> (image_features, keep_indices)."""
        return self.component("vision_encoder").module

    @property
    def text_encoder(self) -> nn.Module | None:
        """(input_ids) -> text_embeds; None where the pruner reads no text."""
        found = [c.module for c in self.components if c.name == "text_encoder"]
        return found[0] if found else None

    @property
    def embed_tokens(self) -> nn.Module:
        """(input_ids) -> inputs_embeds."""
        return self.component("embed_tokens").module

    @property
    def decoder(self) -> nn.Module:
        """(inputs_embeds, attention_mask, position_ids, *past) -> (logits, *present).

        ``position_ids`` are what RoPE sees, that is ids *after* the GAP remap.
        """
        return self.component("decoder_model_merged").module

    @property
    def newline(self) -> torch.Tensor | None:
        """[H], in :attr:`dtype`; None without tiles.

        Raises:
            CheckpointError: it cannot be read, or does not fit the dtype.
        """
        if self.newline_weight is None:
            return None
        return cast(self.newline_weight, SAFETENSORS_NAMES[self.dtype]).load()

    def component(self, name: str) -> Component:
        """The component of that name; one that is always there, or KeyError."""
        return {c.name: c for c in self.components}[name]
