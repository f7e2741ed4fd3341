"""Was there anything to decide? Contention of the machine and variety of the plans. Pure functions."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from optimizer.report_data import Contention, ProfileRow, StreamWindowRow, WindowRow
from protocol.events import ProfileEstimated


def build_contention(profiles: Sequence[ProfileEstimated], windows: Sequence[WindowRow], num_gpus: int) -> Contention:
    """Evidence from estimated profiles (the newest of a stream and window counts) and from the plans."""
    newest = {(e.window, e.stream_id): e for e in profiles}
    rows = tuple(_profile_row(newest[key]) for key in sorted(newest) if newest[key].inference)
    per_window: dict[int, float] = {}
    for row in rows:
        per_window[row.window] = per_window.get(row.window, 0.0) + row.best_inference_share
    # A window in which some stream has no profile would look less contended than it is.
    most = max((sum(r.window == w for r in rows) for w in per_window), default=0)
    whole = [total for w, total in per_window.items() if sum(r.window == w for r in rows) == most]
    ratios = [r.dearest_s / r.cheapest_s for r in rows if r.cheapest_s and r.dearest_s and r.num_retrain > 1]
    plans = {(w.window, s.stream_id): _signature(s) for w in windows for s in w.streams if s.inference_id}
    streams = {stream for _, stream in plans}
    return Contention(
        num_gpus=num_gpus,
        best_share_of_machine=statistics.fmean(whole) / num_gpus if whole and num_gpus else None,
        cost_ratio=min(ratios, default=None),
        windows_with_different_plans=sum(
            len({plan for (number, _), plan in plans.items() if number == w.window}) > 1 for w in windows
        ),
        streams_with_changing_plans=sum(
            len({plan for (_, owner), plan in plans.items() if owner == stream}) > 1 for stream in streams
        ),
        num_distinct_plans=len(set(plans.values())),
        profiles=rows,
    )


def _signature(row: StreamWindowRow) -> tuple[str, str, str]:
    return row.inference_id, row.retrain_id, row.inference_id_after


def _profile_row(e: ProfileEstimated) -> ProfileRow:
    # Most accurate first, cheapest of equals: what a plan would serve with if GPUs were free.
    best = min(e.inference, key=lambda entry: (-entry[2], entry[1]))
    costs = [gpu_seconds for _, gpu_seconds, _ in e.retrain if gpu_seconds > 0.0]
    return ProfileRow(
        window=e.window,
        stream_id=e.stream_id,
        best_inference_id=best[0].config_id,
        best_inference_share=best[1],
        num_retrain=len(e.retrain),
        cheapest_s=min(costs, default=None),
        dearest_s=max(costs, default=None),
    )
