"""Past estimates of retrainings that have met their outcomes: what intervals and habits are learned from."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from profiler.corrections import reached_accuracy
from profiler.intervals import PastError
from profiler.records import ConfigEstimate, Outcome, WindowHistory
from profiler.targets import Gaps, worth


def worth_errors(stream_id: str, age: int, window: WindowHistory, gaps: Gaps | None) -> Iterator[PastError]:
    """Errors of what a window's retrainings were said to be worth. ``age``: windows since then, 0 = the last one."""
    return _errors(
        stream_id,
        age,
        window,
        lambda row: (row.accuracy_after, row.scale or row.accuracy_error),
        lambda outcome: worth(window, outcome, gaps),
    )


def held_out_errors(stream_id: str, age: int, window: WindowHistory) -> Iterator[PastError]:
    """Errors of what a window's retrainings were said to measure on its held-out split."""
    return _errors(stream_id, age, window, lambda row: (row.held_out, row.held_out_scale), reached_accuracy)


def _errors(
    stream_id: str,
    age: int,
    window: WindowHistory,
    said: Callable[[ConfigEstimate], tuple[float | None, float]],
    came_out: Callable[[Outcome], float | None],
) -> Iterator[PastError]:
    rows = {row.config: row for row in window.estimate.retrain} if window.estimate is not None else {}
    for outcome in window.outcomes:
        row, reached = rows.get(outcome.result.config), came_out(outcome)
        expected, scale = said(row) if row is not None else (None, 0.0)
        if expected is not None and reached is not None:
            yield PastError(stream_id=stream_id, age=age, error=reached - expected, scale=scale)
