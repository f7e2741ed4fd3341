"""Prices of GPU share over time and the bound they prove: subgradient steps, then a linear master (docs/timeline.md).

Every price vector that is ever tried gives a valid bound; the smallest is kept.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, replace

import numpy as np
from ortools.linear_solver import pywraplp

from optimizer.objective import upper_bound_trivial
from optimizer.policies.timeline_model import Floats, Ints, Model, part_of, with_cuts, with_modes
from optimizer.policies.timeline_pricing import Priced, Pricer, coarse_modes, exact_bound

CONVERGED = 2e-5
GRID_BEND = 1.7
TRAIL = 12
CUTS = (3, 6)
SUBGRADIENT_STEPS, MASTER_ROUNDS, REFINING_STEPS = 60, 40, 100
SAMPLED_STREAMS, SAMPLE, POLISHING_STEPS = 300, 100, 8
POLISHING_AGAIN = 150


@dataclass(frozen=True, slots=True)
class Dual:
    """Best prices found (rows x cells), the bound they prove, and the schedules that are best at them.

    ``mode`` and ``start_s``: the schedule of every stream that the linear master favours (mode -1 = none).
    """

    bound: float
    prices: Floats
    pricer: Pricer
    priced: Priced
    mode: Ints
    start_s: Floats
    iterations: int
    trail: tuple[Floats, ...]  # prices tried last


@dataclass(frozen=True, slots=True)
class Steps:
    """How ``descend`` goes. ``aim``: how far below the best bound the optimum is guessed to be, as a part of it."""

    aim: float
    inertia: float
    patience: int
    shorter: float
    least_gain: float
    go_back: bool


COARSE = Steps(aim=3e-3, inertia=0.3, patience=4, shorter=0.7, least_gain=1e-7, go_back=False)
FINE = Steps(aim=1e-3, inertia=0.7, patience=6, shorter=0.6, least_gain=1e-8, go_back=True)


def opening_prices(pricer: Pricer) -> Floats:
    """A first guess: the window's worth spread over all GPUs by their speed, falling towards the window's end."""
    model = pricer.model
    worth = float((model.weight * model.accuracy_now).sum())
    prices = np.zeros((model.num_rows, pricer.num_cells))
    speeds = [float(one.rates[-1]) if len(one.rates) else 0.0 for one in model.classes]
    gpus = sum(speed * len(one.members) for speed, one in zip(speeds, model.classes, strict=True)) or 1.0
    middle = 0.5 * (pricer.grid_s[1:] + pricer.grid_s[:-1]) / pricer.grid_s[-1]
    for speed, one in zip(speeds, model.classes, strict=True):
        prices[share_row(model, one.first_item)] = worth * speed / (gpus * pricer.grid_s[-1]) * 0.6 * (1.0 - middle)
    if (model.mode_turn >= 0).any():
        _price_turns(pricer, prices)
    return prices


def _price_turns(pricer: Pricer, prices: Floats) -> None:
    """Opening prices of the turns of links, in place: what a turn is worth to the first who has none of the link's.

    With gains that fall alike from turn to turn these are the prices at which as many want a turn as there are.
    """
    model = pricer.model
    stream = model.case_stream[model.mode_case]
    none, worth, _, _ = pricer.mode_worths(prices)
    local = none.copy()
    on_gpu = model.mode_turn < 0
    np.maximum.at(local, stream[on_gpu], worth[on_gpu])
    rows = np.unique(model.mode_turn[~on_gpu])
    for row in rows:
        gains = np.sort((worth - local[stream])[model.mode_turn == row])[::-1]
        if len(gains) > len(rows):
            prices[model.first_once + row, 0] = max(0.0, float(gains[len(rows)])) / model.problem.window_s


def share_row(model: Model, first_item: int) -> int:
    """The row of the plain share of the class whose items begin at ``first_item``."""
    return int(np.flatnonzero(model.item_use[:, first_item : first_item + 2].sum(axis=1) > 0.0)[0])


def carried_over(dual: Dual, pricer: Pricer, found: Floats | None = None) -> Floats:
    """Prices ``found`` by ``dual`` (its best) for a pricer of the same classes and grid with other size functions."""
    found = dual.prices if found is None else found
    prices = np.zeros((pricer.model.num_rows, pricer.num_cells))
    for old, new in zip(dual.pricer.model.classes, pricer.model.classes, strict=True):
        source = share_row(dual.pricer.model, old.first_item)
        prices[share_row(pricer.model, new.first_item)] = found[source]
        if new.memory_row >= 0:
            prices[new.memory_row] = found[old.memory_row]
    prices[pricer.model.first_once :] = found[dual.pricer.model.first_once :]
    return prices


def descend(
    pricer: Pricer, prices: Floats, deadline: float, iterations: int, steps: Steps = COARSE
) -> tuple[float, Floats, int, tuple[Floats, ...]]:
    """Subgradient steps of Polyak's length from ``prices``: (best bound, its prices, steps made, last prices)."""
    best, best_prices, stalled, length = np.inf, prices, 0, 1.0
    scale = pricer.scale[:, None]  # rows may be GPUs or bytes
    direction: Floats | None = None
    done = 0
    trail: deque[Floats] = deque(maxlen=TRAIL)
    while done < iterations:
        done += 1
        trail.append(prices)
        priced = pricer.price(prices)
        if priced.bound < best - steps.least_gain:
            best, best_prices, stalled = priced.bound, prices, 0
        else:
            stalled += 1
            if stalled >= steps.patience:
                length, stalled = steps.shorter * length, 0
                if steps.go_back:
                    prices, direction, priced = best_prices, None, pricer.price(best_prices)
        if time.monotonic() > deadline:
            break
        excess = (pricer.total_usage(prices, priced) - pricer.capacity_s) / pricer.row_s / scale
        direction = excess if direction is None else steps.inertia * direction + (1.0 - steps.inertia) * excess
        norm = float((direction * direction * pricer.row_s).sum()) + 1e-12
        step = length * max(priced.bound - best * (1.0 - steps.aim), 1e-7) / norm
        prices = np.maximum(0.0, prices + step * direction / scale)
    return float(best), best_prices, done, tuple(trail)


