"""What is refused before any process is started."""

from __future__ import annotations

import re
import socket
import sys
from dataclasses import replace

import pytest

from gap_export import extras
from gap_export.errors import MissingDependencyError, UsageError
from gap_export.evaluation.measure import RunnerOptions
from gap_export.evaluation.workers import ray_cluster
from gap_export.evaluation.workers.ray_cluster import RayExecutor
from gap_export.evaluation.workers.ray_connection import ray_connection
from gap_export.evaluation.workers.ray_worker import worker_task
from gap_export.extras import pip_install
from gap_export.version import __version__

OPTIONS = RunnerOptions(backend="onnxruntime", num_threads=1, prompt=None, seed=0)
NEEDS_RAY = 'Ray is not installed: pip install -e ".[ray]"'


@pytest.mark.parametrize(
    "address",
    ["somewhere", "somewhere:", ":6379", "a:0", "a:65536", "http://a:1", "ray://a", "a b:1", ""],
)
def test_what_is_no_address_is_refused(address):
    pytest.importorskip("ray", reason=NEEDS_RAY)
    with pytest.raises(UsageError, match="not the address of a Ray cluster"):
        RayExecutor(address, None, OPTIONS)


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_where_nobody_listens_is_refused(scheme):
    pytest.importorskip("ray", reason=NEEDS_RAY)
    # Taken, and not listened at.
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"{scheme}127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(UsageError) as caught:
            RayExecutor(address, None, OPTIONS)
    assert f"no Ray cluster answers at this address: {address}" in str(caught.value)


def test_a_second_connection_is_refused(monkeypatch):
    ray = pytest.importorskip("ray", reason=NEEDS_RAY)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    with pytest.raises(UsageError, match="has a connection"), ray_connection(None, 1):
        pass


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(extras, "missing_modules", lambda extra: ["ray"])
    with pytest.raises(MissingDependencyError, match=re.escape(pip_install("ray"))):
        RayExecutor(None, 1, OPTIONS)


def test_no_shards_need_no_cluster(monkeypatch):
    pytest.importorskip("ray", reason=NEEDS_RAY)
    monkeypatch.setattr(ray_cluster, "ray_connection", pytest.fail)
    assert list(RayExecutor(None, 1, OPTIONS).run([])) == []


def test_a_worker_at_least_is_needed():
    with pytest.raises(UsageError, match=r"too few workers: 0; allowed: >= 1"):
        RayExecutor(None, 0, OPTIONS)


def test_a_backend_that_needs_a_gpu_is_refused():
    with pytest.raises(UsageError, match=r"run on CPUs: tensorrt; allowed: onnxruntime"):
        RayExecutor(None, 1, replace(OPTIONS, backend="tensorrt"))


@pytest.mark.parametrize(
    ("installed", "version", "said"),
    [(True, "7.0", __version__), (False, __version__, "none")],
    ids=["another version", "not installed"],
)
def test_a_node_says_which_version_it_has_and_makes_no_runner(
    monkeypatch, installed, version, said
):
    pytest.importorskip("ray", reason=NEEDS_RAY)
    if not installed:
        monkeypatch.setitem(sys.modules, "gap_export.version", None)
    node, other, _ = worker_task()(version, b"not to be read", b"nor this")
    assert socket.gethostname() in node
    assert other == said
