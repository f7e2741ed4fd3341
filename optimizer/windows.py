"""Windows of streams and of the site. Pure functions.

The site's window is the beat: estimates are made, plans are replaced and accuracies are reported once in each.
A stream may be retrained only in every n-th of them (``retrain_every``); its own retraining window is n site
windows long then and begins with one of them. A plan looks as far ahead as the longest of the own windows that
are open, and every stream counts in it until its own window ends. At each beat the plan is made anew.
"""

from __future__ import annotations

from protocol.schema import StreamSpec


def opens(spec: StreamSpec, window: int) -> bool:
    """Whether the stream's own window begins with site window number ``window`` (from 0)."""
    return window % spec.retrain_every == 0


def own_left_s(spec: StreamSpec, window: int, left_s: float, window_s: float) -> float:
    """What is left of the stream's own window when ``left_s`` are left of site window ``window``, seconds."""
    return left_s + (spec.retrain_every - 1 - max(window, 0) % spec.retrain_every) * window_s
