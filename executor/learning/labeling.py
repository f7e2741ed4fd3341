"""Golden labels of a stretch of a stream, written as the window's data set.

The oracle reads the source's own truth, errs at a configured rate, and really burns the configured device
time per frame, so that labelling competes with the other jobs as a large model would.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from executor.learning import datasets, replay
from executor.learning.datasets import CropSet
from executor.learning.device import Device
from executor.learning.stepping import Stepper
from executor.streams.frames import FrameSource
from protocol.errors import InputError
from protocol.messages import LabelJob
from protocol.schema import LabelResult

_SLICE_S = 0.005  # of device time between two chances to rest or stop


def oracle_labels(
    truth: NDArray[np.int64], error_rate: float, num_classes: int, seed: int, frame_index: int
) -> NDArray[np.int64]:
    """``truth`` (n,) with each label replaced by a wrong class with probability ``error_rate``.

    Deterministic in (seed, frame index), whatever other frames are labelled.
    """
    draw = np.random.default_rng([seed, frame_index & 0xFFFFFFFF, 1 if frame_index < 0 else 0])
    wrong = draw.random(len(truth)) < error_rate
    shift = draw.integers(1, num_classes, len(truth))
    return np.where(wrong, (truth + shift) % num_classes, truth).astype(np.int64)


def frames_to_label(from_s: float, to_s: float, fps: float, label_fps: float) -> list[int]:
    """Frame indices in [from_s, to_s) of stream time, about ``label_fps`` of them a second, never one twice."""
    first, last = math.ceil(from_s * fps - 1e-9), math.ceil(to_s * fps - 1e-9)
    stride = max(1.0, fps / label_fps)
    count = math.ceil((last - first) / stride - 1e-9) if last > first else 0
    return [first + math.floor(position * stride) for position in range(count)]


def burn(device: Device, seconds: float, stepper: Stepper) -> bool:
    """Keep the device busy for ``seconds`` of device time. True when a stop was requested meanwhile."""
    work = torch.ones(64, 64, device=device.torch_device)
    until = stepper.busy_s() + seconds
    while (left := until - stepper.busy_s()) > 0.0:
        slice_end = stepper.busy_s() + min(_SLICE_S, left)
        while stepper.busy_s() < slice_end:
            work = torch.clamp(work @ work, max=1.0)
        if stepper.step():
            return True
    return False


def label(
    job: LabelJob, source: FrameSource, store: Path, device: Device, stepper: Stepper, seed: int
) -> LabelResult | None:
    """Label the job's frames, add the exemplar memory, write the data set.

    A stop request ends it early with the frames labelled so far, and with None when there are none.
    Raises InputError when there is nothing to learn from: no object in any frame and no exemplars.
    """
    started = time.monotonic()
    stream = job.stream
    num_classes = len(stream.classes)
    parts: list[CropSet] = []
    num_frames = 0
    stopped = False
    for index in frames_to_label(job.from_s, job.to_s, stream.fps, stream.label_fps):
        stopped = burn(device, stream.golden.seconds_per_frame, stepper) or stepper.step()
        if stopped:
            break
        frame = source.frame(index)
        num_frames += 1
        if len(frame.labels) == 0:
            continue
        labels = oracle_labels(frame.labels, stream.golden.error_rate, num_classes, seed, index)
        flags = np.zeros(len(labels), np.bool_)
        frames = np.full(len(labels), index, np.int64)
        parts.append(CropSet(frame.crops(stream.crop_px), labels, frames, flags, flags))
    fresh = datasets.concatenate([datasets.empty(stream.crop_px), *parts])
    held_out = np.isin(fresh.frame_index, datasets.validation_frames(fresh.frame_index))
    fresh = CropSet(fresh.crops, fresh.labels, fresh.frame_index, held_out, fresh.is_exemplar)
    if job.exemplars is not None and stream.exemplars_per_class > 0:
        previous = datasets.load(store, job.exemplars, stream.classes)
        memory = replay.exemplars(previous, stream.exemplars_per_class, stream.crop_px)
        fresh = datasets.concatenate([fresh, memory])
    if stopped and num_frames == 0:
        return None
    if len(fresh) == 0:
        raise InputError(
            f"stream {stream.stream_id}: no object in the {num_frames} frames labelled from {job.from_s:g} s "
            f"to {job.to_s:g} s; raise label_fps or check the source"
        )
    dataset = datasets.save(store, fresh, stream_id=stream.stream_id, window=job.window, classes=stream.classes)
    return LabelResult(dataset=dataset, num_frames=num_frames, seconds=time.monotonic() - started)
