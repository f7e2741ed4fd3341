"""What a stream's student is asked to do, as one interface: everything in learning that depends on it is behind it.

Labelling, data sets, retraining, trials and serving are written once, against :class:`Task`. Classification
(executor/learning/classification.py) and detection (executor/learning/detection.py) are its two implementations.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from executor.learning import datasets
from executor.learning.datasets import Examples
from executor.learning.device import Device
from executor.learning.golden import Labels
from executor.learning.inference import Analyser, Objects
from executor.learning.memory import MEGABYTE
from executor.learning.models import Student
from executor.learning.stepping import Stepper
from executor.learning.training import Trainer, student_for
from executor.streams.frames import Frame
from protocol.schema import DatasetRef, RetrainConfig, StreamSpec, StudentSpec

E = TypeVar("E", bound=Examples)


class Task(ABC, Generic[E]):
    """A task: what an example is, how a student is trained, measured and served. Stateless."""

    examples_kind: ClassVar[type[Any]]

    @abstractmethod
    def student_spec(self, spec: StudentSpec) -> StudentSpec:
        """``spec`` with its architecture named; raises InputError for one that does another task."""

    @abstractmethod
    def examples(self, frame: Frame, labels: Labels, stream: StreamSpec) -> E:
        """What a labelled frame contributes to a data set; all of it trains until a split is made."""

    @abstractmethod
    def join(self, parts: Sequence[E], stream: StreamSpec) -> E:
        """One set of several, in their order; an empty set of none."""

    @abstractmethod
    def memory(self, previous: E, stream: StreamSpec) -> E:
        """The exemplars to carry over from a window's data set, marked as such, within the stream's ``exemplar_mb``."""

    @abstractmethod
    def subset(self, examples: E, size: int, seed: int) -> E:
        """About ``size`` examples, every class kept as far as possible, fixed by ``seed``."""

    @abstractmethod
    def trainer(
        self, student: Student, base: Student | None, config: RetrainConfig, examples: E, device: Device, seed: int
    ) -> Trainer:
        """What trains ``student`` in place, which is a copy of ``base`` (None: a new one)."""

    @abstractmethod
    def evaluate(
        self, student: Student, examples: E, device: Device, stepper: Stepper | None = None
    ) -> tuple[float, float]:
        """(accuracy, loss) of the student on ``examples``; (0, 0) of none."""

    @abstractmethod
    def serving_accuracy(self, student: Student, examples: E, device: Device, stepper: Stepper | None = None) -> float:
        """The measure of serving on ``examples``: mean over their frames."""

    def points(
        self, student: Student, examples: E, device: Device, stepper: Stepper | None = None
    ) -> NDArray[np.float64]:
        """What the student gets right, one number per piece of evidence, in an order that ``examples`` alone decides.

        Two students are compared by it, piece by piece. Every example by itself, unless a task knows better.
        """
        each = [self.evaluate(student, examples.take(np.array([i])), device, stepper)[0] for i in range(len(examples))]
        return np.array(each, np.float64)

    def assess(
        self, student: Student, examples: E, device: Device, stepper: Stepper | None = None
    ) -> tuple[float, NDArray[np.float64], float | None]:
        """(the measure of serving, :meth:`points`, mean belief of the student in what it says), None for the last where
        the task has no such thing."""
        accuracy = self.serving_accuracy(student, examples, device, stepper)
        return accuracy, self.points(student, examples, device, stepper), None

    def mean_average_precision(
        self, student: Student, examples: E, device: Device, stepper: Stepper | None = None
    ) -> float | None:
        """The usual figure beside the task's own measure, for people; None where there is none."""
        return None

    def num_pieces(self, examples: E) -> int:
        """How many independent pieces of evidence ``examples`` are: as many as :meth:`points` has numbers."""
        return len(examples)

    @abstractmethod
    def analyser(self, student: Student, device: Device, version: int) -> Analyser:
        """The student, ready to look at frames."""

    @abstractmethod
    def judge(self, found: Objects | None, boxes: NDArray[np.float32], labels: NDArray[np.int64]) -> float | None:
        """What a result is worth on a frame with this truth, 0..1; None when there is nothing to score."""

    def read(self, store: Path, ref: DatasetRef, classes: tuple[str, ...]) -> E:
        """The data set of ``ref``. Raises InputError as :func:`datasets.read` does."""
        found: E = datasets.read(self.examples_kind, store, ref, classes)
        return found

    def student_for(
        self, config: RetrainConfig, serving: Student | None, stream: StreamSpec, device: Device, seed: int
    ) -> Student:
        """The student that a configuration starts from, on the device."""
        spec = self.student_spec(stream.student)
        return student_for(config, serving, spec, len(stream.classes), device, seed)


def exemplar_bytes(stream: StreamSpec) -> int:
    """What the stream's exemplar memory may take."""
    return int(stream.exemplar_mb * MEGABYTE)


def task_of(stream: StreamSpec) -> Task[Any]:
    """The task of a stream."""
    # Imported here: the implementations are made of what stands above.
    from executor.learning.classification import Classification
    from executor.learning.detection import Detection

    return Detection() if stream.task == "detection" else Classification()
