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
from protocol.plan import CloudProfile, InferenceProfile, Problem, RetrainProfile, StreamProfile
from protocol.schema import GpuSpec, InferenceConfig, LinkSpec, RetrainConfig

__all__ = ["check_problem", "load_problem", "parse_size", "random_problem", "save_problem", "with_limits"]

EPOCHS = (5, 15, 30)
FRAME_INTERVALS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 15, 20)
FULL_RATE_SHARE = 0.25
FINER_QUANTA = (0.05, 0.02, 0.01)
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


def servable(problem: Problem) -> Problem:
    """``problem`` as it is, or, where its GPUs have fewer quanta than there are streams, with a finer quantum.

    Every stream takes at least one quantum. The finer one leaves a quarter of the quanta to retrainings.
    """
    count, gpus = len(problem.streams), len(problem.gpus)
    if count <= gpus * math.floor(1.0 / problem.share_quantum + 1e-6):
        return problem
    finer = next((quantum for quantum in FINER_QUANTA if count <= 0.75 * gpus / quantum), FINER_QUANTA[-1])
    return msgspec.structs.replace(problem, share_quantum=min(finer, problem.share_quantum))


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


def with_limits(problem: Problem, seed: int) -> Problem:
    """``problem`` with everything that a plan may have to keep to besides shares; made for problems of 200 s.

    Latency: 0.02 to 0.2 s, the longer the rarer frames are analysed; four streams in five have a limit that some of
    their configurations break. Half of the streams have an own window of 60 to 200 s. Labels of a retraining cost
    up to 6 s, the more the larger its group's part of the data; the budget is a third of what all streams could
    want. Gains have standard errors of 0.01 to 0.1. Three streams in five may be retrained in the cloud over a
    cellular link (5.1 Mb/s up, 17.5 down; 10 MB up, 50 MB down).
    """
    rng = np.random.default_rng([seed, 1])
    streams = tuple(_limited_stream(stream, rng) for stream in problem.streams)
    wanted = sum(max((p.label_seconds for p in stream.retrain), default=0.0) for stream in streams)
    link = LinkSpec(link_id="cellular", up_bytes_per_s=5.1e6 / 8, down_bytes_per_s=17.5e6 / 8)
    return msgspec.structs.replace(
        problem, streams=streams, links=(link,), label_budget_s=round(wanted / 3.0, 3), planning_quantile=0.3
    )


def _limited_stream(stream: StreamProfile, rng: np.random.Generator) -> StreamProfile:
    count = len(stream.inference)
    quickest, slowest = float(rng.uniform(0.02, 0.05)), float(rng.uniform(0.1, 0.2))
    latencies = [quickest + (slowest - quickest) * index / max(1, count - 1) for index in range(count)]
    limit_s = round(float(rng.uniform(0.5 * (quickest + slowest), slowest)), 4) if rng.random() < 0.8 else None
    groups = max(1, math.ceil(len(stream.retrain) / len(EPOCHS)))
    most_labels_s = float(rng.uniform(2.0, 6.0))
    retrain = tuple(
        msgspec.structs.replace(
            profile,
            accuracy_error=round(float(rng.uniform(0.01, 0.1)), 4),
            label_seconds=round(most_labels_s * (index // len(EPOCHS) + 1) / groups, 3),
        )
        for index, profile in enumerate(stream.retrain)
    )
    cloud: tuple[CloudProfile, ...] = ()
    if rng.random() < 0.6 and retrain:
        best = max(retrain, key=lambda profile: profile.accuracy_after)
        cloud = (
            CloudProfile(
                retrain_id="cloud",
                link_id="cellular",
                accuracy_after=best.accuracy_after,
                up_bytes=int(rng.integers(8_000_000, 12_000_000)),
                cloud_seconds=round(float(rng.uniform(0.0, 10.0)), 3),
                down_bytes=50_000_000,
                accuracy_error=best.accuracy_error,
                label_seconds=best.label_seconds,
            ),
        )
    return msgspec.structs.replace(
        stream,
        inference=tuple(
            msgspec.structs.replace(profile, latency_s=round(latency_s, 4))
            for profile, latency_s in zip(stream.inference, latencies, strict=True)
        ),
        retrain=retrain,
        cloud=cloud,
        max_latency_s=limit_s,
        window_s=round(float(rng.uniform(60.0, 200.0)), 1) if rng.random() < 0.5 else None,
    )


PROBLEM_ENDING = ".problem.json"  # of a problem that lies beside the plans that answer it


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
