"""``gap-export check BUNDLE``: does it compute what PyTorch computes? A gate for CI."""

from __future__ import annotations

from collections.abc import Sequence
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
    parse_backends,
    parse_bars,
    parse_levels,
    refuse_ignored,
)
from gap_export.cli._check_reference import (
    ReferenceOptions,
    find_original,
    find_reference,
    golden_folder,
)
from gap_export.cli._options import (
    BundleArgument,
    CheckpointOption,
    EnginesOption,
    JsonOption,
    QuietOption,
    VerboseOption,
    terminal_of,
)
from gap_export.cli._outputs import ForceGoldenOption, output_rule, with_sources
from gap_export.errors import ParityError, UsageError
from gap_export.visible import visible

if TYPE_CHECKING:
    from gap_export.bundle import Bundle
    from gap_export.parity.results import BackendKey, CheckReport, Level
    from gap_export.progress import Progress


class _Judging(TypedDict):
    """What is judged, by what, and how strictly."""

    backends: Sequence[BackendKey]
    levels: Sequence[Level]
    engines: str | None
    fail_under: dict[Level, float]
    per_layer: bool
    required: Sequence[BackendKey]


class _Places(TypedDict):
    """Where reports go."""

    json: Path | None
    junit: Path | None
    markdown: Path | None
    html: Path | None


def check(
    ctx: typer.Context,
    bundle: BundleArgument,
    against: AgainstOption = None,
    checkpoint: CheckpointOption = None,
    backend: BackendsOption = None,
    engines: EnginesOption = None,
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
    from gap_export.engines.folder import open_whole
    from gap_export.report import check_writable, write_reports

    backends = parse_backends(backend or [], "--backend")
    given = {
        "--level": level, "--fail-under": fail_under, "--per-layer": per_layer,
        "--require": require, "--engines": engines, "--report-json": report_json, "--junit": junit,
        "--markdown": markdown, "--html": html, "--json": as_json,
    }  # fmt: skip
    options = ReferenceOptions(
        against=[golden_folder(each) for each in against or ()],
        checkpoint=checkpoint or (),
        samples=samples,
        seed=seed,
        images=image or (),
    )
    rule = output_rule(
        force=force,
        inputs={
            "--image": [*options.images],
            "--checkpoint": [*options.checkpoint],
            "--against": [*options.against],
        },
        outside={"the bundle": bundle, **options.goldens()},
    )
    if record is not None:
        refuse_ignored("--record judges nothing", given)
        opened = open_whole(bundle)
        golden = _record(opened, options, record, backends, force, terminal.progress())
        terminal.result(visible(str(golden)))
        return
    places = _Places(json=report_json, junit=junit, markdown=markdown, html=html)
    if force and not any(places.values()):
        refuse_ignored("no file is to be written", {"--force": force})
    judging = _Judging(
        backends=backends or ["ort"],
        levels=parse_levels(level or []),
        engines=engines,
        fail_under=parse_bars(fail_under or []),
        per_layer=per_layer,
        required=parse_backends(require or [], "--require"),
    )
    opened = open_whole(bundle)
    rule = with_sources(rule, [part.location for part in opened.manifest.source.parts])
    check_writable(**places, rule=rule)
    report = _check(opened, options, judging, terminal.progress())
    write_reports(report, **places, rule=rule)
    if as_json:
        terminal.json(report.to_plain())
    else:
        from gap_export.cli._describe_check import describe_check

        terminal.result(describe_check(report))
    _raise_failure(report, judging)


def _check(
    bundle: Bundle, options: ReferenceOptions, judging: _Judging, progress: Progress
) -> CheckReport:
    """Compare with what was asked for.

    Raises:
        UsageError: there is nothing to compare with, or an option would be ignored.
    """
    from gap_export.parity.check import check_bundle, needs_reference
    from gap_export.parity.patched.check import check_patched, was_patched

    needed = needs_reference(judging["levels"])
    if "trt" not in {*judging["backends"], *judging["required"]}:
        refuse_ignored("it is for --backend trt", {"--engines": judging["engines"]})
    if not needed:
        refuse_ignored(
            "no level that is asked for asks the model anything",
            {"--samples": options.samples, "--seed": options.seed, "--image": options.images},
        )
    if was_patched(bundle.manifest) and needed:
        refuse_ignored(
            "unpatched graphs give tensors, to be compared with those of the bundle",
            {"--fail-under": judging["fail_under"], "--per-layer": judging["per_layer"]},
        )
        return check_patched(
            bundle,
            find_original(options),
            options.questions(),
            backends=judging["backends"],
            levels=judging["levels"],
            required=judging["required"],
            seed=options.seed_used,
            progress=progress,
        )
    reference = find_reference(bundle, options, needed=needed)
    return check_bundle(bundle, reference=reference, progress=progress, **judging)


def _record(
    bundle: Bundle,
    options: ReferenceOptions,
    folder: Path,
    backends: Sequence[BackendKey],
    force: bool,
    progress: Progress,
) -> Path:
    """Write a golden.

    Raises:
        UsageError: several backends, or a golden to record one from.
    """
    from gap_export.parity.patched.check import was_patched
    from gap_export.parity.record import record_truth
    from gap_export.parity.truth import TorchTruth

    if len(backends) > 1:
        raise UsageError(
            "a golden is for one backend, whose dtype it has",
            seen=", ".join(backends),
            fix="record one for each",
        )
    if was_patched(bundle.manifest):
        raise UsageError("PyTorch does not know the model of a patched bundle: no golden of it")
    reference = find_reference(bundle, options, needed=True)
    if not isinstance(reference, TorchTruth):
        raise UsageError(
            "a golden is recorded from a checkpoint, and not from another golden",
            seen=", ".join(options.against),
        )
    return record_truth(
        bundle,
        reference,
        folder,
        backend=backends[0] if backends else "ort",
        force=force,
        progress=progress,
    )


def _raise_failure(report: CheckReport, judging: _Judging) -> None:
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
        fix=_advice(report, judging),
    )


def _advice(report: CheckReport, judging: _Judging) -> str:
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
    if failed == {"task"} and "task" in judging["fail_under"]:
        return (
            "Acc@0.5 is not what was asked for: keep more tokens, take another pruner, or ask less"
        )
    return "see the report above; export the bundle again, and report it if it stays"
