"""The label budget of a window: what it has for whom, and what was spent. Works on the site's state.

Who gets how many frames is decided in ``optimizer.label_budget``. Without a budget everything is labelled as the
streams ask for, and only counted. What the golden model looks at is charged when the job that did it reports; what was
spent beyond the budget is taken off that of the next window.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from optimizer.config import SiteConfig
from optimizer.emitter import Emitter
from optimizer.label_budget import LabelNeed, allocate
from optimizer.ports import TrialWish
from optimizer.state import LabelSpend, SiteState, StreamState
from protocol.events import LabelsSpent
from protocol.schema import CanaryResult, InferenceConfig, LabelResult, OracleGolden, StreamSpec, TrialResult

# A clip of fewer frames than this says nothing about configurations that skip frames.
_LEAST_CLIP = 30


def label_span_s(site: SiteConfig, spec: StreamSpec) -> float:
    """Seconds of its past that are labelled when a stream's own window opens."""
    return site.profiling.label_span * site.window_s * spec.retrain_every


class Labels:
    """The one account of golden-model seconds."""

    def __init__(self, site: SiteConfig, state: SiteState, specs: Mapping[str, StreamSpec], emit: Emitter) -> None:
        self._site = site
        self._state = state
        self._specs = specs
        self._emit = emit

    # ------------------------------------------------------------ windows

    def open(self, window: int, opening: Collection[str]) -> None:
        """Begin the account of a window, once, and share it out among the streams in ``opening``.

        Its first labels may be made before the window itself opens.
        """
        state, config = self._state, self._site.labels
        last = state.label_spend
        if last.window >= window:
            return
        self.close()
        debt_s = max(0.0, last.spent_s - last.budget_s) if last.budget_s is not None else 0.0
        state.label_spend = LabelSpend(window=window)
        for stream in state.streams.values():
            stream.label_frames = None
        if config.budget_gpu_s is None:
            return
        # However much was overspent, something is left: streams that nobody measures drift unseen.
        state.label_spend.budget_s = budget_s = max(0.25 * config.budget_gpu_s, config.budget_gpu_s - debt_s)
        if window == 0:
            return  # the bootstrap has labelled it
        streams = [s for s in state.streams.values() if s.stream_id in opening and s.checkpoint and not s.degraded]
        counts = allocate(
            [self._need(stream) for stream in streams],
            (1.0 - config.kept_share) * budget_s,
            allocation=config.allocation,
            uniform_share=config.uniform_share,
            min_frames=config.min_frames,
        )
        for stream in streams:
            stream.label_frames = counts[stream.stream_id]
        without = sorted(stream_id for stream_id, count in counts.items() if count == 0)
        if without:
            text = f"labels.budget_gpu_s has nothing for {', '.join(without)} in window {window}"
            self._emit.notice("warning", text)

    def close(self) -> None:
        """Say what was spent in the window whose account is open."""
        spend = self._state.label_spend
        if spend.window >= 0:
            self._emit.publish(
                LabelsSpent(
                    window=spend.window,
                    budget_gpu_s=spend.budget_s,
                    labels_s=spend.labels_s,
                    trials_s=spend.trials_s,
                    canary_s=spend.canary_s,
                )
            )

    # ------------------------------------------------------------ charges

    def charge(self, stream_id: str, result: LabelResult | TrialResult | CanaryResult) -> None:
        """A job that used a golden model reported."""
        spend = self._state.label_spend
        match result:
            case LabelResult():
                spend.labels_s += result.golden_s
                stream = self._state.streams.get(stream_id)
                if stream is not None and result.num_frames > 0:
                    stream.golden_frame_s = result.golden_s / result.num_frames
                # Labels after a sudden drift leave what is set aside for the next window's alone.
                if stream is not None and result.dataset.window >= spend.window:
                    stream.label_frames = None
            case TrialResult():
                spend.trials_s += result.golden_s
            case CanaryResult():
                spend.canary_s += result.golden_s

    # ------------------------------------------------------------ what there is

    def frames_left(self, stream: StreamState) -> int | None:
        """Frames of a stream that the rest of the budget pays for, None = as many as one likes.

        What is set aside for labels that are still to be made is not there any more.
        """
        spend, cost_s = self._state.label_spend, self._cost_s(stream)
        if spend.budget_s is None or cost_s <= 0.0:
            return None
        set_aside_s = sum((other.label_frames or 0) * self._cost_s(other) for other in self._state.streams.values())
        return max(0, int((spend.budget_s - spend.spent_s - set_aside_s) / cost_s + 1e-9))

    def frames_for(self, stream: StreamState, *, urgent: bool) -> int:
        """``LabelJob.num_frames``: 0 = as many as the label rate asks for. ``urgent``: labels after a sudden drift."""
        if not urgent and stream.label_frames is not None:
            return stream.label_frames
        left = self.frames_left(stream)
        return 0 if left is None else max(1, left)

    def clip(self, stream: StreamState, wish: TrialWish) -> tuple[tuple[InferenceConfig, ...], int]:
        """Inference trials of a wish and the frames of their clip, as far as half of what is left pays for them."""
        left = self.frames_left(stream)
        if left is None or not wish.inference or wish.num_frames <= left // 2:
            return wish.inference, wish.num_frames
        return (wish.inference, left // 2) if left // 2 >= _LEAST_CLIP else ((), 0)

    def look_fps(self, stream: StreamState, span_s: float, now: float) -> float:
        """Frames a second that a comparison may label of a stretch of ``span_s``; 0 = it has to wait.

        What is left is spread over what is left of the window and over the models that are compared.
        """
        wanted = min(self._site.gate.label_fps, self._specs[stream.stream_id].fps)
        left = self.frames_left(stream)
        if left is None:
            return wanted
        rest_s = max(span_s, self._state.window_opened_s + self._site.window_s - now)
        watched = max(1, sum(other.canary is not None for other in self._state.streams.values()))
        frames = left * span_s / (rest_s * watched)
        return min(wanted, max(frames, 1.0) / span_s) if left >= 1 else 0.0

    def affords_alarm(self, stream: StreamState) -> bool:
        """Whether labels after a sudden drift can still be paid for."""
        left = self.frames_left(stream)
        return left is None or left >= self._site.labels.min_frames

    # ------------------------------------------------------------ small things

    def _need(self, stream: StreamState) -> LabelNeed:
        spec = self._specs[stream.stream_id]
        return LabelNeed(
            stream_id=stream.stream_id,
            num_wanted=max(1, int(label_span_s(self._site, spec) * min(spec.label_fps, spec.fps) + 1e-9)),
            seconds_per_frame=self._cost_s(stream),
            drift=stream.drift,
            accuracy=stream.profile.accuracy_now if stream.profile is not None else None,
            doubt=stream.doubt,
            weight=spec.weight,
        )

    def _cost_s(self, stream: StreamState) -> float:
        """Busy seconds of the golden model per frame: as last measured, else as configured, else nothing."""
        if stream.golden_frame_s > 0.0:
            return stream.golden_frame_s
        golden = self._specs[stream.stream_id].golden
        return golden.seconds_per_frame if isinstance(golden, OracleGolden) else 0.0
