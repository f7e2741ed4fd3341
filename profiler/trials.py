"""Which configurations to try in this window, on how much data, for how long.

Micro-profiling takes a small sample of the window's labelled data, few epochs, and leaves out configurations that
history shows far from the Pareto front of cost and accuracy (NSDI 2022 section 4.3). Beyond the paper: a floor on
the sample size, one trial for all configurations that differ only in epochs and data fraction, a budget in
GPU-seconds, and pruned configurations come back after a while or when accuracy has fallen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from profiler.costs import FIXED_S, CostModel, GroupKey, cost_model, group_key, neighbour_cost
from profiler.records import ConfigEstimate, StreamHistory, TrialChoice, WindowHistory
from profiler.slowness import Slowness
from profiler.worth import mix_distance, trial_worths
from protocol.schema import DatasetRef, InferenceConfig, Record, RetrainConfig

MOST_PARTS = 2.0
# What counts as all new: a class mix so far (total variation) from the last one, accuracy so far below the promise.
MIX_DRIFT = 0.3
SHORTFALL_DRIFT = 0.15


class TrialKnobs(Record, frozen=True, kw_only=True):
    """How much to try.

    ``data_share``: part of the training split (0.05 to 0.1 in the paper); ``min_samples``: but never fewer than
    this, where there are as many; ``max_samples``: what a budget with room raises the sample to.
    ``max_epochs``/``min_epochs``: epochs of a trial, the latter when the budget is tight.
    ``max_frames``/``min_frames``: frames that inference configurations are measured on.
    ``prune_margin``: a group is pruned when another one reaches this much more accuracy for no more cost;
    ``min_trials``: but not before it was tried in this many windows. ``revive_after``: windows after which a
    pruned group is tried again. ``accuracy_drop``: fall of the realised accuracy against the mean of the
    earlier windows that revives all; ``new_drift``: a drift that does so too. ``min_worth``: rise of the
    window-averaged accuracy that a trial has to promise.
    """

    data_share: float = 0.1
    min_samples: int = 64
    max_samples: int = 128
    max_epochs: int = 4
    min_epochs: int = 2
    max_frames: int = 60
    min_frames: int = 30
    prune_margin: float = 0.04
    min_trials: int = 2
    revive_after: int = 4
    accuracy_drop: float = 0.05
    new_drift: float = 0.5
    min_worth: float = 0.002


class Budget:
    """GPU-seconds of a window for the trials of all streams: what one leaves is there for those that come after it.

    A stream gets its part of what is left and at most ``MOST_PARTS`` parts, so that the first does not take all.
    """

    def __init__(self, gpu_s: float, num_streams: int) -> None:
        self._gpu_s, self._num_streams = gpu_s, num_streams
        self._window = -1
        self._spent: dict[str, float] = {}

    def allowance(self, window: int, stream_id: str) -> float:
        """What a stream may spend in a window."""
        if window != self._window:
            self._window, self._spent = window, {}
        left = max(0.0, self._gpu_s - sum(s for name, s in self._spent.items() if name != stream_id))
        to_come = max(1, self._num_streams - len(self._spent.keys() - {stream_id}))
        return min(left, max(left / to_come, MOST_PARTS * self._gpu_s / self._num_streams))

    def spend(self, window: int, stream_id: str, gpu_s: float) -> None:
        """What the trials chosen for a stream are expected to take."""
        if window == self._window:
            self._spent[stream_id] = gpu_s


class Prospect(Record, frozen=True, kw_only=True):
    """What is expected of this window before any trial.

    ``expected``: estimates from history alone; ``accuracy_now``: of the serving model, as far as is known. ``drift``:
    how much the stream has changed, 0 to 1. ``price``: accuracy-seconds that a GPU-second is worth elsewhere.
    ``wait_share``: the share at which trials run while the stream's retraining waits for them; None = nothing waits.
    ``slowness``: what the clock adds to busy seconds.
    """

    expected: tuple[ConfigEstimate, ...]
    accuracy_now: float
    window_s: float
    drift: float = 0.0
    price: float = 0.0
    wait_share: float | None = None
    slowness: Slowness = Slowness()

    def cost(self, seconds: float) -> float:
        """Window-averaged accuracy that a trial of so many busy seconds costs, elsewhere and by being waited for."""
        waiting = 0.0
        if self.wait_share is not None:
            gain = max((row.accuracy_after - self.accuracy_now for row in self.expected), default=0.0)
            waiting = max(0.0, gain) * self.slowness.factor / self.wait_share
        return (self.price + waiting) * seconds / self.window_s


def likely_drift(last_mix: Sequence[int], dataset: DatasetRef, history: StreamHistory) -> float:
    """How much a stream has changed, 0 to 1, told from the labels' class mix and from what accuracy fell short by.

    ``last_mix``: crops per class of the labels before; empty = there were none. For want of a better detector.
    """
    mix = mix_distance(last_mix, dataset.class_counts) / MIX_DRIFT
    last = history.windows[-1] if history.windows else None
    short = 0.0
    if last is not None and last.predicted is not None and last.realised is not None:
        short = (last.predicted - last.realised) / SHORTFALL_DRIFT
    return min(max(mix, short, 0.0), 1.0)


def choose_trials(
    retrain: Sequence[RetrainConfig],
    inference: Sequence[InferenceConfig],
    dataset: DatasetRef,
    history: StreamHistory,
    *,
    budget_gpu_s: float,
    label_s_per_frame: float = 0.0,
    knobs: TrialKnobs | None = None,
    prospect: Prospect | None = None,
) -> TrialChoice:
    """Choose this window's trials within ``budget_gpu_s`` busy seconds at share 1 (may be ``inf``).

    Without any trial in ``history`` everything is tried whatever the budget, as nothing is known about costs. Of
    each group that shares a trial the configuration with the most data and epochs stands for all.
    ``label_s_per_frame``: golden-model seconds for a frame that inference is measured on. Retraining trials come
    before inference measurements; within them, by their worth per second where ``prospect`` tells what is expected
    without any of them, and only as long as one is worth its seconds; else groups longest without a trial first,
    then those nearest to the front. Samples are cut before epochs and epochs before groups. An empty
    data set gives no retraining trials. Raises ValueError for a negative or NaN budget.
    """
    knobs = knobs or TrialKnobs()
    if not budget_gpu_s >= 0.0:
        raise ValueError(f"budget_gpu_s must be 0 or more, not {budget_gpu_s}")
    num_samples = min(dataset.num_train, max(math.ceil(knobs.data_share * dataset.num_train), knobs.min_samples))
    groups = representatives(retrain) if num_samples > 0 else {}
    longest = max((config.epochs for config in retrain), default=1)
    epochs = max(min(knobs.max_epochs, longest), 1)
    share = num_samples / dataset.num_train if dataset.num_train > 0 else 0.0
    costs = _known_costs(history)
    if not costs or not any(w.trial is not None and w.trial.inference for w in history.windows):
        return TrialChoice(
            retrain=tuple(groups.values()),
            inference=tuple(inference),
            data_share=share,
            num_epochs=epochs,
            num_frames=knobs.max_frames,
        )

    drift = prospect.drift if prospect is not None else 0.0
    revived = _accuracy_fell(history, knobs) or drift >= knobs.new_drift
    pruned = set() if revived else _far_from_front(groups, history, knobs)
    order = sorted((k for k in groups if k not in pruned), key=lambda k: (-_age(k, history), -_promise(k, history)))
    if prospect is not None:
        order = worth_trying(order, prospect, costs, dataset, num_samples, epochs, knobs)
    more = min(dataset.num_train, max(num_samples, knobs.max_samples))
    few = max(min(knobs.min_epochs, epochs), 1)
    measuring = _inference_seconds(inference, history, label_s_per_frame) * knobs.min_frames
    # Largest trials first; the bigger sample only when it leaves enough to measure inference as well.
    for size, num_epochs, rest in ((more, epochs, measuring), (num_samples, epochs, 0.0), (num_samples, few, 0.0)):
        chosen, spent = _fill(order, costs, size, num_epochs, budget_gpu_s - rest)
        if len(chosen) == len(order):
            break
    share = size / dataset.num_train if dataset.num_train > 0 else 0.0
    frames, measured_s = _frames_for(inference, history, budget_gpu_s - spent, label_s_per_frame, knobs)
    return TrialChoice(
        retrain=tuple(groups[key] for key in chosen),
        inference=tuple(inference) if frames else (),
        data_share=share if chosen else 0.0,
        num_epochs=num_epochs,
        num_frames=frames,
        gpu_seconds=spent + measured_s,
        pruned=tuple(c.config_id for c in retrain if group_key(c) in pruned),
        postponed=tuple(c.config_id for c in retrain if group_key(c) in set(order) - set(chosen)),
    )


def worth_trying(
    order: Sequence[GroupKey],
    prospect: Prospect,
    costs: dict[GroupKey, CostModel],
    dataset: DatasetRef,
    num_samples: int,
    num_epochs: int,
    knobs: TrialKnobs,
) -> list[GroupKey]:
    """The groups that may change the plan by enough to pay for their trial, best first."""
    known = {key: cost for key in order if (cost := costs.get(key) or neighbour_cost(key, costs)) is not None}
    worths = trial_worths(
        prospect.expected,
        prospect.accuracy_now,
        known,
        window_s=prospect.window_s,
        num_validation=dataset.num_validation,
        num_samples=num_samples,
        num_epochs=num_epochs,
        drift=prospect.drift,
        price=prospect.price,
    )
    chosen = [w for w in worths if w.gain >= knobs.min_worth + prospect.cost(w.seconds)]
    # Whoever waits waits for all of them, and for the look at the serving model that every trial job begins with.
    look_s = FIXED_S + max((cost.finish_s for cost in known.values()), default=0.0)
    while chosen and max(w.gain for w in chosen) < prospect.cost(look_s + sum(w.seconds for w in chosen)):
        chosen.pop()
    return [w.key for w in chosen]


def representatives(retrain: Sequence[RetrainConfig]) -> dict[GroupKey, RetrainConfig]:
    """Of each group that shares a trial the configuration with the most data and epochs, which stands for all."""
    groups: dict[GroupKey, RetrainConfig] = {}
    for config in retrain:
        key = group_key(config)
        if key not in groups or (config.data_fraction, config.epochs) > (groups[key].data_fraction, groups[key].epochs):
            groups[key] = config
    return groups


def _known_costs(history: StreamHistory) -> dict[GroupKey, CostModel]:
    costs: dict[GroupKey, CostModel] = {}
    for window in history.windows:
        for row in window.trial.retrain if window.trial is not None else ():
            cost = cost_model(row)
            if cost is not None:
                costs[group_key(row.config)] = cost
    return costs


def _fill(
    order: Sequence[GroupKey], costs: dict[GroupKey, CostModel], num_samples: int, num_epochs: int, budget: float
) -> tuple[list[GroupKey], float]:
    chosen: list[GroupKey] = []
    spent = 0.0
    for key in order:
        cost = costs.get(key) or neighbour_cost(key, costs)
        seconds = cost.trial_seconds(num_samples, num_epochs) if cost is not None else math.inf
        if spent + seconds <= budget:
            chosen.append(key)
            spent += seconds
    return chosen, spent


def _frames_for(
    inference: Sequence[InferenceConfig], history: StreamHistory, budget: float, label_s: float, knobs: TrialKnobs
) -> tuple[int, float]:
    """Frames to measure every inference configuration on and the seconds that takes; (0, 0) = keep the last."""
    busy = _last_busy(history)
    if not inference or not busy:
        return 0, 0.0
    per_frame = _inference_seconds(inference, history, label_s)
    affordable = budget / per_frame if per_frame > 0.0 else math.inf
    frames = math.floor(min(float(knobs.max_frames), affordable))
    if frames < knobs.min_frames:
        # A configuration that was never measured must be, whatever the budget: it would be guessed otherwise.
        frames = knobs.min_frames if any(config not in busy for config in inference) else 0
    return frames, frames * per_frame


def _inference_seconds(inference: Sequence[InferenceConfig], history: StreamHistory, label_s: float) -> float:
    """Seconds per frame of measuring all configurations, the golden model included."""
    busy = _last_busy(history)
    return label_s + sum(busy.get(config, max(busy.values(), default=0.0)) for config in inference)


def _last_busy(history: StreamHistory) -> dict[InferenceConfig, float]:
    busy: dict[InferenceConfig, float] = {}
    for window in history.windows:
        for row in window.trial.inference if window.trial is not None else ():
            busy[row.config] = row.busy_s_per_frame
    return busy


def _age(key: GroupKey, history: StreamHistory) -> int:
    """Windows since the group's last trial, capped at the history's length (= never)."""
    for age, window in enumerate(reversed(history.windows)):
        if window.trial is not None and any(group_key(row.config) == key for row in window.trial.retrain):
            return age
    return len(history.windows)


def _num_trials(key: GroupKey, history: StreamHistory) -> int:
    return sum(
        window.trial is not None and any(group_key(row.config) == key for row in window.trial.retrain)
        for window in history.windows
    )


def _last_estimates(history: StreamHistory) -> dict[RetrainConfig, tuple[float, float]]:
    """(GPU-seconds, accuracy after less accuracy then) of every configuration when last estimated."""
    found: dict[RetrainConfig, tuple[float, float]] = {}
    for window in history.windows:
        if window.estimate is not None:
            for row in window.estimate.retrain:
                found[row.config] = (row.gpu_seconds, row.accuracy_after - window.estimate.accuracy_validated)
    return found


def _promise(key: GroupKey, history: StreamHistory) -> float:
    return max((gain for config, (_, gain) in _last_estimates(history).items() if group_key(config) == key), default=1)


def _far_from_front(groups: dict[GroupKey, RetrainConfig], history: StreamHistory, knobs: TrialKnobs) -> set[GroupKey]:
    """Groups of which every configuration is clearly beaten by one of another group at no more cost."""
    last = _last_estimates(history)
    far = set()
    for key in groups:
        mine = [point for config, point in last.items() if group_key(config) == key]
        others = [point for config, point in last.items() if group_key(config) != key and group_key(config) in groups]
        beaten = mine and all(
            any(c <= cost and g >= gain + knobs.prune_margin for c, g in others) for cost, gain in mine
        )
        if beaten and _num_trials(key, history) >= knobs.min_trials and _age(key, history) < knobs.revive_after:
            far.add(key)
    return far


def _accuracy_fell(history: StreamHistory, knobs: TrialKnobs) -> bool:
    levels = [level for level in map(_level, history.windows) if level is not None]
    if len(levels) < 2:
        return False
    return levels[-1] < sum(levels[:-1]) / len(levels[:-1]) - knobs.accuracy_drop


def _level(window: WindowHistory) -> float | None:
    if window.realised is not None:
        return window.realised
    return window.trial.accuracy_now if window.trial is not None else None
