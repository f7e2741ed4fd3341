"""Checks with the executor's own workers in the place of the checks' clients."""

from __future__ import annotations

import tempfile
import time
from typing import TypeVar

import msgspec

from executor.gpu_check.bench import Bench
from executor.gpu_check.transcript import Details
from executor.links import (
    HandedOver,
    HandOver,
    JobBroken,
    Ready,
    StartJob,
    StreamStats,
    TakeOver,
    TookOver,
)
from executor.shares.devices import Device
from executor.shares.mps import MpsBackend
from executor.supervisor import Exited, Reported, Supervisor
from protocol.errors import WorkerError
from protocol.messages import InferenceJob
from protocol.schema import CheckpointRef, CitySource, InferenceConfig, StreamSpec

CLASSES = ("person", "car")

R = TypeVar("R")


def mps_workers(bench: Bench, details: Details) -> None:
    """Workers and backend of the executor itself: held to 20 %, handed over to 60 % between two frames."""
    daemon = bench.need_daemon()
    helper = bench.clients.open(bench.plain())
    with tempfile.TemporaryDirectory() as store:
        saved = helper.ask("checkpoint", store=store, net=bench.nets[0], stream_id="check", classes=CLASSES)
        helper.leave()
        stream = StreamSpec(stream_id="check", source=CitySource(seed=1), classes=CLASSES, fps=20.0)
        job = InferenceJob(
            job_id="serve",
            stream=stream,
            share=0.2,
            config=InferenceConfig(config_id="every"),
            checkpoint=msgspec.convert(saved["checkpoint"], CheckpointRef),
            position_s=0.0,
        )
        gpu = Device(kind="cuda", index=bench.index, memory_bytes=0, uuid=bench.uuid, num_units=bench.num_units)
        backend = MpsBackend(gpu, daemon, start=False)
        workers = Supervisor(bench.worker, evict=backend.evict, forkserver=bench.clients.forkserver)
        desk = _Desk(workers)
        origin_s = time.monotonic()
        try:
            for number, share in ((1, 0.2), (2, 0.6)):
                start = StartJob(
                    job=job,
                    store=store,
                    device=bench.clients.device,
                    pace=True,
                    origin_s=origin_s,
                    standby=number > 1,
                )
                begun = time.monotonic()
                workers.start(number, start, {**backend.worker_environment(job, share), **bench.extra})
                ready = desk.next(number, Ready, 40.0)
                backend.attached(ready, share)
                details[f"worker_{number}"] = {
                    "share": share,
                    "num_units": ready.num_units,
                    "ready_s": round(time.monotonic() - begun, 3),
                }
                if number == 1:
                    time.sleep(1.0)
            at_s = time.monotonic() + 0.05
            workers.send(2, TakeOver(at_s=at_s))
            workers.stop(1, "handed over", farewell=HandOver(at_s=at_s))
            before, after = desk.next(1, HandedOver, 10.0), desk.next(2, TookOver, 10.0)
            details["gap_ms"] = round((after.at_s - before.at_s) * 1e3, 2)
            details["added_ms"] = round((after.at_s - before.at_s - 1.0 / stream.fps) * 1e3, 2)
            details["stats"] = msgspec.to_builtins(desk.next(2, StreamStats, 10.0))
        finally:
            workers.close(8.0)


class _Desk:
    """Reports of several workers, kept until somebody asks for them."""

    def __init__(self, workers: Supervisor) -> None:
        self._workers = workers
        self._kept: list[Reported] = []

    def next(self, number: int, kind: type[R], within_s: float) -> R:
        """The next report of a kind of a worker. Raises WorkerError when it ends or none comes."""
        end = time.monotonic() + within_s
        ended = ""
        while time.monotonic() < end:
            for event in self._workers.poll():
                if isinstance(event, Reported):
                    self._kept.append(event)
                elif isinstance(event, Exited) and event.worker_id == number:
                    ended = event.reason
            for kept in self._kept:
                if kept.worker_id == number and isinstance(kept.report, kind):
                    self._kept.remove(kept)
                    return kept.report
                if kept.worker_id == number and isinstance(kept.report, JobBroken):
                    raise WorkerError(f"worker {number}: {kept.report.reason}")
            if ended:
                raise WorkerError(f"worker {number} has ended: {ended}")
            time.sleep(0.002)
        raise WorkerError(f"worker {number} has not sent {kind.__name__} within {within_s:g} s")
