"""One rule for every file that a command writes.

Never a file that the command reads, by any path or link that names it; never through a symbolic
link; never inside a bundle or a golden, which list all they hold; and a file that gap-export did
not write only with ``--force``. It holds before the work and again when the file is written, whole
or not at all. A folder on the way may be a link: it is where the user says.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from gap_export.errors import OutputError

# The last line of a report in Markdown, which readers do not show.
MARKDOWN_END = "<!-- written by gap-export -->\n"
# In the EXIF data of a drawing, as the software that made it.
DRAWING_SOFTWARE = "gap-export drawing"

# Where GitHub Actions says which file a step's summary is: reports are added to it.
_SUMMARY = "GITHUB_STEP_SUMMARY"
# What folders hold that list all they hold.
BUNDLE_MARK, GOLDEN_MARK = "gap.json.sha256", "golden.json.sha256"
_LISTS = {BUNDLE_MARK: "a bundle", GOLDEN_MARK: "a golden"}
# Each form says what it is near its beginning or its end.
_LOOKED_AT = 1024
_FORMS = (
    re.compile(rb'\A\{\s*"schema":\s*"gap-export-(check|evaluation|bench)"'),
    re.compile(rb'\A<\?xml[^>]*>\s*<testsuites name="gap-export check"'),
    re.compile(rb"\A<!DOCTYPE html>\n.*<title>gap-export (check|eval|bench): ", re.DOTALL),
    re.compile(
        rb"\A# gap-export (check|eval|bench)\b.*%b\Z" % re.escape(MARKDOWN_END.encode()), re.DOTALL
    ),
    re.compile(
        rb"\A(\x89PNG|\xff\xd8\xff|RIFF....WEBP|....ftyp).*%b" % DRAWING_SOFTWARE.encode(),
        re.DOTALL,
    ),
)


@dataclass(frozen=True, kw_only=True)
class OutputRule:
    """What the files that a command writes must stay away from.

    Attributes:
        inputs: Files and folders that the command reads, by what they are.
        outside: Folders that a new file would spoil, since they list all they hold; likewise.
        force: Replace files that gap-export did not write; never one that is read.
    """

    inputs: Mapping[str, Path] = field(default_factory=dict)
    outside: Mapping[str, Path] = field(default_factory=dict)
    force: bool = False

    def check(self, named: Mapping[str, Path | None]) -> None:
        """Refuse files that must not, or could not, be written.

        Args:
            named: By what they are, such as ``the JSON report``; None where not asked for.

        Raises:
            OutputError: a folder that does not exist or cannot be written, something else in the
                way, a link, a file that is read or is not ours, or two outputs in one file.
        """
        taken: dict[Path, str] = {}
        for what, path in named.items():
            if path is None:
                continue
            real, exists = _check_place(what, path)
            self.check_outside(what, path)
            if exists:
                self._check_replaced(what, real)
            for other, before in taken.items():
                if other == real or _is_same(other, real):
                    raise OutputError(
                        f"two outputs would be one file: {before} and {what}",
                        seen=path,
                        fix="name another file for one of them",
                    )
            taken[real] = what

    def check_outside(self, what: str, path: Path) -> None:
        """Refuse a file or a folder that would be inside one that lists all it holds.

        Raises:
            OutputError: it would.
        """
        for other, folder in self.outside.items():
            if _is_below(path, folder):
                raise OutputError(
                    f"{what} would be inside {other}, which would then be refused",
                    seen=path,
                    fix="name a place outside of it",
                )
        check_outside_listings(what, path, inside=path)

    def write(self, what: str, path: Path, content: bytes) -> None:
        """Write a file; what was there is replaced, and never by half of it.

        Raises:
            OutputError: the rule forbids it, or it cannot be written; what was there still is.
        """
        with self.replacing(what, path) as part:
            part.write_bytes(content)

    @contextmanager
    def replacing(self, what: str, path: Path) -> Iterator[Path]:
        """A new file beside ``path`` to be written, which takes its place when the context ends.

        Raises:
            OutputError: the rule forbids it, or it cannot be written; what was there still is.
        """
        self.check({what: path})
        # Not named after the file, whose name may be as long as names can be.
        target = in_real_folder(path)
        part = target.with_name(f".gap-export-{secrets.token_hex(8)}.part")
        try:
            part.touch(exist_ok=False)
            yield part
            part.replace(target)
        except OSError as err:
            raise OutputError(
                f"{what} cannot be written",
                seen=f"{path}: {err.strerror or err}",
                fix="make room, or name another file",
            ) from err
        finally:
            with suppress(OSError):
                part.unlink()

    def _check_replaced(self, what: str, path: Path) -> None:
        """Refuse to replace an input, or what is not ours."""
        ours = is_step_summary(path) or _is_ours(what, path)
        for name, given in self.inputs.items():
            # A report of ours may lie in a folder that is read; nothing that is named is replaced.
            if _is_same(path, given) or (not ours and _holds(given, path)):
                raise OutputError(
                    f"{what} would replace a file that the command reads: {name}",
                    seen=path,
                    fix="name another file",
                )
        if not ours and not self.force:
            raise OutputError(
                f"{what} would replace a file that gap-export did not write",
                seen=path,
                allowed="a new file, or a report or drawing of gap-export",
                fix="name another file, or replace it with --force",
            )


NO_RULE = OutputRule()


def is_step_summary(path: Path) -> bool:
    """Whether a file is the summary of a GitHub step, to which is added."""
    summary = os.environ.get(_SUMMARY)
    return bool(summary) and path.resolve() == Path(str(summary)).resolve()


def check_outside_listings(what: str, path: Path, *, inside: Path) -> None:
    """Refuse a place in any bundle or golden, which would be refused with it in.

    Args:
        what: Is to be there.
        path: The place, as the user named it.
        inside: The innermost folder that may not be one; those around it may not either.

    Raises:
        OutputError: one is.
    """
    real = _real(inside)
    for folder in (real, *real.parents):
        for name, kind in _LISTS.items():
            if os.path.isfile(folder / name):  # noqa: PTH113 - Path.is_file raises where it may not look
                raise OutputError(
                    f"{what} would be inside {kind}, which would then be refused",
                    seen=f"{path}, in {folder}",
                    fix="name a place outside of it",
                )


def _check_place(what: str, path: Path) -> tuple[Path, bool]:
    """Refuse a place where no plain file can be written; its real path, and whether it exists."""
    if str(path) == "-":
        raise OutputError(
            f"{what} goes to a file, and - is standard output to most programs",
            seen=path,
            fix="name a file; --json prints the report as JSON",
        )
    folder = path.absolute().parent
    try:
        real = in_real_folder(path)
        folder = real.parent
        mode: int | None = real.lstat().st_mode
    except FileNotFoundError:
        mode = None
    except NotADirectoryError as err:
        raise _refusal(what, "is to be in something that is no folder", folder) from err
    except (OSError, ValueError) as err:
        # A folder that may not be read, a name too long, a NUL in it.
        raise _refusal(what, "cannot be written there", f"{str(path)!r}: {err}") from err
    if mode is not None and stat.S_ISLNK(mode):
        raise _refusal(what, "is not written through a link", f"{path} -> {path.readlink()}")
    if mode is not None and stat.S_ISDIR(mode):
        raise _refusal(what, "is a file, and this is a folder", path)
    if mode is not None and not stat.S_ISREG(mode):
        # A device or a pipe would be replaced.
        raise _refusal(what, "would replace what is not a plain file", path)
    if not folder.is_dir():
        raise OutputError(
            f"{what} is to be in a folder that does not exist",
            seen=folder,
            fix="create the folder, or name another file",
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _refusal(what, "is to be in a folder that cannot be written", folder)
    return real, mode is not None


def in_real_folder(path: Path) -> Path:
    """The path with links and ``..`` of its folder resolved; what it names may still be a link."""
    if path.name in ("", ".."):
        return path.resolve()
    return path.parent.resolve() / path.name


def _real(path: Path) -> Path:
    """The path with links and ``..`` resolved, as far as that can be: links may go in circles."""
    return Path(os.path.realpath(path))


def _refusal(what: str, why: str, seen: object) -> OutputError:
    return OutputError(f"{what} {why}", seen=seen, fix="name another file")


def _is_ours(what: str, path: Path) -> bool:
    """Whether a file is a report or drawing of gap-export, or empty: nothing would be lost."""
    try:
        with path.open("rb") as stream:
            seen = stream.read(2 * _LOOKED_AT)
            size = os.fstat(stream.fileno()).st_size
            if size > 2 * _LOOKED_AT:
                stream.seek(-_LOOKED_AT, os.SEEK_END)
                seen = seen[:_LOOKED_AT] + stream.read(_LOOKED_AT)
    except OSError as err:
        raise _refusal(what, "would replace what cannot be read", f"{path}: {err}") from err
    return not size or any(form.search(seen) for form in _FORMS)


def _is_below(path: Path, folder: Path) -> bool:
    """Whether a path is a folder or lies in it, through any links."""
    real = _real(path)
    if real.is_relative_to(_real(folder)):
        return True
    # Where names differ in case alone, or a folder is mounted twice.
    return any(_is_same(each, folder) for each in (real, *real.parents))


def _is_same(one: Path, other: Path) -> bool:
    """Whether two names are one file, by device and inode; so are hard links to it."""
    try:
        return one.samefile(other)
    except (OSError, ValueError):
        return False


def _holds(given: Path, path: Path) -> bool:
    """Whether a file is one of a folder's: there, by a hard link, or by a link that leads to it."""
    if _is_below(path, given):
        return True
    wanted = path.stat()
    return any(os.path.samestat(status, wanted) for status in _statuses(given))


def _statuses(top: Path) -> Iterator[os.stat_result]:
    """Of every file below a folder, links followed, each folder once."""
    waiting, seen = [str(top)], set()
    while waiting:
        with suppress(OSError), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                status = entry.stat()
                if not stat.S_ISDIR(status.st_mode):
                    yield status
                elif (status.st_dev, status.st_ino) not in seen:
                    seen.add((status.st_dev, status.st_ino))
                    waiting.append(entry.path)
