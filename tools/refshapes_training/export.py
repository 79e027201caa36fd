"""Write what has been trained as files that load without this repository's tools."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    GenerationConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from gap_export.evaluation.refshapes import IMAGE_SIZE
from gap_export.families.common.checkpoints.whole import MODEL_TYPE
from refshapes_training.designs import INTERNVL, LLAVA, MINIGPT_V2, QWEN3_VL, SHIKRA
from refshapes_training.model import DECODER_WIDTH, RefShapesModel, decoder_config
from refshapes_training.qwen_tower import qwen_vision_config
from refshapes_training.towers import PIXEL_STATISTICS, VISION_LAYERS, vision_config
from refshapes_training.vocabulary import BOS, PAD, text_vocabulary

_FAMILIES = {SHIKRA.name: "shikra", MINIGPT_V2.name: "minigpt_v2"}
_SELECT_LAYER = -2


def export_checkpoint(model: RefShapesModel, folder: Path) -> None:
    """Write model, tokenizer and preprocessing; float32 throughout.

    `refshapes-llava`, `-qwen3-vl` and `-internvl` are written as transformers' own classes. The
    published layouts of Shikra and MiniGPT-v2 come in parts, deltas and pickles; theirs is one
    folder with this package's names.

    Args:
        model: Model on any device.
        folder: Where to; made if need be, files of the same name are replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = model.float().cpu()
    save = {LLAVA: _save_llava, QWEN3_VL: _save_qwen3_vl, INTERNVL: _save_internvl}
    save.get(model.design, _save_whole)(model, folder)
    if model.design.has_text_tower:
        _save_text_tower(model, folder / "clip")
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)


def _save_llava(model: RefShapesModel, folder: Path) -> None:
    llava = LlavaForConditionalGeneration(_llava_config(model))
    inner = llava.model
    inner.vision_tower.load_state_dict(model.vision_tower.state_dict())
    inner.language_model.load_state_dict(model.decoder.state_dict())
    inner.multi_modal_projector.load_state_dict(_projector(model))
    llava.lm_head.load_state_dict(model.lm_head.state_dict())
    _save_with_tokenizer(llava, model, folder)
    _write_json(folder / "preprocessor_config.json", _PREPROCESSOR)


def _save_qwen3_vl(model: RefShapesModel, folder: Path) -> None:
    ids = model.vocabulary.ids
    vision = qwen_vision_config(model.design, out_hidden_size=DECODER_WIDTH)
    qwen = Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(
            vision_config=vision.to_dict(),
            text_config=decoder_config(model.vocabulary).to_dict(),
            image_token_id=ids["<|image_pad|>"],
            video_token_id=ids["<|video_pad|>"],
            vision_start_token_id=ids["<|vision_start|>"],
            vision_end_token_id=ids["<|vision_end|>"],
            tie_word_embeddings=False,
        )
    )
    visual, tower = qwen.model.visual, model.vision_tower
    merger, *taps = model.projector
    # A still image is fed as two equal frames, so each has half the weight.
    frames = tower.patch_embedding.weight[:, :, None].expand(-1, -1, 2, -1, -1) / 2
    visual.load_state_dict(
        {
            "patch_embed.proj.weight": frames,
            "patch_embed.proj.bias": tower.patch_embedding.bias,
            "pos_embed.weight": torch.zeros_like(visual.pos_embed.weight),
            **_prefixed("blocks.", tower.blocks.state_dict()),
            **_prefixed("merger.", merger.state_dict()),
            **{
                f"deepstack_merger_list.{index}.{key}": tensor
                for index, tap in enumerate(taps)
                for key, tensor in tap.state_dict().items()
            },
        }
    )
    qwen.model.language_model.load_state_dict(model.decoder.state_dict())
    qwen.lm_head.load_state_dict(model.lm_head.state_dict())
    _save_with_tokenizer(qwen, model, folder)


