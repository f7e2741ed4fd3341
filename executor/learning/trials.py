"""Micro-profiling trials of one stream: short retrainings on little data, and inference configurations on a clip.

The profiler chooses the trials and fits the curves; here they are run and measured (paper, section 4.3). All
costs are busy seconds of this device, as if it had been granted whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from executor.learning import checkpoints
from executor.learning.datasets import Examples, evenness
from executor.learning.device import Device
from executor.learning.golden import Labels, open_golden
from executor.learning.inference import Analyser, Objects
from executor.learning.models import Student
from executor.learning.pairing import wilson
from executor.learning.reuse import zoo_trials
from executor.learning.stepping import Stepper
from executor.learning.task import Task, task_of
from executor.learning.training import DivergedError, epoch_result
from executor.streams.frames import Frame, FrameSource
from executor.streams.video import SourceError
from protocol.errors import InputError
from protocol.messages import TrialJob
from protocol.schema import EpochResult, InferenceConfig, InferenceTrial, RetrainConfig, RetrainTrial, TrialResult

_MIN_TRIAL_EXAMPLES = 8


class _StoppedError(Exception):
    """A stop was requested; what is measured so far is the result."""


def run_trials(
    job: TrialJob,
    source: FrameSource,
    store: Path,
    device: Device,
    stepper: Stepper,
    seed: int,
    on_ready: Callable[[], None],
) -> TrialResult:
    """Run all trials of the job; a stop request ends it with those that are complete.

    Retraining trials start from the serving model's weights each time. A configuration whose training
    diverges is left out. Raises InputError and CheckpointError as loading does.
    """
    started, start_busy_s = time.monotonic(), stepper.busy_s()
    task = task_of(job.stream)
    crops = task.read(store, job.dataset, job.stream.classes)
    serving, _ = checkpoints.load(store, job.checkpoint)
    serving.to(device.torch_device)
    on_ready()
    load_busy_s = stepper.busy_s() - start_busy_s
    if len(crops.train) < 2 or len(crops.validation) < 1:
        raise InputError(f"data set {job.dataset.path}: too few examples to profile with; raise label_fps")
    start_busy_s = stepper.busy_s()
    measured = task.evaluate(serving, crops.validation, device, stepper)
    baseline = epoch_result(0, measured, start_busy_s, start_busy_s, stepper.busy_s())
    # What serving will be worth is a mean over frames; labels that the model was trained on say nothing about it.
    unseen = crops.take(~crops.is_exemplar) if job.unseen else crops.validation
    accuracy_now = task.serving_accuracy(serving, unseen, device, stepper)
    accuracy_low, accuracy_high = wilson(accuracy_now, round(evenness(unseen) * task.num_pieces(unseen)))
    zoo = zoo_trials(job, unseen, serving, store, device, stepper) if job.unseen else ()
    retrain: list[RetrainTrial] = []
    inference: list[InferenceTrial] = []
    golden_s = 0.0
    try:
        inference, golden_s = _inference_trials(job, serving, source, device, stepper, seed)
        for config in job.retrain:
            try:
                retrain.append(
                    _retrain_trial(job, config, crops, serving, baseline, load_busy_s, device, stepper, seed)
                )
            except DivergedError:
                continue
    except _StoppedError:
        pass
    return TrialResult(
        stream_id=job.stream.stream_id,
        window=job.window,
        accuracy_now=accuracy_now,
        retrain=tuple(retrain),
        inference=tuple(inference),
        seconds=time.monotonic() - started,
        accuracy_low=accuracy_low,
        accuracy_high=accuracy_high,
        golden_s=golden_s,
        zoo=zoo,
    )


def _retrain_trial(
    job: TrialJob,
    config: RetrainConfig,
    crops: Examples,
    serving: Student,
    baseline: EpochResult,
    load_busy_s: float,
    device: Device,
    stepper: Stepper,
    seed: int,
) -> RetrainTrial:
    device.forget_peak()
    start, task = stepper.busy_s(), task_of(job.stream)
    total = max(2, round(config.data_fraction * len(crops.train)))
    wanted = max(_MIN_TRIAL_EXAMPLES, round(job.data_share * len(crops.train)))
    part = task.subset(crops.train, min(total, wanted), seed)
    student = task.student_for(config, serving, job.stream, device, seed)
    trainer = task.trainer(student, serving, config, part, device, seed)
    validation = crops.validation
    if trainer.remember(validation, stepper):
        raise _StoppedError
    startup_s = load_busy_s + stepper.busy_s() - start
    start = stepper.busy_s()
    if trainer.prepare(stepper):
        raise _StoppedError
    prepare_s = max(0.0, stepper.busy_s() - start)
    epochs = [baseline]
    for epoch in range(1, job.num_epochs + 1):
        start = stepper.busy_s()
        if trainer.epoch(stepper):
            raise _StoppedError
        trained = stepper.busy_s()
        epochs.append(epoch_result(epoch, trainer.evaluate(validation, stepper), start, trained, stepper.busy_s()))
    return RetrainTrial(
        config=config,
        num_samples=len(part),
        total_samples=total,
        startup_s=startup_s,
        prepare_s=prepare_s,
        epochs=tuple(epochs),
        memory_bytes=device.peak_memory_bytes(),
    )


def _inference_trials(
    job: TrialJob, serving: Student, source: FrameSource, device: Device, stepper: Stepper, seed: int
) -> tuple[list[InferenceTrial], float]:
    """Every configuration on the same clip, and the golden model's busy seconds. Configurations of one resolution
    share the analysed frames; each is charged for those that it would have analysed."""
    if not job.inference or job.num_frames < 1:
        return [], 0.0
    stream, task = job.stream, task_of(job.stream)
    golden = open_golden(stream, device, stepper, seed)
    end = round(job.clip_end_s * stream.fps)
    frames: list[Frame] = []
    truth: list[Labels] = []
    fetched_s: list[float] = []
    label_s = 0.0
    for index in range(end - job.num_frames, end):
        begun = stepper.busy_s()
        # Consecutive frames are not among the window's labels: the golden model has to look at them as well.
        try:
            frame = source.frame(index)
            asked = stepper.busy_s()
            labels = golden.label(frame)
            label_s += max(0.0, stepper.busy_s() - asked)
        except SourceError:
            continue
        if labels is None:
            raise _StoppedError
        frames.append(frame)
        truth.append(labels)
        fetched_s.append(max(0.0, asked - begun))
    if not frames:
        return [], label_s
    # Serving takes in every frame of the stream, analysed or not. The first one of a clip may have to be searched for.
    fetch_s = float(np.mean(fetched_s[1:] or fetched_s))
    del golden  # which would count as memory that serving needs
    analyser = task.analyser(serving, device, job.checkpoint.version)
    if stepper.step():
        raise _StoppedError
    trials: dict[str, InferenceTrial] = {}
    for resolution_px in sorted({config.resolution_px for config in job.inference}):
        configs = [config for config in job.inference if config.resolution_px == resolution_px]
        device.forget_peak()
        results, analyse_s = _analysed(analyser, frames, configs, device, stepper)
        for config in configs:
            trials[config.config_id] = _judged(
                task, config, frames, truth, results, analyse_s, fetch_s, device, stepper
            )
    return [trials[config.config_id] for config in job.inference], label_s


def _analysed(
    analyser: Analyser, frames: list[Frame], configs: list[InferenceConfig], device: Device, stepper: Stepper
) -> tuple[dict[int, Objects], dict[int, float]]:
    """Result and busy seconds (crops made, classified) of every frame that one of ``configs`` analyses."""
    resolution_px = configs[0].resolution_px
    analyser.analyse(frames[0], resolution_px)  # not measured: caches and set-up that are paid once
    results: dict[int, Objects] = {}
    busy_s: dict[int, float] = {}
    for frame in frames:
        if not any(frame.index % config.frame_interval == 0 for config in configs):
            continue
        start = stepper.busy_s()
        results[frame.index] = analyser.analyse(frame, resolution_px)
        busy_s[frame.index] = max(0.0, stepper.busy_s() - start)
        if stepper.step():
            raise _StoppedError
    return results, busy_s


def _judged(
    task: Task[Any],
    config: InferenceConfig,
    frames: list[Frame],
    truth: list[Labels],
    results: dict[int, Objects],
    analyse_s: dict[int, float],
    fetch_s: float,
    device: Device,
    stepper: Stepper,
) -> InferenceTrial:
    start = stepper.busy_s()
    last: Objects | None = None
    accuracies: list[float] = []
    num_analysed, analysed_s = 0, 0.0
    for frame, labels in zip(frames, truth, strict=True):
        if frame.index % config.frame_interval == 0:
            last = results[frame.index]
            num_analysed += 1
            analysed_s += analyse_s[frame.index]
        accuracy = task.judge(last, labels.boxes, labels.labels)
        # The frames before a clip's first analysed one have no result to carry over, which no served stream suffers.
        if accuracy is not None and last is not None:
            accuracies.append(accuracy)
    judge_s = max(0.0, stepper.busy_s() - start) / len(frames)
    per_analysed_s = analysed_s / num_analysed if num_analysed else float(np.mean(list(analyse_s.values()) or [0.0]))
    if stepper.step():
        raise _StoppedError
    return InferenceTrial(
        config=config,
        busy_s_per_frame=fetch_s + judge_s + per_analysed_s / config.frame_interval,
        accuracy=float(np.mean(accuracies)) if accuracies else 0.0,
        num_frames=len(frames),
        memory_bytes=device.peak_memory_bytes(),
    )
