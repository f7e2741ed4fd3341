"""Golden labels of a stretch of a stream, written as the window's data set and as a sample list.

Sample lists (``samples/STREAM/wNNNNNN.csv`` below the store, in the format of executor/streams/samples.py) say what
the golden model found and where, so that a recorded stream can be replayed with them.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from executor.learning import checkpoints, datasets
from executor.learning.device import Device
from executor.learning.files import inside, write_atomically
from executor.learning.golden import open_golden
from executor.learning.inference import Analyser
from executor.learning.models import Student
from executor.learning.pairing import wilson
from executor.learning.reuse import after_last_cut, conditions_of
from executor.learning.sampling import Sample, Worth, draw, frame_worth, rarity_of
from executor.learning.stepping import Stepper
from executor.learning.task import Task, task_of
from executor.streams.frames import FrameSource
from executor.streams.video import SourceError
from protocol.errors import CheckpointError, InputError
from protocol.logs import line
from protocol.messages import LabelJob
from protocol.schema import LabelResult, StreamSpec

_log = logging.getLogger(__name__)

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
    """What the golden model said of some frames. ``busy_s``: busy seconds that it took to get them labelled;
    ``golden_s``: those of the golden model alone, without what only its first frame pays (set-up); ``stopped``: cut
    short; ``missing``: why frames were left out, "" when none was."""

    examples: Any
    rows: list[SampleRow]
    num_frames: int
    busy_s: float
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
    busy_s = 0.0
    golden_s: list[float] = []
    stopped, missing = False, ""
    for index in indices:
        start = stepper.busy_s()
        try:
            frame = source.frame(index)
            asked = stepper.busy_s()
            labels = golden.label(frame)
            golden_s.append(max(0.0, stepper.busy_s() - asked))
            examples = None if labels is None else task.examples(frame, labels, stream)
        except SourceError as error:
            missing = str(error)
            continue
        busy_s += max(0.0, stepper.busy_s() - start)
        stopped = labels is None or stepper.step()
        if labels is None or stopped:
            break
        parts.append(examples)
        rows += zip(
            [index] * len(labels), labels.ids.tolist(), labels.boxes.tolist(), labels.scores.tolist(), strict=True
        )
    if len(golden_s) > 1:
        golden_s[0] = min(golden_s[0], statistics.median(golden_s[1:]))
    return Looked(task.join(parts, stream), rows, len(parts), busy_s, sum(golden_s), stopped, missing)


def label(
    job: LabelJob, source: FrameSource, store: Path, device: Device, stepper: Stepper, seed: int
) -> LabelResult | None:
    """Label the job's frames, add the exemplar memory, write the data set.

    A stop request ends it early with the frames labelled so far, and with None when there are none.
    Raises InputError when there is nothing to learn from: no object in any frame and no exemplars.
    """
    started = time.monotonic()
    stream, task = job.stream, task_of(job.stream)
    student = _serving(job, store, device)
    sample = _sample(job, source, student, device, stepper, seed)
    found = look(source, stream, sample.frames.tolist(), device, stepper, seed)
    frame_index = found.examples.frame_index
    held_out = datasets.validation_frames(frame_index) if sample.held_out is None else sample.frames[sample.held_out]
    fresh = found.examples.split(np.isin(frame_index, held_out))
    if len(sample.frames):
        fresh = fresh.weighted(sample.weight[np.searchsorted(sample.frames, frame_index)].astype(np.float32))
        fresh = fresh.labelled_in(int(sample.frames[0]))
    agreement, num_pieces = _agreement(task, student, fresh, device, stepper)
    if job.exemplars is not None and stream.exemplar_mb > 0.0:
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
        label_s_per_frame=found.busy_s / max(1, found.num_frames),
    )
    low, high = wilson(agreement or 0.0, num_pieces)
    exemplars, new = fresh.take(fresh.is_exemplar), fresh.take(~fresh.is_exemplar)
    return LabelResult(
        dataset=dataset,
        num_frames=found.num_frames,
        seconds=time.monotonic() - started,
        golden_s=found.golden_s,
        agreement=agreement,
        agreement_low=low,
        agreement_high=high,
        num_pieces=num_pieces,
        num_exemplars=len(exemplars),
        exemplar_bytes=sum(tensor.nbytes for tensor in exemplars.tensors().values()),
        conditions=conditions_of(after_last_cut(new, len(stream.classes)), len(stream.classes)),
    )


def _serving(job: LabelJob, store: Path, device: Device) -> Student | None:
    """The serving model; None when there is none or it is damaged: labels are needed all the more then."""
    if job.checkpoint is None:
        return None
    try:
        student: Student = checkpoints.load(store, job.checkpoint)[0].to(device.torch_device)
    except CheckpointError as error:
        _log.warning(line("label_without_model", stream=job.stream.stream_id, reason=error))
        return None
    return student


def _sample(
    job: LabelJob, source: FrameSource, student: Student | None, device: Device, stepper: Stepper, seed: int
) -> Sample:
    """The frames to label: as the label rate has it, or as many as the budget pays for."""
    stream = job.stream
    every = frames_to_label(job.from_s, job.to_s, stream.fps, stream.label_fps)
    if not 0 < job.num_frames < len(every):
        return Sample(np.array(every, np.int64), np.ones(len(every)))
    worth: Worth | None = None
    if student is not None and job.uniform_share < 1.0:
        analyser = task_of(stream).analyser(student, device, 0)
        counts = job.exemplars.class_counts if job.exemplars is not None else ()
        rarity = rarity_of(counts, len(stream.classes))
        edge = stream.crop_px if stream.task == "classification" else stream.frame_px

        def worth(frames: Sequence[int]) -> NDArray[np.float64]:
            return np.array([_worth(source, index, analyser, edge, rarity, stepper) for index in frames])

    first, last = (math.ceil(time_s * stream.fps - 1e-9) for time_s in (job.from_s, job.to_s))
    # Fixed per stream and window: labelled again, a window gives the same data set.
    return draw(
        first, last, job.num_frames, job.uniform_share, worth, np.random.default_rng([seed, max(0, job.window)])
    )


def _worth(
    source: FrameSource,
    index: int,
    analyser: Analyser,
    edge: int,
    rarity: NDArray[np.float64],
    stepper: Stepper,
) -> float:
    """Of one frame; nothing for one that cannot be had, or when there is no time left."""
    if stepper.step():
        return 0.0
    try:
        return frame_worth(analyser.analyse(source.frame(index), edge), rarity)
    except SourceError:
        return 0.0


def _agreement(
    task: Task[Any], student: Student | None, fresh: Any, device: Device, stepper: Stepper
) -> tuple[float | None, int]:
    """(accuracy of the serving model on the new labels, pieces of evidence); (None, 0) where there is none."""
    if student is None or len(fresh) == 0:
        return None, 0
    pieces = round(datasets.evenness(fresh) * task.num_pieces(fresh))
    return task.serving_accuracy(student, fresh, device, stepper), pieces


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
