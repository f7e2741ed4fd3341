"""Problems that nobody can plan are refused: from files, and where programs made them.

The structs say what each field may be, but only when they are decoded; what they cannot say is checked
here besides. Every error names the field, and the stream, GPU or configuration that it is of.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import msgspec

from optimizer.execution import TOLERANCE
from protocol.errors import InputError
from protocol.plan import Problem, StreamProfile

LEAST_QUANTUM = 1e-3
WASTED_PART = 0.01  # of a GPU, that whole quanta may leave over
MOST_SLOTS = 10_000
# Far beyond anything real, and near enough to keep sums, products and solvers in the range where they are exact.
MOST_BYTES = 1 << 50
MOST_FACTOR = 1e4  # of speeds and shares needed
MOST_WEIGHT = 1e6
MOST_BYTES_PER_S = 1e15
# A float64 whose exponent is all ones; other bytes may look like it, so that a hit only means: look closer.
_PERHAPS_NON_FINITE = re.compile(rb"\xcb[\x7f\xff][\xf0-\xff]", re.DOTALL)
_IDS = ("stream_id", "gpu_id", "link_id", "inference_id", "retrain_id")

_LIMITS: dict[str, tuple[tuple[str, float, float], ...]] = {
    "inference": (("gpu_share_needed", 0.0, MOST_FACTOR), ("memory_bytes", 0, MOST_BYTES)),
    "retrain": (("gpu_seconds", 0.0, 1e9), ("memory_bytes", 0, MOST_BYTES), ("swap_bytes", 0, MOST_BYTES)),
    "cloud": (("up_bytes", 0, MOST_BYTES), ("down_bytes", 0, MOST_BYTES), ("swap_bytes", 0, MOST_BYTES)),
}


def parse_problem(content: bytes, where: str) -> Problem:
    """A problem from JSON. InputError names ``where`` it came from, the field and what is wrong with it."""
    if not content.strip():
        raise InputError(f"{where}: is empty; a problem file is the JSON text of one problem")
    try:
        problem = msgspec.json.decode(content, type=Problem, strict=True)
    except msgspec.ValidationError as error:
        raise InputError(f"{where}: {explain(str(error), _untyped(content))}") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raw = _untyped(content)
        _check_numbers(raw, where, raw)  # NaN and 1e999 are no JSON, but we know where they stand
        raise InputError(f"{where}: is not JSON: {error}") from None
    except RecursionError:
        raise InputError(f"{where}: is not a problem: nested too deeply") from None
    check_problem(problem, where)
    return problem


def _untyped(content: bytes) -> Any:
    """The same text without types, None where it is no JSON; Python's reader takes NaN and Infinity."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def explain(text: str, raw: Any) -> str:
    """ "... - at `$.streams[0].weight`" as "streams[cam-1].weight: ...", with the ids that ``raw`` has there."""
    match = re.fullmatch(r"(?s)(.*?)(?: - at `(?:key in )?\$\.?([^`]*)`)?", text)
    assert match is not None
    what, path = match[1], match[2] or ""
    what = what[:1].lower() + what[1:]
    if path == "format" and "enum" in what:
        what += "; this program reads 'ekya-problem/1'"
    return f"{named_path(path, raw)}: {what}" if path else what


def named_path(path: str, raw: Any) -> str:
    """A path like ``streams[0].retrain[2].gpu_seconds`` with ids for the numbers, as far as ``raw`` has them."""
    named, node = "", raw
    for part in re.findall(r"[^.\[\]]+|\[[^\]]*\]", path):
        if part.startswith("["):
            index = part[1:-1]
            node = node[int(index)] if isinstance(node, list | tuple) and _is_index(index, len(node)) else None
            named += f"[{_id_of(node) or index}]"
        else:
            node = node.get(part) if isinstance(node, dict) else None
            named += f".{part}" if named else part
    return named


def _is_index(text: str, length: int) -> bool:
    return text.isdecimal() and int(text) < length


def _id_of(node: Any) -> str | None:
    if not isinstance(node, dict):
        return None
    return next((node[key] for key in _IDS if isinstance(node.get(key), str)), None)


def check_problem(problem: Problem, where: str = "problem") -> None:
    """Refuse what cannot be planned, whoever made the problem (InputError).

    Types and ranges of the structs are checked as well: constructors do not look at them.
    """
    plain = msgspec.to_builtins(problem)
    try:
        msgspec.convert(plain, Problem, strict=True)
    except msgspec.ValidationError as error:
        raise InputError(f"{where}: {explain(str(error), plain)}") from None
    try:  # a look at the bytes is much quicker than a walk over a thousand streams
        suspicious = _PERHAPS_NON_FINITE.search(msgspec.msgpack.encode(plain)) is not None
    except OverflowError:
        suspicious = True
    if suspicious:
        _check_numbers(plain, where, plain)
    _check_site(problem, where)
    for stream in problem.streams:
        _check_stream(stream, problem, f"{where}: streams[{stream.stream_id}]")


