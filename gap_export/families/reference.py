"""What a family hands to the rest: PyTorch modules, and all that tracing them needs to know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from numpy.typing import NDArray
from torch import nn

from gap_export.manifest import DecoderSpec, PruningSpec, TensorSpec, TextEncoderSpec
from gap_export.pruning import Reading
from gap_export.recipe import Recipe
from gap_export.weights import TensorRef

Device = Literal["meta", "cpu"]


@dataclass(frozen=True, kw_only=True)
class Component:
    """One graph to be.

    Attributes:
        name: ``vision_encoder``, ``text_encoder``, ``embed_tokens`` or ``decoder_model_merged``.
        module: Takes the inputs in order and returns the outputs in order. Its parameters may lie
            on the meta device.
        inputs: Names, dtypes and shapes; a named dimension is dynamic.
        outputs: Likewise; a named dimension also occurs in an input, or is a sum of some.
        example_sizes: For each named input dimension a size to trace with, each another and >= 2.
        weight_refs: For each key of the module's state dict, where its bytes are.
        constants: For each non-persistent buffer, its value.
        kv_contract: ``concat`` where a KV cache goes in and comes out.
        prunes: Whether the graph depends on the pruning; only the vision encoder's does.
    """

    name: str
    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    example_sizes: Mapping[str, int]
    weight_refs: Mapping[str, TensorRef]
    constants: Mapping[str, NDArray[Any]]
    kv_contract: Literal["none", "concat"] = "none"
    prunes: bool = False


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A pruned model in PyTorch: what everything else is compared with.

    Attributes:
        components: In the order vision_encoder, text_encoder if there is one, embed_tokens,
            decoder_model_merged.
        decoder_spec: Facts of the decoder for the manifest.
        text_encoder_spec: None where the pruner reads no text.
        image_token_id: What stands for the image in a prompt, by the checkpoint's config.
        weight_files: For each safetensors file the components point into, its name in a bundle.
        tokenizer_files: (source, name in a bundle).
        checkpoint_files: Every file of the checkpoint that was read.
    """

    components: tuple[Component, ...]
    decoder_spec: DecoderSpec
    text_encoder_spec: TextEncoderSpec | None
    image_token_id: int
    weight_files: Mapping[Path, str]
    tokenizer_files: tuple[tuple[Path, str], ...]
    checkpoint_files: tuple[Path, ...]

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

    def component(self, name: str) -> Component:
        """The component of that name; one that is always there, or KeyError."""
        return {c.name: c for c in self.components}[name]


class Family(Protocol):
    """An architecture: knows its checkpoints' keys and builds its modules."""

    name: str

    def readings(self, recipe: Recipe) -> frozenset[Reading]:
        """What a pruner may read from this model."""
        ...

    def build(
        self, recipe: Recipe, checkpoint: Path, pruning: PruningSpec, *, device: Device
    ) -> Reference:
        """See :func:`gap_export.families.build_reference`."""
        ...
