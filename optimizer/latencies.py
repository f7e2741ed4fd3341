"""Latencies measured while serving, per stream and inference configuration. They replace estimates in plans."""

from __future__ import annotations

import statistics

from optimizer.state import StreamState
from protocol.events import StreamAccuracy
from protocol.schema import StreamSpec

# Reports that a configuration's latency is the median of: the first ones after a start are slow.
_REPORTS = 7
_LEAST_REPORTS = 3


def remember(stream: StreamState, event: StreamAccuracy) -> None:
    """Keep what one report says; reports without an analysed frame say nothing."""
    if event.latency_ms_p50 > 0.0 and event.inference_id:
        kept = [*stream.latencies.get(event.inference_id, ()), event.latency_ms_p50 / 1000.0]
        stream.latencies[event.inference_id] = kept[-_REPORTS:]


def measured_s(stream: StreamState, inference_id: str) -> float | None:
    """Median latency of a configuration, seconds; None while too little is known."""
    kept = stream.latencies.get(inference_id, ())
    return statistics.median(kept) if len(kept) >= _LEAST_REPORTS else None


def forget_old(stream: StreamState) -> None:
    """A configuration that is not in use gets a new chance: what made it slow may be over."""
    used = stream.serving_config.config_id if stream.serving_config else ""
    stream.latencies = {name: kept for name, kept in stream.latencies.items() if name == used}
    stream.late = False


def newly_late(stream: StreamState, spec: StreamSpec) -> bool:
    """Whether the configuration in use has turned out to break the stream's limit; told once in a window."""
    if spec.max_latency_s is None or stream.late or stream.serving_config is None:
        return False
    latency_s = measured_s(stream, stream.serving_config.config_id)
    stream.late = latency_s is not None and latency_s > spec.max_latency_s
    return stream.late
