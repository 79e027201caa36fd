"""``gap-export calibrate BUNDLE``: from which score on an object is there."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from gap_export.cli._evaluate_options import DataOption
from gap_export.cli._options import (
    BackendOption,
    BundleArgument,
    EnginesOption,
    FormOption,
    GrammarOption,
    JsonOption,
    QuietOption,
    VerboseOption,
    terminal_of,
)
from gap_export.cli._requests import takes_requests
from gap_export.spec.requests import OpenVinoOptions


@takes_requests
def calibrate(
    ctx: typer.Context,
    bundle: BundleArgument,
    openvino: OpenVinoOptions,
    data: DataOption = "refshapes",
    samples: Annotated[
        int | None,
        typer.Option(
            "--samples",
            metavar="N",
            min=1,
            help="How many expressions to ask whose object is there. "
            "[default: 500 of what is drawn, else all]",
        ),
    ] = None,
    absent: Annotated[
        float | None,
        typer.Option(
            "--absent",
            metavar="SHARE",
            help="Of what is drawn: so large a share of what is asked is not there. [default: 0.5]",
        ),
    ] = None,
    recall: Annotated[
        float,
        typer.Option(
            "--recall",
            metavar="SHARE",
            help="How many of the objects that are there are to be found, in (0, 1].",
        ),
    ] = 0.95,
    seed: Annotated[
        int, typer.Option("--seed", metavar="N", min=0, help="Of the scenes that are drawn.")
    ] = 1,
    grammar: GrammarOption = None,
    backend: BackendOption = "ort",
    engines: EnginesOption = None,
    form: FormOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Find the score from which on an object is there."""
    terminal = terminal_of(ctx)
    terminal.begin(f"calibrating {bundle}")
    from gap_export.api.calibrate import calibrate as api

    found = api(
        bundle,
        data=data,
        samples=samples,
        absent=absent,
        recall=recall,
        seed=seed,
        grammar=grammar,
        backend=backend,
        engines=engines,
        form=form,
        openvino=openvino,
        progress=terminal.progress(),
    )
    if as_json:
        terminal.json(asdict(found))
        return
    low, high = found.auroc_ci95
    terminal.result(
        f"found from score {found.threshold:.4g} on: {100 * found.recall:.1f} % of "
        f"{found.num_present} objects that are there, and {100 * found.false_box_rate:.1f} % of "
        f"{found.num_absent} that are not\n"
        f"AUROC {found.auroc:.3f} (95 % interval {low:.3f} to {high:.3f}; 0.5 tells nothing)\n"
        f"calibration error {found.expected_calibration_error:.3f}"
    )
    if low <= 0.5:
        terminal.warning("the score of this model does not tell what is there from what is not")
