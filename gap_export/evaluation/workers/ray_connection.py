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
        UsageError: not an address, nobody there, not a cluster that this machine can join, or this
            process has a connection already.
        GapExportError: Ray does not start.
    """
    import ray

    if ray.is_initialized():
        raise UsageError(
            "this process has a connection to a Ray cluster already",
            fix="end it with ray.shutdown() first",
        )
    host = None if address is None else reach(address)
    with _scratch_folder() as folder, _own_environment(), _quiet_nodes():
        try:
            if address is None:
                _start(num_workers, folder)
            else:
                _join(address, host)
            yield num_workers or _num_cpus(address)
        finally:
            # Ends the processes that were started here, and no others.
            ray.shutdown()


def reach(address: str) -> str:
    """The host of an address, where somebody listens.

    Ray itself waits for half a minute, or ends the process, where nobody does.

    Args:
        address: ``ray://host:port`` or ``host:port``.

    Raises:
        UsageError: not an address, or nobody there.
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
            "nobody answers at the address of the Ray cluster",
            seen=f"{address}: {err.strerror or err}",
            fix="start it with `ray start --head`, which names its address; for ray:// it needs "
            'pip install "ray[client]" and listens on port 10001',
        ) from err
    return host


def _start(num_workers: int | None, folder: str) -> None:
    import ray
    from ray.exceptions import RayError

    try:
        with _own_signal_handler():
            # Read by the processes that are started: nothing is reported to Ray's makers.
            os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
            ray.init(
                address="local",
                num_cpus=num_workers,
                num_gpus=0,
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level=logging.CRITICAL,
                _temp_dir=folder,
            )
    except (OSError, RuntimeError, ValueError, RayError) as err:
        raise GapExportError(
            "Ray does not start on this machine",
            seen=_describe(err),
            fix="without --workers no Ray is needed",
        ) from err


def _join(address: str, host: str | None) -> None:
    import ray
    from ray.exceptions import RayError

    try:
        with _own_signal_handler(), warnings.catch_warnings():
            # What it warns of, it then raises.
            warnings.simplefilter("ignore")
            ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL)
    except (OSError, RuntimeError, ValueError, RayError) as err:
        raise UsageError(
            "the Ray cluster cannot be joined",
            seen=f"{address}: {_describe(err)}",
            allowed="the same versions of Python and Ray here and there; host:port (6379) only on "
            f"one of its nodes, from elsewhere ray://{host}:10001",
        ) from err


def _num_cpus(address: str | None) -> int:
    import ray

    found = int(ray.cluster_resources().get("CPU", 0))
    if found < 1:
        raise UsageError(
            "no node of the Ray cluster offers a CPU", seen=address, allowed="a CPU for each worker"
        )
    return found


def _describe(err: Exception) -> str:
    """What Ray says, in one line; of a traceback, its end."""
    lines = str(err).strip().splitlines() or [type(err).__name__]
    if any(line.startswith("Traceback") for line in lines):
        lines = lines[-1:]
    return textwrap.shorten(" ".join(lines), 400)


def _scratch_folder() -> tempfile.TemporaryDirectory[str]:
    """Where a cluster that is started here has its logs and sockets."""
    return tempfile.TemporaryDirectory(
        prefix="gap-ray-", dir=_SHORT_FOLDER, ignore_cleanup_errors=True
    )


@contextmanager
def _quiet_nodes() -> Iterator[None]:
    """Keep Ray from printing what its nodes say.

    The switch has no public name. Without it the loss of a worker goes to standard output, among
    the JSON; the executor tells of it in its own words.
    """
    import ray._private.worker as printing

    before = printing._worker_logs_enabled  # noqa: SLF001
    printing._worker_logs_enabled = False  # noqa: SLF001
    try:
        yield
    finally:
        printing._worker_logs_enabled = before  # noqa: SLF001


@contextmanager
def _own_environment() -> Iterator[None]:
    """Undo what Ray, and its starting here, write into the environment of this process."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in [name for name in os.environ if name.startswith("RAY_")]:
            if name in before:
                os.environ[name] = before[name]
            else:
                del os.environ[name]


@contextmanager
def _own_signal_handler() -> Iterator[None]:
    """Keep the handler of SIGTERM, which Ray replaces by one that leaves at once."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
