"""Earlier models on new labels: what a stretch looked like, what a model of the zoo is worth there, taking one over.

Forward passes only. Nothing here trains; a retraining that begins from a model of the zoo is an ordinary one.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from executor.learning import checkpoints
from executor.learning.datasets import CropSet, E, Examples, evenness
from executor.learning.device import Device
from executor.learning.inference import look_of
from executor.learning.models import Student
from executor.learning.pairing import paired_counts, road_users, wilson
from executor.learning.replay import resize
from executor.learning.stepping import Stepper
from executor.learning.task import task_of
from executor.learning.training import epoch_result
from protocol.errors import CheckpointError, InputError
from protocol.messages import RetrainJob, TrialJob
from protocol.schema import Conditions, RetrainResult, ZooTrial

_LAYOUT_PX = 4
# Two parts of a labelled stretch are two scenes that are so unlike (1 = all objects of another class, or pictures that
# differ by a quarter of the range), and by so many times what chance would do.
_CUT, _SIGMAS = 0.6, 3.0
_MIN_FRAMES, _MIN_PIECES = 5, 5


def conditions_of(examples: Examples, num_classes: int) -> Conditions:
    """What ``examples`` look like; shares of 0 and no picture where there are none."""
    counts = np.array(examples.class_counts(num_classes), np.float64)
    mix = counts / max(1.0, counts.sum())
    if len(examples) == 0:
        return Conditions(class_mix=_rounded(mix))
    pictures = examples.pictures
    layout = resize(_square(pictures), _LAYOUT_PX).mean(axis=0).reshape(-1) / 255.0
    return Conditions(class_mix=_rounded(mix), light=_rounded(look_of(pictures)), layout=_rounded(layout))


def after_last_cut(examples: E, num_classes: int) -> E:
    """The examples after the last change of scene within the labelled stretch, all of them where there was none.

    What comes next looks like the end of the stretch: what a model is worth before a hand-over says nothing about it.
    Road users (frames, where examples are frames) are the independent pieces: the mean of their looks before and after
    must differ by ``_CUT``, and by several times what it differs by chance among as many.
    """
    frames, at = np.unique(examples.frame_index, return_inverse=True)
    looks, pieces = _looks(examples, num_classes)
    begin = 0
    while len(frames) - begin >= 2 * _MIN_FRAMES:
        splits = range(begin + _MIN_FRAMES, len(frames) - _MIN_FRAMES + 1)
        found = [_unlike(looks, pieces, (begin <= at) & (at < split), at >= split) for split in splits]
        # Short ends differ by chance: long ones count for more when the place is looked for.
        weight = [(split - begin) * (len(frames) - split) for split in splits]
        best = int(np.argmax(np.multiply([apart for apart, _ in found], weight)))
        apart, chance = found[best]
        if apart < max(_CUT**2, _SIGMAS**2 * chance):
            break
        begin = splits[best]
    return examples.take(examples.frame_index >= frames[begin]) if len(frames) else examples


def _looks(examples: Examples, num_classes: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """What each example looks like (n, d), so that squared differences of class mixes and pictures add up, and the
    number of the piece of evidence that it belongs to (n,)."""
    layout = resize(_square(examples.pictures), _LAYOUT_PX).reshape(len(examples), -1) / 255.0
    if isinstance(examples, CropSet):
        mix = np.eye(num_classes)[examples.labels]
        pieces = road_users(examples.frame_index, examples.boxes, examples.labels)
    else:
        each = [examples.take(np.array([number])).class_counts(num_classes) for number in range(len(examples))]
        counts = np.array(each, np.float64).reshape(len(examples), num_classes)
        mix = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1.0)
        pieces = np.arange(len(examples), dtype=np.int64)
    return np.hstack([math.sqrt(0.5) * mix, 4.0 / _LAYOUT_PX / math.sqrt(3.0) * layout]), pieces


def _unlike(
    looks: NDArray[np.float64], pieces: NDArray[np.int64], before: NDArray[np.bool_], after: NDArray[np.bool_]
) -> tuple[float, float]:
    """Squared distance of the mean looks of two parts, 0 = alike, and its expectation if there were no difference."""
    means, chance = [], 0.0
    for part in (before, after):
        _, owner, size = np.unique(pieces[part], return_inverse=True, return_counts=True)
        if len(size) < _MIN_PIECES:
            return 0.0, 1.0
        each = (np.arange(len(size))[:, None] == owner[None]).astype(np.float64) @ looks[part] / size[:, None]
        means.append(each.mean(axis=0))
        chance += float(each.var(axis=0, ddof=1).sum()) / len(size)
    return float(((means[0] - means[1]) ** 2).sum()), chance


def _square(pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The middle of pictures (n, h, w, 3) whose edges differ."""
    height, width = pictures.shape[1:3]
    edge = min(height, width)
    top, left = (height - edge) // 2, (width - edge) // 2
    return np.ascontiguousarray(pictures[:, top : top + edge, left : left + edge])


