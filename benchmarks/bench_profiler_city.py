"""Estimates against real retrainings: a small student on drifting city streams, every configuration really run.

``python benchmarks/bench_profiler_city.py --seeds 1,2 --windows 3`` takes about a minute per seed and window on one
core. The estimator learns only from the two retrainings per window that a plan could have made; all others are run for
the truth alone. Compared with the same estimator without history (this window's trials only).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from executor.learning.device import Device
from executor.learning.labeling import label
from executor.learning.retraining import retrain
from executor.learning.stepping import FreeStepper
from executor.learning.trials import run_trials
from executor.streams.open import open_source
from profiler.microprofiler import EstimatorKnobs, estimate_in_detail
from profiler.records import Outcome, StreamHistory, WindowHistory
from profiler.trials import choose_trials
from protocol.messages import LabelJob, RetrainJob, TrialJob
from protocol.schema import (
    CheckpointRef,
    CitySource,
    DatasetRef,
    InferenceConfig,
    OracleGolden,
    Record,
    RetrainConfig,
    RetrainResult,
    StreamSpec,
)

WINDOW_S = 30.0
# Windows lie apart, so that each begins with a drift that the serving model has not seen.
STEP_S = 45.0
BUDGET_GPU_S = 4.0
CLASSES = ("person", "cyclist", "car", "van", "bus", "motorcycle")
RETRAIN = (
    RetrainConfig(config_id="head-3", epochs=3, data_fraction=0.5, trained_fraction=0.0, learning_rate=0.003),
    RetrainConfig(config_id="head-10", epochs=10, trained_fraction=0.0, learning_rate=0.003),
    RetrainConfig(config_id="half-8", epochs=8, trained_fraction=0.5, learning_rate=0.002),
    RetrainConfig(config_id="all-3", epochs=3, data_fraction=0.5, learning_rate=0.002),
    RetrainConfig(config_id="all-8", epochs=8, learning_rate=0.002),
    RetrainConfig(config_id="all-20", epochs=20, learning_rate=0.002),
)
INFERENCE = (InferenceConfig(config_id="full"), InferenceConfig(config_id="fifth", frame_interval=5))


class Row(Record, frozen=True, kw_only=True):
    """One configuration in one window; seconds are busy seconds."""

    window: int
    config_id: str
    alone: float  # estimate from this window's trials
    estimated: float
    error: float
    reached: float
    estimated_s: float
    took_s: float
    trials_s: float


class Bench:
    """One stream over several windows, in this process."""

    def __init__(self, seed: int, store: Path) -> None:
        self.seed, self.store = seed, store
        source = CitySource(seed=seed, drift_period_s=STEP_S)
        self.spec = StreamSpec(
            stream_id=f"city-{seed}", source=source, classes=CLASSES, golden=OracleGolden(seconds_per_frame=0.0)
        )
        self.source = open_source(self.spec)
        self.device = Device(name="cpu:0", torch_device=torch.device("cpu"))
        self.stepper = FreeStepper()
        self.history = StreamHistory(stream_id=self.spec.stream_id)
        self.dataset = self._label(0, None)
        first = self._retrain(0, RetrainConfig(config_id="first", epochs=15), None)
        assert first.checkpoint is not None
        self.serving = first.checkpoint

    def window(self, window: int) -> list[Row]:
        self.dataset = self._label(window, self.dataset)
        choice = choose_trials(RETRAIN, INFERENCE, self.dataset, self.history, budget_gpu_s=BUDGET_GPU_S)
        job = TrialJob(
            job_id="trial",
            stream=self.spec,
            share=1.0,
            window=window,
            dataset=self.dataset,
            checkpoint=self.serving,
            retrain=choice.retrain,
            inference=choice.inference,
            data_share=choice.data_share,
            num_epochs=choice.num_epochs,
            num_frames=choice.num_frames,
            clip_end_s=STEP_S * window + WINDOW_S,
        )
        before_s = self.stepper.busy_s()
        trial = run_trials(job, self.source, self.store, self.device, self.stepper, self.seed, lambda: None)
        trials_s = self.stepper.busy_s() - before_s
        knobs = EstimatorKnobs(use_history=False)
        alone = estimate_in_detail(self.spec, trial, self.dataset, RETRAIN, INFERENCE, self.history, knobs=knobs)
        made = estimate_in_detail(self.spec, trial, self.dataset, RETRAIN, INFERENCE, self.history)
        truth = {config: self._retrain(window, config, self.serving) for config in RETRAIN}
        without = {row.config: row.accuracy_after for row in alone.retrain}
        rows = [
            Row(
                window=window,
                config_id=row.config.config_id,
                alone=without.get(row.config, row.accuracy_after),
                estimated=row.accuracy_after,
                error=row.accuracy_error,
                reached=truth[row.config].accuracy_after,
                estimated_s=row.gpu_seconds,
                took_s=truth[row.config].busy_s,
                trials_s=trials_s,
            )
            for row in made.retrain
        ]
        best = max(made.retrain, key=lambda row: row.accuracy_after).config
        tried = dict.fromkeys((best, RETRAIN[(4 * window) % len(RETRAIN)]))
        outcomes = tuple(
            Outcome(result=truth[config], accuracy_predicted=None, seconds_predicted=None, promoted=config == best)
            for config in tried
        )
        past = WindowHistory(window=window, trial=trial, estimate=made, outcomes=outcomes)
        self.history = StreamHistory(stream_id=self.spec.stream_id, windows=(*self.history.windows, past))
        retrained = truth[best]
        if retrained.checkpoint is not None and retrained.accuracy_after > trial.accuracy_now:
            self.serving = retrained.checkpoint
        return rows

    def _label(self, window: int, exemplars: DatasetRef | None) -> DatasetRef:
        start = STEP_S * window
        job = LabelJob(
            job_id="label",
            stream=self.spec,
            share=1.0,
            window=window,
            from_s=start,
            to_s=start + WINDOW_S,
            exemplars=exemplars,
        )
        result = label(job, self.source, self.store, self.device, self.stepper, self.seed)
        assert result is not None
        return result.dataset

    def _retrain(self, window: int, config: RetrainConfig, checkpoint: CheckpointRef | None) -> RetrainResult:
        job = RetrainJob(
            job_id="retrain",
            stream=self.spec,
            share=1.0,
            window=window,
            dataset=self.dataset,
            checkpoint=checkpoint,
            config=config,
            next_version=window + 1,
        )
        return retrain(job, self.store, self.device, self.stepper, lambda: None, lambda _: None)


def show(rows: list[Row], console: Console) -> None:
    table = Table(title="Accuracy after and busy seconds, all configurations really run", title_justify="left")
    for name in (
        "window",
        "n",
        "median |error|",
        "90th",
        "trials alone",
        "90th",
        "80 % covers",
        "seconds",
        "trials/all",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for window in sorted({row.window for row in rows}):
        mine = [row for row in rows if row.window == window]
        errors = np.array([abs(row.estimated - row.reached) for row in mine])
        alone = np.array([abs(row.alone - row.reached) for row in mine])
        covered = np.mean([e <= 1.2816 * row.error for e, row in zip(errors, mine, strict=True)])
        cost = np.median([abs(row.estimated_s / row.took_s - 1.0) for row in mine])
        exhaustive = sum(row.took_s for row in mine)
        part = sum(row.trials_s for row in mine) / len(RETRAIN) / exhaustive
        table.add_row(
            str(window),
            str(len(mine)),
            f"{np.median(errors):.3f}",
            f"{np.quantile(errors, 0.9):.3f}",
            f"{np.median(alone):.3f}",
            f"{np.quantile(alone, 0.9):.3f}",
            f"{100 * covered:.0f} %",
            f"±{100 * cost:.0f} %",
            f"{100 * part:.0f} %",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="1,2")
    parser.add_argument("--windows", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(width=120)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in (int(text) for text in arguments.seeds.split(",")):
            bench = Bench(seed, Path(folder) / str(seed))
            for window in range(1, arguments.windows + 1):
                found = bench.window(window)
                rows += found
                for row in found:
                    console.print(
                        f"seed {seed} window {window} {row.config_id:8s} estimated {row.estimated:.3f}"
                        f" ± {row.error:.3f} (trials alone {row.alone:.3f}) reached {row.reached:.3f};"
                        f" {row.estimated_s:.2f} s estimated, {row.took_s:.2f} s taken",
                        highlight=False,
                    )
    show(rows, console)


if __name__ == "__main__":
    main()
