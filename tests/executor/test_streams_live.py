"""Live streams against a real camera process or thread: what it may do to us, and what must come of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from executor.streams.health import Health
from executor.streams.live import LiveReader, bare
from executor.streams.record import record
from executor.streams.ring import LiveFrame, RingFrames, RingWriter, folder_of
from executor.streams.video import SourceError
from protocol.errors import InputError
from protocol.schema import LiveSource, StreamSpec
from tests.cameras.film import city, number_of, write_film
from tests.cameras.network_camera import NetworkCamera
from tests.integration.rig import free_port

pytestmark = pytest.mark.timeout(180)
FPS = 10.0
CLASSES = ("person", "car")
FAST = {"stall_s": 1.0, "backoff_s": 0.1, "backoff_max_s": 0.5, "open_timeout_s": 3.0, "max_latency_s": 1.0}


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("films")
    write_film(folder / "a.ts", seed=1, num_frames=40, size=(160, 120))
    write_film(folder / "b.ts", seed=2, num_frames=40, size=(240, 160))
    return folder / "a.ts", folder / "b.ts"


@pytest.fixture
def camera(films: tuple[Path, Path]) -> Iterator[NetworkCamera]:
    made = NetworkCamera(*films, fps=FPS)
    yield made
    made.kill()


class Watcher:
    """Reads a stream as a serving worker does, and remembers what it saw."""

    def __init__(self, url: str, **options: float | bool) -> None:
        source = LiveSource(url=url, **{**FAST, **options})  # type: ignore[arg-type]
        self.reader = LiveReader(source, FPS, time.monotonic())
        self.indices: list[int] = []
        self.shown: list[int] = []
        self.sizes: list[tuple[int, int]] = []
        self.lags: list[float] = []
        self.conditions = ["ok"]
        self.num_lost = 0

    def until(self, what: Callable[[], bool], within_s: float = 40.0) -> None:
        end = time.monotonic() + within_s
        while not what():
            assert time.monotonic() < end, f"not within {within_s} s; {self.conditions=} {self.indices[-5:]=}"
            self.step()

    def step(self) -> Health:
        now = time.monotonic()
        picture, lost = self.reader.take(now)
        self.num_lost += lost
        health = self.reader.health(now)
        if self.conditions[-1] != health.condition:
            self.conditions.append(health.condition)
        if picture is None:
            time.sleep(0.01)
        else:
            pixels = LiveFrame(picture.index, FPS, picture.picture).image()
            self.indices.append(picture.index)
            self.shown.append(number_of(pixels))
            self.sizes.append((pixels.shape[1], pixels.shape[0]))
            self.lags.append(now - picture.time_s)
        return health

    def more(self, count: int) -> None:
        """Wait for so many more pictures."""
        have = len(self.indices)
        self.until(lambda: len(self.indices) >= have + count)


@pytest.fixture
def watch() -> Iterator[Callable[..., Watcher]]:
    made: list[Watcher] = []

    def begin(url: str, **options: float | bool) -> Watcher:
        made.append(Watcher(url, **options))
        return made[-1]

    yield begin
    for each in made:
        each.reader.close()


def test_pictures_come_in_order_numbered_by_time_and_are_what_the_camera_shows(
    camera: NetworkCamera, watch: Callable[..., Watcher]
) -> None:
    seen = watch(camera.url)
    seen.more(30)
    assert seen.indices == sorted(set(seen.indices))
    steps = np.diff(seen.shown[-20:]) % 40
    assert steps.tolist() == np.diff(seen.indices[-20:]).tolist(), "numbers go with the film's own"
    assert max(seen.lags) <= 1.0
    truth = city(1, (160, 120), FPS).frame(seen.shown[-1]).image()
    assert truth.shape == (120, 160, 3)


def test_a_camera_that_freezes_is_stalled_and_comes_back_by_itself(
    camera: NetworkCamera, watch: Callable[..., Watcher]
) -> None:
    seen = watch(camera.url)
    seen.more(5)
    camera.frozen = True
    seen.until(lambda: seen.conditions[-1] == "stalled")
    camera.frozen = False
    seen.until(lambda: seen.conditions[-1] == "ok")
    seen.more(5)
    assert seen.conditions == ["ok", "stalled", "ok"]


def test_a_camera_that_is_gone_is_lost_and_found_again(camera: NetworkCamera, watch: Callable[..., Watcher]) -> None:
    seen = watch(camera.url)
    seen.more(5)
    camera.kill()
    seen.until(lambda: seen.conditions[-1] == "lost")
    time.sleep(1.0)
    camera.start()
    seen.until(lambda: seen.conditions[-1] == "ok")
    seen.more(5)
    assert seen.conditions == ["ok", "lost", "ok"]
    assert seen.indices == sorted(set(seen.indices))


def test_garbage_ends_neither_the_reader_nor_the_stream(camera: NetworkCamera, watch: Callable[..., Watcher]) -> None:
    seen = watch(camera.url)
    seen.more(5)
    camera.noise = 0.03
    seen.until(lambda: seen.conditions[-1] != "ok")
    camera.noise = 1.0
    end = time.monotonic() + 2.0
    seen.until(lambda: time.monotonic() > end)
    camera.noise = 0.0
    seen.until(lambda: seen.conditions[-1] == "ok")
    seen.more(5)


def test_another_picture_size_is_told_and_the_stream_goes_on(
    camera: NetworkCamera, watch: Callable[..., Watcher]
) -> None:
    seen = watch(camera.url)
    seen.more(5)
    camera.film = 1
    seen.until(lambda: bool(seen.sizes) and seen.sizes[-1] == (240, 160))
    seen.more(5)
    assert seen.conditions == ["ok", "changed", "ok"]


def test_pictures_that_nobody_takes_are_dropped_and_counted(
    camera: NetworkCamera, watch: Callable[..., Watcher]
) -> None:
    seen = watch(camera.url, max_latency_s=0.3)
    seen.more(5)
    before, lost = seen.indices[-1], seen.num_lost
    time.sleep(2.0)
    seen.more(1)
    gone = seen.indices[-1] - before - 1
    assert gone >= 10
    assert seen.num_lost - lost == pytest.approx(gone, abs=2)
    assert max(seen.lags) <= 0.3


def test_a_file_is_played_at_its_own_pace_and_begun_again(
    films: tuple[Path, Path], watch: Callable[..., Watcher]
) -> None:
    seen = watch(str(films[0]))
    begun = time.monotonic()
    seen.more(55)
    assert time.monotonic() - begun > 4.5, "in real time"
    assert seen.conditions == ["ok"], "the beginning anew is no loss"
    assert {0, 39} <= set(seen.shown)
    assert np.all(np.diff(seen.indices) <= 3)


def test_a_file_that_is_not_looped_is_lost_when_it_is_over(
    films: tuple[Path, Path], watch: Callable[..., Watcher]
) -> None:
    seen = watch(str(films[0]), loop=False)
    seen.until(lambda: seen.conditions[-1] == "lost")
    assert len(seen.indices) >= 30


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://127.0.0.1:{port}/x", "refused"),
        ("rtsp://127.0.0.1:{port}/x", "refused"),
        ("{folder}/none.mp4", "no such file"),
        ("/dev/video93", "not there"),
        ("{folder}/text.mp4", "Invalid data"),
        ("nonsense://here", "Protocol not found"),
    ],
)
def test_what_cannot_be_opened_is_lost_with_a_reason(
    tmp_path: Path, watch: Callable[..., Watcher], url: str, reason: str
) -> None:
    (tmp_path / "text.mp4").write_text("this is no video\n" * 100)
    seen = watch(url.format(port=free_port(), folder=tmp_path))
    seen.until(lambda: seen.conditions[-1] == "lost")
    assert reason in seen.step().reason


def test_passwords_of_cameras_are_not_told() -> None:
    assert bare("rtsp://admin:secret@10.0.0.5:554/ch1") == "rtsp://10.0.0.5:554/ch1"
    assert bare("/videos/a@b.mp4") == "/videos/a@b.mp4"


# ---------------------------------------------------------------- what was seen


def stream(url: str, **options: float) -> StreamSpec:
    source = LiveSource(url=url, **{**FAST, **options})  # type: ignore[arg-type]
    return StreamSpec(stream_id="gate", source=source, classes=CLASSES, fps=FPS)


def test_a_stretch_is_recorded_for_those_who_label_it(camera: NetworkCamera, tmp_path: Path) -> None:
    spec = stream(camera.url)
    assert isinstance(spec.source, LiveSource)
    record(spec, spec.source, tmp_path, -2.0, 0.0, time.sleep, lambda: False)
    frames = RingFrames(tmp_path, spec)
    numbers = [number_of(frames.frame(index).image()) for index in range(-18, -2)]
    assert np.all(np.diff(numbers) % 40 <= 2)
    with pytest.raises(SourceError, match=r"frame 500 .*kept: frames -20 to"):
        frames.frame(500)


def test_a_stream_that_cannot_be_recorded_is_the_users_input(tmp_path: Path) -> None:
    spec = stream(f"http://user:secret@127.0.0.1:{free_port()}/x", open_timeout_s=0.5, stall_s=0.5)
    assert isinstance(spec.source, LiveSource)
    with pytest.raises(InputError, match=r"stream gate: source.url http://127.0.0.1:\d+/x: Connection refused"):
        record(spec, spec.source, tmp_path, 0.0, 1.0, time.sleep, lambda: False)


def test_what_is_kept_is_bounded_and_an_earlier_runs_frames_are_removed(
    films: tuple[Path, Path], tmp_path: Path
) -> None:
    import av

    spec = stream("x")
    folder = folder_of(tmp_path, "gate")
    folder.mkdir(parents=True)
    for name in ("999.jpg", "-50.jpg", "3.jpg", "nonsense.jpg", ".77.part"):
        (folder / name).write_bytes(b"old")
    ring = RingWriter(tmp_path, spec, 1.0, 5)
    with av.open(str(films[0])) as container:
        for index, picture in enumerate(container.decode(video=0), 5):
            ring.write(index, picture)
    assert sorted(int(path.stem) for path in folder.iterdir()) == list(range(35, 45))
    ring.write(100_000_000, picture)  # after years of silence
    assert [path.name for path in folder.iterdir()] == ["100000000.jpg"]


def test_a_damaged_or_missing_frame_is_stood_in_for_by_its_neighbour(films: tuple[Path, Path], tmp_path: Path) -> None:
    import av

    spec = stream("x")
    ring = RingWriter(tmp_path, spec, 100.0, 0)
    with av.open(str(films[0])) as container:
        for index, picture in enumerate(container.decode(video=0)):
            ring.write(index, picture)
    folder = folder_of(tmp_path, "gate")
    (folder / "20.jpg").unlink()
    (folder / "21.jpg").write_bytes(b"\xff\xd8 damaged")
    (folder / "22.jpg").write_bytes(b"")
    frames = RingFrames(tmp_path, spec)
    assert [number_of(frames.frame(index).image()) for index in (19, 20, 23)] == [19, 19, 23]
    assert number_of(frames.frame(21).image()) in (19, 23)
    assert frames.frame(22).index == 22
    assert frames.frame(21).boxes.shape == (0, 4)
