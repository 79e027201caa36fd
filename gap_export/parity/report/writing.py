"""Writing reports: each file whole or not at all."""

from __future__ import annotations

import json as json_format
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from gap_export.errors import OutputError
from gap_export.extras import require_extra
from gap_export.parity.report.junit import to_junit
from gap_export.parity.report.markdown import to_markdown
from gap_export.parity.results import CheckReport

# Where GitHub Actions says which file a step's summary is.
_SUMMARY = "GITHUB_STEP_SUMMARY"
SCHEMA_FILE = Path(__file__).with_name("report.schema.json")


def write_reports(
    report: CheckReport,
    *,
    json: Path | None = None,
    junit: Path | None = None,
    markdown: Path | None = None,
    html: Path | None = None,
) -> None:
    """Write a report into files; what was there is replaced, but for the summary of a GitHub job.

    Args:
        report: What was found.
        json: For programs; see ``SCHEMA_FILE``.
        junit: XML that GitHub, GitLab and Jenkins read: a test case for each backend and level.
        markdown: For a job's summary.
        html: A page that needs nothing but itself.

    Raises:
        MissingDependencyError: the page is asked for, and the extra ``report`` is not installed.
        OutputError: a file cannot be written; those before it are there.
    """
    check_writable(json=json, junit=junit, markdown=markdown, html=html)
    if json is not None:
        write_text(json, json_format.dumps(report.to_plain(), indent=2, allow_nan=False) + "\n")
    if junit is not None:
        write_text(junit, to_junit(report))
    if markdown is not None:
        write_markdown(markdown, to_markdown(report))
    if html is not None:
        from gap_export.parity.report.html import to_html

        write_text(html, to_html(report))


def write_markdown(path: Path, text: str) -> None:
    """Write a report in Markdown; to the summary of a GitHub step it is added.

    Raises:
        OutputError: the file cannot be written, or what is in the summary not be read.
    """
    write_text(path, _kept_summary(path) + text)


def _kept_summary(path: Path) -> str:
    """What other commands of a GitHub step wrote into its summary; of any other file nothing.

    Raises:
        OutputError: it cannot be read.
    """
    summary = os.environ.get(_SUMMARY)
    if not summary or path.resolve() != Path(summary).resolve() or not path.exists():
        return ""
    try:
        before = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as err:
        raise _refusal("Markdown", "is to follow what cannot be read", f"{path}: {err}") from err
    return before + "\n" if before else ""


def check_writable(
    *,
    json: Path | None = None,
    junit: Path | None = None,
    markdown: Path | None = None,
    html: Path | None = None,
    outside: Mapping[str, Path] | None = None,
) -> None:
    """Refuse reports that could not be written, before the work; see :func:`write_reports`.

    Args:
        json: As there.
        junit: As there.
        markdown: As there.
        html: As there.
        outside: Folders that a report would spoil, since they list all they hold; by what they are.

    Raises:
        MissingDependencyError: the page is asked for, and the extra ``report`` is not installed.
        OutputError: a folder does not exist or cannot be written, something else is in the way, it
            is one of ``outside``, or two reports would be one file.
    """
    if html is not None:
        require_extra("report", "writing a page of HTML")
    check_places({"JSON": json, "JUnit": junit, "Markdown": markdown, "HTML": html}, outside or {})


def check_places(named: Mapping[str, Path | None], outside: Mapping[str, Path]) -> None:
    """Refuse places where reports could not be written.

    Args:
        named: Files by the kind of the report; None where it is not asked for.
        outside: Folders that a report would spoil, by what they are.

    Raises:
        OutputError: a folder does not exist or cannot be written, something else is in the way, it
            is one of ``outside``, or two reports would be one file.
    """
    taken: dict[Path, str] = {}
    for kind, path in named.items():
        if path is None:
            continue
        _check_place(kind, path)
        real = path.resolve()
        for what, folder in outside.items():
            if real.is_relative_to(folder.resolve()):
                raise OutputError(
                    f"the {kind} report would be inside {what}, which would then be refused",
                    seen=path,
                    fix="name a file outside of it",
                )
        if real in taken:
            raise OutputError(
                f"two reports would be one file: {taken[real]} and {kind}",
                seen=path,
                fix="name another file for one of them",
            )
        taken[real] = kind


def _check_place(kind: str, path: Path) -> None:
    if str(path) == "-":
        what = "goes to a file, and - is standard output to most programs"
        raise _refusal(kind, what, path, fix="name a file; --json prints the report as JSON")
    parent = path.absolute().parent
    try:
        mode: int | None = path.stat().st_mode
    except FileNotFoundError:
        mode = None
    except NotADirectoryError as err:
        what = "is to be in something that is no folder"
        raise _refusal(kind, what, parent) from err
    except (OSError, ValueError) as err:
        # A folder nobody may look into, a name too long, a NUL in it.
        raise _refusal(kind, "cannot be written there", f"{str(path)!r}: {err}") from err
    if mode is not None and stat.S_ISDIR(mode):
        raise _refusal(kind, "is a file, and this is a folder", path)
    if mode is not None and not stat.S_ISREG(mode):
        # A device or a pipe would be replaced.
        raise _refusal(kind, "would replace what is not a plain file", path)
    # A link may lead elsewhere, also to where nothing is yet.
    folder = path.resolve().parent
    if not folder.is_dir():
        what = "is to be in a folder that does not exist"
        raise _refusal(kind, what, folder, fix="create the folder, or name another file")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _refusal(kind, "is to be in a folder that cannot be written", folder)


def _refusal(kind: str, what: str, seen: object, *, fix: str = "name another file") -> OutputError:
    return OutputError(f"the {kind} report {what}", seen=seen, fix=fix)


def write_text(path: Path, text: str) -> None:
    """Write a report; what was there is replaced, and never by half of it.

    Raises:
        OutputError: it cannot be written; what was there still is.
    """
    # A link stays one: what it leads to is replaced.
    target = path.resolve()
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8", newline="\n")
        part.replace(target)
    except OSError as err:
        raise OutputError(
            "a report cannot be written",
            seen=f"{path}: {err.strerror or err}",
            fix="make room, or name another file",
        ) from err
    finally:
        with suppress(OSError):
            part.unlink()
