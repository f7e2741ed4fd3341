"""Models on their way into service: read, verified and warmed up before they look at a frame."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from executor.learning import checkpoints
from executor.learning.device import Device
from executor.learning.inference import Analyser
from executor.learning.task import task_of
from protocol.errors import CheckpointError
from protocol.schema import CheckpointRef, StreamSpec


class ModelLoader:
    """Loads, verifies and warms up a checkpoint in a thread beside the serving model.

    ``error`` holds the reason when it cannot be used. ``busy_s`` is the processor time the thread took, which
    must not be charged to the frames.
    """

    def __init__(self, store: Path, ref: CheckpointRef, stream: StreamSpec, device: Device, resolution_px: int) -> None:
        self.ref = ref
        self.started = time.monotonic()
        self.analyser: Analyser | None = None
        self.error = ""
        self.busy_s = 0.0
        self._thread = threading.Thread(
            target=self._load, args=(store, stream, device, resolution_px), name="model-loader", daemon=True
        )
        self._thread.start()

    @property
    def done(self) -> bool:
        """The thread has ended: there is an analyser or an error."""
        return not self._thread.is_alive()

    def _load(self, store: Path, stream: StreamSpec, device: Device, resolution_px: int) -> None:
        start = time.thread_time()
        try:
            self.analyser = load_analyser(store, self.ref, stream, device, resolution_px)
        except Exception as error:
            # Whatever is wrong with the new model, the old one goes on serving.
            self.error = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
        self.busy_s = time.thread_time() - start


def load_analyser(store: Path, ref: CheckpointRef, stream: StreamSpec, device: Device, resolution_px: int) -> Analyser:
    """The verified, warm model of ``ref``. Raises CheckpointError, also when it knows other classes or another task."""
    student, manifest = checkpoints.load(store, ref)
    if manifest.task != stream.task:
        raise CheckpointError(f"checkpoint {ref.path}: is a model for {manifest.task}, the stream is for {stream.task}")
    if manifest.classes != stream.classes:
        raise CheckpointError(
            f"checkpoint {ref.path}: its classes are {manifest.classes}, the stream has {stream.classes}"
        )
    analyser = task_of(stream).analyser(student, device, ref.version)
    analyser.warm_up(resolution_px)
    return analyser
