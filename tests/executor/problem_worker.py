"""A worker that behaves as its environment says: PROBLEM="job_id=mode,..." ("*" for every job).

Modes: good, never_ready, crash_at_start, crash_later, hang, ignore_term, flood, half_message, garbage, broken,
helper (starts a process of its own), segfault, gpu_fault (after a while a kernel of it fails),
without_mps (does not find the daemon). It speaks the real pipe protocol of a real worker.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

from executor.links import (
    Command,
    EpochDone,
    HandedOver,
    HandOver,
    JobBroken,
    JobDone,
    Progress,
    Ready,
    Report,
    SetInference,
    SetShare,
    StartJob,
    StopJob,
    StreamStats,
    SwapModel,
    Swapped,
    SwapRefused,
    TakeOver,
    TookOver,
)
from protocol.codec import decode, encode
from protocol.messages import CanaryJob, InferenceJob, Job, LabelJob, RetrainJob, TrialJob
from protocol.schema import DatasetRef, EpochResult, LabelResult, RetrainResult, TrialResult

INTERVAL_S = 0.05
NUM_TURNS = 6


def main(connection: Connection) -> None:
    start = decode(connection.recv_bytes(), StartJob)
    mode = mode_of(start.job.job_id)
    if mode == "crash_at_start":
        sys.exit(3)
    if mode == "segfault":
        ctypes.string_at(0)
    if mode == "ignore_term":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if mode == "helper":
        subprocess.Popen(["sleep", "1000"], stdin=subprocess.DEVNULL)
    if mode in ("never_ready", "ignore_term_never_ready"):
        _sleep_for_ever(connection)
    say(connection, Ready(pid=os.getpid(), startup_s=0.0, num_units=attach_to_mps(mode)))
    if mode == "hang":
        time.sleep(1000.0)
    if mode == "half_message":
        os.write(connection.fileno(), b"\x00\x00\xff\x00only a part")
        os.kill(os.getpid(), signal.SIGSTOP)
    if mode == "garbage":
        os.write(connection.fileno(), b"\xff" * 64)
        _sleep_for_ever(connection)
    if mode == "broken":
        say(connection, JobBroken(kind="memory", reason="model of it: 3 GiB wanted"))
        sys.exit(1)
    if mode == "flood":
        try:
            while True:
                say(connection, Progress(count=1, share_achieved=None))
        except OSError:
            sys.exit(0)
    _work(connection, start.job, mode)


def attach_to_mps(mode: str) -> int:
    """What CUDA does at its first call: connect to the daemon, or go on silently without it."""
    program = os.environ.get("MPS_MODEL")
    if program is None:
        return 0
    if mode == "without_mps":
        return 132
    order = f"model_attach {os.getpid()} {os.environ['CUDA_MPS_ACTIVE_THREAD_PERCENTAGE']}"
    done = subprocess.run([program], input=order, capture_output=True, text=True, check=True)
    return int(done.stdout)


def mode_of(job_id: str) -> str:
    modes = dict(item.split("=") for item in os.environ.get("PROBLEM", "").split(",") if item)
    return modes.get(job_id, modes.get("*", "good"))


def say(connection: Connection, report: Report) -> None:
    connection.send_bytes(encode(report))


def _sleep_for_ever(connection: Connection) -> None:
    """Deaf to orders, but leaves when its parent has gone, as a real worker would."""
    while True:
        try:
            if connection.poll(1.0):
                connection.recv_bytes()
        except (EOFError, OSError):
            sys.exit(0)


def _work(connection: Connection, job: Job, mode: str) -> None:
    share, version, turns = job.share, 1, 0
    config_id = ""
    if isinstance(job, InferenceJob):
        version, config_id = job.checkpoint.version, job.config.config_id
    while True:
        turns += 1
        if mode == "gpu_fault" and turns == 3:
            subprocess.run([os.environ["MPS_MODEL"]], input="model_fault", text=True, check=True)
            say(connection, JobBroken(kind="device", reason="CUDA error: an illegal memory access", fault=True))
            sys.exit(1)
        if mode == "crash_later" and turns == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        say(connection, Progress(count=turns, share_achieved=share, share=share))
        if isinstance(job, InferenceJob):
            say(connection, _stats(version, config_id))
        elif turns == NUM_TURNS and mode == "good" and not isinstance(job, CanaryJob):
            if isinstance(job, RetrainJob):
                say(connection, EpochDone(epoch=EpochResult(epoch=1, accuracy=0.5, loss=1.0, busy_s=0.1)))
            say(connection, JobDone(result=result_of(job)))
            return
        if not connection.poll(INTERVAL_S):
            continue
        try:
            command: Command = decode(connection.recv_bytes(), Command)
        except (EOFError, OSError):
            sys.exit(0)
        if isinstance(command, StopJob) and mode != "ignore_term":
            sys.exit(0)
        if isinstance(command, HandOver):
            say(connection, HandedOver(at_s=time.monotonic()))
            sys.exit(0)
        if isinstance(command, TakeOver):
            say(connection, TookOver(at_s=time.monotonic()))
        if isinstance(command, SetShare):
            share = command.share
        elif isinstance(command, SetInference):
            config_id = command.config.config_id
        elif isinstance(command, SwapModel):
            if command.checkpoint.path == "corrupt":
                say(connection, SwapRefused(version=command.checkpoint.version, reason="SHA-256 differs"))
            else:
                version = command.checkpoint.version
                say(connection, Swapped(version=version, gap_ms=0.0))


def _stats(version: int, config_id: str) -> StreamStats:
    numbers: dict[str, Any] = {"num_frames": 1, "num_analysed": 1, "num_dropped": 0, "num_objects": 2}
    return StreamStats(
        interval_s=INTERVAL_S,
        accuracy_sum=0.5,
        num_scored=1,
        latency_ms_p50=1.0,
        model_version=version,
        inference_id=config_id,
        **numbers,
    )


def result_of(job: LabelJob | TrialJob | RetrainJob) -> LabelResult | TrialResult | RetrainResult:
    stream_id = job.stream.stream_id
    if isinstance(job, LabelJob):
        dataset = DatasetRef(
            path="d", stream_id=stream_id, window=job.window, num_train=1, num_validation=1, class_counts=(1, 1)
        )
        return LabelResult(dataset=dataset, num_frames=1, seconds=0.1)
    if isinstance(job, TrialJob):
        return TrialResult(
            stream_id=stream_id, window=job.window, accuracy_now=0.5, retrain=(), inference=(), seconds=0.1
        )
    return RetrainResult(
        stream_id=stream_id,
        window=job.window,
        config=job.config,
        checkpoint=None,
        accuracy_before=0.4,
        accuracy_after=0.5,
        num_validation=10,
        epochs=(),
        busy_s=0.1,
        seconds=0.1,
        reason="a model worker makes no model",
    )
