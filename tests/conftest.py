"""Fixtures for the whole suite: small random-weight checkpoints in the format of the real ones."""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from gap_export.checkpoint.find.source import Checkpoint
from gap_export.spec.manifest import (
    BoxSpec,
    DecoderSpec,
    GraphSpec,
    GridSpec,
    ImageSpec,
    Manifest,
    ModelSpec,
    PromptSpec,
    PruningSpec,
    SourceFile,
    SourcePart,
    SourceSpec,
    TensorSpec,
)
from gap_export.spec.recipe import Recipe, load_recipe
from gap_export.spec.requests import PruningRequest
from tests.shared import SharedExports, SharedFolder

WORDS = "the a small big red green blue circle square star object left-most above left of".split()
SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<image>", "<unk>"]
PROMPT_TOKENS = ["USER:", "ASSISTANT:", "[", "]", ","]
COORDINATES = [f"{n / 100:.2f}" for n in range(100)]
VOCABULARY = [*SPECIAL_TOKENS, *PROMPT_TOKENS, *WORDS, *COORDINATES]

SAMPLE_PRUNING = PruningSpec(
    pruner="spatial",
    order="raster",
    extra_token="none",
    positions="gap",
    keep_ratio=0.3,
    seed=None,
    num_visual_tokens=16,
    num_kept_tokens=5,
    num_emitted_tokens=5,
    text_similarity_sign=None,
)

# Some tests import ONNX Runtime themselves; it reports nothing from there either.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

CheckpointFactory = Callable[..., Path]

pytest_plugins = ["tests.limits"]


def pytest_collection_finish() -> None:
    """Save all later tests work that gives the same each time, or nothing."""
    if "onnxruntime" in sys.modules:
        import onnxruntime

        class OneThread(onnxruntime.SessionOptions):
            """Threads of a session wait for work in a loop, and models this small have none."""

            def __init__(self) -> None:
                super().__init__()
                self.intra_op_num_threads = 1

        onnxruntime.SessionOptions = OneThread
    # What is imported by now stays, and was looked through for garbage again and again.
    gc.collect()
    gc.freeze()
    # An export makes millions of objects that die without it.
    gc.set_threshold(50_000, 20, 100)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> SharedFolder:
    """Where workers put what they share."""
    root = tmp_path_factory.getbasetemp()
    # A worker's folder lies in that of the run.
    root = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "shared"
    root.mkdir(exist_ok=True)
    return SharedFolder(root)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(shared: SharedFolder) -> Iterator[None]:
    """What the package keeps for the next run stays out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(shared.root / "cache"))
        yield


@pytest.fixture(scope="session", autouse=True)
def _shared_traces(shared: SharedFolder) -> None:
    """Exports look up what torch has made of a model of the same shape."""
    # Where no test imports torch, those that export see to it by way of `exports`.
    if "torch" in sys.modules:
        from tests.shared_traces import share_traces

        share_traces(shared)


@pytest.fixture(scope="session")
def exports(shared: SharedFolder) -> SharedExports:
    """Makes bundles that several tests look at."""
    return SharedExports(shared)


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> CheckpointFactory:
    """Builds a random LLaVA checkpoint with its recipe; see :func:`_build_checkpoint`."""

    def make(**options: Any) -> Path:
        folder = tmp_path_factory.mktemp("checkpoint") / "tiny-llava"
        _build_checkpoint(folder, **options)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_checkpoint(shared: SharedFolder) -> Path:
    """A random LLaVA: 32 px, 4x4 visual tokens, 3 vision layers, 2 Llama layers, GQA 4/2.

    Holds config.json, generation_config.json, model.safetensors, tokenizer.json, recipe.yaml and
    clip/ (the text tower, its tokenizer and visual_projection.safetensors). Read only: copy before
    changing it.
    """
    return shared.once("tiny-llava", _build_checkpoint)


@pytest.fixture(scope="session")
def tiny_recipe(tiny_checkpoint: Path) -> Recipe:
    """The recipe inside :func:`tiny_checkpoint`."""
    return load_recipe(tiny_checkpoint / "recipe.yaml")


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path, exports: SharedExports) -> Path:
    """The tiny checkpoint, exported with 30 % of its tokens by the spatial pruner. Read only."""
    return exports.bundle(model=str(tiny_checkpoint), pruner="spatial", keep_ratio=0.3)


@pytest.fixture(scope="session")
def tiny_text_bundle(tiny_checkpoint: Path, exports: SharedExports) -> Path:
    """As :func:`tiny_bundle`, with the pruner that reads the expression. Read only."""
    return exports.bundle(model=str(tiny_checkpoint), pruner="text", keep_ratio=0.3)


@pytest.fixture(scope="session")
def tiny_whole_bundle(tiny_checkpoint: Path, exports: SharedExports) -> Path:
    """The tiny checkpoint with all its tokens. Read only."""
    return exports.bundle(model=str(tiny_checkpoint), keep_ratio=1.0)


@pytest.fixture(scope="session")
def demo_bundle(exports: SharedExports) -> Path:
    """The bundled demo model, exported with 30 % of its tokens. Read only."""
    return exports.bundle(model="refshapes-llava", pruner="spatial", keep_ratio=0.3)


@pytest.fixture(scope="session")
def demo_whole_bundle(exports: SharedExports) -> Path:
    """The bundled demo model with all its tokens, and the GAP node. Read only."""
    return exports.bundle(model="refshapes-llava", keep_ratio=1.0)


@pytest.fixture
def sample_manifest() -> Manifest:
    """A manifest of an imaginary model with a 4x4 grid, 5 tokens kept, no files listed."""
    return Manifest(
        model=ModelSpec(name="sample", family="llava", summary="for tests", license="Apache-2.0"),
        source=SourceSpec(
            parts=(
                SourcePart(
                    role="main",
                    location="/nowhere",
                    files=(SourceFile(path="model.safetensors", size=1, sha256="0"),),
                ),
            ),
        ),
        pruning=SAMPLE_PRUNING,
        grid=GridSpec(rows=4, cols=4),
        image=ImageSpec(
            height=32,
            width=32,
            preparation="pad",
            pad_color=(122, 116, 104),
            resample="bicubic",
            mean=(0.5, 0.25, 0.75),
            std=(0.25, 0.5, 0.125),
        ),
        prompt=PromptSpec(
            template="USER: <image> {expression} ASSISTANT:",
            image_token="<image>",
            max_expression_tokens=12,
            max_new_tokens=8,
        ),
        box=BoxSpec(syntax="bracketed", scale=1.0, frame="padded_square"),
        text_encoder=None,
        decoder=DecoderSpec(
            num_layers=1,
            num_key_value_heads=1,
            head_dim=8,
            hidden_size=8,
            vocab_size=len(VOCABULARY),
            max_position_embeddings=64,
            eos_token_ids=(2,),
        ),
        newline=None,
        dtype="float32",
        opset=20,
        graphs=(
            GraphSpec(
                component="embed_tokens",
                lowering="onnxruntime",
                dtype="float32",
                kv_contract="none",
                file="embed_tokens.onnx",
                inputs=(TensorSpec(name="input_ids", dtype="int64", shape=("B", "T")),),
                outputs=(TensorSpec(name="inputs_embeds", dtype="float32", shape=("B", "T", 8)),),
            ),
        ),
        files=(),
        tools={"gap-export": "0"},
    )


@pytest.fixture(scope="session")
def tiny_graphs(tiny_checkpoint: Path, tiny_recipe: Recipe, shared: SharedFolder) -> TinyGraphs:
    """The tiny model's graphs, each traced once in a run, and its PyTorch references."""
    return TinyGraphs(tiny_checkpoint, tiny_recipe, shared)


