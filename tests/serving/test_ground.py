"""``POST /v1/ground``: the session's answers and refusals, and what becomes of those who wait."""

from __future__ import annotations

import base64
import io
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from PIL import Image

from gap_export.errors import GapExportError
from tests.serving.conftest import LIMIT_S, running

WORDS = "the red circle"


@pytest.fixture(scope="module")
def png(pixels):
    return encoded(pixels)


@pytest.fixture(scope="module")
def http(served):
    with served.http() as client:
        yield client


def encoded(pixels, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def in_json(data, *expressions, **fields):
    return {"image": base64.b64encode(data).decode(), "expressions": expressions, **fields}


def comparable(plain):
    return {name: value for name, value in plain.items() if name != "timings_ms"}


def wait_until(condition):
    ended = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < ended
        time.sleep(0.002)


def test_a_form_base64_and_pixels_are_answered_as_the_session_answers(
    http, session, served, pixels, png
):
    words = [WORDS, "the big blue square"]
    expected = [comparable(one.to_plain()) for one in session.ground_batch(pixels, words)]
    as_pixels = in_json(pixels.tobytes(), *words, shape=pixels.shape, kept_tokens=True)
    bgr = in_json(pixels[..., ::-1].tobytes(), *words, shape=pixels.shape, color="bgr")
    form = {"expressions": words, "kept_tokens": "true"}
    shape = ",".join(map(str, pixels.shape))
    answers = [
        http.post("/v1/ground", json=in_json(png, *words, kept_tokens=True)),
        http.post("/v1/ground", data=form, files={"image": png}),
        http.post("/v1/ground", json=as_pixels),
        http.post("/v1/ground", json={**bgr, "kept_tokens": True}),
        http.post("/v1/ground", data={**form, "shape": shape}, files={"image": pixels.tobytes()}),
    ]
    for answer in answers:
        assert answer.status_code == 200, answer.text
        assert [comparable(one) for one in answer.json()["groundings"]] == expected
        assert answer.json()["model"] == served.worker.name
        assert set(answer.json()["timings_ms"]) == {"decode", "wait", "run", "total"}


def test_kept_tokens_are_told_on_request_alone(http, png):
    (short,) = http.post("/v1/ground", json=in_json(png, WORDS)).json()["groundings"]
    assert not {"tokens", "keep_indices", "token_ids"} & set(short)


def test_an_image_is_turned_as_the_session_turns_it(http, session, pixels):
    file, exif = io.BytesIO(), Image.Exif()
    exif[274] = 6
    Image.fromarray(pixels).save(file, "JPEG", exif=exif)
    (answer,) = http.post("/v1/ground", json=in_json(file.getvalue(), WORDS)).json()["groundings"]
    assert answer["image_size"] == [24, 40] and answer["orientation"] == 6
    raw = http.post("/v1/ground", json=in_json(file.getvalue(), WORDS, frame="raw")).json()
    assert raw["groundings"][0]["image_size"] == [40, 24]


def test_positions_can_be_the_naive_ones(http, tiny_bundle, pixels, png):
    from gap_export.runtime.session import GroundingSession

    answer = http.post("/v1/ground", json=in_json(png, WORDS, positions="compact")).json()
    with GroundingSession.open(tiny_bundle, positions="compact") as naive:
        expected = naive.ground(pixels, WORDS)
    assert answer["groundings"][0]["text"] == expected.text
    own = http.post("/v1/ground", json=in_json(png, WORDS)).json()
    assert own["groundings"][0]["text"] != expected.text


@pytest.mark.parametrize(
    ("status", "kind", "words", "change"),
    [
        (404, "UnknownModelError", "no model of that name", {"model": "other"}),
        (415, "ImageFormatError", "not an image", {"image": "aGVsbG8="}),
        (422, "ImageError", "damaged", {"image": base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()}),
        (422, "ImageError", "not base64", {"image": "a b c"}),
        (422, "ImageError", "empty", {"image": ""}),
        (422, "ImageError", "number of bytes", {"shape": [1, 2, 3]}),
        (422, "ExpressionError", "empty", {"expressions": " "}),
        (422, "ExpressionError", "too long", {"expressions": "red " * 100}),
        (422, "", "expressions", {"expressions": []}),
        (422, "", "expressions", {"expressions": ["a"] * 65}),
        (422, "", "colour", {"colour": "rgb"}),
        (422, "", "shape", {"shape": [0, 1, 3]}),
        (422, "", "deadline_ms", {"deadline_ms": 0}),
    ],
)
def test_what_is_wrong_is_a_problem_in_the_sessions_words(http, png, status, kind, words, change):
    answer = http.post("/v1/ground", json={**in_json(png, WORDS), **change})
    problem = answer.json()
    assert (answer.status_code, problem["status"]) == (status, status)
    assert answer.headers["content-type"] == "application/problem+json"
    assert problem["type"] == (f"urn:gap-export:{kind}" if kind else "about:blank")
    assert words in problem["detail"]
    assert problem["error"]["message"] == problem["detail"]


@pytest.mark.parametrize(
    ("kind", "body", "status"),
    [
        ("application/json", b"{", 422),
        ("application/json", b"\xff", 422),
        ("text/plain", b"x", 415),
        ("", b"", 415),
        ("multipart/form-data", b"x", 400),
        ("multipart/form-data; boundary=x", b"x", 400),
        ("multipart/form-data; boundary=x", b"--x--\r\n", 422),
    ],
)
def test_a_body_that_is_none_is_refused(http, kind, body, status):
    answer = http.post("/v1/ground", content=body, headers={"content-type": kind})
    assert (answer.status_code, answer.json()["status"]) == (status, status), answer.text


def test_an_image_in_a_text_field_is_refused(http):
    answer = http.post("/v1/ground", data={"expressions": WORDS, "image": "/etc/passwd"})
    assert answer.status_code == 415 or answer.json()["status"] == 422
    files = {"image": (None, "/etc/passwd"), "expressions": (None, WORDS)}
    assert http.post("/v1/ground", files=files).status_code == 422


def test_an_address_that_is_none_is_a_problem(http):
    for answer, status in ((http.get("/nothing"), 404), (http.get("/v1/ground"), 405)):
        assert (answer.status_code, answer.json()["status"]) == (status, status)


def test_another_name_of_this_machine_is_refused(http):
    for host, status in (("evil.example", 421), ("localhost:1", 200), ("[::1]:1", 200)):
        assert http.get("/healthz", headers={"host": host}).status_code == status


def test_those_who_ask_about_one_image_run_together(http, held, png, pixels):
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(http.post, "/v1/ground", json=in_json(encoded(pixels[:9]), "a"))
        assert held.begun.wait(LIMIT_S)
        bodies = [in_json(png, words) for words in ("the red", "the blue", "")]
        others = [pool.submit(http.post, "/v1/ground", json=body) for body in bodies]
        wait_until(lambda: waiting_of(held) == 3)
        held.go.set()
        statuses = [one.result(LIMIT_S).status_code for one in (first, *others)]
    # One that is wrong spoils no other's answer.
    assert statuses == [200, 200, 200, 422]
    assert sorted(held.runs[1]) == ["", "the blue", "the red"]


def waiting_of(held):
    return len(held.worker.line._waiting)


def test_the_newest_frame_of_a_stream_wins(http, held, pixels):
    frames = [encoded(pixels[:n]) for n in (8, 9, 10)]
    with ThreadPoolExecutor(4) as pool:
        sent = []
        for number, frame in enumerate(frames):
            body = in_json(frame, WORDS, stream="cam")
            sent.append(pool.submit(http.post, "/v1/ground", json=body))
            if number == 0:
                assert held.begun.wait(LIMIT_S)
            else:
                wait_until(lambda: waiting_of(held) == 1)
            if number == 1:
                middle = held.worker.line._waiting[0]
            if number == 2:
                wait_until(middle.answer.done)
        held.go.set()
        statuses = [one.result(LIMIT_S).status_code for one in sent]
    assert statuses == [200, 409, 200]
    assert len(held.runs) == 2


def test_a_deadline_is_answered_in_time_and_never_computed(http, held, png, pixels):
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(http.post, "/v1/ground", json=in_json(encoded(pixels[:9]), "a"))
        assert held.begun.wait(LIMIT_S)
        answer = http.post("/v1/ground", json=in_json(png, WORDS, deadline_ms=50))
        assert answer.status_code == 504
        held.go.set()
        assert first.result(LIMIT_S).status_code == 200
    assert held.runs == [["a"]]


def test_a_client_that_leaves_leaves_no_work(served, held, png, pixels):
    with ThreadPoolExecutor(2) as pool, served.http() as http:
        first = pool.submit(http.post, "/v1/ground", json=in_json(encoded(pixels[:9]), "a"))
        assert held.begun.wait(LIMIT_S)
        with served.http() as other, pytest.raises(httpx.ReadTimeout):
            other.post("/v1/ground", json=in_json(png, WORDS), timeout=0.2)
        wait_until(lambda: len(served.worker.line) == 0)
        held.go.set()
        assert first.result(LIMIT_S).status_code == 200
    assert held.runs == [["a"]]
    text = http_text(served, "/metrics")
    assert 'gap_export_requests_total{route="/v1/ground",status="499"}' in text


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=x"])
def test_a_client_that_leaves_within_its_body_is_no_bug(served, caplog, kind):
    port = int(served.url.rpartition(":")[2])
    head = f"POST /v1/ground HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n"
    with caplog.at_level("INFO", "gap_export.serving"):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(f"{head}Content-Length: 1000\r\n\r\n--x\r\n".encode())
            time.sleep(0.1)
        wait_until(lambda: caplog.records)
    assert [record.getMessage() for record in caplog.records] == ["answered"]
    assert caplog.records[0].about["status"] == 499


def http_text(served, path):
    with served.http() as http:
        return http.get(path).text


def test_too_many_are_told_when_to_come_again(served, held, png, pixels):
    with ThreadPoolExecutor(9) as pool, served.http() as http:
        waiting = [
            pool.submit(http.post, "/v1/ground", json=in_json(encoded(pixels[: 8 + n]), "a"))
            for n in range(8)
        ]
        wait_until(lambda: len(served.worker.line) == 7)
        answer = http.post("/v1/ground", json=in_json(png, WORDS))
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        held.go.set()
        assert {one.result(LIMIT_S).status_code for one in waiting} == {200}
        assert http.post("/v1/ground", json=in_json(png, WORDS)).status_code == 200


def test_a_bug_is_a_problem_and_the_next_is_answered(http, served, monkeypatch, png):
    def fail(first, expressions):
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(served.worker, "_ground", fail)
        answer = http.post("/v1/ground", json=in_json(png, WORDS))
    assert (answer.status_code, answer.json()["status"]) == (500, 500)
    assert "ZeroDivisionError" not in answer.text
    assert http.post("/v1/ground", json=in_json(png, WORDS)).status_code == 200


def test_a_slow_decoder_is_killed_and_the_next_image_is_decoded(http, served, monkeypatch, pixels):
    decoders = served.models._decoders
    with monkeypatch.context() as patch:
        patch.setattr(decoders, "_seconds", 0.0)
        answer = http.post("/v1/ground", json=in_json(encoded(pixels[:11]), WORDS))
    assert answer.status_code == 413 and "takes too long" in answer.json()["detail"]
    answer = http.post("/v1/ground", json=in_json(encoded(pixels[:11]), WORDS))
    assert answer.status_code == 200


def test_a_decoder_that_crashes_costs_one_request(http, served, monkeypatch, pixels):
    decoders = served.models._decoders

    async def crash(process, message):
        process.kill()
        return await exchange(process, message)

    from gap_export.serving import decoders as module

    exchange = module._exchange
    with monkeypatch.context() as patch:
        patch.setattr(module, "_exchange", crash)
        answer = http.post("/v1/ground", json=in_json(encoded(pixels[:12]), WORDS))
    assert answer.status_code == 422 and "ended the decoder" in answer.json()["detail"]
    assert http.post("/v1/ground", json=in_json(encoded(pixels[:12]), WORDS)).status_code == 200
    assert decoders._preparing == {}


def test_keys_bodies_and_origins_are_checked_before_anything_is_read(tiny_bundle, tmp_path, png):
    key = "0123456789abcdef"
    (tmp_path / "keys").write_text(key)
    options = {"api_keys": tmp_path / "keys", "max_body_mib": 1}
    with running(tiny_bundle, cors_origins=("https://a.example",), **options) as served:
        with served.http() as http:
            for header in ({}, {"authorization": f"Bearer {key}0"}, {"authorization": key}):
                answer = http.post("/v1/ground", content=b"x", headers=header)
                assert answer.status_code == 401
                assert answer.headers["www-authenticate"] == "Bearer"
                assert http.get("/metrics", headers=header).status_code == 401
            assert http.get("/healthz").status_code == 200
        with served.http(authorization=f"Bearer {key}") as http:
            origin = {"origin": "https://a.example"}
            answer = http.post("/v1/ground", json=in_json(png, WORDS), headers=origin)
            assert answer.status_code == 200
            assert answer.headers["access-control-allow-origin"] == origin["origin"]
            other = http.get("/healthz", headers={"origin": "https://b.example"})
            assert "access-control-allow-origin" not in other.headers
            # Told by its head, and found while it comes.
            large = bytes((1 << 20) + 1)
            for body in (large, iter([large[:99], large[99:]])):
                kind = {"content-type": "application/json"}
                answer = http.post("/v1/ground", content=body, headers=kind)
                assert answer.status_code == 413, answer.text


def test_probes_tell_a_model_that_failed_to_warm_up(http, served, monkeypatch, png):
    assert http.get("/readyz").json()["status"] == "ready"
    monkeypatch.setattr(served.worker, "failure", GapExportError("broken"))
    assert http.get("/readyz").status_code == 503
    answer = http.post("/v1/ground", json=in_json(png, WORDS))
    assert answer.status_code == 503 and "broken" in answer.json()["detail"]


def test_models_and_the_schema_are_told(http, served):
    (model,) = http.get("/v1/models").json()["data"]
    assert model["id"] == served.worker.name and model["gap_export"]["num_kept_tokens"] == 5
    schema = http.get("/openapi.json").json()
    body = schema["paths"]["/v1/ground"]["post"]["requestBody"]["content"]
    assert set(body) == {"application/json", "multipart/form-data"}


def test_logs_hold_neither_images_nor_expressions(served, http, caplog, png):
    with caplog.at_level("INFO", "gap_export.serving.requests"):
        http.post(
            "/v1/ground", json=in_json(png, "the secret"), headers={"x-request-id": "frame-1"}
        )
        wait_until(lambda: caplog.records)
    about = caplog.records[0].about
    assert (about["request"], about["status"], about["expressions"]) == ("frame-1", 200, 1)
    from gap_export.serving.gate import JsonFormatter

    assert "secret" not in JsonFormatter().format(caplog.records[0])


def test_what_was_let_in_is_answered_before_the_end(tiny_bundle, png, monkeypatch):
    with running(tiny_bundle) as served:
        begun, go = threading.Event(), threading.Event()
        ground = served.worker._ground

        def wait(first, expressions):
            begun.set()
            assert go.wait(LIMIT_S)
            return ground(first, expressions)

        monkeypatch.setattr(served.worker, "_ground", wait)
        pool = ThreadPoolExecutor(1)
        answer = pool.submit(httpx.post, f"{served.url}/v1/ground", json=in_json(png, WORDS))
        assert begun.wait(LIMIT_S)
        threading.Timer(0.3, go.set).start()
    assert answer.result(LIMIT_S).status_code == 200
    pool.shutdown()
    assert not served.worker._thread.is_alive()
