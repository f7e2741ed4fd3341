"""The micro-profiler of a whole site: choices and estimates per stream, with a durable history behind them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Protocol

import msgspec

from profiler.corrections import from_logit, logit
from profiler.costs import cost_model, group_key
from profiler.history import History
from profiler.knowledge import SiteKnowledge, learn_site
from profiler.microprofiler import EstimatorKnobs, estimate_in_detail, last_accuracy
from profiler.paper import choose_all
from profiler.records import GateRow, LiveAccuracy, Outcome, StreamHistory, TrialChoice
from profiler.retraining import estimate_retrain
from profiler.shares import ShareRun, fit_share_curve
from profiler.trials import Budget, Prospect, TrialKnobs, choose_trials, likely_drift
from profiler.zoo import overhead_s, zoo_profiles
from protocol.events import StreamAccuracy
from protocol.plan import RetrainProfile, StreamProfile
from protocol.schema import (
    DatasetRef,
    InferenceConfig,
    RetrainConfig,
    RetrainResult,
    RetrainRun,
    StreamSpec,
    TrialResult,
)

log = logging.getLogger(__name__)

# With an inference configuration that is worse than this, live accuracy says little about the model.
MIN_RELATIVE = 0.4


class GateEvidence(Protocol):
    """What is remembered of a decision about a retrained model; the struct that carries it is kept whole."""

    @property
    def stream_id(self) -> str: ...
    @property
    def window(self) -> int: ...
    @property
    def stage(self) -> str: ...
    @property
    def decision(self) -> str: ...
    @property
    def retrain_id(self) -> str: ...
    @property
    def version(self) -> int: ...
    @property
    def confidence(self) -> float | None: ...
    @property
    def reason(self) -> str: ...


class SiteProfiler:
    """What the coordinator asks of the profiler. ``budget_gpu_s``: busy seconds of a window, all streams together."""

    def __init__(
        self,
        history: History,
        retrain: tuple[RetrainConfig, ...],
        inference: tuple[InferenceConfig, ...],
        *,
        num_streams: int,
        budget_gpu_s: float,
        window_s: float = 200.0,
        trial_knobs: TrialKnobs | None = None,
        estimator_knobs: EstimatorKnobs | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._history = history
        self._retrain = retrain
        self._inference = inference
        self._budget = Budget(budget_gpu_s, max(1, num_streams))
        self._window_s = window_s
        self._trial_knobs = trial_knobs or TrialKnobs()
        self._estimator_knobs = estimator_knobs or EstimatorKnobs()
        self._wall_clock = wall_clock
        self._site: SiteKnowledge | None = None
        self._live: dict[tuple[str, int], dict[tuple[int, str], tuple[float, int]]] = {}
        self._quality: dict[str, dict[str, float]] = {}

    def choose(
        self,
        spec: StreamSpec,
        window: int,
        dataset: DatasetRef,
        *,
        drift: float | None = None,
        price: float | None = None,
        wait_share: float | None = None,
    ) -> TrialChoice:
        """The trials of a stream in a window, within its part of the budget."""
        if self._estimator_knobs.method == "paper":
            return choose_all(self._retrain, self._inference, dataset)
        history = self._history.view(spec.stream_id)
        choice = choose_trials(
            self._retrain,
            self._inference,
            dataset,
            history,
            budget_gpu_s=self._budget.allowance(window, spec.stream_id),
            label_s_per_frame=dataset.label_s_per_frame,
            knobs=self._trial_knobs,
            prospect=self._prospect(spec, dataset, history, drift, price, wait_share),
        )
        self._budget.spend(window, spec.stream_id, choice.gpu_seconds or 0.0)
        self._history.record_dataset(dataset)
        log.debug(
            "trials stream=%s window=%d retrain=%d inference=%d",
            spec.stream_id,
            window,
            len(choice.retrain),
            len(choice.inference),
        )
        return choice

    def _prospect(
        self,
        spec: StreamSpec,
        dataset: DatasetRef,
        history: StreamHistory,
        drift: float | None,
        price: float | None,
        wait_share: float | None,
    ) -> Prospect:
        """What is expected of the window before any trial; an unknown drift is told from labels and accuracy."""
        site = self._site_knowledge()
        now = last_accuracy(history)
        last_mix = self._history.last_mix(spec.stream_id, dataset.window)
        return Prospect(
            expected=estimate_retrain(None, dataset, self._retrain, now, history, site) if dataset.num_train else (),
            accuracy_now=now if site.gaps is None else from_logit(logit(now) + site.gaps.serving),
            window_s=self._window_s,
            drift=likely_drift(last_mix, dataset, history) if drift is None else drift,
            price=price or 0.0,
            wait_share=wait_share,
            slowness=site.slowness,
        )

    def estimate(self, spec: StreamSpec, trial: TrialResult, dataset: DatasetRef) -> StreamProfile:
        """The profile of a stream from this window's trials and all that is remembered; both are kept."""
        history, site = _before(self._history.view(spec.stream_id), trial), self._site_knowledge()
        estimate = estimate_in_detail(
            spec,
            trial,
            dataset,
            self._retrain,
            self._inference,
            history,
            site=site,
            knobs=self._estimator_knobs,
        )
        zoo: tuple[RetrainProfile, ...] = ()
        if trial.zoo:
            overhead = overhead_s(self._history.outcomes())
            zoo = zoo_profiles(estimate, trial, dataset, self._retrain, history, site, overhead=overhead)
        now = self._wall_clock()
        self._history.record_trial(trial, time_s=now)
        self._history.record_estimate(estimate, time_s=now)
        for row in trial.retrain:
            cost = cost_model(row)
            if cost is not None:
                self._history.record_cost(group_key(row.config), "", cost, time_s=now)
                self._site = None
        self._quality[spec.stream_id] = {r.config.config_id: r.relative_accuracy for r in estimate.inference}
        return msgspec.structs.replace(estimate.profile, retrain=(*estimate.profile.retrain, *zoo))

    def _site_knowledge(self) -> SiteKnowledge:
        # Fitted anew when something was learned: many streams are estimated between two outcomes.
        if self._site is None:
            self._site = learn_site(
                self._history.site_windows(),
                self._history.costs(),
                correct_live=self._estimator_knobs.correct_live,
            )
        return self._site

    def retrained(
        self,
        spec: StreamSpec,
        result: RetrainResult,
        predicted: float,
        predicted_s: float,
        promoted: bool,
        run: RetrainRun | None = None,
    ) -> None:
        """A retraining ended; its outcome corrects later estimates, of costs also those of other streams."""
        del spec
        now = self._wall_clock()
        outcome = Outcome(
            result=result,
            accuracy_predicted=predicted,
            seconds_predicted=predicted_s,
            promoted=promoted,
            reason=result.reason,
            run=run,
        )
        self._history.record_outcome(outcome, time_s=now)
        self._site = None
        if run is not None and run.share is not None:
            self._learn_share(run.device)

    def _learn_share(self, device: str) -> None:
        runs = [
            ShareRun(share=o.run.share, seconds=o.run.elapsed_s, gpu_seconds=o.seconds_predicted)
            for o in self._history.outcomes()
            if o.run is not None and o.run.share is not None and o.run.device == device and o.seconds_predicted
        ]
        curve = fit_share_curve(runs)
        if curve is not None:
            self._history.record_share_curve(device, curve, time_s=self._wall_clock())

    def share_efficiency(self, device: str) -> tuple[tuple[float, float], ...]:
        """Throughput over share of a kind of device as measured; empty = in proportion, as far as is known."""
        curve = self._history.share_curve(device)
        return curve.points if curve is not None and curve.differs else ()

    def record_gate(self, decision: GateEvidence) -> None:
        """Something was decided about a retrained model; kept with its evidence."""
        self._history.record_gate(
            GateRow(
                stream_id=decision.stream_id,
                window=decision.window,
                stage=decision.stage,
                decision=decision.decision,
                retrain_id=decision.retrain_id,
                version=decision.version,
                confidence=decision.confidence,
                reason=decision.reason,
                evidence=msgspec.json.encode(decision).decode(),
            ),
            time_s=self._wall_clock(),
        )

    def measured(self, event: StreamAccuracy) -> None:
        """Live accuracy is added up by model and inference configuration until the window is closed."""
        sums = self._live.setdefault((event.stream_id, event.window), {})
        key = (event.model_version, event.inference_id)
        total, num = sums.get(key, (0.0, 0))
        sums[key] = (total + event.accuracy_sum, num + event.num_scored)

    def window_closed(self, stream_id: str, window: int, predicted: float | None, realised: float | None) -> None:
        """A window ended; the difference corrects later estimates."""
        now = self._wall_clock()
        self._history.record_window(stream_id, window, realised=realised, predicted=predicted, time_s=now)
        live = self._models_live(stream_id, window)
        if live:
            self._history.record_live(stream_id, window, live, time_s=now)
            self._site = None

    def _models_live(self, stream_id: str, window: int) -> tuple[LiveAccuracy, ...]:
        """Live accuracy of every model of the window, each frame's taken back to the best inference configuration."""
        sums = self._live.pop((stream_id, window), {})
        self._live = {key: value for key, value in self._live.items() if key[0] != stream_id or key[1] > window}
        quality = self._quality.get(stream_id, {})
        by_version: dict[int, tuple[float, int]] = {}
        for (version, inference_id), (total, num) in sums.items():
            relative = quality.get(inference_id)
            if relative is None or relative < MIN_RELATIVE:
                continue
            before, count = by_version.get(version, (0.0, 0))
            by_version[version] = (before + total / relative, count + num)
        return tuple(
            LiveAccuracy(version=version, accuracy=min(total / num, 1.0), num_frames=num)
            for version, (total, num) in sorted(by_version.items())
            if num > 0
        )


def _before(history: StreamHistory, trial: TrialResult) -> StreamHistory:
    """What was known before the trials of this window, which may come in several pieces, or again after a restart:
    neither is a second window of experience."""
    last = history.windows[-1] if history.windows else None
    if last is not None and last.window == trial.window and last.trial is not None and _is_piece(last.trial, trial):
        return StreamHistory(stream_id=history.stream_id, windows=history.windows[:-1])
    return history


def _is_piece(earlier: TrialResult, trial: TrialResult) -> bool:
    """Whether all that ``earlier`` tried is in ``trial`` as well."""
    tried, measured = {row.config for row in trial.retrain}, {row.config for row in trial.inference}
    known = all(row.config in tried for row in earlier.retrain)
    return known and all(row.config in measured for row in earlier.inference)
