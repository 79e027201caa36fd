"""Write what has been trained as Hugging Face files that load without this repository."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig

from gap_export.evaluation.refshapes import IMAGE_SIZE
from refshapes_training import vocabulary as vocab
from refshapes_training.model import PIXEL_MEAN, PIXEL_STD, RefShapesModel


def export_checkpoint(model: RefShapesModel, folder: Path) -> None:
    """Write model, tokenizer and preprocessing; float32 throughout.

    Args:
        model: Model on any device.
        folder: Where to; made if need be, files of the same name are replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = model.float().cpu()
    model.llava.generation_config = GenerationConfig(
        bos_token_id=vocab.BOS,
        eos_token_id=vocab.EOS,
        pad_token_id=vocab.PAD,
        do_sample=False,
        max_new_tokens=8,
    )
    model.llava.save_pretrained(folder)
    vocab.build_tokenizer().save_pretrained(folder)
    _write_json(folder / "preprocessor_config.json", _PREPROCESSOR)
    clip = folder / "clip"
    model.text.save_pretrained(clip)
    vocab.build_tokenizer(end_of_text=True).save_pretrained(clip)
    weight = model.visual_projection.weight.detach().to(torch.float32).contiguous()
    save_file({"visual_projection.weight": weight}, clip / "visual_projection.safetensors")
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


_PREPROCESSOR: dict[str, object] = {
    "image_processor_type": "CLIPImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    "resample": 3,
    "do_center_crop": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": list(PIXEL_MEAN),
    "image_std": list(PIXEL_STD),
}
