"""A site made from a trace: what is true (`TraceWorld`) and what the planner is told (`TraceProfiler`).

Every window begins with the trace's own accuracy, whatever was retrained before, as each window of a
trace was measured by itself. A retraining takes the measured GPU-seconds and reaches the measured
accuracy, also where the planner was told otherwise.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import msgspec

from optimizer.config import BootstrapConfig, GateConfig, ProfilingConfig, SiteConfig
from optimizer.ports import GateEvidence
from optimizer.simulator import exact_votes
from optimizer.trace_cloud import LINKS, MODEL_MB, SENT_PART, VIDEO_MBPS
from optimizer.trace_reuse import OldModel, ReuseTable, retrain_id
from optimizer.traces import DrawnStream, InferenceTable, Trace, TracedRetraining, TracedWindow
from protocol import messages as m
from protocol.events import StreamAccuracy
from protocol.plan import CloudProfile, InferenceProfile, RetrainProfile, StreamProfile
from protocol.schema import (
    CanaryResult,
    CheckpointRef,
    CitySource,
    DatasetRef,
    InferenceConfig,
    LabelResult,
    LinkSpec,
    Record,
    RetrainConfig,
    RetrainResult,
    RetrainRun,
    StreamSpec,
    TrialResult,
)

_CLASSES = ("object", "other")
_NUM_LABELS = 100  # labels are free here; enough for the coordinator to go on


class StudyKnobs(Record, frozen=True, kw_only=True):
    """How a trace is turned into a site.

    ``predicted``: the planner sees the trace's predictions instead of its measurements. ``full_share``:
    GPU share that analysing every frame takes. ``profiling``: whether micro-profiling takes its
    measured GPU-seconds at the start of every window, or nothing. ``gate``: whether a model that is
    no better than the serving one is refused. ``min_accuracy``: floor of every stream.
    ``link``: name of a link to a cloud (``trace_cloud.LINKS``) over which every stream may be retrained with the
    configuration that promises most, besides those on the site's GPUs; "" = none. ``planning_quantile``: plans are
    made on this quantile of the gains, whose errors are those of the trace's predictions.
    """

    num_windows: int = 3
    window_s: float = 200.0
    predicted: bool = False
    full_share: float = 0.25
    share_quantum: float = 0.1
    profiling: bool = False
    gate: bool = True
    gate_margin: float = 0.0
    min_accuracy: float = 0.0
    link: str = ""
    planning_quantile: float = 0.5

    @property
    def warm_up(self) -> int:
        """Windows before those that count: the first window of a site is not profiled inside itself."""
        return 1 if self.profiling else 0


class TraceSite:
    """The streams of a study with their windows and choices; ``window`` counts from the first that is measured."""

    def __init__(
        self,
        trace: Trace,
        table: InferenceTable,
        streams: tuple[DrawnStream, ...],
        knobs: StudyKnobs,
        reuse: ReuseTable | None = None,
    ) -> None:
        self.knobs, self._reuse = knobs, reuse
        self._prediction_error = _prediction_error(trace) if knobs.predicted else 0.0
        self.streams = {stream.stream_id: stream for stream in streams}
        self._trace, self._table = trace, table
        self._subsampling = _subsampling(knobs)
        self.inference = tuple(_inference_config(n) for n in self._subsampling.values())

    def config(self, policy: str) -> SiteConfig:
        """The site file of the study."""
        knobs = self.knobs
        specs = tuple(
            StreamSpec(
                stream_id=stream_id,
                source=CitySource(seed=index),
                classes=_CLASSES,
                min_accuracy=knobs.min_accuracy,
            )
            for index, stream_id in enumerate(self.streams)
        )
        # Accuracies are exact here: nothing is left to doubt or to a canary.
        gate = GateConfig(margin=knobs.gate_margin, confidence=0.5, canary_s=0.0, always_promote=not knobs.gate)
        return SiteConfig(
            name="study",
            streams=specs,
            inference=self.inference,
            window_s=knobs.window_s,
            policy=policy,
            share_quantum=knobs.share_quantum,
            bootstrap=BootstrapConfig(seconds=1.0),
            # What costs nothing needs no room, but the coordinator's form wants a share.
            # A trace's windows begin with a step: nothing of one can be known before it opens, nor be tried beside it.
            profiling=msgspec.structs.replace(
                ProfilingConfig(when="before"),
                share=ProfilingConfig().share if knobs.profiling else knobs.share_quantum,
            ),
            gate=gate,
            migration_s=0.0,
            planning_quantile=knobs.planning_quantile,
            config_change_s=0.0,
        )

    @property
    def links(self) -> tuple[LinkSpec, ...]:
        """The link of the study, if it has one."""
        if not self.knobs.link:
            return ()
        up_mbps, down_mbps = LINKS[self.knobs.link]
        name = self.knobs.link.replace("cloud:", "")
        return (LinkSpec(link_id=name, up_bytes_per_s=up_mbps * 1e6 / 8, down_bytes_per_s=down_mbps * 1e6 / 8),)

    def window(self, stream_id: str, window: int) -> TracedWindow:
        """The trace's window behind a window of the site."""
        windows = self._trace.cities[self.streams[stream_id].city]
        return windows[max(0, window - self.knobs.warm_up) % len(windows)]

    def relative_accuracy(self, stream_id: str, config_id: str) -> float:
        """What an inference configuration keeps of a stream's full-rate accuracy."""
        return self._table.relative_accuracy(self.streams[stream_id].camera, self._subsampling[config_id])

    def profile(self, stream_id: str, window: int) -> StreamProfile:
        """What the planner is told at the start of a window. Nothing is retrained in the warm-up."""
        traced = self.window(stream_id, window)
        retrainings = traced.retrainings if window >= self.knobs.warm_up else ()
        return StreamProfile(
            stream_id=stream_id,
            accuracy_now=traced.accuracy_now,
            cloud=self._in_cloud(tuple(self._choice(one) for one in retrainings), traced.accuracy_now),
            inference=tuple(
                InferenceProfile(
                    inference_id=config.config_id,
                    gpu_share_needed=self.knobs.full_share / self._subsampling[config.config_id],
                    relative_accuracy=self.relative_accuracy(stream_id, config.config_id),
                    config=config,
                )
                for config in self.inference
            ),
            retrain=(
                *(self._choice(traced_retraining) for traced_retraining in retrainings),
                *(
                    RetrainProfile(
                        retrain_id=name,
                        accuracy_after=old.accuracy,
                        gpu_seconds=old.gpu_seconds,
                        config=RetrainConfig(config_id=name, epochs=1),
                    )
                    for name, old in self.old_models(stream_id, window).items()
                ),
            ),
        )

    def _in_cloud(self, choices: Sequence[RetrainProfile], accuracy_now: float) -> tuple[CloudProfile, ...]:
        """The configuration that promises most, retrained in the cloud: the sizes are those of ``trace_cloud``."""
        best = max(choices, key=lambda choice: choice.accuracy_after, default=None)
        if not self.links or best is None or best.accuracy_after <= accuracy_now:
            return ()
        sent_bytes = VIDEO_MBPS * SENT_PART * self.knobs.window_s * 1e6 / 8
        return (
            CloudProfile(
                retrain_id=f"cloud.{best.retrain_id}",
                link_id=self.links[0].link_id,
                accuracy_after=best.accuracy_after,
                up_bytes=round(sent_bytes),
                cloud_seconds=0.0,
                down_bytes=round(MODEL_MB * 1e6 / 8),
                accuracy_error=best.accuracy_error,
                config=best.config,
            ),
        )

    def old_models(self, stream_id: str, window: int) -> dict[str, OldModel]:
        """By the name of the choice: the old model that each policy of reuse would load. None in the warm-up."""
        if self._reuse is None or window < self.knobs.warm_up:
            return {}
        city, number = self.streams[stream_id].city, self.window(stream_id, window).number
        picked = {retrain_id(name): self._reuse.pick(name, city, number) for name in self._reuse.policies}
        return {name: old for name, old in picked.items() if old is not None}

    def _choice(self, traced: TracedRetraining) -> RetrainProfile:
        accuracy_after, gpu_seconds = traced.accuracy_after, traced.gpu_seconds
        if self.knobs.predicted:
            assert traced.accuracy_after_predicted is not None
            assert traced.gpu_seconds_predicted is not None
            accuracy_after, gpu_seconds = traced.accuracy_after_predicted, traced.gpu_seconds_predicted
        return RetrainProfile(
            retrain_id=traced.retrain_id,
            accuracy_after=accuracy_after,
            gpu_seconds=gpu_seconds,
            accuracy_error=self._prediction_error,
            config=RetrainConfig(config_id=traced.retrain_id, epochs=traced.epochs),
        )


