"""Site files: strict, and every mistake names the file, the key and what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

from optimizer.config import load_site
from protocol.errors import ConfigError
from protocol.schema import RecordedSource

GOOD = """
name = "yard"
window_s = 60

[stream_defaults]
classes = ["person", "car"]
fps = 5

[[streams]]
stream_id = "gate"
source = { type = "city", seed = 3 }

[[streams]]
stream_id = "lot"
fps = 2
[streams.source]
type = "recorded"
class_map = { 1 = "person", 3 = "car", 8 = "" }
clips = [{ video = "clips/a.mp4", samples = "clips/a.csv" }]

[[inference]]
config_id = "full"

[[retrain]]
config_id = "all"
epochs = 5
"""


@pytest.fixture(autouse=True)
def _clips(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    for name in ("a.mp4", "a.csv"):
        (tmp_path / "clips" / name).touch()


def load(tmp_path: Path, text: str | bytes) -> str:
    path = tmp_path / "site.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        load_site(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_a_good_file_loads_with_defaults_and_absolute_paths(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    path.write_text(GOOD)
    site = load_site(path)
    assert [s.fps for s in site.streams] == [5.0, 2.0]
    source = site.streams[1].source
    assert isinstance(source, RecordedSource)
    assert source.clips[0].video == str(tmp_path / "clips" / "a.mp4")
    assert site.policy == "timeline"


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("window_s = 60", "windows_s = 60", ["'windows_s'", "allowed", "window_s"]),
        ("window_s = 60", "window_s = 'long'", ["window_s", "float"]),
        ("window_s = 60", "window_s = -1", ["window_s", "5.0"]),
        ("seed = 3", "sed = 3", ["'sed'", "streams[0].source", "seed"]),
        (
            'type = "city", seed = 3',
            'type = "town", seed = 3',
            ["streams[0].source", "town", "allowed: city, recorded, live, dataset"],
        ),
        (", seed = 3", "", ["streams[0].source.seed", "missing"]),
        ('stream_id = "lot"', 'stream_id = "gate"', ["stream_id", "'gate'", "twice"]),
        ('3 = "car"', 'auto = "car"', ["'lot'", "class_map 'auto'", "COCO ids"]),
        (
            'clips/a.csv"',
            'clips/a.csv", first_frame = 9, last_frame = 5',
            ["clips[0]", "last_frame = 5", "first_frame = 9"],
        ),
        ('3 = "car"', '3 = "truck"', ["'lot'", "class_map", "'truck'", "person, car"]),
        ('classes = ["person", "car"]', 'classes = ["car", "car"]', ["classes"]),
        ("epochs = 5", "epochs = 0", ["retrain[0].epochs"]),
        ("epochs = 5", "epochs = 5\nlearning_rat = 1", ["'learning_rat'", "learning_rate"]),
        ('stream_id = "lot"', 'stream_id = "lot"\ntask = "sing"', ["task", "'sing'", "classification, detection"]),
        ('stream_id = "lot"', 'stream_id = "../lot"', ["stream_id", "letters, digits"]),
        ('config_id = "full"', 'config_id = "full"\nresolution_px = 128', ["'full'", "crop_px"]),
        ('video = "clips/a.mp4"', 'video = "clips/b.mp4"', ["'lot'", "clips/b.mp4", "not there"]),
        ("[stream_defaults]", "stream_defaults = 3\n[other]", ["stream_defaults"]),
        ("name =", "nam e =", ["TOML"]),
        ('name = "yard"', 'name = "my yard"', ["name"]),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, old: str, new: str, told: list[str]) -> None:
    assert old in GOOD
    message = load(tmp_path, GOOD.replace(old, new, 1))
    for part in told:
        assert part in message


def test_files_that_are_no_text_or_not_there_are_named(tmp_path: Path) -> None:
    assert "UTF-8" in load(tmp_path, b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"nowhere\.toml"):
        load_site(tmp_path / "nowhere.toml")


def test_a_silence_shorter_than_two_heartbeats_is_refused(tmp_path: Path) -> None:
    assert "silence_s" in load(tmp_path, "heartbeat_s = 2\nsilence_s = 3\n" + GOOD)
