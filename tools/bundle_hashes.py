#!/usr/bin/env python3
"""Whether exports are still the same bytes: what a change of the code's structure must prove.

    tools/bundle_hashes.py                 export all cases, compare with the recorded hashes
    tools/bundle_hashes.py --case llava-int4 --case llava-patch
    tools/bundle_hashes.py --record        write the hashes anew: only where bytes change on purpose

Every demo model, six option sets each. Every file of every bundle is hashed. Of the manifest all
counts but where the checkpoint lay, and which versions of the tools made the bundle.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from gap_export.bundle.files import walk_files
from gap_export.checkpoint.find.source import resolve_model
from gap_export.exporting import ExportOptions, export_model
from gap_export.families import build_reference, resolve_pruning
from gap_export.patching import PatchOptions, patch_export
from gap_export.spec.manifest import MANIFEST_NAME, QuantizationSpec, parse_manifest
from gap_export.spec.requests import EnginesRequest, PruningRequest

RECORDED = Path(__file__).resolve().parent.parent / "tests/contract/bundle_hashes.json"
_INT4 = QuantizationSpec(dtype="int4", block_size=32, method="rtn", lm_head=False)
_COMMON: Mapping[str, Mapping[str, Any]] = {
    "fixed": {"pruner": "spatial"},
    "fp16": {"dtype": "float16"},
    "int4": {"quantization": _INT4},
    "orin": {"targets": ("orin",)},
}
_ADAPTIVE = {"adaptive": {"pruner": "prumerge", "budget": "adaptive"}}
# Its tower has no layer behind the selected one, so nothing adaptive reads it.
_GREEDY = {"greedy": {"pruner": "divprune"}}
CASES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    f"{model.removeprefix('refshapes-')}-{name}": (model, options)
    for model, second in (
        ("refshapes-llava", _ADAPTIVE),
        ("refshapes-shikra", _ADAPTIVE),
        ("refshapes-minigpt-v2", _GREEDY),
    )
    for name, options in {**_COMMON, **second, "patch": {}}.items()
}


def main(
    case: Annotated[list[str] | None, typer.Option(help="Only these.")] = None,
    record: bool = False,
) -> None:
    """Export, hash, compare; exit code 3 where a file is another than recorded."""
    recorded = json.loads(RECORDED.read_text(encoding="utf-8")) if RECORDED.exists() else {}
    hashes = dict(recorded.get("bundles", {}))
    tools: dict[str, str] = {}
    changed: list[str] = []
    for name in case or CASES:
        with tempfile.TemporaryDirectory() as folder:
            bundle = export_case(name, Path(folder))
            tools |= tools_of(bundle)
            found = hash_bundle(bundle)
        different = differing(hashes.get(name, {}), found)
        changed += [f"{name}: {file}" for file in different]
        typer.echo(f"{name}: {len(found)} files, {len(different)} not as recorded")
        hashes[name] = found
    if record:
        text = json.dumps({"tools": tools, "bundles": hashes}, indent=1, sort_keys=True)
        RECORDED.write_text(text + "\n", encoding="utf-8")
    elif changed:
        typer.echo("not the recorded bytes:\n" + "\n".join(changed), err=True)
        sys.exit(3)


def export_case(name: str, folder: Path) -> Path:
    """Make one case's bundle below ``folder``.

    Args:
        name: A key of ``CASES``.
        folder: Empty; other files may be written into it.
    """
    model, options = CASES[name]
    out = folder / "bundle"
    if name.endswith("-patch"):
        recipe = resolve_model(model)[0].name
        export = write_foreign_export(model, folder / "export")
        patch_export(
            PatchOptions(
                export=export,
                pruning=PruningRequest(keep_ratio=0.3, pruner="spatial"),
                recipe=recipe,
                out=out,
            )
        )
    else:
        rest = {name: options[name] for name in ("dtype", "quantization") if name in options}
        pruning = {name: options[name] for name in ("pruner", "budget") if name in options}
        export_model(
            ExportOptions(
                model=model,
                pruning=PruningRequest(keep_ratio=0.3, **pruning),
                engines=EnginesRequest(targets=options.get("targets", ())),
                out=out,
                **rest,
            )
        )
    return out


def hash_bundle(bundle: Path) -> dict[str, str]:
    """SHA-256 of each file by its path; of the manifest, of what does not hang on the machine."""
    found = {}
    for path, _ in walk_files(bundle):
        raw = (bundle / path).read_bytes()
        if path.startswith(MANIFEST_NAME) and path != MANIFEST_NAME:
            continue  # the hash of the manifest's own bytes
        if path == MANIFEST_NAME:
            plain = json.loads(raw)
            del plain["tools"]
            for part in plain["source"]["parts"]:
                del part["location"]
                # An export that was traced just now names the tracer's version in its graphs.
                part["files"] = [file["path"] for file in part["files"]]
            raw = json.dumps(plain, sort_keys=True).encode()
        found[path] = hashlib.sha256(raw).hexdigest()
    return found


def differing(recorded: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Files whose hashes are not equal, or that only one side has."""
    every = sorted(recorded.keys() | found.keys())
    return [file for file in every if recorded.get(file) != found.get(file)]


