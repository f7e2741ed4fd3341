"""Earlier models on streams whose scenes come back: the whole system with and without a zoo, in pairs.

``python benchmarks/bench_zoo.py`` runs the real coordinator, planner, profiler, gate and canary in *virtual* time on
real frames: every label, trial, retraining, comparison and accuracy is computed, none is drawn. On the clock a batch of
32 crops takes 20 ms of a GPU, in training and in looking alike, so that both runs of a pair are the same until an
earlier model is used. What is left out of a real run: contention beyond the granted shares, the start of processes
(half a second is added to every retraining and take-over), dropped frames, drift alarms.

street: the six cameras of ``examples/street.toml``, windows of 40 s. Its recordings are looped: a scene that comes back
shows the very frames that its first model was trained on, which flatters the zoo (and policy `none`).
back: two cameras with one scene, another one, and the first again with frames that were never seen before, windows of
20 s. Each is a site of its own, so that no model has seen the frames that it is measured on in another stream either.

``--memory`` compares ways to choose exemplars instead: accuracy on the first scene after windows of another one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from executor.learning import checkpoints, memory
from executor.learning.canary import compare
from executor.learning.classification import Classification
from executor.learning.datasets import CropSet
from executor.learning.device import Device
from executor.learning.golden import open_golden
from executor.learning.labeling import frames_to_label, label
from executor.learning.replay import resize
from executor.learning.retraining import retrain
from executor.learning.stepping import FreeStepper
from executor.learning.trials import run_trials
from executor.streams.frames import FrameSource
from executor.streams.open import open_source
from optimizer.config import SiteConfig, ZooConfig, load_site
from optimizer.coordinator import Coordinator
from optimizer.simulator import SimulatedExecutor, Simulation
from optimizer.state import SiteState
from optimizer.trace_study import InProcess
from profiler.history import History
from profiler.microprofiler import EstimatorKnobs
from profiler.service import SiteProfiler
from profiler.trials import TrialKnobs
from protocol import messages as m
from protocol.events import GateDecided, RetrainFinished
from protocol.schema import (
    CanaryResult,
    CheckpointRef,
    Clip,
    GpuSpec,
    InferenceConfig,
    LabelResult,
    OracleGolden,
    Record,
    RecordedSource,
    RetrainConfig,
    RetrainResult,
    StreamSpec,
    TrialResult,
)

BY_STRETCH, HERD = memory.choose, memory.herd
Chooser = Callable[[NDArray[np.int64], NDArray[np.int64], memory.Features, int], NDArray[np.int64]]

ROOT = Path(__file__).parent.parent
CROP_PX = 32
# As many exemplars as the default budget holds at 64 px.
EXEMPLAR_MB = 0.25
# What a batch of training, or of looking, costs: both arms of a pair are the same until an earlier model is used.
STEP_S = 0.02
SPEED = {"street": 1.0, "back": 0.5}
START_S = 0.5
BLOCK_S, TRUTH_FPS = 2.5, 2.0
INFERENCE = tuple(InferenceConfig(config_id=f"r{px}", resolution_px=px) for px in (32, 24, 16))
CPU = Device(name="cpu:0", torch_device=torch.device("cpu"))


def street_site(windows_s: float = 40.0) -> SiteConfig:
    """``examples/street.toml`` with smaller crops, perfect golden labels, and inference on every frame."""
    site = load_site(ROOT / "examples" / "street.toml")
    streams = tuple(
        msgspec.structs.replace(
            s,
            crop_px=CROP_PX,
            exemplar_mb=EXEMPLAR_MB,
            golden=OracleGolden(seconds_per_frame=0.0, error_rate=0.0),
        )
        for s in site.streams
    )
    return msgspec.structs.replace(site, streams=streams, inference=INFERENCE, window_s=windows_s, deadline_s=0.3)


def back_sites() -> list[SiteConfig]:
    """Two sites of one camera each; no frame is shown twice in them."""
    site = street_site(20.0)
    source = site.streams[0].source
    assert isinstance(source, RecordedSource)
    plaza, motorway = source.clips

    def cut(clip: Clip, first: int, last: int) -> Clip:
        return msgspec.structs.replace(clip, first_frame=first, last_frame=last)

    orders = {
        "walk-drive": (
            cut(plaza, 0, 399),
            cut(motorway, 0, 373),
            cut(plaza, 400, 794),
            cut(motorway, 374, 747),
        ),
        "drive-walk": (
            cut(motorway, 0, 373),
            cut(plaza, 0, 399),
            cut(motorway, 374, 747),
            cut(plaza, 400, 794),
        ),
    }
    sites = []
    for name, clips in orders.items():
        stream = msgspec.structs.replace(
            site.streams[0],
            stream_id=name,
            source=msgspec.structs.replace(source, clips=clips),
            label_fps=4.0,
            start_s=clips[0].last_frame / 10.0 if clips[0].last_frame else 40.0,
        )
        bootstrap = msgspec.structs.replace(site.bootstrap, seconds=stream.start_s)
        sites.append(msgspec.structs.replace(site, name=name, streams=(stream,), bootstrap=bootstrap))
    return sites


class Truth:
    """Perfectly labelled crops of short blocks of streams; shared by both arms, as frames are slow to decode."""

    def __init__(self, site: SiteConfig) -> None:
        self.specs = {spec.stream_id: spec for spec in site.streams}
        self.sources: dict[str, FrameSource] = {s.stream_id: open_source(s) for s in site.streams}
        self._blocks: dict[tuple[str, int], CropSet] = {}

    def block(self, stream_id: str, number: int) -> CropSet:
        key = (stream_id, number)
        if key not in self._blocks:
            spec, source = self.specs[stream_id], self.sources[stream_id]
            golden = open_golden(spec, CPU, FreeStepper(), 0)
            start, parts, task = BLOCK_S * number, [], Classification()
            for index in frames_to_label(start, start + BLOCK_S, spec.fps, TRUTH_FPS):
                frame = source.frame(index)
                labels = golden.label(frame)
                if labels is not None and len(labels):
                    parts.append(task.examples(frame, labels, spec))
            self._blocks[key] = task.join(parts, spec)
        return self._blocks[key]


class Row(Record, frozen=True, kw_only=True):
    """An earlier model in a trial, and what it then was worth on the window's live frames."""

    accuracy: float
    low: float
    high: float
    live: float


