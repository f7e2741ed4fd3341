"""Films whose frames say their own number, made from a procedural city: what was seen can be checked."""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from executor.streams.city import City
from protocol.schema import CitySource

CLASSES = ("person", "cyclist", "car", "van", "bus", "motorcycle")
SIZE = (320, 240)
_BITS = 16
_ROWS = 16


@lru_cache(maxsize=32)
def city(seed: int, size: tuple[int, int], fps: float) -> City:
    """The truth of a film."""
    source = CitySource(seed=seed, width=size[0], height=size[1], num_objects=8, drift_period_s=0.0)
    return City(source, CLASSES, fps)


def write_film(path: Path, *, seed: int, num_frames: int, size: tuple[int, int] = SIZE, fps: int = 10) -> None:
    """A film (.ts or .mp4, by the name; H.264, a key frame every second) of frames 0 to ``num_frames`` - 1."""
    scene = city(seed, size, fps)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.options = {"crf": "18", "g": str(fps), "bf": "0", "preset": "veryfast", "tune": "zerolatency"}
        stream.codec_context.thread_count = 1
        for number in range(num_frames):
            picture = av.VideoFrame.from_ndarray(marked(scene.frame(number).image(), number), format="rgb24")
            picture.pts, picture.time_base = number, Fraction(1, fps)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def marked(picture: NDArray[np.uint8], number: int) -> NDArray[np.uint8]:
    """The picture with ``number`` written into its top rows, as black and white blocks."""
    picture = picture.copy()
    width = picture.shape[1] // _BITS
    for bit in range(_BITS):
        picture[:_ROWS, bit * width : (bit + 1) * width] = 255 * (number >> bit & 1)
    return picture


def number_of(picture: NDArray[np.uint8]) -> int:
    """The number written into a picture."""
    width = picture.shape[1] // _BITS
    blocks = picture[2 : _ROWS - 2, : width * _BITS].reshape(_ROWS - 4, _BITS, width, 3).mean((0, 2, 3))
    return sum(1 << bit for bit in range(_BITS) if blocks[bit] > 127)


def units(path: Path) -> list[tuple[bytes, bool]]:
    """The film's access units (H.264 byte stream) and whether each is a key frame. ``path``: an MPEG-TS file."""
    with av.open(str(path)) as container:
        return [(bytes(packet), packet.is_keyframe) for packet in container.demux(video=0) if packet.size]
