"""A new model and the one before it on fresh golden labels of the live stream."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from executor.learning import checkpoints
from executor.learning.device import Device
from executor.learning.labeling import frames_to_label, look
from executor.learning.pairing import paired_counts
from executor.learning.stepping import Stepper
from executor.learning.task import task_of
from executor.streams.frames import FrameSource
from protocol.messages import CanaryJob
from protocol.schema import CanaryResult


def compare(
    job: CanaryJob,
    source: FrameSource,
    store: Path,
    device: Device,
    stepper: Stepper,
    seed: int,
    on_ready: Callable[[], None],
) -> CanaryResult:
    """Label the stretch and let both models classify its crops. A stop request ends it with the frames so far.

    Raises CheckpointError when one of the models cannot be loaded.
    """
    started = time.monotonic()
    students = [checkpoints.load(store, ref)[0].to(device.torch_device) for ref in (job.candidate, job.previous)]
    on_ready()
    task = task_of(job.stream)
    indices = frames_to_label(job.from_s, job.to_s, job.stream.fps, job.label_fps)
    found = look(source, job.stream, indices, device, stepper, seed)
    new, old = (task.points(student, found.examples, device, stepper) for student in students)
    candidate, previous = (task.serving_accuracy(student, found.examples, device, stepper) for student in students)
    return CanaryResult(
        stream_id=job.stream.stream_id,
        candidate_version=job.candidate.version,
        num_frames=found.num_frames,
        num_crops=sum(found.examples.class_counts(len(job.stream.classes))),
        accuracy_candidate=candidate,
        accuracy_previous=previous,
        paired=paired_counts(new, old),
        seconds=time.monotonic() - started,
        golden_s=found.golden_s,
    )
