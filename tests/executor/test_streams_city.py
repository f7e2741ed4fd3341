"""The procedural city: determinism, boxes, crops, drift that shows."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from executor.streams.city import MAX_HIDDEN, MIN_BOX_HEIGHT, MIN_BOX_WIDTH, City
from executor.streams.figures import CLASSES, HEADING_STEP, NUM_PHASES, SHAPES, sprite
from executor.streams.open import open_source
from executor.streams.resize import resize_picture
from protocol.errors import InputError
from protocol.schema import CitySource, DriftEvent, StreamSpec

NIGHT = (
    DriftEvent(kind="light", at_s=0.0, to="night", over_s=0.0),
    DriftEvent(kind="weather", at_s=0.0, to="rain", over_s=0.0),
)


def city(
    seed: int = 7,
    *,
    classes: tuple[str, ...] = CLASSES,
    num_objects: float = 10.0,
    drift: tuple[DriftEvent, ...] = (),
    period_s: float = 0.0,
    size: tuple[int, int] = (320, 192),
    fps: float = 10.0,
) -> City:
    source = CitySource(
        seed=seed, width=size[0], height=size[1], num_objects=num_objects, drift=drift, drift_period_s=period_s
    )
    opened = open_source(StreamSpec(stream_id="cam", source=source, classes=classes, fps=fps))
    assert isinstance(opened, City)
    return opened


def digest(source: City, index: int) -> str:
    frame = source.frame(index)
    parts = (frame.boxes, frame.labels, frame.crops(24), frame.image())
    return hashlib.sha256(b"".join(part.tobytes() for part in parts) + frame.conditions.encode()).hexdigest()


@pytest.mark.parametrize("seed", [0, 7, -3])
def test_a_frame_depends_on_seed_and_index_only_not_on_what_was_asked_before(seed: int) -> None:
    indices = [0, 5, -40, 400, 401, 12345]
    one, other = city(seed, period_s=20.0), city(seed, period_s=20.0)
    forward = {index: digest(one, index) for index in indices}
    assert {index: digest(other, index) for index in reversed(indices)} == forward
    assert forward == {index: digest(one, index) for index in indices}
    assert len(set(forward.values())) == len(indices)


def test_another_process_sees_the_same_frames() -> None:
    program = (
        "import hashlib\n"
        "from executor.streams.city import City\n"
        "from executor.streams.figures import CLASSES\n"
        "from protocol.schema import CitySource\n"
        "frame = City(CitySource(seed=7, width=320, height=192, num_objects=10.0), CLASSES, 10.0).frame(321)\n"
        "print(hashlib.sha256(frame.boxes.tobytes() + frame.labels.tobytes() + frame.crops(32).tobytes()).hexdigest())"
    )
    theirs = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=100)
    frame = city(period_s=30.0).frame(321)
    ours = hashlib.sha256(frame.boxes.tobytes() + frame.labels.tobytes() + frame.crops(32).tobytes()).hexdigest()
    assert theirs.stdout.strip() == ours


@pytest.mark.parametrize("size", [(640, 360), (160, 120), (500, 500)])
def test_boxes_lie_inside_the_frame_and_show_enough_of_their_object(size: tuple[int, int]) -> None:
    source = city(size=size, num_objects=20.0, period_s=15.0)
    for index in range(-600, 1500, 60):
        frame = source.frame(index)
        assert frame.boxes.dtype == np.float32
        assert frame.boxes.shape == (len(frame.labels), 4)
        assert frame.labels.dtype == np.int64
        x0, y0, x1, y1 = frame.boxes.T
        assert (x0 >= 0).all()
        assert (y0 >= 0).all()
        assert (x1 <= size[0]).all()
        assert (y1 <= size[1]).all()
        assert (x1 - x0 >= MIN_BOX_WIDTH).all()
        assert (y1 - y0 >= MIN_BOX_HEIGHT).all()
    assert frame.image().shape == (size[1], size[0], 3)
    assert frame.crops(16).shape == (len(frame.labels), 16, 16, 3)


def test_boxes_come_nearest_first_and_none_is_mostly_behind_a_nearer_one() -> None:
    source = city(num_objects=40.0)
    for index in range(0, 600, 20):
        boxes = source.frame(index).boxes
        for position, (x0, y0, x1, y1) in enumerate(boxes):
            for near in boxes[:position]:
                wide, high = min(x1, near[2]) - max(x0, near[0]), min(y1, near[3]) - max(y0, near[1])
                if wide > 0 and high > 0:
                    assert wide * high <= MAX_HIDDEN * (x1 - x0) * (y1 - y0) + 1e-3


@pytest.mark.parametrize("drift", [(), NIGHT])
def test_a_crop_is_the_same_picture_as_that_part_of_the_whole_frame(drift: tuple[DriftEvent, ...]) -> None:
    source = city(num_objects=20.0, size=(640, 360), drift=drift)
    num_exact = num_reduced = 0
    for index in range(100, 400, 60):
        frame = source.frame(index)
        image = frame.image()
        for box, crop in zip(frame.boxes.astype(int), frame.crops(64), strict=True):
            part = image[box[1] : box[3], box[0] : box[2]]
            difference = np.abs(crop.astype(int) - resize_picture(part, 64).astype(int))
            if max(part.shape[:2]) <= 64:
                assert difference.max() <= 2, "a box that need not shrink is the frame's own pixels"
                num_exact += 1
            else:
                assert difference.mean() < 12, "a large box is drawn at the smaller size and differs by resampling"
                num_reduced += 1
    assert num_exact > 20
    assert num_reduced > 3


def test_the_mean_number_of_objects_follows_the_wish() -> None:
    counts = [
        np.mean([len(city_frame.boxes) for city_frame in map(source.frame, range(0, 20000, 97))])
        for source in (city(num_objects=5.0), city(num_objects=20.0))
    ]
    assert 2.0 < counts[0] < 6.5
    assert 2.5 < counts[1] / counts[0] < 4.5


def test_objects_move_a_little_from_frame_to_frame() -> None:
    source = city(size=(640, 360))
    tracks = source.frame(200).boxes, source.frame(201).boxes
    centres = [0.5 * (boxes[:, :2] + boxes[:, 2:]) for boxes in tracks]
    steps = np.linalg.norm(centres[0][:, None] - centres[1][None], axis=2).min(1)
    assert 0 < np.median(steps) < 40


def test_only_the_classes_that_the_stream_lists_appear_in_its_own_order() -> None:
    source = city(classes=("bus", "person"), num_objects=20.0)
    labels = np.concatenate([source.frame(index).labels for index in range(0, 3000, 50)])
    assert set(labels.tolist()) == {0, 1}
    assert 0.05 < np.mean(labels == 0) < 0.6, "buses are fewer than people when commuting"


def mean_labels(source: City, start_s: float) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    labels = np.concatenate([source.frame(int((start_s + step) * 10)).labels for step in range(0, 400, 4)])
    return np.asarray(np.bincount(labels, minlength=6) / len(labels))


def test_a_change_of_the_class_mix_shows_in_the_labels() -> None:
    freight = DriftEvent(kind="class_mix", at_s=400.0, to="freight", over_s=0.0)
    source = city(num_objects=15.0, drift=(freight,))
    before, after = mean_labels(source, 0.0), mean_labels(source, 430.0)
    van, person = CLASSES.index("van"), CLASSES.index("person")
    assert after[van] > 2 * before[van]
    assert after[person] < before[person]


@pytest.mark.parametrize(("kind", "level"), [("light", "night"), ("weather", "fog"), ("weather", "snow")])
def test_light_and_weather_change_the_pixels_but_not_the_truth(kind: str, level: str) -> None:
    change = DriftEvent(kind=kind, at_s=0.0, to=level, over_s=0.0)  # type: ignore[arg-type]
    base, drifted = city().frame(200), city(drift=(change,)).frame(200)
    assert (base.boxes == drifted.boxes).all()
    assert (base.labels == drifted.labels).all()
    assert level in drifted.conditions
    assert np.abs(base.image().astype(int) - drifted.image().astype(int)).mean() > 8


def test_night_is_dark_and_fog_takes_contrast() -> None:
    day, night, fog = (
        city(drift=drift).frame(100).image()
        for drift in (
            (),
            NIGHT[:1],
            (DriftEvent(kind="weather", at_s=0.0, to="fog", over_s=0.0),),
        )
    )
    assert night.mean() < 0.7 * day.mean()
    assert fog.std() < 0.85 * day.std()


def test_a_new_fleet_brings_other_figures_to_those_that_set_out_later() -> None:
    source = city(num_objects=15.0, drift=(DriftEvent(kind="appearance", at_s=100.0, to="fleet", over_s=0.0),))
    fleet_only = {shape for looks in SHAPES.values() for shape in looks["fleet"]} - {
        shape for looks in SHAPES.values() for shape in looks["summer"]
    }

    def shapes(start_s: float) -> list[str]:
        found = [source.tracks_at(start_s + step) for step in range(0, 60, 3)]
        return [track.shape for tracks in found for track in tracks]

    before, after = shapes(30.0), shapes(200.0)
    assert not fleet_only & set(before)
    assert np.mean([shape in fleet_only for shape in after]) > 0.2


def test_every_figure_can_be_drawn_from_every_side() -> None:
    for name, looks in SHAPES.items():
        for shape in sorted({shape for shapes in looks.values() for shape in shapes}):
            for heading in range(0, 181, max(HEADING_STEP[name], 45)):
                drawn = sprite(name, shape, heading, NUM_PHASES[name] - 1)
                x0, y0, x1, y1 = drawn.body
                assert 0 <= x0 < x1 <= drawn.size[1]
                assert 0 <= y0 < y1 <= drawn.size[0]
                height_m = (y1 - y0) / drawn.ppm
                assert 1.2 < height_m < 7.0


def test_an_unknown_class_is_refused_with_the_allowed_ones() -> None:
    with pytest.raises(InputError, match=r"stream cam: classes: a city has no 'tram'; allowed: person, cyclist, car"):
        city(classes=("person", "tram"))
    with pytest.raises(InputError, match="listed twice"):
        city(classes=("person", "person"))


def test_closing_twice_is_safe() -> None:
    source = city()
    source.frame(3).crops(16)
    source.close()
    source.close()
