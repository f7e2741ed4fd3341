"""Asks the planner when something happened that a plan depends on, and starts the plan that comes back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from optimizer import demands, questions
from optimizer.config import SiteConfig
from optimizer.emitter import Emitter
from optimizer.objective import Verdict, judge
from optimizer.ports import Solve, Solved
from optimizer.state import ExecutorState, SiteState
from optimizer.summaries import plan_solved
from protocol.plan import Plan, Problem
from protocol.schema import LinkSpec

WINDOW_PHASES = ("profiling", "planning", "executing")
# Phases without retrainings: before the first window, and while a window's profiling takes its share.
_SERVING_ONLY = ("starting", "profiling")


class _Question(msgspec.Struct, frozen=True):
    """What the planner was asked last."""

    token: int
    problem: Problem
    phase: Literal["profiling", "plan", "replan"]
    reason: str
    left_s: float  # of the site's window
    trial_room: dict[str, float]  # share that is kept free for trials, by executor


class Asker:
    """At most one question is open; a newer one replaces it."""

    def __init__(
        self,
        site: SiteConfig,
        state: SiteState,
        executors: Mapping[str, ExecutorState],
        emit: Emitter,
        links: tuple[LinkSpec, ...] = (),
    ) -> None:
        self._site = site
        self._links = links
        self._state = state
        self._executors = executors
        self._emit = emit
        self._question: _Question | None = None
        self._wanted: str | None = None
        self._after = ""
        self._token = 0

    @property
    def waiting(self) -> bool:
        """A question is open or about to be asked."""
        return self._question is not None or self._wanted is not None or bool(self._after)

    def room_for_trials(self, executor_id: str) -> float:
        """What the plan in force, and the one that is being made, keep free for labels and trials."""
        room = self._state.trial_room.get(executor_id, 0.0)
        return room if self._question is None else min(room, self._question.trial_room.get(executor_id, 0.0))

    def forget(self) -> None:
        """Whatever was asked or wanted does not matter any more."""
        self._question, self._wanted, self._after = None, None, ""

    def want_after(self, reason: str) -> None:
        """Ask once the answer to an open question is there: what comes often must not keep plans from being made."""
        if self._question is None:
            self.want(reason)
        else:
            self._after = f"{self._after}; {reason}" if self._after else reason

    def want(self, reason: str) -> None:
        self._wanted = f"{self._wanted}; {reason}" if self._wanted else reason

    def overtaken(self, reason: str) -> None:
        """What an open question was about is not so any more: its answer is not waited for, it is asked anew."""
        if self._question is not None:
            self.want(f"{self._question.reason}; {reason}")
            self._question = None

    def ask_if_wanted(self, now: float) -> None:
        state, reason = self._state, self._wanted
        if reason is None or state.phase not in (*WINDOW_PHASES, "starting"):
            return
        left = self._site.window_s if state.phase == "starting" else state.window_opened_s + self._site.window_s - now
        homeless = any(
            s.checkpoint and not s.serving_executor and s.stream_id not in state.shed for s in state.streams.values()
        )
        if state.phase == "executing" and left < self._site.replan_s and not homeless:
            self._wanted, self._after = None, ""
            return
        serving_only = state.phase in _SERVING_ONLY
        demands.plan_with(state.streams.values())
        problem = questions.make_problem(
            state,
            self._site,
            self._executors,
            now=now,
            left_s=max(left, 0.1),
            with_retraining=not serving_only,
            links=self._links,
        )
        if problem is None:
            return  # asked again as soon as an executor is there
        # The newest state is asked about: what was to be asked later is in it.
        reason = f"{reason}; {self._after}" if self._after else reason
        self._wanted, self._after = None, ""
        self._token += 1
        phase: Literal["profiling", "plan", "replan"] = (
            "profiling" if serving_only else "plan" if state.phase == "planning" else "replan"
        )
        room = questions.room_for_trials(state, self._executors)
        self._question = _Question(self._token, problem, phase, reason, max(left, 0.1), room)
        self._emit.add(Solve(token=self._token, problem=problem, window=state.window, phase=phase))

    def solved(self, event: Solved, now: float) -> None:
        question = self._question
        if question is None or event.token != question.token:
            return  # the answer to an older question
        self._question = None
        if self._after:
            self.want(self._after)
            self._after = ""
        if event.plan is None:
            self._do_with_less(question, event.reason)
            return
        self._start_plan(question, event.plan, now)
        if question.phase == "profiling":
            self._state.room_made = True
        elif self._state.phase == "planning":
            self._state.phase = "executing"
        self._emit.save()

    def _do_with_less(self, question: _Question, reason: str) -> None:
        """No plan serves all that was asked for: give profiling less, and streams up only when nothing else helps."""
        state = self._state
        trying = any(stream.awaits_trial and stream.alarm is None for stream in state.streams.values())
        if trying and state.phase in ("planning", "executing"):
            state.beside_share = self._halved(state.beside_share)
            if state.beside_share <= 0.0:
                self._emit.notice("warning", "the streams leave no room for profiling; the last estimates are used")
                state.pipeline.clear()
                for stream in state.streams.values():
                    stream.stage = "done"
            self.want("trials beside the plan have to do with less")
            return
        if state.phase == "profiling" and state.profiling_share > 0.0:
            state.profiling_share = self._halved(state.profiling_share)
            self.want("profiling has to do with less")
            return
        if state.phase == "executing" and any(stream.alarm is not None for stream in state.streams.values()):
            for stream in state.streams.values():
                if stream.alarm is not None:
                    stream.alarm, stream.stage = None, "done"  # it waits for the next window
            self.want("there is no room to look after a drift")
            return
        if state.watch_share > 0.0 and any(stream.canary for stream in state.streams.values()):
            state.watch_share = 0.0  # comparisons make do with what plans leave over
            self.want("comparing models has to do with less")
            return
        out = questions.too_many(question.problem)
        if len(question.problem.streams) > len(out):
            state.shed += out
            for stream_id in out:
                stream = state.streams[stream_id]
                stream.serving_executor, stream.serving_config, stream.running = "", None, None
                stream.sent = None
            self._emit.notice("error", f"overloaded, not served in this window: {', '.join(out)} ({reason})")
            self.want("overloaded")
        else:
            self._emit.notice("error", f"no plan for window {state.window}: {reason}")

    @staticmethod
    def _until_window_end(question: _Question, plan: Plan) -> Verdict:
        """The judgement with every stream counted until the end of the site's window, where the plan looks further."""
        problem = question.problem
        if problem.window_s <= question.left_s:
            return judge(problem, plan)
        streams = tuple(msgspec.structs.replace(stream, window_s=question.left_s) for stream in problem.streams)
        return judge(msgspec.structs.replace(problem, streams=streams), plan)

    def _start_plan(self, question: _Question, plan: Plan, now: float) -> None:
        state = self._state
        verdict = judge(question.problem, plan)
        values = {s.stream_id: s.value for s in self._until_window_end(question, plan).streams}
        profiles = {s.stream_id: s for s in question.problem.streams}
        elapsed = max(0.0, now - state.window_opened_s)
        learned = False
        for stream in state.streams.values():
            asked = profiles.get(stream.stream_id)
            if stream.unplanned and asked and stream.profile and asked.accuracy_now == stream.profile.accuracy_now:
                learned, stream.unplanned = True, False
            # Until now it was served as the plan before this one had it.
            config = stream.serving_config.config_id if stream.serving_config else ""
            choices = stream.profile.inference if stream.profile else ()
            served_q = next((p.relative_accuracy for p in choices if p.inference_id == config), 0.0)
            now_q = served_q * stream.profile.accuracy_now if stream.profile else 0.0
            stream.earned_s += now_q * max(0.0, now - max(state.plan_s, state.window_opened_s))
        for stream in state.streams.values():
            value, profile = values.get(stream.stream_id), stream.profile
            if value is None or profile is None or question.phase == "profiling":
                continue
            # Where streams are profiled beside plans the window is promised once the last of them is through.
            if question.phase != "plan" and (not learned or stream.settled):
                continue
            left_s = max(0.0, self._site.window_s - elapsed)
            stream.predicted = (stream.earned_s + value * left_s) / self._site.window_s
        state.plan, state.plan_s = plan, now
        state.trial_room = question.trial_room
        # What ended while the planner was thinking has ended for this plan too.
        state.ended = [s.stream_id for s in state.streams.values() if s.settled and s.stream_id in profiles]
        self._emit.publish(plan_solved(state, question.phase, question.reason, plan, verdict, question.problem))

    def _halved(self, share: float) -> float:
        """Half of a share, in whole quanta."""
        quanta = int(share / self._site.share_quantum + 1e-6) // 2
        return quanta * self._site.share_quantum
