"""Picture files, read with FFmpeg's decoders."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from protocol.errors import InputError


def read_picture(path: Path) -> NDArray[np.uint8]:
    """RGB uint8 (height, width, 3). Raises InputError when there is none in the file."""
    pixels: NDArray[np.uint8] = _decoded(path).to_ndarray(format="rgb24")
    return pixels


@lru_cache(maxsize=100_000)
def picture_size(path: Path) -> tuple[int, int]:
    """Width and height, without decoding where the header tells. Raises InputError."""
    try:
        with av.open(str(path)) as container:
            if container.streams.video and container.streams.video[0].width:
                return container.streams.video[0].width, container.streams.video[0].height
    except (av.FFmpegError, OSError) as error:
        raise InputError(f"{path}: is no picture: {_reason(error)}") from error
    picture = _decoded(path)
    return picture.width, picture.height


def _decoded(path: Path) -> Any:
    try:
        with av.open(str(path)) as container:
            for picture in container.decode(video=0):
                return picture
    except FileNotFoundError as error:
        raise InputError(f"{path}: is not there") from error
    except (av.FFmpegError, OSError, IndexError) as error:
        raise InputError(f"{path}: is no picture: {_reason(error)}") from error
    raise InputError(f"{path}: holds no picture")


def _reason(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error) or type(error).__name__
