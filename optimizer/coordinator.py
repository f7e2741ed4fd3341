"""The state machine of windows, executors and plans.

``handle(event, now) -> [output]`` is synchronous and pure but for the state it owns: no sockets, no
clock, no files. The service carries the outputs out; tests and simulations drive it directly.

    gathering -> bootstrap -> [ profiling -> planning -> executing ]* -> finished

``now`` is the site clock in seconds; it goes on across restarts of the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec

from optimizer import questions
from optimizer.account import Account
from optimizer.config import SiteConfig
from optimizer.following import desired_jobs, retraining, served, serving_job_id, stamp_positions
from optimizer.gate import decide
from optimizer.objective import judge
from optimizer.pipeline import Pipeline
from optimizer.ports import (
    ExecutorGone,
    ExecutorJoined,
    Finish,
    Input,
    Measured,
    Output,
    ProfilerPort,
    Publish,
    Received,
    Save,
    Send,
    Solve,
    Solved,
    Tick,
)
from optimizer.state import ExecutorState, Leaving, Retraining, RunningRetrain, SiteState, StreamState
from optimizer.summaries import plan_solved, stream_window
from protocol import messages as m
from protocol.events import (
    ExecutorChanged,
    Notice,
    RetrainFinished,
    StreamWindow,
    TelemetryEvent,
    WindowClosed,
    WindowOpened,
)
from protocol.plan import Plan, PlanVersion, Problem

# A plan that is not acknowledged is sent again after this long; applying it twice is harmless.
_RESEND_S = 1.0
# A plan that waited longer than this somewhere on its way is of no use any more.
_LIFETIME_S = 5.0
# The last measurements of a window travel about this long after its end.
_CLOSING_S = 1.5

# A stream that moves to another GPU is served at the old place for at most so long.
_MOVE_S = 3.0

_WINDOW_PHASES = ("profiling", "planning", "executing")


class _Question(msgspec.Struct, frozen=True):
    """What the planner was asked last."""

    token: int
    problem: Problem
    phase: Literal["profiling", "plan", "replan"]
    reason: str
    asked_s: float


class _Closing(msgspec.Struct, frozen=True):
    """A window that is over; ``streams`` as they were at its end."""

    due_s: float
    window: int
    streams: tuple[StreamState, ...]


class Coordinator:
    """Owns the state of a site. ``num_windows`` None = for ever; ``adopting``: the state comes from an earlier life."""

    def __init__(
        self,
        site: SiteConfig,
        profiler: ProfilerPort,
        state: SiteState,
        num_windows: int | None = None,
        adopt_until_s: float | None = None,
    ) -> None:
        self.site = site
        self.state = state
        self.executors: dict[str, ExecutorState] = {}
        self._specs = {spec.stream_id: spec for spec in site.streams}
        self._profiler = profiler
        self._pipeline = Pipeline(site, profiler, state, self._specs)
        self._account = Account()
        self._num_windows = num_windows
        self._adopt_until_s = adopt_until_s
        self._closings: list[_Closing] = []
        self._question: _Question | None = None
        self._wanted: str | None = None
        self._token = 0
        self._jobs: dict[str, list[m.Job]] = {}
        self._out: list[Output] = []
        self._over = False
        for spec in site.streams:
            state.streams.setdefault(spec.stream_id, StreamState(stream_id=spec.stream_id))
        for stream_id in [s for s in state.streams if s not in self._specs]:
            del state.streams[stream_id]

    # ------------------------------------------------------------ the one entrance

    def handle(self, event: Input, now: float) -> list[Output]:
        """Take one input at site time ``now``; return what is to be done about it, in order."""
        self._out = []
        if self._over:
            return []
        match event:
            case ExecutorJoined(hello=hello):
                self._joined(hello)
            case ExecutorGone():
                self._gone(event)
            case Received(executor_id=executor_id, message=message):
                if executor_id in self.executors:
                    self._received(self.executors[executor_id], message, now)
            case Solved():
                self._solved(event, now)
            case Measured(event=measured):
                self._account.add(measured)
                return []
            case Tick():
                pass
        self._advance(now)
        self._ask_if_wanted(now)
        self._dispatch(now)
        return self._out

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
            applied=hello.held,
            workers=hello.workers,
        )
        self._jobs.pop(executor_id, None)
        change: Literal["joined", "rejoined"] = "rejoined" if again else "joined"
        self._publish(
            ExecutorChanged(
                executor_id=executor_id,
                gpu_id=hello.gpu.gpu_id,
                change=change,
                reason=f"{hello.device} on {hello.host}, shares by {hello.share_backend}",
            )
        )
        if self._adopt_until_s is None and not again and self.state.phase in _WINDOW_PHASES:
            self._want(f"executor {executor_id} joined")

    def _gone(self, event: ExecutorGone) -> None:
        executor = self.executors.pop(event.executor_id, None)
        if executor is None:
            return
        self._forget_jobs(event.executor_id)
        change: Literal["left", "lost"] = "left" if event.on_purpose else "lost"
        self._publish(
            ExecutorChanged(
                executor_id=event.executor_id, gpu_id=executor.gpu.gpu_id, change=change, reason=event.reason
            )
        )
        self._want(f"executor {event.executor_id} {change}")

    def _forget_jobs(self, executor_id: str) -> None:
        """The jobs of an executor died with it; its streams are to be served elsewhere."""
        self._jobs.pop(executor_id, None)
        self.state.pipeline.pop(executor_id, None)
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
        homes |= set(self.state.pipeline)
        missing = homes - set(self.executors)
        if missing and now < self._adopt_until_s:
            return
        self._adopt_until_s = None
        for executor_id in missing:
            self._forget_jobs(executor_id)
        if missing:
            self._want(f"executors {', '.join(sorted(missing))} did not come back")
        elif self.state.phase == "planning" or (self.state.phase == "profiling" and not self.state.room_made):
            self._want("optimizer restarted")

    # ------------------------------------------------------------ messages

    def _received(self, executor: ExecutorState, message: m.Up, now: float) -> None:
        if isinstance(message, m.LabelsDone | m.TrialsDone | m.RetrainDone | m.JobFailed):
            self._send(executor.executor_id, m.Ack(event_id=message.event_id))
            self._out.insert(0, Save())
        match message:
            case m.Heartbeat(held=held, workers=workers):
                executor.workers = workers
                executor.applied = held
            case m.PlanApplied(version=version):
                executor.applied = version
            case m.PlanRefused(version=version, reason=reason, held=held):
                self._notice("warning", f"{executor.executor_id} refused plan {_text(version)}: {reason}")
                if held is not None and held.term > self.state.term:
                    self.state.term = held.term + 1
                self._jobs.pop(executor.executor_id, None)
            case m.LabelsDone(job_id=job_id, result=labels):
                self._out.extend(self._pipeline.labelled(job_id, labels, now))
            case m.TrialsDone(job_id=job_id, result=trials):
                self._out.extend(self._pipeline.tried(job_id, trials))
            case m.RetrainDone():
                self._retrained(message)
            case m.JobFailed():
                self._failed(message)
            case _:
                pass

    def _retrained(self, message: m.RetrainDone) -> None:
        result = message.result
        stream = self.state.streams.get(result.stream_id)
        if stream is None or self._pipeline.bootstrapped(message.job_id, result):
            return
        if stream.checkpoint is None:
            if self.state.phase == "bootstrap":
                self._finish(2, f"the first model of {result.stream_id} cannot be made: {result.reason}")
            return
        running = stream.running if stream.running and stream.running.job.job_id == message.job_id else None
        promoted, reason = decide(result, self.site.gate, stream.checkpoint.version)
        if promoted and result.checkpoint is not None:
            stream.checkpoint, stream.swapped = result.checkpoint, True
            if stream.profile is not None:
                now_better = stream.profile.accuracy_now + result.accuracy_after - result.accuracy_before
                stream.profile = msgspec.structs.replace(stream.profile, accuracy_now=min(1.0, max(0.0, now_better)))
        if running is not None:
            self._settle(stream)
            self._want(f"retraining of {result.stream_id} ended")
            self._profiler.retrained(
                self._specs[result.stream_id], result, running.accuracy_predicted, running.work_s, promoted
            )
        self._publish(
            RetrainFinished(
                stream_id=result.stream_id,
                window=result.window,
                retrain_id=result.config.config_id,
                accuracy_before=result.accuracy_before,
                accuracy_after=result.accuracy_after,
                accuracy_predicted=running.accuracy_predicted if running else None,
                seconds=result.busy_s,
                seconds_predicted=running.work_s if running else None,
                promoted=promoted,
                reason=reason if running else f"ended after its window: {reason}",
            )
        )

    def _failed(self, message: m.JobFailed) -> None:
        self._notice("error", f"{message.kind} job of {message.stream_id} failed: {message.reason}")
        stream = self.state.streams.get(message.stream_id)
        if stream is None:
            return
        if stream.running and stream.running.job.job_id == message.job_id:
            self._settle(stream)
            self._want(f"retraining of {message.stream_id} failed")
        elif self._pipeline.failed(message.job_id) and self.state.phase == "bootstrap":
            self._finish(2, f"stream {message.stream_id} cannot be started: {message.reason}")

    def _settle(self, stream: StreamState) -> None:
        stream.running, stream.settled = None, True
        if stream.stream_id not in self.state.ended:
            self.state.ended.append(stream.stream_id)

    # ------------------------------------------------------------ windows

    def _advance(self, now: float) -> None:
        state = self.state
        self._adopt(now)
        if self._adopt_until_s is not None:
            return
        if state.phase == "gathering" and len(self.executors) >= self.site.min_executors:
            state.phase = "bootstrap"
        if state.phase == "bootstrap":
            self._pipeline.assign(self.executors, now, share=1.0)
            if self.executors and all(s.checkpoint and s.stage == "done" for s in state.streams.values()):
                state.origin_s = now
                self._open_window(0, now)
        if state.phase in _WINDOW_PHASES and now >= self.window_end_s():
            self._end_window(now)
        if state.phase == "profiling" and state.room_made and self._question is None:
            self._profile(now)
        self._close_due(now)

    def _open_window(self, window: int, opened_s: float) -> None:
        state = self.state
        first = window == 0
        state.window, state.window_opened_s = window, opened_s
        state.plan, state.ended, state.pipeline, state.room_made = None, [], {}, first
        state.phase = "planning" if first else "profiling"
        for stream in state.streams.values():
            # The first window is planned on what the bootstrap has just measured.
            stream.stage = "done" if first else "label"
            stream.running, stream.settled, stream.swapped, stream.retrain_id = None, False, False, ""
            stream.shortfall = self._shortfall(stream, window - 1)
            stream.predicted = None
        self._publish(
            WindowOpened(
                window=window,
                term=state.term,
                window_s=self.site.window_s,
                num_streams=len(state.streams),
                policy=self.site.policy,
            )
        )
        self._question = None
        self._want("window opened")
        self._out.insert(0, Save())

    def _shortfall(self, stream: StreamState, window: int) -> float:
        """How much worse than predicted a stream did in a window, as far as measurements have come in."""
        realised = self._account.peek(stream.stream_id, window).accuracy
        return 0.0 if realised is None or stream.predicted is None else stream.predicted - realised

    def _end_window(self, now: float) -> None:
        state = self.state
        self._closings.append(
            _Closing(
                due_s=now + _CLOSING_S,
                window=state.window,
                streams=tuple(msgspec.structs.replace(s) for s in state.streams.values()),
            )
        )
        if self._num_windows is not None and state.window + 1 >= self._num_windows:
            state.phase, self._wanted, self._question = "finished", None, None
            return
        # Windows follow one another without a gap, unless the optimizer was away for longer than one.
        end = self.window_end_s()
        self._open_window(state.window + 1, end if now - end < self.site.window_s else now)

    def _profile(self, now: float) -> None:
        """Run the pipeline in the room made for it; plan when it is through."""
        self._pipeline.assign(self.executors, now, share=self.site.profiling.share)
        over = now - self.state.window_opened_s > self.site.profiling.limit * self.site.window_s
        if over and not self._pipeline.finished():
            self._notice("warning", f"profiling was cut off after {self.site.profiling.limit:.0%} of the window")
            self._pipeline.cut_off()
        if self._pipeline.finished():
            self.state.phase = "planning"
            self._want("profiled")

    def _close_due(self, now: float) -> None:
        for closing in [c for c in self._closings if now >= c.due_s]:
            self._closings.remove(closing)
            streams = tuple(
                stream_window(stream, self._account.close(stream.stream_id, closing.window))
                for stream in closing.streams
            )
            for stream in streams:
                self._profiler.window_closed(stream.stream_id, closing.window, stream.predicted, stream.realised)
            self._publish(
                WindowClosed(
                    window=closing.window,
                    streams=streams,
                    realised=self._mean(streams, lambda s: s.realised) or 0.0,
                    predicted=self._mean(streams, lambda s: s.predicted),
                )
            )
        if self.state.phase == "finished" and not self._closings:
            self._finish(0, f"{self.state.window + 1} windows are done")

    def _mean(self, streams: tuple[StreamWindow, ...], value: Callable[[StreamWindow], float | None]) -> float | None:
        known = [(self._specs[s.stream_id].weight, v) for s in streams if (v := value(s)) is not None]
        total = sum(weight for weight, _ in known)
        return sum(weight * v for weight, v in known) / total if total else None

    def _finish(self, exit_code: int, reason: str) -> None:
        for executor_id in self.executors:
            self._send(executor_id, m.Leave(reason=reason))
        self._out.append(Save())
        self._out.append(Finish(exit_code=exit_code, reason=reason))
        self._over = True

    # ------------------------------------------------------------ planning

    def _want(self, reason: str) -> None:
        self._wanted = f"{self._wanted}; {reason}" if self._wanted else reason

    def _ask_if_wanted(self, now: float) -> None:
        state, reason = self.state, self._wanted
        if reason is None or state.phase not in _WINDOW_PHASES or self._adopt_until_s is not None or self._over:
            return
        left = self.window_end_s() - now
        homeless = any(s.checkpoint and not s.serving_executor for s in state.streams.values())
        if state.phase == "executing" and left < self.site.replan_s and not homeless:
            self._wanted = None
            return
        profiling = state.phase == "profiling"
        problem = questions.make_problem(
            state,
            self.site,
            self.executors,
            now=now,
            left_s=max(left, 0.1),
            reserved_share=self.site.profiling.share if profiling else 0.0,
            with_retraining=not profiling,
        )
        if problem is None:
            return  # asked again as soon as an executor is there
        self._wanted = None
        self._token += 1
        phase: Literal["profiling", "plan", "replan"] = (
            "profiling" if profiling else "plan" if state.phase == "planning" else "replan"
        )
        self._question = _Question(self._token, problem, phase, reason, now)
        self._out.append(Solve(token=self._token, problem=problem, window=state.window, phase=phase))

    def _solved(self, event: Solved, now: float) -> None:
        question = self._question
        if question is None or event.token != question.token:
            return  # the answer to an older question
        self._question = None
        if event.plan is None:
            self._notice("error", f"no plan for window {self.state.window}: {event.reason}; the last one goes on")
        else:
            self._start_plan(question, event.plan, now)
        if question.phase == "profiling":
            self.state.room_made = True
        elif self.state.phase == "planning":
            self.state.phase = "executing"
        self._out.insert(0, Save())

    def _start_plan(self, question: _Question, plan: Plan, now: float) -> None:
        state = self.state
        verdict = judge(question.problem, plan)
        values = {s.stream_id: s.value for s in verdict.streams}
        profiles = {s.stream_id: s for s in question.problem.streams}
        elapsed = max(0.0, now - state.window_opened_s)
        for stream in state.streams.values():
            value, profile = values.get(stream.stream_id), stream.profile
            if value is None or profile is None or question.phase != "plan":
                continue
            # Until now the window was served as the profiling plan had it.
            config = stream.serving_config.config_id if stream.serving_config else ""
            served_q = next((p.relative_accuracy for p in profile.inference if p.inference_id == config), 0.0)
            before = profile.accuracy_now * served_q * elapsed
            stream.predicted = (before + value * max(0.0, self.site.window_s - elapsed)) / self.site.window_s
        state.plan, state.plan_s = plan, now
        # What ended while the planner was thinking has ended for this plan too.
        state.ended = [s.stream_id for s in state.streams.values() if s.settled and s.stream_id in profiles]
        self._publish(plan_solved(state, question.phase, question.reason, plan, verdict))

    def _follow(self, now: float) -> None:
        """Set what every stream should be doing now, by the plan in force and the events so far."""
        state = self.state
        if state.plan is None or self._adopt_until_s is not None:
            return
        for assignment in state.plan.assignments:
            stream = state.streams.get(assignment.stream_id)
            if stream is None or stream.profile is None:
                continue
            serve = served(assignment, stream.profile, state.ended)
            if serve is not None and serve.executor_id in self.executors:
                if serve.executor_id != stream.serving_executor:
                    self._move(stream, now)
                stream.serving_executor = serve.executor_id
                stream.serving_config, stream.serving_share = serve.config, serve.share
            wish = retraining(assignment, stream.profile, state.ended)
            if not stream.settled:
                self._set_retraining(stream, wish, assignment.retrain is not None, now)

    def _move(self, stream: StreamState, now: float) -> None:
        """The stream is to be served elsewhere; the old place goes on until the new one is ready."""
        old, config = stream.serving_executor, stream.serving_config
        stream.leaving = None
        if old in self.executors and config is not None:
            stream.leaving = Leaving(executor_id=old, config=config, share=stream.serving_share, since_s=now)

    def _let_go(self, now: float) -> None:
        """End the old place of a moved stream when the new one is ready.

        Two streams that change places may each wait for the other's share, so that it is not waited for ever.
        """
        for stream in self.state.streams.values():
            leaving = stream.leaving
            if leaving is None:
                continue
            home = self.executors.get(stream.serving_executor)
            job_id = serving_job_id(stream.stream_id)
            ready = home is not None and any(w.job_id == job_id and w.state == "ready" for w in home.workers)
            if ready or leaving.executor_id == stream.serving_executor or now - leaving.since_s > _MOVE_S:
                stream.leaving = None

    def _set_retraining(self, stream: StreamState, wish: Retraining | None, planned: bool, now: float) -> None:
        running = stream.running
        if wish is None:
            if running is not None and not planned:
                stream.running = None
            return
        if running is not None and (running.retrain_id, running.executor_id) == (wish.retrain_id, wish.executor_id):
            if abs(running.share - wish.share) > 1e-9:
                gpu = self.executors[running.executor_id].gpu
                running.done_s = questions.work_done(running, gpu, now)
                running.since_s, running.share = now, wish.share
            return
        if wish.executor_id not in self.executors or stream.dataset is None:
            return
        version, stream.next_version = stream.next_version, stream.next_version + 1
        stream.retrain_id = wish.retrain_id
        job = m.RetrainJob(
            job_id=f"retrain/{stream.stream_id}/w{self.state.window}/v{version}",
            stream=self._specs[stream.stream_id],
            share=wish.share,
            window=self.state.window,
            dataset=stream.dataset,
            checkpoint=stream.checkpoint,
            config=wish.config,
            next_version=version,
            seed=self.state.window,
        )
        stream.running = RunningRetrain(
            job=job,
            executor_id=wish.executor_id,
            retrain_id=wish.retrain_id,
            work_s=wish.gpu_seconds,
            done_s=0.0,
            since_s=now,
            share=wish.share,
            accuracy_predicted=wish.accuracy_after,
            started_s=now,
        )

    # ------------------------------------------------------------ sending

    def _dispatch(self, now: float) -> None:
        """Send every executor its desired state when it changed, and again until it is acknowledged."""
        state = self.state
        if state.phase == "finished" or self._adopt_until_s is not None or self._over:
            return
        self._follow(now)
        self._let_go(now)
        wanted = desired_jobs(state, self._specs, self.executors)
        changed = [e for e in self.executors if self._jobs.get(e) != wanted[e] or self._window_of(e) != state.window]
        if changed:
            state.revision += 1
        site_s = now - (state.origin_s if state.origin_s is not None else now)
        for executor_id, executor in self.executors.items():
            if executor_id in changed:
                executor.sent = PlanVersion(term=state.term, window=state.window, revision=state.revision)
            elif executor.sent is None or executor.applied == executor.sent or now - executor.sent_s < _RESEND_S:
                continue
            executor.sent_s = now
            self._jobs[executor_id] = wanted[executor_id]
            jobs = stamp_positions(wanted[executor_id], site_s)
            self._send(executor_id, m.ApplyPlan(version=executor.sent, lifetime_s=_LIFETIME_S, jobs=jobs))
        if changed:
            self._out.insert(0, Save())

    def _window_of(self, executor_id: str) -> int | None:
        sent = self.executors[executor_id].sent
        return sent.window if sent else None

    # ------------------------------------------------------------ small things

    def _send(self, executor_id: str, message: m.Down) -> None:
        self._out.append(Send(executor_id=executor_id, message=message))

    def _publish(self, event: TelemetryEvent) -> None:
        self._out.append(Publish(event=event))

    def _notice(self, level: Literal["info", "warning", "error"], text: str) -> None:
        self._publish(Notice(level=level, text=text))


def _text(version: PlanVersion) -> str:
    return f"{version.term}.{version.window}.{version.revision}"
