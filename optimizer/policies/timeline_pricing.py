"""Exact pricing of all streams at once, and the Lagrangian bound that comes with it (docs/timeline.md, section 3).

Given a price density pi[row, k] >= 0 (objective per unit of the row and second) on the cells of a time
grid, the best schedule of every stream is found exactly over *continuous* start times: with prefix sums
of prices, a schedule's worth is piecewise linear in its start, with kinks only where its start or its
end meets a grid point, and a jump where its end meets the end of the stream's own window.

Prices are a matrix (rows x cells). What is spent once in a plan (labels, turns of links) has its price in the first
cell of its row, per window length: a schedule that takes the part x of the budget uses x times the window's seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from optimizer.objective import ACCURACY_TOLERANCE
from optimizer.policies.timeline_model import Bools, Floats, Ints, Model, with_modes

NEVER = -1e9
MODES_AT_ONCE = 40_000


@dataclass(frozen=True, slots=True)
class Priced:
    """The best schedule of every stream at given prices. ``mode`` is -1 for "no retraining"; times in seconds.

    ``worth``: value less price. ``bound``: Lagrangian bound at these prices.
    """

    worth: Floats  # V
    mode: Ints  # V
    start_s: Floats  # V
    end_s: Floats  # V
    bound: float


def coarse_modes(model: Model) -> Ints:
    """Positions of the modes with the largest share and the one nearest to half of it, per case and class."""
    group = model.mode_case * len(model.classes) + model.mode_class
    last = np.ones(len(group), dtype=bool)
    last[:-1] = group[1:] != group[:-1]
    most = model.mode_quanta[np.flatnonzero(last)][np.cumsum(last) - last]
    return np.flatnonzero(last | (model.mode_quanta == (most + 1) // 2))


def exact_bound(model: Model, grid_s: Floats, prices: Floats) -> float:
    """The Lagrangian bound over all modes of ``model``, part by part, so that memory stays small."""
    worth: Floats | None = None
    bound = 0.0
    for first in range(0, max(1, len(model.mode_case)), MODES_AT_ONCE):
        part = np.arange(first, min(first + MODES_AT_ONCE, len(model.mode_case)))
        pricer = Pricer(with_modes(model, part), grid_s)
        here = pricer.price(prices).worth
        worth = here if worth is None else np.maximum(worth, here)
        bound = float(worth.sum() + (prices * pricer.capacity_s).sum())
    return bound


class Pricer:
    """Prices the schedules of one model on one time grid. ``modes`` restricts it to some modes (then no bound)."""

    def __init__(self, model: Model, grid_s: Floats) -> None:
        self.model, self.grid_s = model, grid_s
        self.length_s = np.diff(grid_s)
        self.num_cells = len(self.length_s)
        window_s = model.problem.window_s
        # Seconds that a cell of a row stands for; of a row of what is spent once only the first cell does.
        self.row_s = np.repeat(self.length_s[None, :], model.num_rows, axis=0)
        self.row_s[model.first_once :, 0] = window_s
        self.capacity_s = model.capacities[:, None] * self.row_s
        self.capacity_s[model.first_once :, 1:] = 0.0
        self.scale = self._scale()
        each = model.weight / model.own_s
        self._rate_now = (each * model.accuracy_now)[:, None] * model.option_q  # V x L
        case_v = model.case_stream
        self._rate_case = (each[case_v] * model.case_accuracy)[:, None] * model.option_q[case_v]
        self._own = model.own_windows
        # Part of each cell that lies in the stream's own window, and the cell in which that ends.
        self._counted_s = np.clip(model.own_s[:, None] - grid_s[None, :-1], 0.0, self.length_s[None, :])  # V x K
        self._last_cell = np.clip(np.searchsorted(grid_s, model.own_s, side="left") - 1, 0, self.num_cells - 1)
        first_items = np.array([one.first_item for one in model.classes], dtype=np.int64)
        memory_rows = np.array([one.memory_row for one in model.classes], dtype=np.int64)
        option_class = np.maximum(model.option_class, 0)
        self._option_item = first_items[option_class] + model.option_quanta
        self._mode_item = first_items[model.mode_class] + model.mode_quanta
        self.with_memory = bool((memory_rows >= 0).any())
        self._memory_row = memory_rows[option_class]
        self._usable_before: Bools = model.serves
        reached = model.case_accuracy[:, None] * model.option_q[case_v]
        self._usable_after: Bools = (model.option_class[case_v] >= 0) & (
            reached >= model.floor[case_v][:, None] - ACCURACY_TOLERANCE
        )
        self.swap_per_case = self.with_memory and bool((model.case_swap_bytes > 0).any())
        self._prepare_modes(memory_rows)

    def _scale(self) -> Floats:
        """What usage of a row is measured by: its capacity, or, of what is spent once, the most that could be wanted.

        Many streams want the same turn of a link at once; measured by its capacity of one, these rows would outweigh
        all others in a step.
        """
        model = self.model
        scale = model.capacities.copy()
        if model.first_once == model.num_rows:
            return scale
        most = np.zeros(model.num_streams)
        np.maximum.at(most, model.case_stream, model.case_labels)
        if most.any():
            scale[model.first_once] = max(1.0, float(most.sum()))
        taken = model.mode_turn >= 0
        users = np.bincount(model.mode_turn[taken], minlength=model.num_rows - model.first_once)
        scale[model.first_once :] = np.maximum(scale[model.first_once :], users)
        return scale

    def _prepare_modes(self, memory_rows: Ints) -> None:
        """Grid positions of the starts and ends that can be best; they do not depend on the prices."""
        model, grid_s = self.model, self.grid_s
        window_s = model.problem.window_s
        seconds = model.mode_seconds[:, None]
        pinned = model.mode_pinned[:, None] >= 0
        cells = self.num_cells
        # Family 1: the start is a grid point. Family 2: the end is, or that of the stream's own window.
        own_s = model.own_s[model.case_stream[model.mode_case]][:, None]
        end_s = grid_s[None, :-1] + seconds
        ends = np.repeat(grid_s[None, 1:], len(seconds), axis=0)
        if self._own:
            ends = np.concatenate((ends, own_s), axis=1)
            self._end_late, self._grid_late = end_s >= own_s, ends >= own_s
            self._grid_late[:, -1] = False
            self._own_cell = self._last_cell[model.case_stream[model.mode_case]]
            before_s = self.grid_s[self._own_cell]
            self._own_part = (own_s[:, 0] - before_s) / self.length_s[self._own_cell]
        self._ends = ends
        start_s = ends - seconds
        self._end_ok = (end_s <= window_s) & (~pinned | (np.arange(cells) == 0)[None, :])
        self._start_ok = (start_s >= 0.0) & ~pinned
        self._end_cell, self._end_part = self._locate(end_s)
        self._start_cell, self._start_part = self._locate(start_s)
        self._mem_row = memory_rows[model.mode_class] if len(memory_rows) else model.mode_class
        self._mode_bytes = model.case_bytes[model.mode_case]
        self._mode_stream = model.case_stream[model.mode_case]
        self._mode_labels = model.case_labels[model.mode_case]
        self._with_once = model.first_once < model.num_rows
        count = model.num_streams
        self._first_mode = np.searchsorted(self._mode_stream, np.arange(count))
        self._last_mode = np.searchsorted(self._mode_stream, np.arange(count), side="right")

    def _locate(self, time_s: Floats) -> tuple[Ints, Floats]:
        """Cell of each time and the part of the cell that lies before it."""
        time_s = np.clip(time_s, 0.0, self.grid_s[-1])
        cell = np.clip(np.searchsorted(self.grid_s, time_s, side="right") - 1, 0, self.num_cells - 1)
        return cell, (time_s - self.grid_s[cell]) / self.length_s[cell]

    # ------------------------------------------------------------ inference

    def option_prices(self, prices: Floats) -> Floats:
        """Price per second of every option in every cell; shape (V, L, K)."""
        model = self.model
        cost: Floats = (model.item_use.T @ prices)[self._option_item]
        if self.with_memory:
            held = np.where(self._memory_row >= 0, model.option_bytes, 0.0)
            cost += held[:, :, None] * prices[self._memory_row]
        return cost

    def opening_options(self, prices: Floats) -> Ints:
        """Per stream and class, the best option in the first cell, counted among the class's options; -1 = none."""
        model = self.model
        worth = self._rate_now - self.option_prices(prices)[:, :, 0]
        best = np.full((model.num_streams, len(model.classes)), -1, dtype=np.int64)
        for c in range(len(model.classes)):
            mine = model.option_class == c
            usable = np.where(mine & model.serves, worth, -np.inf)
            top = usable.argmax(axis=1)
            rank = np.cumsum(mine, axis=1) - 1
            rows = np.arange(model.num_streams)
            best[:, c] = np.where(usable[rows, top] > -np.inf, rank[rows, top], -1)
        return best

    def _swap_price(self, prices: Floats) -> Floats:
        """Price per second and byte of swap room beside every option; shape (V, L, K)."""
        return np.where((self._memory_row >= 0)[:, :, None], prices[self._memory_row], 0.0)

    def rates(self, prices: Floats) -> tuple[Floats, Floats]:
        """Worth per second of each option before (V or J x L x K) and after the swap (J x L x K)."""
        cost = self.option_prices(prices)
        before = np.where(self._usable_before[:, :, None], self._rate_now[:, :, None] - cost, NEVER)
        case_v = self.model.case_stream
        if self.swap_per_case:
            swap = self.model.case_swap_bytes[:, None, None] * self._swap_price(prices)[case_v]
            before = before[case_v] - swap
        after = np.where(self._usable_after[:, :, None], self._rate_case[:, :, None] - cost[case_v], NEVER)
        return before, after

    def idle(self, prices: Floats) -> Floats:
        """What serving costs per second when it does not count any more, after case j; shape (J, L, K)."""
        cost = self.option_prices(prices)[self.model.case_stream]
        return np.where(self._usable_after[:, :, None], -cost, NEVER)

    def swap_values(self, prices: Floats) -> tuple[Floats, Floats]:
        """Best worth of a stream's inference if case j swaps at grid point k, shape (J, K + 1), and its change over
        each cell, shape (J, K).

        In between, the best worth is convex in the swap's time, so that interpolating is never too low. In the cell
        in which the stream's own window ends the change is that of the part before the end, drawn out. A swap after
        that end is worth what no retraining is.
        """
        model = self.model
        case_v = model.case_stream
        before, after = self.rates(prices)
        rest: Floats | None = None
        if self._own:
            rest = self.idle(prices).max(axis=1) * (self.length_s - self._counted_s)[case_v]
        if self._changes:
            value, slope = self._swap_values_with_changes(before, after, rest)
        else:
            per_case = before.max(axis=1)
            then = after.max(axis=1)
            if rest is None:
                first = np.cumsum(per_case * self.length_s, axis=1)
                last = np.cumsum((then * self.length_s)[:, ::-1], axis=1)[:, ::-1]
            else:
                counted_s = self._counted_s
                first = np.cumsum(per_case * (counted_s[case_v] if self.swap_per_case else counted_s), axis=1)
                last = np.cumsum((then * counted_s[case_v] + rest)[:, ::-1], axis=1)[:, ::-1]
            value = np.zeros((len(case_v), self.num_cells + 1))
            value[:, 1:] = first if self.swap_per_case else first[case_v]
            value[:, :-1] += last
            if rest is None:
                slope = np.diff(value, axis=1)
            else:
                slope = ((per_case if self.swap_per_case else per_case[case_v]) - then) * self.length_s
        if rest is not None:
            late = self.grid_s[None, :] >= model.own_s[case_v][:, None]
            none = self._none_worth(value)[case_v]
            value = np.where(late, none[:, None], value)
            slope = np.where(late[:, :-1], 0.0, slope)
        return value, slope

    def _none_worth(self, value: Floats) -> Floats:
        """Worth of every stream without a retraining, from ``swap_values`` up to the end of its own window."""
        none = np.flatnonzero(self.model.case_gamma < 0)
        if not self._changes:
            return np.asarray(value[none, 0])
        if not self._own:
            return np.asarray(value[none].max(axis=1))
        early = self.grid_s[None, :] < self.model.own_s[:, None]
        return np.asarray(np.where(early, value[none], -np.inf).max(axis=1))

    def _swap_values_with_changes(self, before: Floats, after: Floats, rest: Floats | None) -> tuple[Floats, Floats]:
        """The same with a price per change, by dynamic programming over the cells.

        An extra option, worth nothing at no price, stands for the seconds without service; leaving it
        costs a change. This makes the result an upper bound also where changes follow one another fast.
        ``rest``: what serving costs in each cell after the own window, where changes cost nothing any more.
        """
        model = self.model
        case_v, cells = model.case_stream, self.num_cells
        change_s = model.change_s
        lost_now = self._rate_now * change_s
        lost_case = self._rate_case * change_s
        start = self._rate_now * model.start_cost_s
        blank_now = np.zeros((len(before), 1))
        if self.swap_per_case:
            lost_now, start = lost_now[case_v], start[case_v]
        counted_v = self._counted_s[case_v] if self.swap_per_case else self._counted_s
        last_v = self._last_cell[case_v] if self.swap_per_case else self._last_cell
        at_own = np.zeros(len(before))  # best state at the end of the own window
        forward = [np.concatenate((-start, blank_now), axis=1)]
        lost_before = np.concatenate((lost_now, blank_now), axis=1)
        for k in range(cells):
            gained = np.concatenate((before[:, :, k], blank_now), axis=1) * counted_v[:, k : k + 1]
            state = forward[-1]
            state = np.maximum(state, state.max(axis=1, keepdims=True) - lost_before)
            forward.append(state + gained)
            if rest is not None:
                at_own = np.where(last_v == k, forward[-1].max(axis=1), at_own)
        blank_case = np.zeros((len(case_v), 1))
        lost_after = np.concatenate((lost_case, blank_case), axis=1)
        backward = np.zeros_like(lost_after)
        value = np.empty((len(case_v), cells + 1))
        for k in range(cells, -1, -1):
            ahead = np.maximum(backward, (backward - lost_after).max(axis=1, keepdims=True))
            state = forward[k] if self.swap_per_case else forward[k][case_v]
            value[:, k] = (state + ahead).max(axis=1)
            if k:
                gained = (
                    np.concatenate((after[:, :, k - 1], blank_case), axis=1) * self._counted_s[case_v, k - 1][:, None]
                )
                backward = ahead + gained
                if rest is not None:
                    backward = backward + rest[:, k - 1 : k]
        slope = np.diff(value, axis=1)
        if rest is not None:
            rows, cell = np.arange(len(case_v)), self._last_cell[case_v]
            ending = (at_own if self.swap_per_case else at_own[case_v]) + rest.sum(axis=1)
            part = self._counted_s[case_v, cell] / self.length_s[cell]
            slope[rows, cell] = (ending - value[rows, cell]) / np.maximum(part, 1e-9)
        return value, slope

    # ------------------------------------------------------------ schedules

    def price(self, prices: Floats) -> Priced:
        """The best schedule of every stream and the bound."""
        model = self.model
        worth_none, worth, start_s, end_s = self.mode_worths(prices)
        count = model.num_streams
        best, chosen = worth_none.copy(), np.full(count, -1, dtype=np.int64)
        starts, ends = np.zeros(count), np.zeros(count)
        if len(worth):
            peak = np.full(count, -np.inf)
            has = self._first_mode < self._last_mode
            peak[has] = np.maximum.reduceat(worth, self._first_mode[has])
            hit = np.flatnonzero(worth >= peak[self._mode_stream])
            arg = np.zeros(count, dtype=np.int64)
            arg[self._mode_stream[hit[::-1]]] = hit[::-1]
            better = has & (peak > best)
            chosen[better] = arg[better]
            best[better] = peak[better]
            starts[better], ends[better] = start_s[arg[better]], end_s[arg[better]]
        bound = float(best.sum() + (prices * self.capacity_s).sum())
        return Priced(best, chosen, starts, ends, bound)

    def reduced_costs(self, prices: Floats, priced: Priced) -> Floats:
        """What every case loses, at its best start and share, against its stream's best schedule; shape (J)."""
        model = self.model
        worth_none, worth, _, _ = self.mode_worths(prices)
        best = np.full(len(model.case_stream), -np.inf)
        best[model.case_gamma < 0] = worth_none
        np.maximum.at(best, model.mode_case, worth)
        return np.asarray(priced.worth[model.case_stream] - best)

    def mode_losses(self, prices: Floats, priced: Priced) -> tuple[Floats, Floats]:
        """What "none" (V) and every mode (M) loses against its stream's best schedule, each at its best start."""
        worth_none, worth, _, _ = self.mode_worths(prices)
        streams = self._mode_stream
        return np.asarray(priced.worth - worth_none), np.asarray(priced.worth[streams] - worth)

    def mode_worths(self, prices: Floats) -> tuple[Floats, Floats, Floats, Floats]:
        """Worth of "none" per stream; worth, start and end of every mode at its best start."""
        model = self.model
        value, slope = self.swap_values(prices)
        worth_none = self._none_worth(value)
        if not len(model.mode_case):
            empty = np.zeros(0)
            return worth_none, empty, empty, empty
        item_prices = model.item_use.T @ prices
        paid = np.zeros((len(item_prices) + model.num_rows, self.num_cells + 1))
        np.cumsum(np.concatenate((item_prices, prices)) * self.length_s, axis=1, out=paid[:, 1:])
        flat_value, flat_slope = value.ravel(), slope.ravel()
        base = model.mode_case[:, None]
        at_end = base * (self.num_cells + 1) + self._end_cell
        ends = flat_value[at_end] + self._end_part * flat_slope[base * self.num_cells + self._end_cell]
        at_grid = value[model.mode_case, 1:]
        if self._own:
            none = worth_none[self._mode_stream][:, None]
            ends = np.where(self._end_late, none, ends)
            cell = self._own_cell
            at_own = value[model.mode_case, cell] + self._own_part * slope[model.mode_case, cell]
            at_grid = np.concatenate((np.where(self._grid_late[:, :-1], none, at_grid), at_own[:, None]), axis=1)
        by_start = ends - self._rent(paid, self._end_cell, self._end_part, None)
        by_start = np.where(self._end_ok, by_start, NEVER)
        by_end = at_grid - self._rent(paid, None, None, (self._start_cell, self._start_part))
        by_end = np.where(self._start_ok, by_end, NEVER)
        i, j = by_start.argmax(axis=1), by_end.argmax(axis=1)
        rows = np.arange(len(i))
        a, b = by_start[rows, i], by_end[rows, j]
        starting = a >= b
        start_s = np.where(starting, self.grid_s[i], self._ends[rows, j] - model.mode_seconds)
        worth = np.where(starting, a, b)
        if self._with_once:
            worth = worth - self._spent(prices)
        return worth_none, worth, start_s, start_s + model.mode_seconds

    def _spent(self, prices: Floats) -> Floats:
        """What every mode pays for labels and for its turn on a link; shape (M)."""
        once = prices[self.model.first_once :, 0] * self.model.problem.window_s
        turn = self.model.mode_turn
        return np.asarray(once[0] * self._mode_labels + np.where(turn >= 0, once[turn], 0.0))

    @property
    def _changes(self) -> bool:
        return self.model.problem.config_change_s > 0.0 or self.model.problem.migration_s > 0.0

    def _rent(
        self, paid: Floats, end_cell: Ints | None, end_part: Floats | None, start: tuple[Ints, Floats] | None
    ) -> Floats:
        """What a mode pays from start to end, in every candidate position; shape (M, K)."""
        model = self.model
        total = self._span(paid, self._mode_item, end_cell, end_part, start)
        if self.with_memory:
            held = np.where(self._mem_row >= 0, self._mode_bytes, 0.0)
            total += held[:, None] * self._span(
                paid, self._mem_row + model.item_use.shape[1], end_cell, end_part, start
            )
        return total

    def _span(
        self,
        paid: Floats,
        row: Ints,
        end_cell: Ints | None,
        end_part: Floats | None,
        start: tuple[Ints, Floats] | None,
    ) -> Floats:
        slope = np.diff(paid, axis=1)
        index = row[:, None]
        last = paid[row, 1:]
        if self._own and start is not None:
            own = paid[row, self._own_cell] + self._own_part * slope[row, self._own_cell]
            last = np.concatenate((last, own[:, None]), axis=1)
        if end_cell is not None and end_part is not None:
            return paid[index, end_cell] + end_part * slope[index, end_cell] - paid[row, :-1]
        assert start is not None
        cell, part = start
        return last - (paid[index, cell] + part * slope[index, cell])

    # ------------------------------------------------------------ what schedules use

    def overlap_s(self, start_s: Floats, end_s: Floats) -> Floats:
        """Seconds of each interval in each cell; shape (n, K)."""
        lo, hi = self.grid_s[None, :-1], self.grid_s[None, 1:]
        return np.asarray(np.clip(np.minimum(end_s[:, None], hi) - np.maximum(start_s[:, None], lo), 0.0, None))

    def total_usage(self, prices: Floats, priced: Priced) -> Floats:
        """Row-seconds that all priced schedules use together; shape (rows, K)."""
        return np.asarray(self.usage(prices, priced)[1].sum(axis=0))

    def usage(self, prices: Floats, priced: Priced) -> tuple[Floats, Floats]:
        """(value, row-seconds used) of the priced schedules: shapes (V) and (V, rows, K).

        Inference follows the best option of each cell at these prices; changes are not charged here.
        """
        model = self.model
        chosen_v = np.arange(model.num_streams)
        mode = priced.mode[chosen_v]
        none = np.flatnonzero(model.case_gamma < 0)
        case = np.where(mode >= 0, model.mode_case[mode] if len(model.mode_case) else 0, none[chosen_v])
        before, after = self.rates(prices)
        first = before[case if self.swap_per_case else chosen_v].argmax(axis=1)
        second = after[case].argmax(axis=1)
        swap_s = np.where(mode >= 0, priced.end_s[chosen_v], model.problem.window_s)
        before_s = self.overlap_s(np.zeros(len(chosen_v)), swap_s)
        after_s = self.length_s[None, :] - before_s
        idle = second
        if self._own:
            before_s = self.overlap_s(np.zeros(len(chosen_v)), np.minimum(swap_s, model.own_s))
            after_s = self._counted_s - before_s
            idle = self.idle(prices)[case].argmax(axis=1)
        rest_s = self.length_s[None, :] - before_s - after_s
        used = np.zeros((len(chosen_v), model.num_rows, self.num_cells))
        n, k = np.indices((len(chosen_v), self.num_cells))
        v = chosen_v[:, None]
        value = np.zeros(len(chosen_v))
        for option, seconds, rate, swap in (
            (first, before_s, self._rate_now[v, first], model.case_swap_bytes[case]),
            (second, after_s, self._rate_case[case[:, None], second], np.zeros(len(case))),
            (idle, rest_s, np.zeros(idle.shape), np.zeros(len(case))),
        )[: 3 if self._own else 2]:
            value += (rate * seconds).sum(axis=1)
            used += np.moveaxis(model.item_use[:, self._option_item[v, option]] * seconds, 0, 1)
            if self.with_memory:
                row = self._memory_row[v, option]
                held = np.where(row >= 0, model.option_bytes[v, option] + swap[:, None], 0.0)
                np.add.at(used, (n, row, k), held * seconds)
        retrains = np.flatnonzero(mode >= 0)
        if len(retrains):
            m = mode[retrains]
            chosen = chosen_v[retrains]
            seconds = self.overlap_s(priced.start_s[chosen], priced.end_s[chosen])
            used[retrains] += model.item_use[:, self._mode_item[m]].T[:, :, None] * seconds[:, None, :]
            if self.with_memory:
                row = self._mem_row[m]
                used[retrains, row] += np.where(row >= 0, self._mode_bytes[m], 0.0)[:, None] * seconds
            if self._with_once:
                used[retrains, model.first_once, 0] += self._mode_labels[m] * model.problem.window_s
                sent = np.flatnonzero(model.mode_turn[m] >= 0)
                turn = model.first_once + model.mode_turn[m[sent]]
                used[retrains[sent], turn, 0] += model.problem.window_s
        return value, used
