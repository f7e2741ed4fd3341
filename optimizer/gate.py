"""The gate: a retrained model goes live only if it is better. Pure functions."""

from __future__ import annotations

from optimizer.config import GateConfig
from protocol.schema import RetrainResult


def decide(result: RetrainResult, config: GateConfig, serving_version: int) -> tuple[bool, str]:
    """Whether the retrained model replaces the serving one, and why (for people).

    Accuracies are those of both models on the same held-out labels, so a tie keeps the serving model.
    """
    if result.checkpoint is None:
        return False, result.reason or "no model came out of the retraining"
    if result.checkpoint.version <= serving_version:
        return False, f"version {result.checkpoint.version} is not newer than the serving version {serving_version}"
    gain = result.accuracy_after - result.accuracy_before
    evidence = f"{result.accuracy_before:.3f} -> {result.accuracy_after:.3f} on {result.num_validation} held-out labels"
    if gain <= config.margin:
        return False, f"{evidence}: not better by more than {config.margin:g}"
    return True, evidence


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
