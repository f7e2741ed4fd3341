"""The zoo: earlier models of the site's streams, and the conditions that they were good under. Pure functions.

A *situation* is a stretch of a stream that was labelled: what it looked like (`Conditions`), and what models were
measured to be worth there, the one that was trained on it included. From situations everything else follows:

* what a model is expected to be worth under some conditions: the mean of its measurements, weighted by how alike the
  conditions are, shrunk towards `_UNKNOWN` as if it had been seen there a little already;
* which models are worth looking at when a window's labels are there: those that are expected to be best;
* what a model is worth keeping for: what would be lost over all situations if it were gone, the next best model doing
  its work. Of two models that are alike one is worth nothing, and the only one for an old scene is worth a lot, however
  long it was not needed. What is worth least per byte goes first.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from optimizer.state import Situation, ZooModel, ZooState
from protocol.schema import CheckpointRef, Conditions, StreamSpec

Array = npt.NDArray[np.float64]

# Conditions so far apart (class mix: total variation; pictures: root mean square, times four) are others.
_LENGTH = 0.15
# Another stream's camera looks at the same conditions from elsewhere.
_OTHER_STREAM = 0.1
# What a model is taken to be worth where nothing is known, and how many measurements that counts for.
_UNKNOWN, _UNKNOWN_WEIGHT = 0.4, 0.1
# Models that are expected to be worse than the serving one by more than this are not looked at.
_DOUBT = 0.1
# More situations than this are more than a site has conditions; of the two most alike the older one goes.
MAX_SITUATIONS = 100


def distance(a: Conditions, b: Conditions) -> float:
    """How unlike two stretches look, 0 = alike; of other classes: infinite."""
    if len(a.class_mix) != len(b.class_mix):
        return math.inf
    mix = 0.5 * sum(abs(x - y) for x, y in zip(a.class_mix, b.class_mix, strict=True))
    mine, others = (*a.light, *a.layout), (*b.light, *b.layout)
    if not mine or len(mine) != len(others):
        return mix
    return mix + 4.0 * math.sqrt(sum((x - y) ** 2 for x, y in zip(mine, others, strict=True)) / len(mine))


def fits(model: ZooModel, spec: StreamSpec) -> bool:
    """Whether a stream could be served by the model: the same task, classes, pictures and kind of student."""
    return (
        model.task == spec.task
        and model.classes == spec.classes
        and model.picture_px == picture_px(spec)
        and model.architecture == spec.student.architecture
    )


def picture_px(spec: StreamSpec) -> int:
    """Edge of the pictures that the stream's students are trained on."""
    return spec.crop_px if spec.task == "classification" else spec.frame_px


def find(zoo: ZooState, number: int) -> ZooModel | None:
    """The model of a number, None when it is gone."""
    return next((model for model in zoo.models if model.number == number), None)


def by_weights(zoo: ZooState, sha256: str) -> ZooModel | None:
    """The model with these weights."""
    return next((model for model in zoo.models if model.checkpoint.sha256 == sha256), None)


def keep(
    zoo: ZooState, spec: StreamSpec, checkpoint: CheckpointRef, window: int, dataset_window: int, accuracy: float | None
) -> ZooModel:
    """Take a model up; the same weights under another name are the same model."""
    known = by_weights(zoo, checkpoint.sha256)
    if known is not None:
        known.last_used, known.checkpoint = max(known.last_used, window), checkpoint
        return known
    zoo.last_number += 1
    model = ZooModel(
        number=zoo.last_number,
        stream_id=spec.stream_id,
        checkpoint=checkpoint,
        task=spec.task,
        classes=spec.classes,
        architecture=spec.student.architecture,
        picture_px=picture_px(spec),
        window=window,
        dataset_window=dataset_window,
        accuracy=accuracy,
        last_used=window,
    )
    zoo.models.append(model)
    return model


def note(zoo: ZooState, situation: Situation) -> None:
    """Remember what models were worth in a situation; more about the same one is added to it."""
    key = (situation.stream_id, situation.window)
    known = next((s for s in zoo.situations if (s.stream_id, s.window) == key), None)
    if known is not None:
        known.accuracies.update(situation.accuracies)
        known.conditions = situation.conditions
        return
    zoo.situations.append(situation)
    while len(zoo.situations) > MAX_SITUATIONS:
        apart = _distances(zoo.situations)
        np.fill_diagonal(apart, np.inf)
        pair = np.unravel_index(int(apart.argmin()), apart.shape)
        del zoo.situations[min(int(place) for place in pair)]


def expected(zoo: ZooState, models: Sequence[ZooModel], stream_id: str, conditions: Conditions) -> list[float]:
    """What each of ``models`` is expected to be worth on a stream under ``conditions``."""
    if not zoo.situations:
        return [_UNKNOWN] * len(models)
    apart = np.array(
        [distance(s.conditions, conditions) + _OTHER_STREAM * (s.stream_id != stream_id) for s in zoo.situations]
    )
    return [float(value) for value in _estimates(zoo, models, _weights(apart)[:, None])[:, 0]]


