from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from optimizer.watch import WatchState, bar, render, sparkline, watch
from protocol import sockets
from protocol.errors import InputError, UnreachableError
from protocol.events import (
    ExecutorChanged,
    JobShare,
    LabelsCollected,
    Notice,
    PlanSolved,
    RetrainFinished,
    RetrainProgress,
    StreamAccuracy,
    TelemetryEvent,
    WindowClosed,
    WindowOpened,
    WorkerChanged,
)
from protocol.messages import SnapshotRequest
from protocol.schema import EpochResult, RetrainConfig
from protocol.telemetry import Hub

T0 = 1_000_000.0


def opened(at_s: float = 0.0, **changes: Any) -> WindowOpened:
    fields: dict[str, Any] = {"window": 3, "term": 2, "window_s": 30.0, "num_streams": 2, "policy": "milp"}
    return WindowOpened(time_s=T0 + at_s, **(fields | changes))


def accuracy(at_s: float, value: float | None, stream_id: str = "cam-1", **changes: Any) -> StreamAccuracy:
    scored = 0 if value is None else 10
    fields: dict[str, Any] = {
        "window": 3,
        "accuracy": value,
        "accuracy_sum": (value or 0.0) * scored,
        "num_scored": scored,
        "num_frames": 10,
        "num_analysed": 5,
        "num_dropped": 1,
        "num_objects": scored,
        "fps": 10.0,
        "latency_ms_p50": 4.0,
        "model_version": 2,
        "inference_id": "half",
        "conditions": "night, rain",
    }
    return StreamAccuracy(time_s=T0 + at_s, stream_id=stream_id, **(fields | changes))


def share(at_s: float, job_id: str, kind: Any, granted: float, achieved: float | None, gpu_id: str = "g0") -> JobShare:
    return JobShare(
        time_s=T0 + at_s,
        job_id=job_id,
        kind=kind,
        stream_id="cam-1",
        gpu_id=gpu_id,
        share_granted=granted,
        share_achieved=achieved,
        backend="pacing",
    )


def worker(job_id: str, kind: Any, change: Any, reason: str = "") -> WorkerChanged:
    return WorkerChanged(
        time_s=T0, job_id=job_id, stream_id="cam-1", gpu_id="g0", kind=kind, change=change, reason=reason
    )


def screen(state: WatchState, width: int = 140, **options: Any) -> str:
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(render(state, **options))
    return out.getvalue()


def row(text: str, start: str) -> str:
    return next(line for line in text.splitlines() if line.strip().startswith(start))


def test_an_empty_screen_can_be_shown() -> None:
    assert "site ?" in screen(WatchState())


def test_the_header_tells_window_plan_and_what_became_of_the_last_one() -> None:
    state = WatchState("street")
    state.apply(opened())
    state.apply(
        PlanSolved(
            time_s=T0 + 12.0,
            window=3,
            revision=1,
            phase="replan",
            reason="a retraining ended",
            policy="milp",
            status="optimal",
            predicted=0.78125,
            bound=0.7820,
            gap=0.001,
            seconds=0.42,
            detail="",
            streams=(),
        )
    )
    state.apply(WindowClosed(time_s=T0, window=2, streams=(), realised=0.701, predicted=0.75))
    text = screen(state)
    assert "site street   window 3   term 2   policy milp   18 s of 30 s left" in text
    assert "replan 1: 0.7812 predicted, bound 0.7820, gap 0.100%, 0.42 s, milp optimal (a retraining ended)" in text
    assert "window 2 closed: 0.701 realised, 0.750 predicted" in text


def test_a_stream_shows_its_present_accuracy_rate_and_last_minute() -> None:
    state = WatchState()
    for second in range(60):
        state.apply(accuracy(second, 0.1 if second < 30 else 0.9))
    cells = row(screen(state), "cam-1")
    assert "0.90" in cells
    assert "▂" * 14 in cells
    assert "▇" * 14 in cells
    assert " v2 " in cells
    assert " half " in cells
    assert " 5.0 " in cells  # frames per second analysed
    assert " 5 " in cells  # frames dropped in five seconds
    assert "night, rain" in cells


def test_a_stream_without_objects_shows_no_accuracy() -> None:
    state = WatchState()
    state.apply(accuracy(0.0, None))
    assert row(screen(state), "cam-1").split()[1] == "-"


