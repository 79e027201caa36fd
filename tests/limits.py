"""A pytest plugin: no test waits without end, and none depends on what started the run."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from collections.abc import Generator

import pytest

# Far above what any test takes on a busy machine with two cores.
LIMIT_S = 600.0
FULL_LIMIT_S = 1800.0
# pytest-timeout raises inside a test, whose `finally` blocks then run. Native code that never comes
# back hears of nothing: then the process ends, and pytest-xdist starts another worker.
HARD_LIMIT = 1.25

# What job runners and terminals say of themselves, and programs heed in what they print.
SURROUNDINGS = (
    *("TERM", "COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "CLICOLOR", "CLICOLOR_FORCE"),
    *("TTY_COMPATIBLE", "TTY_INTERACTIVE", "GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY"),
)

_stderr = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    """Give signals their usual meaning and hide the terminal, also from programs that tests start.

    Background jobs of a shell that is not interactive, and with them those of many job runners,
    ignore SIGINT, and whatever they start inherits that.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for signum in (signal.SIGTERM, signal.SIGCHLD):
        signal.signal(signum, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())
    for name in SURROUNDINGS:
        os.environ.pop(name, None)
    # Many tests start Python; where this is set, each would compile what it imports anew.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    # While a test runs, descriptor 2 leads to what pytest captures.
    config.stash[_stderr] = os.dup(2)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Close what :func:`pytest_configure` opened."""
    if _stderr in config.stash:
        os.close(config.stash[_stderr])
        del config.stash[_stderr]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Set the limit of each test that names none itself."""
    if not config.pluginmanager.hasplugin("timeout"):
        return
    for item in items:
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(limit_of(item)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """End the process where a test goes on far beyond its limit."""
    end_later(item)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, object, object]:
    """Begin anew: a failure has ended the limits, so that a debugger can be used."""
    end_later(item)
    return (yield)


def end_later(item: pytest.Item) -> None:
    """Print where all threads are and end the process, unless this is called off in time."""
    seconds = HARD_LIMIT * limit_of(item)
    faulthandler.dump_traceback_later(seconds, exit=True, file=item.config.stash[_stderr])


def limit_of(item: pytest.Item) -> float:
    """Seconds that a test may take, with its fixtures."""
    marker = item.get_closest_marker("timeout")
    if marker is not None:
        return float(marker.args[0])
    return FULL_LIMIT_S if item.get_closest_marker("full") else LIMIT_S
