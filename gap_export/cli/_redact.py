"""Facts about a machine without what names its owner: for reports that are sent to others."""

from __future__ import annotations

import getpass
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# What identifies one device or network: URLs, which may hold a password, UUIDs (those of GPUs too),
# MAC and private IP addresses, and numbers that call themselves serial. 10.16.2.3 may be an address
# and is a version of TensorRT: it stays.
_SECRETS = (
    (re.compile(r"\b[a-z][a-z0-9+]*://[^\s'\"]+"), "<url>"),
    (re.compile(r"\b(?:GPU-)?[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\b"), "<uuid>"),
    (re.compile(r"\b[0-9a-fA-F]{2}(?::[0-9a-fA-F]{2}){5}\b"), "<address>"),
    (re.compile(r"(?<![\w.])(?:192\.168|172\.[123]\d)(?:\.\d{1,3}){2}(?![\w.])"), "<address>"),
    (re.compile(r"(?i)\b(serial(?: (?:number|no\.?))?\s*[:=]?\s*)[\w-]*\d[\w-]*"), r"\1<serial>"),
)
# A path of Unix or of Windows, to the end of its quotes or up to what no path has without. A
# version such as 6.2/7.2 is none: before the first slash stands no letter and no digit.
_PATH = re.compile(
    r"(?<=['\"])/[^'\"]*(?=['\"])"
    r"|(?<![\w.)>])(?:~|file:/)?(?:/[^\s/'\"\[\](),;:]+)+/?"
    r"|\b[A-Za-z]:\\[^\s'\",;]+"
)
# Too short a name is part of many words.
_MIN_NAME = 3


def redact(facts: Any) -> Any:
    """The same JSON data; user, host, paths, addresses, UUIDs and serial numbers are left out.

    What is left out has its kind in its place, e.g. ``<path>``.

    Args:
        facts: Strings, numbers, lists and objects; keys are not looked at.
    """
    return _redacted(facts, _names())


def _redacted(value: Any, names: re.Pattern[str] | None) -> Any:
    if isinstance(value, str):
        for pattern, instead in _SECRETS:
            value = pattern.sub(instead, value)
        value = _PATH.sub("<path>", value)
        return value if names is None else names.sub("<name>", value)
    if isinstance(value, Mapping):
        return {key: _redacted(inner, names) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_redacted(inner, names) for inner in value]
    return value


def _names() -> re.Pattern[str] | None:
    """Of the user and of this machine, as whole words; None where they say nothing.

    Only as they are written: on a Jetson the user is often ``nvidia``, and the board is by NVIDIA.
    """
    host = socket.gethostname()
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, as in containers
        user = ""
    names = {host, host.partition(".")[0], user, Path.home().name}
    found = [re.escape(name) for name in names if len(name) >= _MIN_NAME]
    return re.compile(rf"(?<!\w)(?:{'|'.join(found)})(?!\w)") if found else None
