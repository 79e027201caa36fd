"""``gap-export ros-bag BUNDLE BAG EXPRESSION... --out BAG2``: a bag, and its detections."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from gap_export.cli._frames import FrameCounts
from gap_export.cli._options import (
    BACKENDS,
    BackendOption,
    BundleArgument,
    CpuThreadsOption,
    QuietOption,
    VerboseOption,
    terminal_of,
)
from gap_export.cli._outputs import output_rule
from gap_export.visible import visible


def ros_bag(
    ctx: typer.Context,
    bundle: BundleArgument,
    bag: Annotated[
        Path,
        typer.Argument(
            metavar="BAG",
            help="A .bag file of ROS 1, or of ROS 2 a bag's folder, an .mcap or a .db3 file.",
        ),
    ],
    expressions: Annotated[
        list[str],
        typer.Argument(
            metavar="EXPRESSION", help='What to find: "the small red circle". Repeatable.'
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out", metavar="BAG", help="The new bag, of the same form; it must not exist."
        ),
    ],
    topic: Annotated[
        str | None,
        typer.Option(
            "--topic", metavar="NAME", help="Of the images. [default: the only one that has some]"
        ),
    ] = None,
    detections: Annotated[
        str, typer.Option("--detections", metavar="NAME", help="Topic of the detections.")
    ] = "/gap_export/detections",
    detections_only: Annotated[
        bool,
        typer.Option("--detections-only", help="Leave the bag's own messages out of the new one."),
    ] = False,
    every: Annotated[
        int, typer.Option("--every", metavar="N", min=1, help="Ask about the first of every N.")
    ] = 1,
    same_frame: Annotated[
        float | None,
        typer.Option(
            "--same-frame",
            metavar="SHARE",
            help="Skip an image that is the same as the last one answered; see `ground`.",
        ),
    ] = None,
    backend: BackendOption = "ort",
    threads: CpuThreadsOption = None,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Find things in the images of a ROS bag; writes a bag, and prints a line of JSON an image."""
    terminal = terminal_of(ctx)
    terminal.begin(f"opening {bundle}")
    from gap_export.extras import require_extra

    require_extra("ros", "reading a bag of ROS")
    from gap_export.runtime.session import GroundingSession
    from gap_export.streaming.answering import check_same_frame
    from gap_export.streaming.ros.bags import BagTopics, answer_bag, check_bag_output

    rule = output_rule(force=False, inputs={"BAG": [bag]}, outside={"the bundle": bundle})
    check_bag_output(out, bag, rule)
    check_same_frame(same_frame)
    counts = FrameCounts()
    with GroundingSession.open(bundle, backend=BACKENDS[backend], num_threads=threads) as session:
        answers = answer_bag(
            session,
            bag,
            out,
            expressions,
            topics=BagTopics(images=topic, detections=detections, copies=not detections_only),
            every=every,
            same_frame=same_frame,
            rule=rule,
        )
        with closing(answers):
            for answer in answers:
                terminal.json_line(answer.to_plain())
                counts.add(answer)
    terminal.message(f"wrote {visible(str(out))}")
    counts.end(terminal)
