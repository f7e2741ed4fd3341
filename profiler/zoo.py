"""Earlier models as retraining configurations: what taking one over, or beginning from it, costs and is worth.

An earlier model is *measured*: it has looked at the window's new labels, on which neither it nor the serving model was
trained. Both models are seen on the same labels, so that the difference is known better than either accuracy; and as
the best of several measured models looks better than it is, the difference is shrunk towards none.

A retraining that begins from an earlier model is estimated like any other, with that model's accuracy for the serving
one's: learning curves start where the model is.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

import msgspec

from profiler.costs import cost_model, group_key
from profiler.knowledge import SiteKnowledge
from profiler.records import Estimate, Outcome, StreamHistory
from profiler.retraining import estimate_retrain
from protocol.plan import RetrainProfile
from protocol.schema import DatasetRef, PairedCounts, Record, RetrainConfig, TrialResult, ZooTrial

# Standard deviation of what an earlier model really is better or worse than the serving one.
GAIN_SPREAD = 0.3
# Less than this is not worth a swap; the gate asks for as much.
LEAST_GAIN = 0.01
MOST_OFFERS = 2
MOST_BEGINNINGS = 3
# Seconds of a take-over that are not the models' looks at the labels, before any was seen: a process that starts.
FIRST_OVERHEAD_S = 0.5
# Looks at the new labels that a take-over costs: both models, for accuracies and votes.
LOOKS = 4.0
NAME_LENGTH = 64


class Measured(Record, frozen=True, kw_only=True):
    """An earlier model against the serving one. ``gain`` is shrunk, ``gain_error`` its standard error."""

    trial: ZooTrial
    gain: float
    gain_error: float


def gain_of(paired: PairedCounts) -> tuple[float, float]:
    """(mean difference, standard error) of two models in votes per road user; one more vote on either side than there
    was keeps the error of few honest."""
    num = max(1, paired.num_objects)
    mean = (paired.num_won - paired.num_lost) / num
    variance = (paired.num_won + paired.num_lost + 2) / num - mean * mean
    return mean, math.sqrt(max(variance, 0.0) / num)


def measured(trial: TrialResult) -> list[Measured]:
    """The earlier models of a trial, the best first."""
    found = []
    for row in trial.zoo:
        _, error = gain_of(row.paired)
        shrink = GAIN_SPREAD**2 / (GAIN_SPREAD**2 + error**2)
        gain = shrink * (row.accuracy - row.accuracy_serving)
        found.append(Measured(trial=row, gain=gain, gain_error=math.sqrt(shrink) * error))
    return sorted(found, key=lambda m: (-m.gain, m.trial.number))


def overhead_s(outcomes: Iterable[Outcome]) -> float:
    """Seconds that take-overs needed beyond the work in them, as past ones were seen: starting a worker, above all."""
    seen = [
        max(0.0, o.run.work_s - o.result.busy_s)
        for o in outcomes
        if o.result.config.base > 0 and o.result.config.epochs == 0 and o.run is not None
    ]
    return statistics.median([*seen, FIRST_OVERHEAD_S])


def zoo_profiles(
    estimate: Estimate,
    trial: TrialResult,
    dataset: DatasetRef,
    retrain: Sequence[RetrainConfig],
    history: StreamHistory,
    site: SiteKnowledge,
    *,
    overhead: float = FIRST_OVERHEAD_S,
) -> tuple[RetrainProfile, ...]:
    """What the zoo offers a stream besides ``estimate``: models to take over, and retrainings that begin from the best.

    Only what is expected to be better than the serving model by ``LEAST_GAIN``, and of the retrainings only those that
    nothing cheaper reaches.
    """
    better = [m for m in measured(trial) if m.gain > LEAST_GAIN]
    if not better:
        return ()
    now = estimate.profile.accuracy_now
    memory = max((p.memory_bytes for p in estimate.profile.retrain), default=0)
    some = retrain[0] if retrain else RetrainConfig(config_id="zoo", epochs=0)
    offers = [
        RetrainProfile(
            retrain_id=_name(m.trial.number),
            accuracy_after=_clip(now + m.gain),
            gpu_seconds=overhead + LOOKS * m.trial.busy_s,
            memory_bytes=memory,
            accuracy_error=max(0.01, (m.trial.accuracy_high - m.trial.accuracy_low) / (2.0 * 1.96)),
            gain_error=m.gain_error,
            config=msgspec.structs.replace(some, config_id=_name(m.trial.number), epochs=0, base=m.trial.number),
        )
        for m in better[:MOST_OFFERS]
    ]
    best = better[0]
    start = min(1.0, max(0.0, estimate.accuracy_validated + best.gain))
    # This window's trials tell costs; what they reached from the serving model is another curve.
    costs = {group_key(row.config): cost for row in trial.retrain if (cost := cost_model(row)) is not None}
    site = msgspec.structs.replace(site, costs={**site.costs, **costs})
    rows = estimate_retrain(None, dataset, retrain, start, history, site) if dataset.num_train > 0 else ()
    plain_ones = {p.retrain_id: p for p in estimate.profile.retrain}
    known: list[RetrainProfile] = [*estimate.profile.retrain, *offers]
    for row in sorted(rows, key=lambda r: (r.gpu_seconds, -r.accuracy_after)):
        name = f"{_name(best.trial.number)}.{row.config.config_id}"
        plain = plain_ones.get(row.config.config_id)
        if plain is None or len(name) > NAME_LENGTH or len(offers) - min(len(better), MOST_OFFERS) >= MOST_BEGINNINGS:
            continue
        seconds = plain.gpu_seconds + LOOKS / 2.0 * best.trial.busy_s
        after = _clip(row.accuracy_after + estimate.live_correction)
        if any(p.gpu_seconds <= seconds and p.accuracy_after >= after - LEAST_GAIN for p in known):
            continue
        offer = RetrainProfile(
            retrain_id=name,
            accuracy_after=after,
            gpu_seconds=seconds,
            memory_bytes=plain.memory_bytes,
            accuracy_error=row.accuracy_error,
            config=msgspec.structs.replace(row.config, config_id=name, base=best.trial.number),
        )
        offers.append(offer)
        known.append(offer)
    return tuple(offers)


def _name(number: int) -> str:
    return f"zoo-{number}"


def _clip(accuracy: float) -> float:
    return min(max(accuracy, 0.0), 1.0)
