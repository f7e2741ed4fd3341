"""Retraining a student on a window's data set, and what may come out of it.

Accuracy is measured on the same held-out split before and after. The *last* epoch is kept unless it is clearly
worse than the best: the best of many epochs, chosen on the split that then reports it, looks better than it is.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch

from executor.learning import checkpoints, reuse
from executor.learning.datasets import Examples
from executor.learning.device import Device
from executor.learning.models import Student
from executor.learning.pairing import paired_counts
from executor.learning.stepping import Stepper
from executor.learning.task import task_of
from executor.learning.training import epoch_result
from protocol.errors import InputError
from protocol.messages import RetrainJob
from protocol.schema import EpochResult, PairedCounts, RetrainResult

_MIN_DROP = 0.02


def clearly_worse(last: float, best: float, num_validation: int) -> bool:
    """True when ``last`` is below ``best`` by more than 0.02 and more than a standard error of the best."""
    error = math.sqrt(best * (1.0 - best) / max(1, num_validation))
    return best - last > max(_MIN_DROP, error)


class Retraining:
    """One retraining, epoch by epoch; remembers the weights worth keeping.

    ``epochs`` starts with epoch 0, the student as it served (a new one: as it was initialised; one that begins from
    ``earlier``, a model of the zoo: as that is), whose ``busy_s`` is the cost of one validation; each later epoch
    contains one as well. ``accuracy_before`` is the serving model's, whatever the student began from.
    """

    def __init__(
        self,
        job: RetrainJob,
        crops: Examples,
        serving: Student | None,
        device: Device,
        stepper: Stepper,
        on_epoch: Callable[[EpochResult], None],
        earlier: Student | None = None,
    ) -> None:
        self._job, self._device, self._stepper, self._on_epoch = job, device, stepper, on_epoch
        self._task = task = task_of(job.stream)
        train, self._validation = crops.train, crops.validation
        if len(train) < 2 or len(self._validation) < 1:
            raise InputError(
                f"data set {job.dataset.path}: {len(train)} training and {len(self._validation)} held-out examples "
                f"are too few; raise label_fps of stream {job.stream.stream_id}"
            )
        base = serving if earlier is None else earlier
        student = task.student_for(job.config, base, job.stream, device, job.seed)
        before = student if serving is None else serving.to(device.torch_device)
        first = before if earlier is None else earlier.to(device.torch_device)
        part = task.subset(train, max(2, round(job.config.data_fraction * len(train))), job.seed)
        self._trainer = task.trainer(student, base, job.config, part, device, job.seed)
        self.student = self._trainer.average
        self.epochs: list[EpochResult] = []
        self._best = -1
        self._best_state: dict[str, torch.Tensor] = {}
        start = stepper.busy_s()
        self._record(0, task.evaluate(first, self._validation, device, stepper), start, start)
        self.accuracy_before = self.epochs[0].accuracy
        if earlier is not None:
            self.accuracy_before = task.evaluate(before, self._validation, device, stepper)[0]
        # A new student has nothing to be compared with.
        self._points_before = None if serving is None else task.points(before, self._validation, device, stepper)

    def run(self) -> str:
        """Train all epochs, or until a stop is requested. Returns why it ended early ("" when it did not)."""
        if self._trainer.remember(self._validation, self._stepper) or self._trainer.prepare(self._stepper):
            return f"stopped before epoch 1 of {self._job.config.epochs}"
        for epoch in range(1, self._job.config.epochs + 1):
            start = self._stepper.busy_s()
            if self._trainer.epoch(self._stepper):
                return f"stopped in epoch {epoch} of {self._job.config.epochs}"
            trained = self._stepper.busy_s()
            self._record(epoch, self._trainer.evaluate(self._validation, self._stepper), start, trained)
            if self._best < 1 or self.epochs[-1].accuracy > self.epochs[self._best].accuracy:
                self._best = epoch
                self._best_state = {name: tensor.clone() for name, tensor in self.student.state_dict().items()}
        return ""

    def kept(self, ended: str) -> tuple[EpochResult | None, str]:
        """Put the weights to keep into ``student``; (their epoch or None, why they and not others)."""
        last = self.epochs[-1]
        if last.epoch == 0:
            return None, f"{ended}; no epoch was completed" if ended else "no epoch was completed"
        best = self.epochs[self._best]
        if ended or clearly_worse(last.accuracy, best.accuracy, len(self._validation)):
            # Stopped inside an epoch the weights are past the last measurement: take measured ones.
            self.student.load_state_dict(self._best_state)
            why = ended or "the last epoch was clearly worse"
            return best, f"{why}; kept epoch {best.epoch}, the best of {last.epoch}"
        return last, f"kept the last epoch ({last.epoch})"

    def paired(self) -> PairedCounts:
        """The student, as it is now, against the serving one on the held-out split."""
        if self._points_before is None:
            return PairedCounts()
        points = self._task.points(self.student, self._validation, self._device, self._stepper)
        return paired_counts(points, self._points_before)

    def precision(self, serving: Student | None) -> tuple[float | None, float | None]:
        """Mean average precision on the held-out split of the serving model and of the student as it is now."""
        before, after = (
            None
            if student is None
            else self._task.mean_average_precision(student, self._validation, self._device, self._stepper)
            for student in (serving, self.student)
        )
        return before, after

    def _record(self, epoch: int, measured: tuple[float, float], start_s: float, trained_s: float) -> None:
        """``start_s``, ``trained_s``: busy seconds when the epoch and when its validation began."""
        result = epoch_result(epoch, measured, start_s, trained_s, self._stepper.busy_s())
        self.epochs.append(result)
        self._on_epoch(result)


def retrain(
    job: RetrainJob,
    store: Path,
    device: Device,
    stepper: Stepper,
    on_ready: Callable[[], None],
    on_epoch: Callable[[EpochResult], None],
) -> RetrainResult:
    """Run a retraining job; a new checkpoint is written only when an epoch was completed.

    Raises InputError (data set missing, damaged, too small), CheckpointError (starting model, writing) and
    DivergedError (no checkpoint is written then).
    """
    started, start_busy_s = time.monotonic(), stepper.busy_s()
    crops = task_of(job.stream).read(store, job.dataset, job.stream.classes)
    serving = None if job.checkpoint is None else checkpoints.load(store, job.checkpoint)[0]
    earlier = None if job.start is None else checkpoints.load(store, job.start)[0]
    on_ready()
    if earlier is not None:
        reuse.check_fits(job, earlier)
        if serving is not None and job.config.epochs == 0:
            serving, earlier = serving.to(device.torch_device), earlier.to(device.torch_device)
            return reuse.take_over(job, crops, serving, earlier, store, device, stepper)
    retraining = Retraining(job, crops, serving, device, stepper, on_epoch, earlier)
    epoch, reason = retraining.kept(retraining.run())
    checkpoint = None
    if epoch is not None:
        checkpoint = checkpoints.save(
            store,
            retraining.student,
            stream_id=job.stream.stream_id,
            version=job.next_version,
            classes=job.stream.classes,
            crop_px=job.stream.crop_px if job.stream.task == "classification" else job.stream.frame_px,
            retrain_id=job.config.config_id,
            window=job.window,
            accuracy=epoch.accuracy,
        )
    before = retraining.accuracy_before
    paired = PairedCounts() if epoch is None else retraining.paired()
    map_before, map_after = (None, None) if epoch is None else retraining.precision(serving)
    return RetrainResult(
        stream_id=job.stream.stream_id,
        window=job.window,
        config=job.config,
        checkpoint=checkpoint,
        accuracy_before=before,
        accuracy_after=before if epoch is None else epoch.accuracy,
        num_validation=int(crops.is_validation.sum()),
        epochs=tuple(retraining.epochs),
        busy_s=max(0.0, stepper.busy_s() - start_busy_s),
        seconds=time.monotonic() - started,
        reason=reason,
        paired=paired,
        map_before=map_before,
        map_after=map_after,
    )
