"""What serving costs on this device: run as ``python -m executor.learning.measure`` with a Request on standard input.

Used before a run, when there is no model and no executor yet: the student is untrained, which changes nothing
about its speed.
"""

from __future__ import annotations

import os
import statistics
import sys

import msgspec

from executor.learning.device import Device, take_device
from executor.learning.inference import InferenceEngine
from executor.learning.models import build_student
from executor.learning.task import task_of
from executor.streams.open import open_source
from protocol.errors import InputError
from protocol.schema import InferenceConfig, PositiveInt, Record, StreamSpec


class Request(Record, frozen=True, kw_only=True):
    """Serve ``num_frames`` frames of each stream with ``config`` on ``device``."""

    device: str
    streams: tuple[StreamSpec, ...]
    config: InferenceConfig
    num_frames: PositiveInt = 60


class Answer(Record, frozen=True, kw_only=True):
    """Busy seconds per stream frame at share 1, one per stream of the request, in its order."""

    busy_s_per_frame: tuple[float, ...]


def serving_cost(spec: StreamSpec, config: InferenceConfig, device: Device, num_frames: int) -> float:
    """Median busy seconds per frame of an untrained student on the stream's first frames, warm-up left out."""
    task = task_of(spec)
    student = build_student(task.student_spec(spec.student), len(spec.classes))
    source = open_source(spec)
    try:
        engine = InferenceEngine(task.analyser(student, device, 1), config, task.judge)
        first = round(spec.start_s * spec.fps)
        for index in range(first - 5, first):
            engine.process(source.frame(index))
        # Means of ten frames: configurations that skip frames cost little in most and much in some.
        costs = []
        for start in range(first, first + num_frames, 10):
            before = device.busy_s()
            for index in range(start, start + 10):
                engine.process(source.frame(index))
            costs.append((device.busy_s() - before) / 10)
        return statistics.median(costs)
    finally:
        source.close()


def main() -> int:
    """Answer one request; the exit code (2: the request cannot be used)."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        request = msgspec.json.decode(sys.stdin.buffer.read(), type=Request)
        device = take_device(request.device)
        costs = tuple(serving_cost(spec, request.config, device, request.num_frames) for spec in request.streams)
    except (msgspec.MsgspecError, InputError) as error:
        print(f"measure: {error}", file=sys.stderr)
        return 2
    sys.stdout.buffer.write(msgspec.json.encode(Answer(busy_s_per_frame=costs)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
