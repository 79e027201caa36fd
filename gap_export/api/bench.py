"""How fast is a bundle? ``bench``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from gap_export.benchmark.contenders import contenders_of
from gap_export.benchmark.measure import measure
from gap_export.benchmark.questions import plan_rounds
from gap_export.benchmark.results import STAGES, BenchReport
from gap_export.benchmark.summary import SPEEDUP, BenchSettings
from gap_export.errors import UsageError
from gap_export.progress import Progress

NUM_ROUNDS = 5


def bench(
    bundles: str | Path | Sequence[str | Path],
    *,
    unpruned: str | Path | None = None,
    backends: Sequence[str] = ("ort",),
    rounds: int = NUM_ROUNDS,
    warm_up: int = 1,
    expressions_per_image: int = 1,
    answer_tokens: int | None = None,
    images: Sequence[str | Path] = (),
    expressions: Sequence[str] = (),
    num_threads: int | None = None,
    fail_under: Mapping[str, float] | None = None,
    progress: Progress | None = None,
) -> BenchReport:
    """Measure how long bundles of the same weights take, stage by stage, side by side.

    Args:
        bundles: Folders.
        unpruned: One more, which drops nothing, to compare with.
        backends: What runs each of them, as ``--backend`` has it: ``ort``, ``ort:base``,
            ``ort:ort``, ``openvino``, ``openvino:bfloat16`` or ``trt``.
        rounds: Questions, each about another image; every bundle is asked each.
        warm_up: Answers before the first that counts, at least one.
        expressions_per_image: Beyond 1, as many expressions about each image are timed as well.
        answer_tokens: Tokens of every answer, whatever the model would say; None: as it says.
        images: The user's own, in turn; by default scenes of RefShapes.
        expressions: The user's own; by default those of the scenes.
        num_threads: Threads of one operator; by default the runtime decides.
        fail_under: By ``speedup`` or a stage, how many times as fast as unpruned each pruned
            bundle must be; ``failures`` of the report say which is not.
        progress: Progress reporter.

    Raises:
        BundleError: a bundle is damaged.
        UsageError: bundles of different weights, nothing to measure, no such backend or stage, or
            a bar that is no number above 0 or has nothing to compare with.

    Example:
        >>> import gap_export
        >>> report = gap_export.bench("demo", rounds=1)
        >>> report.rows[0].stages["total"].n
        1
    """
    paths = [Path(one) for one in ([bundles] if isinstance(bundles, (str, Path)) else bundles)]
    if unpruned is not None:
        paths.insert(0, Path(unpruned))
    bars = dict(fail_under or {})
    unknown = next((name for name in bars if name not in (SPEEDUP, *STAGES)), None)
    if unknown is not None:
        allowed = ", ".join((SPEEDUP, *STAGES))
        raise UsageError("--fail-under has no such choice", seen=unknown, allowed=allowed)
    if not all(math.isfinite(bar) and bar > 0 for bar in bars.values()):
        seen = ", ".join(f"{name}={bar:g}" for name, bar in bars.items())
        raise UsageError("--fail-under: no such speed-up", seen=seen, allowed="above 0")
    if answer_tokens is not None and answer_tokens < 1:
        raise UsageError("an answer has tokens", seen=answer_tokens, allowed=">= 1")
    contenders = contenders_of(paths, backends)
    if unpruned is not None and not contenders[0].is_unpruned:
        raise UsageError(
            "the bundle to compare with drops tokens itself",
            seen=f"{unpruned}: keep {contenders[0].manifest.pruning.keep_ratio:g}",
            fix="export it with --keep 1",
        )
    asked = plan_rounds(
        num_rounds=rounds,
        num_expressions=expressions_per_image,
        images=[Path(image) for image in images],
        expressions=expressions,
    )
    settings = BenchSettings(
        num_threads=num_threads,
        num_warm_up=warm_up,
        answer_tokens=answer_tokens,
        bars=bars,
    )
    return measure(contenders, asked, settings, progress)
