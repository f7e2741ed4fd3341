"""Frame-exact reading of one video file with bounded memory."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from protocol.errors import EkyaError, InputError

# Seeking decodes from a key frame on; going forward less than this is quicker without.
_MAX_WALK = 64


class SourceError(EkyaError):
    """A stream's source failed while it ran: the file changed or is damaged. The stream is degraded; others go on."""


class Video:
    """Frames of a video by number. Opening indexes the packets (no decoding) and decodes the first frame.

    ``num_frames``, ``width``, ``height``. Raises InputError when the file is missing or no video, SourceError when a
    frame cannot be decoded later on.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._frames: Iterator[Any] | None = None
        self._next = 0
        self._last: tuple[int, Any] | None = None
        if not path.is_file():
            raise InputError(f"{path}: no such video file")
        try:
            self._container = av.open(str(path))
        except (av.FFmpegError, OSError) as error:
            raise InputError(f"{path}: cannot be opened as video: {_reason(error)}") from error
        try:
            self._index()
            first = self.frame(0)
        except (av.FFmpegError, SourceError, OSError) as error:
            self.close()
            raise InputError(f"{path}: cannot be read as video: {_reason(error)}") from error
        except InputError:
            self.close()
            raise
        self.width, self.height = int(first.width), int(first.height)

    @property
    def num_frames(self) -> int:
        return len(self._times)

    def frame(self, number: int) -> Any:
        """The decoded ``av.VideoFrame`` of a frame number. The latest one is kept."""
        if self._last is not None and self._last[0] == number:
            return self._last[1]
        if not 0 <= number < self.num_frames:
            raise SourceError(f"{self._path}: no frame {number}; it has 0 to {self.num_frames - 1}")
        try:
            frame = self._decode(number)
        except (av.FFmpegError, OSError, ValueError) as error:
            self._frames = None
            raise SourceError(f"{self._path}: frame {number} cannot be decoded: {_reason(error)}") from error
        self._last = (number, frame)
        return frame

    def pixels(self, number: int) -> NDArray[np.uint8]:
        """RGB uint8 (height, width, 3)."""
        try:
            picture: NDArray[np.uint8] = self.frame(number).to_ndarray(format="rgb24")
        except (av.FFmpegError, ValueError) as error:
            raise SourceError(f"{self._path}: frame {number} cannot be converted: {_reason(error)}") from error
        if picture.shape[:2] != (self.height, self.width):
            raise SourceError(
                f"{self._path}: frame {number} is {picture.shape[1]} x {picture.shape[0]}, "
                f"the video began with {self.width} x {self.height}"
            )
        return picture

    def close(self) -> None:
        """Release the decoder; safe to call twice."""
        self._frames = None
        self._last = None
        self._container.close()

    def _index(self) -> None:
        if not self._container.streams.video:
            raise InputError(f"{self._path}: has no video track")
        self._stream = self._container.streams.video[0]
        # Slices only: decoding whole frames ahead in threads would disturb the shares measured around it.
        self._stream.thread_type = "SLICE"
        self._stream.codec_context.thread_count = 1
        # Damage is to be reported, not painted over.
        self._stream.codec_context.options = {"err_detect": "crccheck+bitstream+buffer+explode"}
        times: list[int] = []
        keys: list[int] = []
        for packet in self._container.demux(self._stream):
            if packet.pts is None or packet.size == 0:
                continue
            if packet.is_corrupt:
                raise InputError(f"{self._path}: damaged packet after {len(times)} frames; re-encode the file")
            times.append(int(packet.pts))
            if packet.is_keyframe:
                keys.append(int(packet.pts))
        # Frames are shown in the order of their time stamps; packets come in decoding order.
        self._times = sorted(times)
        self._keys = sorted(bisect.bisect_left(self._times, time) for time in keys)
        if not self._times or not self._keys:
            raise InputError(f"{self._path}: holds no decodable frame")
        if len(set(self._times)) != len(self._times):
            raise InputError(f"{self._path}: two frames share a time stamp; re-encode the file")

    def _decode(self, number: int) -> Any:
        behind = number - self._next
        if self._frames is None or behind < 0 or (behind > _MAX_WALK and self._key_before(number) > self._next):
            self._next = self._key_before(number)
            self._container.seek(self._times[self._next], stream=self._stream, backward=True)
            self._frames = self._container.decode(self._stream)
        for frame in self._frames:
            if frame.pts is None:
                break
            position = bisect.bisect_left(self._times, int(frame.pts))
            if position < self._next:
                continue  # shown before the key frame, but stored behind it
            if position > self._next or frame.is_corrupt:
                break  # decoders leave a damaged frame out and build the following ones on it
            self._next += 1
            if position == number:
                return frame
        missing = self._next
        self._frames = None
        raise SourceError(f"{self._path}: frame {number} cannot be decoded: the file is damaged at frame {missing}")

    def _key_before(self, number: int) -> int:
        """The last key frame at or before a frame, as a frame number."""
        return self._keys[max(bisect.bisect_right(self._keys, number) - 1, 0)]


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return text or type(error).__name__
