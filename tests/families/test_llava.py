"""The reference against transformers' own LLaVA, on random weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gap_export.checkpoint.find.source import Checkpoint
from gap_export.families import Reference, build_reference, resolve_pruning
from gap_export.spec.recipe import load_recipe
from gap_export.spec.requests import PruningRequest
from tests.families import reading
from tests.families.masked_oracle import logits_of_every_token

PRUNERS = ("cls", "text", "random", "spatial", "fastervlm")
ATOL = 2e-5


def reference(folder: Path, pruner: str = "spatial", keep_ratio: float = 1.0) -> Reference:
    return reading.build(None, folder, pruner, keep_ratio)


def transformers_model(folder: Path) -> Any:
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder, attn_implementation="eager")
    return model.eval()


def images(count: int, size: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(3))


def no_past(ref: Reference, batch: int) -> list[torch.Tensor]:
    spec = ref.decoder_spec
    empty = torch.zeros(batch, spec.num_key_value_heads, 0, spec.head_dim)
    return [empty] * (2 * spec.num_layers)


@pytest.fixture(
    scope="module",
    params=[{"num_key_value_heads": 2}, {"num_key_value_heads": 4}, {"tie_word_embeddings": True}],
    ids=["gqa", "mha", "tied"],
)
def checkpoint(request, make_checkpoint):
    return make_checkpoint(**request.param)


def test_unpruned_logits_equal_transformers_through_decode(checkpoint):
    ref, theirs = reference(checkpoint), transformers_model(checkpoint)
    ids = torch.randint(5, 120, (1, 24), generator=torch.Generator().manual_seed(1))
    ids[0, 2:18] = 3
    later = [7, 30, 99, 4]
    with torch.inference_mode():
        embeds = ref.embed_tokens(ids)
        embeds[:, 2:18] = ref.vision_encoder(images(1))[0]
        past, slots = no_past(ref, 1), torch.arange(24)[None]
        mask = torch.ones(1, 24, dtype=torch.int64)
        fed = ids
        for token in [*later, None]:
            logits, *past = ref.decoder(embeds, mask, slots, *past)
            wanted = theirs(input_ids=fed, pixel_values=images(1)).logits[:, -1:]
            assert wanted.abs().max() > 0.5
            assert (logits - wanted).abs().max() < ATOL
            if token is not None:
                step = torch.tensor([[token]])
                fed, embeds = torch.cat([fed, step], dim=1), ref.embed_tokens(step)
                slots = slots[:, -1:] + 1
                mask = torch.ones(1, fed.shape[1], dtype=torch.int64)


def test_unpruned_logits_of_every_token_equal_transformers(checkpoint):
    ref, theirs = reference(checkpoint), transformers_model(checkpoint)
    ids = torch.randint(5, 120, (1, 24), generator=torch.Generator().manual_seed(2))
    ids[0, 5:21] = 3
    with torch.inference_mode():
        embeds = ref.embed_tokens(ids)
        embeds[:, 5:21] = ref.vision_encoder(images(1))[0]
        wanted = theirs(input_ids=ids, pixel_values=images(1)).logits[0].numpy()
    assert np.abs(wanted).max() > 0.5
    assert np.abs(logits_of_every_token(ref, embeds.numpy()) - wanted).max() < ATOL


def test_features_and_attention_equal_transformers(tiny_checkpoint):
    theirs = transformers_model(tiny_checkpoint)
    tower = reference(tiny_checkpoint).vision_encoder.tower
    with torch.inference_mode():
        features = tower(images(2))
        seen = theirs.model.vision_tower(
            images(2), output_hidden_states=True, output_attentions=True
        )
        wanted = theirs.model.get_image_features(images(2)).pooler_output
        ours = reference(tiny_checkpoint).vision_encoder(images(2))[0]
    # Our tower drops CLS from the patches and gives it apart.
    assert (features.patches - seen.hidden_states[-2][:, 1:]).abs().max() < ATOL
    assert (features.cls - seen.hidden_states[-2][:, 0]).abs().max() < ATOL
    # hidden_states[-2] is what the last layer reads, so the layer before it produced it.
    attention = seen.attentions[-2][:, :, 0, 1:].mean(dim=1)
    assert (features.cls_attention - attention).abs().max() < ATOL
    received = seen.attentions[-2].mean(dim=(1, 2))[:, 1:]
    assert (features.received_attention() - received).abs().max() < ATOL
    assert (ours - torch.stack(list(wanted))).abs().max() < ATOL


def test_vision_encoder_runs_no_layer_beyond_the_select_layer(tiny_checkpoint):
    keys = reference(tiny_checkpoint).vision_encoder.state_dict()
    assert any(".layers.1." in key for key in keys)
    assert not any(".layers.2." in key or "post_layernorm" in key for key in keys)


def test_text_encoder_equals_transformers_and_ignores_padding(tiny_checkpoint):
    from transformers import CLIPTextModelWithProjection

    theirs = CLIPTextModelWithProjection.from_pretrained(tiny_checkpoint / "clip").eval()
    encoder = reference(tiny_checkpoint, "text").text_encoder
    rows = torch.tensor([[1, 10, 14, 16, 2], [1, 12, 124, 2, 0]])
    with torch.inference_mode():
        ours, wanted = encoder(rows), theirs(input_ids=rows).text_embeds
        alone = encoder(rows[1:, :4])
    assert (ours - wanted).abs().max() < ATOL
    assert (ours[1:] - alone).abs().max() < ATOL


@pytest.mark.parametrize("eos_token_id", [2, 9])
def test_text_encoder_pools_where_transformers_does(tiny_checkpoint, tmp_path, eos_token_id):
    """Id 2 is the old convention: the largest id of the row; any other: the first such id."""
    from transformers import CLIPTextModelWithProjection

    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "c"))
    theirs = CLIPTextModelWithProjection.from_pretrained(folder / "clip").eval()
    theirs.config.eos_token_id = theirs.text_model.eos_token_id = eos_token_id
    theirs.save_pretrained(folder / "clip")
    encoder = reference(folder, "text").text_encoder
    rows = torch.tensor([[1, 50, 9, 50, 9, 2], [1, 9, 9, 50, 2, 0]])
    with torch.inference_mode():
        difference = encoder(rows) - theirs(input_ids=rows).text_embeds
    assert difference.abs().max() < ATOL


@pytest.mark.parametrize(
    ("pruner", "order"),
    # spatial has nothing to order by
    [*((p, "raster") for p in PRUNERS), *((p, "score") for p in PRUNERS if p != "spatial")],
)
def test_pruned_features_are_the_unpruned_ones_at_keep_indices(tiny_graphs, pruner, order):
    encoder = tiny_graphs.reference(pruner, 0.3, order=order).vision_encoder
    text = [torch.randn(3, 16, generator=torch.Generator().manual_seed(5))]
    inputs = [images(3), *(text if pruner == "text" else [])]
    with torch.inference_mode():
        every, _, *_ = tiny_graphs.reference("spatial", 1.0).vision_encoder(images(3))
        features, keep, *_ = encoder(*inputs)
    assert keep.shape == (3, 5)
    index = keep[:, :, None].expand(-1, -1, every.shape[2])
    assert (features - every.gather(1, index)).abs().max() < ATOL
    raster = tiny_graphs.reference(pruner, 0.3).vision_encoder
    with torch.inference_mode():
        ascending = raster(*inputs)[1]
    assert torch.equal(keep.sort(dim=1).values, ascending)
    if order == "score":
        assert not torch.equal(keep, ascending)


def test_one_image_serves_many_expressions(tiny_graphs):
    encoder = tiny_graphs.reference("text", 0.3).vision_encoder
    text = torch.randn(4, 16, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        together = encoder(images(1), text)
        apart = [encoder(images(1), row[None]) for row in text]
        repeated = encoder(images(1).expand(4, -1, -1, -1), text)
    assert torch.equal(together[1], torch.cat([row[1] for row in apart]))
    assert torch.equal(together[1], repeated[1])
    assert len({tuple(row) for row in together[1].tolist()}) > 1
    assert (together[0] - torch.cat([row[0] for row in apart])).abs().max() < ATOL


def test_similarity_sign_turns_the_choice_round(tiny_checkpoint):
    recipe = load_recipe(tiny_checkpoint / "recipe.yaml")
    flipped = recipe.model_copy(
        update={"text_tower": recipe.text_tower.model_copy(update={"similarity_sign": -1})}
    )
    text, kept = torch.randn(1, 16), []
    for each in (recipe, flipped):
        pruning = resolve_pruning(
            each, PruningRequest(pruner="text", keep_ratio=0.5, order="raster")
        )
        checkpoint = Checkpoint.of(tiny_checkpoint)
        encoder = build_reference(each, checkpoint, pruning, device="cpu").vision_encoder
        with torch.inference_mode():
            kept.append(set(encoder(images(1), text)[1][0].tolist()))
    assert kept[0] | kept[1] == set(range(16)) and not kept[0] & kept[1]


def test_meta_reference_reads_no_weight(tiny_checkpoint, tiny_graphs, monkeypatch):
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr("gap_export.checkpoint.weights.safetensors.read_tensor", forbidden)
    checkpoint, pruning = Checkpoint.of(tiny_checkpoint), tiny_graphs.pruning("text")
    with pytest.raises(AssertionError, match="a weight was read"):
        build_reference(tiny_graphs.recipe, checkpoint, pruning, device="cpu")
    meta = build_reference(tiny_graphs.recipe, checkpoint, pruning, device="meta")
    for component in meta.components:
        assert all(p.is_meta for p in component.module.parameters())
        assert set(component.weight_refs) == set(component.module.state_dict())


def test_reference_names_its_files(tiny_checkpoint, tiny_graphs):
    plain = tiny_graphs.reference("spatial", 0.3)
    assert [c.name for c in plain.components] == [
        "vision_encoder", "embed_tokens", "decoder_model_merged",
    ]  # fmt: skip
    assert plain.text_encoder is None and plain.text_encoder_spec is None
    assert plain.dtype == "float32" and plain.newline is None
    assert plain.assets == {"tokenizer.json": tiny_checkpoint / "tokenizer.json"}
    assert {role for role, _ in plain.checkpoint_files} == {"main"}
    main = {"config.json", "generation_config.json", "model.safetensors"}
    assert read_files(plain, tiny_checkpoint) == main

    text = tiny_graphs.reference("text", 0.3)
    assert [c.name for c in text.components][1] == "text_encoder"
    assert text.assets == {
        "tokenizer.json": tiny_checkpoint / "tokenizer.json",
        "text_tokenizer.json": tiny_checkpoint / "clip/tokenizer.json",
    }
    assert text.text_encoder_spec.max_tokens == 24
    assert text.text_encoder_spec.tokenizer_file == "text_tokenizer.json"
    assert read_files(text, tiny_checkpoint) == main | {
        "clip/config.json", "clip/model.safetensors", "clip/visual_projection.safetensors",
    }  # fmt: skip
    spec = plain.decoder_spec
    assert (spec.num_layers, spec.num_key_value_heads, spec.head_dim) == (2, 2, 8)
    assert spec.eos_token_ids == (2,) and spec.max_position_embeddings == 256


def read_files(ref: Reference, folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for _, file in ref.checkpoint_files}
