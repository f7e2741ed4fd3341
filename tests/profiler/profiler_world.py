"""A small world whose truth is known: true learning curves and costs, trials with honest sampling noise."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from profiler.curves import effective_effort
from profiler.records import Outcome
from protocol.schema import (
    CheckpointRef,
    CitySource,
    DatasetRef,
    EpochResult,
    InferenceConfig,
    InferenceTrial,
    RetrainConfig,
    RetrainResult,
    RetrainTrial,
    StreamSpec,
    TrialResult,
)

SPEC = StreamSpec(stream_id="north", source=CitySource(seed=1), classes=("car", "person"), fps=10.0)

HEAD = {"trained_fraction": 0.0, "batch_size": 32}
FULL = {"trained_fraction": 1.0, "batch_size": 32}
RETRAIN = tuple(
    RetrainConfig(config_id=f"{name}-e{epochs}-d{int(100 * share)}", epochs=epochs, data_fraction=share, **knobs)  # type: ignore[arg-type]
    for name, knobs in (("head", HEAD), ("full", FULL))
    for epochs in (3, 8, 20)
    for share in (0.3, 1.0)
)
INFERENCE = tuple(
    InferenceConfig(config_id=f"i{interval}-r{px}", frame_interval=interval, resolution_px=px)
    for interval, px in ((1, 32), (2, 32), (5, 32), (1, 16))
)
TRUE_QUALITY = dict(zip(INFERENCE, (1.0, 0.93, 0.8, 0.9), strict=True))


def no_more(a: RetrainConfig, b: RetrainConfig) -> bool:
    """Of one group, with no more epochs and no more data."""
    return a.trained_fraction == b.trained_fraction and a.epochs <= b.epochs and a.data_fraction <= b.data_fraction


@dataclass
class World:
    """True values. Accuracies are of the held-out split; costs in busy seconds at share 1."""

    seed: int
    num_train: int = 300
    num_validation: int = 120
    accuracy_now: float = 0.6
    bias: float = 0.0  # what full-length training reaches beyond what its early epochs promise
    slowdown: float = 1.0  # realised over expected cost of a retraining
    rng: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)

    def dataset(self, window: int) -> DatasetRef:
        return DatasetRef(
            path=f"north/{window}.npz",
            stream_id="north",
            window=window,
            num_train=self.num_train,
            num_validation=self.num_validation,
            class_counts=(self.num_train // 2, self.num_train - self.num_train // 2),
        )

    def accuracy(self, config: RetrainConfig, epochs: float, num_samples: float) -> float:
        end, scale = (0.78, 120.0) if config.trained_fraction == 0.0 else (0.9, 420.0)
        x = effective_effort(epochs, num_samples)
        return self.accuracy_now + (end - self.accuracy_now) * x / (x + scale)

    def after(self, config: RetrainConfig) -> float:
        return self.accuracy(config, config.epochs, config.data_fraction * self.num_train) + self.bias

    def seconds_per_sample(self, config: RetrainConfig) -> float:
        return 0.001 * (1.0 + 2.0 * config.trained_fraction)

    def gpu_seconds(self, config: RetrainConfig) -> float:
        per_epoch = self.seconds_per_sample(config) * config.data_fraction * self.num_train + 0.0003 * 120
        return 0.2 + config.epochs * per_epoch + 3 * 0.0003 * 120

    def busy_s_per_frame(self, config: InferenceConfig) -> float:
        return 0.02 * (config.resolution_px / 32) / config.frame_interval

    def noisy(self, accuracy: float, num: int) -> float:
        return float(self.rng.binomial(num, accuracy)) / num

    def trial(
        self,
        window: int,
        retrain: tuple[RetrainConfig, ...],
        inference: tuple[InferenceConfig, ...] = INFERENCE,
        *,
        num_samples: int = 60,
        num_epochs: int = 4,
        num_frames: int = 100,
    ) -> TrialResult:
        rows = []
        for config in retrain:
            train_s = self.seconds_per_sample(config) * num_samples
            epochs = tuple(
                EpochResult(
                    epoch=e,
                    accuracy=self.noisy(self.accuracy(config, e, num_samples), self.num_validation),
                    loss=math.exp(-e),
                    busy_s=0.036 + (train_s * float(self.rng.uniform(0.95, 1.05)) if e else 0.0),
                )
                for e in range(num_epochs + 1)
            )
            rows.append(
                RetrainTrial(
                    config=config,
                    num_samples=num_samples,
                    total_samples=round(config.data_fraction * self.num_train),
                    startup_s=0.2,
                    epochs=epochs,
                    memory_bytes=1000 + int(1000 * config.trained_fraction),
                )
            )
        measured = tuple(
            InferenceTrial(
                config=config,
                busy_s_per_frame=self.busy_s_per_frame(config),
                accuracy=self.noisy(self.accuracy_now * TRUE_QUALITY[config], num_frames * 6),
                num_frames=num_frames,
                memory_bytes=500,
            )
            for config in inference
        )
        return TrialResult(
            stream_id="north",
            window=window,
            accuracy_now=self.noisy(self.accuracy_now, 4 * self.num_validation),
            retrain=tuple(rows),
            inference=measured,
            seconds=1.0,
        )

    def outcome(self, window: int, config: RetrainConfig) -> Outcome:
        after = self.noisy(min(self.after(config), 1.0), self.num_validation)
        epochs = tuple(EpochResult(epoch=e, accuracy=after, loss=0.1, busy_s=1.0) for e in (0, config.epochs))
        return Outcome(
            result=RetrainResult(
                stream_id="north",
                window=window,
                config=config,
                checkpoint=CheckpointRef(
                    path="north/m.safetensors", sha256="0" * 64, stream_id="north", version=window + 2
                ),
                accuracy_before=self.accuracy_now,
                accuracy_after=after,
                num_validation=self.num_validation,
                epochs=epochs,
                busy_s=self.gpu_seconds(config) * self.slowdown * float(self.rng.uniform(0.97, 1.03)),
                seconds=10.0,
            ),
            accuracy_predicted=None,
            seconds_predicted=None,
            promoted=True,
        )
