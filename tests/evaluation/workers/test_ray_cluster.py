"""A real cluster on this machine; most of its workers open no bundle."""

from __future__ import annotations

import os
import signal
import socket
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from gap_export.errors import BundleError, GapExportError, UsageError
from gap_export.evaluation.measure import Runner, RunnerOptions
from gap_export.evaluation.records import Record
from gap_export.evaluation.settings import Setting
from gap_export.evaluation.workers import Shard, cut_shards, ray_cluster, ray_connection
from gap_export.evaluation.workers.ray_cluster import RayExecutor
from gap_export.evaluation.workers.ray_worker import AnswersShards
from gap_export.stop_signals import Stopped, stop_signals
from tests.evaluation.workers.conftest import ray_cluster as cluster_of
from tests.evaluation.workers.fake_runners import (
    Fake,
    HalfWay,
    by_question,
    make_question,
    make_shards,
    wait_for,
)

OPTIONS = RunnerOptions(backend="onnxruntime", num_threads=1, prompt=None, seed=0)


# By default a worker is killed, which is lost in the same way.
@pytest.mark.full
def test_a_node_is_lost_half_way_and_no_answer_with_it(
    cluster, second_node, demo_bundle, tmp_path, caplog
):
    setting = demo_setting(demo_bundle)
    shards = cut_shards(setting, [make_question(f"{n}", n // 2) for n in range(20)], size=2)
    with Runner(OPTIONS) as runner:
        alone = by_question((shard, runner.answer(shard)) for shard in shards)
    executor = RayExecutor(
        cluster.address, None, OPTIONS, runner_factory=HalfWay(folder=tmp_path, count=2)
    )
    answers = executor.run(shards)
    first = next(answers)
    pid = (tmp_path / second_node.node_id).read_text()
    wait_for((tmp_path / f"{pid} waits").exists)
    cluster.remove_node(second_node, allow_graceful=False)
    wait_for(lambda: not Path(f"/proc/{pid}").exists())
    (tmp_path / "go on").touch()
    found = by_question(iter([first, *answers]))
    assert "was lost" in caplog.text
    assert [without_times(found[name]) for name in alone] == [
        without_times(record) for record in alone.values()
    ]
    assert any(record.text for record in found.values())


def without_times(record: Record) -> Record:
    return replace(record, timings_ms={})


def test_a_worker_that_is_killed_is_replaced_and_what_it_had_asked_again(
    cluster, tmp_path, caplog, capfd
):
    def hold_the_second(shard: Shard) -> None:
        if shard.index == 1 and not (tmp_path / "killed").exists():
            (tmp_path / "here").touch()
            wait_for((tmp_path / "never").exists)

    shards = make_shards(6)
    executor = RayExecutor(
        cluster.address, None, OPTIONS, runner_factory=Fake(before=hold_the_second)
    )
    answers = executor.run(shards)
    first = next(answers)
    wait_for((tmp_path / "here").exists)
    (tmp_path / "killed").touch()
    os.kill(int(first[1][0].text), signal.SIGKILL)
    found = by_question(iter([first, *answers]))
    assert len(found) == 12
    # One process before, another one after.
    assert {record.text for record in found.values()} == {first[1][0].text, found["1-0"].text}
    assert caplog.text.count("was lost; what it had is asked again: unpruned, questions 1-0") == 1
    assert capfd.readouterr() == ("", "")


@pytest.mark.full
def test_questions_that_end_every_worker_end_the_evaluation(cluster):
    def die(shard: Shard) -> None:
        if shard.index == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    executor = RayExecutor(cluster.address, None, OPTIONS, runner_factory=Fake(before=die))
    with pytest.raises(GapExportError, match=r"3 workers were lost.*unpruned, questions 2-0, 2-1;"):
        list(executor.run(make_shards(6)))


def test_an_interruption_ends_the_workers_and_leaves_the_cluster(cluster, tmp_path):
    import ray

    def hold(shard: Shard) -> None:
        (tmp_path / str(os.getpid())).touch()
        wait_for((tmp_path / "never").exists)

    executor = RayExecutor(cluster.address, None, OPTIONS, runner_factory=Fake(before=hold))

    def interrupt() -> None:
        wait_for(lambda: any(tmp_path.iterdir()))
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(Stopped), stop_signals():
        list(executor.run(make_shards(3)))
    thread.join(60)
    assert signal.getsignal(signal.SIGTERM) is before
    assert not ray.is_initialized()
    (pid,) = tmp_path.iterdir()
    wait_for(lambda: not Path(f"/proc/{pid.name}").exists())
    assert cluster.head_node.remaining_processes_alive()


def test_an_error_raised_on_purpose_comes_back_as_itself_and_another_version_is_refused(
    cluster, monkeypatch
):
    def refuse(shard: Shard) -> None:
        raise BundleError("a file is damaged", seen=Path("decoder.onnx"), fix="export it again")

    executor = RayExecutor(cluster.address, None, OPTIONS, runner_factory=Fake(before=refuse))
    with pytest.raises(BundleError) as caught:
        list(executor.run(make_shards(3)))
    assert str(caught.value) == "a file is damaged: decoder.onnx; export it again"
    assert caught.value.fix == "export it again"
    monkeypatch.setattr(ray_cluster, "__version__", "7.0")
    with pytest.raises(UsageError, match=r"the node .* has another gap-export.*allowed: 7\.0"):
        list(executor.run(make_shards(1)))


@pytest.fixture
def ray_folder(monkeypatch):
    """Where a cluster of this machine has its folder; nobody else's is in there."""
    with tempfile.TemporaryDirectory(prefix="g", dir="/tmp") as folder:
        monkeypatch.setattr(ray_connection, "_SHORT_FOLDER", folder)
        yield Path(folder)


def test_a_cluster_of_this_machine_ends_with_the_evaluation(cluster, capfd, ray_folder):
    import ray

    del cluster  # it must not be taken for the one to be started, nor that for it
    environment = dict(os.environ)
    answers = RayExecutor(None, 1, OPTIONS, runner_factory=Fake()).run(make_shards(3))
    first = next(answers)
    assert ray.is_initialized() and len(list(ray_folder.iterdir())) == 1
    assert len(by_question(iter([first, *answers]))) == 6
    assert not ray.is_initialized()
    assert dict(os.environ) == environment
    wait_for(lambda: not Path(f"/proc/{first[1][0].text}").exists())
    assert list(ray_folder.iterdir()) == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.full
@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_answers_are_the_same_in_any_number_of_workers(num_workers, cluster, demo_bundle):
    del cluster  # it pins what Ray reads of the environment
    setting = demo_setting(demo_bundle)
    questions = [make_question(f"{n}", n // 3) for n in range(24)]
    shards = cut_shards(setting, questions, size=4)
    with Runner(OPTIONS) as runner:
        alone = by_question((shard, runner.answer(shard)) for shard in shards)
    found = by_question(RayExecutor(None, num_workers, OPTIONS).run(shards))
    assert {name: without_times(record) for name, record in found.items()} == {
        name: without_times(record) for name, record in alone.items()
    }


# Ray's helper for tests does not close the logs of that server.
@pytest.mark.filterwarnings("ignore:unclosed file.*ray_client_server:ResourceWarning")
@pytest.mark.full
def test_a_cluster_is_joined_from_outside_through_its_client_server(tmp_path):
    pytest.importorskip("ray", reason='Ray is not installed: pip install -e ".[ray]"')
    port = free_port()
    with cluster_of(ray_client_server_port=port) as cluster:
        assert cluster.head_node.remaining_processes_alive()
        wait_for(lambda: answers_at(port))
        killed = tmp_path / "killed"

        def die_once(shard: Shard) -> None:
            if shard.index == 1 and not killed.exists():
                killed.touch()
                os.kill(os.getpid(), signal.SIGKILL)

        executor = RayExecutor(
            f"ray://127.0.0.1:{port}", None, OPTIONS, runner_factory=Fake(before=die_once)
        )
        assert len(by_question(executor.run(make_shards(4)))) == 8
        assert killed.exists()
        assert cluster.head_node.remaining_processes_alive()


@pytest.mark.full
def test_a_connection_that_is_lost_is_not_made_anew(cluster, monkeypatch):
    import ray

    monkeypatch.setattr(ray_cluster, "_WAIT_S", 0.1)
    answers = RayExecutor(cluster.address, None, OPTIONS, runner_factory=Fake()).run(make_shards(9))
    next(answers)
    ray.shutdown()
    with pytest.raises(GapExportError, match="the connection to the Ray cluster is lost"):
        list(answers)
    assert not ray.is_initialized()


@pytest.mark.full
def test_workers_that_do_not_start_end_the_evaluation(cluster, monkeypatch):
    def die(options: RunnerOptions) -> AnswersShards:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    executor = RayExecutor(cluster.address, None, OPTIONS, runner_factory=die)
    with pytest.raises(GapExportError, match="3 workers were lost, one after the other"):
        list(executor.run(make_shards(2)))
    # As if no CPU were free.
    monkeypatch.setattr(ray_cluster, "_START_S", 0.0)
    with pytest.raises(GapExportError, match="no worker has started in the Ray cluster for"):
        list(executor.run(make_shards(2)))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def answers_at(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def demo_setting(bundle: Path) -> Setting:
    return Setting(
        name="spatial keep 0.3 gap",
        bundle=bundle,
        pruner="spatial",
        keep_ratio=0.3,
        positions="gap",
    )
