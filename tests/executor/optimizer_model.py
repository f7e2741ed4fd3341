"""An optimizer's end of the control connection, steered by a test, and jobs to send. Uses the real sockets."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import psutil
import zmq

from protocol.errors import ProtocolError
from protocol.messages import (
    Ack,
    ApplyPlan,
    Heartbeat,
    Hello,
    InferenceJob,
    Job,
    LabelJob,
    PlanApplied,
    RetrainJob,
    Snapshot,
    SnapshotRequest,
    ToClient,
    ToServer,
    Welcome,
)
from protocol.plan import PlanVersion
from protocol.schema import CheckpointRef, CitySource, DatasetRef, InferenceConfig, RetrainConfig, StreamSpec
from protocol.sockets import ControlServer
from tests.executor.a_core import CORE

T = TypeVar("T")


def stream(stream_id: str) -> StreamSpec:
    return StreamSpec(stream_id=stream_id, source=CitySource(seed=1), classes=("a", "b"))


def checkpoint(stream_id: str, version: int = 1, path: str = "m") -> CheckpointRef:
    return CheckpointRef(path=path, sha256=f"{version:064x}", stream_id=stream_id, version=version)


def inference(stream_id: str = "s1", share: float = 0.3, version: int = 1, **changes: Any) -> InferenceJob:
    values: dict[str, Any] = {
        "job_id": f"inference/{stream_id}",
        "stream": stream(stream_id),
        "share": share,
        "config": InferenceConfig(config_id="full"),
        "checkpoint": checkpoint(stream_id, version),
        "position_s": 0.0,
    }
    return InferenceJob(**{**values, **changes})


def label(stream_id: str = "s1", share: float = 0.2, window: int = 0, job_id: str = "") -> LabelJob:
    job_id = job_id or f"label/{stream_id}/{window}"
    return LabelJob(job_id=job_id, stream=stream(stream_id), share=share, window=window, from_s=0.0, to_s=1.0)


def retraining(stream_id: str = "s1", share: float = 0.4, window: int = 0, job_id: str = "") -> RetrainJob:
    dataset = DatasetRef(
        path="d", stream_id=stream_id, window=window, num_train=1, num_validation=1, class_counts=(1, 1)
    )
    return RetrainJob(
        job_id=job_id or f"retrain/{stream_id}/{window}",
        stream=stream(stream_id),
        share=share,
        window=window,
        dataset=dataset,
        checkpoint=checkpoint(stream_id),
        config=RetrainConfig(config_id="r1", epochs=1),
        next_version=2,
    )


def version(window: int = 0, revision: int = 0, term: int = 1) -> PlanVersion:
    return PlanVersion(term=term, window=window, revision=revision)


def plan(*jobs: Job, window: int = 0, revision: int = 0, term: int = 1, lifetime_s: float = 30.0) -> ApplyPlan:
    return ApplyPlan(version=version(window, revision, term), lifetime_s=lifetime_s, jobs=jobs)


class OptimizerModel:
    """Answers Hello by itself; everything else is the test's."""

    def __init__(self, term: int = 1, address: str = "tcp://127.0.0.1:0", silence_s: float = 5.0) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.server = ControlServer(self.context, address)
        self.address = self.server.address
        self.term = term
        self.silence_s = silence_s
        self.store = "/nowhere"
        self.telemetry = "tcp://127.0.0.1:9"
        self.peer = b""
        self.welcomes = True
        self.acknowledges = True
        self.received: list[ToServer] = []

    def turn(self, timeout_s: float = 0.05) -> list[ToServer]:
        """Take in what waits."""
        self.server.socket.poll(int(timeout_s * 1000))
        messages: list[ToServer] = []
        for peer, message in self.server.recv():
            if isinstance(message, ProtocolError):
                continue
            self.peer = peer
            messages.append(message)
            if isinstance(message, Hello) and self.welcomes:
                self.send(
                    Welcome(
                        term=self.term,
                        site="test",
                        store=self.store,
                        telemetry_address=self.telemetry,
                        heartbeat_s=0.1,
                        silence_s=self.silence_s,
                    )
                )
            if isinstance(message, SnapshotRequest):
                self.send(self._snapshot())
            event_id = getattr(message, "event_id", None)
            if event_id is not None and self.acknowledges:
                self.send(Ack(event_id=event_id))
        self.received += messages
        return messages

    def _snapshot(self) -> Snapshot:
        return Snapshot(
            protocol_version=1,
            site="test",
            term=self.term,
            window=0,
            sequence={},
            events=(),
            **{name: "tcp://127.0.0.1:9" for name in Snapshot.__struct_fields__ if name == "telemetry_address"},
        )

    def send(self, message: ToClient) -> None:
        self.server.send(self.peer, message)

    def wait_for(self, kind: type[T], condition: Callable[[T], bool] = lambda _: True, timeout_s: float = 30.0) -> T:
        """The first message of ``kind`` from now on that meets ``condition``. ``timeout_s`` is a hang bound."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            for message in self.turn():
                if isinstance(message, kind) and condition(message):
                    return message
        raise AssertionError(f"no {kind.__name__} came; received at last: {self.received[-5:]}")

    def apply(self, wanted: ApplyPlan) -> PlanApplied:
        self.send(wanted)
        return self.wait_for(PlanApplied, lambda answer: answer.version == wanted.version)

    def wait_until(self, condition: Callable[[Heartbeat], bool], timeout_s: float = 30.0) -> Heartbeat:
        return self.wait_for(Heartbeat, condition, timeout_s)

    def close(self) -> None:
        self.server.close()
        self.context.term()


def start_executor(
    address: str, folder: Path, name: str = "e1", problem: str = "", settings: str = "", device: str = CORE
) -> subprocess.Popen[bytes]:
    """The real console script with the problem worker in place of the real one."""
    config = folder / f"{name}.toml"
    text = (
        'worker = "tests.executor.problem_worker:main"\npreload = "tests.executor.problem_worker"\n'
        if "worker =" not in settings
        else ""
    )
    config.write_text(text + settings)
    command = [sys.executable, "-c", "from executor.cli import main; main()", "--device", device]
    command += ["--connect", address, "--id", name, "--config", str(config), "--log-level", "warning"]
    environment = {**os.environ, "PROBLEM": problem}
    return subprocess.Popen(command, env=environment)


def descendants(pid: int) -> list[psutil.Process]:
    """Every process below ``pid``: forkserver, resource tracker, workers, their helpers."""
    return psutil.Process(pid).children(recursive=True)


def wait_gone(processes: list[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Those of ``processes`` that are still alive after ``timeout_s``; zombies count as gone."""
    end = time.monotonic() + timeout_s
    alive = processes
    while alive and time.monotonic() < end:
        alive = [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        time.sleep(0.02)
    return alive
