"""Recorded streams: frame-exact reading, looping, crops, and the public street scenes where they are at hand."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest

from executor.streams.open import open_source
from executor.streams.recorded import Recorded
from executor.streams.resize import resize_picture
from protocol.schema import Clip, RecordedSource, StreamSpec

SIZE = (64, 48)
MAP = {"1": "person", "3": "car", "8": "car", "2": ""}
STREET = Path(__file__).resolve().parents[3] / "shared" / "data" / "street"
STREET_MAP = {"1": "person", "2": "cyclist", "3": "car", "4": "motorcycle", "6": "bus", "8": "van"}
CLASSES = ("person", "cyclist", "car", "van", "bus", "motorcycle")


def shade(number: int) -> tuple[int, int, int]:
    """A flat colour per frame that survives the codec well enough to tell neighbours apart."""
    return 16 + 24 * (number % 9), 16 + 24 * (number // 9 % 9), 128


def write_video(path: Path, num_frames: int, *, offset: int = 0, gap: int = 8, rate: int = 25) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv444p"
        stream.options = {"crf": "4", "g": str(gap), "bf": "2", "keyint_min": str(gap)}
        for number in range(num_frames):
            picture = np.empty((SIZE[1], SIZE[0], 3), np.uint8)
            picture[:] = shade(number + offset)
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def write_samples(path: Path, rows: list[str], *, header: bool = True) -> None:
    lines = ["idx,frame id,class,x0,y0,x1,y1,score"] * header + rows
    path.write_text("\n".join(lines) + "\n")


def make_clip(folder: Path, name: str, num_frames: int, **video: int) -> Clip:
    write_video(folder / f"{name}.mp4", num_frames, **video)
    rows = [f"{number},{number},1,2,3,20,40,0.9" for number in range(num_frames)]
    write_samples(folder / f"{name}.csv", rows)
    return Clip(video=str(folder / f"{name}.mp4"), samples=str(folder / f"{name}.csv"))


def opened(*clips: Clip, fps: float = 10.0, min_score: float = 0.0) -> Recorded:
    source = RecordedSource(clips=clips, class_map=MAP, min_score=min_score)
    stream = open_source(StreamSpec(stream_id="cam", source=source, classes=("person", "car"), fps=fps))
    assert isinstance(stream, Recorded)
    return stream


def number_of(picture: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> int:
    red, green, _ = (picture.reshape(-1, 3).mean(0) - 16) / 24
    return round(float(red)) + 9 * round(float(green))


def test_frames_are_exact_in_any_order_of_access(tmp_path: Path) -> None:
    source = opened(make_clip(tmp_path, "a", 60))
    order = [0, 1, 2, 30, 29, 28, 59, 0, 7, 8, 9, 40, 58, 59, 16, 15, 17, *np.random.default_rng(4).integers(0, 60, 25)]
    assert [number_of(source.frame(int(index)).image()) for index in order] == [int(index) for index in order]
    assert [number_of(source.frame(index).image()) for index in range(60)] == list(range(60))


def test_skipping_ahead_without_looking_stays_exact(tmp_path: Path) -> None:
    source = opened(make_clip(tmp_path, "a", 80, gap=250))
    for index in range(0, 80, 9):
        for skipped in range(index, index + 4):
            source.frame(skipped % 80)
        assert number_of(source.frame(index).image()) == index


def test_clips_follow_one_another_and_loop_in_both_directions(tmp_path: Path) -> None:
    one, two = make_clip(tmp_path, "one", 10), make_clip(tmp_path, "two", 12, offset=20)
    cut = Clip(video=two.video, samples=two.samples, first_frame=3, last_frame=6)
    source = opened(one, cut, fps=5.0)
    expected = [*range(10), 23, 24, 25, 26]
    assert source.num_frames == 14
    for index in (*range(-14, 30), 14 * 1000 + 11):
        frame = source.frame(index)
        assert number_of(frame.image()) == expected[index % 14]
        assert frame.conditions == ("one" if index % 14 < 10 else "two")
        assert frame.time_s == pytest.approx(index / 5.0)
        assert frame.index == index


def test_the_stream_rate_does_not_change_which_frame_is_which(tmp_path: Path) -> None:
    clip = make_clip(tmp_path, "a", 12, rate=50)
    assert [number_of(opened(clip, fps=fps).frame(7).image()) for fps in (1.0, 50.0, 120.0)] == [7, 7, 7]


def test_labels_follow_the_class_map_and_low_scores_are_dropped(tmp_path: Path) -> None:
    clip = make_clip(tmp_path, "a", 6)
    rows = ["0,0,1,0,0,10,10,0.9", "1,0,8,5,5,64,48,0.5", "2,0,2,0,0,9,9,0.9", "3,2,3,1.5,2.5,30.25,40.75,0.2"]
    write_samples(tmp_path / "a.csv", rows)
    source = opened(clip)
    assert source.frame(0).labels.tolist() == [0, 1]
    assert source.frame(0).boxes.tolist() == [[0, 0, 10, 10], [5, 5, 64, 48]]
    assert source.frame(2).boxes.tolist() == [[1.5, 2.5, 30.25, 40.75]]
    assert source.frame(1).boxes.shape == (0, 4)
    assert source.frame(1).crops(32).shape == (0, 32, 32, 3)
    assert opened(clip, min_score=0.6).frame(0).labels.tolist() == [0]


@pytest.mark.parametrize("header", [True, False])
def test_a_header_line_and_the_score_are_optional(tmp_path: Path, header: bool) -> None:
    clip = make_clip(tmp_path, "a", 4)
    write_samples(tmp_path / "a.csv", ["0,1,1,0,0,10,10", "", "1,2,3,0,0,10,10"], header=header)
    assert [opened(clip).frame(index).labels.tolist() for index in range(4)] == [[], [0], [1], []]


def test_a_crop_is_the_box_of_the_frame(tmp_path: Path) -> None:
    clip = make_clip(tmp_path, "a", 4)
    write_samples(tmp_path / "a.csv", ["0,3,1,2.5,3.5,20,40", "1,3,3,0,0,64,48"])
    frame = opened(clip).frame(3)
    image, crops = frame.image(), frame.crops(16)
    assert (crops[0] == resize_picture(image[3:40, 2:20], 16)).all()
    assert (crops[1] == resize_picture(image, 16)).all()


@pytest.mark.parametrize(("have", "want"), [((40, 60), 16), ((7, 5), 16), ((50, 9), 24), ((32, 32), 32), ((1, 1), 8)])
def test_resizing_keeps_gradients_and_means(have: tuple[int, int], want: int) -> None:
    rows, columns = np.mgrid[0 : have[0], 0 : have[1]]
    ramp = np.stack([rows * 200 / max(have[0] - 1, 1), columns * 200 / max(have[1] - 1, 1), rows * 0 + 77], 2)
    small = resize_picture(ramp.astype(np.uint8), want).astype(float)
    assert small.shape == (want, want, 3)
    assert abs(small.mean((0, 1)) - ramp.mean((0, 1))).max() < 2
    assert (np.diff(small[:, :, 0], axis=0) >= 0).all()
    assert (np.diff(small[:, :, 1], axis=1) >= 0).all()
    assert (small[:, :, 2] == 77).all()


def test_reading_an_endless_stream_keeps_no_frames(tmp_path: Path) -> None:
    source = opened(make_clip(tmp_path, "a", 30))
    first = source.frame(0)
    for index in range(200):
        source.frame(index).image()
    # Pixels are read anew: what a frame gives does not depend on how far the stream has moved on.
    assert number_of(first.image()) == 0


def test_closing_twice_is_safe(tmp_path: Path) -> None:
    source = opened(make_clip(tmp_path, "a", 4))
    source.frame(2).image()
    source.close()
    source.close()


@pytest.mark.skipif(not STREET.is_dir(), reason="the street scenes are not on this machine")
@pytest.mark.parametrize("scene", ["street", "motorway", "plaza"])
def test_every_labelled_frame_of_a_street_scene_decodes_and_its_boxes_fit(scene: str) -> None:
    clip = Clip(video=str(STREET / f"{scene}.mp4"), samples=str(STREET / f"{scene}.csv"))
    source = open_source(
        StreamSpec(stream_id="cam", source=RecordedSource(clips=(clip,), class_map=STREET_MAP), classes=CLASSES)
    )
    assert isinstance(source, Recorded)
    with (STREET / f"{scene}.csv").open() as file:
        rows = list(csv.DictReader(file))
    expected = Counter(int(row["frame id"]) for row in rows)
    num_boxes = 0
    for index in range(source.num_frames):
        frame = source.frame(index)
        assert len(frame.boxes) == expected[index]
        image = frame.image()
        assert (frame.boxes[:, [0, 1]] >= 0).all()
        assert (frame.boxes[:, 2] <= image.shape[1]).all()
        assert (frame.boxes[:, 3] <= image.shape[0]).all()
        num_boxes += len(frame.boxes)
    assert num_boxes == len(rows)
    # Wrap-around: the first frame of the second round is the first frame.
    assert (source.frame(source.num_frames).image() == source.frame(0).image()).all()
    assert source.frame(source.num_frames).boxes.tolist() == source.frame(0).boxes.tolist()
