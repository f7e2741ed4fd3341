"""Problems to plan: drawn at random, read from files, written to files.

A problem file is the JSON text of one ``protocol.plan.Problem``.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import msgspec
import numpy as np

from protocol.errors import InputError
from protocol.plan import InferenceProfile, Problem, RetrainProfile, StreamProfile
from protocol.schema import GpuSpec, InferenceConfig, RetrainConfig

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
    try:
        problem = msgspec.json.decode(content, type=Problem, strict=True)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path}: not a problem file: {error}") from error
    check_problem(problem, str(path))
    return problem


def save_problem(problem: Problem, path: str | Path) -> None:
    """Write ``problem`` as indented JSON. InputError when the file cannot be written."""
    try:
        Path(path).write_bytes(msgspec.json.format(msgspec.json.encode(problem), indent=1) + b"\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error


def check_problem(problem: Problem, where: str = "problem") -> None:
    """Refuse what the types cannot: doubled ids, unknown references, numbers that are none (InputError)."""
    _check_numbers(msgspec.to_builtins(problem), where)
    gpu_ids = [gpu.gpu_id for gpu in problem.gpus]
    _check_unique(gpu_ids, f"{where}: gpus: gpu_id")
    _check_unique((stream.stream_id for stream in problem.streams), f"{where}: streams: stream_id")
    for gpu in problem.gpus:
        shares = [share for share, _ in gpu.share_efficiency]
        if shares != sorted(set(shares)) or any(not 0.0 < share <= 1.0 for share in shares):
            raise InputError(f"{where}: gpus[{gpu.gpu_id}].share_efficiency: shares must ascend within (0, 1]")
        if any(not efficiency > 0.0 for _, efficiency in gpu.share_efficiency):
            raise InputError(f"{where}: gpus[{gpu.gpu_id}].share_efficiency: throughput must be above 0")
    for stream in problem.streams:
        field = f"{where}: streams[{stream.stream_id}]"
        _check_unique((p.inference_id for p in stream.inference), f"{field}.inference: inference_id")
        _check_unique((p.retrain_id for p in stream.retrain), f"{field}.retrain: retrain_id")
        for profile in stream.retrain:
            if profile.pinned_gpu is not None and profile.pinned_gpu not in gpu_ids:
                named = f"{field}.retrain[{profile.retrain_id}].pinned_gpu"
                raise InputError(f"{named}: there is no GPU {profile.pinned_gpu!r}; GPUs are {', '.join(gpu_ids)}")


def _check_unique(names: Iterable[str], where: str) -> None:
    doubled = [name for name, count in Counter(names).items() if count > 1]
    if doubled:
        raise InputError(f"{where} {doubled[0]!r} appears more than once; ids must be unique")


def _check_numbers(node: object, where: str) -> None:
    if isinstance(node, float) and not math.isfinite(node):
        raise InputError(f"{where}: {node} is not a finite number")
    if isinstance(node, dict):
        for key, child in node.items():
            _check_numbers(child, f"{where}.{key}")
    elif isinstance(node, list | tuple):
        for index, child in enumerate(node):
            _check_numbers(child, f"{where}[{index}]")
