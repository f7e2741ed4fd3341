"""The state machine of windows, executors and plans.

``handle(event, now) -> [output]`` is synchronous and pure but for the state it owns: no sockets, no
clock, no files. The service carries the outputs out; tests and simulations drive it directly.

    gathering -> bootstrap -> starting -> [ profiling -> planning -> executing ]* -> finished

``now`` is the site clock in seconds; it goes on across restarts of the optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from optimizer import demands, latencies, moving, questions
from optimizer.asking import WINDOW_PHASES, Asker
from optimizer.carrying import Carrier
from optimizer.closing import Closer
from optimizer.clouds import CloudCarrier
from optimizer.config import SiteConfig
from optimizer.correcting import Corrector
from optimizer.degrading import notice_conditions
from optimizer.dispatching import Dispatcher
from optimizer.drifts import Drifts
from optimizer.emitter import Emitter
from optimizer.following import serving_job_id
from optimizer.keeping import ZooKeeper
from optimizer.labels import Labels
from optimizer.pipeline import Pipeline
from optimizer.ports import (
    CloudDone,
    ExecutorGone,
    ExecutorJoined,
    Finish,
    HandedOver,
    Input,
    Measured,
    Output,
    ProfilerPort,
    Progressed,
    Received,
    Solved,
    Tick,
)
from optimizer.profiling import Profiling
from optimizer.state import ExecutorState, SiteState, StreamState
from optimizer.watching import Watcher
from optimizer.windows import opens
from protocol import messages as m
from protocol.events import ExecutorChanged, RetrainFinished, StreamAccuracy, WindowOpened
from protocol.plan import PlanVersion
from protocol.schema import LinkSpec, LiveSource, RetrainResult

# The first window opens at the latest so long after the first models were there.
_START_S = 15.0


class Coordinator:
    """Owns the state of a site. ``num_windows`` None = for ever; ``adopting``: the state comes from an earlier life.

    ``links``: to a cloud that retrains, where somebody carries out what a `CloudQueue` says (simulations do).
    """

    def __init__(
        self,
        site: SiteConfig,
        profiler: ProfilerPort,
        state: SiteState,
        num_windows: int | None = None,
        adopt_until_s: float | None = None,
        links: Sequence[LinkSpec] = (),
    ) -> None:
        self.site = site
        self.state = state
        self.executors: dict[str, ExecutorState] = {}
        self._specs = {spec.stream_id: spec for spec in site.streams}
        self._profiler = profiler
        self._num_windows = num_windows
        self._adopt_until_s = adopt_until_s
        self._emit = Emitter()
        self._labels = Labels(site, state, self._specs, self._emit)
        self._keeper = ZooKeeper(site, state, self._specs, self._emit)
        self._pipeline = Pipeline(site, profiler, state, self._specs, self._labels, self._keeper)
        self._asker = Asker(site, state, self.executors, self._emit, tuple(links))
        self._profiling = Profiling(
            site, state, self._specs, self.executors, self._pipeline, self._asker, self._emit, num_windows
        )
        self._carrier = Carrier(state, self._specs, self.executors)
        self._watcher = Watcher(
            site, state, self._specs, self.executors, profiler, self._emit, self._asker.want, self._labels
        )
        self._drifts = Drifts(site, state, self._emit, self._asker.want, self._settle, self._labels)
        self._corrector = Corrector(site.correction, state, self.executors, self._emit, self._asker.want, self._settle)
        self._clouds = CloudCarrier(state, self._specs, links, self._emit)
        self._closer = Closer(self._specs, profiler, self._emit)
        self._dispatcher = Dispatcher(state, self._specs, self.executors, self._emit)
        self._over = False
        for spec in site.streams:
            state.streams.setdefault(spec.stream_id, StreamState(stream_id=spec.stream_id))
        for stream_id in [s for s in state.streams if s not in self._specs]:
            del state.streams[stream_id]

    # ------------------------------------------------------------ the one entrance

    def handle(self, event: Input, now: float) -> list[Output]:
        """Take one input at site time ``now``; return what is to be done about it, in order."""
        if self._over:
            return []
        self._clouds.advance(now)
        match event:
            case ExecutorJoined(hello=hello):
                self._joined(hello)
            case ExecutorGone():
                self._gone(event)
            case Received(executor_id=executor_id, message=message):
                if executor_id in self.executors:
                    self._received(self.executors[executor_id], message, now)
            case Solved():
                self._asker.solved(event, now)
            case Measured(event=measured):
                self._closer.measured(measured)
                self._profiler.measured(measured)
                self._drifts.measured(measured, now)
                return self._measured_latency(measured)
            case Progressed(event=progress):
                self._corrector.progressed(progress, now)
            case HandedOver(event=hand_over):
                if hand_over.stream_id in self._specs:
                    moving.note_hand_over(self.state, hand_over, self._specs[hand_over.stream_id])
            case CloudDone(job_id=job_id, result=result):
                self._retrained(m.RetrainDone(event_id=0, executor_id="cloud", job_id=job_id, result=result), now)
            case Tick():
                pass
        for reason in notice_conditions(self.state, self.executors, now):
            self._asker.want(reason)
        if self.state.phase == "executing":
            for reason in questions.notice_late(self.state, self.executors, now):
                self._asker.want(reason)
        self._advance(now)
        self._keeper.advance()
        if not self._adopting and not self._over:
            if self.state.phase in WINDOW_PHASES:
                self._watcher.advance(now)
                self._corrector.advance(now)
                self._drifts.advance(now)
            if self.state.phase != "finished":
                # Before the next question is asked: a plan that does not know of what has begun would end it.
                if self._carrier.follow(now):
                    self._asker.overtaken("a retraining began while a plan was made")
                self._carrier.let_go(now)
            self._asker.ask_if_wanted(now)
            if self.state.phase != "finished":
                self._clouds.follow()
                self._clouds.dispatch()
                self._drifts.assign(self._pipeline, self.executors, now)
                self._profiling.beside_plans(now)
                self._watcher.assign(now)
                self._dispatcher.dispatch(now)
        return self._emit.take()

    @property
    def _adopting(self) -> bool:
        return self._adopt_until_s is not None

    def _measured_latency(self, event: StreamAccuracy) -> list[Output]:
        """A stream whose results turn out to come too late, or that drops frames, is planned anew at the next tick."""
        stream = self.state.streams.get(event.stream_id)
        if stream is not None:
            latencies.remember(stream, event)
            self._measured_demand(stream, event)
            if self.state.phase == "executing" and latencies.newly_late(stream, self._specs[event.stream_id]):
                self._asker.want(f"results of {event.stream_id} come too late")
        return []

    def _measured_demand(self, stream: StreamState, event: StreamAccuracy) -> None:
        """A stream that drops frames because it needs more than was profiled is planned anew."""
        executor = self.executors.get(stream.serving_executor)
        worker = None if stream.leaving else moving.serving_worker(stream, self.executors)
        demands.remember(stream, event, worker, executor.gpu.speed if executor is not None else 1.0)
        if self.state.phase == "executing" and demands.newly_short(stream):
            more = demands.besides(stream, event.inference_id)
            self._asker.want(f"{stream.stream_id} drops frames: it needs {more:.0%} of a GPU more than was profiled")

    def window_end_s(self) -> float:
        """Site time at which the present window ends."""
        return self.state.window_opened_s + self.site.window_s

    # ------------------------------------------------------------ executors

    def _joined(self, hello: m.Hello) -> None:
        executor_id, known = hello.executor_id, self.executors.get(hello.executor_id)
        again = known is not None and known.incarnation == hello.incarnation
        if known is not None and not again:
            # Its old life ended without a word, and its jobs with it.
            self._forget_jobs(executor_id)
        if hello.held is not None and hello.held.term >= self.state.term and not again:
            # It obeyed an optimizer whose state is not ours; our plans must be newer than what it holds.
            self.state.term = hello.held.term + 1
        self.executors[executor_id] = ExecutorState(
            executor_id=executor_id,
            incarnation=hello.incarnation,
            gpu=hello.gpu,
            backend=hello.share_backend,
            can_resize_live=hello.can_resize_live,
            device=hello.device,
            applied=hello.held,
            workers=hello.workers,
        )
        self._learn_shares(self.executors[executor_id])
        self._dispatcher.forget(executor_id)
        change: Literal["joined", "rejoined"] = "rejoined" if again else "joined"
        if not again:
            self.state.shed = []
        self._emit.publish(
            ExecutorChanged(
                executor_id=executor_id,
                gpu_id=hello.gpu.gpu_id,
                change=change,
                reason=f"{hello.device} on {hello.host}, shares by {hello.share_backend}",
            )
        )
        if not self._adopting and not again and self.state.phase in WINDOW_PHASES:
            self._asker.want(f"executor {executor_id} joined")

    def _learn_shares(self, executor: ExecutorState) -> None:
        """What is known of the throughput at partial shares goes into the planning problem; not in mid-retraining."""
        points = self._profiler.share_efficiency(questions.device_kind(executor))
        busy = any(s.running and s.running.executor_id == executor.executor_id for s in self.state.streams.values())
        if points and not busy:
            executor.gpu = msgspec.structs.replace(executor.gpu, share_efficiency=points)

    def _gone(self, event: ExecutorGone) -> None:
        executor = self.executors.pop(event.executor_id, None)
        if executor is None:
            return
        self._forget_jobs(event.executor_id)
        change: Literal["left", "lost"] = "left" if event.on_purpose else "lost"
        self._emit.publish(
            ExecutorChanged(
                executor_id=event.executor_id, gpu_id=executor.gpu.gpu_id, change=change, reason=event.reason
            )
        )
        self._asker.want(f"executor {event.executor_id} {change}")

    def _forget_jobs(self, executor_id: str) -> None:
        """The jobs of an executor died with it; its streams are to be served elsewhere."""
        self._dispatcher.forget(executor_id)
        self.state.pipeline.pop(executor_id, None)
        self.state.pipeline_since.pop(executor_id, None)
        self._watcher.forget(executor_id)
        for stream in self.state.streams.values():
            if stream.serving_executor == executor_id:
                stream.serving_executor = ""
            if stream.leaving and stream.leaving.executor_id == executor_id:
                stream.leaving = None
            if stream.running and stream.running.executor_id == executor_id:
                stream.running = None

    def _adopt(self, now: float) -> None:
        """After a restart: wait for the executors of the earlier life before anything is decided about their jobs."""
        if self._adopt_until_s is None:
            return
        homes = {s.serving_executor for s in self.state.streams.values() if s.serving_executor}
        homes |= {s.running.executor_id for s in self.state.streams.values() if s.running}
        homes |= {s.canary.executor_id for s in self.state.streams.values() if s.canary and s.canary.job}
        homes |= set(self.state.pipeline)
        missing = homes - set(self.executors)
        if missing and now < self._adopt_until_s:
            return
        self._adopt_until_s = None
        for executor_id in missing:
            self._forget_jobs(executor_id)
        if missing:
            self._asker.want(f"executors {', '.join(sorted(missing))} did not come back")
        elif self.state.phase in ("starting", "planning") or (
            self.state.phase == "profiling" and not self.state.room_made
        ):
            self._asker.want("optimizer restarted")

    # ------------------------------------------------------------ messages

    def _received(self, executor: ExecutorState, message: m.Up, now: float) -> None:
        if isinstance(message, m.LabelsDone | m.TrialsDone | m.RetrainDone | m.CanaryDone | m.JobFailed):
            self._emit.send(executor.executor_id, m.Ack(event_id=message.event_id))
            self._emit.save()
        match message:
            case m.Heartbeat(held=held, workers=workers):
                executor.workers = workers
                executor.applied = held
            case m.PlanApplied(version=version):
                executor.applied = version
            case m.PlanRefused(version=version, reason=reason, held=held):
                self._emit.notice("warning", f"{executor.executor_id} refused plan {_text(version)}: {reason}")
                if held is not None and held.term > self.state.term:
                    self.state.term = held.term + 1
                executor.refused_s = now
                self._dispatcher.forget(executor.executor_id)
            case m.LabelsDone(job_id=job_id, result=labels):
                job = self._pipeline.job_of(job_id)
                if isinstance(job, m.LabelJob):
                    self._labels.charge(job.stream.stream_id, labels)
                    self._drifts.labelled(job.stream.stream_id, job.checkpoint, labels.agreement, labels.num_pieces)
                self._emit.add(*self._pipeline.labelled(job_id, labels, now))
            case m.TrialsDone(job_id=job_id, result=trials):
                if self._pipeline.job_of(job_id) is not None:
                    self._labels.charge(trials.stream_id, trials)
                self._emit.add(*self._pipeline.tried(job_id, trials, now))
                if self.state.phase in ("planning", "executing") and trials.window == self.state.window:
                    self._asker.want_after(f"{trials.stream_id} was profiled")
            case m.RetrainDone():
                self._retrained(message, now)
            case m.CanaryDone(job_id=job_id, result=comparison):
                compared = self._watcher.compared(job_id, comparison, now)
                if compared is not None:
                    self._labels.charge(comparison.stream_id, comparison)
                    model, accuracy = compared
                    num_objects = comparison.paired.num_objects
                    self._drifts.labelled(comparison.stream_id, model, accuracy, num_objects)
            case m.JobFailed():
                self._failed(message, now)
            case _:
                pass

    def _retrained(self, message: m.RetrainDone, now: float) -> None:
        result = message.result
        stream = self.state.streams.get(result.stream_id)
        if stream is None or self._pipeline.bootstrapped(message.job_id, result):
            return
        if stream.checkpoint is None:
            self._no_first_model(stream, f"the first model of {result.stream_id} cannot be made: {result.reason}")
            return
        running = stream.running if stream.running and stream.running.job.job_id == message.job_id else None
        sent = stream.sent if stream.sent and stream.sent.job.job_id == message.job_id else None
        known = running or sent
        if result.checkpoint is not None and result.checkpoint.version <= stream.judged_version:
            return  # it was said before
        base = known.job.checkpoint if known else None
        verdict = self._watcher.retrained(stream, result, base, now)
        promoted = verdict.decision == "promoted"
        ends = questions.predicted_ends(running, self.executors.get(running.executor_id), now) if running else None
        if known is not None:
            self._settle(stream)
            self._asker.want(f"retraining of {result.stream_id} ended")
            self._profiler.retrained(
                self._specs[result.stream_id],
                result,
                known.accuracy_predicted,
                running.work_s if running else result.busy_s,  # the cloud's time says nothing about ours
                promoted,
                run=questions.how_it_ran(running, self.executors.get(running.executor_id), now) if running else None,
            )
        self._emit.publish(
            RetrainFinished(
                stream_id=result.stream_id,
                window=result.window,
                retrain_id=result.config.config_id,
                accuracy_before=result.accuracy_before,
                accuracy_after=result.accuracy_after,
                accuracy_predicted=known.accuracy_predicted if known else None,
                seconds=result.busy_s,
                seconds_predicted=running.work_s if running else None,
                promoted=promoted,
                reason=verdict.reason if known else f"{self._why_unknown(result)}: {verdict.reason}",
                map_before=result.map_before,
                map_after=result.map_after,
                elapsed_s=ends.elapsed_s if ends else None,
                elapsed_predicted_s=ends.predicted_s if ends else None,
                elapsed_half_s=ends.half_s if ends else None,
                whole=max((e.epoch for e in result.epochs), default=0) >= result.config.epochs,
                held_out_predicted=running.held_out_predicted if running else None,
                held_out_error=running.held_out_error if running and running.held_out_predicted is not None else None,
            )
        )

    def _why_unknown(self, result: RetrainResult) -> str:
        """Of a retraining that ended, but that nothing is known of any more."""
        in_time = self.state.phase in WINDOW_PHASES and result.window == self.state.window
        return "not in the plan any more" if in_time else "ended after its window"

    def _failed(self, message: m.JobFailed, now: float) -> None:
        self._emit.notice("error", f"{message.kind} job of {message.stream_id} failed: {message.reason}")
        stream = self.state.streams.get(message.stream_id)
        if stream is None:
            return
        if stream.running and stream.running.job.job_id == message.job_id:
            self._watcher.penalise(stream, stream.running.retrain_id)
            self._settle(stream)
            self._asker.want(f"retraining of {message.stream_id} failed")
        elif self._watcher.failed(message.job_id, now):
            pass
        elif self._pipeline.failed(message.job_id):
            if stream.checkpoint is None:
                self._no_first_model(stream, f"stream {message.stream_id} cannot be started: {message.reason}")
            elif self.state.phase in ("planning", "executing"):
                self._asker.want(f"{message.stream_id} goes without its {message.kind} job")

    def _no_first_model(self, stream: StreamState, reason: str) -> None:
        """A live stream that cannot be had now is tried again in every window, and holds up no other one."""
        stream.stage = "done"
        if self.state.phase != "bootstrap":
            return
        others = [s for s in self.state.streams.values() if s is not stream]
        hopeless = all(s.stage == "done" and s.checkpoint is None for s in others)
        if hopeless or not isinstance(self._specs[stream.stream_id].source, LiveSource):
            self._finish(2, reason)
        else:
            self._emit.notice("warning", f"{reason}; it is tried again in the next window")

    def _settle(self, stream: StreamState) -> None:
        stream.running, stream.sent, stream.settled = None, None, True
        if stream.stream_id not in self.state.ended:
            self.state.ended.append(stream.stream_id)

    # ------------------------------------------------------------ windows

    def _advance(self, now: float) -> None:
        state = self.state
        self._adopt(now)
        if self._adopting:
            return
        if state.phase == "gathering" and len(self.executors) >= self.site.min_executors:
            state.phase = "bootstrap"
        if state.phase == "bootstrap":
            self._pipeline.assign(self.executors, now, share=1.0)
            if self.executors and all(s.stage == "done" for s in state.streams.values()):
                if self._num_windows == 0:
                    state.phase = "finished"  # only the first models were asked for
                else:
                    state.origin_s, state.plan_s, state.phase = now, now, "starting"
                    self._asker.want("first models are there")
        if state.phase == "starting" and (self._all_served() or now - state.plan_s > _START_S):
            self._open_window(0, now)
        if state.phase in WINDOW_PHASES and now >= self.window_end_s():
            self._end_window(now)
        if state.phase == "profiling" and state.room_made and not self._asker.waiting:
            self._profiling.before_plan(now)
        self._closer.close_due(now)
        if state.phase == "finished" and not self._closer.waiting and not self._over:
            self._finish(0, f"{state.window + 1} windows are done")

    def _all_served(self) -> bool:
        """Every stream's worker is ready: the first window is not spent on starting them."""
        ready = {w.job_id for e in self.executors.values() for w in e.workers if w.state == "ready"}
        return all(
            serving_job_id(s.stream_id) in ready
            for s in self.state.streams.values()
            if s.checkpoint and s.stream_id not in self.state.shed
        )

    def _open_window(self, window: int, opened_s: float) -> None:
        state = self.state
        first = window == 0
        opening = {stream_id for stream_id, spec in self._specs.items() if opens(spec, window)}
        state.window, state.window_opened_s = window, opened_s
        state.plan, state.ended = None, []
        state.pipeline = {name: job for name, job in state.pipeline.items() if job.window == window and not first}
        state.profiling_share, state.shed = self.site.profiling.share, []
        state.beside_share = self.site.profiling.beside_share
        state.watch_share = self.site.gate.share
        for stream in state.streams.values():
            if stream.ahead != window or first:
                stream.stage = "done" if first or stream.stream_id not in opening else "label"
                stream.tried = stream.trials = None
            stream.swapped = stream.unplanned = False
            if stream.stream_id in opening:
                stream.running, stream.sent, stream.settled = None, None, False
            if stream.running is None and stream.sent is None:
                stream.retrain_id = ""
            latencies.forget_old(stream)
            demands.forget_old(stream)
            stream.shortfall = self._closer.shortfall(stream, window - 1)
            stream.predicted, stream.earned_s, stream.alarm = None, 0.0, None
            stream.penalties = {name: last for name, last in stream.penalties.items() if last >= window}
        self._labels.open(window, opening)
        # The first window is planned on what the bootstrap has just measured, any other at once where labels are there.
        known = self._profiling.is_ahead()
        state.phase = "planning" if first or not opening or known else "profiling"
        state.room_made = state.phase == "planning"
        for executor in self.executors.values():
            self._learn_shares(executor)
        self._emit.publish(
            WindowOpened(
                window=window,
                term=state.term,
                window_s=self.site.window_s,
                num_streams=len(state.streams),
                policy=self.site.policy,
            )
        )
        self._asker.forget()
        self._asker.want("window opened")
        self._emit.save()

    def _end_window(self, now: float) -> None:
        state = self.state
        self._closer.window_over(state, now)
        self._drifts.window_over()
        self._keeper.window_over()
        if self._num_windows is not None and state.window + 1 >= self._num_windows:
            self._watcher.conclude(now)
            self._labels.close()
            state.phase = "finished"
            self._asker.forget()
            return
        # Windows follow one another without a gap, unless the optimizer was away for longer than one.
        end = self.window_end_s()
        self._open_window(state.window + 1, end if now - end < self.site.window_s else now)

    def _finish(self, exit_code: int, reason: str) -> None:
        for executor_id in self.executors:
            self._emit.send(executor_id, m.Leave(reason=reason))
        self._emit.save()
        self._emit.add(Finish(exit_code=exit_code, reason=reason))
        self._over = True


def _text(version: PlanVersion) -> str:
    return f"{version.term}.{version.window}.{version.revision}"
