"""Requests that schemathesis makes of the OpenAPI schema, and bodies that mean harm."""

from __future__ import annotations

import io
import json
import struct
import zlib

import pytest
from PIL import Image

pytestmark = pytest.mark.full
NUM_EXAMPLES = 200


@pytest.fixture(scope="module")
def operations(served):
    schemathesis = pytest.importorskip("schemathesis", reason="the extra `full` is not installed")
    return schemathesis.openapi.from_url(f"{served.url}/openapi.json")


def test_no_request_of_the_schema_ends_in_a_server_error(operations):
    import schemathesis
    from hypothesis import HealthCheck, given, settings
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    checks = [
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    ]
    modes = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]
    seen = []
    for found in operations.get_all_operations():
        operation = found.ok()
        for mode in modes:
            cases = operation.as_strategy(generation_mode=mode)

            @given(case=cases)
            @settings(
                max_examples=NUM_EXAMPLES if operation.method == "post" else 5,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            )
            def ask(case):
                answer = case.call()
                seen.append((case.operation.label, answer.status_code))
                case.validate_response(answer, checks=checks)

            try:
                ask()
            except Exception as err:
                if "Unsatisfiable" not in type(err).__name__:
                    raise
    asked = {label for label, _ in seen}
    assert {"POST /v1/ground", "POST /v1/chat/completions"} <= asked
    assert len(seen) > NUM_EXAMPLES
    statuses = {status for _, status in seen}
    # A deadline of some milliseconds may be over.
    assert {status for status in statuses if status >= 500} <= {504}


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width: int, height: int, pixels: bytes) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(pixels, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def hostile() -> dict[str, tuple[bytes, set[int]]]:
    file = io.BytesIO()
    Image.effect_noise((400, 300), 90).convert("RGB").save(file, "JPEG", progressive=True)
    jpeg = file.getvalue()
    return {
        "a bomb by its head": (png_of(60_000, 60_000, b""), {413}),
        "a bomb by its content": (png_of(9, 9, bytes(1 << 28)), {200, 413, 422}),
        "no pixels": (png_of(0, 0, b""), {413, 422}),
        "cut off": (jpeg[: len(jpeg) // 2], {422}),
        "a thousand scans": (jpeg[:-2] + jpeg[jpeg.rindex(b"\xff\xda") : -2] * 1000, {413, 422}),
        "svg that names a file": (b'<svg><image href="file:///etc/passwd"/></svg>', {415}),
        "html": (b"<html>", {415}),
        "a pickle": (b"\x80\x04\x95", {415}),
        "nothing but a signature": (b"\xff\xd8\xff", {422}),
    }


@pytest.mark.parametrize("name", list(hostile()))
def test_a_hostile_image_is_refused_and_the_server_goes_on(served, name):
    data, statuses = hostile()[name]
    with served.http() as http:
        form = {"expressions": "the red circle"}
        answer = http.post("/v1/ground", data=form, files={"image": data})
        assert answer.status_code in statuses, answer.text
        assert http.get("/readyz").status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"expressions": ["\\ud800"], "image": "aa"}',
        b'{"expressions": ["a"], "image": "aGk=", "shape": [1e400, 1, 3]}',
        b'{"expressions": ["a"], "image": "aGk=", "shape": [99999999999999999999, 1, 3]}',
        b'{"expressions": ["a\\u0000b\\u202e"], "image": "aGk="}',
        b'{"expressions": ["' + b"x" * 1_000_000 + b'"], "image": "aGk="}',
        b'{"expressions": ["a"], "image": "' + b"A" * 1_000_000 + b'"}',
        json.dumps({"expressions": ["a"] * 100_000, "image": "aGk="}).encode(),
        b"\x00" * 1000,
        b"NaN",
    ],
    ids=lambda body: repr(body[:24]),
)
def test_a_hostile_body_is_refused(served, body):
    with served.http() as http:
        for path in ("/v1/ground", "/v1/chat/completions"):
            kind = {"content-type": "application/json"}
            answer = http.post(path, content=body, headers=kind)
            assert 400 <= answer.status_code < 500, answer.text
