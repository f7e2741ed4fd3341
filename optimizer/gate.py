"""Whether a retrained model goes live, stays live, or is rolled back. Pure functions of paired counts.

Both models classify the same labels, and every road user has one vote: won (only or more often right with the new
model) or lost; the others say nothing. A vote weighs by how many more crops it is about, as accuracy does. Under
"neither is better" the side of every vote is a fair coin.

1. Gate, on the held-out labels of the retraining. ``confidence`` (mid-p sign-flip test) that the new model is better, a
   head start of ``margin`` given to the old one:  >= ``confidence`` -> live;  too sure of the contrary -> refused;
   in between -> on trial. A tie is never enough.
2. Shadow: a model on trial is compared on fresh labels of the live stream while the old one serves; the same test on
   held-out and fresh votes together. At its end, without the confidence, the benefit of the doubt goes to a model
   that leads on both together.
3. Canary: a model that is live is compared with the one before it on labels of frames after the swap only. An e-value
   (a bet against "the new one is no worse" that pays fairly however often one looks) ends it at once, in either
   direction; at the end of the period the model goes if the confidence in it is below ``keep_confidence``.

The e-value: Shafer, "Testing by betting" (2021); mid-p: Fagerland, Lydersen, Laake (2013).
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import numpy.typing as npt

from optimizer.config import GateConfig
from protocol.schema import VOTE_WEIGHTS, PairedCounts, Record, RetrainResult

Array = npt.NDArray[np.float64]

# A bettor's beliefs about the chance that the losing model wins a vote; equal parts of the stake on each.
_BELIEFS = (0.05, 0.15, 0.25, 0.35, 0.45)

# With more votes than this the distribution of their sum is normal to within a few thousandths.
_EXACT = 1000
_PARTS = np.arange(1, VOTE_WEIGHTS + 1)


class Verdict(Record, frozen=True, kw_only=True):
    """A decision and its evidence. ``confidence``: that the new model is better, None without a vote."""

    decision: Literal["promoted", "on_trial", "refused", "kept", "rolled_back"]
    confidence: float | None
    reason: str


def confidence_better(counts: PairedCounts, margin: float = 0.0) -> float | None:
    """1 - mid-p of a one-sided sign-flip test that the new model is better than the old one by ``margin`` (0..1).

    The margin is a head start: so many of the road users count as average votes for the old model. None without a vote.
    """
    won, lost = _by_weight(counts)
    cast = won + lost
    head_start = round(margin * counts.num_objects)
    if head_start:
        usual = VOTE_WEIGHTS if not cast.any() else max(1, round(float(cast @ _PARTS) / cast.sum()))
        lost[usual - 1] += head_start
        cast[usual - 1] += head_start
    if not cast.any():
        return None
    ahead = int((won - lost) @ _PARTS)
    if cast.sum() > _EXACT:
        return 0.5 * math.erfc(-ahead / math.sqrt(2.0 * float(cast @ _PARTS**2)))
    sums = np.ones(1)  # of the random sum -most, ..., most
    for part, num in zip(_PARTS.tolist(), cast.astype(int).tolist(), strict=True):
        for _ in range(num):
            flipped = np.zeros(len(sums) + 2 * part)
            flipped[: len(sums)] += 0.5 * sums
            flipped[2 * part :] += 0.5 * sums
            sums = flipped
    place = ahead + len(sums) // 2
    return float(sums[:place].sum() + 0.5 * sums[place])


def e_value(counts: PairedCounts) -> float:
    """How much a bet against "the new model is no better" has multiplied its stake; :func:`swapped` for the contrary.

    At least 1 / alpha happens with probability alpha at most when that is true, however often one looks.
    """
    won, lost = _by_weight(counts)
    stakes = np.outer(1.0 - 2.0 * np.array(_BELIEFS), _PARTS / VOTE_WEIGHTS)
    log = np.log1p(stakes) @ won + np.log1p(-stakes) @ lost
    top = float(log.max())
    return math.exp(min(700.0, top)) * float(np.exp(log - top).mean())


def swapped(counts: PairedCounts) -> PairedCounts:
    """The same votes as the old model sees them."""
    return PairedCounts(
        num_objects=counts.num_objects,
        num_won=counts.num_lost,
        num_lost=counts.num_won,
        won_weights=counts.lost_weights,
        lost_weights=counts.won_weights,
    )


def lead(counts: PairedCounts) -> float:
    """By how many whole votes the new model is ahead."""
    won, lost = _whole_votes(counts)
    return won - lost


def judge_retraining(result: RetrainResult, config: GateConfig, serving_version: int) -> Verdict:
    """The gate: ``promoted``, ``on_trial`` or ``refused``."""
    if result.checkpoint is None:
        return _refused(None, result.reason or "no model came out of the retraining")
    if result.checkpoint.version <= serving_version:
        version = result.checkpoint.version
        return _refused(None, f"version {version} is not newer than the serving version {serving_version}")
    if config.always_promote:
        return Verdict(decision="promoted", confidence=confidence_better(result.paired), reason="there is no gate")
    evidence = (
        f"{result.accuracy_before:.3f} -> {result.accuracy_after:.3f} on {result.num_validation} held-out labels, "
        f"{_votes(result.paired)}"
    )
    confidence = confidence_better(result.paired, config.margin)
    if confidence is None:
        if result.paired.num_objects >= config.tie_objects:
            return _refused(None, f"{evidence}: a tie")
        confidence = 0.5
    if confidence >= config.confidence and result.accuracy_after - result.accuracy_before > config.margin:
        return Verdict(decision="promoted", confidence=confidence, reason=f"{evidence}: better")
    if confidence <= 1.0 - config.refusal_confidence:
        return _refused(confidence, f"{evidence}: worse")
    if not config.benefit_of_doubt or config.canary_s == 0.0:
        return _refused(confidence, f"{evidence}: not better with a confidence of {config.confidence:.0%}")
    return Verdict(decision="on_trial", confidence=confidence, reason=f"{evidence}: not sure, watched on fresh labels")


def judge_shadow(held_out: PairedCounts, fresh: PairedCounts, config: GateConfig, *, over: bool) -> Verdict | None:
    """A model on trial: ``promoted`` or ``refused``, None while it is to be watched further. ``over``: time is up."""
    both = add(held_out, fresh)
    confidence = confidence_better(both, config.margin)
    evidence = f"{_votes(fresh)} on fresh labels, {_votes(both)} in all"
    if confidence is not None and fresh.num_won + fresh.num_lost > 0:
        if confidence >= config.confidence and lead(fresh) > 0.0:
            return Verdict(decision="promoted", confidence=confidence, reason=f"{evidence}: better")
        if confidence <= 1.0 - config.refusal_confidence:
            return _refused(confidence, f"{evidence}: worse")
    if not over:
        return None
    if lead(both) > 0.0:
        return Verdict(decision="promoted", confidence=confidence, reason=f"{evidence}: the benefit of the doubt")
    return _refused(confidence, f"{evidence}: not better")


def judge_canary(fresh: PairedCounts, config: GateConfig, *, proven: bool, over: bool) -> Verdict | None:
    """A live model: ``kept`` or ``rolled_back``, None while it is to be watched further.

    ``proven``: it went live with the gate's confidence; one that did not needs more here (halfway to even).
    """
    confidence = confidence_better(fresh)
    evidence = f"{_votes(fresh)} on labels after the swap"
    if e_value(swapped(fresh)) >= 1.0 / config.alarm:
        return Verdict(decision="rolled_back", confidence=confidence, reason=f"{evidence}: worse")
    if e_value(fresh) >= 1.0 / config.alarm:
        return Verdict(decision="kept", confidence=confidence, reason=f"{evidence}: better")
    if not over:
        return None
    enough = config.keep_confidence if proven else (config.keep_confidence + 0.5) / 2.0
    if (0.5 if confidence is None else confidence) >= enough:
        return Verdict(decision="kept", confidence=confidence, reason=f"{evidence}: not worse by the end of its canary")
    return Verdict(decision="rolled_back", confidence=confidence, reason=f"{evidence}: most likely worse")


def add(a: PairedCounts, b: PairedCounts) -> PairedCounts:
    """Votes of two stretches together."""
    (a_won, a_lost), (b_won, b_lost) = _by_weight(a), _by_weight(b)
    return PairedCounts(
        num_objects=a.num_objects + b.num_objects,
        num_won=a.num_won + b.num_won,
        num_lost=a.num_lost + b.num_lost,
        won_weights=tuple(int(n) for n in a_won + b_won),
        lost_weights=tuple(int(n) for n in a_lost + b_lost),
    )


def _by_weight(counts: PairedCounts) -> tuple[Array, Array]:
    """How many votes were won and lost of each weight, float64 (VOTE_WEIGHTS,) each."""

    def spread(num: int, weights: tuple[int, ...]) -> Array:
        found = np.zeros(VOTE_WEIGHTS)
        known = weights[:VOTE_WEIGHTS]
        found[: len(known)] = known
        found[-1] += max(0, num - sum(known))
        return found

    return spread(counts.num_won, counts.won_weights), spread(counts.num_lost, counts.lost_weights)


def _whole_votes(counts: PairedCounts) -> tuple[float, float]:
    """What the votes won and the votes lost weigh together, in whole votes."""
    won, lost = (float(votes @ _PARTS) / VOTE_WEIGHTS for votes in _by_weight(counts))
    return won, lost


def _refused(confidence: float | None, reason: str) -> Verdict:
    return Verdict(decision="refused", confidence=confidence, reason=reason)


def _votes(counts: PairedCounts) -> str:
    won, lost = _whole_votes(counts)
    weighing = f", weighing {won:.1f} : {lost:.1f}," if counts.won_weights or counts.lost_weights else ""
    return f"{counts.num_won} : {counts.num_lost}{weighing} of {counts.num_objects} road users"


# How far the held-out split's hardness is taken off: the split and all labels of a window err alike only in part.
_SPLIT_WEIGHT = 0.5


def accuracy_when_live(accuracy_now: float, result: RetrainResult) -> float:
    """What a promoted model is expected to reach, 0..1.

    ``accuracy_now`` was measured on more labels than the held-out split. What the serving model got on the split
    above or below that tells how easy the split is, and is taken off the new model's accuracy in part (a control
    variate with a fixed coefficient).
    """
    expected = result.accuracy_after + _SPLIT_WEIGHT * (accuracy_now - result.accuracy_before)
    return min(1.0, max(0.0, expected))