def test_an_event_that_comes_twice_changes_nothing() -> None:
    state = WatchState()
    careful = Notice(time_s=T0, level="error", text="careful")
    events: list[TelemetryEvent] = [opened(), accuracy(0.0, 0.5), accuracy(1.0, 0.7), careful]
    for event in events:
        state.apply(event)
    once = screen(state)
    for event in [*events, *events]:
        state.apply(event)
    assert screen(state) == once
    assert once.count("careful") == 1


def test_retraining_is_followed_from_the_first_epoch_to_the_swap() -> None:
    state = WatchState()
    state.apply(worker("r-1", "retrain", "started"))
    assert "retraining" in row(screen(state), "cam-1")
    config = RetrainConfig(config_id="e15", epochs=15)
    epoch = EpochResult(epoch=5, accuracy=0.71, loss=1.0, busy_s=1.0)
    state.apply(RetrainProgress(time_s=T0, job_id="r-1", stream_id="cam-1", window=3, config=config, epoch=epoch))
    assert "██░░░░ e15 5/15 acc 0.71" in row(screen(state), "cam-1")
    finished: dict[str, Any] = {
        "time_s": T0,
        "stream_id": "cam-1",
        "window": 3,
        "retrain_id": "e15",
        "accuracy_before": 0.61,
        "accuracy_after": 0.78,
        "accuracy_predicted": None,
        "seconds": 3.0,
        "seconds_predicted": None,
    }
    state.apply(RetrainFinished(**finished, promoted=True, reason=""))
    assert "0.61 → 0.78 live" in row(screen(state), "cam-1")
    state.apply(RetrainFinished(**finished, promoted=False, reason="worse"))
    assert "kept old: worse" in row(screen(state), "cam-1")


def test_jobs_are_grouped_by_gpu_with_granted_and_achieved_share() -> None:
    state = WatchState()
    state.apply(share(0.0, "r-1", "retrain", 0.4, 0.2))
    state.apply(share(0.0, "i-1", "inference", 0.3, 0.3))
    state.apply(share(0.0, "i-2", "inference", 0.5, None, gpu_id="g1"))
    text = screen(state)
    assert row(text, "g0 (70%)").split()[2:] == [
        "inference",
        "cam-1",
        "███░░░░░░░",
        "0.30",
        "███░░░░░░░",
        "0.30",
        "pacing",
    ]
    assert row(text, "retrain ").split()[2:] == ["████░░░░░░", "0.40", "██░░░░░░░░", "0.20", "pacing"]
    assert row(text, "g1 (50%)").split()[-2:] == ["-", "pacing"]


def test_jobs_leave_the_screen_when_they_end_grow_old_or_lose_their_executor() -> None:
    state = WatchState()
    state.apply(share(0.0, "r-1", "retrain", 0.4, 0.4))
    state.apply(share(0.0, "t-1", "trial", 0.1, 0.1, gpu_id="g1"))
    state.apply(share(0.0, "i-1", "inference", 0.3, 0.3))
    state.apply(worker("r-1", "retrain", "finished"))
    state.apply(ExecutorChanged(time_s=T0, executor_id="exec-b", gpu_id="g1", change="lost", reason="silent"))
    text = screen(state)
    assert "retrain " not in text
    assert "trial" not in text
    assert "exec-b lost" in text
    assert "g0 (30%)" in text
    state.apply(accuracy(60.0, 0.5))
    assert "g0" not in screen(state)


def test_failures_become_notices_and_text_cannot_steer_the_terminal() -> None:
    state = WatchState("si\x1b[2Jte")
    state.apply(worker("r-1", "retrain", "failed", "out of memory\x1b[31m\n[bold]x[/bold]"))
    text = screen(state)
    assert "retrain of cam-1 failed: out of memory [31m [bold]x[/bold]" in text
    assert "\x1b" not in text


def test_silence_and_loss_are_shown() -> None:
    text = screen(WatchState(), silence_s=12.0, missed=7)
    assert "nothing heard for 12 s" in text
    assert "7 events lost on the way here" in text


def test_an_older_window_does_not_replace_a_newer_one() -> None:
    state = WatchState()
    state.apply(opened(window=4))
    state.apply(opened(window=3))
    assert "window 4" in screen(state)
    state.apply(opened(window=0, term=3))
    assert "window 0   term 3" in screen(state)


def test_the_screen_fits_a_narrow_terminal() -> None:
    state = WatchState("street")
    state.apply(opened())
    state.apply(accuracy(0.0, 0.5))
    state.apply(share(0.0, "i-1", "inference", 0.3, 0.3))
    assert max(map(len, screen(state, width=80).splitlines())) <= 80
    assert "0.50" in screen(state, width=80)


