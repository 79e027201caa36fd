"""Our export of the checkpoint, and the proof that its weights are the right ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from gap_export.spec.requests import PruningRequest

RECIPE = "llava-1.5-7b"
DECODER = "decoder_model_merged"
_NO_RESIDUAL = ("ReduceMean", "Constant")


def export(checkpoint: str, out: str, recipe: str = RECIPE) -> dict[str, Any]:
    """Export as ``gap-export CHECKPOINT --recipe RECIPE --keep 0.3 --out OUT`` does."""
    from gap_export.exporting import ExportOptions, export_model

    report = export_model(
        ExportOptions(
            model=checkpoint,
            pruning=PruningRequest(keep_ratio=0.3),
            recipe=recipe,
            out=Path(out),
            force=True,
        )
    )
    return report.to_plain()


def new_bytes(bundle: Path, checkpoint: Path) -> int:
    """Bytes that the bundle takes beside the checkpoint: blocks of files that are not its files."""
    theirs = {(s.st_dev, s.st_ino) for s in (p.stat() for p in checkpoint.rglob("*"))}
    own = [p.stat() for p in bundle.rglob("*") if p.is_file()]
    return sum(512 * s.st_blocks for s in own if (s.st_dev, s.st_ino) not in theirs)


def answer(bundle: str) -> dict[str, float]:
    """Ask the bundle one thing, for two tokens, in a session with its default settings.

    Returns:
        Memory that is the process's own, in bytes (weights that are mapped from their files are
        not: the system can drop and read them again), and milliseconds by stage.
    """
    from gap_export import GroundingSession

    image = np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8)
    with GroundingSession.open(bundle) as session:
        manifest = session.manifest
        session.manifest = replace(manifest, prompt=replace(manifest.prompt, max_new_tokens=2))
        timings = session.ground(image, "the red cup on the left").timings_ms
        status = Path("/proc/self/status").read_text()
    own = next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon"))
    return {"own_bytes": 1024.0 * int(own), **timings}


def prove(checkpoint: str, bundle: str, num_layers: int, num_tokens: int) -> dict[str, Any]:
    """One prefill of the bundle's decoder, cut to its first layers, against torch.

    Returns:
        The largest difference of the logits, and the largest logit.
    """
    import torch

    rng = np.random.default_rng(0)
    embeds = (rng.standard_normal((1, num_tokens, 4096)) * 0.02).astype(np.float16)
    # Positions with holes, as pruning leaves them.
    kept = np.sort(rng.choice(3 * num_tokens, num_tokens, replace=False))[None].astype(np.int64)
    candidate = _run_cut(Path(bundle), num_layers, embeds, kept)
    with torch.inference_mode():
        reference = _run_torch(Path(checkpoint), num_layers, embeds, kept)
    return {
        "max_abs_diff": float(np.abs(candidate - reference).max()),
        "max_abs_logit": float(np.abs(reference).max()),
        "same_token": bool(candidate.argmax() == reference.argmax()),
    }


def _run_cut(bundle: Path, num_layers: int, embeds: np.ndarray, kept: np.ndarray) -> np.ndarray:
    from gap_export.runtime.backends.quiet_onnxruntime import ort

    path = bundle / f"{DECODER}.onnx"
    model = ir.load(path)
    cut_decoder(model, num_layers)
    target = bundle.parent / f"{bundle.name}-cut"
    target.mkdir(exist_ok=True)
    for file in bundle.glob("*.safetensors"):
        link = target / file.name
        link.unlink(missing_ok=True)
        link.hardlink_to(file)
    ir.save(model, target / path.name)
    session = ort.InferenceSession(str(target / path.name), providers=["CPUExecutionProvider"])
    length = embeds.shape[1]
    feed = {
        "inputs_embeds": embeds,
        "attention_mask": np.ones((1, length), np.int64),
        "position_ids": np.arange(length)[None],
        "kept_positions": kept,
    }
    for value in session.get_inputs():
        if value.name.startswith("past_key_values."):
            feed[value.name] = np.zeros((1, 32, 0, 128), np.float16)
    logits: np.ndarray = session.run(["logits"], feed)[0][0, -1].astype(np.float32)
    return logits


def cut_decoder(model: ir.Model, num_layers: int) -> None:
    """Leave a decoder's first layers and its head, in place."""
    graph = model.graph
    boundary = _residual_before(graph, f"layers.{num_layers}.input_layernorm.weight")
    last = _residual_before(graph, "norm.weight")
    for node, index in list(last.uses()):
        node.replace_input_with(index, boundary)
    for values in (graph.inputs, graph.outputs):
        for value in list(values):
            parts = (value.name or "").split(".")
            if parts[0] in ("past_key_values", "present") and int(parts[1]) >= num_layers:
                values.remove(value)
    RemoveUnusedNodesPass()(model)


def _residual_before(graph: ir.Graph, norm_weight: str) -> ir.Value:
    """The hidden state that a norm reads: the nearest sum of two values behind it."""
    waiting = [user for user, _ in graph.initializers[norm_weight].uses()]
    while waiting:
        node = waiting.pop(0)
        inputs = [value for value in node.inputs if value is not None]
        producers = [value.producer() for value in inputs]
        # A norm adds its epsilon to a mean; a residual is the sum of two computed values.
        sums = all(p is not None and p.op_type not in _NO_RESIDUAL for p in producers)
        if node.op_type == "Add" and sums:
            return node.outputs[0]
        waiting += [producer for producer in producers if producer is not None]
    raise LookupError(f"no residual before {norm_weight}")


def _run_torch(
    checkpoint: Path, num_layers: int, embeds: np.ndarray, kept: np.ndarray
) -> np.ndarray:
    """The same layers in transformers, read with the safetensors library, in float32."""
    import json

    import torch
    from safetensors import safe_open
    from transformers import LlamaConfig, LlamaForCausalLM

    from export_bench.checkpoint import CONFIG

    text = {**CONFIG["text_config"], "num_hidden_layers": num_layers}  # type: ignore[dict-item]
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**text))
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    state = {}
    for key in model.state_dict():
        name = f"language_model.{key}"
        with safe_open(checkpoint / index[name], "pt") as file:
            state[key] = file.get_tensor(name).float()
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    model.eval()
    out = model(
        inputs_embeds=torch.from_numpy(embeds).float(),
        position_ids=torch.from_numpy(kept),
        # Each token sees those before it, at any distance of their ids.
        attention_mask=torch.ones(1, embeds.shape[1], dtype=torch.int64),
        logits_to_keep=1,
    )
    logits: np.ndarray = out.logits[0, -1].numpy()
    return logits
