"""What the front does when a replica is lost with a request."""

from __future__ import annotations

import pytest
from fastapi.testclient import TestClient

from gap_export.serving.options import ServeOptions
from gap_export.serving.replicas.front import create_front
from gap_export.serving.replicas.replica import Reply

exceptions = pytest.importorskip("ray.exceptions", reason="Ray is not installed")


class Handle:
    """Ray Serve's handle, whose first calls lose their replicas."""

    def __init__(self, num_lost):
        self.answer, self.num_lost, self.calls = self, num_lost, []

    def remote(self, call):
        self.calls.append(call)
        return self._reply(is_lost=len(self.calls) <= self.num_lost)

    async def _reply(self, *, is_lost):
        if is_lost:
            raise exceptions.ActorDiedError
        head = {"type": "http.response.start", "status": 200, "headers": []}
        return Reply(head=head, body=b"answer", route="/v1/ground")


@pytest.mark.parametrize(("num_lost", "status"), [(0, 200), (1, 200), (2, 503)])
def test_what_a_lost_replica_was_asked_is_asked_once_more(num_lost, status):
    handle = Handle(num_lost)
    with TestClient(
        create_front(ServeOptions(), handle), base_url="http://127.0.0.1:8000"
    ) as client:
        answer = client.post("/v1/ground", content=b"question")
    assert answer.status_code == status, answer.text
    assert len(handle.calls) == min(num_lost + 1, 2)
    assert {call.body for call in handle.calls} == {b"question"}
    if status == 200:
        assert answer.content == b"answer"
    else:
        assert answer.headers["Content-Type"] == "application/problem+json"
        assert answer.headers["Retry-After"]
