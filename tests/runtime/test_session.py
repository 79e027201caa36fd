"""A session from image and words to box, on a backend in numpy."""

from __future__ import annotations

import dataclasses
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

from gap_export.errors import BundleError, ExpressionError, GapExportError, ImageError
from gap_export.runtime.backends.backend import graph_components
from gap_export.runtime.images.geometry import Frame
from gap_export.runtime.prompt import PromptEncoder
from gap_export.runtime.session import GroundingSession
from gap_export.spec.manifest import BoxSpec, Manifest, TextEncoderSpec
from gap_export.spec.tiles import TileTokens
from tests.runtime.fake_backends import EditedBackend

EXPRESSIONS = ["the star", "the small red circle above the star", "blue square", "the star"]


@pytest.fixture
def session(sample_manifest, make_session) -> GroundingSession:
    return make_session(sample_manifest)


@pytest.fixture
def text_session(text_manifest, make_session) -> GroundingSession:
    return make_session(text_manifest)


def calls_of(session: GroundingSession) -> list[str]:
    backend: Any = session.backend
    found: list[str] = backend.calls
    return found


def shapes_of_texts(backend: Any) -> list[tuple[int, ...]]:
    """Those of the ids that the text encoder was fed."""
    called = zip(backend.calls, backend.feeds, strict=True)
    return [feed["input_ids"].shape for component, feed in called if component == "text_encoder"]


def forget_calls(session: GroundingSession) -> None:
    backend: Any = session.backend
    backend.calls.clear()
    backend.feeds.clear()


def test_answer_tells_what_was_seen(session, image):
    answer = session.ground(image, " the star ")
    assert answer.expression == " the star "
    assert answer.keep_indices == (0, 3, 6, 9, 12)
    assert answer.num_visual_tokens == 16
    (grid,) = answer.tokens
    assert (grid.view, grid.rows, grid.cols) == ("image", 4, 4)
    assert grid.frame == Frame(left=0, top=-8, width=40, height=40)
    assert grid.kept == answer.keep_indices
    assert grid.tiles == (TileTokens(num_visual_tokens=16, num_kept_tokens=5),)
    assert answer.image_size == (40, 24)
    assert 1 <= len(answer.token_ids) <= 8
    assert list(answer.timings_ms) == [
        "preprocess", "vision_encoder", "embed_tokens", "prefill", "decode", "total",
    ]  # fmt: skip
    parts = [ms for stage, ms in answer.timings_ms.items() if stage != "total"]
    assert 0 < sum(parts) <= answer.timings_ms["total"]


def test_answer_is_plain_json(session, image):
    answer = session.ground(image, "the star")
    plain = json.loads(json.dumps(answer.to_plain()))
    assert plain["keep_indices"] == [0, 3, 6, 9, 12]
    assert plain["tokens"] == [
        {
            "view": "image",
            "rows": 4,
            "cols": 4,
            "frame": [0, -8, 40, 40],
            "kept": [0, 3, 6, 9, 12],
            "stood_out": None,
            "tiles": [
                {
                    "num_visual_tokens": 16,
                    "num_kept_tokens": 5,
                    "num_padding_tokens": 0,
                    "num_newline_tokens": 0,
                }
            ],
        }
    ]
    assert plain["image_size"] == [40, 24]
    assert plain["backend"] == "numpy"
    assert set(plain) == {field.name for field in dataclasses.fields(answer)}


def test_batch_equals_its_rows_alone_and_sees_the_image_once(session, image):
    alone = [session.ground(image, expression) for expression in EXPRESSIONS]
    forget_calls(session)
    together = session.ground_batch(image, EXPRESSIONS)
    assert calls_of(session).count("vision_encoder") == 1
    for one, other in zip(alone, together, strict=True):
        assert (one.token_ids, one.box, one.text) == (other.token_ids, other.box, other.text)
    assert len({answer.token_ids for answer in together}) > 1


