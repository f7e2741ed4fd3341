"""Real executors with real worker processes, against an optimizer that the test plays."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from protocol.messages import (
    Goodbye,
    Heartbeat,
    Hello,
    JobFailed,
    LabelsDone,
    Leave,
    PlanRefused,
    RetrainDone,
    WorkerStatus,
)
from tests.executor import optimizer_model as model
from tests.executor.a_core import CORE

pytestmark = pytest.mark.process


@pytest.fixture
def optimizer() -> Iterator[model.OptimizerModel]:
    server = model.OptimizerModel()
    yield server
    server.close()


class Started:
    """Executors of a test; whatever is left of them afterwards is killed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []

    def __call__(self, address: str, **options: Any) -> subprocess.Popen[bytes]:
        process = model.start_executor(address, self.folder, **options)
        self.processes.append(process)
        return process


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Started]:
    started = Started(tmp_path)
    yield started
    for process in started.processes:
        if process.poll() is None:
            for child in model.descendants(process.pid):
                child.kill()
            process.kill()
        process.wait()


def worker(beat: Heartbeat, job_id: str) -> WorkerStatus | None:
    return next((w for w in beat.workers if w.job_id == job_id), None)


def ready(optimizer: model.OptimizerModel, job_id: str) -> WorkerStatus:
    beat = optimizer.wait_until(lambda b: (w := worker(b, job_id)) is not None and w.state == "ready")
    found = worker(beat, job_id)
    assert found is not None
    return found


def test_an_executor_joins_applies_a_plan_delivers_a_result_and_leaves(
    optimizer: model.OptimizerModel, start: Started
) -> None:
    process = start(optimizer.address)
    hello = optimizer.wait_for(Hello)
    assert (hello.executor_id, hello.device, hello.held) == ("e1", CORE, None)
    assert hello.share_backend in ("pacing", "cgroup")  # as this machine allows
    assert hello.can_resize_live
    optimizer.apply(model.plan(model.inference(share=0.4), model.label(share=0.5)))
    done = optimizer.wait_for(LabelsDone)
    assert (done.job_id, done.result.num_frames) == ("label/s1/0", 1)
    serving = ready(optimizer, "inference/s1")
    assert (serving.share_granted, serving.model_version) == (0.4, 1)
    family = model.descendants(process.pid)
    optimizer.send(Leave(reason="test over"))
    optimizer.wait_for(Goodbye)
    assert process.wait(timeout=20) == 0
    assert not model.wait_gone(family, 2.0)


def test_a_killed_executor_leaves_no_process_behind(optimizer: model.OptimizerModel, start: Started) -> None:
    process = start(optimizer.address, problem="inference/s3=hang,inference/s4=ignore_term")
    optimizer.wait_for(Hello)
    jobs = [model.inference(f"s{i}", share=0.2) for i in (1, 2, 3, 4)]
    optimizer.apply(model.plan(*jobs))
    for i in (1, 2, 3, 4):
        ready(optimizer, f"inference/s{i}")
    family = model.descendants(process.pid)
    names = [" ".join(p.cmdline()) for p in family]
    assert any("forkserver" in name for name in names)
    assert len(family) >= 6, names
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    left = model.wait_gone(family, 2.0)
    assert not left, left


def test_a_killed_worker_is_replaced_and_others_do_not_notice(optimizer: model.OptimizerModel, start: Started) -> None:
    start(optimizer.address)
    optimizer.wait_for(Hello)
    optimizer.apply(model.plan(model.inference("s1"), model.inference("s2")))
    first, other = ready(optimizer, "inference/s1"), ready(optimizer, "inference/s2")
    os.kill(first.pid, signal.SIGKILL)
    beat = optimizer.wait_until(
        lambda b: (w := worker(b, "inference/s1")) is not None and w.state == "ready" and w.pid != first.pid
    )
    again, same = worker(beat, "inference/s1"), worker(beat, "inference/s2")
    assert again is not None
    assert again.restarts == 1
    assert same is not None
    assert (same.pid, same.restarts) == (other.pid, 0)
    assert not psutil.pid_exists(first.pid) or psutil.Process(first.pid).status() == psutil.STATUS_ZOMBIE
    assert not [m for m in optimizer.received if isinstance(m, JobFailed | PlanRefused)]


