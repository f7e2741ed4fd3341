"""Options of streams as data, and which of them nobody needs.

Option o is dominated by o' if o' is worth as much and asks for no more of anything: share, memory,
choice of places.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Place:
    """Where a job may go: any of ``gpus`` (positions in the problem), all of one class.

    ``fixed`` marks a place that only this stream sees as special: where it is served or where its retraining runs.
    """

    gpus: tuple[int, ...]
    gpu_class: int
    fixed: bool = False

    @property
    def only_gpu(self) -> int | None:
        """The GPU, where there is no choice of one."""
        return self.gpus[0] if len(self.gpus) == 1 else None


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn of a link. ``earliest_s``: when the model can be there; ``most``: so many retrainings may have it."""

    link_id: str
    index: int
    earliest_s: float
    most: int


@dataclass(frozen=True, slots=True)
class Job:
    """A demand for room on one GPU of ``place``: share quanta and bytes."""

    place: Place
    quanta: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Option:
    """One choice of one stream. Indices point into the stream's profiles; ``gamma`` -1 = no retraining.

    ``jobs``: one job for serve and bundle, (inference, retraining) for split. ``moves``: lambda_after
    runs where the retraining ran. ``shortfall``: how far the option falls below the stream's floor, and by
    which part its latency is above the limit. ``cloud``: index of the retraining in the cloud instead (-1 =
    none; of kind serve) and its ``turn``. ``label_seconds``: what it takes of the label budget.
    """

    kind: Literal["serve", "bundle", "split"]
    value: float
    lam: int
    lam_quanta: int
    jobs: tuple[Job, ...]
    gamma: int = -1
    r: int = 0
    lam_after: int = -1
    moves: bool = False
    shortfall: float = 0.0
    cloud: int = -1
    turn: Turn | None = None
    label_seconds: float = 0.0


def undominated(options: list[Option]) -> list[Option]:
    """Drop every option that another one replaces in each place it could be put (best value first).

    A replacement takes no more labels either, and no turn of a link but perhaps the same one.
    """
    best: dict[tuple[object, ...], Option] = {}
    ordered = sorted(options, key=lambda o: (o.shortfall, -o.value, sum(job.quanta for job in o.jobs)))
    for option in ordered:
        best.setdefault((option.jobs, option.label_seconds, _turn(option)), option)
    ordered = list(best.values())
    demands = _Demands(ordered)
    kept: list[Option] = []
    alive = np.ones(len(ordered), dtype=np.bool_)
    for index, option in enumerate(ordered):
        if alive[index]:
            kept.append(option)
            # What comes later is worth no more; what came earlier has been kept already.
            alive[index + 1 :] &= ~demands.replaced_by(index)[index + 1 :]
    return sorted(kept, key=lambda o: -o.value)


def _turn(option: Option) -> tuple[str, int] | None:
    return None if option.turn is None else (option.turn.link_id, option.turn.index)


class _Demands:
    """The jobs of many options as columns (the second job is absent, quanta 0, for serve and bundle)."""

    def __init__(self, options: list[Option]) -> None:
        jobs = [(option.jobs[0], option.jobs[-1]) for option in options]
        self.two = np.array([len(option.jobs) == 2 for option in options], dtype=np.bool_)
        self.gpu_class = np.array([[job.place.gpu_class for job in pair] for pair in jobs]).reshape(-1, 2)
        named = [[job.place.gpus[0] if job.place.fixed else -1 for job in pair] for pair in jobs]
        self.named = np.array(named).reshape(-1, 2)
        self.quanta = np.array([[job.quanta for job in pair] for pair in jobs]).reshape(-1, 2)
        self.labels_s = np.array([option.label_seconds for option in options])
        numbers = {turn: n for n, turn in enumerate(dict.fromkeys(_turn(option) for option in options))}
        self.turn = np.array([numbers[_turn(option)] for option in options])
        self.no_turn = numbers.get(None, -1)
        self.num_bytes = np.array([[job.num_bytes for job in pair] for pair in jobs], dtype=np.int64).reshape(-1, 2)

    def replaced_by(self, better: int) -> NDArray[np.bool_]:
        """Per option: whether option ``better`` can be put wherever it can be put, and asks for no more."""
        cheaper: NDArray[np.bool_] = self.labels_s[better] <= self.labels_s
        if self.turn[better] != self.no_turn:
            cheaper &= self.turn == self.turn[better]
        cheaper &= self._placed_as_well(better)
        return cheaper

    def _placed_as_well(self, better: int) -> NDArray[np.bool_]:
        if not self.two[better]:
            return self._smaller(better, 0, 0) | (self.two & self._smaller(better, 0, 1))
        straight = self._smaller(better, 0, 0) & self._smaller(better, 1, 1)
        crossed = self._smaller(better, 0, 1) & self._smaller(better, 1, 0)
        together = self._covers(better, 0, 0) & self._covers(better, 1, 0)
        together &= self.quanta[better].sum() <= self.quanta[:, 0]
        together &= self.num_bytes[better].sum() <= self.num_bytes[:, 0]
        return np.where(self.two, straight | crossed, together)

    def _smaller(self, better: int, job: int, other: int) -> NDArray[np.bool_]:
        smaller: NDArray[np.bool_] = self.quanta[better, job] <= self.quanta[:, other]
        smaller &= self.num_bytes[better, job] <= self.num_bytes[:, other]
        return smaller & self._covers(better, job, other)

    def _covers(self, better: int, job: int, other: int) -> NDArray[np.bool_]:
        covers: NDArray[np.bool_] = self.gpu_class[better, job] == self.gpu_class[:, other]
        if self.named[better, job] >= 0:
            covers &= self.named[better, job] == self.named[:, other]
        return covers
