"""The client gives back what a session gives, and raises what a session raises."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest
from PIL import Image

from gap_export.client import AsyncGroundingClient, GroundingClient, ServerError
from gap_export.errors import ExpressionError, ImageFormatError, UnknownModelError
from gap_export.runtime.grounding import Grounding
from tests.serving.conftest import LIMIT_S

WORDS = "the red circle"


@pytest.fixture(scope="module")
def client(served):
    with GroundingClient(served.url, timeout_s=LIMIT_S) as one:
        yield one


def through_json(grounding: Grounding) -> Grounding:
    """What a session's answer is as JSON: boxes to a hundredth of a pixel, no scores of cells."""
    return dataclasses.replace(Grounding.from_plain(grounding.to_plain()), timings_ms={})


def without_times(grounding: Grounding) -> Grounding:
    return dataclasses.replace(grounding, timings_ms={})


def test_a_file_bytes_and_an_array_give_the_sessions_grounding(client, session, pixels, tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(pixels).save(path)
    expected = through_json(session.ground(pixels, WORDS))
    assert expected.token_ids == session.ground(pixels, WORDS).token_ids
    for image in (path, str(path), path.read_bytes(), pixels):
        assert without_times(client.ground(image, WORDS)) == expected
    bgr = client.ground(pixels[..., ::-1], WORDS, color="bgr")
    assert without_times(bgr) == expected


def test_the_asynchronous_client_gives_the_same(served, session, pixels):
    async def ask():
        async with AsyncGroundingClient(served.url, timeout_s=LIMIT_S) as client:
            models = await client.models()
            return models, await client.ground_batch(pixels, [WORDS, "the star"])

    models, answers = asyncio.run(ask())
    assert models[0]["id"] == served.worker.name
    expected = session.ground_batch(pixels, [WORDS, "the star"])
    assert [without_times(one) for one in answers] == [through_json(one) for one in expected]


def test_refusals_are_the_errors_of_the_session(client, served, pixels):
    with pytest.raises(ExpressionError, match="the expression is empty"):
        client.ground(pixels, "")
    with pytest.raises(ImageFormatError, match="not an image that can be read"):
        client.ground(b"hello", WORDS)
    with (
        GroundingClient(served.url, model="other") as other,
        pytest.raises(UnknownModelError, match=served.worker.name),
    ):
        other.ground(pixels, WORDS)


def test_the_servers_own_refusals_tell_their_status(client, held, pixels):
    with pytest.raises(ServerError, match="deadline") as refused:
        client.ground(pixels, WORDS, deadline_ms=50)
    assert refused.value.status == 504 and refused.value.retry_after is None


def test_no_answer_is_an_error_too(served):
    with (
        GroundingClient("http://127.0.0.1:9", timeout_s=5) as nobody,
        pytest.raises(ServerError, match="no answer") as failed,
    ):
        nobody.models()
    assert failed.value.status == 0
