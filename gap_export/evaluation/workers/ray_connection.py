"""A Ray cluster to work on: one that is joined, or one of this machine that is started for it."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import tempfile
import textwrap
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gap_export.errors import GapExportError, UsageError

# Questions and answers are small; by default Ray takes a third of the memory.
_OBJECT_STORE_BYTES = 100_000_000
_ADDRESS = re.compile(
    r"(?P<scheme>ray://)?(?P<host>\[[0-9A-Fa-f:.]+\]|[^\s:/\[\]]+):(?P<port>\d{1,5})"
)
_REACH_S = 5.0
# Ray's own folder for temporary files: a longer one could leave no room for the names of sockets.
_SHORT_FOLDER = "/tmp"  # noqa: S108 - a folder of our own is made in it


@contextmanager
def ray_connection(address: str | None, num_workers: int | None) -> Iterator[int]:
    """Hold a connection to a Ray cluster.

    Args:
        address: ``ray://host:port`` or ``host:port`` of a cluster, which is left as it was; None
            for one on this machine, which ends with the connection.
        num_workers: None for as many as there are CPUs.

    Yields:
        How many workers there are to be.

    Raises:
        UsageError: not an address, no cluster there, not one that this machine can join, or this
            process has a connection already.
        GapExportError: Ray does not start.
    """
    import ray
    from ray.exceptions import RayError

    if ray.is_initialized():
        raise UsageError(
            "this process has a connection to a Ray cluster already",
            fix="end it with ray.shutdown() first",
        )
    host = None if address is None else reach(address)
    scratch = tempfile.TemporaryDirectory(
        prefix="gap-ray-", dir=_SHORT_FOLDER, ignore_cleanup_errors=True
    )
    options: dict[str, Any] = {"address": address}
    with scratch as folder, _unchanged_process():
        if address is None:
            # Read by the processes that are started: nothing is reported to Ray's makers.
            os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
            options = {
                "address": "local",
                "num_cpus": num_workers,
                "num_gpus": 0,
                "include_dashboard": False,
                "object_store_memory": _OBJECT_STORE_BYTES,
                "_temp_dir": folder,
            }
        try:
            try:
                with _own_signal_handler(), warnings.catch_warnings():
                    # What it warns of, it then raises.
                    warnings.simplefilter("ignore")
                    ray.init(log_to_driver=False, logging_level=logging.CRITICAL, **options)
            except (OSError, RuntimeError, ValueError, RayError) as err:
                raise _refusal(address, host, err) from err
            num_cpus = int(ray.cluster_resources().get("CPU", 0))
            if num_cpus < 1:
                raise UsageError(
                    "no node of the Ray cluster offers a CPU",
                    seen=address,
                    allowed="a CPU for each worker",
                )
            yield num_workers or num_cpus
        finally:
            # Ends only the processes that were started here.
            ray.shutdown()


def reach(address: str) -> str:
    """The host of an address at which a program listens.

    Ray itself waits for half a minute, or ends the process, where none does.

    Args:
        address: ``ray://host:port`` or ``host:port``.

    Raises:
        UsageError: not an address, or no program listens there.
    """
    found = _ADDRESS.fullmatch(address)
    if found is None or not 0 < int(found["port"]) < 65536:
        raise UsageError(
            "not the address of a Ray cluster",
            seen=repr(address),
            allowed="ray://host:port, or host:port on one of its nodes",
        )
    host = found["host"]
    try:
        socket.create_connection((host.strip("[]"), int(found["port"])), timeout=_REACH_S).close()
    except OSError as err:
        raise UsageError(
            "no Ray cluster answers at this address",
            seen=f"{address}: {err.strerror or err}",
            fix="start it with `ray start --head`, which names its address; for ray:// it needs "
            'pip install "ray[client]" and listens on port 10001',
        ) from err
    return host


def _refusal(address: str | None, host: str | None, err: Exception) -> GapExportError:
    # In one line; of a traceback, its end.
    lines = str(err).strip().splitlines() or [type(err).__name__]
    if any(line.startswith("Traceback") for line in lines):
        lines = lines[-1:]
    reason = textwrap.shorten(" ".join(lines), 400)
    if address is None:
        return GapExportError(
            "Ray does not start on this machine",
            seen=reason,
            fix="with one process, without --workers or --ray, no Ray is needed",
        )
    return UsageError(
        "the Ray cluster cannot be joined",
        seen=f"{address}: {reason}",
        allowed="the same versions of Python and Ray here and there; host:port (6379) only on "
        f"one of its nodes, from elsewhere ray://{host}:10001",
    )


@contextmanager
def _unchanged_process() -> Iterator[None]:
    """Undo what Ray writes into the environment, and keep it from printing what its nodes say.

    The switch has no public name. Without it the loss of a worker goes to standard output, among
    the JSON; the executor logs it in its own words.
    """
    import ray._private.worker as printing

    environment, enabled = dict(os.environ), printing._worker_logs_enabled  # noqa: SLF001
    printing._worker_logs_enabled = False  # noqa: SLF001
    try:
        yield
    finally:
        printing._worker_logs_enabled = enabled  # noqa: SLF001
        for name in [name for name in os.environ if name.startswith("RAY_")]:
            del os.environ[name]
        os.environ.update({n: value for n, value in environment.items() if n.startswith("RAY_")})


@contextmanager
def _own_signal_handler() -> Iterator[None]:
    """Keep the handler of SIGTERM, which Ray replaces by one that leaves at once."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
