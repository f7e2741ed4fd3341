"""Labelling, bootstrap and micro-profiling as a queue of jobs, one at a time per executor. Pure.

Stages of a stream before a plan: label -> [train, only for the first model] -> trial -> done. Beside a plan the serving
model is first looked at on the new labels, with which history says what every configuration is worth; what is then
still worth trying is tried, and how good inference configurations are is measured last, when nothing waits for it:

    label -> check -> [trial] -> [measure] -> done
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import msgspec

from optimizer.config import SiteConfig
from optimizer.keeping import ZooKeeper
from optimizer.labels import Labels, label_span_s
from optimizer.ports import Output, ProfilerPort, Publish, TrialWish
from optimizer.state import ExecutorState, PipelineJob, SiteState, Stage, StreamState, Trials
from protocol.events import LabelsCollected, Notice, ProfileEstimated
from protocol.messages import LabelJob, RetrainJob, TrialJob
from protocol.schema import LabelResult, LiveSource, RetrainConfig, RetrainResult, StreamSpec, TrialResult

# With fewer labelled crops, or frames of a detection stream, on either side neither a trial nor its validation says
# anything. A frame holds several objects.
_LEAST_EXAMPLES = {"classification": 8, "detection": 4}

BOOTSTRAP_ID = "bootstrap"

# A job with less of a GPU than this is not worth its worker.
LEAST_SHARE = 0.05

# What has to be known before a stream's retraining can be planned at all.
FIRST: tuple[Stage, ...] = ("label", "train", "check")
# What a retraining waits for, and what nothing waits for.
TRIALS: tuple[Stage, ...] = (*FIRST, "trial")
MEASURING: tuple[Stage, ...] = ("measure",)
_ORDER: tuple[Stage, ...] = ("check", "train", "trial", "label", "measure")


def begin_anew(state: SiteState, stream: StreamState) -> None:
    """The stream is labelled again in the same window; what of it is being measured says nothing any more."""
    stream.stage, stream.tried, stream.trials = "label", None, None
    for executor_id, job in list(state.pipeline.items()):
        if job.stream.stream_id == stream.stream_id:
            del state.pipeline[executor_id]


class Pipeline:
    """Works on the site's state; remembers nothing itself."""

    def __init__(
        self,
        site: SiteConfig,
        profiler: ProfilerPort,
        state: SiteState,
        specs: Mapping[str, StreamSpec],
        labels: Labels,
        keeper: ZooKeeper,
    ) -> None:
        self._keeper = keeper
        self._site = site
        self._profiler = profiler
        self._state = state
        self._specs = specs
        self._labels = labels

    def assign(
        self,
        executors: Mapping[str, ExecutorState],
        now: float,
        share: float,
        stages: Collection[Stage] | None = None,
    ) -> None:
        """Give every idle executor the next job, a stream's own executor first. ``stages``: only what is in these."""
        state = self._state
        for stream in state.streams.values():
            if stream.degraded and stream.checkpoint and stream.stage != "done":
                self._end(stream)  # nothing new was seen of it; it keeps its last estimates
            if stream.stage == "label" and stream.label_frames == 0:
                self._end(stream)  # the budget has nothing for it
        for executor_id in sorted(executors):
            if executor_id in state.pipeline:
                continue
            taken = {job.stream.stream_id for job in state.pipeline.values()}
            waiting = [
                s
                for s in state.streams.values()
                if s.stage != "done" and s.stream_id not in taken and (stages is None or s.stage in stages)
            ]
            # What was begun is finished first; then those that fell behind what was predicted, as they have drifted,
            # should the time for profiling not reach for all. A stream is profiled where it is served if possible.
            waiting.sort(
                key=lambda s: (
                    _ORDER.index(s.stage),
                    -round(s.shortfall, 2),
                    s.serving_executor != executor_id,
                )
            )
            if waiting:
                state.pipeline[executor_id] = self._job(waiting[0], now, share)
                state.pipeline_since[executor_id] = now

    def label_ahead(self, window: int, opening: Collection[str]) -> None:
        """Begin with the labels of a window that is about to open, of streams that nothing is being tried with."""
        self._labels.open(window, opening)
        for stream in self._state.streams.values():
            idle = not stream.awaits_trial and stream.alarm is None and stream.checkpoint is not None
            if idle and stream.stream_id in opening and stream.ahead != window and not stream.degraded:
                begin_anew(self._state, stream)
                stream.ahead = window

    def fit(self, used: Mapping[str, float], most: Callable[[str, StreamState], float]) -> None:
        """Shrink jobs to what is left beside everything else, drop those that nothing is left for, and let grow those
        that can have clearly more.

        ``used``: share promised on every executor, these jobs included; ``most``: what a stream's job may have on one.
        Dropped labels and trials begin anew later.
        """
        state = self._state
        for executor_id, job in list(state.pipeline.items()):
            room, stream = 1.0 - (used.get(executor_id, 1.0) - job.share), state.streams[job.stream.stream_id]
            more = min(room, most(executor_id, stream))
            if room < LEAST_SHARE:
                del state.pipeline[executor_id]
                if stream.stage == "measure":
                    self._end(stream)  # what was measured last stands
            elif room < job.share - 1e-9 or more >= job.share + LEAST_SHARE:
                share = room if room < job.share else more
                state.pipeline[executor_id] = msgspec.structs.replace(job, share=share)

    def labelled(self, job_id: str, result: LabelResult, now: float) -> list[Output]:
        """The data set of a stream's window is there."""
        job, work_s = self.job_of(job_id), self._work_s(job_id, now)
        stream = self._take(job_id)
        if stream is None:
            return []
        dataset = result.dataset
        stream.dataset = dataset
        self._keeper.labelled(stream, result)
        enough = min(dataset.num_train, dataset.num_validation) >= _LEAST_EXAMPLES[self._specs[stream.stream_id].task]
        stream.tried = stream.trials = None
        stream.first_s = work_s if self._state.origin_s is not None else 0.0
        if stream.checkpoint is None:
            stream.stage = "train"
        elif enough:
            stream.stage = "check" if self._beside else "trial"
        else:
            self._end(stream)
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
                    golden_s=result.golden_s,
                    uniform_share=job.uniform_share if isinstance(job, LabelJob) else 1.0,
                    agreement=result.agreement,
                    agreement_low=result.agreement_low,
                    agreement_high=result.agreement_high,
                    num_exemplars=result.num_exemplars,
                    exemplar_bytes=result.exemplar_bytes,
                )
            )
        ]

    def tried(self, job_id: str, result: TrialResult, now: float) -> list[Output]:
        """The trials of a stream are over: estimate its profile."""
        work_s = self._work_s(job_id, now)
        stream = self._take(job_id)
        if stream is None or stream.dataset is None:
            return []
        spec, stage, seconds = self._specs[stream.stream_id], stream.stage, result.seconds
        if stream.tried is None:
            self._keeper.tried(stream, stream.dataset, result)
        # In several jobs beside a plan, as one: what the profiler learns from is a window's trials together.
        stream.tried = result = _together(stream.tried, result)
        profile = self._profiler.estimate(spec, result, stream.dataset)
        self._end(stream)
        if stage == "check":
            stream.first_s += work_s
            self._choose(stream, result)
        elif stage == "trial" and stream.trials is not None and stream.trials.inference:
            stream.stage = "measure"
        if stage == "measure" and stream.profile is not None:
            # Its retraining may be running: what that was planned from, and its epochs have corrected, stays.
            profile = msgspec.structs.replace(stream.profile, inference=profile.inference)
        stream.profile = profile
        stream.unplanned = stage != "measure" and result.window == self._state.window
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
                    stage=stage if stage in ("check", "measure") else "trial",
                    seconds=seconds,
                )
            )
        ]

    def bootstrapped(self, job_id: str, result: RetrainResult) -> bool:
        """The first model of a stream is there; False when the job is none of ours."""
        stream = self._take(job_id)
        if stream is None or result.checkpoint is None:
            return False
        stream.checkpoint = result.checkpoint
        stream.stage, stream.tried = "trial", None
        return True

    def failed(self, job_id: str) -> bool:
        """A pipeline job failed: the stream goes without it. False when the job is none of ours."""
        stream = self._take(job_id)
        if stream is None:
            return False
        self._end(stream)
        return True

    def cut_off(self) -> None:
        """Drop what is still to be done in this window; the streams keep their last estimates."""
        self._state.pipeline.clear()
        for stream in self._state.streams.values():
            self._end(stream)

    def drop_overdue(self, now: float) -> list[Output]:
        """Beside a plan: drop jobs that have run for longer than one may, so that nothing waits for one that hangs."""
        longest_s = self._site.profiling.limit * self._site.window_s
        told: list[Output] = []
        for executor_id, job in list(self._state.pipeline.items()):
            if now - self._state.pipeline_since.get(executor_id, now) <= longest_s:
                continue
            self.failed(job.job_id)
            kind = job.__struct_config__.tag
            text = f"{kind} job of {job.stream.stream_id} was cut off after {longest_s:g} s on {executor_id}"
            told.append(Publish(event=Notice(level="warning", text=text)))
        return told

    def finished(self, stages: Collection[Stage] | None = None) -> bool:
        """Nothing runs and nothing waits (``stages``: that is in one of these)."""
        if stages is not None:
            return not any(s.stage in stages for s in self._state.streams.values())
        return not self._state.pipeline and all(s.stage == "done" for s in self._state.streams.values())

    @property
    def _beside(self) -> bool:
        """The first window is planned on what the bootstrap measures, all of it."""
        return self._site.profiling.beside and self._state.origin_s is not None

    def _choose(self, stream: StreamState, result: TrialResult) -> None:
        """The model was looked at: which trials are worth that its retraining waits for them?"""
        assert stream.dataset is not None
        wish = self._profiler.choose(
            self._specs[stream.stream_id],
            result.window,
            stream.dataset,
            drift=stream.drift,
            wait_share=self._site.profiling.beside_share,
        )
        if not wish.retrain and not wish.inference:
            return
        stream.trials = Trials(
            retrain=wish.retrain,
            inference=wish.inference,
            data_share=wish.data_share,
            num_epochs=wish.num_epochs,
            num_frames=wish.num_frames,
        )
        stream.stage = "trial" if wish.retrain else "measure"

    @staticmethod
    def _end(stream: StreamState) -> None:
        stream.stage = "done"

    def _work_s(self, job_id: str, now: float) -> float:
        """GPU-seconds that a job has had, as far as its share did not change."""
        for executor_id, job in self._state.pipeline.items():
            if job.job_id == job_id:
                return job.share * max(0.0, now - self._state.pipeline_since.get(executor_id, now))
        return 0.0

    def job_of(self, job_id: str) -> PipelineJob | None:
        """The job of ours that runs under this id."""
        return next((job for job in self._state.pipeline.values() if job.job_id == job_id), None)

    def _take(self, job_id: str) -> StreamState | None:
        for executor_id, job in list(self._state.pipeline.items()):
            if job.job_id == job_id:
                del self._state.pipeline[executor_id]
                self._state.pipeline_since.pop(executor_id, None)
                return self._state.streams.get(job.stream.stream_id)
        return None

    def _job(self, stream: StreamState, now: float, share: float) -> PipelineJob:
        spec, state, site = self._specs[stream.stream_id], self._state, self._site
        window = max(state.window, stream.ahead, 0)
        first, ahead = state.origin_s is None, stream.ahead > state.window
        since_s = now if ahead else state.window_opened_s
        position = spec.start_s + (0.0 if state.origin_s is None else since_s - state.origin_s)
        urgent = stream.alarm is not None and state.phase == "executing"
        name = f"{stream.stream_id}/{BOOTSTRAP_ID if first else f'w{window}'}{'/drift' if urgent else ''}"
        if stream.stage == "label":
            # Nobody has kept what a live stream showed before it is served: it is recorded now, for its first model.
            record = isinstance(spec.source, LiveSource) and stream.checkpoint is None
            span = site.bootstrap.seconds if first else label_span_s(site, spec)
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
                checkpoint=stream.checkpoint,
                num_frames=0 if first or record else self._labels.frames_for(stream, urgent=urgent),
                uniform_share=site.labels.uniform_share if site.labels.allocation == "adaptive" else 1.0,
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
        wish = self._wish(stream, window)
        inference, num_frames = (wish.inference, wish.num_frames) if first else self._labels.clip(stream, wish)
        return TrialJob(
            job_id=f"{stream.stage}/{name}",
            stream=spec,
            share=share,
            window=window,
            dataset=stream.dataset,
            checkpoint=stream.checkpoint,
            retrain=wish.retrain,
            inference=inference,
            data_share=wish.data_share,
            num_epochs=wish.num_epochs,
            num_frames=num_frames,
            clip_end_s=spec.start_s + now - (state.origin_s or 0.0) if urgent else position,
            unseen=not first,
            # Earlier models are looked at once, by the first of a window's jobs.
            zoo=() if first or stream.tried is not None else self._keeper.for_trial(stream),
        )

    def _wish(self, stream: StreamState, window: int) -> TrialWish:
        """What the trial job of the stream's stage is to try."""
        if stream.stage == "check":
            return _LOOK
        if stream.trials is not None and stream.stage == "trial":
            return msgspec.structs.replace(stream.trials, inference=())
        if stream.trials is not None and stream.stage == "measure":
            return msgspec.structs.replace(stream.trials, retrain=())
        assert stream.dataset is not None
        return self._profiler.choose(self._specs[stream.stream_id], window, stream.dataset, drift=stream.drift)


_LOOK = Trials(retrain=(), inference=(), data_share=0.0, num_epochs=1, num_frames=0)


def _together(before: TrialResult | None, result: TrialResult) -> TrialResult:
    """Both results of a window as one; what was measured twice counts as it was measured last."""
    if before is None or before.window != result.window:
        return result
    tried = {row.config for row in result.retrain}
    measured = {row.config for row in result.inference}
    return msgspec.structs.replace(
        result,
        retrain=(*(row for row in before.retrain if row.config not in tried), *result.retrain),
        inference=(*(row for row in before.inference if row.config not in measured), *result.inference),
        zoo=result.zoo or before.zoo,
        seconds=before.seconds + result.seconds,
    )
