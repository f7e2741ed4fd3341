"""How many frames of each stream the golden models label in a window, within a budget. Pure functions of frozen data.

Frames are handed out one after the other in a fixed order and the list is cut where the budget ends, so that

- the cost never exceeds the budget;
- every stream has its least number before any gets more than that (as far as the budget goes, one each in turn);
- a stream that drifts more, all else being equal, never gets less: its frames only move forward in the list.

Order: least numbers first. Then the *uniform part* of the budget, in proportion to the streams' label rates (a
highest-averages rule: the next frame goes to the stream with the smallest part of what it asks for). Then, with
``adaptive``, what is left: the next frame goes to the stream whose seconds of golden model are the fewest beside its
need, which is where it is worth most per second if n labels are worth need x log n.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import Literal

from protocol.schema import Count, Fraction, Name, Record, Seconds

# A stream that makes no error needs labels too: to be measured.
_LEAST_NEED = 0.05
# What nothing is known of (yet).
_UNKNOWN_DRIFT, _UNKNOWN_ACCURACY = 0.3, 0.7


class LabelNeed(Record, frozen=True, kw_only=True):
    """One stream in one window. ``num_wanted``: frames that its label rate asks for; more are never labelled.

    ``seconds_per_frame``: busy seconds of its golden model. ``drift``: how far it is from what its model was made for,
    None = not known. ``accuracy``: of that model when it was last measured, None = not known. ``doubt``: 1 less the
    student's mean confidence, None = not known. ``weight``: of the stream in
    the site's accuracy.
    """

    stream_id: Name
    num_wanted: Count
    seconds_per_frame: Seconds
    drift: Fraction | None = None
    accuracy: Fraction | None = None
    doubt: Fraction | None = None
    weight: float = 1.0


def need_of(stream: LabelNeed) -> float:
    """How much labels of a stream are needed beside those of others, > 0; rises with drift, doubt and weight.

    It is the error that is to be expected now: that of the model as it was last measured, with what a drift has taken
    off since; no less than its student's doubt. Where models are wrong there is something to be learned.
    """
    drift = _UNKNOWN_DRIFT if stream.drift is None else stream.drift
    accuracy = _UNKNOWN_ACCURACY if stream.accuracy is None else stream.accuracy
    doubt = 0.0 if stream.doubt is None else stream.doubt
    return stream.weight * max(_LEAST_NEED, doubt, 1.0 - accuracy * (1.0 - drift))


def allocate(
    streams: Sequence[LabelNeed],
    budget_s: float,
    *,
    allocation: Literal["uniform", "adaptive"],
    uniform_share: float,
    min_frames: int,
) -> dict[str, int]:
    """Frames to label per stream. They cost ``budget_s`` at most; streams whose frames cost nothing get them all."""
    counts = {stream.stream_id: stream.num_wanted for stream in streams if stream.seconds_per_frame <= 0.0}
    paid = [stream for stream in streams if stream.seconds_per_frame > 0.0]
    counts |= dict.fromkeys((stream.stream_id for stream in paid), 0)
    left_s = _hand_out(paid, counts, budget_s, lambda stream, count: count, most=min_frames)
    if allocation == "adaptive":
        # The least numbers are part of the uniform part.
        even_s = max(0.0, uniform_share * budget_s - (budget_s - left_s))
        left_s = left_s - even_s + _hand_out(paid, counts, even_s, _by_rate)
        _hand_out(paid, counts, left_s, _by_need)
    else:
        _hand_out(paid, counts, left_s, _by_rate)
    return counts


def _by_rate(stream: LabelNeed, count: int) -> float:
    return count / max(1, stream.num_wanted)


def _by_need(stream: LabelNeed, count: int) -> float:
    return count * stream.seconds_per_frame / need_of(stream)


def _hand_out(
    streams: Sequence[LabelNeed],
    counts: dict[str, int],
    budget_s: float,
    rank: Callable[[LabelNeed, int], float],
    most: int | None = None,
) -> float:
    """Raise ``counts`` until the next frame in turn is not paid for, or all have ``most``; what is left of the budget.

    In turn is the stream for which ``rank`` of the frames that it would have then is lowest.
    """
    turns: list[tuple[float, int]] = []

    def join(number: int) -> None:
        stream = streams[number]
        then = counts[stream.stream_id] + 1
        if then <= stream.num_wanted and (most is None or then <= most):
            heapq.heappush(turns, (rank(stream, then), number))

    for number in range(len(streams)):
        join(number)
    while turns:
        _, number = heapq.heappop(turns)
        stream = streams[number]
        if stream.seconds_per_frame > budget_s * (1.0 + 1e-12):
            break
        budget_s = max(0.0, budget_s - stream.seconds_per_frame)
        counts[stream.stream_id] += 1
        join(number)
    return budget_s
