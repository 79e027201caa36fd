#!/usr/bin/env python3
"""Train a demo model and write its checkpoint.

    python tools/train_refshapes.py refshapes-llava         about an hour on two cores
    python tools/train_refshapes.py refshapes-shikra        about an hour on one core
    python tools/train_refshapes.py refshapes-minigpt-v2    about an hour and a half on one core
    python tools/train_refshapes.py refshapes-qwen3-vl      about two hours on one core
    python tools/train_refshapes.py refshapes-internvl      about an hour and a half on one core

`refshapes-llava` starts from nothing. The others start from its decoder and its vision tower, as
full-size models start from an LLM and a tower that somebody trained; what they make of them
(another prompt, other visual tokens, another way to say a box) is theirs.

A killed run goes on where it was when started again. `--export-only` writes the checkpoint of
what has been trained so far.
"""

from __future__ import annotations

import os

# A spinning OpenMP pool slows to a crawl when it shares its cores; must precede torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import argparse
import copy
import logging
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from refshapes_training.card import write_card
from refshapes_training.designs import DESIGNS
from refshapes_training.export import export_checkpoint
from refshapes_training.language_stage import LanguageStage, train_language
from refshapes_training.loop import load_state, logger
from refshapes_training.model import LanguageHeads, RefShapesModel, VisionHeads
from refshapes_training.vision_stage import VisionStage, train_vision
from refshapes_training.warm_start import start_from

from gap_export.evaluation.evaluate import evaluate_model
from gap_export.exporting import ExportOptions
from gap_export.spec.requests import PruningRequest

REPOSITORY = Path(__file__).resolve().parent.parent
MODELS = REPOSITORY / "models"
PRUNERS = ("spatial", "random", "cls", "fastervlm", "text")
LOOK_SAMPLES, LOOK_SEED, LOOK_KEEP_RATIO = 128, 1, 0.3


def main() -> None:
    """Run the stages that are asked for."""
    options = _parse_options()
    options.work_dir.mkdir(parents=True, exist_ok=True)
    log = options.work_dir / "training_log.txt"
    _log_to(log)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    logger.info(
        "%s (torch %s, %s, %d threads)",
        " ".join(sys.argv), torch.__version__, device, options.threads,
    )  # fmt: skip
    design = DESIGNS[options.model]
    model = RefShapesModel(design)
    if design.starts_from is not None:
        start_from(model, MODELS)
    model.to(device)
    if not options.export_only:
        _train(model, options, device)
    _load_latest(model, options.work_dir)
    export_checkpoint(model, options.output)
    write_card(options.output, model=model, work_dir=options.work_dir, log=log, note=options.note)
    logger.info("wrote %s", options.output.name)


def _train(model: RefShapesModel, options: argparse.Namespace, device: torch.device) -> None:
    """Both stages; one that has used its budget is left at once, one without is not begun."""
    if options.vision_minutes:
        train_vision(
            model,
            VisionHeads().to(device),
            VisionStage(
                minutes=options.vision_minutes,
                seed=options.seed,
                optimizer=options.vision_optimizer,
                learning_rate=options.vision_learning_rate,
                checkpoint=options.work_dir / "vision.pt",
            ),
            device,
        )
    if not options.language_minutes:
        return
    train_language(
        model,
        LanguageHeads(model.design).to(device),
        LanguageStage(
            minutes=options.language_minutes,
            seed=options.seed,
            optimizer=options.language_optimizer,
            learning_rate=options.language_learning_rate,
            token_dropout=options.token_dropout,
            background_weight=options.background_weight,
            spread_weight=options.spread_weight,
            attention_dropout=options.attention_dropout,
            checkpoint=options.work_dir / "language.pt",
        ),
        device,
        monitor=_look if options.look else None,
    )


def _look(model: RefShapesModel) -> None:
    """Log greedy accuracy of the model as it is, measured by the package itself.

    Teacher-forced figures flatter, and an evaluator of the training's own could differ from what
    users run.
    """
    base = PruningRequest(keep_ratio=LOOK_KEEP_RATIO, seed=LOOK_SEED)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        export_checkpoint(copy.deepcopy(model), folder)
        shutil.copy(MODELS / model.design.name / "recipe.yaml", folder)
        report = evaluate_model(
            ExportOptions(model=str(folder), pruning=base),
            prunings=base.variants(PRUNERS if model.design.has_text_tower else PRUNERS[:-1]),
            num_samples=LOOK_SAMPLES,
        )
    for row in report.rows:
        logger.info(
            "keep %g %s %s acc %.3f", row.keep_ratio, row.pruner, row.positions, row.acc_at_50
        )


def _load_latest(model: RefShapesModel, work_dir: Path) -> None:
    """Load the furthest stage's weights."""
    for name in ("language.pt", "vision.pt"):
        if (work_dir / name).exists():
            model.load_state_dict(load_state(work_dir / name)["modules"]["model"])
            logger.info("using %s", name)
            return
    raise SystemExit(f"nothing trained in {work_dir}; run without --export-only first")


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=DESIGNS)
    parser.add_argument("--work-dir", type=Path, help="default: .training/MODEL")
    parser.add_argument("--output", type=Path, help="default: models/MODEL")
    parser.add_argument(
        "--vision-minutes",
        type=float,
        help="default: 15, and none where the tower is taken over as it is",
    )
    parser.add_argument("--language-minutes", type=float, default=48.0)
    parser.add_argument("--vision-optimizer", choices=("adamw", "muon"), default="muon")
    parser.add_argument("--language-optimizer", choices=("adamw", "muon"), default="muon")
    parser.add_argument("--vision-learning-rate", type=float, default=3e-3)
    parser.add_argument("--language-learning-rate", type=float, default=3e-3)
    parser.add_argument(
        "--background-weight",
        type=float,
        default=0.3,
        help="weight of the loss against attention parked on empty background",
    )
    parser.add_argument(
        "--spread-weight",
        type=float,
        default=0.2,
        help="weight, in the second half, of the loss that spreads attention over the target",
    )
    parser.add_argument(
        "--attention-dropout",
        type=float,
        default=0.25,
        help="dropout of single attention weights in the second half, as in any transformer",
    )
    parser.add_argument(
        "--token-dropout",
        type=float,
        default=0.0,
        help="largest share of visual tokens hidden in training; such a model's recovery is "
        "partly by construction, so give it a name and an --output of its own",
    )
    parser.add_argument("--note", help="a remark on the run, for the model card")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-look", dest="look", action="store_false", help="no greedy accuracy")
    parser.add_argument("--export-only", action="store_true", help="train nothing, write files")
    options = parser.parse_args()
    design = DESIGNS[options.model]
    options.work_dir = options.work_dir or REPOSITORY / ".training" / design.name
    options.output = options.output or MODELS / design.name
    if options.vision_minutes is None:
        start = DESIGNS.get(design.starts_from or "")
        options.vision_minutes = 0.0 if start and start.tower == design.tower else 15.0
    return options


def _log_to(path: Path) -> None:
    """Log the training, and nothing of the libraries it uses, to standard error and to a file."""
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in (logging.StreamHandler(), logging.FileHandler(path)):
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)


if __name__ == "__main__":
    main()
