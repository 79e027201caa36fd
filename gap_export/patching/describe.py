"""What a patched export's manifest says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx_ir as ir
from tokenizers import Tokenizer

from gap_export.errors import CheckpointError
from gap_export.exporting.describe import tool_versions
from gap_export.patching.decoder_interface import DecoderFacts
from gap_export.patching.model_facts import ModelFacts
from gap_export.patching.read_graph import ForeignGraph
from gap_export.spec.manifest import (
    DecoderSpec,
    GraphSpec,
    Manifest,
    ModelSpec,
    PruningSpec,
    SourceSpec,
    TensorSpec,
)
from gap_export.spec.recipe import Recipe

# The form that ONNX Runtime runs.
_LOWERING = "onnxruntime"
_TOOLS = ("onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy")


@dataclass(frozen=True, kw_only=True)
class PatchedGraph:
    """One graph as the bundle holds it."""

    component: str
    graph: ForeignGraph
    kv_contract: Literal["none", "concat"] = "none"

    @property
    def file(self) -> str:
        """Its name in the bundle."""
        return f"{self.component}.onnx"


def describe_patch(
    recipe: Recipe,
    pruning: PruningSpec,
    facts: ModelFacts,
    decoder: DecoderFacts,
    graphs: Sequence[PatchedGraph],
) -> Manifest:
    """The manifest, with neither source nor files yet.

    Raises:
        CheckpointError: a size or an end of answers that neither graphs nor configs say.
    """
    decoder_graph = next(each.graph for each in graphs if each.kv_contract != "none")
    return Manifest(
        model=ModelSpec(
            name=recipe.name,
            family=recipe.family,
            summary=f"{recipe.summary}; patched from an ONNX export",
            license=recipe.license,
        ),
        source=SourceSpec(parts=()),
        pruning=pruning,
        grid=recipe.grid,
        image=recipe.image,
        prompt=recipe.prompt,
        box=recipe.box,
        text_encoder=None,
        decoder=_decoder_spec(recipe, facts, decoder),
        newline=None,
        dtype=decoder_graph.dtype,
        opset=decoder_graph.model.opset_imports[""],
        graphs=tuple(
            GraphSpec(
                component=each.component,
                lowering=_LOWERING,
                dtype=each.graph.dtype,
                kv_contract=each.kv_contract,
                file=each.file,
                inputs=tuple(map(_tensor_spec, each.graph.model.graph.inputs)),
                outputs=tuple(map(_tensor_spec, each.graph.model.graph.outputs)),
            )
            for each in graphs
        ),
        files=(),
        tools=tool_versions(_TOOLS),
    )


def check_special_tokens(recipe: Recipe, tokenizer: Path) -> None:
    """See that the tokens a recipe counts on have the ids it says.

    Raises:
        CheckpointError: one is missing or another.
    """
    known = Tokenizer.from_file(str(tokenizer))
    for text, token in recipe.special_tokens.items():
        seen = known.token_to_id(text)
        if seen != token:
            raise CheckpointError(
                f"the export's {tokenizer.name} does not fit recipe {recipe.name}",
                seen=f"{text} is {'no token' if seen is None else f'token {seen}'}",
                allowed=f"token {token}",
                fix="use the tokenizer that the model was trained with",
            )


def _decoder_spec(recipe: Recipe, facts: ModelFacts, decoder: DecoderFacts) -> DecoderSpec:
    shape = None if recipe.architecture is None else recipe.architecture.decoder
    eos = tuple(recipe.special_tokens[text] for text in recipe.end_of_answer)
    eos = eos or facts.eos_token_ids
    if not eos:
        raise CheckpointError(
            "the token that ends an answer is not known",
            seen="no eos_token_id in config.json or generation_config.json",
            fix="add one to generation_config.json",
        )
    return DecoderSpec(
        num_layers=decoder.num_layers,
        num_key_value_heads=decoder.num_key_value_heads,
        head_dim=decoder.head_dim,
        hidden_size=_known(
            "hidden_size",
            decoder.hidden_size,
            facts.hidden_size,
            None if shape is None else shape.hidden_size,
        ),
        vocab_size=_known("vocab_size", decoder.vocab_size, facts.vocab_size),
        max_position_embeddings=_known(
            "max_position_embeddings",
            facts.max_position_embeddings,
            None if shape is None else shape.max_position_embeddings,
        ),
        eos_token_ids=eos,
        position_axes=decoder.position_axes,
    )


def _known(name: str, *sources: int | None) -> int:
    for value in sources:
        if value is not None:
            return value
    raise CheckpointError(
        f"the decoder's {name} is not known",
        seen="neither the graph, nor text_config in config.json, nor the recipe",
        fix="add it to text_config",
    )


def _tensor_spec(value: ir.Value) -> TensorSpec:
    """An input or output; a dimension that its maker left without a name gets one."""
    assert value.name and value.dtype is not None
    dims = [] if value.shape is None else list(value.shape)
    return TensorSpec(
        name=value.name,
        dtype=value.dtype.numpy().name,
        shape=tuple(
            dim if isinstance(dim, int) else str(dim.value or f"{value.name}_{axis}")
            for axis, dim in enumerate(dims)
        ),
    )