def test_a_text_in_segments_is_fed_as_the_mean_of_their_unit_vectors(
    text_manifest, make_backend, tokenizer_folder, image
):
    """CDPruner averages the cosines of a patch with each segment; nothing else is read of them."""
    assert text_manifest.text_encoder is not None
    tower = dataclasses.replace(text_manifest.text_encoder, long_texts="segments")
    manifest = dataclasses.replace(text_manifest, text_encoder=tower)
    backend = make_backend(manifest)
    long = "the small red circle above the star"
    session = GroundingSession(manifest, tokenizer_folder, backend)
    session.ground_batch(image, [long, "the star", long])
    # Segments of one length go together, one of each text at a time.
    assert shapes_of_texts(backend) == [(2, 7), (1, 4), (2, 2)]
    (texts,) = (feed["text_embeds"] for feed in backend.feeds if "text_embeds" in feed)

    def embed(ids: Any) -> Any:
        return backend.run("text_encoder", {"input_ids": ids[None]})["text_embeds"][0]

    encoder = PromptEncoder(manifest, tokenizer_folder)
    parts = [embed(ids) for ids in encoder.encode(long).text_ids]
    patches = np.random.default_rng(2).normal(size=(9, len(parts[0])))
    cosines = [patches @ part / np.linalg.norm(part) for part in parts]
    assert len(parts) == 2 and np.allclose(patches @ texts[0], np.mean(cosines, axis=0), atol=1e-5)
    (alone,) = encoder.encode("the star").text_ids
    assert np.array_equal(texts[1], embed(alone))


def test_words_are_fed_as_the_mean_of_the_unit_vectors_that_the_decoder_reads(
    text_manifest, make_backend, tokenizer_folder, image
):
    """Of the expression's own tokens: neither the prompt's nor special ones are among them."""
    reader = TextEncoderSpec(
        template="{expression}",
        tokenizer_file="tokenizer.json",
        max_tokens=3,
        long_texts="segments",
        component="embed_tokens",
    )
    manifest = dataclasses.replace(text_manifest, text_encoder=reader)
    assert "text_encoder" not in graph_components(manifest)
    backend = make_backend(manifest)
    GroundingSession(manifest, tokenizer_folder, backend).ground_batch(image, EXPRESSIONS)
    assert "text_encoder" not in backend.calls
    (texts,) = (feed["text_embeds"] for feed in backend.feeds if "text_embeds" in feed)
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    for expression, found in zip(EXPRESSIONS, texts, strict=True):
        ids = np.array([tokenizer.encode(expression, add_special_tokens=False).ids])
        words = backend.run("embed_tokens", {"input_ids": ids})["inputs_embeds"][0]
        units = [word / np.linalg.norm(word) for word in words]
        assert len(units) == len(expression.split())
        assert np.allclose(found, sum(units) / len(units), atol=1e-6)


def test_batch_of_a_text_reading_pruner_equals_its_rows_alone(text_session, image):
    alone = [text_session.ground(image, expression) for expression in EXPRESSIONS]
    forget_calls(text_session)
    together = text_session.ground_batch(image, EXPRESSIONS)
    # Texts of 4, 7 (cut), 4 and 4 tokens: one call a length, none padded.
    assert calls_of(text_session)[:3] == ["text_encoder", "text_encoder", "vision_encoder"]
    assert shapes_of_texts(text_session.backend) == [(3, 4), (1, 7)]
    assert len({answer.keep_indices for answer in together}) > 1
    for one, other in zip(alone, together, strict=True):
        assert one.token_ids == other.token_ids
        assert one.keep_indices == other.keep_indices
    assert "text_encoder" in together[0].timings_ms


