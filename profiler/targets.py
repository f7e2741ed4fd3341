"""What a retraining turned out to be worth: the number that estimates are compared with and learned from.

Three measurements of one retrained model, from the best to the worst:

1. live accuracy of the frames that it served (``LiveAccuracy``): hundreds of objects of the window it was made for;
2. held-out accuracy, with half of what the serving model got there above or below its accuracy on all labels of the
   window taken off: the split is small, and how easy it is shows in both models (a control variate);
3. nothing, for a retraining that was cut short.

Live accuracy is lower than held-out accuracy where objects of the training frames are seen again in the held-out ones,
and where the scene drifts on. That gap is learned over the site, in log-odds, from the models of which both are known,
and taken off the others. The same is done for the model that serves now (:func:`serving_gap`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from profiler.corrections import DECAY, from_logit, logit, reached_accuracy, shrunk_mean
from profiler.priors import Observation
from profiler.records import LiveAccuracy, Outcome, WindowHistory
from protocol.schema import Record

MIN_LIVE_FRAMES = 20
# Part of the split's hardness that is taken off, and observations without a gap that are assumed to have been made.
SPLIT_WEIGHT = 0.5
GAP_STRENGTH = 3.0
MAX_GAP = 1.0  # in log-odds
# Weight of a held-out accuracy of a few dozen crops against a live one of hundreds.
HELD_OUT_WEIGHT = 0.6


class SiteWindow(Record, frozen=True, kw_only=True):
    """A past window of one stream in the order of the site's windows, 0 the oldest."""

    order: int
    stream_id: str
    history: WindowHistory


class Gaps(Record, frozen=True, kw_only=True):
    """Live less held-out accuracy in log-odds: of the serving model, of a retrained one. 0 = nothing known."""

    serving: float = 0.0
    retrained: float = 0.0


def held_out_accuracy(window: WindowHistory, outcome: Outcome) -> float | None:
    """Second measurement: held-out accuracy with half of the split's hardness taken off."""
    reached = reached_accuracy(outcome)
    if reached is None:
        return None
    now = window.estimate.accuracy_validated if window.estimate is not None else outcome.result.accuracy_before
    return min(max(reached + SPLIT_WEIGHT * (now - outcome.result.accuracy_before), 0.0), 1.0)


def live_accuracy(window: WindowHistory, outcome: Outcome) -> float | None:
    """First measurement, None when the model did not serve for long enough."""
    checkpoint = outcome.result.checkpoint
    if not outcome.promoted or checkpoint is None:
        return None
    return next((r.accuracy for r in window.live if r.version == checkpoint.version and _enough(r)), None)


def worth(window: WindowHistory, outcome: Outcome, gaps: Gaps | None) -> float | None:
    """Accuracy on live frames that the retraining was worth, None when it says nothing about its configuration.

    ``gaps`` None: the held-out accuracy, whatever was measured live.
    """
    held_out, live = held_out_accuracy(window, outcome), live_accuracy(window, outcome)
    if held_out is None or gaps is None:
        return held_out
    return live if live is not None else from_logit(logit(held_out) + gaps.retrained)


def learn_gaps(windows: Sequence[SiteWindow]) -> Gaps:
    """Both gaps over all streams of the site, shrunk towards none."""
    newest = max((w.order for w in windows), default=0)
    serving: list[tuple[float, float]] = []
    retrained: list[tuple[float, float]] = []
    for window in windows:
        weight = DECAY ** (newest - window.order)
        for outcome in window.history.outcomes:
            live, held_out = live_accuracy(window.history, outcome), held_out_accuracy(window.history, outcome)
            if live is not None and held_out is not None:
                retrained.append((logit(live) - logit(held_out), weight))
        served = _served_first(window.history)
        if served is not None and window.history.estimate is not None:
            serving.append((logit(served) - logit(window.history.estimate.accuracy_validated), weight))
    return Gaps(serving=_bounded(serving), retrained=_bounded(retrained))


def observations(windows: Sequence[SiteWindow], gaps: Gaps | None) -> tuple[Observation, ...]:
    """What the site's past retrainings say, for the regression over all of them; ``gaps`` as in :func:`worth`."""
    found = []
    for window in windows:
        estimate = window.history.estimate
        for outcome in window.history.outcomes:
            after = worth(window.history, outcome, gaps)
            if after is None:
                continue
            before = outcome.result.accuracy_before if estimate is None else estimate.accuracy_validated
            found.append(
                Observation(
                    stream_id=window.stream_id,
                    window=window.order,
                    config=outcome.result.config,
                    accuracy_before=before,
                    accuracy_after=after,
                    weight=HELD_OUT_WEIGHT if gaps and live_accuracy(window.history, outcome) is None else 1.0,
                )
            )
    return tuple(found)


def _served_first(window: WindowHistory) -> float | None:
    """Live accuracy of the model that the window began with."""
    retrained = {o.result.checkpoint.version for o in window.outcomes if o.result.checkpoint is not None}
    first = next((row for row in window.live if row.version not in retrained and _enough(row)), None)
    return first.accuracy if first is not None else None


def _enough(row: LiveAccuracy) -> bool:
    return row.num_frames >= MIN_LIVE_FRAMES


def _bounded(pairs: Iterable[tuple[float, float]]) -> float:
    mean, _ = shrunk_mean(pairs, GAP_STRENGTH)
    return min(max(mean, -MAX_GAP), MAX_GAP)
