"""Inference configurations: cost per frame and accuracy relative to the best one, from measurements only."""

from __future__ import annotations

from collections.abc import Sequence

from profiler.monotone import rising
from profiler.records import InferenceEstimate, StreamHistory
from protocol.schema import InferenceConfig, InferenceTrial, TrialResult

# Past measurements count less with every window: the scene's speed and size of objects change slowly.
DECAY = 0.5
# Below this many frames (decayed sum) a smaller effort that looks better is taken for noise.
FEW_FRAMES = 300.0


def measure_inference(
    inference: Sequence[InferenceConfig],
    trial: TrialResult | None,
    history: StreamHistory,
    *,
    assumed_busy_s: float,
) -> tuple[InferenceEstimate, ...]:
    """One row per configuration, in order; the best has relative accuracy 1.

    Cost: newest measurement. Accuracy: relative to the best configuration of the same measurement, averaged over
    windows with weights frames * 0.5 ** age. A configuration never measured costs ``assumed_busy_s`` per analysed
    frame and takes the accuracy of the next dearer measured one.
    """
    results = [t for t in (trial, *(w.trial for w in reversed(history.windows))) if t is not None and t.inference]
    busy: dict[InferenceConfig, float] = {}
    ratios: dict[InferenceConfig, tuple[float, float]] = {}
    frames: dict[InferenceConfig, int] = {}
    for age, result in enumerate(results):
        best = max(row.accuracy for row in result.inference)
        for row in result.inference:
            if row.num_frames <= 0:
                continue
            busy.setdefault(row.config, row.busy_s_per_frame)
            frames[row.config] = frames.get(row.config, 0) + row.num_frames
            weight = row.num_frames * DECAY**age
            total, weights = ratios.get(row.config, (0.0, 0.0))
            ratios[row.config] = (total + weight * _ratio(row, best), weights + weight)
    known = {config: total / weights for config, (total, weights) in ratios.items()}
    wanted = {config: known.get(config, _guess(config, known)) for config in inference}
    if min((ratios[c][1] for c in inference if c in ratios), default=0.0) < FEW_FRAMES:
        wanted = rising(wanted, _no_more_effort)
    top = max(wanted.values())
    return tuple(
        InferenceEstimate(
            config=config,
            busy_s_per_frame=busy.get(config, _guess_busy(config, busy, assumed_busy_s)),
            relative_accuracy=min(max(wanted[config] / top, 0.0), 1.0) if top > 0.0 else 1.0,
            num_frames=frames.get(config, 0),
        )
        for config in inference
    )


def _ratio(row: InferenceTrial, best: float) -> float:
    return row.accuracy / best if best > 0.0 else 1.0


def _no_more_effort(a: InferenceConfig, b: InferenceConfig) -> bool:
    """True when ``a`` analyses no more frames and no more pixels than ``b``."""
    return a.frame_interval >= b.frame_interval and a.resolution_px <= b.resolution_px


def _guess(config: InferenceConfig, known: dict[InferenceConfig, float]) -> float:
    above = [value for other, value in known.items() if _no_more_effort(config, other)]
    below = [value for other, value in known.items() if _no_more_effort(other, config)]
    if not above:
        return max(below, default=1.0)
    return min(above) if not below else 0.5 * (min(above) + max(below))


def _guess_busy(config: InferenceConfig, busy: dict[InferenceConfig, float], assumed_busy_s: float) -> float:
    """Scaled by analysed frames from the measured configuration of the nearest resolution, else assumed."""
    if not busy:
        return assumed_busy_s / config.frame_interval
    nearest = min(busy, key=lambda c: (abs(c.resolution_px - config.resolution_px), c.frame_interval))
    return busy[nearest] * nearest.frame_interval / config.frame_interval
