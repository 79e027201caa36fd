"""Who answers, what is asked again, and whose answers are refused."""

from __future__ import annotations

import shutil
import socket
from dataclasses import replace

import pytest

from gap_export.errors import GapExportError, OutputError, UsageError
from gap_export.evaluation.datasets import open_dataset
from gap_export.evaluation.measure import Runner, RunnerOptions
from gap_export.evaluation.run import Run, make_folder, open_executor
from gap_export.evaluation.settings import whole_settings
from gap_export.evaluation.workers.ray_cluster import RayExecutor
from gap_export.progress import SilentProgress
from gap_export.spec.requests import BackendOptions
from tests.evaluation.answers import WHOLE, record

SETTINGS = ("none", "shifted")


class FakeExecutor:
    """Answers from the last shard to the first, and stops after some."""

    def __init__(self, stop_after=None):
        self.stop_after = stop_after
        self.asked = []

    def run(self, shards):
        for number, shard in enumerate(reversed(shards)):
            if number == self.stop_after:
                raise GapExportError("stopped")
            self.asked += [(shard.setting.name, one.id) for one in shard.questions]
            given = record("[0.1, 0.1, 0.5, 0.5]", WHOLE, (96, 96))
            yield shard, [replace(given, question_id=one.id) for one in shard.questions]


@pytest.fixture
def run(tiny_whole_bundle, tmp_path):
    return Run(
        settings=whole_settings(tiny_whole_bundle, SETTINGS),
        dataset=open_dataset("refshapes", samples=80, seed=0),
        options=RunnerOptions(),
        folder=tmp_path,
    )


def test_every_question_is_asked_of_every_setting_once(run):
    executor = FakeExecutor()
    answers = run.answers(executor, SilentProgress())
    assert len(executor.asked) == len(set(executor.asked)) == 160
    assert {name: len(records) for name, records in answers.items()} == {
        "unpruned": 80,
        "shifted": 80,
    }


@pytest.mark.parametrize("stop_after", [0, 1, 4])
def test_what_was_answered_is_not_asked_again(run, stop_after):
    first, second = FakeExecutor(stop_after), FakeExecutor()
    with pytest.raises(GapExportError, match="stopped"):
        run.answers(first, SilentProgress())
    answers = run.answers(second, SilentProgress())
    assert set(first.asked) & set(second.asked) == set()
    assert len(first.asked) + len(second.asked) == 160
    assert all(len(records) == 80 for records in answers.values())
    third = FakeExecutor()
    assert run.answers(third, SilentProgress()) == answers
    assert third.asked == []


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"options": RunnerOptions(seed=1)}, "seed"),
        ({"options": RunnerOptions(backend_options=BackendOptions(form="base"))}, "form"),
        ({"options": RunnerOptions(prompt="<image> {expression}")}, "prompt"),
        (
            {"dataset": open_dataset("refshapes", samples=79, seed=0)},
            "expressions 80, asked is 79; questions",
        ),
    ],
)
def test_answers_to_something_else_are_refused(run, change, key):
    run.answers(FakeExecutor(), SilentProgress())
    with pytest.raises(OutputError, match=f"another evaluation.* has {key} "):
        replace(run, **change).answers(FakeExecutor(), SilentProgress())


def test_answers_of_another_model_are_refused(run, tiny_bundle):
    run.answers(FakeExecutor(), SilentProgress())
    others = tuple(replace(setting, bundle=tiny_bundle) for setting in run.settings)
    with pytest.raises(OutputError, match=r"another evaluation.* has bundle "):
        replace(run, settings=others).answers(FakeExecutor(), SilentProgress())


def test_answers_with_other_activations_are_refused(run, monkeypatch):
    run.answers(FakeExecutor(), SilentProgress())
    # No file of a bundle differs by them.
    monkeypatch.setattr("gap_export.evaluation.run.activations_of", lambda manifest: "int8")
    with pytest.raises(
        OutputError, match=r"another evaluation.* has activations none, asked is int8"
    ):
        run.answers(FakeExecutor(), SilentProgress())


def test_the_same_bundle_elsewhere_is_the_same_model(run, tiny_whole_bundle, tmp_path):
    run.answers(FakeExecutor(), SilentProgress())
    copy = tmp_path / "elsewhere"
    shutil.copytree(tiny_whole_bundle, copy)
    moved = replace(run, settings=whole_settings(copy, SETTINGS))
    executor = FakeExecutor()
    moved.answers(executor, SilentProgress())
    assert executor.asked == []


def test_workers_are_chosen_by_name():
    options, progress = RunnerOptions(), SilentProgress()
    assert isinstance(open_executor("1", options, progress), Runner)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        here = f"127.0.0.1:{listening.getsockname()[1]}"
        for workers in ("2", "auto", f"ray://{here}", here):
            assert isinstance(open_executor(workers, options, progress), RayExecutor)


@pytest.mark.parametrize("workers", ["", "0", "-1", "two", "1.5", "٣", " 2", "9" * 5000])
def test_workers_of_no_known_name_are_refused(workers):
    with pytest.raises(UsageError, match="no such workers"):
        open_executor(workers, RunnerOptions(), SilentProgress())


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    file = tmp_path / "file"
    file.touch()
    for folder in (file, file / "below", tmp_path / "nul\0"):
        with pytest.raises(OutputError, match="cannot be made"):
            make_folder(folder, "records")
    make_folder(tmp_path / "a" / "b", "records")
    assert (tmp_path / "a" / "b").is_dir()


def test_a_folder_that_nothing_can_be_put_into_is_refused(tmp_path, monkeypatch):
    # The tests may be run by root, who can write anywhere.
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    with pytest.raises(OutputError, match="nothing can be put into the folder for images"):
        make_folder(tmp_path, "images")
    make_folder(tmp_path / "below", "images")
