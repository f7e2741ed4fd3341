"""What follows from drift: a score per stream and window, and a stream that drifts suddenly is looked after at once.

An alarm in the middle of a window has the running retraining of that stream dropped (it learns a scene that has gone),
the newest frames labelled, the trials made again and the rest of the window planned anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from optimizer.config import SiteConfig
from optimizer.drifting import Detector
from optimizer.emitter import Emitter
from optimizer.following import used_shares
from optimizer.labels import Labels
from optimizer.pipeline import Pipeline, begin_anew
from optimizer.state import DriftAlarm, ExecutorState, SiteState, StreamState
from protocol.events import DriftScored, StreamAccuracy
from protocol.schema import CheckpointRef

_LEAST_SHARE = 0.05


class Drifts:
    """One detector per stream. ``settle``: a retraining is over without a result."""

    def __init__(
        self,
        site: SiteConfig,
        state: SiteState,
        emit: Emitter,
        want: Callable[[str], None],
        settle: Callable[[StreamState], None],
        labels: Labels,
    ) -> None:
        self._site = site
        self._state = state
        self._emit = emit
        self._want = want
        self._settle = settle
        self._labels = labels
        self._detectors: dict[str, Detector] = {}
        self._versions: dict[str, int] = {}
        self._seen_s: dict[str, float] = {}

    def measured(self, event: StreamAccuracy, now: float) -> None:
        """Signals of a stream's serving. A new model has a new idea of what is normal."""
        stream = self._state.streams.get(event.stream_id)
        if stream is None or event.signals is None:
            return
        before = self._seen_s.get(event.stream_id)
        self._seen_s[event.stream_id] = now
        if before is None:
            return
        detector = self._detectors.setdefault(event.stream_id, Detector())
        if self._versions.get(event.stream_id) != event.model_version:
            self._versions[event.stream_id] = event.model_version
            detector.reset()
        report = detector.add(event.signals, min(5.0, max(0.0, now - before)))
        if report is None:
            return
        stream.drift, stream.doubt = report.score, detector.doubt
        if report.alarm:
            self._tell(stream, report.signal, alarm=True)
            detector.reset(new_model=False)
            self._alarm(stream, report.signal, now)

    def labelled(self, stream_id: str, model: CheckpointRef | None, accuracy: float | None, num_pieces: int) -> None:
        """Golden labels say what ``model`` gets right; they count for the drift when it is the one that serves."""
        stream = self._state.streams.get(stream_id)
        if stream is None or stream.checkpoint is None or model is None or accuracy is None:
            return
        # What is normal is a matter of the model whose signals come in; another one's labels would mix the two.
        if model.version != stream.checkpoint.version or self._versions.get(stream_id, model.version) != model.version:
            return
        detector = self._detectors.setdefault(stream_id, Detector())
        expected = stream.profile.accuracy_now if stream.profile is not None else None
        stream.drift = detector.labelled(accuracy, num_pieces, expected).score

    def window_over(self) -> None:
        """Say how far every stream is when its window ends."""
        for stream in self._state.streams.values():
            if stream.drift is not None:
                detector = self._detectors.get(stream.stream_id)
                self._tell(stream, detector.report.signal if detector else "", alarm=False)

    def advance(self, now: float) -> None:
        """The frames after an alarm have come: label them; then plan with what was learned."""
        state = self._state
        if state.phase != "executing":
            return
        for stream in state.streams.values():
            alarm = stream.alarm
            if alarm is None or stream.awaits_trial:
                continue
            if alarm.stage == "profiling":
                stream.alarm, stream.settled = None, False
                self._want(f"{stream.stream_id} was profiled after its drift")
            elif now - alarm.since_s >= self._site.drift.label_s:
                begin_anew(state, stream)
                stream.alarm = DriftAlarm(since_s=alarm.since_s, stage="profiling")
                self._want(f"{stream.stream_id} is profiled after its drift")

    def assign(self, pipeline: Pipeline, executors: Mapping[str, ExecutorState], now: float) -> None:
        """Label and profile the streams that drifted, in the room that there is."""
        state = self._state
        if state.phase != "executing" or not any(s.alarm is not None for s in state.streams.values()):
            return
        used = used_shares(state, executors)
        for executor_id in sorted(used):
            share = min(state.profiling_share, 1.0 - used[executor_id])
            if share >= _LEAST_SHARE:
                pipeline.assign({executor_id: executors[executor_id]}, now, share)

    def _alarm(self, stream: StreamState, signal: str, now: float) -> None:
        state, config = self._state, self._site.drift
        left = state.window_opened_s + self._site.window_s - now
        worth = config.react and left >= config.least_left * self._site.window_s and stream.alarm is None
        if (
            not worth
            or not self._labels.affords_alarm(stream)
            or state.phase != "executing"
            or stream.awaits_trial
            or stream.stream_id in state.shed
        ):
            return
        stream.alarm = DriftAlarm(since_s=now)
        self._settle(stream)
        self._want(f"{stream.stream_id} drifts ({signal})")
        self._emit.save()

    def _tell(self, stream: StreamState, signal: str, *, alarm: bool) -> None:
        self._emit.publish(
            DriftScored(
                stream_id=stream.stream_id,
                window=self._state.window,
                score=min(1.0, max(0.0, stream.drift or 0.0)),
                signal=signal,
                alarm=alarm,
            )
        )