def tools_of(bundle: Path) -> dict[str, str]:
    """Versions of what decides a bundle's bytes, gap-export's own left out."""
    manifest = parse_manifest((bundle / MANIFEST_NAME).read_bytes())
    return {name: version for name, version in manifest.tools.items() if name != "gap-export"}


def write_foreign_export(model: str, folder: Path) -> Path:
    """A demo model's unpruned graphs as torch's first exporter writes them, none of our passes."""
    recipe, checkpoint = resolve_model(model)
    pruning = resolve_pruning(
        recipe,
        PruningRequest(pruner="spatial", keep_ratio=1.0, order=None),
    )
    reference = build_reference(recipe, checkpoint, pruning, device="cpu", dtype="float32")
    modules = {component.name: component.module for component in reference.components}
    shape, image = reference.decoder_spec, recipe.image
    past = [
        f"past_key_values.{i}.{part}" for i in range(shape.num_layers) for part in ("key", "value")
    ]
    present = [name.replace("past_key_values", "present") for name in past]
    rows, fed, filled = 2, 3, 5
    cache = [torch.zeros(rows, shape.num_key_value_heads, filled, shape.head_dim) for _ in past]
    tokens = {0: "batch", 1: "sequence"}
    folder.mkdir()
    _export(
        _Features(modules["vision_encoder"]),
        (torch.zeros(1, 3, image.height, image.width),),
        {"pixel_values": {0: "images"}},
        {"image_features": {0: "images"}},
        folder / "vision_encoder.onnx",
    )
    _export(
        modules["embed_tokens"],
        (torch.ones(rows, fed, dtype=torch.int64),),
        {"input_ids": tokens},
        {"inputs_embeds": tokens},
        folder / "embed_tokens.onnx",
    )
    _export(
        modules["decoder_model_merged"],
        (
            torch.zeros(rows, fed, shape.hidden_size),
            torch.ones(rows, filled + fed, dtype=torch.int64),
            torch.arange(filled, filled + fed).repeat(rows, 1),
            *cache,
        ),
        {
            "inputs_embeds": tokens,
            "attention_mask": {0: "batch", 1: "total"},
            "position_ids": tokens,
            **{name: {0: "batch", 2: "past"} for name in past},
        },
        {"logits": {0: "batch"}, **{name: {0: "batch", 2: "total"} for name in present}},
        folder / "decoder_model_merged.onnx",
    )
    for name, asset in reference.assets.items():
        if isinstance(asset, bytes):
            (folder / name).write_bytes(asset)
        else:
            shutil.copyfile(asset, folder / name)
    (folder / "config.json").write_text(
        json.dumps(
            {
                "image_token_index": reference.image_token_id,
                "vision_config": {"image_size": image.height},
                "text_config": {
                    "eos_token_id": list(shape.eos_token_ids),
                    "max_position_embeddings": shape.max_position_embeddings,
                    "vocab_size": shape.vocab_size,
                    "hidden_size": shape.hidden_size,
                },
            }
        ),
        encoding="utf-8",
    )
    return folder


class _Features(nn.Module):
    """A vision encoder's features alone."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self._encoder = encoder

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self._encoder(pixel_values)[0]
        return features


def _export(
    module: nn.Module,
    example: tuple[torch.Tensor, ...],
    inputs: dict[str, dict[int, str]],
    outputs: dict[str, dict[int, str]],
    path: Path,
) -> None:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter warns of itself
        torch.onnx.export(
            module.eval(),
            example,
            path,
            dynamo=False,
            opset_version=17,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_axes={**inputs, **outputs},
        )


if __name__ == "__main__":
    typer.run(main)
