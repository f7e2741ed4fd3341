"""Many cameras into one executor, while some of them are killed, frozen, spoilt and restarted at random."""

from __future__ import annotations

import contextlib
import math
import random
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import msgspec
import psutil
import zmq

from executor.learning.device import take_device
from executor.learning.labeling import label
from executor.learning.retraining import retrain
from executor.learning.stepping import FreeStepper
from protocol.errors import ProtocolError
from protocol.events import StreamAccuracy, StreamDegraded, StreamRecovered, WorkerChanged
from protocol.messages import Heartbeat, InferenceJob, LabelJob, RetrainJob
from protocol.schema import (
    CheckpointRef,
    CitySource,
    InferenceConfig,
    LiveSource,
    OracleGolden,
    RetrainConfig,
    StreamSpec,
)
from protocol.telemetry import event_of
from tests.cameras.film import CLASSES
from tests.executor import optimizer_model as model
from tests.executor.a_core import CORE

FPS = 10.0
SETTINGS = 'worker = "tests.cameras.truthful:main"\npreload = "tests.cameras.truthful"\n'
CONFIG = InferenceConfig(config_id="f1r32", resolution_px=32)
_TROUBLES = ("kill", "freeze", "noise", "garbage")
_WARM_S = 5.0  # the first results of a process pay for its set-up
_OPEN_S, _PAUSE_S, _STALL_S = 3.0, 2.0, 1.5
# How long a stream may take to come back: an attempt that began while the camera was unwell, and one that succeeds.
BACK_S = 2 * _OPEN_S + _PAUSE_S + 2.0
_SETTLED_S = BACK_S  # a camera that is left alone for so long after its trouble is healthy again


class Camera(Protocol):
    """What the soak does to a camera; a frozen, spoilt or killed one is well again after ``mend``."""

    @property
    def url(self) -> str: ...

    def hurt(self, how: str) -> None: ...

    def mend(self) -> None: ...

    def close(self) -> None: ...


class Trouble(msgspec.Struct, kw_only=True):
    """What was done to a camera, seconds since the start of the run; ``noticed_s`` None: nobody said the stream was
    degraded before it was mended, ``recovered_s`` None: nobody said that it was well again."""

    at_s: float
    how: str
    mended_s: float | None = None
    noticed_s: float | None = None
    recovered_s: float | None = None


class StreamTally(msgspec.Struct, kw_only=True):
    """What was seen of one stream while its camera was well, and how often it was not.

    ``twin_sum``, ``twin_scored``: accuracy of the calm twin, which shows the same, over the very same seconds.
    ``memory_mib``: unique memory of its worker, as in Outcome.
    """

    num_seconds: float = 0.0
    num_frames: int = 0
    num_dropped: int = 0
    accuracy_sum: float = 0.0
    num_scored: int = 0
    twin_sum: float = 0.0
    twin_scored: int = 0
    latencies_ms: list[float] = []
    num_degraded: int = 0
    num_recovered: int = 0
    troubles: list[Trouble] = []
    memory_mib: list[tuple[float, float]] = []

    @property
    def num_troubles(self) -> int:
        return len(self.troubles)

    @property
    def num_unnoticed(self) -> int:
        """Troubles that nobody told of; a little noise need not be seen."""
        return sum(t.noticed_s is None and t.how != "noise" for t in self.troubles)

    @property
    def recovery_s(self) -> list[float]:
        """From a camera's being well again to the stream's."""
        pairs = [(t.mended_s, t.recovered_s) for t in self.troubles if t.noticed_s is not None]
        return [recovered - mended for mended, recovered in pairs if mended is not None and recovered is not None]

    @property
    def fps(self) -> float:
        return self.num_frames / self.num_seconds if self.num_seconds else 0.0

    @property
    def accuracy(self) -> float:
        return self.accuracy_sum / self.num_scored if self.num_scored else 0.0

    @property
    def twin_accuracy(self) -> float:
        return self.twin_sum / self.twin_scored if self.twin_scored else 0.0


class Outcome(msgspec.Struct, kw_only=True):
    """The whole run. ``memory_mib``: (seconds since the start, unique memory of the executor and all its processes);
    ``executor_mib``: of the executor alone."""

    streams: dict[str, StreamTally]
    memory_mib: list[tuple[float, float]]
    executor_mib: list[tuple[float, float]]
    deaths: list[str]
    seconds: float
    busy_s: float

    @property
    def latency_ms_p99(self) -> float:
        """Of the seconds of all healthy streams: that 99 % of their per-second 99th percentiles do not exceed."""
        every = sorted(value for tally in self.streams.values() for value in tally.latencies_ms)
        return every[math.ceil(0.99 * len(every)) - 1] if every else 0.0

    def memory_slope(self) -> float:
        """Growth of memory, MiB per minute, over the second half."""
        return slope(self.memory_mib, self.seconds / 2)