def _prediction_error(trace: Trace) -> float:
    """Root mean square of what the trace's predictions of the accuracy are off."""
    squares = [
        (one.accuracy_after - one.accuracy_after_predicted) ** 2
        for windows in trace.cities.values()
        for window in windows
        for one in window.retrainings
        if one.accuracy_after_predicted is not None
    ]
    return math.sqrt(sum(squares) / len(squares)) if squares else 0.0


def _subsampling(knobs: StudyKnobs) -> dict[str, float]:
    """Inference configurations by id: one frame in N. One for every share that is a multiple of the quantum.

    A configuration in between would be granted the next multiple anyway.
    """
    found: dict[str, float] = {"n1": 1.0}
    quanta = 1
    while quanta * knobs.share_quantum < knobs.full_share - 1e-9:
        subsampling = knobs.full_share / (quanta * knobs.share_quantum)
        found[f"n{subsampling:.4g}"] = subsampling
        quanta += 1
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _inference_config(subsampling: float) -> InferenceConfig:
    return InferenceConfig(config_id=f"n{subsampling:.4g}", frame_interval=max(1, round(subsampling)))


# ---------------------------------------------------------------- what is true


class TraceWorld:
    """What jobs cost and models are worth, by the trace. ``started`` counts retrainings per window."""

    def __init__(self, site: TraceSite) -> None:
        self._site = site
        self._models: dict[str, tuple[int, float]] = {}  # checksum -> window that it was trained in, accuracy there
        self.started: list[tuple[str, int]] = []

    def label(self, job: m.LabelJob) -> tuple[float, LabelResult]:
        """Labels cost nothing."""
        dataset = DatasetRef(
            path="trace",
            stream_id=job.stream.stream_id,
            window=job.window,
            num_train=_NUM_LABELS,
            num_validation=_NUM_LABELS,
            class_counts=(_NUM_LABELS, 0),
        )
        return 0.0, LabelResult(dataset=dataset, num_frames=_NUM_LABELS, seconds=0.0)

    def trial(self, job: m.TrialJob) -> tuple[float, TrialResult]:
        """Micro-profiling costs what the trace says, or nothing."""
        traced = self._site.window(job.stream.stream_id, job.window)
        knobs = self._site.knobs
        cost_s = 0.0
        if knobs.profiling and job.window >= knobs.warm_up and traced.microprofile_s is not None:
            cost_s = traced.microprofile_s
        return cost_s, TrialResult(
            stream_id=job.stream.stream_id,
            window=job.window,
            accuracy_now=traced.accuracy_now,
            retrain=(),
            inference=(),
            seconds=cost_s,
        )

    def retrain(self, job: m.RetrainJob) -> tuple[float, RetrainResult]:
        """The measured retraining; the very first model of a stream is free."""
        stream_id, name = job.stream.stream_id, job.config.config_id
        window = self._site.window(stream_id, job.window)
        before = after = window.accuracy_now
        cost_s = 0.0
        if job.checkpoint is not None:
            before = self._model(stream_id, job.window, job.checkpoint)
            old = self._site.old_models(stream_id, job.window).get(name)
            traced = next((t for t in window.retrainings if t.retrain_id == name), None)
            if traced is not None:
                after, cost_s = traced.accuracy_after, traced.gpu_seconds
            elif old is not None:
                after, cost_s = old.accuracy, old.gpu_seconds
            self.started.append((stream_id, job.window))
        checksum = hashlib.sha256(job.job_id.encode()).hexdigest()
        self._models[checksum] = (job.window if job.checkpoint is not None else -1, after)
        return cost_s, RetrainResult(
            stream_id=stream_id,
            window=job.window,
            config=job.config,
            checkpoint=CheckpointRef(path="trace", sha256=checksum, stream_id=stream_id, version=job.next_version),
            accuracy_before=before,
            accuracy_after=after,
            num_validation=_NUM_LABELS,
            epochs=(),
            busy_s=cost_s,
            seconds=cost_s,
            paired=exact_votes(before, after),
        )

    def canary(self, job: m.CanaryJob) -> tuple[float, CanaryResult]:
        """Not asked for: what the trace says of a model is final."""
        raise NotImplementedError("a trace has no live frames; its site has no canary")

    def accuracy(self, stream_id: str, window: int, checkpoint: CheckpointRef, config: InferenceConfig) -> float:
        """Instantaneous accuracy: a * q."""
        return self._model(stream_id, window, checkpoint) * self._site.relative_accuracy(stream_id, config.config_id)

    def _model(self, stream_id: str, window: int, checkpoint: CheckpointRef) -> float:
        trained, accuracy = self._models[checkpoint.sha256]
        return accuracy if trained == window else self._site.window(stream_id, window).accuracy_now


