"""Counter-based randomness: a value depends on its name (integers) only, never on the order of calls."""

from __future__ import annotations

import random

_MASK = (1 << 64) - 1


def mix(*parts: int) -> int:
    """A well mixed 64-bit number from integers of any sign (SplitMix64 steps)."""
    state = 0x9E3779B97F4A7C15
    for part in parts:
        state = (state ^ (part & _MASK)) & _MASK
        state = (state + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def uniform(*parts: int) -> float:
    """A float in [0, 1) named by ``parts``."""
    return mix(*parts) / 2.0**64


def generator(*parts: int) -> random.Random:
    """A generator named by ``parts``; equal on every machine and in every process."""
    return random.Random(mix(*parts))
