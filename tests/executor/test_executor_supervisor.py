"""The supervisor with real worker processes that misbehave."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping

import psutil
import pytest

from executor.limits import Limits
from executor.links import JobBroken, JobDone, Progress, Ready, Report, SetShare, StartJob, StreamStats
from executor.processes import ForkServer, exit_reason
from executor.supervisor import Exited, Supervisor
from protocol.errors import WorkerError
from protocol.messages import Job
from tests.executor import optimizer_model as model
from tests.executor.a_core import CORE

pytestmark = pytest.mark.process

QUICK = Limits(ready_timeout_s=1.0, hang_s=0.6, stop_grace_s=0.3, term_grace_s=0.3, done_grace_s=1.0)


class Watched:
    """A supervisor and everything it has said."""

    def __init__(self, forkserver: ForkServer, limits: Limits, evict: Callable[[int], None] = lambda pid: None) -> None:
        self.supervisor = Supervisor("tests.executor.problem_worker:main", limits, evict, forkserver=forkserver)
        self.reports: dict[int, list[Report]] = {}
        self.exits: dict[int, str] = {}

    def start(
        self, worker_id: int, mode: str, job: Job | None = None, environment: Mapping[str, str] | None = None
    ) -> int:
        job = job or model.inference()
        start = StartJob(job=job, store="", device=CORE, pace=True)
        return self.supervisor.start(worker_id, start, {"PROBLEM": f"*={mode}", **(environment or {})})

    def until(self, condition: Callable[[], object], timeout_s: float = 20.0) -> None:
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, f"timed out; exits {self.exits}"
            for event in self.supervisor.poll():
                if isinstance(event, Exited):
                    self.exits[event.worker_id] = event.reason
                else:
                    self.reports.setdefault(event.worker_id, []).append(event.report)
            time.sleep(0.005)

    def said(self, worker_id: int, kind: type[Report]) -> bool:
        return any(isinstance(report, kind) for report in self.reports.get(worker_id, []))

    def exit_of(self, worker_id: int) -> str:
        self.until(lambda: worker_id in self.exits)
        return self.exits[worker_id]


@pytest.fixture(scope="module")
def forkserver() -> ForkServer:
    server = ForkServer("tests.executor.problem_worker")
    server.warm_up()
    return server


@pytest.fixture
def watched(forkserver: ForkServer) -> Iterator[Watched]:
    watched = Watched(forkserver, QUICK)
    yield watched
    watched.supervisor.close()
    assert not len(watched.supervisor)


def test_a_good_worker_reports_obeys_and_leaves_when_told(watched: Watched) -> None:
    watched.start(1, "good")
    watched.until(lambda: watched.said(1, StreamStats))
    watched.supervisor.send(1, SetShare(share=0.7))
    watched.until(lambda: any(isinstance(r, Progress) and r.share == 0.7 for r in watched.reports[1]))
    watched.supervisor.stop(1, "not_in_plan")
    assert watched.exit_of(1) == "not_in_plan (exit code 0)"


def test_a_result_is_read_although_the_worker_has_left(watched: Watched) -> None:
    watched.start(1, "good", model.label())
    assert watched.exit_of(1) == "exit code 0"
    assert watched.said(1, JobDone)


def test_a_worker_that_is_never_ready_is_stopped_and_the_error_names_the_knob(watched: Watched) -> None:
    watched.start(1, "never_ready")
    reason = watched.exit_of(1)
    assert "not ready after 1 s" in reason
    assert "ready_timeout_s" in reason


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("crash_at_start", "exit code 3"),
        ("segfault", "SIGSEGV: crash in native code"),
        ("crash_later", "not by this executor: out of memory, or"),
        ("hang", "hung: no report for 0.6 s (hang_s) (killed by SIGTERM)"),
        ("half_message", "hung: no report for 0.6 s (hang_s) (killed by SIGKILL)"),
        ("garbage", "unreadable"),
    ],
)
def test_the_exit_reason_tells_what_happened(watched: Watched, mode: str, words: str) -> None:
    watched.start(1, mode)
    assert words in watched.exit_of(1)


def test_a_broken_job_says_why_before_it_leaves(watched: Watched) -> None:
    watched.start(1, "broken")
    watched.exit_of(1)
    assert watched.said(1, JobBroken)


def test_a_worker_that_ignores_everything_is_killed_with_its_helpers(watched: Watched) -> None:
    pid = watched.start(1, "ignore_term")
    helper_of = watched.start(2, "helper")
    watched.until(lambda: watched.said(1, Ready) and watched.said(2, Ready))
    helpers = psutil.Process(helper_of).children()
    assert helpers
    watched.supervisor.stop_all("shutdown")
    assert watched.exit_of(1) == "shutdown (killed by SIGKILL)"
    assert watched.exit_of(2) == "shutdown (exit code 0)"
    assert not model.wait_gone([*helpers], 2.0)
    assert not psutil.pid_exists(pid)


def test_a_stopped_worker_is_killed(watched: Watched) -> None:
    pid = watched.start(1, "good")
    watched.until(lambda: watched.said(1, Ready))
    os.kill(pid, signal.SIGSTOP)
    assert "killed by SIGKILL" in watched.exit_of(1)


def test_a_flood_of_reports_does_not_keep_others_waiting(watched: Watched) -> None:
    watched.start(1, "flood")
    watched.start(2, "good", model.inference("s2"))
    watched.until(lambda: len([r for r in watched.reports.get(2, []) if isinstance(r, StreamStats)]) >= 5)
    assert len(watched.reports[1]) > 100


def test_many_orders_to_a_worker_that_does_not_read_do_not_block(watched: Watched) -> None:
    watched.start(1, "hang")
    watched.until(lambda: watched.said(1, Ready))
    begin = time.monotonic()
    for _ in range(50_000):
        watched.supervisor.send(1, SetShare(share=0.5))
    assert time.monotonic() - begin < 20.0
    assert watched.supervisor.write_fds()
    assert "hung" in watched.exit_of(1)


def test_a_worker_is_taken_out_of_its_share_daemon_before_any_signal(forkserver: ForkServer) -> None:
    evicted: list[tuple[int, bool]] = []
    watched = Watched(forkserver, QUICK, lambda pid: evicted.append((pid, psutil.pid_exists(pid))))
    pid = watched.start(1, "hang")
    watched.exit_of(1)
    assert evicted[0] == (pid, True)


def test_the_environment_of_one_worker_is_neither_ours_nor_the_next_ones(watched: Watched) -> None:
    before = dict(os.environ)
    pid = watched.start(1, "good", environment={"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "30"})
    watched.start(2, "hang", environment={"PROBLEM": "*=hang"})
    watched.until(lambda: watched.said(1, Ready) and watched.said(2, Ready))
    assert dict(os.environ) == before
    assert os.getpgid(pid) == pid
    assert os.getpgid(0) != pid


def test_a_forkserver_that_died_is_replaced() -> None:
    server = ForkServer("tests.executor.problem_worker")
    watched = Watched(server, QUICK)
    first = watched.start(1, "good")
    watched.until(lambda: watched.said(1, Ready))
    parent = psutil.Process(first).parent()
    assert parent is not None
    parent.kill()
    assert watched.exit_of(1)
    assert not model.wait_gone([psutil.Process(first)] if psutil.pid_exists(first) else [], 2.0)
    watched.start(2, "good")
    watched.until(lambda: watched.said(2, Ready))
    watched.supervisor.close()


@pytest.mark.parametrize(
    ("code", "ordered", "before", "after", "words"),
    [
        (0, "", None, None, "exit code 0"),
        (-9, "", 3, 4, "out of memory (the kernel counted"),
        (-9, "", 3, 3, "or somebody's kill -9"),
        (-9, "stop", 3, 4, "killed by SIGKILL"),
        (-11, "", None, None, "crash in native code"),
        (-64, "", None, None, "SIGRTMAX"),
        (-70, "", None, None, "signal 70"),
        (None, "", None, None, "vanished"),
    ],
)
def test_exit_codes_in_words(code: int | None, ordered: str, before: int | None, after: int | None, words: str) -> None:
    assert words in exit_reason(code, ordered, before, after)


def test_a_worker_that_cannot_be_started_is_an_error_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    server = ForkServer("tests.executor.problem_worker")

    def refuse(*_: object, **__: object) -> None:
        raise OSError("Resource temporarily unavailable")

    monkeypatch.setattr("multiprocessing.context.ForkServerProcess.start", refuse)
    with pytest.raises(WorkerError, match="cannot start a worker process"):
        server.start("tests.executor.problem_worker:main", {}, 0)
