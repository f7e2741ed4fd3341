"""One label budget, four ways to spend it: real students, real city frames, real retrainings, not in real time.

``python benchmarks/bench_labels.py --seeds 1,2,3,4,5 --out labels.jsonl``: four minutes of processor time per seed;
``--table labels.jsonl`` prints the table of what is there. A seed is a site of cameras of the procedural city; in every
window some of them, drawn at random, see a sudden drift, the others go on as before. Every arm sees the same frames,
starts from the same first models and has the same golden-model seconds per window for all cameras:

uniform: the same number of frames of every camera, evenly spaced.
streams: frames are given to cameras by need (optimizer/label_budget.py: errors to be expected).
frames: as many of every camera, drawn where the student is unsure and rare classes are (executor/learning/sampling.py).
adaptive: both, as ``[labels] allocation = "adaptive"`` does.

Labelling, allocation, drift detector, retraining, gate and the comparison in the shadow are those of the product; the
time is the stream's. Labels are taken over the last seconds of a window and the retrained model serves from the swap on
(the same moment in all arms). What is compared is the accuracy of the serving models on true labels of the whole
window, averaged over cameras and windows; it decides nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from executor.learning import checkpoints
from executor.learning.canary import compare
from executor.learning.datasets import CropSet
from executor.learning.device import Device
from executor.learning.inference import CropClassifier, InferenceEngine
from executor.learning.labeling import frames_to_label, label, look
from executor.learning.retraining import retrain
from executor.learning.signals import SignalSums
from executor.learning.stepping import FreeStepper
from executor.learning.task import task_of
from executor.streams.open import open_source
from optimizer import gate
from optimizer.config import GateConfig
from optimizer.drifting import Detector
from optimizer.label_budget import LabelNeed, allocate
from protocol.messages import CanaryJob, LabelJob, RetrainJob
from protocol.schema import (
    CheckpointRef,
    CitySource,
    DatasetRef,
    DriftEvent,
    InferenceConfig,
    LabelResult,
    OracleGolden,
    Record,
    RetrainConfig,
    RetrainResult,
    StreamSignals,
    StreamSpec,
)

CLASSES = ("person", "cyclist", "car", "van", "bus", "motorcycle")
WINDOW_S, LABEL_S, SWAP_S = 60.0, 24.0, 10.0
FPS, LABEL_FPS = 24.0, 2.0
# Nominal: the oracle burns nothing here, the budget counts its frames.
GOLDEN_S = 0.02
FRAMES_PER_CAMERA = 12
UNIFORM_SHARE = 0.4
MIN_FRAMES = 4
DRIFTS_PER_WINDOW = 1
CONFIG = RetrainConfig(config_id="all-8", epochs=8, learning_rate=0.002)
TRUTH_FPS, SIGNAL_FPS = 0.8, 1.0
KINDS = {
    "light": ("dusk", "night", "day"),
    "weather": ("rain", "fog", "snow", "clear"),
    "appearance": ("winter", "fleet", "summer"),
    "class_mix": ("freight", "weekend", "festival", "commute"),
}
Arm = Literal["uniform", "streams", "frames", "adaptive"]
ARMS: tuple[Arm, ...] = ("uniform", "streams", "frames", "adaptive")
CPU = Device(name="cpu:0", torch_device=torch.device("cpu"))


class Row(Record, frozen=True, kw_only=True):
    """One camera in one window of one arm. ``accuracy``: of what served, over the whole window; ``measured``: what the
    labels said of the model that served, ``true`` what it was worth on that stretch."""

    seed: int
    arm: str
    window: int
    stream: str
    accuracy: float
    drifted: bool
    score: float
    num_frames: int
    num_labels: int
    class_counts: tuple[int, ...]
    measured: float
    true: float
    decision: str
    retrain_s: float


def drifts_of(seed: int, num_cameras: int, num_windows: int) -> list[list[DriftEvent]]:
    """Per camera; in every window so many cameras see one, shortly before the labels are taken."""
    dice = np.random.default_rng([seed, 11])
    found: list[list[DriftEvent]] = [[] for _ in range(num_cameras)]
    now: list[dict[str, str]] = [{} for _ in range(num_cameras)]
    for window in range(num_windows):
        for camera in dice.choice(num_cameras, DRIFTS_PER_WINDOW, replace=False):
            kind = str(dice.choice(sorted(KINDS)))
            to = str(dice.choice([level for level in KINDS[kind] if level != now[camera].get(kind)]))
            now[camera][kind] = to
            at_s = WINDOW_S * (window + 1) - LABEL_S - 6.0
            found[camera].append(DriftEvent(kind=kind, at_s=at_s, to=to, over_s=3.0))  # type: ignore[arg-type]
    return found


class Camera:
    """One stream of one arm."""

    def __init__(self, seed: int, number: int, drift: list[DriftEvent], store: Path) -> None:
        self.store = store
        self.seed = 100 * seed + number
        self.spec = StreamSpec(
            stream_id=f"city-{self.seed}",
            source=CitySource(
                seed=self.seed, width=320, height=180, num_objects=10.0, drift=tuple(drift), drift_period_s=0.0
            ),
            classes=CLASSES,
            fps=FPS,
            label_fps=LABEL_FPS,
            crop_px=32,
            exemplar_mb=0.23,
            golden=OracleGolden(seconds_per_frame=0.0, error_rate=0.02),
        )
        self.events = drift
        self.source = open_source(self.spec)
        self.task = task_of(self.spec)
        self.detector = Detector()
        self.expected: float | None = None
        self.known: float | None = None  # accuracy of what serves, as last measured or as expected when it went live
        self.dataset: DatasetRef | None = None
        self.serving: CheckpointRef | None = None
        self.version = 1

    def first_model(self) -> None:
        """From the time before the start, as a site's bootstrap does it, and without a budget."""
        self.dataset = self.label(-1, from_s=-200.0, to_s=0.0, num_frames=0, uniform_share=1.0).dataset
        self.serving = self.train(RetrainConfig(config_id="first", epochs=8, learning_rate=0.002), 0).checkpoint

    def label(self, window: int, *, from_s: float, to_s: float, num_frames: int, uniform_share: float) -> LabelResult:
        spec = self.spec if window >= 0 else msgspec.structs.replace(self.spec, label_fps=LABEL_FPS / 4)
        job = LabelJob(
            job_id="label",
            stream=spec,
            share=1.0,
            window=window + 1,
            from_s=from_s,
            to_s=to_s,
            exemplars=self.dataset,
            checkpoint=self.serving,
            num_frames=num_frames,
            uniform_share=uniform_share,
        )
        result = label(job, self.source, self.store, CPU, FreeStepper(), self.seed)
        assert result is not None
        return result

    def train(self, config: RetrainConfig, window: int) -> RetrainResult:
        assert self.dataset is not None
        job = RetrainJob(
            job_id="retrain",
            stream=self.spec,
            share=1.0,
            window=window,
            dataset=self.dataset,
            checkpoint=self.serving,
            config=config,
            next_version=self.version,
            seed=window,
        )
        self.version += 1
        return retrain(job, self.store, CPU, FreeStepper(), lambda: None, lambda _: None)

    def serve(self, from_s: float, to_s: float) -> float:
        """Signals of serving go to the detector; the mean confidence."""
        assert self.serving is not None
        student, _ = checkpoints.load(self.store, self.serving)
        analyser = CropClassifier(student, CPU, 1)
        engine = InferenceEngine(analyser, InferenceConfig(config_id="all", resolution_px=32))
        confidences = []
        for second in np.arange(from_s, to_s, 1.0 / SIGNAL_FPS):
            sums = SignalSums()
            outcome = engine.process(self.source.frame(round(second * FPS)))
            if outcome.found is not None:
                sums.add(outcome.found)
            signals: StreamSignals | None = sums.means()
            if signals is not None:
                confidences.append(signals.confidence)
                self.detector.add(signals, 1.0 / SIGNAL_FPS)
        return statistics.fmean(confidences[-10:]) if confidences else 1.0

    def true_accuracy(self, ref: CheckpointRef, from_s: float, to_s: float) -> float:
        """On true labels, mean over frames."""
        student, _ = checkpoints.load(self.store, ref)
        return float(self.task.serving_accuracy(student, self.truth(from_s, to_s), CPU))

    def truth(self, from_s: float, to_s: float) -> CropSet:
        perfect = msgspec.structs.replace(self.spec, golden=OracleGolden(error_rate=0.0, seconds_per_frame=0.0))
        frames = frames_to_label(from_s, to_s, FPS, TRUTH_FPS)
        found: CropSet = look(self.source, perfect, frames, CPU, FreeStepper(), 0).examples
        return found

    def retrain(self, window: int, swap_s: float, measured: float) -> tuple[CheckpointRef, str, float]:
        """(what serves from ``swap_s`` on, what the gate said, busy seconds). ``measured``: the accuracy before.

        A model on trial is compared in the shadow on the ten seconds before the swap, and then decided upon.
        """
        assert self.serving is not None
        result = self.train(CONFIG, window + 1)
        config = GateConfig()
        verdict = gate.judge_retraining(result, config, self.serving.version)
        if verdict.decision == "on_trial":
            assert result.checkpoint is not None
            job = CanaryJob(
                job_id="canary",
                stream=self.spec,
                share=1.0,
                window=0,
                from_s=swap_s - SWAP_S,
                to_s=swap_s,
                label_fps=1.0,
                candidate=result.checkpoint,
                previous=self.serving,
            )
            fresh = compare(job, self.source, self.store, CPU, FreeStepper(), self.seed, lambda: None).paired
            found = gate.judge_shadow(result.paired, fresh, config, over=True)
            assert found is not None
            verdict = found
        if verdict.decision == "promoted" and result.checkpoint is not None:
            self.detector.reset()
            self.expected = self.known = gate.accuracy_when_live(measured, result)
            return result.checkpoint, verdict.decision, result.busy_s
        return self.serving, verdict.decision, result.busy_s


