"""The entry of every worker process: one job, one device, one pipe.

The first message is StartJob; what follows is in executor/links.py. However a job ends, the executor is told
why: JobDone, or JobBroken with a kind that says whose fault it was. When the executor is gone the worker goes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
import traceback
import zlib
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

from executor.child import die_with_parent
from executor.learning.canary import compare
from executor.learning.device import Device, is_gpu_fault, is_out_of_memory, take_device
from executor.learning.labeling import label
from executor.learning.retraining import retrain
from executor.learning.training import DivergedError
from executor.learning.trials import run_trials
from executor.links import EpochDone, JobBroken, JobDone, Ready, StartJob
from executor.streams.feed import Feed, open_feed
from executor.streams.frames import FrameSource
from executor.streams.open import open_source
from executor.streams.record import record
from executor.streams.ring import RingFrames
from executor.worker_inference import StreamServer
from executor.worker_link import Link, ParentGoneError, receive
from protocol.codec import encode
from protocol.errors import CheckpointError, DeviceError, InputError, ProtocolError
from protocol.logs import line
from protocol.messages import CanaryJob, InferenceJob, LabelJob, RetrainJob, TrialJob
from protocol.schema import CanaryResult, LabelResult, LiveSource, RetrainResult, StreamSpec, TrialResult

_log = logging.getLogger(__name__)

# Written while there is memory to write it with.
_OUT_OF_MEMORY = encode(JobBroken(kind="memory", reason="out of memory"))

FeedWith = Callable[[InferenceJob, FrameSource | None, Path, float | None], Feed]
BrokenKind = Literal["input", "memory", "diverged", "device", "checkpoint", "internal"]


def main(
    connection: Connection,
    open_stream: Callable[[StreamSpec], FrameSource] = open_source,
    feed_with: FeedWith = open_feed,
) -> None:
    """Run the one job that comes down ``connection``, report on it, and return.

    Must be called from the process's main thread. ``open_stream`` makes the frame source of a stream, ``feed_with``
    what a serving job is fed with.
    """
    started = time.monotonic()
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the executor decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # files are written whole or not at all: nothing to tidy up
    try:
        start = receive(connection)
        if not isinstance(start, StartJob):
            raise ProtocolError(f"a worker's first message is StartJob, not {type(start).__name__}")
        _run(connection, start, started, open_stream, feed_with)
    except ParentGoneError:
        _log.info(line("worker_exit", reason="executor gone"))
    except ProtocolError as error:
        _log.error(line("worker_exit", reason=error))
        with contextlib.suppress(ParentGoneError):
            _tell(connection, JobBroken(kind="internal", reason=f"the job was not understood: {error}"))


def _run(
    connection: Connection,
    start: StartJob,
    started: float,
    open_stream: Callable[[StreamSpec], FrameSource],
    feed_with: FeedWith,
) -> None:
    source: FrameSource | None = None
    try:
        device = take_device(start.device)
        link = Link(connection, start, device)
        source = _source_of(start, open_stream)
        result = _work(start, device, link, source, started, feed_with)
        if result is not None:
            link.send(JobDone(result=result))
    except ParentGoneError:
        raise
    except Exception as error:
        try:
            broken = _diagnosis(error)
            _tell(connection, broken)
            _log.error(line("job_broken", job=start.job.job_id, kind=broken.kind, reason=broken.reason))
            if broken.kind == "internal":
                _log.error(traceback.format_exc())
        except MemoryError:
            _send(connection, _OUT_OF_MEMORY)
    finally:
        if source is not None:
            source.close()


def _source_of(start: StartJob, open_stream: Callable[[StreamSpec], FrameSource]) -> FrameSource | None:
    """The frames by number that the job needs: those of a live stream are the ones that its server keeps."""
    stream = start.job.stream
    if isinstance(start.job, RetrainJob):
        return None
    if isinstance(stream.source, LiveSource):
        return None if isinstance(start.job, InferenceJob) else RingFrames(Path(start.store), stream)
    return open_stream(stream)


def _work(
    start: StartJob,
    device: Device,
    link: Link,
    source: FrameSource | None,
    started: float,
    feed_with: FeedWith,
) -> LabelResult | TrialResult | RetrainResult | CanaryResult | None:
    job, store = start.job, Path(start.store)
    # Golden errors differ between streams, and stay the same when a frame is labelled again.
    seed = zlib.crc32(job.stream.stream_id.encode())

    def ready() -> None:
        link.send(Ready(pid=os.getpid(), startup_s=time.monotonic() - started, num_units=device.num_units))

    if isinstance(job, RetrainJob):
        return retrain(job, store, device, link, ready, lambda epoch: link.send(EpochDone(epoch=epoch)))
    if isinstance(job, InferenceJob):
        feed = feed_with(job, source, store, start.origin_s)
        try:
            StreamServer(job, feed, store, device, link, start.standby).run(started, start.stats_interval_s)
        finally:
            feed.close()
        return None
    if source is None:
        raise InputError(f"job {job.job_id}: no source")
    if isinstance(job, LabelJob):
        ready()
        if job.record and isinstance(job.stream.source, LiveSource):
            record(job.stream, job.stream.source, store, job.from_s, job.to_s, link.wait, lambda: bool(link.stopping))
        return label(job, source, store, device, link, seed)
    if isinstance(job, TrialJob):
        return run_trials(job, source, store, device, link, seed, ready)
    if isinstance(job, CanaryJob):
        return compare(job, source, store, device, link, seed, ready)
    raise InputError(f"no such kind of job: {type(job).__name__}")


def _diagnosis(error: Exception) -> JobBroken:
    kind: BrokenKind = "internal"
    fault = is_gpu_fault(error)
    if fault:
        kind = "device"
    elif is_out_of_memory(error):
        kind = "memory"
    elif isinstance(error, DivergedError):
        kind = "diverged"
    elif isinstance(error, DeviceError):
        kind = "device"
    elif isinstance(error, InputError):
        kind = "input"
    elif isinstance(error, CheckpointError):
        kind = "checkpoint"
    text = str(error).splitlines()[0] if str(error) else ""
    reason = text if kind not in ("internal", "memory") else f"{type(error).__name__}: {text}"
    return JobBroken(kind=kind, reason=reason, fault=fault)


def _tell(connection: Connection, broken: JobBroken) -> None:
    _send(connection, encode(broken))


def _send(connection: Connection, data: bytes) -> None:
    try:
        connection.send_bytes(data)
    except OSError as error:
        raise ParentGoneError from error
