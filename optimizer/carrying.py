"""Carries the plan in force out: which stream is served where, which retraining runs. Works on the site's state."""

from __future__ import annotations

from collections.abc import Mapping

from optimizer import moving, questions
from optimizer.following import ended_in, planned_shares, retraining, served
from optimizer.retrain_jobs import new_job
from optimizer.state import ExecutorState, Leaving, Retraining, RunningRetrain, SiteState, StreamState
from optimizer.zoo import find
from protocol.schema import StreamSpec

# A stream that moves to another GPU is served at the old place for at most so long. Starting at the new one takes a
# second or two, on a machine whose cores are all busy over ten.
_MOVE_S = 30.0


class Carrier:
    """``executors`` are those that are there; the mapping is the coordinator's own."""

    def __init__(
        self, state: SiteState, specs: Mapping[str, StreamSpec], executors: Mapping[str, ExecutorState]
    ) -> None:
        self._state = state
        self._specs = specs
        self._executors = executors

    def follow(self, now: float) -> bool:
        """Set what every stream should be doing now, by the plan in force and the events so far.

        True when a retraining begins by it.
        """
        state = self._state
        if state.plan is None:
            return False
        began = False
        ended = ended_in(state.plan, state.ended)
        for assignment in state.plan.assignments:
            stream = state.streams.get(assignment.stream_id)
            if stream is None or stream.profile is None:
                continue
            serve = served(assignment, stream.profile, ended)
            if serve is not None and serve.executor_id in self._executors:
                if serve.executor_id != stream.serving_executor:
                    self._move(stream, now)
                stream.serving_executor = serve.executor_id
                stream.serving_config, stream.serving_share = serve.config, serve.share
            wish = retraining(assignment, stream.profile, ended)
            if not stream.settled:
                began |= self._set_retraining(stream, wish, now)
        return began

    def _move(self, stream: StreamState, now: float) -> None:
        """The stream is to be served elsewhere; the old place goes on until the new one is ready."""
        old, config = stream.serving_executor, stream.serving_config
        stream.leaving = None
        if old in self._executors and config is not None:
            moving.begin(stream, now)
            stream.leaving = Leaving(executor_id=old, config=config, share=stream.serving_share, since_s=now)

    def let_go(self, now: float) -> None:
        """End the old place of a moved stream when the new one is ready.

        Where the plan needs its room, it ends at once: two streams that change places cannot wait for one another.
        """
        for stream in self._state.streams.values():
            leaving = stream.leaving
            if leaving is None:
                continue
            ready = moving.is_ready(stream, self._executors)
            if ready or leaving.executor_id == stream.serving_executor or now - leaving.since_s > _MOVE_S:
                stream.leaving = None
        self._make_room()
        moving.note_moves(self._state, self._executors, now)

    def _make_room(self) -> None:
        """Old places stay only as far as there is room beside the plan: a GPU is never promised more than it has."""
        used = planned_shares(self._state, self._executors)
        for stream in self._state.streams.values():
            leaving = stream.leaving
            if leaving is None:
                continue
            used[leaving.executor_id] = used.get(leaving.executor_id, 0.0) + leaving.share
            if used[leaving.executor_id] > 1.0 + 1e-6:
                used[leaving.executor_id] -= leaving.share
                stream.leaving = None

    def _set_retraining(self, stream: StreamState, wish: Retraining | None, now: float) -> bool:
        """Begin, resize or end; True when a retraining begins."""
        running = stream.running
        if running is not None and running.stopped_s is not None:
            return False  # it is handing in what it has
        if wish is None:
            # Not in the plan, which knew of it: what it has done is lost.
            stream.running = None
            return False
        retrain_id = wish.profile.retrain_id
        if running is not None and (running.retrain_id, running.executor_id) == (retrain_id, wish.executor_id):
            if abs(running.share - wish.share) > 1e-9:
                gpu = self._executors[running.executor_id].gpu
                running.done_s = questions.work_done(running, gpu, now)
                running.since_s, running.share = now, wish.share
            return False
        if wish.executor_id not in self._executors or stream.dataset is None:
            return False
        earlier = find(self._state.zoo, wish.config.base) if wish.config.base else None
        if wish.config.base and earlier is None:
            return False  # the model that it would begin from is gone; the next plan knows
        stream.retrain_id = retrain_id
        spec = self._specs[stream.stream_id]
        start = earlier.checkpoint if earlier is not None else None
        job = new_job("retrain", stream, spec, self._state.window, wish.config, wish.share, start)
        stream.running = RunningRetrain(
            job=job,
            executor_id=wish.executor_id,
            retrain_id=retrain_id,
            work_s=questions.expected_work(wish, self._executors[wish.executor_id].gpu),
            done_s=0.0,
            since_s=now,
            share=wish.share,
            accuracy_predicted=wish.profile.accuracy_after,
            held_out_predicted=wish.profile.held_out,
            held_out_error=wish.profile.held_out_error,
            started_s=now,
        )
        return True
