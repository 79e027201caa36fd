"""Check a bundle: what runs it against its reference, on real images, level by level."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from gap_export.bundle import Bundle
from gap_export.errors import UsageError
from gap_export.parity.candidate import (
    Candidate,
    CannotRun,
    ask_candidate,
    forms_of,
    open_candidate,
)
from gap_export.parity.inside.look import look_inside
from gap_export.parity.levels.agreement import judge_boxes, judge_tokens
from gap_export.parity.levels.fed_ids import first_wrong_fed_ids
from gap_export.parity.levels.positions import judge_positions
from gap_export.parity.levels.task import judge_task
from gap_export.parity.levels.tensor import judge_tensors
from gap_export.parity.results import (
    LEVELS,
    BackendKey,
    BackendResult,
    CheckReport,
    Divergence,
    Level,
    LevelResult,
)
from gap_export.parity.tally import tensor_row
from gap_export.parity.truth import ReferenceOverflowError, TorchTruth, Truth
from gap_export.progress import Progress, SilentProgress
from gap_export.spec.manifest import FormName
from gap_export.spec.requests import DEFAULT_BACKEND, BackendOptions

# Levels of which a share of the questions may be asked for. Position ids and tensors have none: an
# id is right or wrong, and how far a tensor may be off is in the table of tolerances.
BARS: tuple[Level, ...] = ("token", "box", "task")
# Prompts whose ids are looked at: they differ in where the text ends.
_NUM_PROMPTS = 3
_NO_BARS: Mapping[Level, float] = MappingProxyType({})
_Judged = tuple[tuple[LevelResult, ...], tuple[Divergence, ...], str]


def needs_reference(levels: Sequence[Level]) -> bool:
    """Whether any of these levels compares with something: position ids follow from a prompt."""
    return any(level != "positions" for level in levels)


def check_bundle(
    bundle: Bundle,
    *,
    reference: Truth | None,
    backends: Sequence[BackendKey] = ("ort",),
    levels: Sequence[Level] = LEVELS,
    options: BackendOptions = DEFAULT_BACKEND,
    fail_under: Mapping[Level, float] = _NO_BARS,
    per_layer: bool = False,
    required: Sequence[BackendKey] = (),
    progress: Progress | None = None,
) -> CheckReport:
    """Ask a reference and what runs a bundle the same questions, and compare what they answer.

    The reference is asked once for all backends that compute in one dtype.

    Args:
        bundle: From :func:`gap_export.engines.folder.open_whole`: what is damaged must not be
            judged.
        reference: Asks the questions; None where no level needs one.
        backends: What runs the bundle.
        levels: What to compare.
        options: How each backend runs it.
        fail_under: Share of the questions, or with ``task`` the Acc@0.5, that must be reached, in
            0..1. By default all questions must agree but for ties, and Acc@0.5 may be anything that
            is not significantly worse.
        per_layer: Compare the outputs of the model's layers as well.
        required: Backends that must have been run; they are, named in ``backends`` or not.
        progress: Progress reporter.

    Returns:
        The verdict. A backend that cannot be run here is in it, with the reason.

    Raises:
        BundleError: a graph or engines that are damaged.
        UsageError: no questions, levels or backends, a share that is none, or a reference or an
            image that cannot be used.
    """
    wanted = tuple(dict.fromkeys([*backends, *required]))
    plan = _Plan(
        reference=reference,
        levels=tuple(level for level in LEVELS if level in levels),
        options=options,
        fail_under=fail_under,
        per_layer=per_layer,
        progress=progress or SilentProgress(),
    )
    _check_plan(plan, wanted)
    found = [
        _check_backend(bundle, key, form, plan)
        for key in wanted
        for form in forms_of(bundle.manifest, key, options.form)
    ]
    names = dict.fromkeys(name for _, name in found if name)
    pruning = bundle.manifest.pruning
    return CheckReport(
        bundle=str(bundle.path),
        model=bundle.manifest.model.name,
        pruner=pruning.pruner,
        keep_ratio=pruning.keep_ratio,
        reference="; ".join(names) or (reference.name if reference else "the prompt itself"),
        questions=len(reference.questions) if reference else 0,
        seed=reference.seed if reference else 0,
        backends=tuple(result for result, _ in found),
        required=tuple(dict.fromkeys(required)),
    )


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What is asked for, of every backend; see :func:`check_bundle`."""

    reference: Truth | None
    levels: tuple[Level, ...]
    options: BackendOptions
    fail_under: Mapping[Level, float]
    per_layer: bool
    progress: Progress


