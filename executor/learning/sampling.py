"""Which frames of a stretch the golden model is to label, when it cannot label all that the label rate asks for.

Frames are drawn with unequal probabilities: a *uniform part* gives every frame the same chance, the rest goes where a
frame is worth more (``frame_worth``: many objects, of which the student is unsure, of rare classes). Every frame keeps
a chance, so that 1 / chance is a weight with which a mean over the frames that were drawn is right on average
(Horvitz and Thompson, 1952) however the chances were set; the uniform part bounds the weights (Hesterberg, 1995).

The draw is systematic (one random start, equal steps along the summed chances, in order of time), so that it covers
the whole stretch: neighbouring frames show the same road users. A quarter of the frames is held out, in two of eight
blocks of time, as in :mod:`executor.learning.datasets`. Within these blocks every frame has the same chance: what is
measured on held-out labels needs no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from executor.learning.datasets import NUM_BLOCKS, VALIDATION_SHARE, is_held_out_block
from executor.learning.inference import Objects

# So many frames are looked at by the student for each that is drawn; more bring little, neighbours are alike.
_CANDIDATES = 4
_LEAST_FOR_BLOCKS = NUM_BLOCKS
_MOST_RARE = 3.0

Worth = Callable[[Sequence[int]], NDArray[np.float64]]


@dataclass(frozen=True)
class Sample:
    """Frames to label, ascending; ``weight`` (n,): how many frames each stands for. ``held_out`` bool (n,), None: to be
    split as any data set is."""

    frames: NDArray[np.int64]
    weight: NDArray[np.float64]
    held_out: NDArray[np.bool_] | None = None


def draw(
    first: int, last: int, num_frames: int, uniform_share: float, worth: Worth | None, dice: np.random.Generator
) -> Sample:
    """``num_frames`` of the frames first .. last - 1, or all where they are fewer.

    ``worth``: of frames, float64 (n,), not negative; asked once, for some frames of the blocks that are learned from.
    None, or a ``uniform_share`` of 1: evenly spaced frames.
    """
    everything = np.arange(first, max(first, last), dtype=np.int64)
    num_frames = min(num_frames, len(everything))
    if worth is None or uniform_share >= 1.0 or not _LEAST_FOR_BLOCKS <= num_frames < len(everything):
        frames = everything[_systematic(np.full(len(everything), num_frames / max(1, len(everything))), dice)]
        return Sample(frames, np.full(len(frames), len(everything) / max(1, len(frames))))
    block = np.arange(len(everything)) * NUM_BLOCKS // len(everything)
    held = is_held_out_block(block)
    num_held = round(VALIDATION_SHARE * num_frames)
    num_train = num_frames - num_held
    kept, learned = everything[held], everything[~held]
    chosen = kept[_systematic(np.full(len(kept), num_held / len(kept)), dice)]
    step = max(1, len(learned) // (_CANDIDATES * num_train))
    # A random start again: every frame of the stretch is a candidate with the same chance.
    candidates = learned[int(dice.integers(step)) :: step]
    num_train = min(num_train, len(candidates))
    # The held-out frames are evenly spaced anyway; what is missing to the uniform part is made up here.
    even = min(1.0, max(0.1, (uniform_share * num_frames - num_held) / max(1, num_train)))
    chance = chances(worth(candidates.tolist()), num_train, even)
    picked = _systematic(chance, dice)
    frames = np.concatenate([chosen, candidates[picked]])
    weight = np.concatenate(
        [np.full(len(chosen), len(kept) / max(1, len(chosen))), len(learned) / len(candidates) / chance[picked]]
    )
    order = np.argsort(frames)
    flags = np.concatenate([np.ones(len(chosen), np.bool_), np.zeros(len(picked), np.bool_)])
    return Sample(frames[order], weight[order], flags[order])


def chances(worth: NDArray[np.float64], num: int, even: float) -> NDArray[np.float64]:
    """The chance of each candidate to be drawn, float64 (n,), 0..1, of sum ``num``: the part ``even`` of it is shared
    out equally, the rest in proportion to ``worth`` (n,)."""
    if num >= len(worth):
        return np.ones(len(worth))
    total = float(worth.sum())
    share = np.full(len(worth), 1.0 / len(worth))
    if np.isfinite(total) and total > 0.0:
        share = even / len(worth) + (1.0 - even) * worth / total
    chance = np.zeros(len(worth))
    sure = np.zeros(len(worth), np.bool_)
    # Nothing is drawn twice: what would be more than certain is certain, and the rest is shared out again.
    while True:
        chance[~sure] = (num - sure.sum()) * share[~sure] / share[~sure].sum()
        over = ~sure & (chance > 1.0)
        if not over.any():
            return np.asarray(np.minimum(chance, 1.0))
        sure |= over
        chance[sure] = 1.0


def frame_worth(found: Objects, rarity: NDArray[np.float64]) -> float:
    """What labels of a frame promise to teach: the student's doubt in each object, times its class's ``rarity``."""
    if len(found.labels) == 0:
        return 0.0
    doubt = 1.0 - found.scores if found.scores is not None else np.ones(len(found.labels))
    # A little for every object: a student can be sure and wrong.
    return float(((0.1 + doubt) * rarity[found.labels]).sum())


def rarity_of(class_counts: Sequence[int], num_classes: int) -> NDArray[np.float64]:
    """How much more an object of each class is worth than one of the most frequent class, float64 (classes,), 1..3.

    ``class_counts`` of the labels so far; classes that were never seen are the rarest.
    """
    counts = np.zeros(num_classes)
    counts[: len(class_counts)] = class_counts[:num_classes]
    most = counts.max(initial=0.0)
    return np.asarray(np.clip(np.sqrt(most / np.maximum(1.0, counts)), 1.0, _MOST_RARE))


def _systematic(chance: NDArray[np.float64], dice: np.random.Generator) -> NDArray[np.int64]:
    """Indices of a draw with these chances, ascending; their number is the sum of the chances up to rounding."""
    if len(chance) == 0:
        return np.zeros(0, np.int64)
    total = np.cumsum(chance)
    num = round(float(total[-1]))
    if num == 0:
        return np.zeros(0, np.int64)
    # Rounding errors of the sum must not cost the last frame.
    points = (dice.random() + np.arange(num)) * float(total[-1]) / num
    found = np.unique(np.minimum(np.searchsorted(total, points, side="right"), len(chance) - 1))
    return found.astype(np.int64)