def _rounded(values: NDArray[Any]) -> tuple[float, ...]:
    return tuple(round(float(value), 4) for value in values)


def zoo_trials(
    job: TrialJob,
    unseen: Examples,
    serving: Student,
    store: Path,
    device: Device,
    stepper: Stepper,
) -> tuple[ZooTrial, ...]:
    """Every model of ``job.zoo`` on ``unseen``, labels that neither it nor the serving model was trained on.

    One that cannot be loaded or knows other classes is left out, and so are those that a stop request does not reach.
    """
    if not job.zoo or len(unseen) == 0:
        return ()
    task = task_of(job.stream)
    unseen = after_last_cut(unseen, len(job.stream.classes))
    accuracy_serving, before, _ = task.assess(serving, unseen, device, stepper)
    trials: list[ZooTrial] = []
    for earlier in job.zoo:
        start_s = stepper.busy_s()
        try:
            student, manifest = checkpoints.load(store, earlier.checkpoint)
        except CheckpointError:
            continue
        if manifest.classes != job.stream.classes or manifest.task != job.stream.task:
            continue
        student.to(device.torch_device)
        accuracy, points, confidence = task.assess(student, unseen, device, stepper)
        low, high = wilson(accuracy, round(evenness(unseen) * len(points)))
        trials.append(
            ZooTrial(
                number=earlier.number,
                accuracy=accuracy,
                accuracy_low=low,
                accuracy_high=high,
                accuracy_serving=accuracy_serving,
                paired=paired_counts(points, before),
                confidence=confidence,
                busy_s=max(0.0, stepper.busy_s() - start_s),
            )
        )
        if stepper.step():
            break
    return tuple(trials)


def check_fits(job: RetrainJob, earlier: Student) -> None:
    """Raise InputError when the stream cannot go on from ``earlier``."""
    if earlier.num_classes != len(job.stream.classes) or earlier.task != job.stream.task:
        raise InputError(f"model {job.config.base} of the zoo was made for other classes than those of the stream")


def take_over(
    job: RetrainJob,
    examples: Examples,
    serving: Student,
    earlier: Student,
    store: Path,
    device: Device,
    stepper: Stepper,
) -> RetrainResult:
    """Make ``earlier`` a model of the job's stream, as it is, and compare it with the serving one.

    Neither was trained on the window's labels: all of them are held out, of a new scene those after the change. Raises
    InputError where there are none, and CheckpointError when it cannot be written.
    """
    started, start_busy_s = time.monotonic(), stepper.busy_s()
    stream, task = job.stream, task_of(job.stream)
    unseen = after_last_cut(examples.take(~examples.is_exemplar), len(stream.classes))
    if len(unseen) == 0:
        raise InputError(f"data set {job.dataset.path}: no new labels to compare models on; raise label_fps")
    before, _ = task.evaluate(serving, unseen, device, stepper)
    began = stepper.busy_s()
    epoch = epoch_result(0, task.evaluate(earlier, unseen, device, stepper), began, began, stepper.busy_s())
    after = epoch.accuracy
    points: tuple[NDArray[np.float64], ...] = tuple(
        task.points(student, unseen, device, stepper) for student in (earlier, serving)
    )
    checkpoint = checkpoints.save(
        store,
        earlier,
        stream_id=stream.stream_id,
        version=job.next_version,
        classes=stream.classes,
        crop_px=stream.crop_px if stream.task == "classification" else stream.frame_px,
        retrain_id=job.config.config_id,
        window=job.window,
        accuracy=after,
    )
    return RetrainResult(
        stream_id=stream.stream_id,
        window=job.window,
        config=job.config,
        checkpoint=checkpoint,
        accuracy_before=before,
        accuracy_after=after,
        num_validation=len(unseen),
        epochs=(epoch,),
        busy_s=max(0.0, stepper.busy_s() - start_busy_s),
        seconds=time.monotonic() - started,
        reason=f"took model {job.config.base} of the zoo over as it is",
        paired=paired_counts(*points),
    )
