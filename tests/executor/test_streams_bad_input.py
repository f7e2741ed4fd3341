"""Unusable recordings: refused at opening with file, line and what is allowed; damage later is a SourceError."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from executor.streams.frames import FrameSource
from executor.streams.open import open_source
from executor.streams.video import SourceError
from protocol.errors import InputError
from protocol.schema import Clip, RecordedSource, StreamSpec

GOOD = "0,0,1,2,3,20,40,0.9"
MAP = {"1": "person", "3": "car"}


def write_video(path: Path, num_frames: int = 12) -> None:
    rng = np.random.default_rng(1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.options = {"g": "6"}
        for _ in range(num_frames):
            picture = rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    write_video(tmp_path / "v.mp4")
    (tmp_path / "v.csv").write_text(f"idx,frame id,class,x0,y0,x1,y1,score\n{GOOD}\n")
    return tmp_path / "v.mp4", tmp_path / "v.csv"


def spec(
    video: Path,
    samples: Path,
    *,
    class_map: dict[str, str] | None = None,
    first_frame: int = 0,
    last_frame: int | None = None,
    min_score: float = 0.0,
) -> StreamSpec:
    clip = Clip(video=str(video), samples=str(samples), first_frame=first_frame, last_frame=last_frame)
    source = RecordedSource(clips=(clip,), class_map=MAP if class_map is None else class_map, min_score=min_score)
    return StreamSpec(stream_id="cam7", source=source, classes=("person", "car"))


def refusal(wanted: StreamSpec) -> str:
    with pytest.raises(InputError) as caught:
        open_source(wanted)
    assert str(caught.value).startswith("stream cam7: ")
    return str(caught.value)


def test_the_untouched_files_open(files: tuple[Path, Path]) -> None:
    assert open_source(spec(*files)).frame(0).labels.tolist() == [0]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("1,0,17,2,3,20,40,0.9", "class 17 is not in class_map (it has 1, 3)"),
        ("1,12,1,2,3,20,40,0.9", "frame id 12 is not in the video; allowed: 0 to 11"),
        ("1,-1,1,2,3,20,40,0.9", "frame id -1 is not in the video"),
        ("1,0,1,2,3,20", "6 columns; allowed: 7 or 8"),
        ("1,0,1,2,3,20,40,0.9,7", "9 columns; allowed: 7 or 8"),
        ("1,0,1,2,3,65,40,0.9", "leaves the frame; allowed: 0 <= x0 < x1 <= 64"),
        ("1,0,1,-1,3,20,40,0.9", "leaves the frame"),
        ("1,0,1,2,3,20,49,0.9", "0 <= y0 < y1 <= 48"),
        ("1,0,1,20,3,20,40,0.9", "is empty or leaves the frame"),
        ("1,0,1,2,3,nan,40,0.9", "x1: 'nan' is not finite"),
        ("1,0,1,2,3,wide,40,0.9", "x1: 'wide' is not a number"),
        ("1,0.5,1,2,3,20,40,0.9", "frame id: '0.5' is not a whole number"),
        ("one,0,1,2,3,20,40,0.9", "idx: 'one' is not a whole number"),
        ("1,0,car,2,3,20,40,0.9", "class: 'car' is not a whole number"),
        ("1,0,1,2,3,20,40,1.5", "score 1.5 is outside 0 to 1"),
        ('1,0,"1,2,3,20,40,0.9', "not a comma-separated text file"),
    ],
)
def test_a_bad_row_is_refused_with_its_line(files: tuple[Path, Path], row: str, words: str) -> None:
    files[1].write_text(f"idx,frame id,class,x0,y0,x1,y1,score\n{GOOD}\n{row}\n")
    message = refusal(spec(*files))
    assert words in message
    assert str(files[1]) in message
    assert "line 3" in message or "comma-separated" in message


def test_a_sample_list_that_is_missing_binary_or_a_folder_is_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    assert "cannot be read" in refusal(spec(files[0], tmp_path / "no.csv"))
    assert "cannot be read" in refusal(spec(files[0], tmp_path))
    assert "not a comma-separated text file" in refusal(spec(files[0], files[0]))


def test_a_clip_without_any_usable_label_is_refused(files: tuple[Path, Path]) -> None:
    assert "no labelled frame is left" in refusal(spec(*files, min_score=0.95))
    assert "no labelled frame is left" in refusal(spec(*files, first_frame=5))
    files[1].write_text("")
    assert "no labelled frame is left" in refusal(spec(*files))


@pytest.mark.parametrize(
    ("class_map", "words"),
    [
        ({"1": "tram"}, "class_map['1']: 'tram' is not among the classes person, car"),
        ({"person": "person"}, "key 'person' is no COCO id"),
        ({"1": ""}, "maps no id to a class"),
        ({}, "maps no id to a class"),
    ],
)
def test_a_bad_class_map_is_refused(files: tuple[Path, Path], class_map: dict[str, str], words: str) -> None:
    assert words in refusal(spec(*files, class_map=class_map))


@pytest.mark.parametrize(("first", "last"), [(0, 12), (12, None), (5, 4), (0, -1)])
def test_a_clip_outside_the_video_is_refused(files: tuple[Path, Path], first: int, last: int | None) -> None:
    assert "<= last_frame <= 11" in refusal(spec(*files, first_frame=first, last_frame=last))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def random_bytes(path: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(4000))


def without_its_end(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:600])


def text(path: Path) -> None:
    path.write_text("this is no video\n" * 50)


def audio_only(path: Path) -> None:
    with av.open(str(path), "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.rate = 8000
        for packet in stream.encode(frame):
            container.mux(packet)


@pytest.mark.parametrize("spoil", [empty, random_bytes, without_its_end, text, audio_only])
def test_a_file_that_is_no_video_is_refused_by_name(files: tuple[Path, Path], spoil: Callable[[Path], None]) -> None:
    spoil(files[0])
    assert str(files[0]) in refusal(spec(*files))


def test_a_missing_video_is_refused_by_name(files: tuple[Path, Path], tmp_path: Path) -> None:
    assert "no such video file" in refusal(spec(tmp_path / "no.mp4", files[1]))
    assert "no such video file" in refusal(spec(tmp_path, files[1]))


def test_damage_in_the_middle_of_a_video_never_crashes_and_is_mostly_noticed(files: tuple[Path, Path]) -> None:
    whole = open_source(spec(*files))
    good = [whole.frame(index).image() for index in range(12)]
    whole.close()
    sound = files[0].read_bytes()
    start = sound.index(b"mdat") + 4
    middle = start + (len(sound) - start) // 3
    noticed = 0
    for seed in range(6):
        data = bytearray(sound)
        data[middle : middle + 400] = np.random.default_rng(seed).bytes(400)
        files[0].write_bytes(bytes(data))
        source = open_source(spec(*files))
        outcomes = [outcome(source, index, good[index]) for index in range(12)]
        source.close()
        assert outcomes[0] == "same", "frames before the damage are still right"
        # Damage that still decodes is invisible to any reader; what the codec does see must be told, by file.
        assert all(found in ("same", "other") or found.startswith(f"{files[0]}: ") for found in outcomes), outcomes
        noticed += any(found.startswith(f"{files[0]}: ") for found in outcomes)
    assert noticed >= 2, f"{noticed} of 6 damaged files were noticed"


def outcome(source: FrameSource, index: int, good: NDArray[np.uint8]) -> str:
    try:
        picture = source.frame(index).image()
    except SourceError as error:
        return str(error)
    return "same" if (picture == good).all() else "other"


def test_a_video_that_vanishes_into_zeros_while_it_is_played_gives_a_source_error(files: tuple[Path, Path]) -> None:
    write_video(files[0], 200)  # more than a reader's buffer
    source = open_source(spec(*files))
    last = source.frame(199).image()
    source.frame(0).image()
    with files[0].open("r+b") as file:
        file.write(bytes(files[0].stat().st_size))
    assert "frame 199" in outcome(source, 199, last)
    assert "frame 198" in outcome(source, 198, last), "an error is no end: the next frame is tried anew"
