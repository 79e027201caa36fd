"""``POST /v1/chat/completions``, asked by OpenAI's own client."""

from __future__ import annotations

import base64
import io

import openai
import pytest
from PIL import Image


@pytest.fixture(scope="module")
def data_url(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as one:
        yield one


def user(words, *urls):
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*images, {"type": "text", "text": words}]}


def test_the_answer_is_the_models_words_with_the_grounding_beside_it(
    client, served, session, pixels, data_url
):
    (model,) = client.models.list().data
    answer = client.chat.completions.create(
        model=model.id, messages=[user("the red circle", data_url)]
    )
    expected = session.ground(pixels, "the red circle").to_plain()
    assert answer.choices[0].message.content == expected["text"]
    assert answer.gap_export["token_ids"] == expected["token_ids"]
    assert answer.gap_export["warnings"] == expected["warnings"]
    eos = session.manifest.decoder.eos_token_ids
    ended = expected["token_ids"][-1] in eos
    assert answer.choices[0].finish_reason == ("stop" if ended else "length")


def test_a_stream_holds_the_same(client, served, session, pixels, data_url):
    chunks = list(
        client.chat.completions.create(
            model=served.worker.name, messages=[user("the star", data_url)], stream=True
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    expected = session.ground(pixels, "the star")
    assert text == expected.text
    assert chunks[-1].gap_export["token_ids"] == list(expected.token_ids)
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")


def test_what_has_no_effect_is_told(client, served, data_url):
    answer = client.chat.completions.create(
        model=served.worker.name,
        messages=[
            {"role": "system", "content": "Be brief."},
            user("the star", data_url),
            {"role": "assistant", "content": "[0, 0, 1, 1]"},
            {"role": "user", "content": "the red circle"},
        ],
        temperature=0.7,
    )
    assert answer.gap_export["expression"] == "the red circle"
    assert sum("temperature" in text for text in answer.gap_export["warnings"]) == 1
    assert sum("last message" in text for text in answer.gap_export["warnings"]) == 1


@pytest.mark.parametrize(
    ("error", "words", "change"),
    [
        (openai.NotFoundError, "no model of that name", {"model": "gpt"}),
        (openai.UnprocessableEntityError, "opens no address", "http://127.0.0.1:9/x.png"),
        (openai.UnprocessableEntityError, "opens no address", "file:///etc/passwd"),
        (openai.UnprocessableEntityError, "not in base64", "data:image/png,x"),
        (openai.UnprocessableEntityError, "not base64", "data:image/png;base64,%"),
        (openai.APIStatusError, "not an image", "data:image/png;base64,aGVsbG8="),
        (openai.UnprocessableEntityError, "0 images", {"messages": [user("x")]}),
        (openai.UnprocessableEntityError, "no message", {"messages": [{"role": "system"}]}),
        (openai.UnprocessableEntityError, "n: ", {"n": 2}),
        (openai.UnprocessableEntityError, "messages", {"messages": []}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_wrong_is_an_error_with_its_words(
    client, served, data_url, error, words, change, stream
):
    url = change if isinstance(change, str) else data_url
    request = {"model": served.worker.name, "messages": [user("the star", url)], "stream": stream}
    if isinstance(change, dict):
        request |= change
    with pytest.raises(error, match=words):
        client.chat.completions.create(**request)
