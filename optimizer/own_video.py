"""`ekya-optimizer run --video FILE ...`: a user's own recordings in one command.

The golden model labels each video once, all of it, into an Ekya sample list beside the run; then the recordings are
played as streams with those labels, so that accuracy is agreement with the golden model on every frame. What labelling
cost is charged again in the run: the streams' golden model is an oracle that takes the measured time per frame.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.console import Console

from optimizer.ingest import summarise
from protocol.errors import EkyaError, InputError
from protocol.schema import TorchvisionGolden

GOLDEN = "fasterrcnn_mobilenet_v3_large_320_fpn"
DEFAULT_WINDOWS = 4
_LINE_S = 10.0  # between lines of progress where there is no terminal
STREET_CLASSES = ("person", "bicycle", "car", "motorcycle", "bus", "truck")


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line says. ``classes`` empty: those of a street, or those in the sample lists.

    ``class_map``: the golden model's ids or names to classes, as "3=car"; empty = by the same names. ``fps``: frames
    a second that are analysed at most; of videos with more only every so many-th frame is used.
    """

    videos: tuple[Path, ...]
    samples: tuple[Path, ...] = ()
    golden: str = GOLDEN
    weights: Path | None = None
    weights_classes: int = 0
    classes: tuple[str, ...] = ()
    class_map: tuple[str, ...] = ()
    task: str = "classification"
    fps: float = 10.0
    window_s: float = 30.0
    min_score: float = 0.5


class _Video(msgspec.Struct, frozen=True):
    """What executor/learning/label_video.py answers."""

    fps: float
    num_frames: int
    width: int
    height: int
    num_labelled: int = 0
    ids: dict[str, str] = {}
    boxes: dict[str, int] = {}
    seconds_per_frame: float = 0.0


def check(wish: Wish) -> None:
    """Refuse what can be refused before any work is done. Raises InputError naming the option."""
    for video in wish.videos:
        if not video.is_file():
            raise InputError(f"--video {video}: no such file")
    for samples in wish.samples:
        if not samples.is_file():
            raise InputError(f"--samples {samples}: no such file")
    if wish.samples and len(wish.samples) != len(wish.videos):
        raise InputError(f"--samples: {len(wish.samples)} lists for {len(wish.videos)} videos; give one per --video")
    if wish.samples and wish.weights:
        raise InputError("--samples and --golden-weights: the labels are there already; give one of them")
    if not wish.samples and wish.weights is None:
        raise InputError("--golden-weights FILE (a torchvision detector's weights) or --samples FILE.csv is needed")
    if wish.weights is not None and not wish.weights.is_file():
        raise InputError(f"--golden-weights {wish.weights}: no such file")
    if wish.classes and len(set(wish.classes)) != len(wish.classes):
        raise InputError("--classes: a name is listed twice")
    for name in wish.classes:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise InputError(f"--classes: {name!r}: letters, digits, '.', '_' and '-' are allowed")
    if len(wish.classes) == 1:
        raise InputError("--classes: at least two classes are needed")
    for pair in wish.class_map:
        if not re.fullmatch(r"[^=]+=[^=]*", pair):
            raise InputError(f"--class-map {pair!r}: write ID=CLASS or NAME=CLASS")
    if wish.task not in ("classification", "detection"):
        raise InputError(f"--task {wish.task!r}: allowed: classification, detection")
    if wish.fps <= 0:
        raise InputError(f"--fps {wish.fps:g}: must be above 0")
    if wish.window_s < 5:
        raise InputError(f"--window-seconds {wish.window_s:g}: at least 5 is needed")


