"""Gate, shadow and canary on real retrainings: healthy ones, and ones on shuffled or stale labels.

``python benchmarks/bench_gate.py --bad 20 --good 20`` takes about 4 minutes on one core. ``edge_cnn`` students on city
streams with a drift between windows. Looks are the canary job itself, on golden labels of the five seconds before it;
time is the stream's, so that nothing has to be waited for. What is *true* (both models on the oracle's labels of the
60 seconds that follow, one canary period, mean over frames) is measured for this table only and decides nothing.

shuffled: the training and the held-out labels of the window are permuted among its crops.
fooled: the labels are wrong in one way (every class taken for the next), so that held-out labels praise the model.
stale: the window's labels are those of another camera, under another light.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from executor.learning import datasets
from executor.learning.canary import compare
from executor.learning.datasets import CropSet
from executor.learning.device import Device
from executor.learning.labeling import label
from executor.learning.retraining import retrain
from executor.learning.stepping import FreeStepper
from executor.streams.open import open_source
from optimizer import gate
from optimizer.config import GateConfig
from protocol.messages import CanaryJob, LabelJob, RetrainJob
from protocol.schema import (
    CheckpointRef,
    CitySource,
    DatasetRef,
    DriftEvent,
    OracleGolden,
    PairedCounts,
    Record,
    RetrainConfig,
    RetrainResult,
    StreamSpec,
)

CLASSES = ("person", "cyclist", "car", "van", "bus", "motorcycle")
CONFIGS = (
    RetrainConfig(config_id="head-8", epochs=8, trained_fraction=0.0, learning_rate=0.003),
    RetrainConfig(config_id="half-5", epochs=5, trained_fraction=0.5, learning_rate=0.002),
    RetrainConfig(config_id="all-5", epochs=5, learning_rate=0.002),
)
BAD = ("shuffled", "fooled", "stale")
LABELLED_S = 30.0
STEP_S = 180.0  # between two drifts: a window, its trial in the shadow and its canary see the same scene
TRUE_S = 60.0
TRUE_PIECES = 6


class Row(Record, frozen=True, kw_only=True):
    """One retraining: how it looked, what it was worth, what was decided when (s of stream time)."""

    stream: str
    kind: str
    config_id: str
    held_out_gain: float
    true_gain: float
    true_error: float
    gate: str
    decision: str
    waited_s: float
    live_s: float


class Camera:
    """One stream; every window starts from the model that serves."""

    def __init__(self, seed: int, store: Path, config: GateConfig) -> None:
        self.seed, self.store, self.config = seed, store, config
        draw = np.random.default_rng([seed, 7])
        kinds = {
            "light": ("dusk", "night", "day"),
            "weather": ("rain", "fog", "clear"),
            "appearance": ("winter", "fleet"),
        }
        kinds |= {"class_mix": ("freight", "weekend", "festival"), "appearance": ("winter", "fleet")}
        drift = []
        for window in range(40):
            kind = str(draw.choice(sorted(kinds)))
            to = str(draw.choice(kinds[kind]))
            drift.append(DriftEvent(kind=kind, at_s=STEP_S * window, to=to))  # type: ignore[arg-type]
        self.spec = StreamSpec(
            stream_id=f"city-{seed}",
            source=CitySource(seed=seed, drift=tuple(drift)),
            classes=CLASSES,
            golden=OracleGolden(seconds_per_frame=0.0),
            label_fps=1.5,
            crop_px=32,
        )
        self.source = open_source(self.spec)
        self.device = Device(name="cpu:0", torch_device=torch.device("cpu"))
        self.dataset = self.label(-1)
        first = self.retrain(RetrainConfig(config_id="first", epochs=10), self.dataset, None, 1)
        assert first.checkpoint is not None
        self.serving = first.checkpoint
        self.next_version = 2

    def label(self, window: int) -> DatasetRef:
        """The labels of a window, taken after its drift."""
        begin = STEP_S * window + 10.0
        job = LabelJob(
            job_id="label",
            stream=self.spec,
            share=1.0,
            window=max(window, 0),
            from_s=begin,
            to_s=begin + LABELLED_S,
        )
        result = label(job, self.source, self.store, self.device, FreeStepper(), self.seed)
        assert result is not None
        return result.dataset

    def retrain(
        self, config: RetrainConfig, dataset: DatasetRef, serving: CheckpointRef | None, version: int
    ) -> RetrainResult:
        job = RetrainJob(
            job_id="retrain",
            stream=self.spec,
            share=1.0,
            window=dataset.window,
            dataset=dataset,
            checkpoint=serving,
            config=config,
            next_version=version,
            seed=version,
        )
        return retrain(job, self.store, self.device, FreeStepper(), lambda: None, lambda _: None)

    def spoil(self, kind: str, dataset: DatasetRef, other: Camera) -> DatasetRef:
        """The window's data set with labels that are wrong in the way of ``kind``."""
        crops = datasets.load(self.store, dataset, CLASSES)
        draw = np.random.default_rng([self.seed, dataset.window])
        if kind == "shuffled":
            crops = replace(crops, labels=draw.permutation(crops.labels))
        elif kind == "fooled":
            crops = replace(crops, labels=(crops.labels + 1) % len(CLASSES))
        else:
            crops: CropSet = datasets.load(other.store, other.dataset, CLASSES)  # type: ignore[no-redef]
        return datasets.save(self.store, crops, stream_id="spoilt", window=dataset.window, classes=CLASSES)

    def window(self, window: int, kind: str, other: Camera) -> Row:
        """One retraining, from its labels to the end of its canary."""
        fresh_labels = self.label(window)
        dataset = fresh_labels if kind == "healthy" else self.spoil(kind, fresh_labels, other)
        config = CONFIGS[(window + self.seed) % len(CONFIGS)]
        result = self.retrain(config, dataset, self.serving, self.next_version)
        self.next_version += 1
        assert result.checkpoint is not None
        now = STEP_S * window + 10.0 + LABELLED_S
        verdict = gate.judge_retraining(result, self.config, self.serving.version)
        first = verdict.decision
        true_gain, true_error = self.truth(result.checkpoint, now)
        proven, waited_s, live_s = first == "promoted", 0.0, 0.0
        fresh = PairedCounts()
        step_s = self.config.step_s
        while verdict.decision == "on_trial":
            fresh = gate.add(fresh, self.look(result.checkpoint, now, now + step_s)[0])
            now, waited_s = now + step_s, waited_s + step_s
            found = gate.judge_shadow(result.paired, fresh, self.config, over=waited_s >= self.config.canary_s)
            if found is not None:
                verdict = found
                proven = (verdict.confidence or 0.0) >= self.config.confidence
        fresh = PairedCounts()
        while verdict.decision == "promoted":
            fresh = gate.add(fresh, self.look(result.checkpoint, now, now + step_s)[0])
            now, live_s = now + step_s, live_s + step_s
            verdict = (
                gate.judge_canary(fresh, self.config, proven=proven, over=live_s >= self.config.canary_s) or verdict
            )
        if verdict.decision == "kept":
            self.serving = result.checkpoint
        self.dataset = fresh_labels
        return Row(
            stream=self.spec.stream_id,
            kind=kind,
            config_id=config.config_id,
            held_out_gain=result.accuracy_after - result.accuracy_before,
            true_gain=true_gain,
            true_error=true_error,
            gate=first,
            decision=verdict.decision,
            waited_s=waited_s,
            live_s=live_s,
        )

    def truth(self, candidate: CheckpointRef, now: float) -> tuple[float, float]:
        """(gain over the serving model, its standard error) on the oracle's labels of the ``TRUE_S`` from ``now`` on.

        The error is told from pieces of 10 s: in neighbouring frames the same road users are seen.
        """
        piece_s = TRUE_S / TRUE_PIECES
        looks = [self.look(candidate, now + k * piece_s, now + (k + 1) * piece_s) for k in range(TRUE_PIECES)]
        gains = [new - old for _, new, old in looks]
        return statistics.fmean(gains), statistics.stdev(gains) / TRUE_PIECES**0.5

    def look(self, candidate: CheckpointRef, from_s: float, to_s: float) -> tuple[PairedCounts, float, float]:
        """(votes, accuracy of the candidate, of the serving model) on golden labels of a stretch."""
        job = CanaryJob(
            job_id="canary",
            stream=self.spec,
            share=1.0,
            window=0,
            from_s=from_s,
            to_s=to_s,
            label_fps=self.config.label_fps,
            candidate=candidate,
            previous=self.serving,
        )
        found = compare(job, self.source, self.store, self.device, FreeStepper(), self.seed, lambda: None)
        return found.paired, found.accuracy_candidate, found.accuracy_previous


