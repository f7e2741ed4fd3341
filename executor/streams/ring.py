"""The last seconds of a live stream, on disk, for the processes that look back: labelling and trials.

The worker that serves the stream writes every frame as a JPEG file, ``<frame number>.jpg`` in the stream's folder of
the store, and removes the ones that are too old. A file appears whole or not at all, so readers need no lock.
"""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.frame import PictureType
from numpy.typing import NDArray

from executor.streams.video import SourceError
from protocol.errors import InputError
from protocol.schema import StreamSpec

# JPEG quantiser: 46 kB and 3 ms for a frame of 768 x 576, and 2 grey levels of mean error.
_QUANTISER = 5
_PIXELS = "yuvj420p"

NO_BOXES: NDArray[np.float32] = np.zeros((0, 4), np.float32)
NO_LABELS: NDArray[np.int64] = np.zeros(0, np.int64)


def folder_of(store: Path, stream_id: str) -> Path:
    """Where the ring of a stream lies."""
    return store / "frames" / stream_id


class RingWriter:
    """Keeps the frames of the last ``keep_s`` seconds. One writer per stream; raises InputError when it cannot write.

    ``next_index``: of the first frame to come. Frames that an earlier run left at or after it are not this run's past,
    and are removed.
    """

    def __init__(self, store: Path, spec: StreamSpec, keep_s: float, next_index: int) -> None:
        self._folder = folder_of(store, spec.stream_id)
        self._num_kept = max(1, round(keep_s * spec.fps))
        self._encoder: Any = None
        self._size = (0, 0)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for path in self._folder.iterdir():
                index = _index_of(path)
                if index is None or index >= next_index or index < next_index - self._num_kept:
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise InputError(f"{self._folder}: recent frames cannot be kept: {error.strerror or error}") from error
        self._oldest, self._newest = next_index - self._num_kept, next_index - 1

    def write(self, index: int, picture: Any) -> None:
        """Add frame ``index``, an ``av.VideoFrame``; numbers rise. Raises OSError when the disk does not take it."""
        temporary = self._folder / f".{os.getpid()}.part"
        temporary.write_bytes(self._encoded(picture))
        temporary.rename(_path(self._folder, index))
        # After a long silence all that there was is too old, and there is nothing between it and now.
        end = min(index - self._num_kept, self._newest) + 1
        for old in range(self._oldest, end):
            _path(self._folder, old).unlink(missing_ok=True)
        self._oldest = max(self._oldest, index - self._num_kept + 1)
        self._newest = index

    def _encoded(self, picture: Any) -> bytes:
        size = (picture.width, picture.height)
        if self._encoder is None or size != self._size:
            encoder: Any = av.CodecContext.create("mjpeg", "w")
            encoder.width, encoder.height = size
            encoder.pix_fmt, encoder.time_base, encoder.thread_count = _PIXELS, Fraction(1, 1000), 1
            encoder.qmin = encoder.qmax = _QUANTISER
            self._encoder, self._size = encoder, size
        frame = picture.reformat(format=_PIXELS)
        if frame is picture:
            # The picture goes on to others, and what is set here is not for them.
            frame = av.VideoFrame.from_ndarray(picture.to_ndarray(), format=_PIXELS)
        frame.pts, frame.time_base, frame.pict_type = None, Fraction(1, 1000), PictureType.NONE
        return b"".join(bytes(packet) for packet in self._encoder.encode(frame))


class LiveFrame:
    """One frame of a live stream (see executor.streams.frames.Frame): pixels, and no truth."""

    def __init__(self, index: int, fps: float, picture: Any) -> None:
        self.index, self.time_s, self.conditions = index, index / fps, ""
        self.boxes, self.labels = NO_BOXES, NO_LABELS
        self._picture = picture

    def crops(self, px: int) -> NDArray[np.uint8]:
        """There are no boxes: uint8 (0, px, px, 3)."""
        return np.zeros((0, px, px, 3), np.uint8)

    def image(self) -> NDArray[np.uint8]:
        """The whole frame, RGB uint8 (height, width, 3)."""
        pixels: NDArray[np.uint8] = self._picture.to_ndarray(format="rgb24")
        return pixels


class RingFrames:
    """The kept frames as a FrameSource. A frame that is missing is stood in for by its nearest neighbour within a
    second; where there is none ``frame`` raises SourceError."""

    def __init__(self, store: Path, spec: StreamSpec) -> None:
        self.fps, self.classes = spec.fps, spec.classes
        self._folder = folder_of(store, spec.stream_id)
        self._reach = max(1, round(spec.fps))
        self._decoder: Any = None

    def frame(self, index: int) -> LiveFrame:
        """The frame at ``index``. Raises SourceError when nothing was kept of that second."""
        for distance in range(self._reach + 1):
            for number in {index - distance, index + distance}:
                picture = self._read(_path(self._folder, number))
                if picture is not None:
                    return LiveFrame(index, self.fps, picture)
        raise SourceError(
            f"frame {index} of the live stream is not there: nothing was recorded within a second of it (kept: "
            f"{self._kept()})"
        )

    def close(self) -> None:
        """Nothing is held open."""

    def _read(self, path: Path) -> Any:
        """The picture of a file, None when it is not there or damaged."""
        try:
            data = path.read_bytes()
            if not data:
                return None  # to a decoder that would be the end of all pictures
            if self._decoder is None:
                self._decoder = av.CodecContext.create("mjpeg", "r")
                self._decoder.thread_count = 1
            pictures = self._decoder.decode(av.Packet(data))
        except FileNotFoundError:
            return None
        except av.FFmpegError:
            self._decoder = None
            return None
        return pictures[0] if pictures else None

    def _kept(self) -> str:
        try:
            numbers = sorted(index for path in self._folder.iterdir() if (index := _index_of(path)) is not None)
        except OSError:
            numbers = []
        return f"frames {numbers[0]} to {numbers[-1]}" if numbers else "none"


def _path(folder: Path, index: int) -> Path:
    return folder / f"{index}.jpg"


def _index_of(path: Path) -> int | None:
    try:
        return int(path.stem) if path.suffix == ".jpg" else None
    except ValueError:
        return None
