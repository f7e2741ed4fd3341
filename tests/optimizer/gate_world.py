"""Retrainings as streams of paired votes, for the tests of gate and canary. All numbers made here are simulated."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from optimizer import gate
from optimizer.config import GateConfig
from protocol.schema import CheckpointRef, PairedCounts, RetrainConfig, RetrainResult

NEW = CheckpointRef(path="c", sha256="0" * 64, stream_id="s", version=2)


def result(votes: PairedCounts, *, before: float = 0.5, checkpoint: CheckpointRef | None = NEW) -> RetrainResult:
    gain = (votes.num_won - votes.num_lost) / max(1, votes.num_objects)
    return RetrainResult(
        stream_id="s",
        window=1,
        config=RetrainConfig(config_id="c", epochs=1),
        checkpoint=checkpoint,
        accuracy_before=before,
        accuracy_after=min(1.0, max(0.0, before + gain)),
        num_validation=3 * votes.num_objects,
        epochs=(),
        busy_s=1.0,
        seconds=1.0,
        paired=votes,
    )


# For how long road users are seen, in eighths of the one that is seen longest; as in 2000 real comparisons about.
_SEEN = np.array([0.30, 0.20, 0.14, 0.10, 0.08, 0.06, 0.05, 0.07])
# A vote is about half of a road user's crops, so that so many more of them are won for a gain in crops.
_VOTES_PER_GAIN = float(_SEEN @ np.arange(1, 9)) / float(_SEEN @ (np.arange(1, 9) + 1) / 2)


def draw_votes(draw: np.random.Generator, num_objects: int, gain: float, churn: float) -> PairedCounts:
    """Votes of ``num_objects`` road users: with a gain of 0.1 the new model is right on ten more of a hundred crops;
    besides, the models differ on ``churn`` of the road users in either direction."""
    more = min(_VOTES_PER_GAIN * abs(gain), 1.0 - 2.0 * churn)
    for_it, against = churn + more * (gain > 0.0), churn + more * (gain < 0.0)
    side = draw.choice([1, -1, 0], num_objects, p=[for_it, against, max(0.0, 1.0 - for_it - against)])
    parts = draw.integers(1, draw.choice(8, num_objects, p=_SEEN) + 2)

    def weights(which: int) -> tuple[int, ...]:
        return tuple(np.bincount(parts[side == which], minlength=9)[1:].tolist())

    return PairedCounts(
        num_objects=num_objects,
        num_won=int((side == 1).sum()),
        num_lost=int((side == -1).sum()),
        won_weights=weights(1),
        lost_weights=weights(-1),
    )


@dataclass(frozen=True)
class Fate:
    """``decision``: where it ended; ``waited_s`` on trial, ``live_s`` serving until the canary ended."""

    decision: str
    waited_s: float
    live_s: float


def follow(draw: np.random.Generator, held_out_gain: float, live_gain: float, config: GateConfig) -> Fate:
    """One retraining, from the gate to the end of its canary: 15 to 40 road users are held out, 10 to 24 seen a look,
    as in real comparisons, where models also differ on so many of them."""
    churn = draw.uniform(0.05, 0.20)
    held_out = draw_votes(draw, int(draw.integers(15, 41)), held_out_gain, churn)

    def look(fresh: PairedCounts) -> PairedCounts:
        return gate.add(fresh, draw_votes(draw, int(draw.integers(10, 25)), live_gain, churn))

    verdict = gate.judge_retraining(result(held_out), config, serving_version=1)
    proven, waited_s, live_s = verdict.decision == "promoted", 0.0, 0.0
    fresh = PairedCounts()
    while verdict.decision == "on_trial":
        waited_s, fresh = waited_s + config.step_s, look(fresh)
        found = gate.judge_shadow(held_out, fresh, config, over=waited_s >= config.canary_s)
        if found is not None:
            verdict = found
            proven = (verdict.confidence or 0.0) >= config.confidence
    if verdict.decision == "refused":
        return Fate("refused", waited_s, 0.0)
    fresh = PairedCounts()
    while True:
        live_s, fresh = live_s + config.step_s, look(fresh)
        found = gate.judge_canary(fresh, config, proven=proven, over=live_s >= config.canary_s)
        if found is not None:
            return Fate(found.decision, waited_s, live_s)
