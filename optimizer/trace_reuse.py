"""Model reuse as a baseline: instead of retraining, an old model that fits the present scene is loaded.

No published trace states how accurate old models are on new windows, so that it has to be measured and given as a
second table. One row per old model and window: ``city`` and ``window`` that it would serve in, ``from_city`` and
``from_window`` that it was trained for, ``accuracy`` measured there; optional are ``gpu_seconds`` (loading it, 1
where missing) and any number of columns ``NAME_distance``: how far apart the two scenes are, by class distribution,
time of day, object count, place or whatever else was recorded.

Policies: ``reuse:NAME`` takes the model at the smallest NAME_distance, ``reuse:latest`` the newest (of the same city
where there is one), ``reuse`` the most accurate, which nobody can know beforehand: an upper limit. A model that is
no better than the serving one is not loaded.
"""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from optimizer.policies.milp import milp
from optimizer.policies.registry import Policy
from optimizer.traces import Rows, Trace
from protocol.errors import InputError
from protocol.plan import Plan, Problem
from protocol.schema import Record

POLICY = "reuse"
BEST, LATEST = "reuse", "reuse:latest"
REQUIRED = ("city", "window", "from_city", "from_window", "accuracy")
LOADING_S = 1.0
_SUFFIX = "_distance"


class OldModel(Record, frozen=True, kw_only=True):
    """A model of an earlier window and what it is worth in this one. ``distances`` in the order of the criteria."""

    from_city: str
    from_window: int
    accuracy: float
    gpu_seconds: float
    distances: tuple[float, ...]


class ReuseTable(Record, frozen=True, kw_only=True):
    """Old models by (city, window). ``criteria``: names of the distances."""

    source: str
    criteria: tuple[str, ...]
    models: dict[tuple[str, int], tuple[OldModel, ...]]

    @property
    def policies(self) -> tuple[str, ...]:
        """The policies that this table makes possible."""
        return (BEST, LATEST, *(f"{POLICY}:{name}" for name in self.criteria))

    def pick(self, policy: str, city: str, window: int) -> OldModel | None:
        """The model that a policy would load in a window; None where there is none."""
        models = self.models.get((city, window), ())
        if not models:
            return None
        if policy == BEST:
            return max(models, key=lambda old: old.accuracy)
        if policy == LATEST:
            return max(models, key=lambda old: (old.from_city == city, old.from_window))
        index = self.criteria.index(policy.removeprefix(f"{POLICY}:"))
        return min(models, key=lambda old: old.distances[index])


def load_reuse(path: Path, trace: Trace) -> ReuseTable:
    """Read the table and check it against the trace. InputError names file, line and column."""
    reader = Rows(path, REQUIRED)
    columns = [name for name in reader.header if name.endswith(_SUFFIX) and name != _SUFFIX]
    for name in columns:
        if re.fullmatch(r"[A-Za-z0-9._]{1,40}", name.removesuffix(_SUFFIX)) is None:
            raise InputError(f"{path}: line 1: column {name}: NAME of NAME_distance is letters, digits, . and _")
    known = {city: {window.number for window in windows} for city, windows in trace.cities.items()}
    found: dict[tuple[str, int], list[OldModel]] = {}
    for row in reader:
        city, window = row.text("city"), row.whole("window", 1)
        if city not in known:
            raise row.wrong("city", f"{city!r} is not in {trace.source}")
        if window not in known[city]:
            raise row.wrong("window", f"{trace.source} has no window {window} of {city}")
        from_window = row.whole("from_window", 0)
        if from_window >= window:
            raise row.wrong("from_window", f"{from_window} is not before window {window}: the model is not there yet")
        gpu_seconds = LOADING_S
        if "gpu_seconds" in reader.header:
            gpu_seconds = row.number("gpu_seconds", 0.0, 1e9, above=True)
        found.setdefault((city, window), []).append(
            OldModel(
                from_city=row.text("from_city"),
                from_window=from_window,
                accuracy=row.number("accuracy", 0.0, 1.0),
                gpu_seconds=gpu_seconds,
                distances=tuple(row.number(name, 0.0, 1e12) for name in columns),
            )
        )
    if not found:
        raise InputError(f"{path}: holds no old models, only the line of column names")
    return ReuseTable(
        source=str(path),
        criteria=tuple(name.removesuffix(_SUFFIX) for name in columns),
        models={key: tuple(models) for key, models in found.items()},
    )


def is_reuse(policy: str) -> bool:
    """Whether a policy is one of reuse."""
    return policy == POLICY or policy.startswith(f"{POLICY}:")


def retrain_id(policy: str) -> str:
    """What loading the old model of a policy is called among the retraining configurations."""
    return policy.replace(":", "-")


def only(problem: Problem, policy: str | None) -> Problem:
    """The problem with the old model of ``policy`` as the only retraining; None: without any old models."""
    streams = tuple(
        msgspec.structs.replace(
            stream,
            retrain=tuple(
                p
                for p in stream.retrain
                if (p.retrain_id.partition("-")[0] != POLICY if policy is None else p.retrain_id == retrain_id(policy))
            ),
        )
        for stream in problem.streams
    )
    return msgspec.structs.replace(problem, streams=streams)


def reuse_policy(policy: str) -> Policy:
    """The planner's signature: serve as well as can be, and load old models where the static plan gains by it."""

    def plan(problem: Problem, budget_s: float) -> Plan:
        made = milp(only(problem, policy), budget_s)
        report = msgspec.structs.replace(made.report, policy=policy, status="heuristic", bound=None, gap=None)
        return msgspec.structs.replace(made, report=report)

    return plan
