"""Small models for lowering: every family's graphs with drawn weights, and graphs from text."""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file

from gap_export.checkpoint.find.source import Checkpoint
from gap_export.checkpoint.weights import index_files, place_reference, store_quantized
from gap_export.errors import PassError
from gap_export.exporting.trace import trace_component
from gap_export.families import build_reference, resolve_pruning
from gap_export.graph.passes.graph_pass import GraphPass, fingerprint
from gap_export.graph.passes.quantize_linear import QuantizeLinear
from gap_export.graph.pipelines import PIPELINES, run_pipeline
from gap_export.spec.architecture import Architecture, DecoderShape, ProjectorShape, VisionShape
from gap_export.spec.manifest import Attention
from gap_export.spec.recipe import Recipe, find_recipe
from gap_export.spec.requests import PruningRequest
from tests.shared import SharedFolder

NUM_LAYERS = 2
MAX_POSITIONS = 4096
HIDDEN = 64
_DECODER = "decoder_model_merged"


@dataclass(frozen=True, kw_only=True)
class Family:
    """A shipped recipe that is given small sizes.

    Attributes:
        recipe: Its name.
        pruner: Which one.
        heads: Heads of the decoder, with 16 numbers each.
        key_value_heads: Fewer of them share.
        tower_width: Width of the vision tower, which has 2 heads.
        join: Patches to a token.
        decoder: What else is special of its decoder.
        attention: How it weighs tokens.
    """

    recipe: str
    pruner: str
    heads: int = 4
    key_value_heads: int = 4
    tower_width: int = 64
    join: int = 1
    activation: str = "quick_gelu"
    projector: str | None = "gelu"
    decoder: Mapping[str, Any] = field(default_factory=dict)
    attention: Attention = "plain"

    @property
    def decoder_shape(self) -> DecoderShape:
        """Two layers of 64 numbers."""
        plain: dict[str, Any] = {
            "hidden_size": HIDDEN,
            "intermediate_size": 96,
            "num_layers": NUM_LAYERS,
            "num_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "head_dim": 16,
            "vocab_size": 100,
            "max_position_embeddings": MAX_POSITIONS,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e4,
        }
        return DecoderShape(**plain | dict(self.decoder))


FAMILIES = {
    "llava": Family(recipe="llava-1.5-7b", pruner="text"),
    # Grouped heads, and a pruner that reads the weights of attention.
    "llava_next": Family(recipe="llava-1.6-mistral-7b", pruner="fastervlm", key_value_heads=2),
    "shikra": Family(recipe="shikra-7b", pruner="cls", projector=None, key_value_heads=1),
    # 24 numbers a head: no power of two, as in EVA (88).
    "minigpt_v2": Family(
        recipe="minigpt-v2",
        pruner="spatial",
        tower_width=48,
        join=4,
        activation="gelu",
        projector=None,
    ),
    # The decoder of Qwen3-VL: three position axes that take turns, normalized heads that are wider
    # together than the hidden state, and an input behind the first layer.
    "interleaved": Family(
        recipe="llava-1.5-7b",
        pruner="spatial",
        heads=6,
        key_value_heads=2,
        decoder={
            "rope_sections": (4, 2, 2),
            "rope_interleaved": True,
            "qk_norm": True,
            "num_taps": 1,
        },
    ),
    "proportional": Family(
        recipe="llava-1.5-7b", pruner="spatial", key_value_heads=2, attention="proportional"
    ),
    # That of Qwen2.5-VL: each axis has a run of frequencies, and heads have biases.
    "chunked": Family(
        recipe="llava-1.5-7b",
        pruner="spatial",
        key_value_heads=2,
        decoder={"rope_sections": (2, 3, 3), "attention_bias": "qkv", "rope_theta": 1e6},
    ),
}
# One of each kind: what families share is looked at once.
DECODERS = (
    "llava",
    "llava_next",
    "interleaved",
    "proportional",
    pytest.param("chunked", marks=pytest.mark.full),
)
COMPONENTS = [
    *((family, "vision_encoder") for family in ("llava", "llava_next", "minigpt_v2")),
    # What it has of its own is a Clip of floats.
    pytest.param("shikra", "vision_encoder", marks=pytest.mark.full),
    ("llava", "text_encoder"),
    ("llava", "embed_tokens"),
    # Its words get planes of nothing, for the inputs behind later layers.
    ("interleaved", "embed_tokens"),
    *((family, _DECODER) for family in ("llava", "llava_next", "interleaved")),
    pytest.param("chunked", _DECODER, marks=pytest.mark.full),
]


class LoweringModels:
    """Base graphs by family and dtype, traced once; a dtype's weights are those of float16.

    Attributes:
        folder: Belongs to this process alone, for what tests make of them.
    """

    def __init__(self, shared: SharedFolder, folder: Path) -> None:
        torch.set_num_threads(1)
        self._shared = shared
        self.folder = folder
        self._models: dict[tuple[str, str, str], ir.Model] = {}

    def base(self, family: str, component: str, dtype: str = "float16") -> ir.Model:
        """A graph behind its base pipeline; its weights lie below :attr:`folder`."""
        key = family, component, dtype
        if key not in self._models:
            folder = self.folder / f"{family}_{dtype}"
            name = f"{component}_base.onnx"

            def trace(path: Path) -> None:
                path.mkdir()
                ir.save(_trace(FAMILIES[family], component, dtype, path), path / name)

            made = self._shared.once(f"{family}_{dtype}_{component}", trace)
            shutil.copytree(made, folder, dirs_exist_ok=True)
            self._models[key] = ir.load(folder / name)
        return self._models[key]

    def quantize(self, model: ir.Model, family: str, name: str) -> int:
        """Have the matrices of a float16 decoder's layers read INT4; how many there are."""
        folder = self.folder / f"{family}_float16"
        held = {
            key: ref
            for key, ref in index_files([folder / f"{_DECODER}.safetensors"]).items()
            if key.startswith("layers.") and len(ref.shape) == 2
        }
        places = store_quantized(
            folder / f"{name}.safetensors", held, block_size=32, dtypes=["F16"]
        )
        run_pipeline(model, [QuantizeLinear(places)])
        return len(held)

    def save(self, model: ir.Model, name: str, family: str, dtype: str = "float16") -> Path:
        """Write a graph beside its weights."""
        path = self.folder / f"{family}_{dtype}" / f"{name}.onnx"
        ir.save(model, path)
        return path