class TinyGraphs:
    """Exports on demand and remembers; all graphs lie in one folder with their weights."""

    def __init__(self, checkpoint: Path, recipe: Recipe, shared: SharedFolder) -> None:
        import torch

        # Models this small only lose by handing work to other threads.
        torch.set_num_threads(1)
        self.checkpoint = checkpoint
        self.recipe = recipe
        self._shared = shared
        self._references: dict[PruningSpec, Any] = {}
        self._sessions: dict[Path, Any] = {}

    def pruning(
        self,
        pruner: str = "spatial",
        keep_ratio: float | None = 0.3,
        order: Any = "raster",
        seed: int = 0,
        extra_token: Any = None,
        budget: Any = None,
        extra_position: Any = None,
    ) -> PruningSpec:
        from gap_export.families import resolve_pruning

        return resolve_pruning(
            self.recipe,
            PruningRequest(
                pruner=pruner,
                keep_ratio=keep_ratio,
                order=order,
                positions="gap",
                seed=seed,
                extra_token=extra_token,
                extra_position=extra_position,
                budget=budget,
            ),
        )

    def reference(self, *args: Any, **kwargs: Any) -> Any:
        """The reference on the CPU; arguments are those of :meth:`pruning`."""
        from gap_export.families import build_reference

        pruning = self.pruning(*args, **kwargs)
        if pruning not in self._references:
            self._references[pruning] = build_reference(
                self.recipe, Checkpoint.of(self.checkpoint), pruning, device="cpu"
            )
        return self._references[pruning]

    def path(self, component: str, *args: Any, bare: bool = False, **kwargs: Any) -> Path:
        """An ONNX file; ``bare`` leaves the passes out, so that a decoder has no GapRemap."""
        from gap_export.checkpoint.weights import place_reference
        from gap_export.exporting.trace import save_graph, trace_component
        from gap_export.families import build_reference
        from gap_export.graph.pipelines import PIPELINES, run_pipeline

        pruning = self.pruning(*args, **kwargs)
        mark = f"-{pruning.pruner}-{pruning.keep_ratio}-{pruning.order}-{pruning.seed}"
        mark += f"-{pruning.extra_token}-{pruning.extra_position}-{pruning.budget}"
        # Only what prunes depends on the pruning.
        name = component + (mark if component in {"vision_encoder", "token_pruner"} else "")
        name += "-bare" if bare else ""

        def trace(path: Path) -> None:
            parts = Checkpoint.of(self.checkpoint)
            meta = build_reference(self.recipe, parts, pruning, device="meta").component(component)
            placed = {
                key: place_reference(ref, self._weights(ref.file).name)
                for key, ref in meta.weight_refs.items()
            }
            model = trace_component(meta, placed=placed)
            if not bare:
                run_pipeline(model, PIPELINES[component])
            save_graph(model, path)

        return self._shared.once(f"{name}.onnx", trace)

    def _weights(self, file: Path) -> Path:
        """A copy of a file of weights beside the graphs."""
        name = f"{file.parent.name}-{file.name}"
        return self._shared.once(name, lambda path: shutil.copyfile(file, path))

    def session(self, component: str, *args: Any, **kwargs: Any) -> Any:
        """An ONNX Runtime session; arguments are those of :meth:`path`."""
        import onnxruntime

        path = self.path(component, *args, **kwargs)
        if path not in self._sessions:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            self._sessions[path] = onnxruntime.InferenceSession(
                path, options, providers=["CPUExecutionProvider"]
            )
        return self._sessions[path]


