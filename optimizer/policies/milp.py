"""The static plan (Eq. 1 of the paper, with placement) as a mixed-integer linear program.

Data
  V, O_v        streams v and their options o (``options.py``), each with a value A(v,o) and its jobs
  w_v           weights
  k, g          classes of interchangeable GPUs, and GPUs; n_k quanta may be handed out on a GPU of class k
  N_k, G_k      GPUs of class k that some option names ("where it is served", "where its retraining runs"),
                and the number of the others
  free jobs     jobs that may go to any GPU of their class; fixed jobs name their GPU
  P_k           patterns: the ways to split n_k quanta into slots of whole quanta, |p|_t slots of size >= t in p
Variables
  x[v,o]        in {0,1}: stream v takes option o
  p[k,j]        whole: how many unnamed GPUs of class k are split like pattern j
  z[g,s]        whole: slots of s quanta for free jobs on the named GPU g
Maximise sum_v w_v sum_o A(v,o) x[v,o] / sum_v w_v subject to
  1. every stream takes one option:                   sum_o x[v,o] = 1
  2. a named GPU holds its fixed jobs and its slots:  sum (quanta of fixed jobs) x + sum_s s z[g,s] <= n_k
  3. the free jobs of class k find slots, for all t:  number of jobs of size >= t <= number of slots of size >= t
  4. there are so many unnamed GPUs:                  sum_j p[k,j] <= G_k
Constraint 3 for all t is exactly the condition that jobs and slots can be matched (Hall's theorem for
nested sets), so no variable says which job goes to which of several equal GPUs: the symmetry that
keeps the obvious formulation from closing is gone, and still every solution can be placed.

Where memory can run short, slots are not enough, and jobs are placed one by one:
  y[v,j,g]      in {0,1}: job j of stream v is put on GPU g
  5. a job is placed once if an option that has it is taken:  sum_g y[v,j,g] = sum_{o has j} x[v,o]
  6. share:   sum quanta * y <= n_g       7. memory:  sum bytes * y <= M_g
and the optimum of 1 to 4 is kept as an upper bound. The memory of a job is its peak before or after the swap.

Where labels are short, and for retrainings in the cloud, with t the turns of a link:
  8. labels: sum over v, o of (label seconds of o) x[v,o] <= label budget
  9. one retraining has one turn of a link:  sum of x[v,o] over the options with turn t <= 1
An option with a turn is valued at the earliest arrival that its model can have in that turn (``cloud.py``), so
that the optimum is a bound; the plan is the chosen retrainings in their best order, with their real arrivals.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any

import msgspec

from optimizer.execution import quanta_per_gpu
from optimizer.objective import judge, upper_bound_trivial
from optimizer.policies.choices import Job, Option
from optimizer.policies.cloud import in_order
from optimizer.policies.options import OptionMaker
from optimizer.policies.packing import Placed, write_plan
from protocol.errors import PlanError
from protocol.plan import Plan, Problem, SolveReport, SolveStatus

if TYPE_CHECKING:
    from ortools.math_opt.python import mathopt

GAP_TOLERANCE = 1e-4  # a plan proven this close to the bound counts as optimal
MAX_PATTERNS = 2500  # per class; more are needed only below a quantum of 1/25
# Few GPUs with many patterns are solved sooner with slots of their own, symmetry or not (measured: 627
# patterns pay from 8 GPUs on, 42 from 2).
PATTERNS_PER_SLOT = 4
COARSE_QUANTA = 20  # per GPU, where the quantum is too fine for patterns
RESERVE_S = 0.02  # kept back from the budget for judging and sending the plan


def milp(problem: Problem, budget_s: float) -> Plan:
    """The best static plan within about ``budget_s`` seconds of wall-clock time, with a bound.

    PlanError when the solver finds no plan (none exists, or the time was too short).
    """
    started_s = time.monotonic()
    deadline_s = started_s + max(0.05, budget_s - RESERVE_S)
    quanta = quanta_per_gpu(problem.share_quantum)
    if _patterns(quanta) is not None:
        return _Solve(problem, started_s, deadline_s).plan()
    return _fine(problem, math.ceil(quanta / COARSE_QUANTA), started_s, deadline_s)


def _fine(problem: Problem, coarsening: int, started_s: float, deadline_s: float) -> Plan:
    """Plan with a quantum that is too fine for patterns: first with a multiple of it, then as it is.

    A plan in multiples is a plan; the bound is that of the fine quantum.
    """
    coarse = msgspec.structs.replace(problem, share_quantum=problem.share_quantum * coarsening)
    plans: list[Plan] = []
    bound: float | None = None
    failure = PlanError("the time was too short")
    for one, until_s in ((coarse, (started_s + deadline_s) / 2.0), (problem, deadline_s)):
        try:
            plan = _Solve(one, started_s, until_s).plan()
        except PlanError as error:
            failure = error
        else:
            plans.append(plan)
            bound = plan.report.bound if one is problem else None
    if not plans:
        raise failure
    best = max(plans, key=lambda plan: judge(problem, plan).rank)
    return _reported(problem, best, bound, best.report.detail, started_s)


def _reported(problem: Problem, plan: Plan, bound: float | None, detail: str, started_s: float) -> Plan:
    """``plan`` with the report of what is proven of it."""
    value = judge(problem, plan).value
    gap: float | None = None
    status: SolveStatus = "heuristic"
    if bound is not None:
        bound = max(bound, value)
        gap = (bound - value) / bound if bound > 0.0 else 0.0
        status = "optimal" if gap <= GAP_TOLERANCE else "feasible"
    report = SolveReport(
        policy="milp",
        status=status,
        value=value,
        bound=bound,
        gap=gap,
        seconds=time.monotonic() - started_s,
        detail=detail,
    )
    return msgspec.structs.replace(plan, report=report)


class _Solve:
    """One solve: options, model, and the way back from variables to a plan."""

    def __init__(self, problem: Problem, started_s: float, deadline_s: float) -> None:
        self.problem, self.started_s, self.deadline_s = problem, started_s, deadline_s
        self.maker = OptionMaker(problem, max(problem.migration_s, problem.config_change_s))
        self.total_weight = sum(stream.weight for stream in problem.streams)

    def plan(self) -> Plan:
        options = self._options(below_floor=False)
        outcome = self._optimise(options) if all(options) else None
        if outcome is not None:
            placed, bound = outcome
            return self._report(placed, bound, "")
        if time.monotonic() > self.deadline_s:
            raise PlanError("the solver found no plan in time")
        options = self._options(below_floor=True)
        unserved = [s.stream_id for s, found in zip(self.problem.streams, options, strict=True) if not found]
        if unserved:
            raise PlanError(f"stream {unserved[0]!r} cannot be served: none of its configurations fits on any GPU")
        outcome = self._optimise(options)
        if outcome is None:
            raise PlanError("the solver found no plan: the streams do not fit on the GPUs, or the time was too short")
        return self._report(outcome[0], None, "not every floor and latency limit can be kept; fewest violations")

    def _options(self, below_floor: bool) -> list[list[Option]]:
        options = []
        for stream in self.problem.streams:
            if time.monotonic() > self.deadline_s:
                raise PlanError("the time was too short to look at what every stream may do")
            options.append(self.maker.options(stream, below_floor))
        return options

    def _report(self, placed: list[Placed], bound: float | None, detail: str) -> Plan:
        placed = in_order(self.problem, placed)
        plan = write_plan(self.problem, placed, SolveReport(policy="milp", status="feasible"))
        return _reported(self.problem, plan, bound, detail, self.started_s)

    def _optimise(self, options: list[list[Option]]) -> tuple[list[Placed], float] | None:
        """(choice per stream, bound on the value), or None when there is no solution."""
        slots = _SlotModel(self, options)
        slots_bound = slots.solve(self.deadline_s)
        if slots_bound is None:
            return None
        if self.problem.migration_s < self.problem.config_change_s:
            slots_bound = self._bound_with_cheap_moves()
        if not self.maker.memory_matters or slots.fits_memory():
            return slots.placed(), slots_bound
        jobs = _JobModel(self, options)
        jobs_bound = jobs.solve(self.deadline_s)
        return None if jobs_bound is None else (jobs.placed(), min(slots_bound, jobs_bound))

    def _bound_with_cheap_moves(self) -> float:
        """A bound for the odd case that moving costs less than staying with another configuration."""
        maker = OptionMaker(self.problem)
        relaxed = _SlotModel(self, [maker.options(stream) for stream in self.problem.streams])
        bound = relaxed.solve(self.deadline_s)
        return upper_bound_trivial(self.problem) if bound is None else bound


class _Model:
    """What both formulations share: x, constraint 1 and the objective."""

    def __init__(self, solve: _Solve, options: list[list[Option]]) -> None:
        from ortools.math_opt.python import mathopt

        self.mathopt = mathopt
        self.sum = mathopt.fast_sum
        self.problem, self.maker, self.options = solve.problem, solve.maker, options
        self.total_weight = solve.total_weight
        self.model = mathopt.Model()
        self.x = [[self.model.add_binary_variable() for _ in found] for found in options]
        self.add(*(self.sum(xs) == 1.0 for xs in self.x))  # 1
        self._labels_and_turns()
        # Fewest broken floors first: no gain in value makes up for one.
        penalty = 1.0 + self.total_weight
        self.model.maximize(
            self.sum(
                (stream.weight * option.value - (penalty * (1.0 + option.shortfall) if option.shortfall > 0.0 else 0.0))
                * x
                for stream, found, xs in zip(self.problem.streams, options, self.x, strict=True)
                for option, x in zip(found, xs, strict=True)
            )
        )
        self.values: dict[Any, float] = {}

    def _labels_and_turns(self) -> None:
        labels: list[Any] = []
        takers: dict[tuple[str, int], list[Any]] = defaultdict(list)
        most: dict[tuple[str, int], int] = {}
        for found, xs in zip(self.options, self.x, strict=True):
            for option, x in zip(found, xs, strict=True):
                if option.label_seconds > 0.0:
                    labels.append(option.label_seconds * x)
                if option.turn is not None:
                    turn = (option.turn.link_id, option.turn.index)
                    takers[turn].append(x)
                    most[turn] = option.turn.most
        budget_s = self.problem.label_budget_s
        if self.maker.labels_matter and budget_s is not None:
            if budget_s > 0.0:
                self.add(self.sum(part * (1.0 / budget_s) for part in labels) <= 1.0)  # 8
            else:
                self.add(self.sum(labels) <= 0.0)
        self.add(*(self.sum(xs) <= float(most[turn]) for turn, xs in takers.items()))  # 9

    def add(self, *constraints: Any) -> None:
        for constraint in constraints:
            self.model.add_linear_constraint(constraint)

    def solve(self, deadline_s: float) -> float | None:
        """Solve until ``deadline_s`` (monotonic). Returns the bound on the value, None without a solution."""
        left_s = max(0.02, deadline_s - time.monotonic())
        parameters = self.mathopt.SolveParameters(time_limit=timedelta(seconds=left_s), relative_gap_tolerance=1e-5)
        result = self.mathopt.solve(self.model, self.mathopt.SolverType.HIGHS, params=parameters)
        if not result.has_primal_feasible_solution():
            return None
        self.values = dict(result.variable_values())
        return float(result.dual_bound()) / self.total_weight

    def chosen(self) -> list[Option]:
        return [
            max(zip(found, xs, strict=True), key=lambda pair: self.values[pair[1]])[0]
            for found, xs in zip(self.options, self.x, strict=True)
        ]


class _SlotModel(_Model):
    """Constraints 2 to 4."""

    def __init__(self, solve: _Solve, options: list[list[Option]]) -> None:
        super().__init__(solve, options)
        self.named: set[int] = set()
        fixed: dict[int, list[Any]] = defaultdict(list)
        free: dict[tuple[int, int], list[mathopt.Variable]] = defaultdict(list)
        for found, xs in zip(options, self.x, strict=True):
            for option, x in zip(found, xs, strict=True):
                for job in option.jobs:
                    if job.place.only_gpu is not None:
                        fixed[job.place.only_gpu].append(job.quanta * x)
                        self.named.add(job.place.only_gpu)
                    else:
                        free[job.place.gpu_class, job.quanta].append(x)
        self.patterns: dict[int, list[tuple[tuple[int, ...], Any]]] = {}
        self.slots: dict[int, list[tuple[int, Any]]] = defaultdict(list)
        for place, capacity in zip(self.maker.classes, self.maker.capacity, strict=True):
            self._class(place.gpu_class, place.gpus, capacity, fixed, free)

    def _class(
        self,
        k: int,
        gpus: tuple[int, ...],
        capacity: int,
        fixed: dict[int, list[Any]],
        free: dict[tuple[int, int], list[mathopt.Variable]],
    ) -> None:
        patterns = _patterns(capacity)
        unnamed = [g for g in gpus if g not in self.named]
        if patterns is None or len(patterns) > PATTERNS_PER_SLOT * capacity * len(unnamed):
            self.named.update(unnamed)
            unnamed = []
        self.patterns[k] = []
        if unnamed and patterns:
            for pattern in patterns:
                counter = self.model.add_integer_variable(lb=0.0, ub=float(len(unnamed)))
                self.patterns[k].append((pattern, counter))
            self.add(self.sum(counter for _, counter in self.patterns[k]) <= float(len(unnamed)))  # 4
        sizes = sorted({size for gpu_class, size in free if gpu_class == k})
        for g in gpus:
            if g in self.named:
                for size in sizes:
                    most = float(capacity // size)
                    self.slots[g].append((size, self.model.add_integer_variable(lb=0.0, ub=most)))
                slots = self.sum(size * z for size, z in self.slots[g])
                self.add(self.sum(fixed[g]) + slots <= float(capacity))  # 2
        for t in sizes:
            jobs = self.sum(x for size in sizes if size >= t for x in free[k, size])
            room = self.sum(sum(s >= t for s in pattern) * p for pattern, p in self.patterns[k])
            named = self.sum(z for g in gpus for size, z in self.slots.get(g, ()) if size >= t)
            self.add(jobs <= room + named)  # 3

    def fits_memory(self) -> bool:
        """Whether the solution happens to keep constraint 7, which this model does not have."""
        resident: dict[int, int] = defaultdict(int)
        where = self._where()
        for v, option in enumerate(self.chosen()):
            for index, job in enumerate(option.jobs):
                resident[where[v, index]] += job.num_bytes
        return all(total <= (self.problem.gpus[g].memory_bytes or total) for g, total in resident.items())

    def placed(self) -> list[Placed]:
        """The solution, job by job."""
        where = self._where()
        return [
            _placed(option, [where[v, i] for i in range(len(option.jobs))]) for v, option in enumerate(self.chosen())
        ]

    def _where(self) -> dict[tuple[int, int], int]:
        """Match free jobs to slots, largest to largest; then give unnamed GPUs to the streams served there."""
        chosen = self.chosen()
        where: dict[tuple[int, int], int] = {}
        for place in self.maker.classes:
            slots = self._slots_of(place.gpu_class, place.gpus)
            jobs = sorted(
                (-job.quanta, v, index)
                for v, option in enumerate(chosen)
                for index, job in enumerate(option.jobs)
                if job.place.only_gpu is None and job.place.gpu_class == place.gpu_class
            )
            for (_, v, index), (_, g) in zip(jobs, slots, strict=False):
                where[v, index] = g
        for v, option in enumerate(chosen):
            for index, job in enumerate(option.jobs):
                if job.place.only_gpu is not None:
                    where[v, index] = job.place.only_gpu
        self._relabel(where)
        return where

    def _slots_of(self, k: int, gpus: tuple[int, ...]) -> list[tuple[int, int]]:
        """(size, GPU) of all slots of class k, largest first."""
        slots = [(size, g) for g in gpus for size, z in self.slots.get(g, ()) for _ in range(round(self.values[z]))]
        unnamed = iter([g for g in gpus if g not in self.named])
        for pattern, counter in self.patterns[k]:
            for _ in range(round(self.values[counter])):
                g = next(unnamed)
                slots += [(size, g) for size in pattern]
        return sorted(slots, reverse=True)

    def _relabel(self, where: dict[tuple[int, int], int]) -> None:
        """Rename equal unnamed GPUs so that as many streams as possible stay where they are served."""
        votes: dict[tuple[int, int], int] = defaultdict(int)
        for (v, index), g in where.items():
            home = self.maker.position.get(self.problem.streams[v].serving_gpu or "")
            same_class = home is not None and self.maker.class_of[home] == self.maker.class_of[g]
            if index == 0 and home is not None and same_class and not {g, home} & self.named:
                votes[g, home] += 1
        renamed: dict[int, int] = {}
        for g, home in sorted(votes, key=lambda pair: -votes[pair]):
            if g not in renamed and home not in renamed.values():
                renamed[g] = home
        for place in self.maker.classes:
            unnamed = [g for g in place.gpus if g not in self.named]
            free = iter([g for g in unnamed if g not in renamed.values()])
            renamed.update({g: next(free) for g in unnamed if g not in renamed})
        for key, g in where.items():
            where[key] = renamed.get(g, g)


class _JobModel(_Model):
    """Constraints 5 to 7."""

    def __init__(self, solve: _Solve, options: list[list[Option]]) -> None:
        super().__init__(solve, options)
        self.y: dict[tuple[int, int, Job], dict[int, Any]] = {}
        quanta: dict[int, list[Any]] = defaultdict(list)
        num_bytes: dict[int, list[Any]] = defaultdict(list)
        for v, (found, xs) in enumerate(zip(options, self.x, strict=True)):
            uses: dict[tuple[int, Job], list[Any]] = defaultdict(list)
            for option, x in zip(found, xs, strict=True):
                for index, job in enumerate(option.jobs):
                    uses[index, job].append(x)
            for (index, job), takers in uses.items():
                gpus = [g for g in job.place.gpus if self._has_memory(g, job)]
                ys = {g: self.model.add_binary_variable() for g in gpus}
                self.y[v, index, job] = ys
                self.add(self.sum(ys.values()) == self.sum(takers))  # 5
                for g, y in ys.items():
                    quanta[g].append(job.quanta * y)
                    if job.num_bytes:
                        # In units of the GPU's memory: whole bytes would drown the solver's tolerances.
                        num_bytes[g].append(job.num_bytes / max(1, self.problem.gpus[g].memory_bytes) * y)
        for g, gpu in enumerate(self.problem.gpus):
            self.add(self.sum(quanta[g]) <= float(self.maker.capacity[self.maker.class_of[g]]))  # 6
            if gpu.memory_bytes:
                self.add(self.sum(num_bytes[g]) <= 1.0)  # 7

    def _has_memory(self, g: int, job: Job) -> bool:
        return not self.problem.gpus[g].memory_bytes or job.num_bytes <= self.problem.gpus[g].memory_bytes

    def placed(self) -> list[Placed]:
        placed = []
        for v, option in enumerate(self.chosen()):
            where = []
            for index, job in enumerate(option.jobs):
                ys = self.y[v, index, job]
                where.append(max(ys, key=lambda g: self.values[ys[g]]))
            placed.append(_placed(option, where))
        return placed


def _placed(option: Option, where: Sequence[int]) -> Placed:
    gpu, retrain_gpu = where[0], where[-1]
    if option.turn is not None:
        return Placed(option.lam, gpu, cloud=option.cloud, turn=option.turn.index, lam_after=option.lam, gpu_after=gpu)
    if option.gamma < 0:
        return Placed(option.lam, gpu)
    gpu_after = retrain_gpu if option.moves else gpu
    return Placed(option.lam, gpu, option.gamma, option.r, retrain_gpu, option.lam_after, gpu_after)


@cache
def _patterns(capacity: int) -> tuple[tuple[int, ...], ...] | None:
    """All ways to write ``capacity`` as a sum of whole numbers, None when there are too many of them."""
    patterns: list[tuple[int, ...]] = []
    for pattern in _partitions(capacity, capacity):
        patterns.append(pattern)
        if len(patterns) > MAX_PATTERNS:
            return None
    return tuple(patterns)


def _partitions(total: int, largest: int) -> Iterator[tuple[int, ...]]:
    if total == 0:
        yield ()
        return
    for first in range(min(total, largest), 0, -1):
        for rest in _partitions(total - first, first):
            yield (first, *rest)
