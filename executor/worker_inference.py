"""The loop of an inference worker: frames come at the stream's rate, whatever happens here."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import statistics
import time
from pathlib import Path

from executor.learning.device import Device, step_back, step_forward
from executor.learning.inference import InferenceEngine, Outcome
from executor.learning.loading import ModelLoader, load_analyser
from executor.learning.signals import SignalSums
from executor.learning.task import task_of
from executor.links import (
    Command,
    HandedOver,
    HandOver,
    Ready,
    SetInference,
    StreamChanged,
    StreamStats,
    SwapModel,
    Swapped,
    SwapRefused,
    TakeOver,
    TookOver,
)
from executor.streams.feed import Feed
from executor.streams.frames import Frame
from executor.streams.health import Health
from executor.streams.video import SourceError
from executor.worker_link import Link
from protocol.logs import line
from protocol.messages import InferenceJob
from protocol.schema import CheckpointRef

_log = logging.getLogger(__name__)
_WELL = Health("ok")


class StreamServer:
    """Serves one stream until it is told to stop; answers changes of configuration and model between two frames.

    The stream does not wait for its worker to start: frames that arrive meanwhile queue up in ``feed`` or are dropped.
    A stream that gives no frames is reported, and costs next to nothing until it is back.
    Constructing it loads and warms up the first model: raises CheckpointError. ``standby``: as in StartJob.
    """

    def __init__(
        self, job: InferenceJob, feed: Feed, store: Path, device: Device, link: Link, standby: bool = False
    ) -> None:
        self._job, self._feed, self._store, self._device, self._link = job, feed, store, device, link
        # What a successor does to get ready is not to be felt by the worker that still serves the stream.
        self._priority = step_back() if standby else None
        analyser = load_analyser(store, job.checkpoint, job.stream, device, job.config.resolution_px)
        # The first crops of a source may cost a second (background, decoder): not a stream's first second.
        first = feed.first()
        if first is not None:
            with contextlib.suppress(SourceError):  # it is met again, and reported then
                analyser.analyse(first, job.config.resolution_px)
        self._engine = InferenceEngine(analyser, job.config, task_of(job.stream).judge)
        self._version = analyser.version
        self._loader: ModelLoader | None = None
        self._wanted: CheckpointRef | None = None
        self._result_at = time.monotonic()
        self._gap_s = 0.0
        self._took_over = False
        self._stats = _Stats(time.monotonic())
        self._conditions = ""
        self._health = self._trouble = _WELL
        self._standby = standby
        self._from_s, self._until_s = float("-inf"), float("inf")
        link.on_command = self._command

    def run(self, started: float, stats_interval_s: float) -> None:
        """Serve. ``started``: when the worker began, for its start-up time."""
        link = self._link
        link.send(Ready(pid=os.getpid(), startup_s=time.monotonic() - started, num_units=self._device.num_units))
        relieving = self._standby
        while self._standby and not link.stopping:
            link.wait(stats_interval_s)  # ends early when the order comes
        link.start_afresh()
        self._stats = _Stats(time.monotonic())
        while not link.stopping:
            taken = self._feed.take(time.monotonic())
            frame = taken.frame
            if not relieving:
                self._stats.lose(taken.num_lost)
            for lost in filter(self._is_ours, taken.dropped):
                self._process(lost, dropped=True)
            if frame is not None and self._feed.arrival_s(frame) >= self._until_s:
                break
            if frame is not None and self._is_ours(frame):
                self._process(frame, dropped=False)
                if relieving:
                    relieving = False
                    link.send(TookOver(at_s=self._result_at))
                link.step()
            elif frame is None:
                next_s = self._feed.next_s(time.monotonic())
                if next_s >= self._until_s:
                    break
                link.wait(min(next_s - time.monotonic(), stats_interval_s))
            self._watch()
            self._swap()
            if time.monotonic() - self._stats.since >= stats_interval_s:
                self._flush()
        self._flush()
        if self._until_s < float("inf"):
            link.send(HandedOver(at_s=self._result_at))

    def _is_ours(self, frame: Frame) -> bool:
        """Whether a frame came in this worker's time and not in another's of the same stream."""
        return self._from_s <= self._feed.arrival_s(frame) < self._until_s

    def _watch(self) -> None:
        """Tell when the stream becomes worse or better."""
        health = self._trouble if self._trouble != _WELL else self._feed.health(time.monotonic())
        if health.condition != self._health.condition:
            self._link.send(StreamChanged(condition=health.condition, reason=health.reason))
            self._health = health

    def _process(self, frame: Frame, *, dropped: bool) -> None:
        try:
            outcome = self._engine.process(frame, dropped=dropped)
        except SourceError as error:
            self._trouble = Health("garbage", str(error))
            self._stats.lose(1)
            return
        if outcome.analysed:
            self._trouble = _WELL
        now = time.monotonic()
        self._conditions = frame.conditions
        self._stats.add(outcome, dropped, (now - self._feed.arrival_s(frame)) * 1e3)
        if self._loader is not None or self._took_over:
            self._gap_s = max(self._gap_s, now - self._result_at)
        self._result_at = now
        if self._took_over:
            self._took_over = False
            self._link.send(Swapped(version=self._version, gap_ms=self._gap_s * 1e3))

    def _command(self, command: Command) -> None:
        if isinstance(command, SetInference):
            self._flush()  # counts belong to the configuration they were made with
            self._engine.config = command.config
        elif isinstance(command, SwapModel):
            self._wanted = command.checkpoint
        elif isinstance(command, TakeOver):
            self._standby, self._from_s = False, command.at_s
            step_forward(self._priority)
            self._feed.begin(command.at_s)
        elif isinstance(command, HandOver):
            self._until_s = command.at_s
        else:
            _log.warning(line("command_refused", reason=f"{type(command).__name__} while serving"))

    def _swap(self) -> None:
        """Between two frames: take over the model that is ready, start loading the one that is wanted."""
        loader = self._loader
        if loader is not None and loader.done:
            self._loader = None
            self._link.excuse(loader.busy_s)
            if loader.analyser is None:
                self._link.send(SwapRefused(version=loader.ref.version, reason=loader.error))
            else:
                self._flush()
                self._engine.analyser = loader.analyser
                self._version = loader.ref.version
                self._took_over = True
        if self._wanted is not None and self._loader is None and not self._took_over:
            wanted, self._wanted = self._wanted, None
            self._gap_s = 0.0
            resolution_px = self._engine.config.resolution_px
            self._loader = ModelLoader(self._store, wanted, self._job.stream, self._device, resolution_px)

    def _flush(self) -> None:
        now = time.monotonic()
        if self._stats.num_frames:
            config_id = self._engine.config.config_id
            memory_bytes = self._device.peak_memory_bytes()
            self._link.send(self._stats.report(now, self._version, config_id, self._conditions, memory_bytes))
        self._stats = _Stats(now)


def percentile(values: list[float], fraction: float) -> float:
    """The smallest value that at least ``fraction`` of all do not exceed; 0 of none."""
    return sorted(values)[max(0, math.ceil(fraction * len(values)) - 1)] if values else 0.0


class _Stats:
    """Counts since the last report."""

    def __init__(self, since: float) -> None:
        self.since = since
        self.num_frames = self.num_analysed = self.num_dropped = self.num_objects = self.num_scored = 0
        self.accuracy_sum = 0.0
        self.latencies_ms: list[float] = []
        self.signals = SignalSums()

    def lose(self, num_frames: int) -> None:
        """Frames that came and were given up, and that nothing else is known of."""
        self.num_frames += num_frames
        self.num_dropped += num_frames

    def add(self, outcome: Outcome, dropped: bool, latency_ms: float) -> None:
        self.num_frames += 1
        self.num_dropped += dropped
        self.num_objects += outcome.num_objects
        if outcome.accuracy is not None:
            self.num_scored += 1
            self.accuracy_sum += outcome.accuracy
        if outcome.analysed:
            self.num_analysed += 1
            self.latencies_ms.append(latency_ms)
        if outcome.found is not None:
            self.signals.add(outcome.found)

    def report(self, now: float, version: int, config_id: str, conditions: str, memory_bytes: int) -> StreamStats:
        return StreamStats(
            interval_s=now - self.since,
            num_frames=self.num_frames,
            num_analysed=self.num_analysed,
            num_dropped=self.num_dropped,
            num_objects=self.num_objects,
            accuracy_sum=self.accuracy_sum,
            num_scored=self.num_scored,
            latency_ms_p50=statistics.median(self.latencies_ms) if self.latencies_ms else 0.0,
            latency_ms_p99=percentile(self.latencies_ms, 0.99),
            model_version=version,
            inference_id=config_id,
            conditions=conditions,
            memory_bytes=memory_bytes,
            signals=self.signals.means(),
        )
