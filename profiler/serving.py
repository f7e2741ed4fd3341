"""What serving a stream costs, as its worker measures it: it follows the scene where trials are not made again."""

from __future__ import annotations

from collections.abc import Mapping

from protocol.events import StreamAccuracy
from protocol.schema import InferenceConfig, Record

# Intervals (of about a second) after which what was measured counts half.
_HALF_LIFE = 8.0
# Fewer than this say nothing yet.
_LEAST_FRAMES = 15.0
# A worker that is swamped also reads the frames that it gives up, and one that starts reads files.
_MOST = 4.0


class Served(Record, frozen=True, kw_only=True):
    """Busy seconds per frame of a stream that is served with ``inference_id``, over its latest ``num_frames``."""

    inference_id: str
    busy_s_per_frame: float
    num_frames: float


def served(known: Served | None, event: StreamAccuracy) -> Served | None:
    """``known`` with one more interval: a mean over frames in which older ones count less.

    Frames that were given up were not served, and a worker that had none says nothing.
    """
    frames = event.num_frames - event.num_dropped
    if frames <= 0 or event.busy_s <= 0.0:
        return known
    if known is None or known.inference_id != event.inference_id:
        return Served(inference_id=event.inference_id, busy_s_per_frame=event.busy_s / frames, num_frames=float(frames))
    kept = known.num_frames * 0.5 ** (1.0 / _HALF_LIFE)
    total = kept * known.busy_s_per_frame + event.busy_s
    return Served(inference_id=event.inference_id, busy_s_per_frame=total / (kept + frames), num_frames=kept + frames)


def rescaled(busy: Mapping[InferenceConfig, float], now: Served | None) -> dict[InferenceConfig, float]:
    """Measured busy seconds per frame of every configuration, all in proportion to what the serving one costs now."""
    if now is None or now.num_frames < _LEAST_FRAMES:
        return dict(busy)
    measured = next((value for config, value in busy.items() if config.config_id == now.inference_id), 0.0)
    if measured <= 0.0:
        return dict(busy)
    factor = min(max(now.busy_s_per_frame / measured, 1.0 / _MOST), _MOST)
    return {config: value * factor for config, value in busy.items()}
