"""The micro-profiler of a whole site: choices and estimates per stream, with a durable history behind them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from profiler.history import History
from profiler.microprofiler import EstimatorKnobs, estimate_in_detail
from profiler.priors import fit_prior
from profiler.records import Outcome, TrialChoice
from profiler.trials import TrialKnobs, choose_trials
from protocol.plan import StreamProfile
from protocol.schema import DatasetRef, InferenceConfig, RetrainConfig, RetrainResult, StreamSpec, TrialResult

log = logging.getLogger(__name__)


class SiteProfiler:
    """What the coordinator asks of the profiler. ``budget_gpu_s``: busy seconds of a window, all streams."""

    def __init__(
        self,
        history: History,
        retrain: tuple[RetrainConfig, ...],
        inference: tuple[InferenceConfig, ...],
        *,
        num_streams: int,
        budget_gpu_s: float,
        trial_knobs: TrialKnobs | None = None,
        estimator_knobs: EstimatorKnobs | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._history = history
        self._retrain = retrain
        self._inference = inference
        self._budget_gpu_s = budget_gpu_s / max(1, num_streams)
        self._trial_knobs = trial_knobs or TrialKnobs()
        self._estimator_knobs = estimator_knobs or EstimatorKnobs()
        self._wall_clock = wall_clock

    def choose(self, spec: StreamSpec, window: int, dataset: DatasetRef) -> TrialChoice:
        """The trials of a stream in a window, within its part of the budget."""
        choice = choose_trials(
            self._retrain,
            self._inference,
            dataset,
            self._history.view(spec.stream_id),
            budget_gpu_s=self._budget_gpu_s,
            label_s_per_frame=dataset.label_s_per_frame,
            knobs=self._trial_knobs,
        )
        log.debug(
            "trials stream=%s window=%d retrain=%d inference=%d",
            spec.stream_id,
            window,
            len(choice.retrain),
            len(choice.inference),
        )
        return choice

    def estimate(self, spec: StreamSpec, trial: TrialResult, dataset: DatasetRef) -> StreamProfile:
        """The profile of a stream from this window's trials and all that is remembered; both are kept."""
        estimate = estimate_in_detail(
            spec,
            trial,
            dataset,
            self._retrain,
            self._inference,
            self._history.view(spec.stream_id),
            prior=fit_prior(self._history.observations()),
            knobs=self._estimator_knobs,
        )
        now = self._wall_clock()
        self._history.record_trial(trial, time_s=now)
        self._history.record_estimate(estimate, time_s=now)
        return estimate.profile

    def retrained(
        self, spec: StreamSpec, result: RetrainResult, predicted: float, predicted_s: float, promoted: bool
    ) -> None:
        """A retraining ended; its outcome corrects later estimates."""
        del spec
        outcome = Outcome(
            result=result,
            accuracy_predicted=predicted,
            seconds_predicted=predicted_s,
            promoted=promoted,
            reason=result.reason,
        )
        self._history.record_outcome(outcome, time_s=self._wall_clock())

    def window_closed(self, stream_id: str, window: int, predicted: float | None, realised: float | None) -> None:
        """A window ended; the difference corrects later estimates."""
        self._history.record_window(
            stream_id, window, realised=realised, predicted=predicted, time_s=self._wall_clock()
        )