def test_what_the_screen_remembers_is_bounded() -> None:
    state = WatchState()
    for number in range(2000):
        state.apply(accuracy(number, 0.5, f"cam-{number}"))
        state.apply(accuracy(number, 0.5, "cam-x"))
        state.apply(share(number, f"i-{number}", "inference", 0.1, None))
        state.apply(ExecutorChanged(executor_id=f"e-{number}", gpu_id="g0", change="joined", reason=""))
        state.apply(Notice(time_s=T0 + number, level="info", text=str(number)))
    sizes = [len(state.streams), len(state.jobs), len(state.executors), len(state.notices)]
    assert max(sizes) <= 512
    assert all(len(stream.events) <= 256 for stream in state.streams.values())


@given(st.lists(st.tuples(st.floats(-100.0, 200.0), st.floats(0.0, 1.0)), max_size=50))
@settings(deadline=None)
def test_a_sparkline_always_has_its_width(points: list[tuple[float, float]]) -> None:
    assert len(sparkline(points, 100.0, 60.0, 30)) == 30


@given(st.floats(-1.0, 2.0), st.integers(1, 20))
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_bar_always_has_its_width(value: float, width: int) -> None:
    assert len(bar(value, width)) == width


# ---------------------------------------------------------------- joining a running site


@pytest.fixture
def address() -> Iterator[str]:
    """The control address of a hub and control server in a thread, with a stream in its third window."""
    context: sockets.Context = zmq.Context()
    server = sockets.ControlServer(context, "tcp://127.0.0.1:0")
    hub = Hub(context, "tcp://127.0.0.1:0", "tcp://*:0")
    publisher = hub.publisher("optimizer")
    publisher.publish(opened())
    stop = threading.Event()

    def run() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            publisher.publish(accuracy(float(number), 0.5))
            hub.forward()
            for peer, message in server.recv():
                if message == SnapshotRequest():
                    server.send(peer, hub.snapshot("street", 2, 3))
            time.sleep(0.01)

    thread = threading.Thread(target=run)
    with closing(server), closing(hub):
        thread.start()
        yield server.address
        stop.set()
        thread.join()
    context.destroy(linger=0)


def full(state: WatchState) -> bool:
    return state.window is not None and "cam-1" in state.streams and len(state.streams["cam-1"].events) > 20


def test_whoever_joins_late_sees_window_and_live_events(address: str) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120, height=40, color_system=None)
    state = watch(address, console=console, timeout_s=20.0, until=full)
    assert state.site == "street"
    assert "window 3" in out.getvalue()
    assert "cam-1" in out.getvalue()


def test_without_a_terminal_events_are_printed_as_lines(address: str) -> None:
    out = io.StringIO()
    watch(address, console=Console(file=out, width=80), timeout_s=20.0, until=full)
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("event=window_opened time_s=")
    assert all(line.startswith("event=") for line in lines)
    assert "accuracy=0.5" in lines[-1]


def test_nobody_at_the_address_is_a_clear_error() -> None:
    with pytest.raises(UnreachableError, match="no optimizer answers at tcp://127"):
        watch("tcp://127.0.0.1:9", timeout_s=0.2)
    with pytest.raises(InputError, match="ADDRESS: 'localhost' is not an address; write it like tcp://"):
        watch("localhost")


def test_what_is_over_gives_way_to_what_was_found() -> None:
    state = WatchState("site")
    state.apply(worker("c-1", "canary", "started"))
    assert "comparing models" in row(screen(state), "cam-1")
    state.apply(worker("c-1", "canary", "finished"))
    assert "comparing models" not in screen(state)
    labels: dict[str, Any] = {"num_frames": 20, "num_train": 30, "num_validation": 9, "class_counts": (39,)}
    state.apply(LabelsCollected(time_s=T0, stream_id="cam-1", window=1, seconds=1.0, **labels))
    state.apply(worker("t-1", "trial", "started"))
    assert "micro-profiling" in row(screen(state), "cam-1")
    state.apply(worker("l-1", "label", "finished"))
    assert "micro-profiling" in row(screen(state), "cam-1"), "another job's end"
    state.apply(worker("t-1", "trial", "stopped"))
    assert "39 labels" in row(screen(state), "cam-1")


def test_the_screen_says_what_is_waited_for_before_the_first_window() -> None:
    state = WatchState("site")
    assert "waiting for executors" in screen(state)
    state.apply(ExecutorChanged(time_s=T0, executor_id="e1", gpu_id="g0", change="joined", reason=""))
    assert "before the first window: first models are trained" in screen(state)
