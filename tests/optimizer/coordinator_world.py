"""A small site in virtual time for the coordinator's tests."""

from __future__ import annotations

import hashlib

import msgspec

from optimizer.config import BootstrapConfig, ProfilingConfig, SiteConfig
from optimizer.coordinator import Coordinator
from optimizer.policies.thief import thief as thief_alone
from optimizer.ports import GateEvidence
from optimizer.simulator import SimulatedExecutor, Simulation, exact_votes
from optimizer.state import SiteState
from protocol import messages as m
from protocol.events import StreamAccuracy
from protocol.plan import InferenceProfile, Plan, Problem, RetrainProfile, StreamProfile
from protocol.schema import (
    CanaryResult,
    CheckpointRef,
    CitySource,
    DatasetRef,
    GpuSpec,
    InferenceConfig,
    LabelResult,
    PairedCounts,
    Record,
    RetrainConfig,
    RetrainResult,
    RetrainRun,
    StreamSpec,
    TrialResult,
)

INFERENCE = (
    InferenceConfig(config_id="full", frame_interval=1),
    InferenceConfig(config_id="half", frame_interval=2),
    InferenceConfig(config_id="tenth", frame_interval=10),
)
SHARES = {"full": 0.4, "half": 0.2, "tenth": 0.05}
QUALITY = {"full": 1.0, "half": 0.85, "tenth": 0.5}
RETRAIN = (
    RetrainConfig(config_id="cheap", epochs=2),
    RetrainConfig(config_id="dear", epochs=20),
)
COSTS = {"cheap": 5.0, "dear": 30.0, "bootstrap": 5.0}
REACHED = {"cheap": 0.75, "dear": 0.9, "bootstrap": 0.8}


def site(num_streams: int = 2, **changes: object) -> SiteConfig:
    streams = tuple(
        StreamSpec(stream_id=f"s{i}", source=CitySource(seed=i), classes=("car", "bus")) for i in range(num_streams)
    )
    plain = SiteConfig(
        name="test",
        streams=streams,
        inference=INFERENCE,
        retrain=RETRAIN,
        window_s=100.0,
        bootstrap=BootstrapConfig(seconds=10.0),
        profiling=ProfilingConfig(share=0.3),
    )
    return msgspec.structs.replace(plain, **changes)


class Wish(Record, frozen=True, kw_only=True):
    retrain: tuple[RetrainConfig, ...] = RETRAIN
    inference: tuple[InferenceConfig, ...] = INFERENCE
    data_share: float = 0.1
    num_epochs: int = 2
    num_frames: int = 10


class TestProfiler:
    """Knows the truth of the world; remembers what it was told."""

    __test__ = False

    def __init__(self) -> None:
        self.wish = Wish()
        self.waits: list[float | None] = []
        self.outcomes: list[tuple[str, bool]] = []
        self.runs: list[RetrainRun | None] = []
        self.gates: list[GateEvidence] = []
        self.live: list[StreamAccuracy] = []
        self.efficiency: dict[str, tuple[tuple[float, float], ...]] = {}
        self.windows: list[tuple[str, int, float | None, float | None]] = []

    def choose(
        self,
        spec: StreamSpec,
        window: int,
        dataset: DatasetRef,
        *,
        drift: float | None = None,
        price: float | None = None,
        wait_share: float | None = None,
    ) -> Wish:
        self.waits.append(wait_share)
        return self.wish

    def estimate(self, spec: StreamSpec, trial: TrialResult, dataset: DatasetRef) -> StreamProfile:
        return StreamProfile(
            stream_id=spec.stream_id,
            accuracy_now=trial.accuracy_now,
            inference=tuple(
                InferenceProfile(
                    inference_id=c.config_id,
                    gpu_share_needed=SHARES[c.config_id],
                    relative_accuracy=QUALITY[c.config_id],
                    config=c,
                )
                for c in INFERENCE
            ),
            retrain=tuple(
                RetrainProfile(
                    retrain_id=c.config_id,
                    accuracy_after=REACHED[c.config_id],
                    gpu_seconds=COSTS[c.config_id],
                    config=c,
                )
                for c in RETRAIN
            ),
        )

    def retrained(
        self,
        spec: StreamSpec,
        result: RetrainResult,
        predicted: float,
        predicted_s: float,
        promoted: bool,
        run: RetrainRun | None = None,
    ) -> None:
        self.outcomes.append((spec.stream_id, promoted))
        self.runs.append(run)

    def record_gate(self, decision: GateEvidence) -> None:
        self.gates.append(decision)

    def share_efficiency(self, device: str) -> tuple[tuple[float, float], ...]:
        return self.efficiency.get(device, ())

    def measured(self, event: StreamAccuracy) -> None:
        self.live.append(event)

    def window_closed(self, stream_id: str, window: int, predicted: float | None, realised: float | None) -> None:
        self.windows.append((stream_id, window, predicted, realised))


