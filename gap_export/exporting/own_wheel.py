"""The running gap-export as a wheel file, for a device that must not ask any package index for it.

Of an installed wheel the files that it brought are packed again, each held against the hash that
was noted when it was installed. Of a checkout they are the files of the checkout itself, laid out
as ``pyproject.toml`` has it; a test compares that with what the build backend makes. Needs no
network and no build tools.
"""

from __future__ import annotations

import base64
import hashlib
import zipfile
from collections.abc import Mapping
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from gap_export.errors import UsageError
from gap_export.extras import DISTRIBUTION
from gap_export.spec.recipe import models_dir
from gap_export.version import SOURCE, __version__

_PACKAGE = "gap_export"
_HERE = Path(__file__).resolve().parents[1]
# Notes of an install; the next one makes its own.
_INSTALL_NOTES = {"INSTALLER", "RECORD", "REQUESTED", "direct_url.json", "uv_cache.json"}
# Of the format, which has no earlier one: the same files give the same wheel.
_EPOCH = (1980, 1, 1, 0, 0, 0)
_FIX = f"install a checkout or a wheel file: pip install {SOURCE}; or leave out --wheel"


def wheel_name() -> str:
    """File name of the wheel; the package is pure Python."""
    return f"{_PACKAGE}-{__version__}-py3-none-any.whl"


def write_own_wheel(folder: Path) -> Path:
    """Pack the gap-export that is running.

    Args:
        folder: Where the wheel goes.

    Returns:
        Its path; the same files give the same bytes.

    Raises:
        UsageError: nothing is known of how it was installed, another version was, or a file is not
            what was installed.
    """
    try:
        dist = distribution(DISTRIBUTION)
    except PackageNotFoundError as err:
        raise UsageError(
            "--wheel packs the gap-export that is installed, and none is", seen=err, fix=_FIX
        ) from err
    if dist.version != __version__:
        raise UsageError(
            "--wheel: the gap-export that runs is not the one that is installed",
            seen=f"{__version__} runs, {dist.version} is installed",
            fix=_FIX,
        )
    init = f"{_PACKAGE}/__init__.py"
    is_installed = any(file.as_posix() == init for file in dist.files or ()) and Path(
        str(dist.locate_file(init))
    ).samefile(_HERE / "__init__.py")
    # Else the code that runs is a checkout's.
    members = _metadata(dist) | (_installed(dist) if is_installed else _checked_out())
    path = folder / wheel_name()
    _pack(path, members)
    return path


def _metadata(dist: Distribution) -> dict[str, bytes]:
    """What the wheel says of itself, without notes of this install."""
    info = f"{_PACKAGE}-{__version__}.dist-info"
    names = [
        file.as_posix()
        for file in dist.files or ()
        if file.parts[0] == info and file.parts[1] not in _INSTALL_NOTES
    ]
    return {name: Path(str(dist.locate_file(name))).read_bytes() for name in names}


def _installed(dist: Distribution) -> dict[str, bytes]:
    """Files of an installed wheel, each as its hash says.

    Raises:
        UsageError: one is missing or another than was installed.
    """
    members = {}
    for file in dist.files or ():
        # Scripts are made by the installer, outside; compiled files have no hash.
        if file.hash is None or file.parts[0] not in (_PACKAGE, "optimum"):
            continue
        path = Path(str(dist.locate_file(file)))
        data = path.read_bytes() if path.is_file() else None
        if data is None or _digest(data) != file.hash.value:
            raise UsageError(
                "--wheel: a file of gap-export is not what was installed",
                seen=path,
                fix="install it again, or leave --wheel out",
            )
        members[file.as_posix()] = data
    return members


def _checked_out() -> dict[str, bytes]:
    """Files of a checkout, by their places in a wheel."""
    plugin = _HERE / "optimum_plugin"
    places = {
        path: str(path.relative_to(plugin))
        if path.is_relative_to(plugin)
        else f"{_PACKAGE}/{path.relative_to(_HERE)}"
        for path in _walk(_HERE)
    }
    models = models_dir()
    places |= {path: f"{_PACKAGE}/_models/{path.relative_to(models)}" for path in _walk(models)}
    return {name: path.read_bytes() for path, name in places.items()}


def _walk(folder: Path) -> list[Path]:
    found = [path for path in folder.rglob("*") if path.is_file()]
    return [
        path for path in found if "__pycache__" not in path.parts and not path.name.startswith(".")
    ]


def _pack(path: Path, members: Mapping[str, bytes]) -> None:
    """Write a wheel: its files, then the list of them with their hashes."""
    record = f"{_PACKAGE}-{__version__}.dist-info/RECORD"
    lines = [f"{name},sha256={_digest(data)},{len(data)}" for name, data in members.items()]
    lines = [*sorted(lines), f"{record},,", ""]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in [*sorted(members.items()), (record, "\n".join(lines).encode())]:
            entry = zipfile.ZipInfo(name, date_time=_EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, data)


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
