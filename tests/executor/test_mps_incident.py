"""A fault of one MPS client: all leave, the server recovers or is started again, streams go on, the culprit waits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from executor.agent import Start
from executor.learning.device import is_gpu_fault
from executor.limits import RestartPolicy
from executor.links import Ready
from executor.outbox import Outbox
from executor.roster import Roster
from executor.shares.incident import Drain, ServerView, next_step
from executor.shares.mps import MpsBackend
from executor.shares.mps_control import MpsDaemon
from protocol.errors import WorkerError
from protocol.messages import Heartbeat, JobFailed
from tests.executor import optimizer_model as model
from tests.executor.test_executor_mps import GPU, program

__all__ = ["program"]
ROOT = Path(__file__).parents[2]


def server(state: str = "ACTIVE", num_clients: int = 0) -> ServerView:
    return ServerView(state=state, num_clients=num_clients)


@pytest.mark.parametrize(
    ("waited_s", "servers", "step"),
    [
        (0.1, (server("FAULT", 2),), "wait"),
        (0.1, (server("ACTIVE", 1),), "wait"),  # who is still there has lost its context
        (0.1, (server(),), "go_on"),
        (0.1, (), "go_on"),  # the server has left with its clients
        (4.9, (server("FAULT"),), "wait"),
        (5.0, (server("FAULT"),), "restart"),
        (5.0, (server("ACTIVE", 1),), "restart"),
        (5.0, None, "restart"),
        (0.1, None, "wait"),
    ],
)
def test_service_goes_on_when_everybody_has_left_and_the_daemon_is_restarted_when_not(
    waited_s: float, servers: tuple[ServerView, ...] | None, step: str
) -> None:
    assert next_step(waited_s, servers, Drain(wait_s=5.0)) == step


@pytest.mark.parametrize(
    ("error", "fatal"),
    [
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), True),
        (RuntimeError("CUDA error: MPS client terminated"), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 4.00 GiB"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("CUDA error: an illegal memory access"), False),
    ],
)
def test_errors_after_which_the_gpu_is_lost_are_told_from_others(error: Exception, fatal: bool) -> None:
    assert is_gpu_fault(error) is fatal


def test_an_interrupted_stream_goes_on_at_once_and_the_culprit_waits_longer_each_time() -> None:
    outbox = Outbox()
    roster = Roster("e1", "g1", outbox, RestartPolicy(slow_s=30.0))

    def serve(stream_id: str) -> int:
        (launch,) = roster.carry_out(Start(job=model.inference(stream_id)), 0.0)
        roster.launched(launch.worker.worker_id, 1)
        roster.reported(launch.worker.worker_id, Ready(pid=1, startup_s=0.1), 0.0)
        return launch.worker.worker_id

    for pause in (30.0, 60.0):
        innocent, culprit = serve("s1"), serve("s2")
        for worker_id in (innocent, culprit):
            roster.interrupt(worker_id, "GPU fault", culprit=worker_id == culprit)
            roster.left(worker_id, "killed", 100.0)
        waiting = {w.job.job_id: (w.resumes_s - 100.0, w.deaths) for w in roster}
        assert waiting == {"inference/s1": (0.0, 0), "inference/s2": (pause, 0)}
    failed = [event for event in outbox.due(1e9) if isinstance(event, JobFailed)]
    assert {event.job_id for event in failed} == {"inference/s2"}
    assert "quarantine" in failed[0].reason


@pytest.fixture
def backend(program: str) -> Iterator[MpsBackend]:
    daemon = MpsDaemon("GPU-1", program=program, query_timeout_s=5.0)
    backend = MpsBackend(GPU, daemon, drain=Drain(wait_s=2.0))
    yield backend
    backend.close()


def until(done: Callable[[], bool], within_s: float = 20.0) -> None:
    end = time.monotonic() + within_s
    while not done():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.process
@pytest.mark.parametrize("recovers", [True, False])
def test_after_a_fault_nobody_is_admitted_until_the_server_is_well_or_new(backend: MpsBackend, recovers: bool) -> None:
    daemon = backend._daemon
    daemon.query(f"model_attach {os.getpid()} 30")
    old = daemon.server_pids()
    daemon.query("model_fault")
    if not recovers:
        daemon.query("model_forgets")
    text = backend.fault(17, "illegal memory access", time.monotonic())
    assert "process 17" in text
    assert backend.fault(18, "illegal memory access", time.monotonic()) == ""  # the same incident
    assert backend.waiting == text
    with pytest.raises(WorkerError, match="GPU fault"):
        backend.worker_environment(model.inference(), 0.3)
    if recovers:
        assert backend.check(time.monotonic() + 0.6) == ""
        assert backend.waiting  # a client is still there
        daemon.query(f"model_detach {os.getpid()}")
    until(lambda: not backend.check(time.monotonic()) and not backend.waiting)
    assert backend.worker_environment(model.inference(), 0.3)
    daemon.query(f"model_attach {os.getpid()} 30")
    assert (daemon.server_pids() == old) is recovers


@pytest.mark.process
def test_a_failed_assertion_stays_in_its_client_unless_the_server_says_otherwise(backend: MpsBackend) -> None:
    daemon = backend._daemon
    daemon.query(f"model_attach {os.getpid()} 30")
    reason = "CUDA error: device-side assert triggered"
    assert backend.fault(17, reason, time.monotonic()) == ""
    assert backend.waiting == ""
    daemon.query("model_fault")
    assert "process 17" in backend.fault(17, reason, time.monotonic())


@pytest.mark.process
def test_a_fault_that_nobody_reports_is_found(backend: MpsBackend) -> None:
    daemon = backend._daemon
    daemon.query(f"model_attach {os.getpid()} 30")
    assert backend.check(0.0) == ""
    daemon.query("model_fault")
    assert backend.check(5.0) == ""
    assert "FAULT" in backend.check(20.0)


@pytest.fixture
def executor(program: str, tmp_path: Path) -> Iterator[Callable[[str, str], subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []

    def start(address: str, problem: str) -> subprocess.Popen[bytes]:
        settings = tmp_path / "e.toml"
        settings.write_text(
            'worker = "tests.executor.problem_worker:main"\npreload = "tests.executor.problem_worker"\n'
        )
        command = [sys.executable, "-m", "tests.executor.mps_executor", program, address, str(settings)]
        environment = {**os.environ, "PROBLEM": problem, "PYTHONPATH": str(ROOT)}
        started.append(subprocess.Popen(command, env=environment, cwd=ROOT))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            children = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(15.0)
            except subprocess.TimeoutExpired:
                for child in children:
                    child.kill()
                process.kill()
                process.wait()


@pytest.mark.process
def test_a_site_goes_on_after_a_retraining_has_faulted_the_gpu(
    executor: Callable[[str, str], subprocess.Popen[bytes]],
) -> None:
    optimizer = model.OptimizerModel()
    try:
        executor(optimizer.address, "retrain/s1/0=gpu_fault")
        optimizer.wait_for(Heartbeat)
        streams = [model.inference("s1", 0.3), model.inference("s2", 0.3)]
        optimizer.apply(model.plan(*streams, window=0))

        def serving(beat: Heartbeat) -> dict[str, int]:
            return {w.stream_id: w.pid for w in beat.workers if w.kind == "inference" and w.state == "ready"}

        before = serving(optimizer.wait_until(lambda b: len(serving(b)) == 2))
        optimizer.apply(model.plan(*streams, model.retraining("s1", 0.4), window=1))
        failed = optimizer.wait_for(JobFailed)
        assert failed.job_id == "retrain/s1/0"
        assert "illegal memory access" in failed.reason
        after = serving(optimizer.wait_until(lambda b: len(set(serving(b).values()) - set(before.values())) == 2))
        assert not set(after.values()) & set(before.values())
        beat = optimizer.wait_for(Heartbeat)
        assert not [w for w in beat.workers if w.kind == "retrain"]
        assert not [m for m in optimizer.received if isinstance(m, JobFailed) and m.job_id.startswith("inference")]
    finally:
        optimizer.close()


@pytest.mark.process
def test_a_stream_that_grows_under_mps_is_handed_over_and_goes_on(
    executor: Callable[[str, str], subprocess.Popen[bytes]],
) -> None:
    optimizer = model.OptimizerModel()
    try:
        executor(optimizer.address, "")
        optimizer.wait_for(Heartbeat)
        optimizer.apply(model.plan(model.inference("s1", 0.2), window=0))
        first = optimizer.wait_until(lambda b: any(w.state == "ready" for w in b.workers)).workers[0]
        optimizer.apply(model.plan(model.inference("s1", 0.6), window=1))
        beat = optimizer.wait_until(
            lambda b: (
                [(w.state, w.share_granted) for w in b.workers] == [("ready", 0.6)] and b.workers[0].pid != first.pid
            )
        )
        assert beat.workers[0].restarts == 0
    finally:
        optimizer.close()
