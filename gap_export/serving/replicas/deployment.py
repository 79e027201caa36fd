"""Replicas for as long as they are needed, in a cluster of this machine or one that is joined."""

from __future__ import annotations

import logging
import secrets
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from starlette.types import ASGIApp

from gap_export.errors import GapExportError
from gap_export.evaluation.workers.ray_connection import ray_connection
from gap_export.extras import require_extra
from gap_export.serving.options import ServeSettings
from gap_export.serving.replicas.options import ReplicaOptions, replica_settings


@contextmanager
def replicated(settings: ServeSettings, options: ReplicaOptions) -> Iterator[ASGIApp]:
    """Start replicas, and stop them in the end; what they have been asked is answered first.

    Yields:
        The application that stands before them. They are warm by then.

    Raises:
        MissingDependencyError: Ray Serve is not installed.
        UsageError: what :meth:`ReplicaOptions.check` says, or no cluster at the address.
        GapExportError: Ray does not start, or a bundle cannot be opened on a node.
    """
    options.check(settings)
    require_extra("serve-ray", "serving with replicas")
    from gap_export.serving.replicas.front import create_front

    each = replica_settings(settings)
    assert each.num_threads is not None, "it is set there"
    num_cpus = None if options.ray_address else options.numbers[1] * each.num_threads
    with ray_connection(options.ray_address, num_cpus), _deployed(each, options) as handle:
        yield create_front(settings.options, handle)


@contextmanager
def _deployed(settings: ServeSettings, options: ReplicaOptions) -> Iterator[Any]:
    from ray import serve

    from gap_export.serving.replicas.replica import Replica

    # Other servers in a cluster have names of their own.
    name = f"gap-export-{secrets.token_hex(4)}"
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    # The front is this process: none of Ray's has to listen.
    serve.start(proxy_location="Disabled")
    deploy = serve.deployment(name="replica", **options.deployment(settings))
    replicas: Any = deploy(Replica)
    try:
        try:
            yield serve.run(replicas.bind(settings), name=name, route_prefix=None)
        except RuntimeError as err:
            raise _refusal(name, err) from err
    finally:
        serve.delete(name)
        if not serve.status().applications:
            serve.shutdown()


def _refusal(name: str, err: RuntimeError) -> GapExportError:
    """Why no replica starts, in one line."""
    from ray import serve

    found = serve.status().applications.get(name)
    messages = [one.message for one in found.deployments.values()] if found else []
    lines = [line for message in messages for line in message.strip().splitlines() if line.strip()]
    return GapExportError(
        "the replicas do not start",
        seen=textwrap.shorten((lines or str(err).splitlines())[-1], 400),
        allowed="on each node of the cluster: this version of gap-export with the extra "
        "serve-ray, and the bundles in the same folders",
    )