def run_arm(
    seed: int, arm: Arm, num_cameras: int, num_windows: int, frames: int, base: Path, folder: Path
) -> list[Row]:
    """All windows of one arm."""
    drifts = drifts_of(seed, num_cameras, num_windows)
    cameras = []
    for number in range(num_cameras):
        store = folder / str(number)
        shutil.copytree(base / str(number), store)
        camera = Camera(seed, number, drifts[number], store)
        camera.dataset, camera.serving = msgspec.json.decode(
            (store / "first.json").read_bytes(), type=tuple[DatasetRef, CheckpointRef]
        )
        camera.version = 2
        cameras.append(camera)
    confidences = [camera.serve(0.0, WINDOW_S) for camera in cameras]
    rows = []
    for window in range(num_windows):
        end_s = WINDOW_S * (window + 1)
        needs = [
            LabelNeed(
                stream_id=camera.spec.stream_id,
                num_wanted=round(LABEL_S * LABEL_FPS),
                seconds_per_frame=GOLDEN_S,
                drift=camera.detector.report.score,
                accuracy=camera.known,
                doubt=1.0 - confidence,
            )
            for camera, confidence in zip(cameras, confidences, strict=True)
        ]
        counts = allocate(
            needs,
            frames * num_cameras * GOLDEN_S,
            allocation="adaptive" if arm in ("streams", "adaptive") else "uniform",
            uniform_share=UNIFORM_SHARE,
            min_frames=MIN_FRAMES,
        )
        for number, camera in enumerate(cameras):
            assert camera.serving is not None
            score = camera.detector.report.score
            before = camera.serving
            found = camera.label(
                window,
                from_s=end_s - LABEL_S,
                to_s=end_s,
                num_frames=counts[camera.spec.stream_id],
                uniform_share=UNIFORM_SHARE if arm in ("frames", "adaptive") else 1.0,
            )
            camera.dataset, measured = found.dataset, found.agreement or 0.0
            camera.detector.labelled(measured, found.num_pieces, camera.expected)
            camera.known = measured
            true = camera.true_accuracy(before, end_s - LABEL_S, end_s)
            after, decision, busy_s = camera.retrain(window, end_s + SWAP_S, measured)
            old = camera.true_accuracy(before, end_s, end_s + SWAP_S)
            new = camera.true_accuracy(after, end_s + SWAP_S, end_s + WINDOW_S)
            camera.serving = after
            confidences[number] = camera.serve(end_s + SWAP_S, end_s + WINDOW_S)
            rows.append(
                Row(
                    seed=seed,
                    arm=arm,
                    window=window,
                    stream=camera.spec.stream_id,
                    accuracy=(SWAP_S * old + (WINDOW_S - SWAP_S) * new) / WINDOW_S,
                    drifted=any(end_s - WINDOW_S <= event.at_s < end_s for event in camera.events),
                    score=score,
                    num_frames=found.num_frames,
                    num_labels=camera.dataset.num_train + camera.dataset.num_validation,
                    class_counts=camera.dataset.class_counts,
                    measured=measured,
                    true=true,
                    decision=decision,
                    retrain_s=busy_s,
                )
            )
    for camera in cameras:
        camera.source.close()
    return rows