# ---------------------------------------------------------------- what the planner is told


class _Wish(Record, frozen=True, kw_only=True):
    retrain: tuple[RetrainConfig, ...] = ()
    inference: tuple[InferenceConfig, ...] = ()
    data_share: float = 0.1
    num_epochs: int = 1
    num_frames: int = 1


class TraceProfiler:
    """Tells the coordinator the trace's measurements or predictions. Remembers every retraining's fate."""

    def __init__(self, site: TraceSite) -> None:
        self._site = site

    def choose(
        self,
        spec: StreamSpec,
        window: int,
        dataset: DatasetRef,
        *,
        drift: float | None = None,
        price: float | None = None,
        wait_share: float | None = None,
    ) -> _Wish:
        """Trials are not run: their outcome is in the trace."""
        return _Wish()

    def estimate(self, spec: StreamSpec, trial: TrialResult, dataset: DatasetRef) -> StreamProfile:
        """The profile of the window that the trial was made in."""
        return self._site.profile(spec.stream_id, trial.window)

    def retrained(
        self,
        spec: StreamSpec,
        result: RetrainResult,
        predicted: float,
        predicted_s: float,
        promoted: bool,
        run: RetrainRun | None = None,
    ) -> None:
        """Nothing is learnt: the trace has its own predictions."""

    def record_gate(self, decision: GateEvidence) -> None:
        """Nothing is learnt."""

    def share_efficiency(self, device: str) -> tuple[tuple[float, float], ...]:
        """The trace's devices are what the site says."""
        return ()

    def measured(self, event: StreamAccuracy) -> None:
        """Nothing is learnt."""

    def window_closed(self, stream_id: str, window: int, predicted: float | None, realised: float | None) -> None:
        """Nothing is learnt."""


def initial_gpus(count: int) -> tuple[str, ...]:
    """Names of the GPUs of a study."""
    width = len(str(count - 1))
    return tuple(f"gpu{index:0{width}d}" for index in range(count))
