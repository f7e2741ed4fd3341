"""One way to open any stream."""

from __future__ import annotations

from executor.streams.city import City
from executor.streams.dataset import Dataset
from executor.streams.frames import FrameSource
from executor.streams.recorded import Recorded
from protocol.errors import InputError
from protocol.schema import CitySource, DatasetSource, RecordedSource, StreamSpec


def open_source(spec: StreamSpec) -> FrameSource:
    """The frames of a stream. Raises InputError, naming stream and field or file, when it cannot be opened."""
    try:
        if len(set(spec.classes)) != len(spec.classes):
            raise InputError(f"classes: a name is listed twice in {', '.join(spec.classes)}")
        if isinstance(spec.source, CitySource):
            return City(spec.source, spec.classes, spec.fps)
        if isinstance(spec.source, RecordedSource):
            return Recorded(spec.source, spec.classes, spec.fps)
        if isinstance(spec.source, DatasetSource):
            return Dataset(spec.source, spec.classes, spec.fps)
        raise InputError("source: a live stream has no frames by number before they come")
    except InputError as error:
        raise InputError(f"stream {spec.stream_id}: {error}") from error
