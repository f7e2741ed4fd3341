"""What all streams of a site together have taught; built from the history, handed to every stream's estimate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from profiler.corrections import retraining_costs
from profiler.costs import CostModel, GroupKey
from profiler.intervals import PastError
from profiler.outcomes import held_out_errors, worth_errors
from profiler.points import window_points
from profiler.priors import AccuracyPrior, fit_prior
from profiler.process import Point
from profiler.slowness import Slowness, learn_slowness
from profiler.targets import Gaps, SiteWindow, learn_gaps, observations
from protocol.schema import Record


class SiteKnowledge(Record, frozen=True, kw_only=True):
    """``prior``: what retrainings reach, None with too few of them. ``gaps``: live against held-out accuracy,
    None = estimates are held-out accuracies.

    ``errors``, ``held_out_errors``: past estimates' errors, for the intervals. ``costs``: of groups of configurations
    on any stream, from trials; ``retrained``: from whole retrainings. ``points``: accuracies measured on all streams.
    ``slowness``: what the clock adds to busy seconds.
    """

    prior: AccuracyPrior | None = None
    gaps: Gaps | None = None
    errors: tuple[PastError, ...] = ()
    held_out_errors: tuple[PastError, ...] = ()
    costs: dict[GroupKey, CostModel] = msgspec.field(default_factory=dict)
    retrained: dict[GroupKey, CostModel] = msgspec.field(default_factory=dict)
    points: tuple[Point, ...] = ()
    slowness: Slowness = Slowness()


def learn_site(
    windows: Sequence[SiteWindow], costs: Mapping[GroupKey, CostModel], *, correct_live: bool
) -> SiteKnowledge:
    """``correct_live`` False: live accuracy is left out, estimates and targets are held-out accuracies."""
    gaps = learn_gaps(windows) if correct_live else None
    newest = max((w.order for w in windows), default=0)
    return SiteKnowledge(
        prior=fit_prior(observations(windows, gaps)),
        gaps=gaps,
        errors=tuple(error for w in windows for error in worth_errors(w.stream_id, newest - w.order, w.history, gaps)),
        held_out_errors=tuple(
            error for w in windows for error in held_out_errors(w.stream_id, newest - w.order, w.history)
        ),
        costs=dict(costs),
        slowness=learn_slowness(windows),
        retrained=retraining_costs([w.history for w in sorted(windows, key=lambda w: w.order)], costs),
        points=tuple(
            point for w in windows for point in window_points(w.stream_id, w.order, w.history, live=correct_live)
        ),
    )
