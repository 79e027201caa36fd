"""``gap-export serve BUNDLE...``: bundles behind HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gap_export.cli._options import (
    BACKENDS,
    BackendOption,
    EnginesOption,
    FormOption,
    GrammarOption,
    QuietOption,
    VerboseOption,
    terminal_of,
)
from gap_export.cli._requests import takes_requests
from gap_export.extras import require_extra
from gap_export.serving.options import ServeOptions, ServeSettings
from gap_export.serving.replicas.options import ReplicaOptions
from gap_export.spec.requests import BackendOptions, OpenVinoOptions


@takes_requests
def serve(
    ctx: typer.Context,
    bundle: Annotated[
        list[Path],
        typer.Argument(metavar="BUNDLE...", help="Folders of bundles, which name the models."),
    ],
    options: ServeOptions,
    replicas: ReplicaOptions,
    openvino: OpenVinoOptions,
    grammar: GrammarOption = None,
    backend: BackendOption = "ort",
    engines: EnginesOption = None,
    form: FormOption = None,
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads",
            metavar="N",
            min=1,
            help="CPU threads. [default: all; with --ray, 1 a replica]",
        ),
    ] = None,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Serve bundles over HTTP; see the page on serving."""
    terminal = terminal_of(ctx)
    terminal.begin(f"opening {', '.join(map(str, bundle))}")
    require_extra("serve", "serving bundles")
    from gap_export.serving.server import serve as run

    settings = ServeSettings(
        bundles=tuple(bundle),
        options=options,
        backend=BACKENDS[backend],
        backend_options=BackendOptions(engines=engines, form=form, openvino=openvino),
        num_threads=threads,
        grammar=grammar,
    )
    run(settings, replicas, say=terminal.message)
