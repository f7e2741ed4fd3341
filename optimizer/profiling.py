"""When labels and trials run, and at what share: before the window is planned, or beside its plan."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from optimizer.asking import WINDOW_PHASES, Asker
from optimizer.config import SiteConfig
from optimizer.emitter import Emitter
from optimizer.following import used_shares
from optimizer.pipeline import FIRST, LEAST_SHARE, MEASURING, TRIALS, Pipeline
from optimizer.state import ExecutorState, SiteState, StreamState
from optimizer.windows import opens
from protocol.schema import StreamSpec

# Workers start, one stream cannot be shared out, and what plans leave over changes.
_MARGIN = 1.3


class Profiling:
    """Gives the pipeline its executors and shares. ``num_windows`` None = for ever."""

    def __init__(
        self,
        site: SiteConfig,
        state: SiteState,
        specs: Mapping[str, StreamSpec],
        executors: Mapping[str, ExecutorState],
        pipeline: Pipeline,
        asker: Asker,
        emit: Emitter,
        num_windows: int | None,
    ) -> None:
        self._site = site
        self._state = state
        self._specs = specs
        self._executors = executors
        self._pipeline = pipeline
        self._asker = asker
        self._emit = emit
        self._num_windows = num_windows

    def is_ahead(self) -> bool:
        """Whether what a window's first plan needs was made before it opened, at least for half of the streams.

        What is missing is then made beside the plan: a head start would have all streams served worse for the sake of
        a few.
        """
        missing = sum(stream.stage in FIRST for stream in self._state.streams.values())
        return self._site.profiling.beside and 2 * missing <= len(self._state.streams)

    def before_plan(self, now: float) -> None:
        """Run the pipeline in the room made for it; plan when it is through, or has had its head start."""
        state, profiling = self._state, self._site.profiling
        stages = FIRST if profiling.beside else None
        if state.profiling_share > 0.0:
            self._pipeline.assign(self._executors, now, share=state.profiling_share, stages=stages)
        else:
            self._emit.notice("warning", "the streams leave no room for profiling; the last estimates are used")
            self._pipeline.cut_off()
        part = profiling.head_start if profiling.beside else profiling.limit
        over = now - state.window_opened_s > part * self._site.window_s
        if over and not profiling.beside and not self._pipeline.finished():
            self._emit.notice("warning", f"profiling was cut off after {part:.0%} of the window")
            self._pipeline.cut_off()
        if (over and profiling.beside) or self._pipeline.finished(stages):
            state.phase = "planning"
            through = self._pipeline.finished()
            self._asker.want("profiled" if through else "the window is planned, trials go on beside")

    def beside_plans(self, now: float) -> None:
        """Labels and trials in the share that plans keep free for them; measurements, and the labels of the next
        window, in what they leave over."""
        state, profiling = self._state, self._site.profiling
        if state.phase not in WINDOW_PHASES:
            return
        self._pipeline.fit(used_shares(state, self._executors), self._most)
        if state.phase == "profiling" or state.plan is None or not profiling.beside:
            return
        told = self._pipeline.drop_overdue(now)
        if told:
            self._emit.add(*told)
            self._asker.want("profiling was cut off")
        self._look_ahead(now)
        used = used_shares(state, self._executors)
        ahead = any(stream.ahead > state.window for stream in state.streams.values())
        for executor_id, executor in sorted(self._executors.items()):
            left = 1.0 - used[executor_id]
            room = left if ahead else min(left, self._asker.room_for_trials(executor_id))
            for share, stages in ((room, FIRST if ahead else TRIALS), (left, MEASURING)):
                if share >= LEAST_SHARE:
                    self._pipeline.assign({executor_id: executor}, now, min(share, profiling.share), stages)

    def _most(self, executor_id: str, stream: StreamState) -> float:
        """Share that a stream's job may have on an executor where there is room."""
        state = self._state
        if state.phase == "profiling":
            return state.profiling_share
        if stream.ahead > state.window or stream.stage in MEASURING:
            return self._site.profiling.share
        return self._asker.room_for_trials(executor_id)

    def _look_ahead(self, now: float) -> None:
        """Shortly before the window ends the labels of the next one begin."""
        state, following = self._state, self._state.window + 1
        if state.phase != "executing" or (self._num_windows is not None and following >= self._num_windows):
            return
        opening = [name for name, spec in self._specs.items() if opens(spec, following)]
        if state.window_opened_s + self._site.window_s - now <= self._lead_s(opening):
            self._pipeline.label_ahead(following, opening)

    def _lead_s(self, opening: Collection[str]) -> float:
        """How long before a window its labels begin: so that they are just ready, as far as last time tells."""
        state, most_s = self._state, self._site.profiling.ahead * self._site.window_s
        took_s = [state.streams[stream_id].first_s for stream_id in opening]
        if not took_s or min(took_s) <= 0.0:
            return most_s
        used = used_shares(state, self._executors).values()
        left = sum(min(self._site.profiling.share, max(0.0, 1.0 - share)) for share in used)
        return min(most_s, _MARGIN * sum(took_s) / left) if left > LEAST_SHARE else most_s
