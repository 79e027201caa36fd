"""What replicas are started with; no cluster is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gap_export.errors import MissingDependencyError, UsageError
from gap_export.serving.options import ServeOptions, ServeSettings
from gap_export.serving.replicas.options import ReplicaOptions, replica_settings
from gap_export.serving.server import serve as run

KEY = "0123456789abcdef"


@pytest.mark.parametrize(
    ("given", "numbers"), [(None, (2, 2)), ("1", (1, 1)), ("3:3", (3, 3)), ("1:8", (1, 8))]
)
def test_numbers_of_replicas(given, numbers):
    assert ReplicaOptions(ray=True, replicas=given).numbers == numbers


@pytest.mark.parametrize("given", ["", "0", "0:2", "3:2", "-1", "two", "1:", ":2", "1:2:3", "1.5"])
def test_what_is_no_number_of_replicas_is_refused(given):
    with pytest.raises(UsageError, match="number of replicas"):
        ReplicaOptions(ray=True, replicas=given).check(ServeSettings(bundles=()))


@pytest.mark.parametrize(
    ("options", "backend", "words"),
    [
        ({"replicas": "2"}, "onnxruntime", "--replicas; add --ray"),
        ({"ray_address": "a:1"}, "onnxruntime", "--ray-address; add --ray"),
        ({"ray": True}, "tensorrt", "run on CPUs"),
        ({"ray": True, "ray_address": "ray://a:1"}, "onnxruntime", "on one of the cluster's nodes"),
    ],
)
def test_what_does_not_go_together_is_refused(options, backend, words):
    with pytest.raises(UsageError, match=f"{words}"):
        ReplicaOptions(**options).check(ServeSettings(bundles=(), backend=backend))


def test_ray_serve_is_asked_for_what_the_flags_say():
    settings = replica_settings(
        ServeSettings(bundles=(), num_threads=3, options=ServeOptions(batch=5, deadline_s=7))
    )
    made = ReplicaOptions(ray=True, replicas="4").deployment(settings)
    assert made["num_replicas"] == 4 and "autoscaling_config" not in made
    assert made["ray_actor_options"] == {"num_cpus": 3}
    assert made["max_ongoing_requests"] == 5
    assert made["graceful_shutdown_timeout_s"] == 7
    scaled = ReplicaOptions(ray=True, replicas="1:6").deployment(settings)
    scaling = scaled["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["max_replicas"]) == (1, 6)
    assert "num_replicas" not in scaled


def test_a_replica_leaves_keys_and_other_sites_to_the_front(tmp_path):
    options = ServeOptions(
        host="0.0.0.0", api_keys=tmp_path / "keys", cors_origins=("https://a.org",), queue=3
    )
    one = replica_settings(ServeSettings(bundles=(tmp_path / "x" / ".." / "b",), options=options))
    assert one.options == replace(options, host="127.0.0.1", api_keys=None, cors_origins=())
    assert one.bundles == (tmp_path / "b",)
    assert one.num_threads == 1


def test_without_ray_serve_one_message_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr("gap_export.extras._is_installed", lambda name: name != "mmh3")
    settings = ServeSettings(bundles=(tmp_path,), options=ServeOptions(port=0))
    with pytest.raises(MissingDependencyError, match=r"(?s)mmh3.*serve-ray"):
        run(settings, ReplicaOptions(ray=True), say=print)