class RealWorld:
    """Everything is really computed; the clock is the simulation's, and costs are counted in batches."""

    def __init__(self, site: SiteConfig, truth: Truth, store: Path, seed: int) -> None:
        self.site, self.truth, self.store, self.seed = site, truth, store, seed
        self.run: Simulation | None = None
        self.trials: list[tuple[m.TrialJob, TrialResult]] = []
        self.retrained: list[tuple[m.RetrainJob, RetrainResult]] = []
        self._accuracy: dict[tuple[str, str, int, int], float] = {}

    def _timed(self, work: Callable[[FreeStepper], object]) -> tuple[float, object]:
        stepper = FreeStepper(lambda: STEP_S * stepper.num_steps)
        result = work(stepper)
        return stepper.busy_s(), result

    def label(self, job: m.LabelJob) -> tuple[float, LabelResult]:
        source = self.truth.sources[job.stream.stream_id]
        result = label(job, source, self.store, CPU, FreeStepper(), self.seed)
        assert result is not None
        return 0.01 * result.num_frames, result

    def trial(self, job: m.TrialJob) -> tuple[float, TrialResult]:
        source = self.truth.sources[job.stream.stream_id]
        seconds, result = self._timed(
            lambda stepper: run_trials(job, source, self.store, CPU, stepper, self.seed, lambda: None)
        )
        assert isinstance(result, TrialResult)
        self.trials.append((job, result))
        return seconds, result

    def retrain(self, job: m.RetrainJob) -> tuple[float, RetrainResult]:
        job = msgspec.structs.replace(job, seed=job.seed + 1000 * self.seed)
        seconds, result = self._timed(
            lambda stepper: retrain(job, self.store, CPU, stepper, lambda: None, lambda _: None)
        )
        assert isinstance(result, RetrainResult)
        self.retrained.append((job, result))
        return seconds + START_S, result

    def canary(self, job: m.CanaryJob) -> tuple[float, CanaryResult]:
        source = self.truth.sources[job.stream.stream_id]
        seconds, result = self._timed(
            lambda stepper: compare(job, source, self.store, CPU, stepper, self.seed, lambda: None)
        )
        assert isinstance(result, CanaryResult)
        return seconds, result

    def accuracy(
        self,
        stream_id: str,
        window: int,
        checkpoint: CheckpointRef,
        config: InferenceConfig,
    ) -> float:
        """On the frames of this moment: of the block of time that the clock is in."""
        assert self.run is not None
        origin = self.run.coordinator.state.origin_s
        assert origin is not None
        at_s = self.truth.specs[stream_id].start_s + self.run.now - 1e-6 - origin
        return self.at(stream_id, int(at_s // BLOCK_S), checkpoint, config.resolution_px)

    def at(self, stream_id: str, block: int, checkpoint: CheckpointRef, px: int) -> float:
        key = (stream_id, checkpoint.sha256, block, px)
        if key not in self._accuracy:
            crops = self.truth.block(stream_id, block)
            if len(crops) == 0:
                self._accuracy[key] = self._accuracy.get((stream_id, checkpoint.sha256, block - 1, px), 1.0)
            else:
                student, _ = checkpoints.load(self.store, checkpoint)
                small = CropSet(
                    resize(crops.crops, px),
                    crops.labels,
                    crops.frame_index,
                    crops.is_validation,
                    crops.is_exemplar,
                )
                self._accuracy[key] = Classification().serving_accuracy(student, small, CPU)
        return self._accuracy[key]

    def in_window(self, stream_id: str, window: int, checkpoint: CheckpointRef) -> float:
        start_s = self.truth.specs[stream_id].start_s + window * self.site.window_s
        blocks = range(int(start_s // BLOCK_S), int((start_s + self.site.window_s) // BLOCK_S))
        return statistics.mean(self.at(stream_id, block, checkpoint, CROP_PX) for block in blocks)


class Arm(Record, frozen=True, kw_only=True):
    """One run. ``accuracy`` per window, mean of the streams; ``per_stream`` by (stream, window)."""

    accuracy: tuple[float, ...]
    per_stream: dict[str, tuple[float, ...]]
    num_retrained: int
    num_taken: int
    num_begun: int
    num_refused: int
    num_rolled_back: int
    looks_s: float
    trials_s: float
    rows: tuple[Row, ...]
    outcomes: tuple[tuple[float, float], ...]


def run_arm(
    site: SiteConfig,
    truth: Truth,
    policy: str,
    seed: int,
    *,
    zoo: bool,
    windows: int,
    speed: float,
    log: Path | None,
) -> Arm:
    """The site under ``policy`` for ``windows`` windows."""
    site = msgspec.structs.replace(site, zoo=ZooConfig(max_mb=100.0 if zoo else 0.0))
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder)
        world = RealWorld(site, truth, store, seed)
        knobs = site.profiling
        profiler = SiteProfiler(
            History(store / "history.sqlite"),
            site.retrain,
            site.inference,
            num_streams=len(site.streams),
            budget_gpu_s=knobs.budget_gpu_s,
            window_s=site.window_s,
            trial_knobs=TrialKnobs(data_share=knobs.data_share, max_epochs=knobs.num_epochs),
            estimator_knobs=EstimatorKnobs(method=knobs.method, correct_live=False),
        )
        coordinator = Coordinator(site, profiler, SiteState(site=site.name), num_windows=windows)
        run = Simulation(
            coordinator,
            [],
            world,
            InProcess(policy, site.deadline_s, free_profiling=False),
        )
        world.run = run
        run.join(SimulatedExecutor(GpuSpec(gpu_id="gpu0", speed=speed), world))
        run.run()
        if log is not None:
            log.write_bytes(b"".join(msgspec.json.encode(event) + b"\n" for event in run.events if event.site_s >= 0.0))
        per_stream = {
            spec.stream_id: tuple(
                run.measures[spec.stream_id, w].accuracy_s / run.measures[spec.stream_id, w].seconds
                for w in range(windows)
            )
            for spec in site.streams
        }
        rows = tuple(
            Row(
                accuracy=row.accuracy,
                low=row.accuracy_low,
                high=row.accuracy_high,
                live=world.in_window(job.stream.stream_id, job.window, earlier.checkpoint),
            )
            for job, result in world.trials
            for earlier in job.zoo
            for row in result.zoo
            if row.number == earlier.number
        )
        decided = [event for event in run.events if isinstance(event, GateDecided)]
        ended = [event for event in run.events if isinstance(event, RetrainFinished)]
        begun = [job for job, _ in world.retrained if job.start is not None and job.config.epochs > 0]
        return Arm(
            accuracy=tuple(statistics.mean(row[w] for row in per_stream.values()) for w in range(windows)),
            per_stream=per_stream,
            num_retrained=len(ended),
            num_taken=sum(job.config.base > 0 and job.config.epochs == 0 for job, _ in world.retrained),
            num_begun=len(begun),
            num_refused=sum(event.decision == "refused" for event in decided),
            num_rolled_back=sum(event.decision == "rolled_back" for event in decided),
            looks_s=sum(row.busy_s for _, result in world.trials for row in result.zoo),
            trials_s=sum(e.busy_s for _, r in world.trials for row in r.retrain for e in row.epochs),
            rows=rows,
            outcomes=tuple(
                (event.accuracy_predicted, event.accuracy_after)
                for event in ended
                if event.retrain_id.startswith("zoo-") and event.accuracy_predicted is not None
            ),
        )


def report(name: str, pairs: list[tuple[Arm, Arm]], out: Console) -> None:
    """Both arms per window, and the paired difference with its standard error over runs."""
    windows = len(pairs[0][0].accuracy)
    table = Table(title=f"{name}: accuracy per window, mean of {len(pairs)} runs")
    for column in (
        "arm",
        "all",
        *(f"w{w}" for w in range(windows)),
        "retrained",
        "taken over",
        "begun",
        "refused",
    ):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for place, arm in enumerate(("without", "zoo")):
        arms = [pair[place] for pair in pairs]
        means = [100 * statistics.mean(a.accuracy[w] for a in arms) for w in range(windows)]
        counts = [
            sum(a.num_retrained for a in arms),
            sum(a.num_taken for a in arms),
            sum(a.num_begun for a in arms),
            sum(a.num_refused + a.num_rolled_back for a in arms),
        ]
        table.add_row(
            arm,
            f"{statistics.mean(means):.1f}",
            *(f"{x:.1f}" for x in means),
            *map(str, counts),
        )
    out.print(table)
    differences = [100 * (statistics.mean(b.accuracy) - statistics.mean(a.accuracy)) for a, b in pairs]
    error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else float("nan")
    out.print(
        f"zoo - without: {statistics.mean(differences):+.1f} points (standard error {error:.1f}); "
        f"runs: {', '.join(f'{d:+.1f}' for d in differences)}"
    )
    rows = [row for _, arm in pairs for row in arm.rows]
    if rows:
        inside = [
            row.accuracy - (row.accuracy - row.low) * 1.2816 / 1.96
            <= row.live
            <= row.accuracy + (row.high - row.accuracy) * 1.2816 / 1.96
            for row in rows
        ]
        errors = sorted(abs(row.accuracy - row.live) for row in rows)
        looks = sum(arm.looks_s for _, arm in pairs)
        out.print(
            f"{len(rows)} looks of {1000 * looks / len(rows):.0f} ms; against the window's live frames: "
            f"median error {errors[len(errors) // 2]:.3f}, "
            f"80 % interval of sampling covers {statistics.mean(inside):.0%}"
        )
    outcomes = [pair for _, arm in pairs for pair in arm.outcomes]
    if outcomes:
        errors = sorted(abs(predicted - after) for predicted, after in outcomes)
        out.print(f"{len(outcomes)} zoo retrainings: median error of the estimate {errors[len(errors) // 2]:.3f}")


# ---------------------------------------------------------------- exemplar memory


def joint(
    labels: NDArray[np.int64],
    stretches: NDArray[np.int64],
    features: memory.Features,
    size: int,
) -> NDArray[np.int64]:
    """Herding over everything of a class at once, as before."""
    return BY_STRETCH(labels, np.zeros_like(stretches), features, size)


class Reservoir:
    """Of each class a uniform sample of all that was ever seen (Vitter, 1985), balanced over classes."""

    def __init__(self, seed: int) -> None:
        self._draw = np.random.default_rng(seed)
        self._seen: dict[int, int] = {}

    def __call__(
        self,
        labels: NDArray[np.int64],
        stretches: NDArray[np.int64],
        features: memory.Features,
        size: int,
    ) -> NDArray[np.int64]:
        newest, chosen = stretches.max(), [np.zeros(0, np.int64)]
        classes = [np.flatnonzero(labels == value) for value in np.unique(labels)]
        for members, quota in zip(classes, memory.fair_parts([len(c) for c in classes], size), strict=True):
            value = int(labels[members[0]])
            kept, fresh = (
                members[stretches[members] < newest].tolist(),
                members[stretches[members] == newest],
            )
            for item in fresh:
                self._seen[value] = self._seen.get(value, 0) + 1
                if len(kept) < quota:
                    kept.append(int(item))
                elif (place := int(self._draw.integers(self._seen[value]))) < quota:
                    kept[place] = int(item)
            chosen.append(np.array(kept[:quota], np.int64))
        return np.sort(np.concatenate(chosen))


def memory_study(seeds: int, megabytes: list[float], choices: list[str], out: Console) -> None:
    """Train on the first scene, then on windows of the second with what memory holds; how much of the first is left."""
    config = RetrainConfig(config_id="all-8", epochs=8, learning_rate=0.002)
    table = Table(title="accuracy after three windows of another scene (mean of both orders and all seeds)")
    for column in (
        "memory, MB",
        "choice",
        "first scene, new frames",
        "its own model there",
        "second scene, new frames",
    ):
        table.add_column(column, justify="right")
    sites = back_sites()
    truths = [Truth(site) for site in sites]
    for size in megabytes:
        for choice in ("none",) if size == 0.0 else choices:
            rows = []
            for seed in range(seeds):
                for site, truth in zip(sites, truths, strict=True):
                    rows.append(_forgetting(site.streams[0], truth, size, choice, config, seed))
                    figures = ", ".join(f"{100 * x:.1f}" for x in rows[-1])
                    out.print(f"{size:g} MB, {choice}, {site.name}: {figures}", style="dim")
            table.add_row(f"{size:g}", choice, *(f"{100 * statistics.mean(x):.1f}" for x in zip(*rows, strict=True)))
    out.print(table)


def _forgetting(
    spec: StreamSpec, truth: Truth, size: float, choice: str, config: RetrainConfig, seed: int
) -> tuple[float, float, float]:
    """Accuracy on the first scene when it is back, that of the model made for it, and accuracy on the second scene."""
    spec = msgspec.structs.replace(spec, exemplar_mb=size)
    choosers: dict[str, Chooser] = {"joint herding": joint, "reservoir": Reservoir(seed)}
    memory.choose = choosers.get(choice, BY_STRETCH)  # type: ignore[assignment]
    if choice == "random by stretch":
        draw = np.random.default_rng(seed)
        memory.herd = lambda features, size: draw.permutation(len(features))[:size]
    try:
        with tempfile.TemporaryDirectory() as folder:
            store, source = Path(folder), truth.sources[spec.stream_id]
            dataset, models = None, list[CheckpointRef]()
            # The first scene in three windows, then three windows of the second one.
            edges = [spec.start_s * k / 3 for k in range(4)] + [spec.start_s + 12.0 * k for k in range(1, 4)]
            for window, (from_s, to_s) in enumerate(itertools.pairwise(edges)):
                job = m.LabelJob(
                    job_id="l", stream=spec, share=1.0, window=window, from_s=from_s, to_s=to_s, exemplars=dataset
                )
                labelled = label(job, source, store, CPU, FreeStepper(), seed)
                assert labelled is not None
                dataset = labelled.dataset
                work = m.RetrainJob(
                    job_id="r",
                    stream=spec,
                    share=1.0,
                    window=window,
                    dataset=dataset,
                    checkpoint=models[-1] if models else None,
                    config=config if models else msgspec.structs.replace(config, epochs=12),
                    next_version=window + 1,
                    seed=100 * seed + window,
                )
                result = retrain(work, store, CPU, FreeStepper(), lambda: None, lambda _: None)
                assert result.checkpoint is not None
                models.append(result.checkpoint)

            def mean(model: CheckpointRef, from_s: float, to_s: float) -> float:
                student, _ = checkpoints.load(store, model)
                blocks = [truth.block(spec.stream_id, b) for b in range(int(from_s // BLOCK_S), int(to_s // BLOCK_S))]
                return statistics.mean(
                    Classification().serving_accuracy(student, crops, CPU) for crops in blocks if len(crops)
                )

            # The first scene is back after the second one's part, with its other half.
            clips = spec.source.clips if isinstance(spec.source, RecordedSource) else ()
            lengths = [((clip.last_frame or 0) - clip.first_frame + 1) / spec.fps for clip in clips]
            back = lengths[0] + lengths[1]
            there = back + BLOCK_S, back + lengths[2] - BLOCK_S
            again = back + lengths[2] + BLOCK_S, sum(lengths) - BLOCK_S
            return mean(models[-1], *there), mean(models[2], *there), mean(models[-1], *again)
    finally:
        memory.choose, memory.herd = BY_STRETCH, HERD


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", default="back,street")
    parser.add_argument("--runs", type=int, default=3, help="pairs of runs; each has its own seeds")
    parser.add_argument("--policy", default="timeline")
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="study the exemplar memory instead")
    parser.add_argument("--megabytes", default="0,0.1,0.25,1")
    parser.add_argument("--choices", default="joint herding,reservoir,random by stretch,by stretch")
    parser.add_argument("--json", type=Path, help="write all rows there")
    parser.add_argument("--log", type=Path, help="write the events of every run into this folder")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    out, began = Console(), time.process_time()
    if arguments.memory:
        sizes = [float(size) for size in arguments.megabytes.split(",")]
        memory_study(arguments.runs, sizes, arguments.choices.split(","), out)
        return
    found: dict[str, list[tuple[Arm, Arm]]] = {}
    for study in arguments.studies.split(","):
        for site in [street_site()] if study == "street" else back_sites():
            truth = Truth(site)
            for seed in range(arguments.runs):
                arms = []
                for zoo in (False, True):
                    log = None
                    if arguments.log is not None:
                        arguments.log.mkdir(parents=True, exist_ok=True)
                        log = arguments.log / f"{site.name}-{seed}-{'zoo' if zoo else 'without'}.jsonl"
                    arms.append(
                        run_arm(
                            site,
                            truth,
                            arguments.policy,
                            seed,
                            zoo=zoo,
                            windows=arguments.windows,
                            speed=SPEED[study],
                            log=log,
                        )
                    )
                    mean = 100 * statistics.mean(arms[-1].accuracy)
                    out.print(
                        f"{site.name} {seed} {'zoo' if zoo else 'without'}: {mean:.1f}, "
                        f"{time.process_time() - began:.0f} s of processor",
                        style="dim",
                    )
                found.setdefault(study, []).append((arms[0], arms[1]))
        report(study, found[study], out)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(msgspec.to_builtins(found), indent=1))
    out.print(f"{time.process_time() - began:.0f} s of processor")


if __name__ == "__main__":
    main()
