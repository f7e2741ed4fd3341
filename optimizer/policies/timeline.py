"""The time-indexed planner: prices over time give a bound, a search over placed layouts gives the plan.

1. Model (``timeline_model``): options, retraining modes, rows; what nobody needs is left out.
2. Bound (``timeline_bound``, ``timeline_pricing``): Lagrangian over prices of share and memory in time.
3. Plan (``timeline_start``, ``timeline_layout``, ``timeline_search``): placed on single GPUs, exact times; where
   moving inference is free and streams are few, ``timeline_pool``.
4. Events (``timeline_plan``): starts name the retrainings that they wait for.
The mathematics is in docs/timeline.md.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable

import msgspec

from optimizer.objective import judge, stamped
from optimizer.policies import timeline_cache
from optimizer.policies.registry import get_policy
from optimizer.policies.timeline_bound import (
    CUTS,
    MASTER_ROUNDS,
    SUBGRADIENT_STEPS,
    Dual,
    dual_of_few,
    dual_of_many,
    opening_grid,
    opening_prices,
    polished,
    refined,
    solve_dual,
)
from optimizer.policies.timeline_exact import exhaust
from optimizer.policies.timeline_layout import Layout, Placed, Snapshot, Tables
from optimizer.policies.timeline_model import Model, build_model
from optimizer.policies.timeline_plan import assignments_of
from optimizer.policies.timeline_pool import PoolSearch, moves_are_free
from optimizer.policies.timeline_pricing import Pricer
from optimizer.policies.timeline_search import Search
from optimizer.policies.timeline_start import (
    layout_of,
    move_later,
    overloaded,
    pack_inference,
    pack_wanted,
    promising_trainings,
    queue_retrainings,
    spread_inference,
)
from protocol.errors import PlanError
from protocol.plan import Assignment, Plan, Problem, SolveReport, SolveStatus

POLICY = "timeline"
FEW_STREAMS = 60  # beyond, the linear master costs more than it gains
EXHAUSTIVE_STREAMS = 4
MANY_STREAMS = 300
FIRST_LAYOUTS = tuple((dearer, part) for dearer in (1.0, 0.7, 1.4) for part in (1.0, 0.8, 0.6, 0.5))
STEPS_PER_STREAM = 200
TEMPERATURES = (0.0, 1e-3, 3e-3, 1e-2)  # of the rounds of the search, in turn, per stream
FINE_STREAMS = 24  # up to here a finer grid is cheap
PILOT_STEPS = 200
POOL_STEPS = (400, 2000, 4000)  # of the search over queues, per stream, by round
POOL_TEMPERATURES = (3e-3, 2e-3)  # of its rounds, in turn, per stream
POOL_PATIENCE = 6
POOLING = 0.2  # of the gap aimed at, for what packing takes off pooled worth
REFINEMENTS = 2
PRICING_PART = (0.4, 0.6)  # of the time, at most, for the prices; of few, of many streams
OTHER_SEED = 1_000_003
LOADING_PART = 0.3  # of the budget, for the compiled search to be loaded
PATIENCE = 8  # rounds without improvement after which searching ends


def timeline(
    problem: Problem,
    budget_s: float,
    *,
    target_gap: float | None = None,
    seed: int = 0,
    offer: Callable[[Plan], None] | None = None,
) -> Plan:
    """The best placed, time-indexed plan found within ``budget_s`` seconds, with a proven bound.

    Ends early when the gap is at most ``target_gap`` (None: 0.1 % up to 60 streams, 0.2 % beyond) or when searching
    has stopped to help. ``offer`` is handed plans of many streams (above 300) before
    the search is done: inference alone, then with the first queues. Equal ``seed`` and ample time give equal plans.
    The bound covers every plan that keeps the floors (every plan that can be carried out, where the
    floors cannot all be kept), by the judge's measure.
    """
    started = time.monotonic()
    if target_gap is None:
        target_gap = 1e-3 if len(problem.streams) <= FEW_STREAMS else 2e-3
    timeline_cache.prepare(LOADING_PART * budget_s)
    return _Solving(problem, started, budget_s, target_gap, seed, offer).run()


def _run_both(pool: PoolSearch, other: PoolSearch | None, deadline: float, steps: int, hot: float, goal: float) -> None:
    """One round of ``pool`` and, beside it, of ``other``; both then have the better queues."""
    if other is None:
        pool.run(deadline, steps, hot, goal)
        return
    # The compiled loop runs without the lock of the interpreter.
    beside = threading.Thread(target=other.run, args=(deadline, steps, hot, goal), name="search queues")
    beside.start()
    pool.run(deadline, steps, hot, goal)
    beside.join()
    if other.best > pool.best:
        pool.adopt(other)
    else:
        other.adopt(pool)


class _Solving:
    def __init__(
        self,
        problem: Problem,
        started: float,
        budget_s: float,
        target_gap: float,
        seed: int,
        offer: Callable[[Plan], None] | None,
    ) -> None:
        self.problem = problem
        self.started, self.target_gap, self.seed = started, target_gap, seed
        self.budget_s, self.offer = budget_s, offer if len(problem.streams) > MANY_STREAMS else None
        self._began_s, self._began_busy_s = time.monotonic(), time.thread_time()
        self.deadline = self._deadline()
        self.given_up: frozenset[int] = frozenset()  # streams without a floor
        self.bound: float | None = None
        self.notes: list[str] = []

    def _deadline(self) -> float:
        """When to stop searching: the rest pays for turning the layout into a plan and for judging it.

        On a machine that others use as well both take as many times longer as everything has so far.
        """
        wall_s, busy_s = time.monotonic() - self._began_s, time.thread_time() - self._began_busy_s
        slowness = min(10.0, max(1.0, wall_s / busy_s)) if busy_s > 0.02 else 1.0
        margin_s = 0.01 + 0.05 * self.budget_s + 2e-4 * slowness * len(self.problem.streams)
        return self.started + max(0.0, self.budget_s - margin_s)

    def _offer(self, placed: Placed) -> None:
        if self.offer is not None:
            self.offer(self._report(assignments_of(placed), "feasible"))

    # ------------------------------------------------------------ the course of a solve

    def run(self) -> Plan:
        layout = pack_inference(Tables(build_model(self.problem)))
        if layout is None:
            layout = self._packed_by_others()
        if layout is None:
            layout = self._below_floors()
        if layout is None:
            self.notes.append("the cheapest inference of all streams does not fit on the GPUs")
            return self._report(overloaded(self.problem), "fallback")
        self._offer(layout.placed())
        self.deadline = self._deadline()
        part = PRICING_PART[len(self.problem.streams) > MANY_STREAMS]
        half = self.started + part * (self.deadline - self.started)
        dual = self._dual(layout.t.model, half)
        self.bound = dual.bound
        if self.given_up:
            # Every plan that can be carried out is a plan without floors.
            everyone = frozenset(range(len(self.problem.streams)))
            later = half + 0.3 * (self.deadline - half)
            self.bound = self._dual(build_model(self.problem, no_floor=everyone), later).bound
        if moves_are_free(layout.t) and timeline_cache.kernel() is not None:
            placed, value = self._improve_queues(layout, dual)
        else:
            layout.load(self._improve(layout, dual, self._first_layout(layout, dual)))
            placed, value = layout.placed(), layout.total
        if len(self.problem.streams) <= EXHAUSTIVE_STREAMS and not layout.t.with_changes:
            placed = self._exhaust(placed, value)
        return self._report(assignments_of(placed), "feasible")

    def _exhaust(self, placed: Placed, value: float) -> Placed:
        """Go through all plans of few streams, as far as time allows; when done, the best is the bound."""
        grid_s = opening_grid(self.problem.window_s, 2 * self.problem.num_slots)
        model = build_model(self.problem, no_floor=self.given_up, cuts=CUTS, every_retraining=True)
        pricer = Pricer(model, grid_s)
        left_s = self.deadline - time.monotonic()
        dual = solve_dual(
            pricer, opening_prices(pricer), time.monotonic() + 0.3 * left_s, SUBGRADIENT_STEPS, MASTER_ROUNDS
        )
        if (dual.bound - value) <= 1e-9:
            return placed
        outcome = exhaust(Tables(model), dual, value, self.deadline)
        if outcome.complete and not self.given_up:
            self.bound = min(dual.bound, outcome.value + 1e-9)
        elif not self.given_up and self.bound is not None:
            self.bound = min(self.bound, dual.bound)
        return placed if outcome.placed is None else outcome.placed

    def _first_layout(self, packed: Layout, dual: Dual) -> Snapshot:
        """The best of some ways to begin: streams packed as tightly as can be, packed as prices ask, spread."""
        tables = packed.t
        many = tables.num_streams > MANY_STREAMS
        queue_retrainings(packed, dual)
        if not many:
            move_later(packed, self.deadline)
        found = [packed.snapshot()]
        for dearer, part in ((1.0, 1.0),) if many else FIRST_LAYOUTS:
            if time.monotonic() > self.deadline:
                break
            for layout in (pack_wanted(tables, dual, dearer), spread_inference(tables, dual, dearer, part)):
                if layout is not None:
                    queue_retrainings(layout, dual)
                    move_later(layout, self.deadline)
                    found.append(layout.snapshot())
        return max(found, key=lambda snapshot: snapshot.total)

    def _packed_by_others(self) -> Layout | None:
        """First fit is not the last word: another policy may find room for every stream."""
        tables = Tables(build_model(self.problem))
        for name in ("fair", "none"):
            left_s = self.deadline - time.monotonic()
            if left_s <= 0.0:
                return None
            try:
                plan = get_policy(name)(self.problem, 0.3 * left_s)
            except PlanError:
                continue
            if judge(self.problem, plan).feasible:
                layout = layout_of(tables, plan)
                if layout is not None:
                    return layout
        return None

    def _below_floors(self) -> Layout | None:
        """Keep as many floors as first fit can: they are given up one by one, the dearest first."""
        dearest = sorted(range(len(self.problem.streams)), key=lambda v: (-self._floor_share(v), v))
        low, high = 1, len(dearest)
        found: Layout | None = None
        while low <= high:
            middle = (low + high) // 2
            given_up = frozenset(dearest[:middle])
            layout = pack_inference(Tables(build_model(self.problem, no_floor=given_up)))
            if layout is None:
                low = middle + 1
            else:
                found, high, self.given_up = layout, middle - 1, given_up
        if found is not None:
            self.notes.append(f"the floors of {len(self.given_up)} streams could not be kept")
        return found

    def _floor_share(self, v: int) -> float:
        """The least share (at speed 1) with which stream ``v`` keeps its floor."""
        stream = self.problem.streams[v]
        return min(
            (
                p.gpu_share_needed
                for p in stream.inference
                if stream.accuracy_now * p.relative_accuracy >= stream.min_accuracy
            ),
            default=1e9,
        )

    def _dual(self, model: Model, deadline: float) -> Dual:
        grid_s = opening_grid(self.problem.window_s, self.problem.num_slots)
        find = dual_of_few if model.num_streams <= FEW_STREAMS else dual_of_many
        return find(model, grid_s, deadline)

    # ------------------------------------------------------------ search

    def _improve(self, layout: Layout, dual: Dual, best: Snapshot) -> Snapshot:
        """Anneal from ``best`` again and again, ever longer, until the gap is small or nothing comes of it."""
        layout.load(best)
        count = layout.t.num_streams
        seed, idle, turn = self.seed, 0, 0
        steps = STEPS_PER_STREAM * count
        own_bound = not self.given_up
        refinable, polishable = count <= FINE_STREAMS, FEW_STREAMS < count <= MANY_STREAMS
        while idle < (PATIENCE if count > EXHAUSTIVE_STREAMS else 2) and time.monotonic() < self.deadline:
            goal = dual.bound * (1.0 - self.target_gap)
            search = Search(layout, promising_trainings(layout, dual, dual.bound - best.total + 1e-9), seed)
            before = time.monotonic()
            pilot = search.run(self.deadline, min(steps, PILOT_STEPS), 0.0, goal)
            pace = (time.monotonic() - before) / max(1, pilot)
            affordable = int((self.deadline - time.monotonic()) / max(pace, 1e-6))
            if search.best.total < goal and affordable > 0:
                hot = TEMPERATURES[turn % len(TEMPERATURES)] / count
                search.run(self.deadline, min(steps, affordable), hot, goal)
            turn += 1
            idle = 0 if search.best.total > best.total + 1e-9 else idle + 1
            if search.best.total > best.total:
                best = search.best
            if polishable and best.total < goal:
                later = time.monotonic() + 0.4 * max(0.0, self.deadline - time.monotonic())
                dual = polished(dual, layout.t.model, best.total, later)
                polishable = False
                if own_bound:
                    self.bound = dual.bound
                goal = dual.bound * (1.0 - self.target_gap)
            if refinable and goal * (1.0 - self.target_gap) <= best.total < goal:
                dual = refined(dual, best.total, time.monotonic() + 0.3 * max(0.0, self.deadline - time.monotonic()))
                refinable = False
                if own_bound:
                    self.bound = dual.bound
                goal = dual.bound * (1.0 - self.target_gap)
            if best.total >= goal:
                break
            seed += 1
            layout.load(best)
            steps = int(1.5 * steps)
        return best

    def _improve_queues(self, layout: Layout, dual: Dual) -> tuple[Placed, float]:
        """The same where moving inference is free: only the queues are searched, inference is packed anew for each."""
        queue_retrainings(layout, dual)
        count = layout.t.num_streams
        own_bound = not self.given_up
        slack = dual.bound - layout.total + 1e-9
        wanted = promising_trainings(layout, dual, slack)
        pool = PoolSearch(layout, wanted, self.seed)
        # Packing takes time, so few streams are searched twice at once; the better one wins, the first among equals.
        other = PoolSearch(layout, wanted, self.seed + OTHER_SEED) if pool.packing else None
        value, idle, refinements, lost = layout.total, 0, 0, 0.0
        if self.offer is not None and pool.packed() > value:
            self._offer(pool.placed())
        patience = POOL_PATIENCE if count > EXHAUSTIVE_STREAMS else 2  # few streams are planned exhaustively afterwards
        for turn in itertools.count():
            goal = dual.bound * (1.0 - self.target_gap)
            if value >= goal or idle >= patience or time.monotonic() > self.deadline:
                break
            before = pool.best
            # Pooled worth is a little more than what can be packed.
            enough = goal if pool.packing else goal + max(POOLING * self.target_gap * dual.bound, 1.1 * lost)
            steps = POOL_STEPS[min(turn, len(POOL_STEPS) - 1)] * count
            _run_both(
                pool, other, self.deadline, steps, POOL_TEMPERATURES[turn % len(POOL_TEMPERATURES)] / count, enough
            )
            packed = pool.packed()
            value, lost = max(value, packed), pool.best - packed
            idle = 0 if pool.best > before + 1e-9 else idle + 1
            gap = (dual.bound - value) / dual.bound
            if count <= FEW_STREAMS and refinements < REFINEMENTS and self.target_gap < gap < 2.5 * self.target_gap:
                finer = refined(dual, value, time.monotonic() + 0.3 * max(0.0, self.deadline - time.monotonic()))
                refinements = refinements + 1 if finer.bound < dual.bound else REFINEMENTS
                dual = finer
                if own_bound:
                    self.bound = dual.bound
            elif FEW_STREAMS < count <= MANY_STREAMS and refinements < REFINEMENTS and gap > self.target_gap:
                later = time.monotonic() + 0.4 * max(0.0, self.deadline - time.monotonic())
                finer = polished(dual, layout.t.model, value, later)
                refinements = refinements + 1 if finer.bound < dual.bound else REFINEMENTS
                dual = finer
                if own_bound:
                    self.bound = dual.bound
            wanted = promising_trainings(layout, dual, dual.bound - value + 1e-9)
            for one in (pool, other):
                if one is not None:
                    one.want(wanted)
        return (pool.placed(), value) if value > layout.total else (layout.placed(), layout.total)

    # ------------------------------------------------------------ out

    def _gap(self, value: float) -> float | None:
        if self.bound is None:
            return None
        return max(0.0, (self.bound - value) / self.bound) if self.bound > 0.0 else 0.0

    def _report(self, assignments: tuple[Assignment, ...], status: SolveStatus) -> Plan:
        report = SolveReport(policy=POLICY, status=status)
        plan = Plan(window_s=self.problem.window_s, assignments=assignments, report=report)
        plan = stamped(self.problem, plan)
        value = judge(self.problem, plan).value
        gap = self._gap(value)
        if status == "feasible" and gap is not None and gap <= self.target_gap:
            status = "optimal"
        report = SolveReport(
            policy=POLICY,
            status=status,
            value=value,
            bound=self.bound,
            gap=gap,
            seconds=time.monotonic() - self.started,
            detail="; ".join(self.notes),
        )
        return msgspec.structs.replace(plan, report=report)
