"""The drift detector on city streams: false alarms where nothing changes, and how soon a change is noticed.

``python benchmarks/bench_drift.py --streams 6`` takes about a minute on one core. A student is trained on the minute
before; then its signals over ``--seconds`` of stream time (two frames a second are analysed) go to the detector. The
same streams are run twice: without any drift, and with one change after two minutes, each stream another one.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import msgspec
import torch
from rich.console import Console
from rich.table import Table

from executor.learning import checkpoints
from executor.learning.device import Device
from executor.learning.inference import CropClassifier, InferenceEngine
from executor.learning.labeling import label
from executor.learning.retraining import retrain
from executor.learning.signals import SignalSums
from executor.learning.stepping import FreeStepper
from executor.streams.open import open_source
from optimizer.drifting import Detector
from protocol.messages import LabelJob, RetrainJob
from protocol.schema import (
    CitySource,
    DriftEvent,
    InferenceConfig,
    OracleGolden,
    RetrainConfig,
    StreamSignals,
    StreamSpec,
)

CLASSES = ("person", "cyclist", "car", "van", "bus", "motorcycle")
CHANGES = (
    ("light", "night"),
    ("weather", "snow"),
    ("class_mix", "freight"),
    ("appearance", "winter"),
    ("light", "dusk"),
    ("weather", "fog"),
    ("weather", "rain"),
    ("class_mix", "festival"),
)
CHANGE_S = 120.0
FRAMES_PER_S = 2
CPU = Device(name="cpu:0", torch_device=torch.device("cpu"))

Second = tuple[StreamSignals | None, float | None]


def seconds_of(seed: int, drift: tuple[DriftEvent, ...], num_seconds: int, store: Path) -> list[Second]:
    """(signals, accuracy) of every second of serving."""
    spec = StreamSpec(
        stream_id=f"city-{seed}",
        source=CitySource(seed=seed, drift=drift, drift_period_s=0.0),
        classes=CLASSES,
        golden=OracleGolden(seconds_per_frame=0.0),
        label_fps=1.0,
        crop_px=32,
    )
    source = open_source(spec)
    job = LabelJob(job_id="label", stream=spec, share=1.0, window=0, from_s=-60.0, to_s=0.0)
    found = label(job, source, store, CPU, FreeStepper(), seed)
    assert found is not None
    first = RetrainJob(
        job_id="first",
        stream=spec,
        share=1.0,
        window=0,
        dataset=found.dataset,
        checkpoint=None,
        config=RetrainConfig(config_id="first", epochs=5, learning_rate=3e-3),
        next_version=1,
    )
    result = retrain(first, store, CPU, FreeStepper(), lambda: None, lambda _: None)
    assert result.checkpoint is not None
    student, _ = checkpoints.load(store, result.checkpoint)
    engine = InferenceEngine(CropClassifier(student, CPU, 1), InferenceConfig(config_id="all", resolution_px=32))
    seconds: list[Second] = []
    for second in range(num_seconds):
        sums, accuracies = SignalSums(), []
        for part in range(FRAMES_PER_S):
            outcome = engine.process(source.frame(round((second + part / FRAMES_PER_S) * spec.fps)))
            if outcome.found is not None:
                sums.add(outcome.found)
            if outcome.accuracy is not None:
                accuracies.append(outcome.accuracy)
        seconds.append((sums.means(), statistics.fmean(accuracies) if accuracies else None))
    return seconds


def watched(seconds: list[Second]) -> tuple[list[int], dict[int, float], dict[int, str]]:
    """(seconds of alarms, score by second, signal by second); the reference begins anew after an alarm."""
    detector = Detector()
    alarms, scores, signals = [], {}, {}
    for second, (found, _) in enumerate(seconds):
        report = detector.add(found, 1.0) if found is not None else None
        if report is None:
            continue
        scores[second], signals[second] = report.score, report.signal
        if report.alarm:
            alarms.append(second)
            detector.reset()
    return alarms, scores, signals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=6)
    parser.add_argument("--first-seed", type=int, default=21)
    parser.add_argument("--seconds", type=int, default=240)
    parser.add_argument("--keep", type=Path, help="write the signals there, to look at them again")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    out = Console()
    table = Table(title="drift detector")
    for column in ("seed", "change", "alarms s", "noticed after s", "score before", "after", "accuracy", "after"):
        table.add_column(column)
    hours = false = 0.0
    delays, missed = [], 0
    for number in range(arguments.streams):
        seed = arguments.first_seed + number
        kind, to = CHANGES[number % len(CHANGES)]
        for drift in ((), (DriftEvent(kind=kind, at_s=CHANGE_S, to=to, over_s=3.0),)):  # type: ignore[arg-type]
            with tempfile.TemporaryDirectory() as store:
                seconds = seconds_of(seed, drift, arguments.seconds, Path(store))
            if arguments.keep:
                with arguments.keep.open("a") as file:
                    file.write(msgspec.json.encode((seed, f"{kind} {to}" if drift else "", seconds)).decode() + "\n")
            alarms, scores, _ = watched(seconds)
            before = [a for a in alarms if a < CHANGE_S or not drift]
            after = [a for a in alarms if a >= CHANGE_S] if drift else []
            false += len(before)
            hours += (CHANGE_S if drift else arguments.seconds) / 3600.0
            if drift:
                delays += [after[0] - CHANGE_S] if after else []
                missed += not after
            halves = [[s for t, s in scores.items() if (t < CHANGE_S) is first] for first in (True, False)]
            live = [
                [a for t, (_, a) in enumerate(seconds) if a is not None and (t < CHANGE_S) is first]
                for first in (True, False)
            ]
            table.add_row(
                str(seed),
                f"{kind} {to}" if drift else "none",
                ", ".join(map(str, alarms)) or "–",
                f"{after[0] - CHANGE_S:.0f}" if after else "–",
                *(f"{statistics.fmean(h):.2f}" if h else "–" for h in halves),
                *(f"{100 * statistics.fmean(h):.0f} %" if h else "–" for h in live),
            )
    out.print(table)
    out.print(f"false alarms: {false:.0f} in {hours:.2f} h of stationary stream")
    if delays:
        found = f"noticed {len(delays)} of {len(delays) + missed} changes"
        out.print(f"{found}, median after {statistics.median(delays):.0f} s")


if __name__ == "__main__":
    main()