def test_positions_are_the_manifest_s_unless_told_otherwise(
    sample_manifest, make_backend, tokenizer_folder, image
):
    def first_ids(manifest: Manifest, **options: Any) -> list[int]:
        backend = make_backend(manifest)
        GroundingSession(manifest, tokenizer_folder, backend, **options).ground(image, "star")
        ids: list[int] = backend.ids_seen[0][0].tolist()
        return ids

    pruning = dataclasses.replace(sample_manifest.pruning, positions="compact")
    compact = dataclasses.replace(sample_manifest, pruning=pruning)
    gap = [0, 1, 2, 5, 8, 11, 14, 18, 19]
    assert first_ids(sample_manifest) == gap
    assert first_ids(sample_manifest, positions="compact") == list(range(9))
    assert first_ids(compact) == list(range(9))
    assert first_ids(compact, positions="gap") == gap


@pytest.fixture
def answering(make_backend, tokenizer_folder):
    """Makes sessions whose answer is a given text, token by token."""
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))

    def make(manifest: Manifest, text: str) -> GroundingSession:
        left = [*tokenizer.encode(text).ids[1:], 2]

        def choose(logits: Any) -> Any:
            return np.eye(logits.shape[1], dtype=np.float32)[[left.pop(0)] * len(logits)]

        prompt = dataclasses.replace(manifest.prompt, max_new_tokens=20)
        backend = EditedBackend(make_backend(manifest), "logits", choose)
        manifest = dataclasses.replace(manifest, prompt=prompt)
        return GroundingSession(manifest, tokenizer_folder, backend)

    return make


MIDDLE, OUTSIDE, FLAT = (
    "[ 0.25 , 0.50 , 0.75 , 0.60 ]", "[ 0.25 , 0.01 , 0.75 , 0.10 ]",
    "[ 0.25 , 0.50 , 0.75 , 0.50 ]",
)  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "frame", "box", "warning"),
    [
        (MIDDLE, "padded_square", (10.0, 12.0, 30.0, 16.0), None),
        ("[ 0.75 , 0.60 , 0.25 , 0.50 ]", "padded_square", (10.0, 12.0, 30.0, 16.0), None),
        (MIDDLE, "image", (10.0, 12.0, 30.0, 14.4), None),
        (OUTSIDE, "padded_square", None, "the answer lies outside the image: "),
        (FLAT, "padded_square", None, "the answer has no area: "),
        ("the red star", "image", None, "the answer holds no box: 'the red star'"),
    ],
)
def test_answer_becomes_a_box_in_pixels_of_the_image_or_a_warning(
    sample_manifest, answering, image, answer, frame, box, warning
):
    spec = BoxSpec(syntax="bracketed", scale=1.0, frame=frame)
    manifest = dataclasses.replace(sample_manifest, box=spec)
    found = answering(manifest, answer).ground(image, "the star")
    assert found.text == answer
    assert found.token_ids[-1] == 2
    assert found.box == (None if box is None else pytest.approx(box))
    assert len(found.warnings) == (warning is not None)
    assert all(text.startswith(str(warning)) for text in found.warnings)


def test_box_of_a_turned_image_is_in_its_frame_as_displayed(
    sample_manifest, answering, image, tmp_path
):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to be upright: 40x24 becomes 24x40
    Image.fromarray(image).save(tmp_path / "turned.png", exif=exif)
    session = answering(sample_manifest, "[ 0.50 , 0.25 , 0.60 , 0.75 ]")
    found = session.ground(tmp_path / "turned.png", "the star")
    assert found.image_size == (24, 40)
    assert found.box == pytest.approx((12.0, 10.0, 16.0, 30.0))


def test_unknown_words_come_back_as_a_warning(session, image):
    first, second = session.ground_batch(image, ["the purple star", "the star"])
    assert first.warnings[0] == "words the model does not know: purple"
    assert not any("does not know" in text for text in second.warnings)


@pytest.mark.parametrize("expressions", [[], (), "the star"])
def test_batch_that_is_no_list_is_refused(session, image, expressions):
    with pytest.raises(ExpressionError, match="no list of expressions"):
        session.ground_batch(image, expressions)