def _check_plan(plan: _Plan, backends: Sequence[BackendKey]) -> None:
    """Refuse what makes no sense.

    Raises:
        UsageError: it does not.
    """
    if not backends or not plan.levels:
        raise UsageError(
            "nothing to check",
            seen=f"{len(backends)} backends, {len(plan.levels)} levels",
            allowed=f"at least 1 of each; levels: {', '.join(LEVELS)}",
        )
    if needs_reference(plan.levels) and (plan.reference is None or not plan.reference.questions):
        raise UsageError("nothing to check with", seen="0 questions", allowed="at least 1")
    if plan.per_layer and "tensor" not in plan.levels:
        raise UsageError(
            "layers are compared at the level tensor, which is not asked for",
            seen=", ".join(plan.levels),
        )
    if plan.per_layer and not isinstance(plan.reference, TorchTruth):
        raise UsageError(
            "layers can be compared with PyTorch alone",
            seen=plan.reference.name if plan.reference else "no reference",
            fix="name a checkpoint",
        )
    for level, bar in plan.fail_under.items():
        if level not in BARS or not 0 <= bar <= 1:
            raise UsageError(
                "no such bar",
                seen=f"{level}={bar:g}",
                allowed=f"{', '.join(BARS)}, with a share in 0..1; a position id is right or "
                "wrong, and how far tensors may be off is a table of its own",
            )
        if level not in plan.levels:
            raise UsageError(
                "there is a bar for a level that is not asked for",
                seen=f"{level}={bar:g}",
                allowed=", ".join(level for level in plan.levels if level in BARS) or "none",
            )


def _check_backend(
    bundle: Bundle, key: BackendKey, form: FormName | None, plan: _Plan
) -> tuple[BackendResult, str]:
    """Run and judge one backend, with one form of the graphs.

    Returns:
        What was found, and what it was compared with; the latter is empty where it was not.
    """
    started = time.perf_counter()
    candidate = open_candidate(
        bundle, key, options=plan.options, reference=plan.reference, form=form
    )
    divergences: tuple[Divergence, ...] = ()
    if isinstance(candidate, CannotRun):
        name = reference = ""
        levels = tuple(
            LevelResult(level=level, status="not_run", reason=candidate.reason)
            for level in plan.levels
        )
    else:
        with candidate.session:
            name = candidate.backend.name
            levels, divergences, reference = _judge(bundle, candidate, plan)
    result = BackendResult(
        backend=key,
        name=name,
        seconds=time.perf_counter() - started,
        levels=levels,
        divergences=divergences,
    )
    return result, reference


def _judge(bundle: Bundle, candidate: Candidate, plan: _Plan) -> _Judged:
    """The verdict of each level, where outputs begin to differ, and the reference's name."""
    note = candidate.note
    if plan.reference is None or not needs_reference(plan.levels):
        return (judge_positions(bundle, candidate.decoder_graph, note=note),), (), ""
    try:
        recorded = plan.reference.record(
            bundle,
            dtype=candidate.backend.dtype,
            quantization=candidate.backend.quantization,
            progress=plan.progress,
        )
    except ReferenceOverflowError as err:
        return _without_reference(bundle, candidate, plan, err)
    answered = ask_candidate(
        candidate,
        plan.reference.questions,
        recorded,
        replays="tensor" in plan.levels,
        answers=any(level in plan.levels for level in BARS),
        progress=plan.progress,
    )
    rows = [*recorded.shared, *answered.tally.rows(candidate.tolerances)]
    if answered.batched:
        logits = candidate.tolerances["logits"]
        rows.append(
            tensor_row("decoder_model_merged", "logits (padded batch)", answered.batched, logits)
        )
    inside = look_inside(
        bundle,
        candidate,
        plan.reference,
        recorded,
        answered,
        per_layer=plan.per_layer,
        progress=plan.progress,
    )
    # The position ids of the first few prompts.
    tables = [
        next(call.inputs["kept_positions"] for call in calls if call.is_decode)
        for calls in recorded.calls[:_NUM_PROMPTS]
    ]
    wrong_fed = first_wrong_fed_ids(recorded, bundle.manifest)
    bars = plan.fail_under
    judges: dict[Level, Callable[[], LevelResult]] = {
        "positions": lambda: judge_positions(
            bundle, candidate.decoder_graph, tables=tables, wrong_fed=wrong_fed, note=note
        ),
        "tensor": lambda: judge_tensors(
            (*rows, *inside.layers), broken=answered.broken, note=inside.note
        ),
        "token": lambda: judge_tokens(answered.pairs, bar=bars.get("token", 1.0)),
        "box": lambda: judge_boxes(answered.pairs, bar=bars.get("box", 1.0)),
        "task": lambda: judge_task(answered.pairs, bar=bars.get("task")),
    }
    levels = tuple(judges[level]() for level in plan.levels)
    return _with_facts(levels, recorded.other_facts), inside.divergences, recorded.name


def _without_reference(
    bundle: Bundle, candidate: Candidate, plan: _Plan, err: ReferenceOverflowError
) -> _Judged:
    """All fails that compares: what PyTorch does not compute is not what was to be exported."""
    levels = tuple(
        judge_positions(bundle, candidate.decoder_graph, note=candidate.note)
        if level == "positions"
        else LevelResult(level=level, status="failed", reason=f"{err.what}: {err.seen}")
        for level in plan.levels
    )
    return levels, () if err.found is None else (err.found,), err.name


def _with_facts(levels: tuple[LevelResult, ...], wrong: Sequence[str]) -> tuple[LevelResult, ...]:
    """The first level that compares with the reference fails for what the bundle says wrongly.

    It fails whichever level that is: that some questions are answered alike excuses nothing.
    """
    if not wrong:
        return levels
    first = next(level for level in levels if level.level != "positions")
    reason = "; ".join(filter(None, (*wrong, first.reason)))
    failed = replace(first, status="failed", reason=reason)
    return tuple(failed if level is first else level for level in levels)
