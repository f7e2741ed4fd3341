"""Real executors with real worker processes, against an optimizer that the test plays."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from protocol.messages import Goodbye, Heartbeat, Hello, JobFailed, LabelsDone, Leave, PlanRefused, WorkerStatus
from tests.executor import optimizer_model as model

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
    assert (hello.executor_id, hello.device, hello.share_backend, hello.held) == ("e1", "cpu:0", "pacing", None)
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