def test_a_restarted_optimizer_adopts_what_runs(optimizer: model.OptimizerModel, start: Started) -> None:
    start(optimizer.address)
    hello = optimizer.wait_for(Hello)
    optimizer.apply(model.plan(model.inference(share=0.4), window=3))
    serving = ready(optimizer, "inference/s1")
    address = optimizer.address
    optimizer.close()
    successor = model.OptimizerModel(term=2, address=address)
    try:
        again = successor.wait_for(Hello)
        assert (again.incarnation, again.held) == (hello.incarnation, model.version(3))
        assert [(w.job_id, w.pid) for w in again.workers] == [("inference/s1", serving.pid)]
        successor.send(model.plan(window=9, term=1))  # a plan of the first optimizer, held up somewhere, is still newer
        successor.apply(model.plan(model.inference(share=0.5), window=0, term=2))
        successor.send(model.plan(window=10, term=1))
        refused = successor.wait_for(PlanRefused)
        assert (refused.version, refused.held) == (model.version(10), model.version(0, term=2))
    finally:
        successor.close()


def test_a_result_is_sent_until_it_is_acknowledged_and_the_job_is_not_repeated(
    optimizer: model.OptimizerModel, start: Started
) -> None:
    start(optimizer.address)
    optimizer.wait_for(Hello)
    optimizer.acknowledges = False
    optimizer.apply(model.plan(model.label(share=0.5)))
    first = optimizer.wait_for(LabelsDone)
    second = optimizer.wait_for(LabelsDone)
    assert first == second
    optimizer.apply(model.plan(model.label(share=0.5), revision=1))
    address = optimizer.address
    optimizer.close()
    successor = model.OptimizerModel(term=2, address=address)
    try:
        assert successor.wait_for(LabelsDone) == first
        successor.apply(model.plan(model.label(share=0.5), term=2))
        for _ in range(5):
            assert worker(successor.wait_for(Heartbeat), "label/s1/0") is None
    finally:
        successor.close()


def test_an_executor_whose_optimizer_is_silent_serves_on_and_begins_nothing(
    optimizer: model.OptimizerModel, start: Started
) -> None:
    optimizer.silence_s = 0.5
    start(optimizer.address, problem="inference/s1=ignore_term", settings="[limits]\nstop_grace_s = 1.5\n")
    optimizer.wait_for(Hello)
    optimizer.apply(model.plan(model.inference("s1", 0.6), model.inference("s2", 0.1)))
    ready(optimizer, "inference/s1")
    ready(optimizer, "inference/s2")
    # The retraining has to wait for the stubborn worker's share, and that takes longer than the optimizer talks.
    optimizer.apply(model.plan(model.inference("s2", 0.1), model.retraining("s1", 0.7), revision=1))
    time.sleep(4.0)
    beats = [m for m in optimizer.turn() if isinstance(m, Heartbeat)]
    late = beats[-1]
    assert worker(late, "retrain/s1/0") is None
    assert worker(late, "inference/s1") is None, "its share is free by now"
    serving = worker(late, "inference/s2")
    assert serving is not None
    assert serving.state == "ready"
    done = optimizer.wait_for(RetrainDone)
    assert done.job_id == "retrain/s1/0"


def test_a_corrupt_checkpoint_leaves_the_old_model_serving(optimizer: model.OptimizerModel, start: Started) -> None:
    start(optimizer.address)
    optimizer.wait_for(Hello)
    optimizer.apply(model.plan(model.inference()))
    before = ready(optimizer, "inference/s1")
    corrupt = model.checkpoint("s1", 2, path="corrupt")
    optimizer.apply(model.plan(model.inference(checkpoint=corrupt), revision=1))
    for _ in range(5):
        now = worker(optimizer.wait_for(Heartbeat), "inference/s1")
        assert now is not None
        assert (now.pid, now.model_version) == (before.pid, 1)
    optimizer.apply(model.plan(model.inference(version=3), revision=2))
    optimizer.wait_until(lambda b: (w := worker(b, "inference/s1")) is not None and w.model_version == 3)