def test_bad_input_is_refused_before_anything_runs(session, image, tmp_path):
    with pytest.raises(ImageError, match="no such image"):
        session.ground(tmp_path / "missing.png", "the star")
    with pytest.raises(ExpressionError, match="empty"):
        session.ground_batch(image, ["the star", " "])
    assert calls_of(session) == []


def test_backend_is_closed_with_the_session(session, image):
    with session as entered:
        assert entered is session
        entered.ground(image, "the star")
    assert vars(session.backend)["closed"]


def test_a_closed_session_says_so_and_frees_the_backend_once(session, image):
    session.close()
    session.close()
    with pytest.raises(GapExportError, match="the session is closed"), session:
        pass
    with pytest.raises(GapExportError, match="the session is closed"):
        session.ground(image, "the star")
    assert vars(session.backend)["closed"] == 1


def test_calls_that_run_when_the_session_is_closed_finish(session, image, monkeypatch):
    backend: Any = session.backend
    expected = session.ground(image, "the star").token_ids
    inside, go_on = threading.Event(), threading.Event()
    run = backend.run

    def slowly(*given: Any) -> Any:
        inside.set()
        assert go_on.wait(30)
        assert not backend.closed
        return run(*given)

    monkeypatch.setattr(backend, "run", slowly)
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(session.ground, image, "the star") for _ in range(2)]
        assert inside.wait(30)
        session.close()
        assert not backend.closed
        with pytest.raises(GapExportError, match="the session is closed; open the bundle again"):
            session.ground(image, "the star")
        go_on.set()
        assert [call.result(30).token_ids for call in running] == [expected] * 2
    assert backend.closed


@pytest.mark.parametrize(("limit", "is_cut"), [(9, True), (10, False), (11, False)])
def test_an_answer_that_did_not_end_says_so(sample_manifest, answering, image, limit, is_cut):
    session = answering(sample_manifest, "[ 0.25 , 0.50 , 0.75 , 0.60 ]")
    prompt = dataclasses.replace(session.manifest.prompt, max_new_tokens=limit)
    session.manifest = dataclasses.replace(session.manifest, prompt=prompt)
    warnings = session.ground(image, "the star").warnings
    cut = f"the answer was cut off after {limit} tokens, before it ended: '[ 0.25 , 0.50"
    assert [text.startswith(cut) for text in warnings] == [True] * is_cut


def test_rows_of_a_batch_are_cut_off_one_by_one(session, image):
    steps = iter(range(100))

    def choose(logits: Any) -> Any:
        logits = np.zeros_like(logits)
        logits[0, 2 if next(steps) == 3 else 9] = logits[1, 9] = 1.0  # 2 ends the first alone
        return logits

    session.backend = EditedBackend(session.backend, "logits", choose)
    first, second = session.ground_batch(image, ["the star", "blue square"])
    assert not any("cut off" in text for text in first.warnings)
    assert any("cut off" in text for text in second.warnings)


def test_box_is_printed_to_a_hundredth_of_a_pixel(session, image):
    box = (1.0, 29.759999999999998, 40 / 3, 58.56)
    answer = dataclasses.replace(session.ground(image, "the star"), box=box)
    assert answer.to_plain()["box"] == [1.0, 29.76, 13.33, 58.56]
    assert answer.box == box


def test_vision_encoder_that_breaks_the_manifest_s_word_is_refused(
    session, sample_manifest, make_backend, image
):
    pruning = dataclasses.replace(sample_manifest.pruning, num_emitted_tokens=4)
    session.backend = make_backend(dataclasses.replace(sample_manifest, pruning=pruning))
    with pytest.raises(BundleError, match=r"\[1, 4, 8\].*allowed: \[1, 5, 8\]"):
        session.ground(image, "the star")


def test_manifest_whose_numbers_contradict_is_refused(sample_manifest, make_session):
    grid = dataclasses.replace(sample_manifest.grid, rows=5)
    manifest = dataclasses.replace(sample_manifest, grid=grid)
    with pytest.raises(BundleError, match="disagree on the number of visual tokens: 20 and 16"):
        make_session(manifest)
