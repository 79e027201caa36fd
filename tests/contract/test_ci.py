"""CI jobs, this repository's and those for users to copy: they parse, and what they run exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.contract.typed_commands import unknown_flags

ROOT = Path(__file__).resolve().parents[2]
OWN = ROOT / ".github/workflows/ci.yml"
GITHUB = ROOT / "tools/ci/github-actions.yml"
GITLAB = ROOT / "tools/ci/gitlab-ci.yml"
CHECK_BUNDLES = ROOT / "tools/check_bundles"
REPORT_FLAGS = ("--report-json", "--junit", "--html", "--markdown")


def load(path: Path) -> dict[str, Any]:
    # Not safe_load: YAML 1.1 reads the key `on` as true, which no CI does.
    return yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)


def steps(path: Path) -> list[dict[str, Any]]:
    return [step for job in load(path)["jobs"].values() for step in job["steps"]]


def scripts(path: Path) -> list[str]:
    """The shell text of a file's jobs."""
    if path == GITLAB:
        return [text for job in load(path).values() for text in job["script"]]
    if path == CHECK_BUNDLES:
        return [re.sub(r'(?:\$limit )?"\$venv/bin/(\S+)"', r"\1", path.read_text(encoding="utf-8"))]
    return [step["run"] for step in steps(path) if "run" in step]


def commands(path: Path, program: str) -> list[str]:
    """Lines that run a program, those with a backslash at their end joined."""
    lines = [line for text in scripts(path) for line in text.replace("\\\n", " ").splitlines()]
    called = [line.strip().removeprefix(".venv/bin/") for line in lines]
    return [line for line in called if line.startswith(program)]


def kept_files(path: Path) -> set[str]:
    """What a job leaves behind for people to fetch."""
    if path == GITLAB:
        (job,) = load(path).values()
        return {*job["artifacts"]["paths"], job["artifacts"]["reports"]["junit"]}
    uploads = [s["with"]["path"] for s in steps(path) if "upload-artifact" in s.get("uses", "")]
    return {line for text in uploads for line in text.split()}


def written_reports(line: str) -> dict[str, str]:
    words = shlex.split(line)
    return {flag: words[words.index(flag) + 1] for flag in REPORT_FLAGS if flag in words}


@pytest.mark.parametrize("path", [OWN, GITHUB], ids=lambda path: path.name)
def test_workflows_may_read_and_no_more(path):
    assert load(path)["permissions"] == {"contents": "read"}
    checkouts = [step for step in steps(path) if "actions/checkout" in step.get("uses", "")]
    assert checkouts
    assert all(step["with"]["persist-credentials"] == "false" for step in checkouts)


@pytest.mark.parametrize("path", [OWN, GITHUB], ids=lambda path: path.name)
def test_actions_are_githubs_own_and_pinned_by_major_version(path):
    used = [step["uses"] for step in steps(path) if "uses" in step]
    assert used
    assert [action for action in used if not re.fullmatch(r"actions/[a-z-]+@v\d+", action)] == []


@pytest.mark.parametrize("path", [OWN, GITHUB, GITLAB], ids=lambda path: path.name)
def test_no_job_runs_without_end(path):
    jobs = load(path).values() if path == GITLAB else load(path)["jobs"].values()
    limit = "timeout" if path == GITLAB else "timeout-minutes"
    assert [job for job in jobs if limit not in job] == []


@pytest.mark.parametrize("path", [OWN, GITHUB, GITLAB, CHECK_BUNDLES], ids=lambda path: path.name)
def test_commands_and_flags_exist(path):
    lines = commands(path, "gap-export")
    assert lines
    assert {line: unknown for line in lines if (unknown := unknown_flags(line))} == {}


def test_scripts_of_this_repository_exist_and_can_be_run():
    lines = commands(OWN, "tools/")
    assert {shlex.split(line)[0] for line in lines} == {"tools/test", "tools/docs"}
    assert all((ROOT / shlex.split(line)[0]).stat().st_mode & 0o111 for line in lines)


@pytest.mark.parametrize("path", [GITHUB, GITLAB], ids=lambda path: path.name)
def test_all_reports_are_written_and_kept(path):
    (line,) = commands(path, "gap-export check")
    written = written_reports(line)
    assert set(written) == set(REPORT_FLAGS)
    if path == GITHUB:
        # Shown on the job's own page.
        assert written.pop("--markdown") == "$GITHUB_STEP_SUMMARY"
    assert kept_files(path) == set(written.values())


def test_reports_of_the_demo_bundle_are_kept():
    (line,) = commands(CHECK_BUNDLES, "gap-export check")
    written = {name.replace("$out", "out/check") for name in written_reports(line).values()}
    # One of them is the job's summary page.
    written = {name for name in written if "GITHUB_STEP_SUMMARY" not in name}
    # Beside them what the device job needs.
    assert kept_files(OWN) == written | {"out/check/bundle", "out/check/golden"}


def test_reports_are_kept_where_the_check_fails():
    uploads = [step for step in steps(GITHUB) if "upload-artifact" in step.get("uses", "")]
    assert [step["if"] for step in uploads] == ["${{ !cancelled() }}"]
    (job,) = load(GITLAB).values()
    assert job["artifacts"]["when"] == "always"