def candidates(
    zoo: ZooState,
    spec: StreamSpec,
    conditions: Conditions | None,
    *,
    serving_sha256: str,
    dataset_window: int,
    count: int,
) -> list[ZooModel]:
    """The ``count`` models to look at on a stream's new labels, most promising first.

    Not the serving one, none that was trained on these very labels, and none that is expected to be clearly worse than
    the serving one: looking costs as much as a trial's validation.
    """
    able = [
        model
        for model in zoo.models
        if fits(model, spec)
        and model.checkpoint.sha256 != serving_sha256
        and (model.stream_id, model.dataset_window) != (spec.stream_id, dataset_window)
    ]
    if conditions is None:
        return sorted(able, key=lambda m: (-m.last_used, m.number))[:count]
    worth = expected(zoo, able, spec.stream_id, conditions)
    serving = by_weights(zoo, serving_sha256)
    least = expected(zoo, [serving], spec.stream_id, conditions)[0] - _DOUBT if serving is not None else 0.0
    hopeful = [place for place in range(len(able)) if worth[place] >= least]
    order = sorted(hopeful, key=lambda place: (-worth[place], able[place].number))
    return [able[place] for place in order[:count]]


def usefulness(zoo: ZooState) -> dict[int, float]:
    """By number: accuracy that all situations together would lose without the model."""
    if not zoo.models:
        return {}
    if not zoo.situations:
        return {model.number: 0.0 for model in zoo.models}
    table = _table(zoo)
    best_two = np.sort(table, axis=0)[-2:] if len(zoo.models) > 1 else np.vstack([np.zeros((1, table.shape[1])), table])
    lost = np.where(table >= best_two[1], best_two[1] - best_two[0], 0.0).sum(axis=1)
    return {model.number: float(value) for model, value in zip(zoo.models, lost, strict=True)}


def give_up(zoo: ZooState, max_bytes: int, *, free: Collection[str], pinned: Collection[str]) -> list[ZooModel]:
    """Give models up until the others take at most ``max_bytes``; returns those.

    ``free``, ``pinned``: SHA-256 of models that are needed anyway (they cost nothing), and of those and others that
    must not go now.
    """
    gone: list[ZooModel] = []
    while sum(m.checkpoint.num_bytes for m in zoo.models if m.checkpoint.sha256 not in free) > max_bytes:
        removable = [m for m in zoo.models if m.checkpoint.sha256 not in pinned]
        if not removable:
            break
        worth = usefulness(zoo)
        least = min(removable, key=lambda m: (worth[m.number] / max(1, m.checkpoint.num_bytes), m.last_used, m.number))
        zoo.models.remove(least)
        gone.append(least)
        for situation in zoo.situations:
            situation.accuracies.pop(least.number, None)
    zoo.situations = [s for s in zoo.situations if s.accuracies]
    return gone


def num_bytes(models: Iterable[ZooModel]) -> int:
    """What models take on disk."""
    return sum(model.checkpoint.num_bytes for model in models)


def _table(zoo: ZooState) -> Array:
    """(models, situations): what each model was measured to be worth in each situation, or is expected to be."""
    table = _estimates(zoo, zoo.models, _weights(_distances(zoo.situations)))
    for row, model in enumerate(zoo.models):
        for column, situation in enumerate(zoo.situations):
            table[row, column] = situation.accuracies.get(model.number, table[row, column])
    return table


def _estimates(zoo: ZooState, models: Sequence[ZooModel], weights: Array) -> Array:
    """(models, columns of ``weights``); ``weights`` (situations, columns)."""
    measured = np.array([[s.accuracies.get(m.number, 0.0) for s in zoo.situations] for m in models])
    known = np.array([[float(m.number in s.accuracies) for s in zoo.situations] for m in models])
    shape = (len(models), len(zoo.situations))
    total = measured.reshape(shape) @ weights + _UNKNOWN_WEIGHT * _UNKNOWN
    return np.asarray(total / (known.reshape(shape) @ weights + _UNKNOWN_WEIGHT))


def _weights(apart: Array) -> Array:
    return np.asarray(np.exp(-((apart / _LENGTH) ** 2)))


def _distances(situations: Sequence[Situation]) -> Array:
    count = len(situations)
    apart = np.zeros((count, count))
    for i in range(count):
        for j in range(i + 1, count):
            a, b = situations[i], situations[j]
            apart[i, j] = distance(a.conditions, b.conditions) + _OTHER_STREAM * (a.stream_id != b.stream_id)
    return apart + apart.T


def in_new_run(zoo: ZooState, num_windows: int) -> ZooState:
    """The zoo for a run whose windows are counted anew, after one of ``num_windows``."""
    models = [
        msgspec.structs.replace(
            m,
            window=m.window - num_windows,
            dataset_window=m.dataset_window - num_windows,
            last_used=m.last_used - num_windows,
        )
        for m in zoo.models
    ]
    situations = [msgspec.structs.replace(s, window=s.window - num_windows) for s in zoo.situations]
    return ZooState(models=models, situations=situations, last_number=zoo.last_number)