class TestWorld:
    """Every model loses 0.3 of accuracy per window since its training; retraining brings it to REACHED.

    ``worse``: streams whose retrainings make nothing better.
    """

    __test__ = False

    def __init__(self) -> None:
        self.models: dict[str, tuple[float, int]] = {}
        self.worse: set[str] = set()
        self.fooled: dict[str, float] = {}
        self.hide = 0.0  # part of a gain that held-out labels do not show
        self.started: list[str] = []

    def label(self, job: m.LabelJob) -> tuple[float, LabelResult]:
        self.started.append(job.job_id)
        dataset = DatasetRef(
            path="d",
            stream_id=job.stream.stream_id,
            window=job.window,
            num_train=60,
            num_validation=20,
            class_counts=(40, 40),
        )
        return 1.0, LabelResult(dataset=dataset, num_frames=20, seconds=1.0)

    def trial(self, job: m.TrialJob) -> tuple[float, TrialResult]:
        self.started.append(job.job_id)
        now = self._model(job.checkpoint, job.window)
        seconds = 0.3 + 1.0 * bool(job.retrain) + 0.7 * bool(job.inference)
        return seconds, TrialResult(
            stream_id=job.stream.stream_id,
            window=job.window,
            accuracy_now=now,
            retrain=(),
            inference=(),
            seconds=seconds,
        )

    def retrain(self, job: m.RetrainJob) -> tuple[float, RetrainResult]:
        self.started.append(job.job_id)
        stream_id, name = job.stream.stream_id, job.config.config_id
        before = self._model(job.checkpoint, job.window) if job.checkpoint else 0.0
        after = before if stream_id in self.worse else REACHED[name]
        sha256 = hashlib.sha256(job.job_id.encode()).hexdigest()
        self.models[sha256] = (after, job.window)
        return COSTS[name], RetrainResult(
            stream_id=stream_id,
            window=job.window,
            config=job.config,
            checkpoint=CheckpointRef(path="c", sha256=sha256, stream_id=stream_id, version=job.next_version),
            accuracy_before=before,
            accuracy_after=after,
            num_validation=20,
            epochs=(),
            busy_s=COSTS[name],
            seconds=COSTS[name],
            paired=exact_votes(before, before + (1.0 - self.hide) * (after - before)),
        )

    def canary(self, job: m.CanaryJob) -> tuple[float, CanaryResult]:
        self.started.append(job.job_id)
        stream_id = job.stream.stream_id
        old, new = (self.live(ref, job.window) for ref in (job.previous, job.candidate))
        votes = exact_votes(old, new)
        return 0.2, CanaryResult(
            stream_id=stream_id,
            candidate_version=job.candidate.version,
            num_frames=10,
            num_crops=40,
            accuracy_candidate=new,
            accuracy_previous=old,
            paired=PairedCounts(num_objects=20, num_won=votes.num_won // 50, num_lost=votes.num_lost // 50),
            seconds=0.2,
        )

    def live(self, checkpoint: CheckpointRef, window: int) -> float:
        """What a model is worth on live frames; ``fooled`` streams' retrainings look good on held-out labels only."""
        accuracy = self._model(checkpoint, window)
        return max(0.0, accuracy - self.fooled.get(checkpoint.stream_id, 0.0)) if checkpoint.version > 1 else accuracy

    def accuracy(self, stream_id: str, window: int, checkpoint: CheckpointRef, config: InferenceConfig) -> float:
        return self.live(checkpoint, window) * QUALITY[config.config_id]

    def _model(self, checkpoint: CheckpointRef, window: int) -> float:
        accuracy, trained = self.models[checkpoint.sha256]
        return max(0.1, accuracy - 0.3 * (window - trained))


def thief(problem: Problem, last: Plan | None) -> Plan:
    return thief_alone(problem, 1.0)


def simulation(
    config: SiteConfig,
    *,
    num_gpus: int = 1,
    num_windows: int | None = 3,
    state: SiteState | None = None,
    world: TestWorld | None = None,
    adopt_until_s: float | None = None,
    join: bool = True,
    profiler: TestProfiler | None = None,
) -> tuple[Simulation, TestWorld, TestProfiler]:
    world, profiler = world or TestWorld(), profiler or TestProfiler()
    coordinator = Coordinator(
        config, profiler, state or SiteState(site="test"), num_windows=num_windows, adopt_until_s=adopt_until_s
    )
    run = Simulation(coordinator, [], world, thief)
    if join:
        for i in range(num_gpus):
            run.join(SimulatedExecutor(GpuSpec(gpu_id=f"gpu{i}"), world))
    return run, world, profiler
