"""The demo models: PyTorch and ONNX Runtime give the same answers, and what ids do to them."""

from __future__ import annotations

import numpy as np
import pytest

from gap_export.checkpoint.find.source import Checkpoint
from gap_export.errors import UsageError
from gap_export.evaluation.refshapes import iter_samples
from gap_export.exporting import ExportOptions, resolve_options
from gap_export.families import supported_pruners
from gap_export.parity.metrics import accuracy_at, intersection_over_union
from gap_export.parity.question import Question
from gap_export.runtime.images.image import load_image, prepare_image
from gap_export.runtime.session import GroundingSession
from gap_export.spec.positions import gap_remap
from gap_export.spec.recipe import find_recipe
from gap_export.spec.requests import PruningRequest
from tests.parity.checking import check_with_torch, level_of

# With positions of one axis: name, first visual id, visual tokens, how many are kept at 0.3.
DEMOS = [
    ("refshapes-llava", 2, 144, 43),
    ("refshapes-shikra", 6, 144, 43),
    ("refshapes-minigpt-v2", 4, 64, 19),
]
NAMES = [*(name for name, *_ in DEMOS), "refshapes-qwen3-vl", "refshapes-internvl"]


@pytest.fixture
def bundle(request, exports):
    """A demo model at keep 0.3; which one is the test's parameter ``name``."""
    name = request.getfixturevalue("name")
    if name == "refshapes-llava":
        return request.getfixturevalue("demo_bundle")
    return exports.bundle(model=name, pruner="divprune", keep_ratio=0.3)


@pytest.mark.parametrize("number", [20, pytest.param(200, marks=pytest.mark.full)])
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


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("refshapes-llava", 24),
        ("refshapes-shikra", 6),
        ("refshapes-minigpt-v2", 6),
        ("refshapes-qwen3-vl", 6),
        ("refshapes-internvl", 6),
        *(pytest.param(name, 300, marks=pytest.mark.full) for name in NAMES),
    ],
)
def test_onnx_runtime_gives_pytorchs_tokens_and_boxes(name, number, bundle):
    recipe, folder = find_recipe(name)
    questions = [
        Question(image=sample.image, expression=sample.expression.text)
        for sample in iter_samples(seed=13, num_samples=number)
    ]
    report = check_with_torch(bundle, recipe, Checkpoint.of(folder), questions)
    assert report.passed, report.to_plain()
    figures = level_of(report, "token").figures
    assert figures["equal"] + figures["ties"] == number
    assert figures["ties"] <= max(1, 0.01 * number)


@pytest.mark.parametrize("name", NAMES)
def test_questions_that_share_an_image_get_the_answers_of_separate_calls(name, bundle):
    samples = list(iter_samples(seed=15, num_samples=6))
    image, texts = samples[0].image, [sample.expression.text for sample in samples]
    with GroundingSession.open(bundle) as session:
        logits, decode = [], session.backend.decode

        def watch(feed, cache):
            logits.append(decode(feed, cache))
            return logits[-1]

        def ask(ask_one):
            logits.clear()
            answers = [ask_one(text) for text in texts]
            # What chooses a token; the shared tokens of the image give one more.
            return [answer.token_ids for answer in answers], list(logits)

        # One call of the decoder for each token of an answer.
        session.backend.decode, session.backend.num_logits = watch, 1
        alone, separate = ask(lambda text: session.ground(image, text))
        with session.look(image) as view:
            one_by_one, shared = ask(view.ground)
        together = session.ground_batch(image, texts)
    assert len(shared) == len(separate) + 1
    np.testing.assert_allclose(shared[1:], separate, atol=1e-4)
    assert one_by_one == alone == [answer.token_ids for answer in together]


@pytest.mark.parametrize(
    ("name", "number"),
    [
        *((name, 8) for name in NAMES),
        *(pytest.param(name, 300, marks=pytest.mark.full) for name in NAMES),
    ],
)
def test_answers_do_not_change_where_separators_are_expected(name, number, bundle):
    samples = list(iter_samples(seed=16, num_samples=number))

    def ask(num_logits):
        taken = []
        with GroundingSession.open(bundle, form="ort") as session:
            assert session.backend.num_logits == 8
            session.backend.num_logits = num_logits
            for called in ("decode", "decode_each"):
                run = getattr(session.backend, called)
                setattr(session.backend, called, lambda *fed, run=run: taken.append(0) or run(*fed))
            answers = [session.ground(s.image, s.expression.text).token_ids for s in samples]
        return answers, len(taken)

    (plain, num_steps), (given, num_fewer) = ask(1), ask(8)
    assert given == plain
    # Where a token holds a number and its separator, there is next to nothing to expect.
    assert num_fewer <= num_steps


@pytest.mark.parametrize("name", NAMES)
def test_compact_ids_destroy_what_gap_keeps(name, bundle):
    """24 questions: an interval of some 20 points, and the two are 70 apart."""
    samples = list(iter_samples(seed=14, num_samples=24))
    accuracy = {}
    for positions in ("gap", "compact"):
        with GroundingSession.open(bundle, positions=positions) as session:
            boxes = [session.ground(s.image, s.expression.text).box for s in samples]
        ious = [
            0.0 if box is None else intersection_over_union(box, sample.box)
            for box, sample in zip(boxes, samples, strict=True)
        ]
        accuracy[positions] = accuracy_at(ious)
    assert accuracy["gap"] >= 0.75
    assert accuracy["compact"] <= 0.3


@pytest.mark.parametrize(("name", "start", "num_tokens", "num_kept"), DEMOS)
def test_ids_of_the_prompt_are_those_before_pruning(name, start, num_tokens, num_kept, bundle):
    seen = []
    with GroundingSession.open(bundle) as session:
        decode = session.backend.decode

        def watch(feed, cache):
            seen.append(gap_remap(feed["position_ids"], feed["kept_positions"])[0].tolist())
            return decode(feed, cache)

        session.backend.decode = watch
        answer = session.ground(np.full((96, 96, 3), 90, np.uint8), "the red circle")
    prompt = seen[0]
    assert prompt[:start] == list(range(start))
    assert prompt[start : start + num_kept] == [start + index for index in answer.keep_indices]
    rest = prompt[start + num_kept :]
    assert rest == list(range(start + num_tokens, start + num_tokens + len(rest)))
    assert [step for (step,) in seen[1:]] == [rest[-1] + 1 + n for n in range(len(seen) - 1)]


@pytest.mark.parametrize("pruner", ["text", "trim", "cdpruner"])
def test_what_reads_the_text_does_not_apply_where_there_is_no_text_tower(pruner):
    recipe, _ = find_recipe("refshapes-minigpt-v2")
    assert pruner not in supported_pruners(recipe)
    with pytest.raises(UsageError, match=pruner):
        resolve_options(
            recipe,
            ExportOptions(model=recipe.name, pruning=PruningRequest(pruner=pruner, keep_ratio=0.3)),
        )
