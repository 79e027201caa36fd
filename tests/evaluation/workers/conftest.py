"""A Ray cluster on this machine, and nodes that come and go."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.evaluation.workers import fake_runners

# Nearly the least that Ray takes.
STORE_BYTES = 80_000_000


@contextmanager
def ray_cluster(**head: Any) -> Iterator[Any]:
    """One node with one CPU; this process is not connected to it."""
    from ray import cloudpickle
    from ray.cluster_utils import Cluster

    # Workers do not see the tests: what is in there is sent along. One cluster may lie in another.
    is_sent = fake_runners.__name__ in cloudpickle.list_registry_pickle_by_value()
    if not is_sent:
        cloudpickle.register_pickle_by_value(fake_runners)
    # Names of sockets are short, and so is this folder's.
    folder = tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True)
    with folder as scratch, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", scratch)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # What is found, or else written, in the home folder must not decide.
        patch.setenv("RAY_AUTH_MODE", "disabled")
        arguments = {
            "num_cpus": 1,
            "object_store_memory": STORE_BYTES,
            "include_dashboard": False,
            **head,
        }
        cluster = Cluster(initialize_head=True, head_node_args=arguments)
        yield cluster
        cluster.shutdown()
    if not is_sent:
        cloudpickle.unregister_pickle_by_value(fake_runners)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """As :func:`ray_cluster`, for all tests of a file."""
    pytest.importorskip("ray", reason='Ray is not installed: pip install -e ".[ray]"')
    with ray_cluster() as made:
        yield made


@pytest.fixture
def second_node(cluster: Any) -> Iterator[Any]:
    """Another node with one CPU, which a test may remove."""
    node = cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
    yield node
    if node in cluster.worker_nodes:
        cluster.remove_node(node)
