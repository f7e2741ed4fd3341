"""Real retrainings of drifting streams, measured once, so that estimators can be studied without training again.

``python benchmarks/collect_retrainings.py city-1 city-2`` runs every retraining configuration of those streams in five
windows and adds their rows to ``benchmarks/data/retrainings.csv`` and ``benchmarks/data/trials.csv`` (rows of the
same stream are replaced). ``city-N`` is a camera of the procedural city with seed N and random drift; any other name is
a stream of ``examples/street.toml``. About 40 s of one core per stream. ``benchmarks/data/long`` has four streams in
ten windows: ``--windows 10 --into benchmarks/data/long city-11 city-12 city-13 city-14``.

A window is labelled over the seconds before it (as a site does) and served for the 40 s after. Two accuracies of every
model are kept: on the held-out split of the labels, which is what the system sees (30 to 80 crops), and on several
hundred crops of the window that is then served, which is the truth. A run of 12 epochs is looked at after 2, 5 and 12
epochs: the learning rate is constant and the seed the same, so that the shorter run is its beginning. One
configuration of each window, drawn at random, is the retraining that the site "chose" (``deployed``); it goes live if
the held-out split says that it is better by a point.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from pathlib import Path

import msgspec
import numpy as np
import torch

from executor.learning import checkpoints
from executor.learning.datasets import CropSet
from executor.learning.device import Device
from executor.learning.golden import open_golden
from executor.learning.labeling import frames_to_label, label
from executor.learning.retraining import Retraining
from executor.learning.stepping import FreeStepper
from executor.learning.task import task_of
from executor.learning.trials import run_trials
from executor.streams.open import open_source
from optimizer.config import load_site
from protocol.messages import LabelJob, RetrainJob, TrialJob
from protocol.schema import CheckpointRef, CitySource, DatasetRef, EpochResult, OracleGolden, RetrainConfig, StreamSpec

ROOT = Path(__file__).parent
DATA = ROOT / "data"
WINDOW_S, LABEL_S = 40.0, 20.0
NUM_WINDOWS = 5
EPOCHS = (2, 5, 12)
GROUPS = ((0.0, 0.003), (0.5, 0.002), (1.0, 0.002))  # trained fraction, learning rate
DATA_FRACTIONS = (0.3, 1.0)
CITY_CLASSES = ("person", "cyclist", "car", "van", "bus", "motorcycle")
TRUTH_FPS = 1.5
# (name, share of the training split or crops, epochs): this project's trials and those of the paper.
TRIAL_KINDS = (("short", 64, 4), ("paper", 0.1, 5))


def stream_spec(name: str) -> StreamSpec:
    """The stream of a name (see the module)."""
    if name.startswith("city-"):
        return StreamSpec(
            stream_id=name,
            source=CitySource(
                seed=int(name.removeprefix("city-")), width=320, height=180, num_objects=12.0, drift_period_s=90.0
            ),
            classes=CITY_CLASSES,
            fps=24.0,
            label_fps=2.0,
            crop_px=32,
            exemplar_mb=0.23,
            golden=OracleGolden(seconds_per_frame=0.0, error_rate=0.02),
        )
    site = load_site(ROOT.parent / "examples" / "street.toml")
    spec = next(s for s in site.streams if s.stream_id == name)
    return msgspec.structs.replace(spec, golden=OracleGolden(seconds_per_frame=0.0, error_rate=0.0), crop_px=32)


class Collector:
    """One stream over its windows, in this process."""

    def __init__(self, name: str, store: Path) -> None:
        self.spec, self.store = stream_spec(name), store
        self.seed = sum(name.encode())
        self.draw = np.random.default_rng(self.seed)
        self.task = task_of(self.spec)
        self.source = open_source(self.spec)
        self.device = Device(name="cpu:0", torch_device=torch.device("cpu"))
        self.stepper = FreeStepper()
        self.city = name.startswith("city-")
        self.dataset = self._label(0, *((300.0, 0.5) if self.city else (40.0, 2.0)), None)
        self.serving: CheckpointRef | None = None
        first = RetrainConfig(config_id="first", epochs=12, learning_rate=0.002)
        _, saved = self._run(0, first, (12,), self._truth(0))
        self.serving = saved[12]

    def window(self, window: int) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
        self.dataset = self._label(window, LABEL_S, self.spec.label_fps, self.dataset)
        truth = self._truth(window)
        assert self.serving is not None
        serving, _ = checkpoints.load(self.store, self.serving)
        crops = self.task.read(self.store, self.dataset, self.spec.classes)
        unseen = self.task.evaluate(serving, crops.take(~crops.is_exemplar), self.device)[0]
        split_before = self.task.evaluate(serving, crops.validation, self.device)[0]
        before = self.task.evaluate(serving, truth, self.device)[0]
        common: dict[str, object] = {
            "stream": self.spec.stream_id,
            "window": window,
            "num_train": self.dataset.num_train,
            "num_validation": self.dataset.num_validation,
            "class_counts": " ".join(map(str, self.dataset.class_counts)),
            "num_truth": len(truth),
            "accuracy_now": f"{unseen:.4f}",
            "split_before": f"{split_before:.4f}",
            "before": f"{before:.4f}",
        }
        chosen = (
            GROUPS[int(self.draw.integers(len(GROUPS)))][0],
            1.0 if self.draw.random() < 0.7 else 0.3,
            EPOCHS[int(self.draw.integers(len(EPOCHS)))],
        )
        rows, next_model = [], self.serving
        for fraction, rate in GROUPS:
            for data in DATA_FRACTIONS:
                config = RetrainConfig(
                    config_id=f"t{fraction:g}-d{data:g}",
                    epochs=max(EPOCHS),
                    data_fraction=data,
                    trained_fraction=fraction,
                    learning_rate=rate,
                )
                points, saved = self._run(window, config, EPOCHS, truth)
                for epochs, (split, after, busy_s) in points.items():
                    deployed = (fraction, data, epochs) == chosen
                    rows.append(
                        common
                        | {
                            "trained_fraction": fraction,
                            "learning_rate": rate,
                            "data_fraction": data,
                            "epochs": epochs,
                            "deployed": int(deployed),
                            "split_after": f"{split:.4f}",
                            "after": f"{after:.4f}",
                            "busy_s": f"{busy_s:.4f}",
                        }
                    )
                    if deployed and split > split_before + 0.01:
                        next_model = saved[epochs]
        trials = [row for kind in TRIAL_KINDS for row in self._trials(window, *kind)]
        self.serving = next_model
        return rows, trials

    def _trials(self, window: int, kind: str, amount: float, epochs: int) -> list[dict[str, object]]:
        assert self.serving is not None
        share = min(1.0, amount if amount <= 1.0 else amount / self.dataset.num_train)
        configs = tuple(
            RetrainConfig(config_id=f"t{f:g}", epochs=12, trained_fraction=f, learning_rate=rate) for f, rate in GROUPS
        )
        job = TrialJob(
            job_id="trial",
            stream=self.spec,
            share=1.0,
            window=window,
            dataset=self.dataset,
            checkpoint=self.serving,
            retrain=configs,
            inference=(),
            data_share=share,
            num_epochs=epochs,
            num_frames=0,
            clip_end_s=0.0,
        )
        result = run_trials(job, self.source, self.store, self.device, self.stepper, self.seed, lambda: None)
        return [
            {
                "stream": self.spec.stream_id,
                "window": window,
                "kind": kind,
                "trained_fraction": row.config.trained_fraction,
                "learning_rate": row.config.learning_rate,
                "num_samples": row.num_samples,
                "total_samples": row.total_samples,
                "startup_s": f"{row.startup_s:.4f}",
                "accuracies": " ".join(f"{e.accuracy:.4f}" for e in row.epochs),
                "busy_s": " ".join(f"{e.busy_s:.4f}" for e in row.epochs),
            }
            for row in result.retrain
        ]

    def _run(
        self, window: int, config: RetrainConfig, looks: tuple[int, ...], truth: CropSet
    ) -> tuple[dict[int, tuple[float, float, float]], dict[int, CheckpointRef]]:
        """By epochs: (held-out accuracy, true accuracy, busy seconds so far), and the models."""
        job = RetrainJob(
            job_id="retrain",
            stream=self.spec,
            share=1.0,
            window=window,
            dataset=self.dataset,
            checkpoint=self.serving,
            config=config,
            next_version=1,
            seed=window,
        )
        begun = self.stepper.busy_s()
        crops = self.task.read(self.store, self.dataset, self.spec.classes)
        serving = None if self.serving is None else checkpoints.load(self.store, self.serving)[0]
        points: dict[int, tuple[float, float, float]] = {}
        saved: dict[int, CheckpointRef] = {}
        busy_s = 0.0

        def look(epoch: EpochResult) -> None:
            nonlocal busy_s
            busy_s = self.stepper.busy_s() - begun if epoch.epoch == 0 else busy_s + epoch.busy_s
            if epoch.epoch in looks:
                student = retraining.student
                points[epoch.epoch] = (epoch.accuracy, self.task.evaluate(student, truth, self.device)[0], busy_s)
                saved[epoch.epoch] = checkpoints.save(
                    self.store,
                    student,
                    stream_id=self.spec.stream_id,
                    version=1 + len(list((self.store / "checkpoints").rglob("*.safetensors"))),
                    classes=self.spec.classes,
                    crop_px=self.spec.crop_px,
                    retrain_id=config.config_id,
                    window=window,
                    accuracy=epoch.accuracy,
                )

        retraining = Retraining(job, crops, serving, self.device, self.stepper, look)
        retraining.run()
        return points, saved

    def _label(self, window: int, seconds: float, fps: float, exemplars: DatasetRef | None) -> DatasetRef:
        start = self.spec.start_s + WINDOW_S * window
        job = LabelJob(
            job_id="label",
            stream=msgspec.structs.replace(self.spec, label_fps=fps),
            share=1.0,
            window=window,
            from_s=start - seconds,
            to_s=start,
            exemplars=exemplars,
        )
        result = label(job, self.source, self.store, self.device, self.stepper, self.seed)
        assert result is not None
        return result.dataset

    def _truth(self, window: int) -> CropSet:
        """Crops of the window that is served, labelled without error."""
        start = self.spec.start_s + WINDOW_S * window
        perfect = msgspec.structs.replace(self.spec, golden=OracleGolden(error_rate=0.0, seconds_per_frame=0.0))
        golden = open_golden(perfect, self.device, self.stepper, 0)
        parts = []
        for index in frames_to_label(start, start + WINDOW_S, self.spec.fps, TRUTH_FPS):
            frame = self.source.frame(index)
            labels = golden.label(frame)
            if labels is not None and len(labels):
                parts.append(self.task.examples(frame, labels, self.spec))
        truth: CropSet = self.task.join(parts, self.spec)
        return truth


def merge(path: Path, stream: str, rows: list[dict[str, object]]) -> None:
    """Replace the rows of ``stream`` in the CSV file."""
    kept = []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            kept = [row for row in csv.DictReader(file) if row["stream"] != stream]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("streams", nargs="+", metavar="STREAM", help="city-N, or a stream of examples/street.toml")
    parser.add_argument("--windows", type=int, default=NUM_WINDOWS)
    parser.add_argument("--into", type=Path, default=DATA, help="folder of the two tables")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.into.mkdir(parents=True, exist_ok=True)
    for name in arguments.streams:
        with tempfile.TemporaryDirectory() as folder:
            collector = Collector(name, Path(folder))
            rows: list[dict[str, object]] = []
            trials: list[dict[str, object]] = []
            for window in range(1, arguments.windows + 1):
                found, tried = collector.window(window)
                rows += found
                trials += tried
                print(f"{name} window {window}: {found[0]['num_train']} training crops", flush=True)
        merge(arguments.into / "retrainings.csv", name, rows)
        merge(arguments.into / "trials.csv", name, trials)


if __name__ == "__main__":
    main()
