"""Recorded video with the golden model's boxes, looped into an endless stream.

Frame ``index`` of the stream is frame ``index`` of the clips joined end to end, modulo their total length; the
stream's fps decides how quickly the frames come, whatever the files' own rate. Negative indices loop backwards.
"""

from __future__ import annotations

import bisect
import itertools
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from executor.streams.resize import cut_out
from executor.streams.samples import NO_SAMPLES, FrameSamples, label_table, read_samples
from executor.streams.video import Video
from protocol.errors import InputError
from protocol.schema import Clip, RecordedSource


class RecordedFrame:
    """One frame of a recorded stream (see executor.streams.frames.Frame). Pixels are decoded when asked for."""

    def __init__(self, source: Recorded, index: int, clip: int, number: int) -> None:
        self.index, self.time_s = index, index / source.fps
        self.conditions = source.name_of(clip)
        self._source, self._clip, self._number = source, clip, number
        samples = source.samples_of(clip, number)
        self.boxes: NDArray[np.float32] = samples.boxes
        self.labels: NDArray[np.int64] = samples.labels

    def crops(self, px: int) -> NDArray[np.uint8]:
        """Square RGB crops of the objects, uint8 (n, px, px, 3); fractional boxes grow to whole pixels."""
        if len(self.boxes) == 0:
            return np.zeros((0, px, px, 3), np.uint8)
        return cut_out(self._source.video_of(self._clip).pixels(self._number), self.boxes, px)

    def image(self) -> NDArray[np.uint8]:
        """The whole frame, RGB uint8 (height, width, 3)."""
        return self._source.video_of(self._clip).pixels(self._number)


class Recorded:
    """Clips as a FrameSource. Raises InputError, naming file and line, when a video or a sample list is unusable."""

    def __init__(self, source: RecordedSource, classes: tuple[str, ...], fps: float) -> None:
        self.fps, self.classes = fps, classes
        table = label_table(classes, source.class_map)
        self._videos: dict[str, Video] = {}
        self._clips = source.clips
        self._samples: list[dict[int, FrameSamples]] = []
        lists: dict[tuple[str, str], dict[int, FrameSamples]] = {}
        try:
            for clip in source.clips:
                if clip.video not in self._videos:
                    self._videos[clip.video] = Video(Path(clip.video))
                video = self._videos[clip.video]
                key = (clip.video, clip.samples)
                if key not in lists:
                    lists[key] = read_samples(
                        Path(clip.samples), size=(video.width, video.height), num_frames=video.num_frames,
                        table=table, min_score=source.min_score,
                    )  # fmt: skip
                self._samples.append(lists[key])
            lengths = [self._length(number, clip, self._videos[clip.video]) for number, clip in enumerate(source.clips)]
        except InputError:
            self.close()
            raise
        self._ends = list(itertools.accumulate(lengths))
        if not any(
            clip.first_frame <= frame < clip.first_frame + length * clip.step
            and (frame - clip.first_frame) % clip.step == 0
            for clip, length, samples in zip(source.clips, lengths, self._samples, strict=True)
            for frame in samples
        ):
            self.close()
            raise InputError(
                "source.clips: no labelled frame is left; check first_frame, last_frame, class_map and min_score"
            )

    @property
    def num_frames(self) -> int:
        """Frames until the stream repeats."""
        return self._ends[-1]

    def frame(self, index: int) -> RecordedFrame:
        """The frame at ``index``, of any sign."""
        position = index % self.num_frames
        clip = bisect.bisect_right(self._ends, position)
        start = self._ends[clip - 1] if clip else 0
        played = self._clips[clip]
        return RecordedFrame(self, index, clip, played.first_frame + (position - start) * played.step)

    def close(self) -> None:
        """Release files and decoders; safe to call twice."""
        for video in self._videos.values():
            video.close()

    def name_of(self, clip: int) -> str:
        """What people see as the conditions of a recorded stream: the clip's file name."""
        return Path(self._clips[clip].video).stem

    def samples_of(self, clip: int, number: int) -> FrameSamples:
        return self._samples[clip].get(number, NO_SAMPLES)

    def video_of(self, clip: int) -> Video:
        return self._videos[self._clips[clip].video]

    @staticmethod
    def _length(number: int, clip: Clip, video: Video) -> int:
        last = video.num_frames - 1 if clip.last_frame is None else clip.last_frame
        if not clip.first_frame <= last < video.num_frames:
            raise InputError(
                f"source.clips[{number}]: frames {clip.first_frame} to {last} are not in {clip.video}; "
                f"allowed: 0 <= first_frame <= last_frame <= {video.num_frames - 1}"
            )
        return (last - clip.first_frame) // clip.step + 1
