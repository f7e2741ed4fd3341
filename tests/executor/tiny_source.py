"""A stream that costs nothing: coloured squares on grey, their colour is their class, slowly moving."""

from __future__ import annotations

import resource

import numpy as np
from numpy.typing import NDArray

from protocol.errors import InputError
from protocol.schema import CitySource, OracleGolden, StreamSpec

CLASSES = ("red", "green", "blue")
_COLOURS = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200]], np.float32)
SIZE = 40
_MEMORY_BYTES = 1 << 20


class TinyFrame:
    """Three to five objects, none in every tenth frame. Object k moves 2 px a frame and starts anew after 60 frames."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.time_s = index / 10.0
        self.conditions = "test light"
        draw = np.random.default_rng(index // 60 & 0xFFFF)
        count = 0 if index % 10 == 9 else int(draw.integers(3, 6))
        x = draw.permutation(8)[:count] * 60.0 + 2.0 * (index % 60)
        y = draw.uniform(0, 200, 8)[:count]
        self.labels: NDArray[np.int64] = draw.integers(0, len(CLASSES), 8)[:count].astype(np.int64)
        self.boxes: NDArray[np.float32] = np.stack([x, y, x + SIZE, y + SIZE], axis=1).astype(np.float32)

    def crops(self, px: int) -> NDArray[np.uint8]:
        draw = np.random.default_rng(self.index & 0xFFFFFF)
        noise = draw.normal(0.0, 25.0, (len(self.labels), px, px, 3))
        return np.clip(_COLOURS[self.labels][:, None, None, :] + noise, 0, 255).astype(np.uint8)

    def image(self) -> NDArray[np.uint8]:
        return np.full((240, 640, 3), 128, np.uint8)


class TinySource:
    """Endless; its stream's name may ask for trouble."""

    def __init__(self, spec: StreamSpec) -> None:
        if spec.stream_id == "missing":
            raise InputError("stream missing: video nowhere.mp4: no such file")
        if spec.stream_id == "greedy":
            resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY_BYTES, _MEMORY_BYTES))
        self.fps, self.classes = spec.fps, spec.classes
        self.closed = False

    def frame(self, index: int) -> TinyFrame:
        return TinyFrame(index)

    def close(self) -> None:
        self.closed = True


def spec(stream_id: str = "tiny", *, fps: float = 20.0, label_s: float = 0.0, **options: object) -> StreamSpec:
    """A stream whose source is a TinySource, whatever its spec says."""
    golden = OracleGolden(error_rate=0.0, seconds_per_frame=label_s)
    return StreamSpec(
        stream_id=stream_id,
        source=CitySource(seed=1),
        classes=CLASSES,
        fps=fps,
        golden=golden,
        crop_px=16,
        label_fps=4.0,
        exemplar_mb=0.0123,
        **options,  # type: ignore[arg-type]
    )
