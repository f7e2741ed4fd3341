"""A stream goes from one real worker process to the next between two frames."""

from __future__ import annotations

import functools
import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from executor import worker
from executor.learning.device import Device
from executor.links import HandedOver, HandOver, Progress, Ready, StartJob, StopJob, StreamStats, TakeOver, TookOver
from executor.worker_link import Link
from protocol.schema import StreamSpec
from tests.executor import tiny_source
from tests.executor.test_worker_jobs import Running, inference_job, start

__all__ = ["start"]
pytestmark = pytest.mark.process


class Counted(tiny_source.TinySource):
    """Writes down which frames are looked at; the first one of a process is its warm-up."""

    def __init__(self, path: Path, spec: StreamSpec) -> None:
        super().__init__(spec)
        self._file = path.open("a")
        self._warm = False

    def frame(self, index: int) -> tiny_source.TinyFrame:
        if self._warm:
            self._file.write(f"{index}\n")
            self._file.flush()
        self._warm = True
        return super().frame(index)


def enter(path: Path, connection: Connection) -> None:
    worker.main(connection, functools.partial(Counted, path))


def frames(running: Running) -> int:
    return sum(stats.num_frames for stats in running.all(StreamStats))


def test_no_frame_is_lost_or_served_twice_when_one_worker_relieves_another(
    start: Callable[..., Running], tmp_path: Path
) -> None:
    job, seen = inference_job(tmp_path), tmp_path / "seen"
    options: dict[str, Any] = {"origin_s": time.monotonic() - job.position_s, "target": functools.partial(enter, seen)}
    serving = start(job, **options)
    serving.until(Ready)
    serving.until(StreamStats)
    counted = 0
    for _ in range(3):
        new = start(job, standby=True, **options)
        new.until(Ready)
        at_s = time.monotonic() + 0.05
        new.send(TakeOver(at_s=at_s))
        serving.send(HandOver(at_s=at_s))
        before, after = serving.until(HandedOver), new.until(TookOver)
        assert 0.0 < after.at_s - before.at_s < 5.0
        assert serving.exit_code() == 0
        counted += frames(serving)
        serving = new
    serving.send(HandOver(at_s=time.monotonic() + 0.2))
    serving.until(HandedOver)
    assert serving.exit_code() == 0
    indices = [int(text) for text in seen.read_text().split()]
    assert indices == list(range(indices[0], indices[0] + len(indices)))
    assert counted + frames(serving) == len(indices)


def test_a_worker_on_standby_serves_nothing_and_is_not_taken_for_hung(
    start: Callable[..., Running], tmp_path: Path
) -> None:
    waiting = start(inference_job(tmp_path), standby=True)
    waiting.until(Ready)
    waiting.until(Progress, lambda report: report.count > 2)
    waiting.send(StopJob(reason="test over"))
    assert waiting.exit_code() == 0
    assert not frames(waiting)


def test_a_busy_second_of_a_part_of_the_device_counts_as_that_part(tmp_path: Path) -> None:
    ours, theirs = multiprocessing.Pipe()
    device = Device("cpu:0", torch.device("cpu"))
    start = StartJob(job=inference_job(tmp_path), store="", device="cpu:0", pace=True, cap=0.25)
    link = Link(theirs, start, device)
    before = device.busy_s()
    assert 0.25 * before <= link.busy_s() <= 0.25 * device.busy_s()
    ours.close()
    theirs.close()
