"""What the tests of the commands share."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from gap_export import exporting
from gap_export.cli import main
from gap_export.errors import UsageError
from gap_export.exporting import ExportOptions


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def plain(self) -> Any:
        """stdout, which must be one JSON document."""
        return json.loads(self.out)


RunCli = Callable[..., Outcome]


@pytest.fixture
def own_log() -> Iterator[None]:
    """The package's log as it was, afterwards.

    ``-v`` gives it the stderr of the moment, a captured one here, which is closed after the test:
    what is logged in later tests, most of it by TensorRT, would find no stream.
    """
    logger = logging.getLogger("gap_export")
    handlers, level = logger.handlers[:], logger.level
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)


@pytest.fixture
def run_cli(own_log: None, capsys: pytest.CaptureFixture[str]) -> RunCli:
    """Runs ``gap-export`` in this process."""

    def run(*argv: object) -> Outcome:
        capsys.readouterr()
        code = main([str(arg) for arg in argv])
        out, err = capsys.readouterr()
        assert "Traceback" not in err or "-v" in argv
        return Outcome(code=code, out=out, err=err)

    return run


@pytest.fixture
def seen_options(monkeypatch: pytest.MonkeyPatch) -> list[ExportOptions]:
    """What ``export`` was called with; the export itself ends there."""
    seen: list[ExportOptions] = []

    def refuse(options: ExportOptions, *, progress: object, warn: object) -> None:
        seen.append(options)
        raise UsageError("far enough")

    monkeypatch.setattr(exporting, "export_model", refuse)
    return seen