def small_recipe(case: Family) -> Recipe:
    """The shipped recipe, 4 x 4 patches of 8 pixels."""
    shipped, _ = find_recipe(case.recipe)
    plain = shipped.model_dump()
    plain |= {
        "grid": {"rows": 4, "cols": 4 // case.join},
        "special_tokens": {"<s>": 1, "</s>": 2, "<image>": 3},
        "architecture": None,
    }
    plain["image"] |= {"height": 32, "width": 32}
    if plain["image"]["tiles"] is not None:
        plain["image"]["tiles"] = {"resolutions": [[32, 64], [64, 32], [64, 64]]}
    if plain["text_tower"] is not None:
        sizes = {"width": 32, "intermediate_size": 64, "num_layers": 2, "num_heads": 2}
        plain["text_tower"]["shape"] |= {
            **sizes, "vocab_size": 80, "max_tokens": 16, "embed_dim": 24, "eos_token_id": 79,
        }  # fmt: skip
    recipe = Recipe.model_validate(plain)
    return recipe.model_copy(update={"architecture": _architecture(case)})


def _architecture(case: Family) -> Architecture:
    return Architecture(
        vision=VisionShape(
            width=case.tower_width,
            intermediate_size=96,
            num_layers=3,
            num_heads=2,
            layer_norm_eps=1e-5,
            activation=case.activation,
            image_size=32,
            patch_size=8,
        ),
        projector=ProjectorShape(
            width=case.tower_width * case.join, hidden_size=HIDDEN, activation=case.projector
        ),
        decoder=case.decoder_shape,
    )


def _trace(case: Family, name: str, dtype: str, folder: Path) -> ir.Model:
    recipe = small_recipe(case)
    pruning = resolve_pruning(
        recipe,
        PruningRequest(
            pruner=case.pruner, keep_ratio=0.3, order="raster", attention=case.attention
        ),
    )
    nothing = Checkpoint(parts={}, random_seed=0)
    reference = build_reference(recipe, nothing, pruning, device="meta", dtype=dtype)
    component = reference.component(name)
    drawn = {
        key: _draw(key, tuple(weight.shape)).to(getattr(torch, dtype))
        for key, weight in component.weight_refs.items()
    }
    file = folder / f"{name}.safetensors"
    save_file(drawn, file)
    placed = {key: place_reference(ref, file.name) for key, ref in index_files([file]).items()}
    model = trace_component(component, placed=placed)
    run_pipeline(model, PIPELINES[name])
    return model


def _draw(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Draws a weight of a size that keeps what comes out about 1, in float16."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
    if len(shape) == 1:
        drawn = noise * 0.1 + float("norm" in key and key.endswith("weight"))
    elif "embedding" in key or key == "weight":
        drawn = noise * 0.5
    else:
        drawn = noise * 1.5 / noise[0].numel() ** 0.5
    return drawn.to(torch.float16)


def session(path: Path) -> onnxruntime.InferenceSession:
    """On one thread of the CPU, without what it warns of."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    # That it copies caches, which on a CPU does not matter.
    options.log_severity_level = 3
    # 1 is float32. By itself it rounds what meets INT4 weights to 8 bits, in opset 21 alone.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def parse(text: str, **initializers: np.ndarray) -> ir.Model:
    """A model from ONNX's text form, with shapes inferred.

    Args:
        text: Graph alone; opset and IR version are put before it.
        **initializers: Values of inputs that are to be initializers.
    """
    whole = f'<ir_version: 10, opset_import: ["" : 20]>\n{text}'
    proto = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(whole))
    model = ir.from_proto(proto)
    assert isinstance(model, ir.Model)
    for name, array in initializers.items():
        (value,) = (v for v in model.graph.inputs if v.name == name)
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(array, name=name)
        model.graph.register_initializer(value)
    for number, node in enumerate(model.graph):
        node.name = node.name or f"{node.op_type}_{number}"
    return model


def changed(text: str, *changes: tuple[str, str]) -> str:
    """A text with parts that must be there replaced."""
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return text


def check_declined(graph_pass: GraphPass, model: ir.Model, message: str) -> None:
    """A pass refuses a model, and leaves it as it was."""
    before = fingerprint(model)
    with pytest.raises(PassError, match=message):
        graph_pass.run(model)
    assert fingerprint(model) == before


def kinds(model: ir.Model) -> list[str]:
    """Operators in order."""
    return [node.op_type for node in model.graph]


def run(model: ir.Model, **feeds: Any) -> Sequence[np.ndarray]:
    """Outputs of a model that has all its numbers inside."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    raw = ir.to_proto(model).SerializeToString()
    runner = onnxruntime.InferenceSession(raw, options, providers=["CPUExecutionProvider"])
    found: Sequence[np.ndarray] = runner.run(None, feeds)
    return found
