"""Two models on the same labels, counted per road user. Pure but for numpy.

The crops of one road user in many frames are nearly the same picture: a model is right on all of them or on none.
Counted one by one, ten cars would look like two hundred pieces of evidence. So crops are followed from labelled frame
to labelled frame, and every road user has one vote, which weighs by the crops that it is about.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from protocol.schema import VOTE_WEIGHTS, PairedCounts

_REACH = 2.0  # edges of its box that a road user may have moved between two labelled frames
_GROWTH = 1.6  # factor by which its box may have grown or shrunk


class Tracker:
    """Follows golden boxes of one class from one labelled frame to the next; knows nothing of the source's truth.

    A road user that is lost for a frame counts as a new one, and two that swap places as one: the count is an
    estimate of independent pieces of evidence, not of people.
    """

    def __init__(self) -> None:
        self._boxes = np.zeros((0, 4), np.float32)
        self._labels = np.zeros(0, np.int64)
        self._tracks = np.zeros(0, np.int64)
        self._next = 0

    def follow(self, boxes: NDArray[np.float32], labels: NDArray[np.int64]) -> NDArray[np.int64]:
        """Numbers int64 (n,) of the road users in ``boxes`` (n, 4), in their order; every pair is matched nearest
        first."""
        tracks = np.full(len(boxes), -1, np.int64)
        if len(boxes) and len(self._boxes):
            moved = np.linalg.norm(_centre(boxes)[:, None] - _centre(self._boxes)[None], axis=2)
            here, there = _edge(boxes)[:, None], _edge(self._boxes)[None]
            far = moved > _REACH * np.maximum(here, there)
            other = np.maximum(here, there) > _GROWTH * np.minimum(here, there)
            cost = np.where(far | other | (labels[:, None] != self._labels[None]), np.inf, moved)
            while np.isfinite(least := cost.min()):
                row, column = np.argwhere(cost == least)[0]
                tracks[row] = self._tracks[column]
                cost[row, :], cost[:, column] = np.inf, np.inf
        new = tracks < 0
        tracks[new] = self._next + np.arange(int(new.sum()))
        self._next += int(new.sum())
        self._boxes, self._labels, self._tracks = boxes, labels, tracks
        return tracks


def _centre(boxes: NDArray[np.float32]) -> NDArray[np.float32]:
    centre: NDArray[np.float32] = (boxes[:, :2] + boxes[:, 2:]) / 2.0
    return centre


def _edge(boxes: NDArray[np.float32]) -> NDArray[np.float32]:
    edge: NDArray[np.float32] = np.sqrt(np.maximum(1.0, np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)))
    return edge


def per_road_user(
    right: NDArray[np.bool_],
    frame_index: NDArray[np.int64],
    boxes: NDArray[np.float32],
    labels: NDArray[np.int64],
) -> NDArray[np.float64]:
    """How many crops of each road user are ``right``, float64 (road users,). All arrays (n, ...), in any order.

    A crop whose box is not known (NaN) is a road user of its own.
    """
    return np.bincount(road_users(frame_index, boxes, labels), weights=right, minlength=0).astype(np.float64)


def road_users(
    frame_index: NDArray[np.int64], boxes: NDArray[np.float32], labels: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The number, from 0, of the road user in each crop, int64 (n,)."""
    tracks = np.full(len(labels), -1, np.int64)
    tracker = Tracker()
    known = ~np.isnan(boxes).any(axis=1)
    for frame in np.unique(frame_index[known]):
        here = known & (frame_index == frame)
        tracks[here] = tracker.follow(boxes[here], labels[here])
    tracks[~known] = tracks.max(initial=-1) + 1 + np.arange(int((~known).sum()))
    return tracks


def paired_counts(new: NDArray[np.float64], old: NDArray[np.float64]) -> PairedCounts:
    """One vote per piece of evidence (``Task.points`` of both models), for the model that is right more often.

    It weighs by how much more often, beside the most that any piece could tell: a road user that passes in two frames
    counts less for what serving is worth than one that waits for a minute.
    """
    more = new - old
    most = max(new.max(initial=0.0), old.max(initial=0.0), 1e-9)
    parts = np.clip(np.rint(VOTE_WEIGHTS * np.abs(more) / most), 1, VOTE_WEIGHTS).astype(np.int64)

    def weights(cast: NDArray[np.bool_]) -> tuple[int, ...]:
        return tuple(np.bincount(parts[cast] - 1, minlength=VOTE_WEIGHTS).tolist()) if cast.any() else ()

    won, lost = more > 0.0, more < 0.0
    return PairedCounts(
        num_objects=len(new),
        num_won=int(won.sum()),
        num_lost=int(lost.sum()),
        won_weights=weights(won),
        lost_weights=weights(lost),
    )


def wilson(accuracy: float, num: int, z: float = 1.96) -> tuple[float, float]:
    """Interval of a share measured on ``num`` independent pieces (Wilson, 1927); (0, 1) of none."""
    if num < 1:
        return 0.0, 1.0
    centre = (accuracy + z * z / (2 * num)) / (1 + z * z / num)
    half = z / (1 + z * z / num) * float(np.sqrt(accuracy * (1 - accuracy) / num + z * z / (4 * num * num)))
    return max(0.0, centre - half), min(1.0, centre + half)