def _build_checkpoint(
    folder: Path,
    *,
    seed: int = 0,
    grid: int = 4,
    num_key_value_heads: int = 2,
    tie_word_embeddings: bool = False,
    max_position_embeddings: int = 256,
) -> None:
    """Write a random LLaVA checkpoint; matrices are scaled so that logits are O(1)."""
    import torch
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        CLIPVisionConfig,
        GenerationConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    generator = torch.Generator().manual_seed(seed)
    size = grid * 8
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=size,
        patch_size=8,
        projection_dim=16,
    )
    text = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=num_key_value_heads,
        head_dim=8,
        max_position_embeddings=max_position_embeddings,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=tie_word_embeddings,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=3,
        image_seq_length=grid * grid,
        vision_feature_layer=-2,
        tie_word_embeddings=tie_word_embeddings,
    )
    model = LlavaForConditionalGeneration(config)
    _randomise(model, generator)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model.save_pretrained(folder)

    clip = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=24,
            projection_dim=16,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )
    _randomise(clip, generator)
    clip.save_pretrained(folder / "clip")
    _write_visual_projection(folder / "clip" / "visual_projection.safetensors", generator)
    for name in ("tokenizer.json", "clip/tokenizer.json"):
        _write_tokenizer(folder / name)
    _write_recipe(folder / "recipe.yaml", grid=grid, size=size)


def _randomise(model: Any, generator: Any) -> None:
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2:
                parameter.copy_(noise * 0.1 + float("norm" in name and name.endswith("weight")))
            elif "embed" in name:
                parameter.copy_(noise * 0.5)
            else:
                parameter.copy_(noise * 1.5 / parameter[0].numel() ** 0.5)


def _write_visual_projection(path: Path, generator: Any) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"visual_projection.weight": torch.randn(16, 32, generator=generator) / 5.0}, path)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds tokenizer.json and clip/tokenizer.json of the tiny vocabulary; needs no torch."""
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "clip").mkdir()
    for name in ("tokenizer.json", "clip/tokenizer.json"):
        _write_tokenizer(folder / name)
    return folder


def _write_tokenizer(path: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

    vocabulary = {token: index for index, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL_TOKENS])
    # The text tower reads up to its end-of-text token; the LLM must not see one in a prompt.
    template = "<s> $A </s>" if path.parent.name == "clip" else "<s> $A"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.save(str(path))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (path.parent / "tokenizer_config.json").write_text(json.dumps(config))


def _write_recipe(path: Path, *, grid: int, size: int) -> None:
    recipe = {
        "name": "tiny-llava",
        "family": "llava",
        "summary": "random weights, for tests",
        "license": "Apache-2.0",
        "checkpoint": {"kind": "bundled"},
        "select_layer": -2,
        "grid": {"rows": grid, "cols": grid},
        "image": {
            "height": size,
            "width": size,
            "preparation": "pad",
            "pad_color": [122, 116, 104],
            "resample": "bicubic",
            "mean": [0.48, 0.46, 0.41],
            "std": [0.27, 0.26, 0.28],
        },
        "prompt": {
            "template": "USER: <image> {expression} ASSISTANT:",
            "question": {"start": "USER:", "end": "ASSISTANT:", "image": "<image>"},
            "image_token": "<image>",
            "max_expression_tokens": 16,
            "max_new_tokens": 8,
        },
        "box": {"syntax": "bracketed", "scale": 1.0, "frame": "padded_square"},
        "text_tower": {"folder": "clip", "similarity_sign": 1},
        "defaults": {"pruner": "spatial", "keep_ratio": 0.3},
    }
    path.write_text(yaml.safe_dump(recipe))