def slope(points: Sequence[tuple[float, float]], from_s: float) -> float:
    """Growth per minute by least squares, of what was measured after ``from_s``; 0 of fewer than three points.

    >>> slope([(t, 5.0 + t / 30.0) for t in range(60)], 10.0)
    2.0
    """
    points = [point for point in points if point[0] > from_s]
    if len(points) < 3:
        return 0.0
    mean_t = sum(t for t, _ in points) / len(points)
    mean_m = sum(m for _, m in points) / len(points)
    spread = sum((t - mean_t) ** 2 for t, _ in points)
    return round(60.0 * sum((t - mean_t) * (m - mean_m) for t, m in points) / spread, 9)


def train_student(store: Path, size: tuple[int, int], seconds: float = 30.0) -> CheckpointRef:
    """A first model for all the streams, from the scenes of the films, by the product's own code."""
    spec = StreamSpec(
        stream_id="school",
        source=CitySource(seed=1, width=size[0], height=size[1], num_objects=8, drift_period_s=0.0),
        classes=CLASSES,
        fps=FPS,
        golden=OracleGolden(error_rate=0.0, seconds_per_frame=0.0),
        label_fps=4.0,
        crop_px=32,
    )
    device, stepper = take_device(CORE), FreeStepper()
    job = LabelJob(job_id="l", stream=spec, share=1.0, window=0, from_s=0.0, to_s=seconds)
    labels = label(job, _open(spec), store, device, stepper, 1)
    assert labels is not None
    config = RetrainConfig(config_id="first", epochs=10, learning_rate=2e-3)
    work = RetrainJob(
        job_id="t", stream=spec, share=1.0, window=0, dataset=labels.dataset, checkpoint=None, config=config,
        next_version=1,
    )  # fmt: skip
    result = retrain(work, store, device, stepper, lambda: None, lambda _: None)
    assert result is not None
    assert result.checkpoint is not None
    return result.checkpoint


def _add(event: StreamAccuracy, tallies: dict[str, StreamTally], is_well: Callable[[str], bool]) -> None:
    """Count a second of a stream that is well; of a calm one also for its twin, if that is well."""
    twin = event.stream_id.replace("calm", "hurt")
    if twin != event.stream_id and twin in tallies and is_well(twin):
        tallies[twin].twin_sum += event.accuracy_sum
        tallies[twin].twin_scored += event.num_scored
    if is_well(event.stream_id):
        tally = tallies[event.stream_id]
        tally.num_seconds += event.num_analysed / event.fps if event.fps else 1.0
        tally.num_frames += event.num_analysed
        tally.num_dropped += event.num_dropped
        tally.accuracy_sum += event.accuracy_sum
        tally.num_scored += event.num_scored
        tally.latencies_ms.append(event.latency_ms_p99)


def _open(spec: StreamSpec):  # type: ignore[no-untyped-def]
    from executor.streams.open import open_source

    return open_source(spec)


