"""Frames and crops per second of the sources: ``pytest benchmarks/bench_streams.py``.

One round reads a stretch of stream time in order, as an inference worker does; ``extra_info`` holds processor
milliseconds per frame and per crop, which other load on the machine disturbs less than wall time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from executor.streams.figures import CLASSES
from executor.streams.frames import FrameSource
from executor.streams.open import open_source
from protocol.schema import CitySource, Clip, DriftEvent, RecordedSource, StreamSpec

NUM_FRAMES = 100
STREET = Path(__file__).resolve().parents[2] / "shared" / "data" / "street"
STREET_MAP = {"1": "person", "2": "cyclist", "3": "car", "4": "motorcycle", "6": "bus", "8": "van"}

NIGHT_RAIN = (
    DriftEvent(kind="light", at_s=0.0, to="night", over_s=0.0),
    DriftEvent(kind="weather", at_s=0.0, to="rain", over_s=0.0),
)


def city(drift: tuple[DriftEvent, ...] = ()) -> FrameSource:
    source = CitySource(seed=3, num_objects=10.0, drift=drift, drift_period_s=0.0)
    return open_source(StreamSpec(stream_id="bench", source=source, classes=CLASSES, fps=10.0))


def recorded(clip: Clip) -> FrameSource:
    source = RecordedSource(clips=(clip,), class_map=STREET_MAP)
    return open_source(StreamSpec(stream_id="bench", source=source, classes=CLASSES, fps=10.0))


def measure(benchmark: BenchmarkFixture, source: FrameSource, work: Callable[[FrameSource, int], int]) -> None:
    """Time ``work`` (frame index -> things made) over stretches of NUM_FRAMES frames, a new stretch each round."""
    position, made, spent = 0, 0, 0.0

    def stretch() -> None:
        nonlocal position, made, spent
        start = time.process_time()
        made += sum(work(source, index) for index in range(position, position + NUM_FRAMES))
        spent += time.process_time() - start
        position += NUM_FRAMES

    stretch()  # background and the first figures
    position, made, spent = NUM_FRAMES, 0, 0.0
    benchmark.pedantic(stretch, rounds=4, iterations=1)  # type: ignore[no-untyped-call]
    benchmark.extra_info["cpu_ms_per_frame"] = 1e3 * spent / (position - NUM_FRAMES)
    benchmark.extra_info["cpu_ms_per_item"] = 1e3 * spent / made
    assert made > 0
    source.close()


@pytest.mark.parametrize("px", [16, 32, 64])
@pytest.mark.parametrize("drift", [(), NIGHT_RAIN], ids=["day", "night_rain"])
def test_city_crops(benchmark: BenchmarkFixture, px: int, drift: tuple[DriftEvent, ...]) -> None:
    measure(benchmark, city(drift), lambda source, index: len(source.frame(index).crops(px)))


def test_city_positions(benchmark: BenchmarkFixture) -> None:
    measure(benchmark, city(), lambda source, index: len(source.frame(index).boxes))


def test_city_images(benchmark: BenchmarkFixture) -> None:
    measure(benchmark, city(), lambda source, index: min(len(source.frame(index).image()), 1))


def test_city_start(benchmark: BenchmarkFixture) -> None:
    """Opening and the first picture: the background is drawn."""
    benchmark.pedantic(lambda: city().frame(0).image(), rounds=3, iterations=1)  # type: ignore[no-untyped-call]


@pytest.mark.skipif(not STREET.is_dir(), reason="the street scenes are not on this machine")
@pytest.mark.parametrize("scene", ["plaza", "motorway"])
def test_recorded_crops(benchmark: BenchmarkFixture, scene: str) -> None:
    source = recorded(Clip(video=str(STREET / f"{scene}.mp4"), samples=str(STREET / f"{scene}.csv")))
    measure(benchmark, source, lambda source, index: len(source.frame(index).crops(64)))


def test_recorded_images(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    """A generated 640 x 360 video, so that the figure can be had on any machine."""
    rng = np.random.default_rng(2)
    scene = city()
    with av.open(str(tmp_path / "v.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = 640, 360, "yuv420p"
        for index in range(60):
            for packet in stream.encode(av.VideoFrame.from_ndarray(scene.frame(index).image(), format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    rows = [f"{number},{number},1,{x},{x},{x + 40},{x + 80}" for number, x in enumerate(rng.integers(0, 200, 60))]
    (tmp_path / "v.csv").write_text("\n".join(rows))
    source = recorded(Clip(video=str(tmp_path / "v.mp4"), samples=str(tmp_path / "v.csv")))
    measure(benchmark, source, lambda source, index: min(len(source.frame(index).image()), 1))