def run(
    seed: int, arms: tuple[Arm, ...], num_cameras: int, num_windows: int, frames: int, console: Console
) -> list[Row]:
    """One seed under all arms, from the same first models."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "first"
        drifts = drifts_of(seed, num_cameras, num_windows)
        for number in range(num_cameras):
            store = base / str(number)
            store.mkdir(parents=True)
            camera = Camera(seed, number, drifts[number], store)
            camera.first_model()
            (store / "first.json").write_bytes(msgspec.json.encode((camera.dataset, camera.serving)))
            camera.source.close()
        for arm in arms:
            began = time.monotonic()
            found = run_arm(seed, arm, num_cameras, num_windows, frames, base, Path(folder) / arm)
            rows += found
            mean = 100.0 * statistics.fmean(row.accuracy for row in found)
            console.print(f"seed {seed} {arm}: {mean:.1f} % ({time.monotonic() - began:.0f} s)", style="dim")
    return rows


# Two-sided 95 % points of Student's t by degrees of freedom.
_T95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26, 11: 2.20, 14: 2.14, 19: 2.09}


def interval(differences: list[float]) -> tuple[float, float]:
    """(mean, half width of its 95 % interval) of paired differences, by Student's t."""
    if len(differences) < 2:
        return statistics.fmean(differences), math.inf
    freedom = len(differences) - 1
    t = next((_T95[n] for n in sorted(_T95, reverse=True) if n <= freedom), 2.0)
    return statistics.fmean(differences), t * statistics.stdev(differences) / math.sqrt(len(differences))


