"""Which labelled things to remember against forgetting, within a number that a byte budget allows. Pure but for numpy.

The memory is balanced twice. Classes share the budget evenly; what a rare class does not need goes to the others.
Within a class the *stretches* of time that were labelled share it evenly again, so that an old condition of the scene
keeps its place however much newer material has come since. Within a stretch herding decides (iCaRL, Rebuffi et al.,
CVPR 2017, algorithm 4): the chosen ones have the mean of all, and every prefix of the order is the best memory of its
size, so that a smaller part in the next window is the beginning of the present one.

Herding over everything at once follows the mean of what is known, which the newest window dominates: an old scene is
forgotten in a few windows. A reservoir keeps old things in proportion to how often they were seen, by luck, and needs
four times as many to be as like the whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Features = NDArray[np.float32]

MEGABYTE = 1_000_000
# Fewer of a class and a stretch do not stand for it: then whole stretches are left out, most like another one first.
MIN_PER_STRETCH = 3


def fair_parts(available: Sequence[int], total: int) -> list[int]:
    """``total`` in equal parts, one per entry of ``available`` and none larger than that; what one cannot take goes to
    the others, and what does not divide goes to the first."""
    parts = [0] * len(available)
    left = min(total, sum(available))
    while left > 0:
        open_ = [place for place, most in enumerate(available) if parts[place] < most]
        part = max(1, left // len(open_))
        for place in open_:
            more = min(part, available[place] - parts[place], left)
            parts[place] += more
            left -= more
    return parts


def herd(features: Features, size: int) -> NDArray[np.int64]:
    """Indices of ``size`` rows (or all, if fewer) in herding order. ``features``: float32 (n, d)."""
    unit = _unit(features)
    mean = unit.mean(axis=0)
    chosen: list[int] = []
    total = np.zeros_like(mean)
    free = np.ones(len(unit), np.bool_)
    for position in range(min(size, len(unit))):
        distance = np.linalg.norm(mean - (total + unit) / (position + 1), axis=1)
        best = int(np.argmin(np.where(free, distance, np.inf)))
        chosen.append(best)
        free[best] = False
        total += unit[best]
    return np.array(chosen, np.int64)


def choose(labels: NDArray[np.int64], stretches: NDArray[np.int64], features: Features, size: int) -> NDArray[np.int64]:
    """Indices, ascending, of at most ``size`` things to remember.

    ``labels``, ``stretches`` int64 (n,): class, and the stretch of time in which it was labelled; ``features``
    float32 (n, d).
    """
    classes = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    chosen = [np.zeros(0, np.int64)]
    for members, quota in zip(classes, fair_parts([len(c) for c in classes], size), strict=True):
        groups = [members[stretches[members] == stretch] for stretch in np.unique(stretches[members])]
        groups = _most_different(groups, features, max(1, quota // MIN_PER_STRETCH))
        parts = fair_parts([len(group) for group in groups], quota)
        picked = [group[herd(features[group], part)] for group, part in zip(groups, parts, strict=True) if part]
        chosen += picked
        # What the stretches that were left out have taken with them is made up from all others.
        missing = quota - sum(map(len, picked))
        if missing > 0:
            rest = np.setdiff1d(members, np.concatenate(picked)) if picked else members
            chosen.append(rest[herd(features[rest], missing)])
    return np.sort(np.concatenate(chosen))


def _most_different(groups: list[NDArray[np.int64]], features: Features, count: int) -> list[NDArray[np.int64]]:
    """``count`` of the ``groups`` (oldest first): of the two that look most alike the older one goes, and so on."""
    kept = list(groups)
    means = [_unit(features[group]).mean(axis=0) for group in kept]
    while len(kept) > count:
        centre = np.array(means)
        distance = np.linalg.norm(centre[:, None] - centre[None], axis=2)
        np.fill_diagonal(distance, np.inf)
        older = min(int(place) for place in np.unravel_index(int(distance.argmin()), distance.shape))
        del kept[older], means[older]
    return kept


def _unit(features: Features) -> Features:
    unit: Features = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    return unit
