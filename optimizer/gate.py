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
