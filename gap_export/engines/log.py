"""What TensorRT says while it works goes to ``logging``, and its errors into our messages."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger(__name__)

_KEPT = 3


class TensorRTLog:
    """The one logger of a TensorRT package in this process.

    Attributes:
        handle: What TensorRT's constructors take. It must outlive all that was made with it, and
            TensorRT uses the first one it is given for all that it makes while any of that lives:
            hence one for the whole process, see :func:`log_of`.
    """

    def __init__(self, module: Any) -> None:
        self._errors: list[str] = []
        severity, take = module.ILogger.Severity, self._take

        class _Handle(module.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                # pybind11 wants the base's constructor called by its name.
                module.ILogger.__init__(self)

            def log(self, level: Any, message: str) -> None:
                is_error = level in (severity.INTERNAL_ERROR, severity.ERROR)
                take(is_error, level in (severity.INFO, severity.VERBOSE), message)

        self.handle = _Handle()

    @contextmanager
    def recording(self) -> Iterator[list[str]]:
        """Collects the errors that TensorRT reports meanwhile, oldest first."""
        before, self._errors = self._errors, []
        try:
            yield self._errors
        finally:
            self._errors = before

    def _take(self, is_error: bool, is_chatter: bool, message: str) -> None:
        if is_error:
            self._errors.append(message.strip())
        # Errors too: the caller raises an error that quotes them.
        logger.log(logging.DEBUG if is_chatter else logging.INFO, "%s", message.strip())


@functools.cache
def log_of(module: Any) -> TensorRTLog:
    """The logger of a TensorRT package, made on first use and kept.

    Args:
        module: ``tensorrt`` or ``tensorrt_rtx``.
    """
    return TensorRTLog(module)


def quote(errors: list[str]) -> str:
    """The errors that came first, which name the cause; later ones follow from them."""
    lines = [" ".join(error.split()) for error in errors[:_KEPT]]
    return " | ".join(dict.fromkeys(lines)) or "TensorRT did not say why"
