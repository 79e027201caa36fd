"""The bundled model: transformers, PyTorch and ONNX Runtime give the same answers."""

from __future__ import annotations

import numpy as np
import pytest

from gap_export.checkpoint.find.source import Checkpoint
from gap_export.evaluation.refshapes import iter_samples
from gap_export.parity.question import Question
from gap_export.runtime.images.image import load_image, prepare_image
from gap_export.runtime.session import GroundingSession
from gap_export.spec.positions import gap_remap
from gap_export.spec.recipe import find_recipe
from tests.parity.checking import check_with_torch, level_of


@pytest.mark.parametrize("number", [40, pytest.param(200, marks=pytest.mark.full)])
def test_keep_one_equals_plain_transformers_token_for_token(demo_whole_bundle, number):
    import torch
    from transformers import AutoTokenizer, LlavaForConditionalGeneration

    recipe, folder = find_recipe("refshapes-llava")
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    equal = 0
    samples = list(iter_samples(seed=11, num_samples=number))
    with GroundingSession.open(demo_whole_bundle) as session:
        for sample in samples:
            image = load_image(sample.image, pad_color=recipe.image.pad_color)
            pixels, _ = prepare_image(image, recipe.image)
            text = recipe.prompt.template.format(expression=sample.expression.text)
            image_tokens = " ".join(["<image>"] * recipe.grid.num_visual_tokens)
            ids = tokenizer(text.replace("<image>", image_tokens), return_tensors="pt")
            with torch.inference_mode():
                answer = model.generate(
                    input_ids=ids["input_ids"],
                    attention_mask=ids["attention_mask"],
                    pixel_values=torch.from_numpy(pixels),
                    do_sample=False,
                    max_new_tokens=recipe.prompt.max_new_tokens,
                )
            expected = tuple(answer[0, ids["input_ids"].shape[1] :].tolist())
            equal += session.ground(sample.image, sample.expression.text).token_ids == expected
    assert equal == len(samples) == number


@pytest.mark.parametrize("number", [100, pytest.param(500, marks=pytest.mark.full)])
def test_onnx_runtime_gives_pytorchs_tokens_and_boxes(demo_bundle, number):
    recipe, folder = find_recipe("refshapes-llava")
    questions = [
        Question(image=sample.image, expression=sample.expression.text)
        for sample in iter_samples(seed=12, num_samples=number)
    ]
    report = check_with_torch(demo_bundle, recipe, Checkpoint.of(folder), questions)
    assert report.passed, report.to_plain()
    figures = level_of(report, "token").figures
    assert figures["equal"] + figures["ties"] == number
    assert figures["ties"] <= 0.01 * number, report.to_plain()


def test_ids_of_the_demo_prompt_are_those_before_pruning(demo_bundle):
    """144 tokens, 43 kept, image at 2: text starts at id 146 and the first decode step follows."""
    seen = []
    with GroundingSession.open(demo_bundle) as session:
        decode = session.backend.decode

        def watch(feed, cache):
            seen.append(gap_remap(feed["position_ids"], feed["kept_positions"])[0].tolist())
            return decode(feed, cache)

        session.backend.decode = watch
        image = np.full((96, 96, 3), 90, np.uint8)
        answer = session.ground(image, "the red circle")
    prompt = seen[0]
    assert prompt[:2] == [0, 1]
    assert prompt[2:45] == [2 + index for index in answer.keep_indices]
    assert prompt[45:] == [146, 147, 148, 149]
    assert [step for (step,) in seen[1:]] == list(range(150, 150 + len(seen) - 1))
