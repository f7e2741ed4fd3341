"""The whole system with real processes, and what it survives."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from optimizer.report import read_events
from protocol.events import (
    ExecutorChanged,
    PlanSolved,
    ProfileEstimated,
    RetrainFinished,
    StreamAccuracy,
    WindowClosed,
    WindowOpened,
    WorkerChanged,
)
from tests.integration.rig import Rig, all_gone, descendants, wait_for

pytestmark = [pytest.mark.process, pytest.mark.timeout(240)]


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path)
    yield made
    made.close()


def serving(rig: Rig, after_s: float = -1.0) -> bool:
    """Both streams deliver results later than ``after_s`` of the site clock."""
    fresh = {e.stream_id for e in rig.events(StreamAccuracy) if e.site_s > after_s and e.num_analysed}
    return fresh == {"north", "south"}


def last_site_s(rig: Rig) -> float:
    return max((e.site_s for e in rig.events(StreamAccuracy)), default=0.0)


def test_a_site_runs_its_windows_and_everything_is_gone_afterwards(rig: Rig) -> None:
    optimizer, executor = rig.optimizer("--windows", "2"), rig.executor()
    wait_for("both streams are served", lambda: serving(rig), 90)
    workers = descendants(executor)
    assert optimizer.wait(60) == 0
    assert executor.wait(20) == 0
    wait_for("no worker is left", lambda: all_gone(workers), 10)
    closed = rig.events(WindowClosed)
    assert [e.window for e in closed] == [0, 1]
    for event in closed:
        assert event.realised > 0.2
        assert all(s.realised is not None and s.predicted is not None for s in event.streams)
    assert (rig.out / "report.html").stat().st_size > 10_000
    assert sorted(p.name for p in (rig.out / "problems").iterdir())


def test_a_killed_worker_is_replaced_and_the_others_go_on(rig: Rig) -> None:
    rig.optimizer()
    executor = rig.executor()
    wait_for("both streams are served", lambda: serving(rig), 90)
    ready = [e for e in rig.events(WorkerChanged) if e.kind == "inference" and e.change == "ready"]
    victim = next(e for e in ready if e.stream_id == "north")
    at = last_site_s(rig)
    os.kill(victim.pid, signal.SIGKILL)
    wait_for("both streams are served again", lambda: serving(rig, at + 1.5), 30)
    again = [e for e in rig.events(WorkerChanged) if e.kind == "inference" and e.change == "ready"]
    assert {e.pid for e in again if e.stream_id == "north"} > {victim.pid}
    assert {e.pid for e in again if e.stream_id == "south"} == {e.pid for e in ready if e.stream_id == "south"}
    assert executor.poll() is None


def test_a_killed_executor_leaves_no_orphan_and_its_successor_takes_over(rig: Rig) -> None:
    optimizer, executor = rig.optimizer(), rig.executor()
    wait_for("both streams are served", lambda: serving(rig), 90)
    workers = descendants(executor)
    assert workers
    executor.kill()
    executor.wait()
    wait_for("the workers died with it", lambda: all_gone(workers), 10)
    rig.executor()
    at = last_site_s(rig)
    wait_for("both streams are served again", lambda: serving(rig, at + 0.5), 40)
    assert optimizer.poll() is None
    assert [e.change for e in rig.events(ExecutorChanged)].count("joined") == 2


def test_an_executor_that_dies_in_the_middle_of_a_trial_holds_no_stream_up(tmp_path: Path) -> None:
    """Labels and trials run beside the plan; what was lost with the executor is made again by its successor."""
    rig = Rig(tmp_path, window_s=10.0)
    try:
        optimizer, executor = rig.optimizer("--windows", "2"), rig.executor()
        wait_for("both streams are served", lambda: serving(rig), 150)

        def tried() -> bool:
            started = [e for e in rig.events(WorkerChanged) if e.kind in ("label", "trial") and e.change == "started"]
            return any("/w1" in e.job_id for e in started)

        wait_for("a label or trial job of the second window runs", tried, 60)
        executor.kill()
        executor.wait()
        rig.executor()
        assert optimizer.wait(90) == 0
        assert [e.window for e in rig.events(WindowClosed)] == [0, 1]
        back_s = max(e.site_s for e in rig.events(ExecutorChanged) if e.change == "joined")
        profiled = [e for e in rig.events(ProfileEstimated) if e.window == 1]
        if back_s < max(e.site_s for e in rig.events(WindowOpened)) + 4.0:  # a very busy machine takes longer
            assert profiled
        looked = {e.stream_id: e.site_s for e in reversed(profiled) if e.stage == "check"}
        for ended in rig.events(RetrainFinished):
            if ended.window == 1 and ended.stream_id in looked and ended.elapsed_s is not None:
                assert ended.site_s - ended.elapsed_s >= looked[ended.stream_id] - 0.5, (
                    "retrained before it was looked at"
                )
    finally:
        rig.close()


def test_a_killed_optimizer_comes_back_and_adopts_what_runs(rig: Rig) -> None:
    optimizer, executor = rig.optimizer(), rig.executor()
    wait_for("both streams are served", lambda: serving(rig), 90)
    pids = {p.pid for p in descendants(executor)}
    ready = [e.pid for e in rig.events(WorkerChanged) if e.kind == "inference" and e.change == "ready"]
    optimizer.kill()
    optimizer.wait()
    assert executor.poll() is None
    assert set(ready) <= pids
    windows = [e.window for e in rig.events(WindowOpened)]
    again = rig.optimizer("--windows", str(max(windows) + 2))
    assert again.wait(90) == 0, rig.log("optimizer")
    assert executor.wait(20) == 0
    opened = rig.events(WindowOpened)
    assert len({e.window for e in opened}) == len(opened), "no window was opened twice"
    assert {e.term for e in opened} <= {1, 2}
    after = [e.pid for e in rig.events(WorkerChanged) if e.kind == "inference" and e.change == "ready"]
    assert after == ready, "the serving workers lived on"


def test_the_optimizer_of_a_second_start_is_refused_while_the_first_lives(rig: Rig) -> None:
    rig.optimizer()
    wait_for("the folder is held", lambda: (rig.out / "lock").exists() and "waits for" in rig.log("optimizer"), 60)
    second = rig.optimizer()
    assert second.wait(60) == 2
    assert "another optimizer is using it" in rig.log("optimizer")


def test_random_bytes_on_the_control_port_disturb_nobody(rig: Rig) -> None:
    optimizer, _ = rig.optimizer(), rig.executor()
    wait_for("both streams are served", lambda: serving(rig), 90)
    for seed in range(20):
        with socket.create_connection(("127.0.0.1", rig.port), timeout=5) as wire:
            wire.sendall(bytes((seed * 31 + i * 17) % 256 for i in range(4000)))
    at = last_site_s(rig)
    wait_for("both streams are still served", lambda: serving(rig, at + 1.5), 30)
    assert optimizer.poll() is None


def test_two_executors_share_the_streams_and_survivors_take_over(tmp_path: Path) -> None:
    rig = Rig(tmp_path, executors=2, window_s=20.0)
    try:
        rig.optimizer()
        executors = [rig.executor(0), rig.executor(1)]
        wait_for("both streams are served", lambda: serving(rig), 90)
        executors[1].kill()
        wait_for("it is missed", lambda: any(e.change == "lost" for e in rig.events(ExecutorChanged)), 15)
        at = last_site_s(rig)
        wait_for("one executor serves both", lambda: serving(rig, at + 2.0), 30)
        last = rig.events(PlanSolved)[-1]
        assert len({s.inference_gpu for s in last.streams}) == 1
    finally:
        rig.close()


def test_events_of_a_run_can_be_read_while_it_is_written(rig: Rig) -> None:
    rig.optimizer()
    rig.executor()
    wait_for("something was recorded", lambda: bool(rig.events(ExecutorChanged)), 60)
    assert read_events(rig.out / "events.jsonl")
    assert psutil.pid_exists(rig.processes[0].pid)