def show(rows: list[Row], console: Console) -> None:
    arms = [arm for arm in ARMS if any(row.arm == arm for row in rows)]
    by: dict[tuple[int, str], list[Row]] = {}
    for row in rows:
        by.setdefault((row.seed, row.arm), []).append(row)
    seeds = sorted({seed for seed, _ in by if all((seed, arm) in by for arm in arms)})

    def mean(seed: int, arm: str, which: bool | None = None) -> float:
        return 100.0 * statistics.fmean(r.accuracy for r in by[seed, arm] if which is None or r.drifted == which)

    table = Table(title=f"window-averaged accuracy, points; {len(seeds)} seeds, 95 % interval of paired differences")
    heads = ("arm", "all", "over uniform", "just drifted", "over uniform", "others", "over uniform")
    for head in (*heads, "frames drifted / others", "labels", "retrain s", "live", "error of measured"):
        table.add_column(head, justify="left" if head == "arm" else "right")
    for arm in arms:
        cells = []
        for which in (None, True, False):
            cells.append(f"{statistics.fmean(mean(seed, arm, which) for seed in seeds):.1f}")
            difference = interval([mean(seed, arm, which) - mean(seed, "uniform", which) for seed in seeds])
            cells.append("" if arm == "uniform" else f"{difference[0]:+.1f} ± {difference[1]:.1f}")
        mine = list(itertools.chain.from_iterable(by[seed, arm] for seed in seeds))
        parts = [statistics.fmean(r.num_frames for r in mine if r.drifted == which) for which in (True, False)]
        errors = [r.measured - r.true for r in mine]
        table.add_row(
            arm,
            *cells,
            f"{parts[0]:.1f} / {parts[1]:.1f}",
            f"{statistics.fmean(r.num_labels for r in mine):.0f}",
            f"{statistics.fmean(r.retrain_s for r in mine):.2f}",
            f"{statistics.fmean(r.decision == 'promoted' for r in mine):.0%}",
            f"{100 * statistics.fmean(errors):+.1f} ± {100 * statistics.stdev(errors):.1f}",
        )
    console.print(table)
    for seed in seeds:
        console.print(f"seed {seed}: " + ", ".join(f"{arm} {mean(seed, arm):.1f}" for arm in arms), highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="1,2,3,4,5")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--cameras", type=int, default=4)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument(
        "--frames", type=int, default=FRAMES_PER_CAMERA, help="label budget, frames per camera and window"
    )
    parser.add_argument("--out", type=Path, help="add the rows to this file, one JSON object a line")
    parser.add_argument("--table", type=Path, nargs="+", help="only print the table of rows in these files")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    if arguments.table:
        for path in arguments.table:
            rows += [msgspec.json.decode(line, type=Row) for line in path.read_bytes().splitlines() if line]
    else:
        arms = tuple(arm for arm in ARMS if arm in arguments.arms.split(","))
        for seed in (int(text) for text in arguments.seeds.split(",")):
            found = run(seed, arms, arguments.cameras, arguments.windows, arguments.frames, Console(stderr=True))
            rows += found
            if arguments.out:
                with arguments.out.open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(msgspec.to_builtins(row)) + "\n" for row in found)
    show(rows, Console(width=170))


if __name__ == "__main__":
    main()