class Master:
    """The linear master over the schedules priced so far: one row per (row, cell), one per stream."""

    def __init__(self, pricer: Pricer) -> None:
        self.pricer = pricer
        # GLOP ends about one in five of these masters as abnormal (OR-Tools 9.15); CLP none.
        self.solver = pywraplp.Solver.CreateSolver("CLP")
        if self.solver is None:
            raise RuntimeError("this build of OR-Tools has no CLP")
        model, infinity = pricer.model, self.solver.infinity()
        self.scale = model.capacities
        self.rows = [
            [self.solver.Constraint(-infinity, 1.0) for _ in range(pricer.num_cells if row < model.first_once else 1)]
            for row in range(model.num_rows)
        ]
        self.streams = [self.solver.Constraint(1.0, 1.0) for _ in range(model.num_streams)]
        self.objective = self.solver.Objective()
        self.objective.SetMaximization()
        for row in self.streams:
            unserved = self.solver.NumVar(0.0, infinity, "")
            row.SetCoefficient(unserved, 1.0)
            self.objective.SetCoefficient(unserved, -1.0)
        self.columns: list[tuple[int, int, float, pywraplp.Variable]] = []
        self._seen: set[tuple[int, bytes]] = set()

    def add(self, prices: Floats, priced: Priced) -> int:
        """Add the priced schedules that are new; returns how many."""
        value, used = self.pricer.usage(prices, priced)
        used = used / self.pricer.row_s / self.scale[None, :, None]
        added = 0
        for v in range(len(value)):
            key = (v, np.round(used[v], 5).tobytes())
            if key in self._seen:
                continue
            self._seen.add(key)
            added += 1
            column = self.solver.NumVar(0.0, self.solver.infinity(), "")
            self.streams[v].SetCoefficient(column, 1.0)
            self.objective.SetCoefficient(column, float(value[v]))
            for row, cell in zip(*np.nonzero(used[v] > 1e-9), strict=True):
                self.rows[row][cell].SetCoefficient(column, float(used[v, row, cell]))
            self.columns.append((v, int(priced.mode[v]), float(priced.start_s[v]), column))
        return added

    def solve(self, seconds: float) -> tuple[float, Floats] | None:
        """(value, prices) of the linear master; None where the solver gives no optimum."""
        self.solver.SetTimeLimit(max(1, int(1000 * seconds)))
        status = self.solver.Solve()
        if status != pywraplp.Solver.OPTIMAL:
            return None
        dual = np.zeros(self.pricer.row_s.shape)
        for row, line in enumerate(self.rows):
            dual[row, : len(line)] = [constraint.dual_value() for constraint in line]
        prices = np.maximum(0.0, dual) / self.pricer.row_s / self.scale[:, None]
        return float(self.objective.Value()), prices

    def favourites(self) -> tuple[Ints, Floats]:
        """Mode and start of the schedule with the greatest part in the last solution, per stream."""
        count = self.pricer.model.num_streams
        mode, start_s = np.full(count, -1, dtype=np.int64), np.zeros(count)
        most = np.zeros(count)
        for v, m, s, column in self.columns:
            part = column.solution_value()
            if part > most[v]:
                most[v], mode[v], start_s[v] = part, m, s
        return mode, start_s


