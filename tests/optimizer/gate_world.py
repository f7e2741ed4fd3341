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


def draw_votes(draw: np.random.Generator, num_objects: int, gain: float, churn: float) -> PairedCounts:
    """Votes of ``num_objects`` road users: a gain of 0.1 wins ten more of a hundred than it loses; besides, the models
    differ on ``churn`` of them in either direction."""
    won, lost, _ = draw.multinomial(
        num_objects, [churn + max(gain, 0.0), churn + max(-gain, 0.0), 1.0 - 2 * churn - abs(gain)]
    )
    return PairedCounts(num_objects=num_objects, num_won=int(won), num_lost=int(lost))


@dataclass(frozen=True)
class Fate:
    """``decision``: where it ended; ``waited_s`` on trial, ``live_s`` serving until the canary ended."""

    decision: str
    waited_s: float
    live_s: float


def follow(draw: np.random.Generator, held_out_gain: float, live_gain: float, config: GateConfig) -> Fate:
    """One retraining, from the gate to the end of its canary: 8 to 25 road users are held out, 6 to 15 seen a look."""
    churn = draw.uniform(0.02, 0.10)
    held_out = draw_votes(draw, int(draw.integers(8, 26)), held_out_gain, churn)

    def look(fresh: PairedCounts) -> PairedCounts:
        return gate.add(fresh, draw_votes(draw, int(draw.integers(6, 16)), live_gain, churn))

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
