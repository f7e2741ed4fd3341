"""The frame rate that a video file states."""

from __future__ import annotations

from pathlib import Path

import av

from protocol.errors import InputError

_USUAL_FPS = 25.0


def rate_of(path: Path) -> float:
    """Frames per second, 25 where the file does not say. Raises InputError when it is no video."""
    try:
        with av.open(str(path)) as container:
            video = container.streams.video[0]
            rate = video.average_rate or video.guessed_rate
            return float(rate) if rate and 0.1 <= float(rate) <= 240.0 else _USUAL_FPS
    except (av.FFmpegError, OSError, IndexError) as error:
        raise InputError(f"{path}: is no video: {error}") from error
