"""Problems to plan: drawn at random, read from files, written to files.

A problem file is the JSON text of one ``protocol.plan.Problem``.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import msgspec
import numpy as np

from optimizer.checks import check_problem, parse_problem
from protocol.errors import InputError
from protocol.plan import InferenceProfile, Problem, RetrainProfile, StreamProfile
from protocol.schema import GpuSpec, InferenceConfig, RetrainConfig

__all__ = ["check_problem", "load_problem", "parse_size", "random_problem", "save_problem"]

EPOCHS = (5, 15, 30)
FRAME_INTERVALS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 15, 20)
FULL_RATE_SHARE = 0.25
MIN_COST_S, MAX_COST_S = 3.0, 315.0


def parse_size(text: str) -> tuple[int, int, int]:
    """(streams, GPUs, retraining configurations) from a text like ``10x8x18``; InputError when it is none."""
    match = re.fullmatch(r"(\d{1,5})x(\d{1,4})x(\d{1,3})", text.strip())
    if match is None:
        raise InputError(f"size {text!r}: write STREAMSxGPUSxRETRAININGS, for example 10x8x18")
    num_streams, num_gpus, num_retrain = (int(part) for part in match.groups())
    if num_streams < 1 or num_gpus < 1:
        raise InputError(f"size {text!r}: at least one stream and one GPU are needed")
    return num_streams, num_gpus, num_retrain


def random_problem(num_streams: int, num_gpus: int, num_retrain: int, seed: int) -> Problem:
    """A contended problem whose figures resemble published measurements (ResNet-18, V100, street scenes).

    Window 200 s, quantum 0.1. Accuracy now 0.30 to 0.75. Retraining: groups of three configurations
    (5, 15, 30 epochs) from "head only, a tenth of the data" to "all layers, all data", 3 to 315
    GPU-seconds; gains of 0 to 0.5 that saturate in the epochs and grow ever slower with the data.
    Inference: one frame in 1 to 20, relative accuracy falling with the interval, 0.25 GPU at full rate.
    """
    rng = np.random.default_rng(seed)
    streams = tuple(_random_stream(f"s{index}", num_retrain, rng) for index in range(num_streams))
    gpus = tuple(GpuSpec(gpu_id=f"gpu{index}") for index in range(num_gpus))
    return Problem(window_s=200.0, gpus=gpus, streams=streams, share_quantum=0.1)


def _random_stream(stream_id: str, num_retrain: int, rng: np.random.Generator) -> StreamProfile:
    decay, bend = rng.uniform(0.12, 0.30), rng.uniform(0.75, 0.95)
    inference = tuple(
        InferenceProfile(
            inference_id=f"every{interval}",
            gpu_share_needed=FULL_RATE_SHARE / interval,
            relative_accuracy=round(float(np.exp(-decay * (interval - 1) ** bend)), 4),
            config=InferenceConfig(config_id=f"every{interval}", frame_interval=interval),
        )
        for interval in FRAME_INTERVALS
    )
    accuracy_now = float(rng.uniform(0.30, 0.75))
    ceiling = min(0.98, accuracy_now + float(rng.uniform(0.03, 0.50)))
    groups = max(1, math.ceil(num_retrain / len(EPOCHS)))
    retrain: list[RetrainProfile] = []
    for group in range(groups):
        # Costs of the groups are evenly spread in the logarithm: 0.5 to 10 s per epoch, start-up on top.
        level = group / max(1, groups - 1)
        epoch_s = 0.5 * 20.0**level * float(rng.lognormal(0.0, 0.08))
        reach = (0.45 + 0.55 * level**0.6) * float(rng.uniform(0.8, 1.0))
        epochs_to_saturate = float(rng.uniform(3.0, 12.0))
        for epochs in EPOCHS:
            gain = (ceiling - accuracy_now) * reach * (1.0 - math.exp(-epochs / epochs_to_saturate))
            cost_s = min(MAX_COST_S, max(MIN_COST_S, 1.5 + epochs * epoch_s))
            name = f"c{group}e{epochs}"
            retrain.append(
                RetrainProfile(
                    retrain_id=name,
                    accuracy_after=round(accuracy_now + gain, 4),
                    gpu_seconds=round(cost_s, 3),
                    config=RetrainConfig(config_id=name, epochs=epochs),
                )
            )
    return StreamProfile(
        stream_id=stream_id,
        accuracy_now=round(accuracy_now, 4),
        inference=inference,
        retrain=tuple(retrain[:num_retrain]),
    )


def load_problem(path: str | Path) -> Problem:
    """Read and check a problem file. InputError names the file, the field and what is wrong with it."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    return parse_problem(content, str(path))


def save_problem(problem: Problem, path: str | Path) -> None:
    """Write ``problem`` as indented JSON. InputError when the file cannot be written."""
    try:
        Path(path).write_bytes(msgspec.json.format(msgspec.json.encode(problem), indent=1) + b"\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error