def write_site(wish: Wish, out: Path, device: str, console: Console) -> Path:
    """Label the videos where needed and write ``site.toml`` into ``out``. Returns its path.

    Raises:
        InputError: a video, a sample list or the golden model is unusable.
    """
    check(wish)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror or error}") from error
    classes = wish.classes
    streams = []
    for number, video in enumerate(wish.videos):
        name = _stream_id(video, number, wish.videos)
        looked = _ask({"video": str(video)}, console, "")
        step = max(1, round(looked.fps / wish.fps))
        if wish.samples:
            samples = wish.samples[number]
            mapped = _ids_in(samples, video, wish)
            seconds_per_frame = 0.02
        else:
            samples = out / f"{name}.csv"
            classes = classes or STREET_CLASSES
            labelled = _label(wish, video, samples, classes, step, device, console)
            mapped, seconds_per_frame = labelled.ids, labelled.seconds_per_frame
        streams.append((name, video, samples, step, looked, mapped, seconds_per_frame))
    if not classes:
        classes = tuple(dict.fromkeys(c for stream in streams for c in stream[5].values() if c))
        if len(classes) < 2:
            raise InputError(f"--samples: they hold {len(classes)} classes ({', '.join(classes)}); two are needed")
    path = out / "site.toml"
    path.write_text(_site_text(wish, classes, streams), encoding="utf-8")
    return path


def _stream_id(video: Path, number: int, videos: Sequence[Path]) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", video.stem).strip("-._")[:48] or "video"
    return name if [v.stem for v in videos].count(video.stem) == 1 else f"{name}-{number + 1}"


def _label(
    wish: Wish, video: Path, samples: Path, classes: tuple[str, ...], step: int, device: str, console: Console
) -> _Video:
    class_map = dict(pair.split("=", 1) for pair in wish.class_map) or {name: name for name in classes}
    golden = TorchvisionGolden(
        model=wish.golden,
        class_map=class_map,
        weights_file=str(wish.weights.resolve()) if wish.weights else "",
        num_classes=wish.weights_classes,
        min_score=wish.min_score,
    )
    request = {
        "video": str(video), "samples": str(samples), "golden": golden, "classes": classes, "step": step,
        "device": device,
    }  # fmt: skip
    answer = _ask(request, console, f"labelling {video.name} with {wish.golden}")
    found = {name: count for name, count in answer.boxes.items() if count}
    words = ", ".join(f"{count} {name}" for name, count in found.items()) or "nothing"
    console.print(
        f"{video.name}: {answer.num_labelled} frames labelled, {answer.seconds_per_frame:.2f} s each: {words}; "
        f"kept in {samples}",
        highlight=False,
        soft_wrap=True,
    )
    if len(found) < 2:
        raise InputError(
            f"--video {video}: the golden model finds {words} of the classes {', '.join(classes)}; a student needs two "
            "classes to tell apart: see --classes, --class-map and --min-score"
        )
    return answer


