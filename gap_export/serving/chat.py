"""``POST /v1/chat/completions``: the same answers in the form of OpenAI's API."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from gap_export.errors import ExpressionError, ImageError
from gap_export.serving.asking import Asked, Models, Question
from gap_export.serving.bodies import (
    PROBLEM_STATUSES,
    decode_base64,
    described,
    plain_answer,
    read_json,
)
from gap_export.serving.decoders import ImageOptions
from gap_export.visible import clean

# Of a request, and read; each other field leads to a warning.
_IGNORED_QUIETLY = ("user", "metadata", "store", "safety_identifier")


class ImageUrl(BaseModel):
    """Where an image is: in the request itself."""

    model_config = ConfigDict(extra="ignore")

    url: Annotated[str, Field(description="data:image/png;base64,..., never an address.")]


class Part(BaseModel):
    """A part of a message: text, or an image."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageUrl | None = None


class Message(BaseModel):
    """One message; the last one of the user is what is answered."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["developer", "system", "user", "assistant", "tool"]
    content: str | list[Part] | None = None

    def parts(self) -> list[Part]:
        """What it consists of."""
        if isinstance(self.content, str):
            return [Part(type="text", text=self.content)]
        return self.content or []


class StreamOptions(BaseModel):
    """How an answer is streamed; the number of tokens is not told."""

    model_config = ConfigDict(extra="ignore")


class ChatRequest(BaseModel):
    """A question in OpenAI's form: one image and one expression."""

    model_config = ConfigDict(extra="allow")

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    stream: bool | None = False
    n: Annotated[int, Field(ge=1, le=1)] | None = 1
    stream_options: StreamOptions | None = None

    def question(self) -> Question:
        """The image and the expression that are asked about.

        Raises:
            ImageError: no image, several, or one that is elsewhere.
            ExpressionError: no message of the user.
        """
        asked = [message for message in self.messages if message.role == "user"]
        if not asked:
            raise ExpressionError("no message is the user's", allowed="one with an expression")
        # An image may have come with an earlier question.
        with_image = next(
            (m for m in reversed(asked) if any(part.type == "image_url" for part in m.parts())),
            asked[-1],
        )
        urls = [part.image_url for part in with_image.parts() if part.type == "image_url"]
        if len(urls) != 1 or urls[0] is None:
            raise ImageError(
                "a question is about one image", seen=f"{len(urls)} images", allowed="one image_url"
            )
        texts = [part.text or "" for part in asked[-1].parts() if part.type == "text"]
        return Question(
            model=self.model,
            image=read_data_url(urls[0].url),
            options=ImageOptions(),
            expressions=["\n".join(texts).strip()],
        )

    def warnings(self) -> list[str]:
        """What of the request has no effect."""
        found = []
        if len(self.messages) > 1:
            found.append(
                "only the last message of the user is read, and the last image of the conversation"
            )
        unread = [
            name
            for name, value in (self.model_extra or {}).items()
            if value is not None and name not in _IGNORED_QUIETLY
        ]
        if unread:
            shown = clean(", ".join(sorted(unread)))
            found.append(f"answers are the model's likeliest; these have no effect: {shown}")
        return found


def read_data_url(url: str) -> bytes:
    """The bytes of a ``data:`` URL.

    Raises:
        ImageError: another kind of URL, or one that is not base64.
    """
    head, comma, data = url.partition(",")
    if not head.startswith("data:"):
        raise ImageError(
            "an image is sent in the request, since the server opens no address and no file",
            seen=clean(url[:80]),
            allowed="data:image/png;base64,...",
        )
    if not comma or not head.endswith(";base64"):
        raise ImageError(
            "the data URL is not in base64", seen=clean(head[:80]), allowed="data:...;base64,..."
        )
    return decode_base64(data)


def add_chat(app: FastAPI, models: Models) -> None:
    """Have an application answer chat completions."""

    @app.post(
        "/v1/chat/completions",
        summary="Find an object in an image, in OpenAI's form.",
        **described(forms={"application/json": ChatRequest}, statuses=PROBLEM_STATUSES),
    )
    async def complete(request: Request) -> Response:
        asked = await read_json(request, ChatRequest)
        answer = await models.ask(asked.question(), request)
        if asked.stream:
            # An error comes before the first event, with a status of its own.
            return StreamingResponse(
                _events(answer, asked.warnings()), media_type="text/event-stream"
            )
        return JSONResponse(_completion(answer, asked.warnings()))


def _completion(answer: Asked, warnings: list[str]) -> dict[str, Any]:
    (grounding,) = answer.groundings
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": grounding.text, "refusal": None},
        "logprobs": None,
        "finish_reason": _finish_reason(answer),
    }
    return {
        **_head(answer, "chat.completion"),
        "choices": [choice],
        "gap_export": _details(answer, warnings),
    }


def _events(answer: Asked, warnings: list[str]) -> Iterator[str]:
    """The answer as server-sent events: its text is known at once, so one of them has it."""
    head = _head(answer, "chat.completion.chunk")
    (grounding,) = answer.groundings
    for delta, reason in (
        ({"role": "assistant", "content": ""}, None),
        ({"content": grounding.text}, None),
        ({}, _finish_reason(answer)),
    ):
        chunk = {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}
        if reason is not None:
            chunk["gap_export"] = _details(answer, warnings)
        yield f"data: {json.dumps(chunk)}\n\n"
    yield "data: [DONE]\n\n"


def _head(answer: Asked, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": answer.model.name,
    }


def _finish_reason(answer: Asked) -> str:
    last = answer.groundings[0].token_ids[-1]
    return "stop" if last in answer.model.manifest.decoder.eos_token_ids else "length"


def _details(answer: Asked, warnings: list[str]) -> dict[str, Any]:
    plain = plain_answer(answer.groundings[0], kept_tokens=True)
    return {**plain, "warnings": [*plain["warnings"], *warnings], "request_ms": answer.timings_ms}
