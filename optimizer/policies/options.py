"""What each stream may do in a static plan, with the value of each choice and without the choices nobody needs.

An option of stream v is (lambda, gamma, r, lambda_after), together with the kind of place its jobs
need. Its value A(v, o) is the stream's window average in the execution model. Kinds:

- ``serve``:  no retraining; one inference job of u quanta.
- ``bundle``: inference and retraining on one GPU; u + r quanta, all of which lambda_after may use.
- ``split``:  an inference job of u quanta and a retraining job of r quanta, each anywhere; lambda_after
  uses the u quanta where it is, or moves into the r quanta that the retraining leaves (a migration).

A stream that is retrained in the cloud is of kind ``serve``: it keeps lambda, and its value counts on the
earliest arrival of its model in each turn of the link (``cloud.py``).

A static plan never holds more than it holds at the start: lambda_after fits into what the same stream
held before the swap. It is therefore feasible in whatever order the retrainings end.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from optimizer.execution import (
    asked_latency_s,
    capacity_quanta,
    gpu_classes,
    labels_are_short,
    needed_quanta,
    own_window_s,
    retrain_seconds,
    share_of,
)
from optimizer.objective import ACCURACY_TOLERANCE, SECONDS_TOLERANCE, attainable_floor
from optimizer.policies.choices import Job, Option, Place, Turn, undominated
from optimizer.policies.cloud import turns
from protocol.plan import Problem, StreamProfile

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
UNUSABLE = 1 << 30  # quanta that no GPU has


class OptionMaker:
    """Enumerates options of the streams of one problem.

    ``move_s`` prices a change of GPU, ``problem.migration_s`` where None. It should not be below
    ``config_change_s`` for plans that keep their promise: an option does not say which of several equal
    GPUs its jobs get, and on the same one a change of configuration is due instead of a move.
    """

    def __init__(self, problem: Problem, move_s: float | None = None) -> None:
        self.problem = problem
        self.move_s = problem.migration_s if move_s is None else move_s
        self.quantum = problem.share_quantum
        classes = gpu_classes(problem)
        self.class_gpus = [gpu for gpu, _ in classes]
        self.classes = [Place(positions, index) for index, (_, positions) in enumerate(classes)]
        self.capacity = [capacity_quanta(gpu, self.quantum) for gpu in self.class_gpus]
        self.position = {gpu.gpu_id: index for index, gpu in enumerate(problem.gpus)}
        self.class_of = {g: place.gpu_class for place in self.classes for g in place.gpus}
        self.memory_matters = _memory_matters(problem)
        self.labels_matter = labels_are_short(problem)
        self.turns = turns(problem) if problem.links else {}
        self.number = {stream.stream_id: v for v, stream in enumerate(problem.streams)}

    def fixed_place(self, gpu_id: str) -> Place | None:
        position = self.position.get(gpu_id)
        return None if position is None else Place((position,), self.class_of[position], fixed=True)

    def options(self, stream: StreamProfile, below_floor: bool = False) -> list[Option]:
        """All undominated options of ``stream``, best first.

        Options that fall below the floor are left out unless ``below_floor`` is true, when they are
        kept with their ``shortfall``.
        """
        table = _Choices(self, stream)
        inference_places = self._inference_places(stream)
        found: list[Option] = []
        for place, start_cost_s in inference_places:
            found += table.serve(place, start_cost_s)
        groups: dict[tuple[str | None, float], list[int]] = {}
        for index in table.useful_retrainings():
            profile = stream.retrain[index]
            labels_s = profile.label_seconds if self.labels_matter else 0.0
            groups.setdefault((profile.pinned_gpu, labels_s), []).append(index)
        for (pinned, _), gammas in groups.items():
            retrain_place = None if pinned is None else self.fixed_place(pinned)
            if pinned is not None and retrain_place is None:
                continue
            for destination in self.classes if retrain_place is None else [retrain_place]:
                seconds = table.durations(gammas, destination)
                for place, start_cost_s in inference_places:
                    found += table.split(place, start_cost_s, destination, gammas, seconds)
                    both = _meet(place, destination)
                    if both is not None:
                        found += table.bundle(both, start_cost_s, gammas, seconds)
        for c in range(len(stream.cloud)):
            for place, start_cost_s in inference_places:
                found += table.send(place, start_cost_s, c, self.turns.get((self.number[stream.stream_id], c), []))
        if not below_floor:
            found = [option for option in found if option.shortfall <= ACCURACY_TOLERANCE]
        return undominated(found)

    def _inference_places(self, stream: StreamProfile) -> list[tuple[Place, NDArray[np.float64]]]:
        """Places for inference with the seconds that starting each configuration there costs."""
        change_s, move_s = self.problem.config_change_s, self.move_s
        count = len(stream.inference)
        home = None if stream.serving_gpu is None else self.fixed_place(stream.serving_gpu)
        away = np.full(count, move_s if stream.serving_gpu is not None else 0.0)
        places = [(place, away) for place in self.classes]
        if home is not None and (change_s > 0.0 or move_s > 0.0):
            changes = [
                0.0 if stream.serving_inference in (None, profile.inference_id) else change_s
                for profile in stream.inference
            ]
            places.append((home, np.array(changes)))
        return places


def _memory_matters(problem: Problem) -> bool:
    """Whether any GPU could be short of memory if everything at once were put there."""
    most = 0
    for stream in problem.streams:
        most += max(p.memory_bytes for p in stream.inference)
        most += max((p.memory_bytes for p in stream.retrain), default=0)
        most += max([p.swap_bytes for p in stream.retrain] + [p.swap_bytes for p in stream.cloud], default=0)
    return any(0 < gpu.memory_bytes < most for gpu in problem.gpus)


def _meet(one: Place, other: Place) -> Place | None:
    """The place that lies in both, None where they have no GPU in common."""
    if one == other:
        return one
    if one.gpu_class != other.gpu_class:
        return None
    common = tuple(g for g in one.gpus if g in other.gpus)
    return Place(common, one.gpu_class, fixed=one.fixed or other.fixed) if common else None


class _Choices:
    """The arithmetic of one stream's options: arrays over lambda (l), gamma (g), r and lambda_after (m)."""

    def __init__(self, maker: OptionMaker, stream: StreamProfile) -> None:
        self.maker, self.stream = maker, stream
        self.window_s = own_window_s(stream, maker.problem.window_s)
        self.a0 = stream.accuracy_now
        self.q = np.array([p.relative_accuracy for p in stream.inference])
        self.lam_bytes = np.array([p.memory_bytes for p in stream.inference], dtype=np.int64)
        self.a1 = np.array([p.accuracy_after for p in stream.retrain])
        attainable = attainable_floor(stream, maker.class_gpus, maker.quantum)
        self.floor = min(stream.min_accuracy, attainable)
        asked_s = asked_latency_s(stream, maker.class_gpus, maker.quantum)
        latency_s = np.array([p.latency_s for p in stream.inference])
        # By which part of it an inference configuration is above the limit.
        self.late = np.maximum(0.0, latency_s - SECONDS_TOLERANCE - asked_s) / max(asked_s, SECONDS_TOLERANCE)
        self.need = np.array(
            [[needed_quanta(p, gpu, maker.quantum) for p in stream.inference] for gpu in maker.class_gpus]
        )
        for index, gpu in enumerate(maker.class_gpus):
            too_big = self.need[index] > maker.capacity[index]
            if gpu.memory_bytes:
                too_big |= self.lam_bytes > gpu.memory_bytes
            self.need[index][too_big] = UNUSABLE

    def useful_retrainings(self) -> list[int]:
        """Retrainings that some window could want: better than the model now, and none better at no more cost."""
        useful: list[int] = []
        retrain = self.stream.retrain
        for index in sorted(range(len(retrain)), key=lambda i: (retrain[i].gpu_seconds, -retrain[i].accuracy_after)):
            one = retrain[index]
            if one.accuracy_after <= self.a0:
                continue
            if not any(
                retrain[o].accuracy_after >= one.accuracy_after
                and retrain[o].pinned_gpu is None
                and (not self.maker.labels_matter or retrain[o].label_seconds <= one.label_seconds)
                and (
                    not self.maker.memory_matters
                    or (retrain[o].memory_bytes <= one.memory_bytes and retrain[o].swap_bytes <= one.swap_bytes)
                )
                for o in useful
            ):
                useful.append(index)
        return useful

    def durations(self, gammas: list[int], place: Place) -> Floats:
        """Seconds of each retraining at 1, 2, ... quanta of the place's class; shape (gammas, capacity)."""
        maker = self.maker
        gpu = maker.class_gpus[place.gpu_class]
        shares = [share_of(quanta, maker.quantum) for quanta in range(1, maker.capacity[place.gpu_class] + 1)]
        rows = [[retrain_seconds(self.stream.retrain[g], gpu, share) for share in shares] for g in gammas]
        return np.array(rows).reshape(len(gammas), len(shares))

    def _usable(self, gpu_class: int) -> Ints:
        """Inference configurations worth looking at on a class: none cheaper in quanta and memory is as accurate."""
        need = self.need[gpu_class]
        keep: list[int] = []
        serving = self.stream.serving_inference
        for index in np.lexsort((-self.q, need)):
            if need[index] >= UNUSABLE:
                break
            # The configuration in use may be worth keeping for its own sake: changing it costs time.
            beaten = self.stream.inference[index].inference_id != serving and any(
                self.q[o] >= self.q[index]
                and self.late[o] <= self.late[index]
                and (not self.maker.memory_matters or self.lam_bytes[o] <= self.lam_bytes[index])
                for o in keep
            )
            if not beaten:
                keep.append(int(index))
        return np.array(keep, dtype=np.int64)

    def serve(self, place: Place, start_cost_s: Floats) -> list[Option]:
        found = []
        for lam in self._usable(place.gpu_class):
            accuracy = self.a0 * self.q[lam]
            served_s = max(0.0, self.window_s - float(start_cost_s[lam]))
            quanta = int(self.need[place.gpu_class][lam])
            found.append(
                Option(
                    kind="serve",
                    value=float(accuracy * served_s / self.window_s),
                    lam=int(lam),
                    lam_quanta=quanta,
                    jobs=(Job(place, quanta, int(self.lam_bytes[lam])),),
                    shortfall=max(0.0, self.floor - float(accuracy)) + float(self.late[lam]),
                )
            )
        return found

    def send(self, place: Place, start_cost_s: Floats, c: int, found_turns: list[Turn]) -> list[Option]:
        """Options that retrain with configuration ``c`` of the stream's cloud, valued at the earliest arrival."""
        profile, found = self.stream.cloud[c], list[Option]()
        if profile.accuracy_after <= self.a0:
            return found
        for lam in self._usable(place.gpu_class):
            q, cost_s = float(self.q[lam]), float(start_cost_s[lam])
            quanta = int(self.need[place.gpu_class][lam])
            job = Job(place, quanta, int(self.lam_bytes[lam]) + profile.swap_bytes)
            shortfall = max(0.0, self.floor - self.a0 * q) + float(self.late[lam])
            for turn in found_turns:
                before = self.a0 * q * max(0.0, turn.earliest_s - cost_s)
                after = profile.accuracy_after * q * (self.window_s - max(turn.earliest_s, cost_s))
                found.append(
                    Option(
                        kind="serve",
                        value=(before + max(0.0, after)) / self.window_s,
                        lam=int(lam),
                        lam_quanta=quanta,
                        jobs=(job,),
                        shortfall=shortfall,
                        cloud=c,
                        turn=turn,
                        label_seconds=profile.label_seconds if self.maker.labels_matter else 0.0,
                    )
                )
        return found

    def _values(
        self, lams: Ints, start_cost_s: Floats, gammas: list[int], seconds: Floats, swap_cost_s: Floats, afters: Ints
    ) -> tuple[Floats, Floats]:
        """Window average and shortfall; shapes (l, g, r, m) and (l, g, m). ``swap_cost_s`` has shape (l, m)."""
        window_s = self.window_s
        cost0 = start_cost_s[lams][:, None, None, None]
        cost1 = swap_cost_s[:, None, None, :]
        swap_s = np.minimum(seconds, window_s)[None, :, :, None]
        before = self.a0 * self.q[lams][:, None, None, None] * np.maximum(0.0, swap_s - cost0)
        served_after_s = np.maximum(0.0, window_s - np.maximum(swap_s + cost1, cost0))
        after_accuracy = self.a1[gammas][:, None] * self.q[afters][None, :]  # (g, m)
        after = after_accuracy[None, :, None, :] * served_after_s
        least = np.minimum((self.a0 * self.q[lams])[:, None, None], after_accuracy[None])
        late = np.maximum(self.late[lams][:, None, None], self.late[afters][None, None, :])
        return (before + after) / window_s, np.maximum(0.0, self.floor - least) + late

    def bundle(self, place: Place, start_cost_s: Floats, gammas: list[int], seconds: Floats) -> list[Option]:
        lams = self._usable(place.gpu_class)
        if not len(lams):
            return []
        need = self.need[place.gpu_class]
        swap_cost_s = np.where(lams[:, None] == lams[None, :], 0.0, self.maker.problem.config_change_s)
        value, shortfall = self._values(lams, start_cost_s, gammas, seconds, swap_cost_s, lams)
        quanta = need[lams][:, None] + np.arange(1, seconds.shape[1] + 1)[None, :]  # (l, r)
        fits = quanta[:, :, None] >= need[lams][None, None, :]  # (l, r, m)
        fits &= (quanta <= self.maker.capacity[place.gpu_class])[:, :, None]
        in_time = (seconds < self.window_s)[None, :, :, None]
        return self._collect("bundle", (place,), lams, lams, gammas, value, shortfall, fits[:, None] & in_time, False)

    def split(
        self, place: Place, start_cost_s: Floats, destination: Place, gammas: list[int], seconds: Floats
    ) -> list[Option]:
        lams = self._usable(place.gpu_class)
        if not len(lams):
            return []
        problem = self.maker.problem
        in_time = (seconds < self.window_s)[None, :, :, None]
        stay_cost_s = np.where(lams[:, None] == lams[None, :], 0.0, problem.config_change_s)
        value, shortfall = self._values(lams, start_cost_s, gammas, seconds, stay_cost_s, lams)
        need = self.need[place.gpu_class][lams]
        fits = (need[:, None] >= need[None, :])[:, None, None, :] & in_time
        places = (place, destination)
        found = self._collect("split", places, lams, lams, gammas, value, shortfall, fits, False)
        afters = self._usable(destination.gpu_class)
        if len(afters) and not (place.fixed and place == destination):
            move_cost_s = np.full((len(lams), len(afters)), self.maker.move_s)
            value, shortfall = self._values(lams, start_cost_s, gammas, seconds, move_cost_s, afters)
            room = np.arange(1, seconds.shape[1] + 1)[:, None] >= self.need[destination.gpu_class][afters][None, :]
            found += self._collect(
                "split", places, lams, afters, gammas, value, shortfall, room[None, None] & in_time, True
            )
        return found

    def _collect(
        self,
        kind: Literal["bundle", "split"],
        places: tuple[Place, ...],
        lams: Ints,
        afters: Ints,
        gammas: list[int],
        value: Floats,
        shortfall: Floats,
        possible: NDArray[np.bool_],
        moves: bool,
    ) -> list[Option]:
        """The best option per demand. Without memory and floor in play, gamma and m are free within (l, r)."""
        possible = np.broadcast_to(possible, value.shape)
        soft = np.broadcast_to(shortfall[:, :, None, :], value.shape)
        clean = possible & (soft <= ACCURACY_TOLERANCE)
        found: list[Option] = []
        for allowed in (clean, possible & ~clean):
            scored = np.where(allowed, value, -1.0)
            if self.maker.memory_matters:
                chosen = np.argwhere(scored >= 0.0)
            else:
                flat = scored.transpose(0, 2, 1, 3).reshape(scored.shape[0], scored.shape[2], -1)
                best = flat.argmax(axis=2)
                rows, columns = np.nonzero(np.take_along_axis(flat, best[:, :, None], axis=2)[:, :, 0] >= 0.0)
                g, m = np.divmod(best[rows, columns], scored.shape[3])
                chosen = np.stack([rows, g, columns, m], axis=1)
            found += [
                self._option(kind, places, lams, afters, gammas, index, value, shortfall, moves)
                for index in chosen.tolist()
            ]
        return found

    def _option(
        self,
        kind: Literal["bundle", "split"],
        places: tuple[Place, ...],
        lams: Ints,
        afters: Ints,
        gammas: list[int],
        index: list[int],
        value: Floats,
        shortfall: Floats,
        moves: bool,
    ) -> Option:
        l, g, column, m = index
        lam, gamma, after, r = int(lams[l]), gammas[g], int(afters[m]), column + 1
        profile = self.stream.retrain[gamma]
        u = int(self.need[places[0].gpu_class][lam])
        before_bytes = int(self.lam_bytes[lam]) + profile.swap_bytes
        after_bytes = int(self.lam_bytes[after])
        if kind == "bundle":
            jobs: tuple[Job, ...] = (Job(places[0], u + r, max(before_bytes + profile.memory_bytes, after_bytes)),)
        elif moves:
            retrain_bytes = max(profile.memory_bytes, after_bytes)
            jobs = (Job(places[0], u, before_bytes), Job(places[1], r, retrain_bytes))
        else:
            jobs = (Job(places[0], u, max(before_bytes, after_bytes)), Job(places[1], r, profile.memory_bytes))
        return Option(
            kind=kind,
            value=float(value[l, g, column, m]),
            lam=lam,
            lam_quanta=u,
            jobs=jobs,
            gamma=gamma,
            r=r,
            lam_after=after,
            moves=moves,
            shortfall=float(shortfall[l, g, m]),
            label_seconds=profile.label_seconds if self.maker.labels_matter else 0.0,
        )
