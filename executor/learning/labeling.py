"""Golden labels of a stretch of a stream, written as the window's data set and as a sample list.

Sample lists (``samples/STREAM/wNNNNNN.csv`` below the store, in the format of executor/streams/samples.py) say what
the golden model found and where, so that a recorded stream can be replayed with them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from executor.learning import datasets
from executor.learning.device import Device
from executor.learning.files import inside, write_atomically
from executor.learning.golden import open_golden
from executor.learning.stepping import Stepper
from executor.learning.task import task_of
from executor.streams.frames import FrameSource
from executor.streams.video import SourceError
from protocol.errors import InputError
from protocol.messages import LabelJob
from protocol.schema import LabelResult, StreamSpec

# Frame index, category id, box (4), score.
SampleRow = tuple[int, int, list[float], float]


def frames_to_label(from_s: float, to_s: float, fps: float, label_fps: float) -> list[int]:
    """Frame indices in [from_s, to_s) of stream time, about ``label_fps`` of them a second, never one twice."""
    first, last = math.ceil(from_s * fps - 1e-9), math.ceil(to_s * fps - 1e-9)
    stride = max(1.0, fps / label_fps)
    count = math.ceil((last - first) / stride - 1e-9) if last > first else 0
    return [first + math.floor(position * stride) for position in range(count)]


@dataclass(frozen=True)
class Looked:
    """What the golden model said of some frames. ``golden_s``: busy seconds that it took; ``stopped``: cut short;
    ``missing``: why frames were left out, "" when none was."""

    examples: Any
    rows: list[SampleRow]
    num_frames: int
    golden_s: float
    stopped: bool
    missing: str = ""


def look(
    source: FrameSource, stream: StreamSpec, indices: Sequence[int], device: Device, stepper: Stepper, seed: int
) -> Looked:
    """Golden labels of the frames ``indices``, as examples of the stream's task; nothing of it is held out yet.

    Frames that cannot be had are left out: a live stream was lost for a while, a recording is damaged.
    """
    task = task_of(stream)
    golden = open_golden(stream, device, stepper, seed)
    parts = []
    rows: list[SampleRow] = []
    golden_s = 0.0
    stopped, missing = False, ""
    for index in indices:
        start = stepper.busy_s()
        try:
            frame = source.frame(index)
            labels = golden.label(frame)
            examples = None if labels is None else task.examples(frame, labels, stream)
        except SourceError as error:
            missing = str(error)
            continue
        golden_s += max(0.0, stepper.busy_s() - start)
        stopped = labels is None or stepper.step()
        if labels is None or stopped:
            break
        parts.append(examples)
        rows += zip(
            [index] * len(labels), labels.ids.tolist(), labels.boxes.tolist(), labels.scores.tolist(), strict=True
        )
    return Looked(task.join(parts, stream), rows, len(parts), golden_s, stopped, missing)


def label(
    job: LabelJob, source: FrameSource, store: Path, device: Device, stepper: Stepper, seed: int
) -> LabelResult | None:
    """Label the job's frames, add the exemplar memory, write the data set.

    A stop request ends it early with the frames labelled so far, and with None when there are none.
    Raises InputError when there is nothing to learn from: no object in any frame and no exemplars.
    """
    started = time.monotonic()
    stream, task = job.stream, task_of(job.stream)
    indices = frames_to_label(job.from_s, job.to_s, stream.fps, stream.label_fps)
    found = look(source, stream, indices, device, stepper, seed)
    fresh = found.examples.split(
        np.isin(found.examples.frame_index, datasets.validation_frames(found.examples.frame_index))
    )
    if job.exemplars is not None and stream.exemplars_per_class > 0:
        previous = task.read(store, job.exemplars, stream.classes)
        fresh = task.join([fresh, task.memory(previous, stream)], stream)
    if found.stopped and found.num_frames == 0:
        return None
    if found.num_frames == 0 and found.missing:
        raise InputError(f"stream {stream.stream_id}: no frame to label is there: {found.missing}")
    if sum(fresh.class_counts(len(stream.classes))) == 0:
        raise InputError(
            f"stream {stream.stream_id}: no object in the {found.num_frames} frames labelled from {job.from_s:g} s "
            f"to {job.to_s:g} s; raise label_fps or check the source"
        )
    write_rows(store, found.rows, stream_id=stream.stream_id, window=job.window)
    dataset = datasets.save(
        store,
        fresh,
        stream_id=stream.stream_id,
        window=job.window,
        classes=stream.classes,
        label_s_per_frame=found.golden_s / max(1, found.num_frames),
    )
    return LabelResult(dataset=dataset, num_frames=found.num_frames, seconds=time.monotonic() - started)


def write_rows(store: Path, rows: list[SampleRow], *, stream_id: str, window: int) -> None:
    """Write the window's sample list, without a header so that lists can be joined. Raises InputError.

    Frames before the stream's first one are left out: no recording holds them.
    """
    path = inside(store, f"samples/{stream_id}/w{window:06d}.csv")
    if path is None:
        raise InputError(f'stream id "{stream_id}" leads out of the store {store}')
    text = "".join(
        f"{number},{frame},{category},{box[0]:g},{box[1]:g},{box[2]:g},{box[3]:g},{score:.3f}\n"
        for number, (frame, category, box, score) in enumerate(row for row in rows if row[0] >= 0)
    )
    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise InputError(f"sample list {path}: cannot be written: {error}") from error