def solve_dual(
    pricer: Pricer,
    prices: Floats,
    deadline: float,
    iterations: int,
    rounds: int,
    nearby: tuple[Floats, ...] = (),
) -> Dual:
    """Prices and bound from ``prices``: ``iterations`` subgradient steps, then ``rounds`` of the linear master."""
    bound, best, made, trail = descend(pricer, prices, deadline, iterations)
    mode: Ints | None = None
    start_s = np.zeros(pricer.model.num_streams)
    if rounds and time.monotonic() < deadline:
        master = Master(pricer)
        tried = best
        solved = False
        for other in nearby:
            master.add(other, pricer.price(other))
        for turn in range(rounds):
            priced = pricer.price(tried)
            made += 1
            if priced.bound < bound:
                bound, best = priced.bound, tried
            master.add(tried, priced)
            left_s = deadline - time.monotonic()
            answer = master.solve(left_s) if left_s > 0.0 else None
            if answer is None:
                solved = False
                break
            solved = True
            value, dual = answer
            if bound - value < CONVERGED * bound:
                break
            # Staying near the best prices keeps the master from leaping between far corners.
            tried = 0.5 * best + 0.5 * dual if turn < 0.7 * rounds else dual
        if solved:
            mode, start_s = master.favourites()
    final = pricer.price(best)
    if mode is None:
        mode, start_s = final.mode, final.start_s
    return Dual(min(bound, final.bound), best, pricer, final, mode, start_s, made, trail)


def opening_grid(window_s: float, cells: int) -> Floats:
    """Grid points of ``cells`` cells, shorter at the start, where shares are dear and prices move most."""
    return window_s * np.linspace(0.0, 1.0, cells + 1) ** GRID_BEND


def halved(grid_s: Floats) -> Floats:
    """The grid with every cell cut in two."""
    fine = np.empty(2 * len(grid_s) - 1)
    fine[::2] = grid_s
    fine[1::2] = 0.5 * (grid_s[1:] + grid_s[:-1])
    return fine


def dual_of_few(model: Model, grid_s: Floats, deadline: float) -> Dual:
    """Prices of plain share and memory by subgradient steps, then of what does not pack by the linear master."""
    plain = Pricer(model, grid_s)
    dual = solve_dual(plain, opening_prices(plain), deadline, SUBGRADIENT_STEPS, 0)
    if time.monotonic() > deadline:
        return dual
    pricer = Pricer(with_cuts(model, CUTS), grid_s)
    nearby = tuple(carried_over(dual, pricer, found) for found in dual.trail)
    return solve_dual(pricer, carried_over(dual, pricer), deadline, 0, MASTER_ROUNDS, nearby)


def refined(dual: Dual, incumbent: float, deadline: float) -> Dual:
    """``dual`` on a grid twice as fine; never a worse bound.

    ``incumbent``: value of a plan at hand. No better one has a retraining mode that loses more than the bound is above
    it, so those modes are left out; what is proven then holds for all better plans, and the incumbent for the others.
    """
    _, losses = dual.pricer.mode_losses(dual.prices, dual.priced)
    kept = np.flatnonzero(losses <= dual.bound - incumbent + 1e-9)
    pricer = Pricer(with_modes(dual.pricer.model, kept), halved(dual.pricer.grid_s))
    found, prices, made, trail = descend(pricer, np.repeat(dual.prices, 2, axis=1), deadline, REFINING_STEPS, FINE)
    bound = max(found, incumbent)
    if bound >= dual.bound:
        return dual
    priced = pricer.price(prices)
    return Dual(bound, prices, pricer, priced, priced.mode, priced.start_s, dual.iterations + made, trail)


def polished(dual: Dual, model: Model, incumbent: float, deadline: float) -> Dual:
    """``dual`` of many streams after further steps, proven on all modes of ``model``; never a worse bound.

    ``incumbent``: value of a plan at hand; steps aim at half-way between it and the bound.
    """
    aim = max(FINE.aim, 0.5 * (dual.bound - incumbent) / dual.bound)
    latest = time.monotonic() + 0.6 * max(0.0, deadline - time.monotonic())
    _, prices, made, trail = descend(dual.pricer, dual.prices, latest, POLISHING_AGAIN, replace(FINE, aim=aim))
    if time.monotonic() > deadline:
        return dual
    bound = exact_bound(model, dual.pricer.grid_s, prices)
    if bound >= dual.bound:
        return dual
    priced = dual.pricer.price(prices)
    return Dual(bound, prices, dual.pricer, priced, priced.mode, priced.start_s, dual.iterations + made, trail)


def dual_of_many(model: Model, grid_s: Floats, deadline: float) -> Dual:
    """Prices found with few shares (and, for very many streams, on a sample of them), proven on all shares.

    The proof may take half as long again as ``deadline`` allows; later the bound is the trivial one of the judge.
    """
    latest = deadline + 0.5 * max(0.0, deadline - time.monotonic())
    count = model.num_streams
    coarse = Pricer(with_modes(model, coarse_modes(model)), grid_s)
    prices = opening_prices(coarse)
    steps = SUBGRADIENT_STEPS
    if count > SAMPLED_STREAMS:
        sample = np.sort(np.random.default_rng(0).choice(count, SAMPLE, replace=False))
        small = part_of(coarse.model, sample)
        half = time.monotonic() + 0.4 * max(0.0, deadline - time.monotonic())
        _, prices, _, _ = descend(Pricer(small, grid_s), prices, half, steps)
        steps = POLISHING_STEPS
    dual = solve_dual(coarse, prices, deadline, steps, 0)
    if time.monotonic() > latest:
        return replace(dual, bound=upper_bound_trivial(model.problem))
    return replace(dual, bound=exact_bound(model, grid_s, dual.prices))
