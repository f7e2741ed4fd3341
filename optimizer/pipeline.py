"""Labelling, bootstrap and micro-profiling as a queue of jobs, one at a time per executor. Pure.

Stages of a stream: label -> [train, only for the first model] -> trial -> done.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from optimizer.config import SiteConfig
from optimizer.ports import Output, ProfilerPort, Publish
from optimizer.state import ExecutorState, PipelineJob, SiteState, StreamState
from protocol.events import LabelsCollected, ProfileEstimated
from protocol.messages import LabelJob, RetrainJob, TrialJob
from protocol.schema import LabelResult, LiveSource, RetrainConfig, RetrainResult, StreamSpec, TrialResult

# With fewer labelled crops, or frames of a detection stream, on either side neither a trial nor its validation says
# anything. A frame holds several objects.
_LEAST_EXAMPLES = {"classification": 8, "detection": 4}

BOOTSTRAP_ID = "bootstrap"


class Pipeline:
    """Works on the site's state; remembers nothing itself."""

    def __init__(
        self, site: SiteConfig, profiler: ProfilerPort, state: SiteState, specs: Mapping[str, StreamSpec]
    ) -> None:
        self._site = site
        self._profiler = profiler
        self._state = state
        self._specs = specs

    def assign(self, executors: Mapping[str, ExecutorState], now: float, share: float) -> None:
        """Give every idle executor the next job, a stream's own executor first."""
        state = self._state
        for stream in state.streams.values():
            if stream.degraded and stream.checkpoint and stream.stage in ("label", "trial"):
                stream.stage = "done"  # nothing new was seen of it; it keeps its last estimates
        for executor_id in sorted(executors):
            if executor_id in state.pipeline:
                continue
            taken = {job.stream.stream_id for job in state.pipeline.values()}
            waiting = [s for s in state.streams.values() if s.stage != "done" and s.stream_id not in taken]
            # What was begun is finished first; then those that fell behind what was predicted, as they have drifted,
            # should the time for profiling not reach for all. A stream is profiled where it is served if possible.
            waiting.sort(key=lambda s: (s.stage == "label", -round(s.shortfall, 2), s.serving_executor != executor_id))
            if waiting:
                state.pipeline[executor_id] = self._job(waiting[0], now, share)

    def labelled(self, job_id: str, result: LabelResult) -> list[Output]:
        """The data set of a stream's window is there."""
        stream = self._take(job_id)
        if stream is None:
            return []
        dataset = result.dataset
        stream.dataset = dataset
        enough = min(dataset.num_train, dataset.num_validation) >= _LEAST_EXAMPLES[self._specs[stream.stream_id].task]
        if stream.checkpoint is None:
            stream.stage = "train"
        else:
            stream.stage = "trial" if enough else "done"
        return [
            Publish(
                event=LabelsCollected(
                    stream_id=stream.stream_id,
                    window=dataset.window,
                    num_frames=result.num_frames,
                    num_train=dataset.num_train,
                    num_validation=dataset.num_validation,
                    class_counts=dataset.class_counts,
                    seconds=result.seconds,
                )
            )
        ]

    def tried(self, job_id: str, result: TrialResult) -> list[Output]:
        """The trials of a stream are over: estimate its profile."""
        stream = self._take(job_id)
        if stream is None or stream.dataset is None:
            return []
        stream.stage = "done"
        profile = self._profiler.estimate(self._specs[stream.stream_id], result, stream.dataset)
        stream.profile = profile
        return [
            Publish(
                event=ProfileEstimated(
                    stream_id=stream.stream_id,
                    window=result.window,
                    accuracy_now=profile.accuracy_now,
                    accuracy_low=result.accuracy_low,
                    accuracy_high=result.accuracy_high,
                    inference=tuple(
                        (p.config, p.gpu_share_needed, p.relative_accuracy) for p in profile.inference if p.config
                    ),
                    retrain=tuple((p.config, p.gpu_seconds, p.accuracy_after) for p in profile.retrain if p.config),
                )
            )
        ]

    def bootstrapped(self, job_id: str, result: RetrainResult) -> bool:
        """The first model of a stream is there; False when the job is none of ours."""
        stream = self._take(job_id)
        if stream is None or result.checkpoint is None:
            return False
        stream.checkpoint = result.checkpoint
        stream.stage = "trial"
        return True

    def failed(self, job_id: str) -> bool:
        """A pipeline job failed: the stream goes without it. False when the job is none of ours."""
        stream = self._take(job_id)
        if stream is None:
            return False
        stream.stage = "done"
        return True

    def cut_off(self) -> None:
        """Drop what is still to be done in this window; the streams keep their last estimates."""
        self._state.pipeline.clear()
        for stream in self._state.streams.values():
            stream.stage = "done"

    def finished(self) -> bool:
        """Nothing runs and nothing waits."""
        return not self._state.pipeline and all(s.stage == "done" for s in self._state.streams.values())

    def _take(self, job_id: str) -> StreamState | None:
        for executor_id, job in list(self._state.pipeline.items()):
            if job.job_id == job_id:
                del self._state.pipeline[executor_id]
                return self._state.streams.get(job.stream.stream_id)
        return None

    def _job(self, stream: StreamState, now: float, share: float) -> PipelineJob:
        spec, state, site = self._specs[stream.stream_id], self._state, self._site
        window = max(state.window, 0)
        first = state.origin_s is None
        position = spec.start_s + (0.0 if state.origin_s is None else state.window_opened_s - state.origin_s)
        urgent = stream.alarm is not None and state.phase == "executing"
        name = f"{stream.stream_id}/{BOOTSTRAP_ID if first else f'w{window}'}{'/drift' if urgent else ''}"
        if stream.stage == "label":
            # Nobody has kept what a live stream showed before it is served: it is recorded now, for its first model.
            record = isinstance(spec.source, LiveSource) and stream.checkpoint is None
            span = site.bootstrap.seconds if first else site.profiling.label_span * site.window_s * spec.retrain_every
            if record and not first:
                span = min(site.bootstrap.seconds, 0.5 * site.profiling.limit * site.window_s)
            fps = site.bootstrap.label_fps if first or record else spec.label_fps
            if urgent:
                # What came before the drift says nothing about what is to come: few seconds, but as many labels.
                position = spec.start_s + now - (state.origin_s or 0.0)
                fps, span = fps * span / site.drift.label_s, site.drift.label_s
            return LabelJob(
                job_id=f"label/{name}",
                stream=msgspec.structs.replace(spec, label_fps=min(fps, spec.fps)),
                share=share,
                window=window,
                from_s=position - span,
                to_s=position,
                exemplars=stream.dataset,
                record=record,
            )
        assert stream.dataset is not None
        if stream.stage == "train":
            version, stream.next_version = stream.next_version, stream.next_version + 1
            return RetrainJob(
                job_id=f"train/{name}/v{version}",
                stream=spec,
                share=share,
                window=window,
                dataset=stream.dataset,
                checkpoint=None,
                config=RetrainConfig(
                    config_id=BOOTSTRAP_ID,
                    epochs=site.bootstrap.epochs,
                    batch_size=site.bootstrap.batch_size,
                    head_width=spec.student.head_width,
                    learning_rate=site.bootstrap.learning_rate,
                ),
                next_version=version,
            )
        assert stream.checkpoint is not None
        wish = self._profiler.choose(spec, window, stream.dataset, drift=stream.drift)
        return TrialJob(
            job_id=f"trial/{name}",
            stream=spec,
            share=share,
            window=window,
            dataset=stream.dataset,
            checkpoint=stream.checkpoint,
            retrain=wish.retrain,
            inference=wish.inference,
            data_share=wish.data_share,
            num_epochs=wish.num_epochs,
            num_frames=wish.num_frames,
            clip_end_s=spec.start_s + now - (state.origin_s or 0.0) if urgent else position,
            unseen=not first,
        )