def _ask(request: dict[str, object], console: Console, what: str) -> _Video:
    """Ask the executor's side in a process of its own, showing how far it is."""
    process = subprocess.Popen(
        [sys.executable, "-m", "executor.learning.label_video"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    last, next_line_s = "", time.monotonic()
    try:
        process.stdin.write(msgspec.json.encode(request))
        process.stdin.close()
        with console.status(what or "looking at the video") as status:
            for raw in process.stderr:
                text = raw.decode(errors="replace").strip()
                if text.startswith("progress "):
                    done, total = text.split()[1:3]
                    status.update(f"{what}: {done} of {total} frames")
                    if not console.is_terminal and time.monotonic() >= next_line_s:
                        next_line_s = time.monotonic() + _LINE_S
                        console.print(f"{what}: {done} of {total} frames", highlight=False, soft_wrap=True)
                elif text:
                    last = text
        answer = process.stdout.read()
        code = process.wait()
    except BaseException:
        process.kill()
        process.wait()
        raise
    finally:
        process.stdout.close()
        process.stderr.close()
    if code == 2:
        raise InputError(_in_options(last.removeprefix("label_video: ").replace("stream video: ", "")))
    if code:
        raise EkyaError(f"{what or request['video']}: ended with exit code {code}: {last or 'no reason'}")
    return msgspec.json.decode(answer, type=_Video)


_OPTIONS = {
    "golden.weights_file": "--golden-weights",
    "golden.num_classes": "--golden-classes",
    "golden.class_map": "--class-map",
    "golden.model": "--golden",
}


def _in_options(text: str) -> str:
    """A complaint about fields of a site file, about the options that they came from."""
    for field, option in _OPTIONS.items():
        text = text.replace(field, option)
    return text


def _ids_in(samples: Path, video: Path, wish: Wish) -> dict[str, str]:
    """Category ids of a sample list and the class of each, "" = dropped. Raises InputError with what is wrong."""
    summary = summarise(samples, images=str(video), form="samples", windows=1)
    if summary.num_problems:
        more = f" (and {summary.num_problems - 1} more)" if summary.num_problems > 1 else ""
        raise InputError(f"--samples {summary.problems[0]}{more}")
    chosen = dict(pair.split("=", 1) for pair in wish.class_map)
    mapped = {}
    for name, number in summary.ids.items():
        wanted = chosen.get(str(number), chosen.get(name, name if not wish.classes or name in wish.classes else ""))
        if wish.classes and wanted and wanted not in wish.classes:
            raise InputError(f"--class-map {number}={wanted}: not among the classes {', '.join(wish.classes)}")
        mapped[str(number)] = wanted
    if not any(mapped.values()):
        have = ", ".join(summary.ids) or "nothing"
        raise InputError(f"--samples {samples}: holds {have}, and none of --classes {', '.join(wish.classes)}")
    return mapped


_CONFIGS = {
    "classification": ((1, 64), (1, 32), (2, 32), (5, 32)),
    "detection": ((1, 192), (1, 128), (2, 128), (5, 128)),
}


_RETRAIN = (("head-4", 4, 0.5, 0.0), ("part-6", 6, 1.0, 0.3), ("all-12", 12, 1.0, 1.0))


def _site_text(
    wish: Wish,
    classes: tuple[str, ...],
    streams: Sequence[tuple[str, Path, Path, int, _Video, dict[str, str], float]],
) -> str:
    """The site file. What lies before ``start_s`` trains the first models; the windows follow."""
    rate = [looked.fps / step for _, _, _, step, looked, _, _ in streams]
    shortest = min(looked.num_frames / looked.fps for _, _, _, _, looked, _, _ in streams)
    start = round(max(5.0, min(60.0, shortest / 3)), 1)
    lines = [
        "# Written by `ekya-optimizer run --video`; change it and run it again with `ekya-optimizer run SITE.toml`,",
        "# or compare policies on it with `ekya-optimizer experiment SITE.toml`.",
        'name = "own-video"',
        f"window_s = {wish.window_s:.1f}",
        "share_quantum = 0.05",
        "",
        "[bootstrap]",
        f"seconds = {start}",
        "label_fps = 2.0",
        "",
        "[profiling]",
        "label_span = 0.5",
        "share = 0.5",
        "",
        "[stream_defaults]",
        f"classes = {json.dumps(list(classes))}",
        f"start_s = {start}",
        f'task = "{wish.task}"',
        "label_fps = 2.0",
        "",
    ]
    for (name, video, samples, step, _, mapped, seconds_per_frame), fps in zip(streams, rate, strict=True):
        class_map = ", ".join(f'"{key}" = {json.dumps(value)}' for key, value in mapped.items())
        lines += [
            "[[streams]]",
            f'stream_id = "{name}"',
            f"fps = {min(fps, 240.0):.3f}",
            f'golden = {{ kind = "oracle", error_rate = 0.0, seconds_per_frame = {seconds_per_frame:.4f} }}',
            "[streams.source]",
            'type = "recorded"',
            f"class_map = {{ {class_map} }}",
            f"clips = [{{ video = {json.dumps(str(video.resolve()))}, samples = {json.dumps(str(samples.resolve()))}, "
            f"step = {step} }}]",
            "",
        ]
    for interval, px in _CONFIGS[wish.task]:
        lines += [
            "[[inference]]",
            f'config_id = "f{interval}r{px}"',
            f"frame_interval = {interval}",
            f"resolution_px = {px}",
            "",
        ]
    for config_id, epochs, data, trained in _RETRAIN:
        lines += [
            "[[retrain]]",
            f'config_id = "{config_id}"',
            f"epochs = {epochs}",
            f"data_fraction = {data}",
            f"trained_fraction = {trained}",
            "learning_rate = 0.002",
            "",
        ]
    return "\n".join(lines)