class Soak:
    """One executor that serves pairs of cameras with the same films: ``calm-K``, to which nothing happens, and
    ``hurt-K``. Cameras 2K-2 and 2K-1 show the film of seed K. ``store`` holds the checkpoint."""

    def __init__(self, folder: Path, store: Path, checkpoint: CheckpointRef, cameras: Sequence[Camera]) -> None:
        self.cameras = dict(enumerate(cameras))
        self.names = [f"{'hurt' if number % 2 else 'calm'}-{number // 2 + 1}" for number in self.cameras]
        self._model = model.OptimizerModel()
        self._model.store = str(store)
        self._telemetry = self._model.context.socket(zmq.SUB)
        self._telemetry.setsockopt(zmq.SUBSCRIBE, b"")
        self._telemetry.setsockopt(zmq.LINGER, 0)
        self._model.telemetry = f"tcp://127.0.0.1:{self._telemetry.bind_to_random_port('tcp://127.0.0.1')}"
        self._executor: subprocess.Popen[bytes] = model.start_executor(self._model.address, folder, settings=SETTINGS)
        self._model.wait_for(Heartbeat)
        share = math.floor(1000 / len(self.names)) / 1000
        jobs = [self._job(number, checkpoint, share) for number in self.cameras]
        self._model.apply(model.plan(*jobs))
        self._beat: Heartbeat | None = None
        self.deaths: list[str] = []

    def _job(self, number: int, checkpoint: CheckpointRef, share: float) -> InferenceJob:
        name = self.names[number]
        source = LiveSource(
            url=self.cameras[number].url,
            open_timeout_s=_OPEN_S,
            stall_s=_STALL_S,
            backoff_max_s=_PAUSE_S,
            keep_s=20.0,
        )
        spec = StreamSpec(stream_id=name, source=source, classes=CLASSES, fps=FPS, crop_px=32)
        return InferenceJob(
            job_id=f"serve/{name}", stream=spec, share=share, config=CONFIG, checkpoint=checkpoint, position_s=0.0
        )

    def run(
        self, seconds: float, seed: int, trouble_every_s: float, on_progress: Callable[[str], None] = lambda _: None
    ) -> Outcome:
        """Hurt cameras for ``seconds``."""
        tallies = {name: StreamTally() for name in self.names}
        self._await_streams()
        draw = random.Random(seed)
        start = time.monotonic()
        unwell_until: dict[str, float] = defaultdict(lambda: -1.0)
        hurt: dict[int, float] = {}
        memory: list[tuple[float, float]] = []
        executor: list[tuple[float, float]] = []
        next_trouble, next_memory, num_hurts = start + 2.0, start, 0
        while (now := time.monotonic()) < start + seconds:
            if now >= next_trouble:
                next_trouble = now + draw.uniform(0.5, 1.5) * trouble_every_s
                well = [n for n in self.cameras if n % 2 and n not in hurt and now > unwell_until[self.names[n]]]
                if well and now < start + seconds - 15.0:
                    number, how = draw.choice(well), draw.choice(_TROUBLES) if num_hurts else "kill"
                    num_hurts += 1
                    self.cameras[number].hurt(how)
                    hurt[number] = now + draw.uniform(3.0, 6.0)
                    tallies[self.names[number]].troubles.append(Trouble(at_s=now - start, how=how))
                    unwell_until[self.names[number]] = float("inf")
                    on_progress(f"{now - start:6.1f} s: {self.names[number]} {how}")
            for number, until in list(hurt.items()):
                if now >= until:
                    self.cameras[number].mend()
                    del hurt[number]
                    tallies[self.names[number]].troubles[-1].mended_s = time.monotonic() - start
                    unwell_until[self.names[number]] = time.monotonic() + _SETTLED_S
            if now >= next_memory:
                next_memory = now + 2.0
                taken = self._memory_mib()
                memory.append((now - start, sum(taken.values())))
                executor.append((now - start, taken.get("", 0.0)))
                for name in taken.keys() & tallies.keys():
                    tallies[name].memory_mib.append((now - start, taken[name]))
            self._take(tallies, unwell_until, start)
        beat = self._beat
        assert beat is not None
        ready = {worker.stream_id for worker in beat.workers if worker.state == "ready"}
        assert ready == set(self.names), f"no worker serves {set(self.names) - ready}"
        assert self._executor.poll() is None
        processes = [psutil.Process(self._executor.pid), *model.descendants(self._executor.pid)]
        return Outcome(
            streams=tallies,
            memory_mib=memory,
            executor_mib=executor,
            deaths=self.deaths,
            seconds=seconds,
            busy_s=sum(sum(process.cpu_times()[:2]) for process in processes),
        )

    def _await_streams(self) -> None:
        """Until every stream has given results, at most two minutes."""
        seen: set[str] = set()
        end = time.monotonic() + 120.0
        while seen != set(self.names):
            assert time.monotonic() < end, f"no results of {set(self.names) - seen}"
            seen |= {event.stream_id for event in self._events() if isinstance(event, StreamAccuracy)}
        end = time.monotonic() + _WARM_S
        while time.monotonic() < end:
            self._events()

    def _take(self, tallies: dict[str, StreamTally], unwell_until: dict[str, float], start: float) -> None:
        for event in self._events():
            now = time.monotonic()
            if isinstance(event, WorkerChanged) and event.change == "failed":
                self.deaths.append(f"{event.stream_id}: {event.reason}")
            if isinstance(event, StreamDegraded):
                tally = tallies[event.stream_id]
                tally.num_degraded += 1
                if tally.troubles and tally.troubles[-1].noticed_s is None:
                    tally.troubles[-1].noticed_s = now - start
            elif isinstance(event, StreamRecovered):
                tally = tallies[event.stream_id]
                tally.num_recovered += 1
                if tally.troubles:
                    tally.troubles[-1].recovered_s = now - start
            elif isinstance(event, StreamAccuracy):
                _add(event, tallies, lambda name, now=now: now > unwell_until[name])  # type: ignore[misc]

    def _events(self) -> list[object]:
        for message in self._model.turn(0.02):
            if isinstance(message, Heartbeat):
                self._beat = message
        self._model.received.clear()
        events: list[object] = []
        while self._telemetry.poll(0):
            try:
                events.append(event_of(self._telemetry.recv_multipart()).event)
            except ProtocolError:
                continue
        return events

    def _memory_mib(self) -> dict[str, float]:
        """Unique memory by stream; "": the executor; other names: what else it runs."""
        streams = {worker.pid: worker.stream_id for worker in self._beat.workers} if self._beat else {}
        taken: dict[str, float] = {}
        for process in [psutil.Process(self._executor.pid), *model.descendants(self._executor.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                name = "" if process.pid == self._executor.pid else streams.get(process.pid, f"process {process.pid}")
                taken[name] = taken.get(name, 0.0) + process.memory_full_info().uss / 2**20
        return taken

    def close(self) -> None:
        self._executor.terminate()
        try:
            self._executor.wait(20)
        except subprocess.TimeoutExpired:
            self._executor.kill()
            self._executor.wait()
        self._telemetry.close()
        self._model.close()
        for camera in self.cameras.values():
            camera.close()