def _save_internvl(model: RefShapesModel, folder: Path) -> None:
    join = model.design.join[0]
    intern = InternVLForConditionalGeneration(
        InternVLConfig(
            vision_config=vision_config(model.design).to_dict(),
            text_config=decoder_config(model.vocabulary).to_dict(),
            image_token_id=model.vocabulary.ids["<IMG_CONTEXT>"],
            image_seq_length=(model.design.patch_grid[0] // join) ** 2,
            downsample_ratio=1 / join,
            tie_word_embeddings=False,
        )
    )
    inner, embeddings = intern.model, model.vision_tower.embeddings
    inner.vision_tower.load_state_dict(
        {
            "embeddings.cls_token": embeddings.class_embedding[None, None],
            "embeddings.position_embeddings": embeddings.position_embedding.weight[None],
            "embeddings.patch_embeddings.projection.weight": embeddings.patch_embedding.weight,
            "embeddings.patch_embeddings.projection.bias": embeddings.patch_embedding.bias,
            **_prefixed("encoder.", model.vision_tower.encoder.state_dict()),
        }
    )
    norm, first, _, second = model.projector
    inner.multi_modal_projector.load_state_dict(
        {
            **_prefixed("layer_norm.", norm.state_dict()),
            **_prefixed("linear_1.", first.state_dict()),
            **_prefixed("linear_2.", second.state_dict()),
        }
    )
    inner.language_model.load_state_dict(model.decoder.state_dict())
    intern.lm_head.load_state_dict(model.lm_head.state_dict())
    _save_with_tokenizer(intern, model, folder)


def _save_with_tokenizer(whole: PreTrainedModel, model: RefShapesModel, folder: Path) -> None:
    whole.generation_config = GenerationConfig(
        bos_token_id=BOS,
        eos_token_id=model.vocabulary.eos,
        pad_token_id=PAD,
        do_sample=False,
        max_new_tokens=_max_new_tokens(model),
    )
    whole.save_pretrained(folder)
    model.vocabulary.build_tokenizer().save_pretrained(folder)


def _max_new_tokens(model: RefShapesModel) -> int:
    """An answer, its end, and some room."""
    return len(model.design.answer) + 4


def _save_whole(model: RefShapesModel, folder: Path) -> None:
    """See `gap_export.families.common.checkpoints.whole`."""
    tensors = {
        **_prefixed("tower.", model.vision_tower.state_dict()),
        **_prefixed("projector.", _projector(model)),
        **_prefixed("decoder.", model.decoder.state_dict()),
        **_prefixed("lm_head.", model.lm_head.state_dict()),
    }
    if model.design.tower == "eva":
        # EVA's keys have no bias; the layers' code, which is CLIP's, adds zeros.
        for index in range(VISION_LAYERS):
            key = f"tower.encoder.layers.{index}.self_attn.k_proj.bias"
            tensors[key] = tensors[key] * 0
    save_file(
        {key: value.contiguous() for key, value in tensors.items()}, folder / "model.safetensors"
    )
    config = {"model_type": MODEL_TYPE, "family": _FAMILIES[model.design.name]}
    _write_json(folder / "config.json", config)
    model.vocabulary.build_tokenizer().save_pretrained(folder)


def _save_text_tower(model: RefShapesModel, folder: Path) -> None:
    model.text.save_pretrained(folder)
    text_vocabulary().build_tokenizer(end_of_text=True).save_pretrained(folder)
    weight = model.visual_projection.weight.detach().contiguous()
    save_file({"visual_projection.weight": weight}, folder / "visual_projection.safetensors")


def _projector(model: RefShapesModel) -> dict[str, Tensor]:
    """The projector by the names of LLaVA's, `linear_1` and, of an MLP, `linear_2`."""
    state = model.projector.state_dict()
    if model.design.projector == "linear":
        return _prefixed("linear_1.", state)
    return {f"linear_{1 + (key[0] == '2')}.{key[2:]}": value for key, value in state.items()}


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: tensor.detach() for key, tensor in tensors.items()}


def _llava_config(model: RefShapesModel) -> LlavaConfig:
    return LlavaConfig(
        vision_config=vision_config(model.design),
        text_config=decoder_config(model.vocabulary),
        image_token_index=model.vocabulary.ids["<image>"],
        projector_hidden_act="gelu",
        vision_feature_layer=_SELECT_LAYER,
        vision_feature_select_strategy="default",
        image_seq_length=model.design.num_tokens,
        tie_word_embeddings=False,
    )


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


PIXEL_MEAN, PIXEL_STD = PIXEL_STATISTICS["clip"]
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