def check_quantum(quantum: float, where: str) -> None:
    """A share quantum has to cut a GPU into whole quanta that leave next to nothing over (InputError)."""
    if not LEAST_QUANTUM <= quantum <= 1.0:
        raise InputError(f"{where}: {quantum:g} is not within {LEAST_QUANTUM:g} and 1")
    quanta = math.floor(1.0 / quantum + TOLERANCE)
    left = 1.0 - quanta * quantum
    if left > WASTED_PART + TOLERANCE:
        near = f"{1.0 / quanta:.4g} or {1.0 / (quanta + 1):.4g}"
        raise InputError(f"{where}: {quantum:g} does not divide a GPU ({left:.0%} of it would be lost); try {near}")


def _check_site(problem: Problem, where: str) -> None:
    check_quantum(problem.share_quantum, f"{where}: share_quantum")
    if problem.num_slots > MOST_SLOTS:
        raise InputError(f"{where}: num_slots: {problem.num_slots} is more than {MOST_SLOTS}")
    _check_unique((gpu.gpu_id for gpu in problem.gpus), f"{where}: gpus: gpu_id")
    _check_unique((stream.stream_id for stream in problem.streams), f"{where}: streams: stream_id")
    _check_unique((link.link_id for link in problem.links), f"{where}: links: link_id")
    for gpu in problem.gpus:
        field = f"{where}: gpus[{gpu.gpu_id}]"
        _check_range(gpu.speed, 1.0 / MOST_FACTOR, MOST_FACTOR, f"{field}.speed")
        _check_range(gpu.memory_bytes, 0, MOST_BYTES, f"{field}.memory_bytes")
        shares = [share for share, _ in gpu.share_efficiency]
        if shares != sorted(set(shares)) or any(not 0.0 < share <= 1.0 for share in shares):
            raise InputError(f"{field}.share_efficiency: shares must ascend within (0, 1]")
        if any(not 0.0 < efficiency <= MOST_FACTOR for _, efficiency in gpu.share_efficiency):
            raise InputError(f"{field}.share_efficiency: throughput must be above 0 and at most {MOST_FACTOR:g}")
    for link in problem.links:
        field = f"{where}: links[{link.link_id}]"
        for key in ("up_bytes_per_s", "down_bytes_per_s"):
            _check_range(getattr(link, key), 1e-3, MOST_BYTES_PER_S, f"{field}.{key}")


def _check_stream(stream: StreamProfile, problem: Problem, field: str) -> None:
    gpu_ids = [gpu.gpu_id for gpu in problem.gpus]
    link_ids = [link.link_id for link in problem.links]
    _check_unique((p.inference_id for p in stream.inference), f"{field}.inference: inference_id")
    retrain_ids = [p.retrain_id for p in stream.retrain] + [p.retrain_id for p in stream.cloud]
    _check_unique(retrain_ids, f"{field}.retrain and cloud: retrain_id")
    _check_range(stream.weight, 1.0 / MOST_WEIGHT, MOST_WEIGHT, f"{field}.weight")
    if stream.serving_gpu is not None and stream.serving_gpu not in gpu_ids:
        raise InputError(f"{field}.serving_gpu: {_unknown('GPU', stream.serving_gpu, gpu_ids)}")
    for kind, rows in (("inference", stream.inference), ("retrain", stream.retrain), ("cloud", stream.cloud)):
        for key, least, most in _LIMITS[kind]:
            for row in rows:
                value = getattr(row, key)
                if not least <= value <= most:
                    _check_range(value, least, most, f"{field}.{kind}[{_id_of(msgspec.to_builtins(row))}].{key}")
    for profile in stream.retrain:
        if profile.pinned_gpu is not None and profile.pinned_gpu not in gpu_ids:
            named = f"{field}.retrain[{profile.retrain_id}].pinned_gpu"
            raise InputError(f"{named}: {_unknown('GPU', profile.pinned_gpu, gpu_ids)}")
    for cloud in stream.cloud:
        if cloud.link_id not in link_ids:
            named = f"{field}.cloud[{cloud.retrain_id}].link_id"
            raise InputError(f"{named}: {_unknown('link', cloud.link_id, link_ids)}")


def _unknown(kind: str, name: str, known: list[str]) -> str:
    shown = ", ".join(known[:10]) + (f" and {len(known) - 10} more" if len(known) > 10 else "")
    return (
        f"there is no {kind} {name!r}; {kind}s are {shown}" if known else f"there is no {kind} {name!r}, and no other"
    )


def _check_range(value: float, least: float, most: float, where: str) -> None:
    if not least <= value <= most:
        raise InputError(f"{where}: {value:g} is not within {least:g} and {most:g}")


def _check_unique(names: Iterable[str], where: str) -> None:
    doubled = [name for name, count in Counter(names).items() if count > 1]
    if doubled:
        raise InputError(f"{where} {doubled[0]!r} appears more than once; ids must be unique")


def _check_numbers(node: object, where: str, root: object, path: str = "") -> None:
    if isinstance(node, float) and not math.isfinite(node):
        raise InputError(f"{where}: {named_path(path, root)}: {node} is not a finite number")
    if isinstance(node, int) and abs(node) > MOST_BYTES:
        raise InputError(f"{where}: {named_path(path, root)}: a number of {len(str(abs(node)))} digits is too large")
    if isinstance(node, dict):
        for key, child in node.items():
            _check_numbers(child, where, root, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list | tuple):
        for index, child in enumerate(node):
            _check_numbers(child, where, root, f"{path}[{index}]")
