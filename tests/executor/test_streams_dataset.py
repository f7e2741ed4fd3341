"""Data sets that people have: read, checked, played. What is wrong is named with file and line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from executor.streams.annotations import natural, parse_names, read_dataset
from executor.streams.dataset import Dataset
from executor.streams.ingest import mix_distance, summarise
from executor.streams.open import open_source
from executor.streams.video import SourceError
from protocol.errors import InputError
from protocol.schema import DatasetSource, StreamSpec
from tests.executor.test_streams_recorded import write_video

SIZE = (64, 48)


def write_picture(path: Path, shade: int, size: tuple[int, int] = SIZE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    codec = "png" if path.suffix == ".png" else "mjpeg"
    with av.open(str(path), "w", format="image2", options={"update": "1"}) as container:
        stream: Any = container.add_stream(codec, rate=1)
        stream.width, stream.height = size
        stream.pix_fmt = "rgb24" if codec == "png" else "yuvj420p"
        pixels = np.full((size[1], size[0], 3), shade, np.uint8)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def coco(folder: Path, num_frames: int = 12) -> Path:
    """Frame i has shade 10 i and one box; named so that plain sorting would put 10 before 2."""
    for number in range(num_frames):
        write_picture(folder / "images" / f"frame{number}.png", 10 * number)
    raw = {
        "images": [{"id": 100 + n, "file_name": f"frame{n}.png"} for n in reversed(range(num_frames))],
        "categories": [{"id": 7, "name": "car"}, {"id": 9, "name": "tram"}],
        "annotations": [
            {"id": n, "image_id": 100 + n, "category_id": 7 if n % 2 else 9, "bbox": [4, 6, 20, 10 + n]}
            for n in range(num_frames)
        ],
    }
    (folder / "set.json").write_text(json.dumps(raw))
    return folder / "set.json"


def yolo(folder: Path, names: str = "names: [person, car]\n") -> Path:
    for number in range(6):
        write_picture(folder / "images" / "train" / f"{number}.jpg", 40 * number)
        (folder / "labels" / "train").mkdir(parents=True, exist_ok=True)
        text = f"{number % 2} 0.5 0.5 0.5 0.25\n" if number else ""
        (folder / "labels" / "train" / f"{number}.txt").write_text(text)
    (folder / "data.yaml").write_text(f"# a data set\ntrain: images/train\nnc: 2\n{names}")
    return folder


def samples(folder: Path) -> Path:
    for number in range(5):
        write_picture(folder / "seq" / f"{number:03d}.png", 50 * number)
    (folder / "seq.csv").write_text(
        "idx,frame id,class,x0,y0,x1,y1,score\n0,0,1,2,3,20,40,0.9\n1,2,3,5,5,60,47,0.8\n2,4,1,0,0,30,30,0.7\n"
    )
    return folder / "seq.csv"


def played(path: Path, classes: tuple[str, ...] = ("person", "car"), **options: Any) -> Dataset:
    source = DatasetSource(path=str(path), **options)
    found = open_source(StreamSpec(stream_id="set", source=source, classes=classes, fps=5.0))
    assert isinstance(found, Dataset)
    return found


# ---------------------------------------------------------------- reading and playing


def test_a_coco_set_is_played_in_the_order_of_its_names_and_looped(tmp_path: Path) -> None:
    stream = played(coco(tmp_path), ("tram", "car"))
    assert stream.num_frames == 12
    assert [int(stream.frame(n).image()[0, 0, 0]) for n in (0, 2, 9, 10, 11, 12, -1)] == [0, 20, 90, 100, 110, 0, 110]
    frame = stream.frame(3)
    assert frame.boxes.tolist() == [[4.0, 6.0, 24.0, 19.0]]
    assert [stream.frame(n).labels.tolist() for n in (2, 3)] == [[0], [1]]
    assert frame.crops(16).shape == (1, 16, 16, 3)
    assert frame.time_s == pytest.approx(0.6)


def test_a_yolo_set_is_played_with_its_names_and_its_split(tmp_path: Path) -> None:
    for folder in (played(yolo(tmp_path)), played(tmp_path, split="train")):
        assert folder.num_frames == 6
        assert [folder.frame(n).labels.tolist() for n in range(3)] == [[], [1], [0]]
        assert folder.frame(1).boxes.tolist() == [[16.0, 18.0, 48.0, 30.0]]
    assert played(tmp_path, ("mover", "parked"), class_map={"person": "mover", "1": "parked"}).frame(1).labels[0] == 1


def test_a_sample_list_is_played_with_its_folder_of_pictures_or_its_video(tmp_path: Path) -> None:
    stream = played(samples(tmp_path))
    assert [stream.frame(n).labels.tolist() for n in range(5)] == [[0], [], [1], [], [0]]
    assert int(stream.frame(3).image()[0, 0, 0]) == 150
    write_video(tmp_path / "clip.mp4", 9)
    (tmp_path / "clip.csv").write_text("0,4,3,2,3,20,40\n1,6,1,2,3,20,40\n")
    stream = played(tmp_path / "clip.csv")
    assert stream.num_frames == 9, "frames without a row are frames too"
    assert [n for n in range(9) if len(stream.frame(n).labels)] == [4, 6]
    assert stream.frame(4).image().shape == (48, 64, 3)


def test_boxes_are_cut_at_the_edges_of_the_picture(tmp_path: Path) -> None:
    path = coco(tmp_path)
    raw = json.loads(path.read_text())
    raw["annotations"][0]["bbox"] = [-8, -8, 200, 200]
    path.write_text(json.dumps(raw))
    assert played(path, ("car", "tram")).frame(0).boxes.tolist() == [[0.0, 0.0, 64.0, 48.0]]


def test_names_are_put_in_the_order_of_their_numbers() -> None:
    assert sorted(["f10.png", "f9.png", "a/f2.png", "f1b.png"], key=natural) == [
        "a/f2.png",
        "f1b.png",
        "f9.png",
        "f10.png",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "names: [person, 'big car']",
        'names: ["person",\n  "big car"]',
        "names:\n  - person\n  - big car",
        "names:\n- person  # on foot\n- big car\nnc: 2",
        "names:\n  0: person\n  1: 'big car'\nother: 3",
        "names: {0: person, 1: big car}",
        "nc: 2\nnames:\n\n  0: person\n  1: big car",
    ],
)
def test_the_names_of_a_yaml_file_are_understood_in_every_usual_spelling(text: str) -> None:
    assert parse_names(text) == {0: "person", 1: "big car"}


def test_a_damaged_picture_is_a_source_error_when_it_is_asked_for(tmp_path: Path) -> None:
    stream = played(coco(tmp_path), ("tram", "car"))
    picture = tmp_path / "images" / "frame5.png"
    picture.write_bytes(picture.read_bytes()[:40])
    with pytest.raises(SourceError, match=r"frame5.png"):
        stream.frame(5).image()
    assert stream.frame(6).image().shape == (48, 64, 3)


# ---------------------------------------------------------------- what is wrong


def rewrite(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], Path]:
    def prepare(folder: Path) -> Path:
        path = coco(folder)
        raw = json.loads(path.read_text())
        change(raw)
        path.write_text(json.dumps(raw))
        return path

    return prepare


def labelled(line: str) -> Callable[[Path], Path]:
    def prepare(folder: Path) -> Path:
        yolo(folder)
        (folder / "labels" / "train" / "3.txt").write_text(f"0 0.5 0.5 0.1 0.1\n{line}\n")
        return folder

    return prepare


def row(line: str) -> Callable[[Path], Path]:
    def prepare(folder: Path) -> Path:
        path = samples(folder)
        path.write_text(f"{path.read_text()}{line}\n")
        return path

    return prepare


@pytest.mark.parametrize(
    ("prepare", "text"),
    [
        (rewrite(lambda r: r["annotations"][2].update(category_id=5)), "annotations[2]: category_id 5 is none"),
        (rewrite(lambda r: r["annotations"][2].update(image_id=5)), "annotations[2]: image_id 5 is none"),
        (rewrite(lambda r: r["annotations"][2].update(bbox=[1, 2, 3])), "annotations[2]: bbox [1, 2, 3] is not"),
        (rewrite(lambda r: r["annotations"][2].update(bbox=[1, 2, 0, 4])), "is empty"),
        (rewrite(lambda r: r["annotations"][2].pop("bbox")), "annotations[2]: bbox missing"),
        (rewrite(lambda r: r["annotations"][2].update(bbox=[10**400, 2, 3.5, 4])), "annotations[2]: "),
        (rewrite(lambda r: r["annotations"][2].update(image_id=[5])), "annotations[2]: image_id [5] is no id"),
        (rewrite(lambda r: r["images"][1].update(file_name="x" * 400)), "is not in"),
        (rewrite(lambda r: r["images"][1].update(file_name="gone.png")), "image gone.png is not in"),
        (rewrite(lambda r: r["images"][1].update(id=100)), "is used twice"),
        (rewrite(lambda r: r["categories"].append({"id": "x"})), "categories[2]: id"),
        (labelled("7 0.5 0.5 0.1 0.1"), "3.txt, line 2: class 7 has no name"),
        (labelled("0 0.5 0.5 0.1"), "3.txt, line 2: 4 numbers; allowed: class x y w h"),
        (labelled("0 0.5 1.5 0.1 0.1"), "3.txt, line 2: 0.5 1.5 0.1 0.1 is not within 0 to 1"),
        (labelled("0 0.5 x 0.1 0.1"), "3.txt, line 2: could not convert"),
        (row("3,1,1,5,5,5,9"), "seq.csv, line 5: box 5,5,5,9 is empty"),
        (row("3,9,1,5,5,8,9"), "frame id 9 is beyond the 5 pictures"),
        (row("3,1,x,5,5,8,9"), "seq.csv, line 5: frame id '1' or class 'x' is no whole number"),
        (row("3,1,1"), "seq.csv, line 5: 3 columns"),
    ],
)
def test_a_mistake_is_named_with_file_and_line_and_the_stream_refused(
    tmp_path: Path, prepare: Callable[[Path], Path], text: str
) -> None:
    path = prepare(tmp_path)
    found = summarise(read_dataset(path), 4)
    assert found.num_problems >= 1
    assert any(text in problem for problem in found.problems), found.problems
    assert found.num_frames > 0, "the rest is read all the same"
    with pytest.raises(InputError, match=r"^stream set: "):
        played(path, ("person", "car", "tram"))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda f: f / "none.json", "is not there"),
        (lambda f: write(f / "a.json", "{}"), "is no COCO annotation file"),
        (lambda f: write(f / "a.json", "{"), "is not JSON"),
        (lambda f: write(f / "a.txt", "x"), "neither a sample list"),
        (lambda f: write(f / "a.csv", "0,0,1,1,1,5,5"), "its frames are not there"),
        (lambda f: f, "neither a sample list"),
        (lambda f: write(f / "labels" / "a.txt", "0 0.5 0.5 0.1 0.1").parent.parent, "the classes have no names"),
        (lambda f: write(f / "data.yaml", "nc: 3").parent, "names is missing"),
        (lambda f: write(f / "data.yaml", f"names:\n  {'9' * 5000}: a").parent, "names is missing"),
        (lambda f: write(f / "data.yaml", "names: [a]").parent, "images: is not there"),
        (lambda f: (coco(f), f)[1] / "set2.json", "is not there"),
    ],
)
def test_what_is_no_data_set_is_refused_in_one_line(tmp_path: Path, make: Callable[[Path], Path], text: str) -> None:
    with pytest.raises(InputError) as caught:
        read_dataset(make(tmp_path))
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("class_map", "text"),
    [
        ({"bike": "car"}, "has no category 'bike'; it has car (7), tram (9)"),
        ({"tram": "lorry"}, "'lorry' is not among the classes person, car"),
        ({"car": "", "9": ""}, "none of the data set's categories (car, tram) is a class"),
    ],
)
def test_a_class_map_that_does_not_fit_is_named(tmp_path: Path, class_map: dict[str, str], text: str) -> None:
    with pytest.raises(InputError) as caught:
        played(coco(tmp_path), class_map=class_map)
    assert text in str(caught.value)


# ---------------------------------------------------------------- what is in it


def test_names_that_are_nearly_numbers_and_class_names_in_another_encoding_are_read(tmp_path: Path) -> None:
    assert sorted(["b10", "b9", "\u00b21"], key=natural) == ["b9", "b10", "\u00b21"]
    yolo(tmp_path)
    (tmp_path / "data.yaml").unlink(missing_ok=True)
    (tmp_path / "classes.txt").write_bytes(b"pi\xe9ton\ncar\n")
    assert list(read_dataset(tmp_path).names) == [0, 1]


def test_a_summary_counts_everything_and_shows_the_drift(tmp_path: Path) -> None:
    path = coco(tmp_path)
    raw = json.loads(path.read_text())
    for annotation in raw["annotations"]:
        annotation["category_id"] = 7 if annotation["image_id"] < 106 else 9  # cars first, trams then
    path.write_text(json.dumps(raw))
    found = summarise(read_dataset(path), 4)
    assert (found.format, found.num_frames, found.num_empty, found.num_objects) == ("coco", 12, 0, 12)
    assert found.classes == {"car": 6, "tram": 6}
    assert found.ids == {"car": 7, "tram": 9}
    assert found.sizes == {"64x48": 12}
    assert [window.drift for window in found.windows] == [0.0, 0.0, 1.0, 1.0]
    assert [window.first_frame for window in found.windows] == [0, 3, 6, 9]
    assert sum(window.num_frames for window in found.windows) == 12


def test_the_distance_of_two_mixes_of_classes() -> None:
    assert mix_distance({"a": 2, "b": 2}, {"a": 1, "b": 1}) == 0.0
    assert mix_distance({"a": 3, "b": 1}, {"a": 1, "b": 1}) == pytest.approx(0.25)
    assert mix_distance({"a": 1}, {"b": 5}) == 1.0
    assert mix_distance({}, {"b": 5}) is None