def test_an_inference_worker_that_never_lives_is_reported_once_and_tried_on(
    optimizer: model.OptimizerModel, start: Started
) -> None:
    restarts = "[restarts]\nlimit = 2\nbackoff_s = 0.05\nslow_s = 0.3\n"
    start(optimizer.address, problem="inference/s1=crash_at_start", settings=restarts)
    optimizer.wait_for(Hello)
    optimizer.apply(model.plan(model.inference("s1"), model.inference("s2")))
    failed = optimizer.wait_for(JobFailed)
    assert (failed.job_id, failed.stream_id) == ("inference/s1", "s1")
    assert "exit code 3" in failed.reason
    optimizer.wait_until(lambda b: (w := worker(b, "inference/s1")) is not None and w.restarts >= 4)
    other = ready(optimizer, "inference/s2")
    assert other.restarts == 0
    assert [m for m in optimizer.received if isinstance(m, JobFailed)] == [failed]


def test_a_late_plan_is_refused(optimizer: model.OptimizerModel, start: Started) -> None:
    process = start(optimizer.address)
    optimizer.wait_for(Hello)
    optimizer.wait_for(Heartbeat)
    os.kill(process.pid, signal.SIGSTOP)
    optimizer.send(model.plan(model.inference(), lifetime_s=1.0))
    time.sleep(2.0)
    os.kill(process.pid, signal.SIGCONT)
    refused = optimizer.wait_for(PlanRefused)
    assert "late" in refused.reason
    optimizer.apply(model.plan(model.inference(), revision=1))


def test_another_store_is_another_site(optimizer: model.OptimizerModel, start: Started) -> None:
    start(optimizer.address)
    optimizer.wait_for(Hello)
    optimizer.apply(model.plan(model.inference(share=0.4), model.label(share=0.5)))
    optimizer.wait_for(LabelsDone)
    address = optimizer.address
    optimizer.close()
    successor = model.OptimizerModel(term=2, address=address)
    successor.store = "/elsewhere"
    try:
        successor.wait_for(Hello)
        successor.wait_until(lambda b: not b.workers)
        successor.apply(model.plan(model.label(share=0.5), term=2))
        assert successor.wait_for(LabelsDone).job_id == "label/s1/0"
    finally:
        successor.close()


def test_two_executors_on_one_machine_do_not_disturb_one_another(
    optimizer: model.OptimizerModel, start: Started
) -> None:
    other_optimizer = model.OptimizerModel()
    try:
        first, second = start(optimizer.address, name="e1"), start(other_optimizer.address, name="e2")
        for server in (optimizer, other_optimizer):
            server.wait_for(Hello)
            server.apply(model.plan(model.inference(share=0.9)))
        before = ready(optimizer, "inference/s1")
        ready(other_optimizer, "inference/s1")
        second.kill()
        second.wait()
        for _ in range(10):
            now = worker(optimizer.wait_for(Heartbeat), "inference/s1")
            assert now is not None
            assert (now.pid, now.state) == (before.pid, "ready")
        assert first.poll() is None
    finally:
        other_optimizer.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_in_order_and_a_second_one_at_once(
    optimizer: model.OptimizerModel, start: Started, number: signal.Signals
) -> None:
    process = start(optimizer.address, problem="inference/s1=ignore_term", settings="[limits]\nstop_grace_s = 100.0\n")
    optimizer.wait_for(Hello)
    optimizer.apply(model.plan(model.inference()))
    ready(optimizer, "inference/s1")
    family = model.descendants(process.pid)
    os.kill(process.pid, number)
    beat = optimizer.wait_until(lambda b: (w := worker(b, "inference/s1")) is not None and w.state == "stopping")
    assert beat.held == model.version()
    assert process.poll() is None
    os.kill(process.pid, number)
    optimizer.wait_for(Goodbye)
    assert process.wait(timeout=20) == 0
    assert not model.wait_gone(family, 2.0)