def run(num_bad: int, num_good: int, num_cameras: int, config: GateConfig, console: Console) -> list[Row]:
    """Bad and healthy retrainings in turn on ``num_cameras`` streams."""
    torch.set_num_threads(1)
    kinds: list[str] = []
    for number in range(max(num_bad, num_good)):
        kinds += ["healthy"] * (number < num_good) + [BAD[number % len(BAD)]] * (number < num_bad)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        cameras = [Camera(seed, Path(folder) / str(seed), config) for seed in range(1, num_cameras + 1)]
        for number, kind in enumerate(kinds):
            # Healthy and bad ones alternate, and so do cameras: each camera gets both.
            camera = cameras[(number // 2 + number % 2) % num_cameras]
            other = cameras[(number // 2 + number % 2 + 1) % num_cameras]
            rows.append(camera.window(number // num_cameras, kind, other))
            row = rows[-1]
            gains = f"held out {100 * row.held_out_gain:+.1f}, true {_points(row)} points"
            console.print(f"{number + 1}/{len(kinds)} {kind}: {gains}, {row.gate}, {row.decision}", style="dim")
    return rows


def _points(row: Row) -> str:
    """The true gain with its standard error."""
    return f"{100 * row.true_gain:+.1f} ± {100 * row.true_error:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bad", type=int, default=20, help="retrainings on wrong labels")
    parser.add_argument("--good", type=int, default=20, help="healthy retrainings")
    parser.add_argument("--cameras", type=int, default=4)
    parser.add_argument("--json", action="store_true", help="rows as JSON instead of tables")
    arguments = parser.parse_args()
    began, console = time.process_time(), Console(stderr=True)
    config = GateConfig()
    rows = run(arguments.bad, arguments.good, arguments.cameras, config, console)
    if arguments.json:
        print(json.dumps([{f: getattr(row, f) for f in row.__struct_fields__} for row in rows], indent=1))
        return
    table = Table(title="real retrainings, gains in points")
    for column in ("stream", "labels", "configuration", "held out", "true", "gate", "end", "on trial s", "live s"):
        table.add_column(column, justify="right" if column in ("held out", "true", "on trial s", "live s") else "left")
    for row in rows:
        gains = f"{100 * row.held_out_gain:+.1f}", _points(row)
        times = f"{row.waited_s:.0f}", f"{row.live_s:.0f}"
        table.add_row(row.stream, row.kind, row.config_id, *gains, row.gate, row.decision, *times)
    out = Console()
    out.print(table)
    worse = [row for row in rows if row.true_gain < 0.0]
    live = [row for row in worse if row.live_s > 0.0]
    stayed = [row for row in worse if row.decision == "kept"]
    better = [row for row in rows if row.true_gain >= 0.02]
    lost = [row for row in better if row.decision != "kept"]
    back = [row.live_s for row in rows if row.decision == "rolled_back"]
    out.print(
        f"worse models: {len(worse)}, live for a while {len(live)}, kept {len(stayed)}"
        f" ({', '.join(map(_points, stayed)) or 'none'})"
    )
    out.print(
        f"better by two points and more: {len(better)}, not kept {len(lost)}"
        f" ({', '.join(map(_points, lost)) or 'none'})"
    )
    if back:
        out.print(f"time to roll-back: median {statistics.median(back):.0f} s, longest {max(back):.0f} s")
    out.print(f"processor time {time.process_time() - began:.0f} s")


if __name__ == "__main__":
    main()
