"""Settings by questions: who answers, and what of it is there already."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from gap_export.bundle import open_bundle
from gap_export.errors import OutputError, UsageError
from gap_export.evaluation.baseline import activations_of
from gap_export.evaluation.measure import Runner, RunnerOptions, with_prompt
from gap_export.evaluation.questions import Dataset
from gap_export.evaluation.records import SUFFIX, Record, RecordsFile
from gap_export.evaluation.settings import Setting
from gap_export.evaluation.workers import Executor, Shard, cut_shards
from gap_export.progress import Progress
from gap_export.spec.manifest import Manifest
from gap_export.version import __version__

IN_PROCESS = "1"
# No cluster has more, and Python reads no number of thousands of digits.
_MAX_DIGITS = 6
_ALLOWED = "1 for this process, a number of workers, auto, or ray://HOST:PORT"


def open_executor(workers: str, options: RunnerOptions, progress: Progress) -> Executor:
    """Who answers questions. Nothing is started yet.

    Args:
        workers: ``1``: this process; a number, or ``auto`` for one a CPU: a Ray cluster of this
            machine's own, for as long as it takes; ``ray://host:port`` or ``host:port``: a cluster
            that is there.
        options: How questions are asked.
        progress: Progress reporter.

    Raises:
        UsageError: none of these, or a backend that workers do not run.
    """
    if workers == IN_PROCESS:
        return Runner(options)
    from gap_export.evaluation.workers.ray_cluster import RayExecutor

    if workers == "auto":
        return RayExecutor(None, None, options, progress)
    if ":" in workers:
        return RayExecutor(workers, None, options, progress)
    is_number = workers.isascii() and workers.isdigit() and len(workers) <= _MAX_DIGITS
    if is_number and int(workers) > 0:
        return RayExecutor(None, int(workers), options, progress)
    raise UsageError("no such workers", seen=repr(workers), allowed=_ALLOWED)


def make_folder(folder: Path, what: str) -> None:
    """Make a folder for results, and those above it, where they do not exist.

    Raises:
        OutputError: it cannot be made, is a file, or nothing can be put in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as err:
        raise OutputError(
            f"the folder for {what} cannot be made",
            seen=f"{folder}: {err}",
            fix="name another one",
        ) from err
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(
            f"nothing can be put into the folder for {what}",
            seen=folder,
            fix="make it writable, or name another one",
        )


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is asked of which settings.

    Attributes:
        settings: Those that ask one bundle stand together.
        folder: For records; it exists.
    """

    settings: Sequence[Setting]
    dataset: Dataset
    options: RunnerOptions
    folder: Path

    def answers(self, executor: Executor, progress: Progress) -> dict[str, Mapping[str, Record]]:
        """Ask what has no answer yet.

        Returns:
            For each setting, by name, its records by question.

        Raises:
            OutputError: records are another evaluation's, damaged, or cannot be written.
            GapExportError: a bundle cannot be run.
        """
        with ExitStack() as stack:
            files: dict[str, RecordsFile] = {}
            waiting: list[Shard] = []
            for setting in self.settings:
                shards = cut_shards(setting, self.dataset.asked)
                file = stack.enter_context(self._open(setting, shards))
                files[setting.name] = file
                waiting += [shard for shard in shards if shard.questions[0].id not in file.records]
            # Settings that ask one bundle take turns, so that each image is encoded once for all.
            order = list(dict.fromkeys(setting.bundle for setting in self.settings))
            waiting.sort(key=lambda shard: (order.index(shard.setting.bundle), shard.index))
            num_there = sum(len(file.records) for file in files.values())
            title = f"measuring {len(files)} settings"
            if num_there:
                title += f", {num_there} answers are there already"
            total = sum(len(shard.questions) for shard in waiting)
            with progress.stage(title, total=total) as advance:
                results = executor.run(waiting)
                try:
                    for shard, records in results:
                        files[shard.setting.name].add(records)
                        advance(len(records))
                finally:
                    # However it ends, workers are gone before the files are closed.
                    if isinstance(results, Generator):
                        results.close()
            return {name: file.records for name, file in files.items()}

    def _open(self, setting: Setting, shards: Sequence[Shard]) -> RecordsFile:
        """The records of a setting, under a header of all that its answers depend on."""
        manifest = with_prompt(open_bundle(setting.bundle).manifest, self.options.prompt)
        header = {
            "gap_export_version": __version__,
            "model": manifest.model.name,
            "bundle": _digest(manifest),
            "setting": setting.name,
            "data": self.dataset.name,
            "splits": ", ".join(self.dataset.splits),
            "expressions": str(len(self.dataset.asked)),
            "questions": self.dataset.fingerprint,
            "frame": self.dataset.frame,
            "prompt": manifest.prompt.template,
            "seed": str(self.options.seed),
            "backend": setting.backend or self.options.backend,
        }
        if self.options.backend_options.engines is not None and setting.backend is None:
            header["engines"] = self.options.backend_options.engines
        if header["backend"] == "openvino":
            header["openvino"] = repr(self.options.backend_options.openvino)
        if header["backend"] == "onnxruntime" and self.options.backend_options.form is not None:
            header["form"] = self.options.backend_options.form
        # The manifest alone says what is multiplied with INT4 weights: no file differs by it.
        if activations_of(manifest) != "float":
            header["activations"] = activations_of(manifest)
        if self.options.grammar is not None:
            header["grammar"] = self.options.grammar
        pieces = [[question.id for question in shard.questions] for shard in shards]
        return RecordsFile(self.folder / f"{setting.slug}{SUFFIX}", header, pieces=pieces)


def _digest(manifest: Manifest) -> str:
    """SHA-256, hex, of what a bundle computes; where it lies and was made is no part of it."""
    facts = ("pruning", "grid", "image", "box", "text_encoder", "decoder", "newline")
    parts = {name: repr(getattr(manifest, name)) for name in facts}
    parts |= {f"file {file.path}": file.sha256 for file in manifest.files}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
