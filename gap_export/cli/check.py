"""``gap-export check BUNDLE``: does it compute what PyTorch computes? A gate for CI."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import typer

from gap_export.cli._check_options import (
    AgainstOption,
    BackendsOption,
    CheckSamplesOption,
    CheckSeedOption,
    FailUnderOption,
    HtmlOption,
    ImagesOption,
    JunitOption,
    LevelsOption,
    MarkdownOption,
    PerLayerOption,
    RecordOption,
    ReportJsonOption,
    RequireOption,
    parse_bars,
)
from gap_export.cli._options import (
    BundleArgument,
    CheckpointOption,
    EnginesOption,
    FormOption,
    JsonOption,
    QuietOption,
    VerboseOption,
    terminal_of,
)
from gap_export.cli._outputs import ForceGoldenOption, output_rule, with_sources
from gap_export.cli._requests import takes_requests
from gap_export.errors import ParityError, UsageError
from gap_export.spec.requests import OpenVinoOptions
from gap_export.visible import visible

if TYPE_CHECKING:
    from gap_export.parity.results import CheckReport
    from gap_export.progress import Progress


class _Asked(TypedDict):
    """What to compare with, and what to ask."""

    against: Sequence[str]
    checkpoint: Mapping[str, Path]
    samples: int | None
    seed: int | None
    images: Sequence[Path]
    progress: Progress


@takes_requests
def check(
    ctx: typer.Context,
    bundle: BundleArgument,
    openvino: OpenVinoOptions,
    against: AgainstOption = None,
    checkpoint: CheckpointOption = None,
    backend: BackendsOption = None,
    engines: EnginesOption = None,
    form: FormOption = None,
    level: LevelsOption = None,
    samples: CheckSamplesOption = None,
    seed: CheckSeedOption = None,
    image: ImagesOption = None,
    fail_under: FailUnderOption = None,
    per_layer: PerLayerOption = False,
    require: RequireOption = None,
    record: RecordOption = None,
    force: ForceGoldenOption = False,
    report_json: ReportJsonOption = None,
    junit: JunitOption = None,
    markdown: MarkdownOption = None,
    html: HtmlOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Compare a bundle with PyTorch, or with a golden of it: a gate for CI.

    Position ids, every output, every token, every box, and Acc@0.5; exit code 3 where one fails.
    """
    terminal = terminal_of(ctx)
    terminal.begin(f"checking {bundle}")
    from gap_export.api import check as api
    from gap_export.checkpoint.find.source import parse_parts
    from gap_export.engines.folder import open_whole
    from gap_export.parity.golden import is_golden
    from gap_export.parity.results import LEVELS
    from gap_export.report import check_writable, write_reports

    named = api.against_of(against or ())
    asked = _Asked(
        against=named,
        checkpoint=parse_parts(checkpoint or ()),
        samples=samples,
        seed=seed,
        images=image or (),
        progress=terminal.progress(),
    )
    rule = output_rule(
        force=force,
        inputs={"--image": image or (), "--checkpoint": checkpoint or (), "--against": named},
        outside={
            "the bundle": bundle,
            **{f"the golden {each}": Path(each) for each in named if is_golden(each)},
        },
    )
    if record is not None:
        judged = {
            "--level": level, "--fail-under": fail_under, "--per-layer": per_layer,
            "--require": require, "--engines": engines, "--form": form,
            "--report-json": report_json,
            "--junit": junit, "--markdown": markdown, "--html": html, "--json": as_json,
            **api.openvino_flags(openvino),
        }  # fmt: skip
        api.refuse_ignored("--record judges nothing", judged)
        golden = api.record(bundle, record, backends=backend or ["ort"], force=force, **asked)
        terminal.result(visible(str(golden)))
        return
    places = {"json": report_json, "junit": junit, "markdown": markdown, "html": html}
    if force and not any(places.values()):
        api.refuse_ignored("no file is to be written", {"--force": force})
    bars = parse_bars(fail_under or [])
    for option, values, allowed in (
        ("--backend", backend, api.BACKENDS),
        ("--level", level, LEVELS),
        ("--require", require, api.BACKENDS),
    ):
        api.choose(values or (), allowed, option)
    opened = open_whole(bundle)
    rule = with_sources(rule, [part.location for part in opened.manifest.source.parts])
    check_writable(**places, rule=rule)
    report = api.check(
        opened,
        backends=backend or ["ort"],
        levels=level or LEVELS,
        engines=engines,
        form=form,
        openvino=openvino,
        fail_under=bars,
        per_layer=per_layer,
        required=require or (),
        **asked,
    )
    write_reports(report, **places, rule=rule)
    if as_json:
        terminal.json(report.to_plain())
    else:
        from gap_export.cli._describe_check import describe_check

        terminal.result(describe_check(report))
    _raise_failure(report, bars)


def _raise_failure(report: CheckReport, bars: Mapping[str, float]) -> None:
    """End with the exit code of the verdict.

    Raises:
        ParityError: a level failed, or a backend that must be run was not.
        UsageError: nothing could be run.
    """
    from gap_export.cli._describe_check import list_failures

    if report.passed:
        return
    failures = list_failures(report)
    if not (report.required or any(backend.was_run for backend in report.backends)):
        raise UsageError("nothing could be checked", seen=failures)
    raise ParityError(
        "the bundle did not pass the check",
        seen=failures,
        fix=_advice(report, bars),
    )


def _advice(report: CheckReport, bars: Mapping[str, float]) -> str:
    """What to do about a report that did not pass."""
    levels = [level for backend in report.backends for level in backend.levels]
    failed = {level.level for level in levels if level.status == "failed"}
    if not failed:
        return "run the check where that backend can be run, or leave out --require"
    if any(found.kind == "overflows" for each in report.backends for found in each.divergences):
        return (
            "see the report above; export it with --dtype float32, or take a checkpoint whose "
            "numbers fit its dtype"
        )
    if failed == {"task"} and "task" in bars:
        return (
            "Acc@0.5 is not what was asked for: keep more tokens, take another pruner, or ask less"
        )
    return "see the report above; export the bundle again, and report it if it stays"
