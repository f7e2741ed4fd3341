"""Sends every executor its desired state when it changed, and again until it is acknowledged."""

from __future__ import annotations

from collections.abc import Mapping

from optimizer.emitter import Emitter
from optimizer.following import desired_jobs, stamp_positions
from optimizer.lending import lent
from optimizer.state import ExecutorState, SiteState
from protocol import messages as m
from protocol.plan import PlanVersion
from protocol.schema import StreamSpec

# A plan that is not acknowledged is sent again after this long; applying it twice is harmless.
_RESEND_S = 1.0
# A plan that waited longer than this somewhere on its way is of no use any more.
_LIFETIME_S = 5.0


class Dispatcher:
    """Remembers what was sent last to whom."""

    def __init__(
        self,
        state: SiteState,
        specs: dict[str, StreamSpec],
        executors: Mapping[str, ExecutorState],
        emit: Emitter,
    ) -> None:
        self._state = state
        self._specs = specs
        self._executors = executors
        self._emit = emit
        self._jobs: dict[str, list[m.Job]] = {}

    def forget(self, executor_id: str) -> None:
        """It may not hold what was sent to it: the next call sends it all."""
        self._jobs.pop(executor_id, None)

    def dispatch(self, now: float) -> None:
        """One new revision for all whose jobs changed or whose window is over; nothing for the others."""
        state = self._state
        wanted = {
            executor_id: lent(jobs) if self._executors[executor_id].can_resize_live else jobs
            for executor_id, jobs in desired_jobs(state, self._specs, self._executors).items()
        }
        changed = {
            executor_id
            for executor_id, executor in self._executors.items()
            if not self._pausing(executor, now)
            and (
                self._jobs.get(executor_id) != wanted[executor_id]
                or executor.sent is None
                or executor.sent.window != state.window
            )
        }
        if changed:
            state.revision += 1
            self._emit.save()
        site_s = now - (state.origin_s if state.origin_s is not None else now)
        for executor_id, executor in self._executors.items():
            if executor_id in changed:
                executor.sent = PlanVersion(term=state.term, window=state.window, revision=state.revision)
            elif (
                executor.sent is None
                or executor.applied == executor.sent
                or now - executor.sent_s < _RESEND_S
                or self._pausing(executor, now)
            ):
                continue
            executor.sent_s = now
            self._jobs[executor_id] = wanted[executor_id]
            jobs = stamp_positions(wanted[executor_id], site_s)
            self._emit.send(executor_id, m.ApplyPlan(version=executor.sent, lifetime_s=_LIFETIME_S, jobs=jobs))

    @staticmethod
    def _pausing(executor: ExecutorState, now: float) -> bool:
        """It refused a plan a moment ago; the same one again and again would only keep both of us busy."""
        return executor.refused_s is not None and now - executor.refused_s < _RESEND_S
