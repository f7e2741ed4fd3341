"""Whether students and golden models can be had: run as ``python -m executor.learning.check`` with a Request on
standard input.

Used before a run, where torch is: a site file that names a model that does not exist is refused before anything is
started. Exit code 2 and one line on standard error say what is wrong. Nothing is downloaded.
"""

from __future__ import annotations

import os
import sys

import msgspec
import torch

from executor.learning.device import Device
from executor.learning.golden import check_model_name, check_weights, class_table, open_golden
from executor.learning.models import build_student
from executor.learning.stepping import FreeStepper
from executor.learning.task import task_of
from protocol.errors import InputError
from protocol.schema import Record, StreamSpec, TorchvisionGolden


class Request(Record, frozen=True, kw_only=True):
    """The streams whose models are to be checked."""

    streams: tuple[StreamSpec, ...]


def check_stream(stream: StreamSpec) -> None:
    """Raises InputError naming the stream and the field when its student or its golden model cannot be had."""
    try:
        build_student(task_of(stream).student_spec(stream.student), len(stream.classes))
    except InputError as error:
        raise InputError(f"stream {stream.stream_id}: {error}") from error
    golden = stream.golden
    if not isinstance(golden, TorchvisionGolden):
        return
    if golden.weights_file:
        open_golden(stream, Device("cpu", torch.device("cpu")), FreeStepper(), seed=0)
        return
    try:
        kind = check_model_name(golden.model)
        class_table(golden, stream.classes, kind)
        check_weights(golden)
    except InputError as error:
        raise InputError(f"stream {stream.stream_id}: {error}") from error


def main() -> int:
    """Answer one request; the exit code (2: a model cannot be had)."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        request = msgspec.json.decode(sys.stdin.buffer.read(), type=Request)
        seen: list[StreamSpec] = []
        for stream in request.streams:
            # Streams are often alike; what differs between them matters nothing here.
            alike = [s for s in seen if (s.student, s.golden, s.task, s.classes) == _models(stream)]
            if not alike:
                check_stream(stream)
                seen.append(stream)
    except (msgspec.MsgspecError, InputError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _models(stream: StreamSpec) -> tuple[object, ...]:
    return (stream.student, stream.golden, stream.task, stream.classes)


if __name__ == "__main__":
    raise SystemExit(main())
