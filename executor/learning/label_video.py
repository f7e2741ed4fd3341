"""Labels a whole video with a golden model and writes the sample list: ``python -m executor.learning.label_video``.

The request is a JSON object on standard input, the answer one on standard output; what is going on is told in lines
``progress DONE TOTAL`` on standard error. Without a golden model the video is only looked into. Exit code 2 and one
line on standard error: the request cannot be used.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from executor.learning.device import take_device
from executor.learning.files import write_atomically
from executor.learning.golden import open_golden
from executor.learning.stepping import FreeStepper
from executor.streams.recorded_rate import rate_of
from executor.streams.ring import LiveFrame
from executor.streams.samples import COLUMNS
from executor.streams.video import SourceError, Video
from protocol.errors import EkyaError, InputError
from protocol.schema import LiveSource, StreamSpec, TorchvisionGolden

_PROGRESS_S = 0.5


class Request(msgspec.Struct, frozen=True):
    """Label every ``step``-th frame of ``video`` into the sample list ``samples``; "" = only look at the video."""

    video: str
    samples: str = ""
    golden: TorchvisionGolden | None = None
    classes: tuple[str, ...] = ()
    step: int = 1
    device: str = "cpu:0"


class Answer(msgspec.Struct, frozen=True):
    """``fps`` of the file. ``ids``: category id, as written, to class; ``boxes``: how many of each class there are.
    ``seconds_per_frame``: busy seconds of the golden model."""

    fps: float
    num_frames: int
    width: int
    height: int
    num_labelled: int = 0
    ids: dict[str, str] = {}
    boxes: dict[str, int] = {}
    seconds_per_frame: float = 0.0


class _Pixels(LiveFrame):
    """A frame without truth whose pixels are at hand."""

    def __init__(self, index: int, pixels: NDArray[np.uint8]) -> None:
        super().__init__(index, 1.0, None)
        self._pixels = pixels

    def image(self) -> NDArray[np.uint8]:
        return self._pixels


def label_video(request: Request) -> Answer:
    """Raises InputError when the video, the golden model or the place for the samples is unusable."""
    video = Video(Path(request.video))
    try:
        plain = Answer(
            fps=rate_of(Path(request.video)), num_frames=video.num_frames, width=video.width, height=video.height
        )
        if request.golden is None:
            return plain
        device, stepper = take_device(request.device), FreeStepper()
        spec = StreamSpec(
            stream_id="video", source=LiveSource(url=request.video), classes=request.classes, golden=request.golden
        )
        golden = open_golden(spec, device, stepper, 0)
        numbers = range(0, video.num_frames, request.step)
        ids: dict[int, int] = {}
        boxes: Counter[int] = Counter()
        lines = [",".join(COLUMNS)]
        busy_s, told_s, skipped = 0.0, 0.0, 0
        for done, number in enumerate(numbers):
            if time.monotonic() - told_s > _PROGRESS_S:
                told_s = time.monotonic()
                print(f"progress {done} {len(numbers)}", file=sys.stderr, flush=True)
            try:
                frame = _Pixels(number, video.pixels(number))
            except SourceError:
                skipped += 1
                continue
            start = stepper.busy_s()
            labels = golden.label(frame)
            busy_s += stepper.busy_s() - start
            assert labels is not None, "nobody asks this process to stop"
            limit = np.array([video.width, video.height, video.width, video.height], np.float32)
            corners = np.clip(labels.boxes, 0.0, limit)
            for category, label, box, score in zip(
                labels.ids.tolist(), labels.labels.tolist(), corners.tolist(), labels.scores.tolist(), strict=True
            ):
                if box[2] - box[0] < 1.0 or box[3] - box[1] < 1.0:
                    continue
                ids[category] = label
                boxes[label] += 1
                where = ",".join(f"{value:.1f}" for value in box)
                lines.append(f"{len(lines) - 1},{number},{category},{where},{score:.3f}")
        if skipped == len(numbers):
            raise InputError(f"{request.video}: not one frame can be decoded")
        try:
            write_atomically(Path(request.samples), ("\n".join(lines) + "\n").encode())
        except OSError as error:
            raise InputError(f"{request.samples}: cannot be written: {error.strerror or error}") from error
        return msgspec.structs.replace(
            plain,
            num_labelled=len(numbers) - skipped,
            ids={str(category): request.classes[label] for category, label in sorted(ids.items())},
            boxes={name: boxes[number] for number, name in enumerate(request.classes)},
            seconds_per_frame=busy_s / max(1, len(numbers) - skipped),
        )
    finally:
        video.close()


def main() -> int:
    """Answer one request; the exit code."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        request = msgspec.json.decode(sys.stdin.buffer.read(), type=Request)
        answer = label_video(request)
    except (msgspec.MsgspecError, EkyaError) as error:
        print(f"label_video: {error}", file=sys.stderr)
        return 2
    sys.stdout.buffer.write(msgspec.json.encode(answer))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
