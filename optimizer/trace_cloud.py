"""Retraining in the cloud over the site's up-link and down-link: a baseline in closed form.

All of the site's streams share the links, one transfer after the other, the most valuable first: a
stream's sampled video goes up, its model comes down, and up-link and down-link work side by side. The
cloud itself takes no time and always retrains with the configuration that promises most. The GPUs of
the site do nothing but inference. This favours the cloud wherever it is a choice.

Sizes and speeds as the paper has them (section 6.5): video of 4 Mb/s of which a tenth is sent, models of
398 Mb; up and down in Mb/s for a cellular link 5.1 and 17.5, satellite 8.5 and 15, two cellular 10.2 and 35.
"""

from __future__ import annotations

from collections.abc import Sequence

from protocol.schema import Record

VIDEO_MBPS = 4.0
SENT_PART = 0.1
MODEL_MB = 398.0

LINKS: dict[str, tuple[float, float]] = {
    "cloud:cellular": (5.1, 17.5),
    "cloud:satellite": (8.5, 15.0),
    "cloud:two-cellular": (10.2, 35.0),
}


class CloudChoice(Record, frozen=True, kw_only=True):
    """What the cloud would do for one stream in one window. ``promised`` orders the transfers, ``after`` is true."""

    stream_id: str
    before: float
    promised: float
    after: float


def arrivals(choices: Sequence[CloudChoice], link: str, window_s: float) -> dict[str, float]:
    """Seconds from the window's start until each stream's model is there; streams that gain nothing are left out."""
    up_mbps, down_mbps = LINKS[link]
    up_s = VIDEO_MBPS * SENT_PART * window_s / up_mbps
    down_s = MODEL_MB / down_mbps
    worth = sorted((c for c in choices if c.promised > c.before), key=lambda c: (c.before - c.promised, c.stream_id))
    found: dict[str, float] = {}
    up_end = down_end = 0.0
    for choice in worth:
        up_end += up_s
        down_end = max(down_end, up_end) + down_s
        found[choice.stream_id] = down_end
    return found


def cloud_factor(choice: CloudChoice, arrival_s: float | None, window_s: float, *, gate: bool) -> float:
    """Window-averaged model accuracy over the accuracy without retraining; the inference configuration stays."""
    if arrival_s is None or arrival_s >= window_s or choice.before <= 0.0 or (gate and choice.after <= choice.before):
        return 1.0
    part = arrival_s / window_s
    return part + (1.0 - part) * choice.after / choice.before
