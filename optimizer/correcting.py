"""Error correction while a retraining runs: what its epochs say against what was predicted.

``assess`` is the decision, a pure function. A retraining that will not pay is stopped with its best model so far, which
the gate then judges like any other; one that turns out better, worse, faster or slower than thought is told to the
planner, which plans the rest of the window anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

import msgspec

from optimizer import questions
from optimizer.config import CorrectionConfig
from optimizer.emitter import Emitter
from optimizer.state import ExecutorState, RunningRetrain, SiteState, StreamState
from protocol.events import RetrainCorrected, RetrainProgress
from protocol.plan import StreamProfile
from protocol.schema import EpochResult, Record

# Accuracy rises like 1 - exp(-k / tau) with tau this part of all epochs: what the planner's estimate, which is about
# the end, means for an epoch in the middle.
_TAU = 1.0 / 3.0
# The prediction of the gain counts like this many last epochs that bear it out.
_PRIOR_EPOCHS = 0.4
# Two models differ on about this part of the held-out crops; the noise of a gain comes from there.
_CHURN = 0.2
# A retraining has levelled off when this part of its epochs (2 at least) brought no more than this.
_FLAT_PART, _FLAT_GAIN = 0.25, 0.005
# The last validation is reckoned to take at most so many times its busy seconds by the clock.
_SLOWEST = 1.5
# What is still to come is worth waiting for above this.
_WORTH = 0.01
# A worker that was told to stop hands its model in within so many seconds.
_HAND_IN_S = 10.0


class Assessment(Record, frozen=True, kw_only=True):
    """``accuracy_after`` and ``gpu_seconds`` (of all epochs) as the epochs so far tell."""

    verdict: Literal["go_on", "tell", "stop"]
    accuracy_after: float
    gpu_seconds: float
    reason: str = ""


def assess(
    epochs: tuple[EpochResult, ...],
    *,
    num_epochs: int,
    num_validation: int,
    accuracy_before: float,
    accuracy_after: float,
    gpu_seconds: float,
    told_after: float,
    told_seconds: float,
    config: CorrectionConfig,
    work_s: tuple[float, ...] = (),
) -> Assessment:
    """What to do about a retraining of ``num_epochs`` epochs of which ``epochs`` (0 first) have been seen.

    ``accuracy_before``, ``accuracy_after`` and ``gpu_seconds`` are the plan's estimates; ``told_*`` what the planner
    was told last. Accuracies of ``epochs`` are on another split than the estimates, so gains are compared.
    ``work_s``: GPU-seconds by the clock when each of ``epochs`` was heard of.
    """
    seen = epochs[-1].epoch if epochs else 0
    if seen < 1 or epochs[0].epoch != 0:
        return Assessment(verdict="go_on", accuracy_after=told_after, gpu_seconds=told_seconds)
    start, predicted = epochs[0].accuracy, accuracy_after - accuracy_before
    # Least squares for the factor on the predicted gain, the prediction itself counting as a few epochs.
    shape = [_progress(e.epoch, num_epochs) for e in epochs[1:]]
    gains = [e.accuracy - start for e in epochs[1:]]
    if abs(predicted) > 0.01:
        squares = sum(s * s for s in shape)
        factor = (sum(s * g for s, g in zip(shape, gains, strict=True)) / predicted + _PRIOR_EPOCHS) / (
            squares + _PRIOR_EPOCHS
        )
        # A gain cannot be foreseen from a few epochs beyond what it would be if all the rest came at once.
        gain = min(max(factor, -2.0), 3.0) * predicted
    else:
        gain = (sum(gains[-3:]) / len(gains[-3:])) * seen / (seen + _PRIOR_EPOCHS)
    after = min(1.0, max(0.0, accuracy_before + gain))
    seconds = expected_seconds(epochs, work_s, num_epochs, gpu_seconds)

    noise = math.sqrt(_CHURN / max(1, num_validation))
    part = seen / num_epochs
    if config.stop and seen >= config.min_epochs and seen < num_epochs:
        if gain + config.sigmas * noise < 0.0:
            reason = (
                f"after {seen} of {num_epochs} epochs a gain of {gain:+.3f} is to be expected, not {predicted:+.3f}"
            )
            return Assessment(verdict="stop", accuracy_after=after, gpu_seconds=seconds, reason=reason)
        to_come = max(0.0, gain) * (1.0 - _progress(seen, num_epochs))
        if part <= 0.8 and _is_flat(epochs, num_epochs) and to_come < _WORTH:
            reason = f"levelled off after {seen} of {num_epochs} epochs"
            return Assessment(verdict="stop", accuracy_after=after, gpu_seconds=seconds, reason=reason)
    if seen >= min(config.min_epochs, num_epochs):
        said = []
        if abs(after - told_after) > max(config.tell_accuracy, noise):
            said.append(f"will reach {after:.3f}, not {told_after:.3f}")
        if abs(seconds - told_seconds) > config.tell_seconds * told_seconds + 0.5 and part < 0.9:
            said.append(f"takes {seconds:.1f} GPU-seconds, not {told_seconds:.1f}")
        if said:
            return Assessment(verdict="tell", accuracy_after=after, gpu_seconds=seconds, reason=", ".join(said))
    return Assessment(verdict="go_on", accuracy_after=told_after, gpu_seconds=told_seconds)


def expected_seconds(
    epochs: tuple[EpochResult, ...], work_s: tuple[float, ...], num_epochs: int, gpu_seconds: float
) -> float:
    """GPU-seconds that a retraining will take in all, told from its epochs so far; ``gpu_seconds``: as estimated.

    By the clock where it is known (``work_s`` when each epoch was heard of): what is behind it, the epochs to come at
    the pace of those seen, and one validation with what else comes last. That counts starting, waiting for a busy
    machine and a share that is not what it is called, which busy seconds do not. Else by busy seconds, of which the
    estimate's start-up is kept.
    """
    seen = epochs[-1].epoch if epochs else 0
    if seen < 1:
        return gpu_seconds
    trained = [e for e in epochs if e.epoch >= 1]
    validation_s = epochs[0].busy_s if epochs[0].epoch == 0 else 0.0
    busy_s = sum(e.busy_s for e in trained) / len(trained)
    if busy_s <= 0.0:
        return gpu_seconds
    if len(work_s) == len(epochs):
        behind_s, first = work_s[-1], len(epochs) - len(trained)
        per_epoch = busy_s
        if len(trained) >= 2 and behind_s > work_s[first]:
            per_epoch = (behind_s - work_s[first]) / (seen - trained[0].epoch)
        # A validation takes longer by the clock in the measure in which epochs do, but for what comes with every epoch.
        slower = min(max(per_epoch / busy_s, 1.0), _SLOWEST)
        return behind_s + (num_epochs - seen) * per_epoch + slower * validation_s
    around_s = max(validation_s, gpu_seconds - busy_s * num_epochs)
    # Start-up is not among the epochs: what of the estimate they do not explain is kept, but no more than a tenth.
    return busy_s * num_epochs + min(around_s, max(validation_s, 0.1 * gpu_seconds))


def _progress(epoch: int, num_epochs: int) -> float:
    """Part of the gain of ``num_epochs`` epochs that is there after ``epoch`` of them."""
    return (1.0 - math.exp(-epoch / (num_epochs * _TAU))) / (1.0 - math.exp(-1.0 / _TAU))


def _is_flat(epochs: tuple[EpochResult, ...], num_epochs: int) -> bool:
    last = max(2, math.ceil(_FLAT_PART * num_epochs))
    if len(epochs) <= last + 1:
        return False
    before = max(e.accuracy for e in epochs[1:-last])
    return max(e.accuracy for e in epochs[-last:]) - before <= _FLAT_GAIN


def _began_at(running: RunningRetrain, profile: StreamProfile) -> float:
    """Accuracy of the model that training began from, which its epochs are compared with: one of the zoo, or the
    serving one."""
    base = running.job.config.base
    for offer in profile.retrain if base else ():
        if offer.config is not None and offer.config.base == base and offer.config.epochs == 0:
            return offer.accuracy_after
    return profile.accuracy_now


class Corrector:
    """Listens to the epochs of running retrainings. ``settle``: a retraining is over without a result."""

    def __init__(
        self,
        config: CorrectionConfig,
        state: SiteState,
        executors: Mapping[str, ExecutorState],
        emit: Emitter,
        want: Callable[[str], None],
        settle: Callable[[StreamState], None],
    ) -> None:
        self._config = config
        self._state = state
        self._executors = executors
        self._emit = emit
        self._want = want
        self._settle = settle

    def progressed(self, event: RetrainProgress, now: float) -> None:
        """An epoch ended. Telemetry may be lost or come twice: epochs are kept in order, gaps are no matter."""
        stream = self._state.streams.get(event.stream_id)
        running = stream.running if stream is not None else None
        if stream is None or running is None or running.job.job_id != event.job_id or running.stopped_s is not None:
            return
        if running.epochs and event.epoch.epoch <= running.epochs[-1].epoch:
            return
        running.epochs = (*running.epochs, event.epoch)
        executor = self._executors.get(running.executor_id)
        if executor is not None:
            running.heard_work_s = (*running.heard_work_s, questions.work_done(running, executor.gpu, now))
        if not running.half_work_s and 2 * event.epoch.epoch >= running.job.config.epochs:
            running.half_work_s = expected_seconds(
                running.epochs, running.heard_work_s, running.job.config.epochs, running.work_s
            )
        profile = (
            next((p for p in stream.profile.retrain if p.retrain_id == running.retrain_id), None)
            if (stream.profile is not None)
            else None
        )
        if stream.profile is None or profile is None or running.job.config.epochs == 0:
            return
        found = assess(
            running.epochs,
            num_epochs=running.job.config.epochs,
            num_validation=running.job.dataset.num_validation,
            accuracy_before=_began_at(running, stream.profile),
            accuracy_after=running.accuracy_predicted,
            gpu_seconds=running.work_s,
            told_after=profile.accuracy_after,
            told_seconds=running.late_work_s or running.work_s,
            config=self._config,
            work_s=running.heard_work_s,
        )
        if found.verdict == "go_on":
            return
        if found.verdict == "stop":
            running.stopped_s = now
        running.late_work_s = found.gpu_seconds
        better = msgspec.structs.replace(profile, accuracy_after=found.accuracy_after)
        stream.profile = msgspec.structs.replace(
            stream.profile, retrain=tuple(better if p is profile else p for p in stream.profile.retrain)
        )
        self._emit.publish(self._corrected(stream, running, found))
        if found.verdict == "tell":
            self._want(f"retraining of {stream.stream_id} {found.reason}")
        self._emit.save()

    def advance(self, now: float) -> None:
        """A stopped retraining whose worker handed nothing in is over."""
        for stream in self._state.streams.values():
            running = stream.running
            if running is not None and running.stopped_s is not None and now - running.stopped_s > _HAND_IN_S:
                self._settle(stream)
                self._want(f"retraining of {stream.stream_id} was stopped and left nothing")

    def _corrected(self, stream: StreamState, running: RunningRetrain, found: Assessment) -> RetrainCorrected:
        return RetrainCorrected(
            stream_id=stream.stream_id,
            window=running.job.window,
            retrain_id=running.retrain_id,
            action="stopped" if found.verdict == "stop" else "told",
            epoch=running.epochs[-1].epoch,
            accuracy_after=found.accuracy_after,
            accuracy_predicted=running.accuracy_predicted,
            gpu_seconds=found.gpu_seconds,
            gpu_seconds_predicted=running.work_s,
            reason=found.reason,
        )
