"""The compiled loop of ``timeline_pool`` (numba, flat arrays). ``timeline_cache`` loads it and keeps its machine code.

Letters: v, w stream, x GPU, i retraining, k inference choice (ascending in quanta), j step of the concave envelope of
the choices, e interval between two events. Events: end of the retraining of w (w), its start (V + w), and, where there
are such, the end of its own window (2 V + w); ``times`` has the moments of all of them. The end of an own window is no
event that a step could wait for: the stream counts with the part of the interval before it. Queues from number
``num_gpus`` on are those of links to a cloud: their retrainings take no share and begin with the plan.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import numba
import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
F = TypeVar("F", bound=Callable[..., object])

NUM_BUCKETS = 512
TOLERANCE = 1e-9
NEVER = 1e18

if TYPE_CHECKING:

    def compiled(function: F) -> F:
        """``function`` as machine code, kept on disk between processes."""
        return function

    def compiled_at_once(function: F) -> F:
        """The same, compiled or loaded when this module is imported."""
        return function

else:
    options = {"cache": True, "error_model": "numpy", "nogil": True}
    compiled = numba.njit(**options)
    i1, i2, i3 = (numba.types.Array(numba.int64, n, "C") for n in (1, 2, 3))
    f1, f2, f3 = (numba.types.Array(numba.float64, n, "C") for n in (1, 2, 3))
    i, f, b = numba.int64, numba.float64, numba.boolean
    state = (i2, i1, i1, i1, i1, i1)
    streams = (i2, f2, i1, f1, f1, f1, f2, f2, i2, i2, i1, f1, f, i, f, f1, f2, i2, i2, f2, f3, i2, i3)
    limits = (f1, i2, f2, f2, f2, b, f2, f, i, i)
    course = (i, i, i, i, f, f, b, f, f)
    compiled_at_once = numba.njit(
        numba.types.Tuple((f, i))(*state, *streams, *limits, *course, *state, i2, f1), **options
    )


@compiled
def schedule(
    x: int,
    queue: Ints,
    queued: Ints,
    which: Ints,
    granted: Ints,
    caps: Ints,
    seconds: Floats,
    pinned: Ints,
    rates: Floats,
    own_s: Floats,
    link: Ints,
    up_s: Floats,
    wait_s: Floats,
    down_s: Floats,
    running: Ints,
    num_gpus: int,
    starts: Floats,
    ends: Floats,
    held: Ints,
) -> bool:
    """Times of queue ``x``: each starts when its share is free, in turn; transfers go one after the other.

    False if one ends too late, is in the wrong queue, or has to be in front and is not.
    """
    moment, share = 0.0, caps[x]
    if x >= num_gpus:
        up_end, down_end, fresh = 0.0, 0.0, False
        for y in range(queued[x]):
            w = queue[x, y]
            i = which[w]
            if link[w, i] != x or (running[w, i] > 0 and fresh):
                return False
            fresh = running[w, i] == 0
            up_end += up_s[w, i]
            down_end = max(down_end, up_end + wait_s[w, i]) + down_s[w, i]
            starts[w], ends[w], held[w] = NEVER, down_end, 0
            if down_end >= own_s[w]:
                return False
        return True
    for y in range(queued[x]):
        w = queue[x, y]
        i, quanta = which[w], min(granted[w], caps[x])
        if link[w, i] >= 0:
            return False
        while share < quanta:
            soonest = NEVER
            for z in range(y):
                end = ends[queue[x, z]]
                if moment < end < soonest:
                    soonest = end
            moment = soonest
            for z in range(y):
                if ends[queue[x, z]] == moment:
                    share += held[queue[x, z]]
        share -= quanta
        held[w] = quanta
        starts[w], ends[w] = moment, moment + seconds[w, i] / rates[quanta]
        if ends[w] >= own_s[w] or (pinned[w, i] >= 0 and (moment > 0.0 or pinned[w, i] != x)):
            return False
    return True


@compiled
def pooled(
    order: Ints,
    times: Floats,
    held: Ints,
    which: Ints,
    spare: float,
    base: float,
    base_now: Floats,
    base_after: Floats,
    step_quanta: Ints,
    gain_now: Floats,
    gain_after: Floats,
    bucket_now: Ints,
    bucket_after: Ints,
    sizes: Floats,
    gains: Floats,
    window_s: float,
    marks: Ints,
) -> float:
    """Worth with the share of all GPUs pooled; -1 where not even the smallest choices fit.

    All steps in buckets above the threshold ``mark`` are taken, those in bucket ``mark`` in part: ``used`` quanta
    earn ``earned`` in all buckets above it. An end moves the steps of its stream to higher buckets. ``sizes`` and
    ``gains`` (used up): quanta and worth per second of the steps in every bucket at first. ``marks``: the
    threshold in every interval between starts and ends of retrainings.
    """
    count, depth = len(which), step_quanta.shape[1]
    total, used, earned, moment = 0.0, 0.0, 0.0, 0.0
    mark, interval, position, since = NUM_BUCKETS - 1, 0, 0, 0
    own_windows = len(order) > 2 * count
    while moment < window_s:
        opens, upto = moment == 0.0, position
        while upto < len(order) and times[order[upto]] <= moment:
            opens = opens or order[upto] < 2 * count
            upto += 1
        # What a stream is served with is worth nothing after its own window, but holds its share until the next event.
        for x in range(position, upto if own_windows else position):
            w = order[x] - 2 * count
            if w < 0:
                continue
            i, swapped = which[w], times[w] <= moment
            base -= base_after[w, i] if swapped else base_now[w]
            for j in range(depth):
                if step_quanta[w, j] == 0:
                    break
                old = bucket_after[w, i, j] if swapped else bucket_now[w, j]
                gain = gain_after[w, i, j] if swapped else gain_now[w, j]
                gains[old] -= gain
                if old > mark:
                    earned -= gain
        if opens and own_windows:
            for x in range(since, upto):
                w = order[x] - 2 * count
                if w < 0:
                    continue
                for j in range(depth):
                    quanta = step_quanta[w, j]
                    if quanta == 0:
                        break
                    old = bucket_after[w, which[w], j] if times[w] <= moment else bucket_now[w, j]
                    sizes[old] -= quanta
                    if old > mark:
                        used -= quanta
            since = upto
        while position < upto:
            event = order[position]
            position += 1
            if event >= 2 * count:
                continue
            w = event if event < count else event - count
            if event >= count:
                spare -= held[w]
                continue
            spare += held[w]
            i = which[w]
            base += base_after[w, i] - base_now[w]
            for j in range(depth):
                quanta = step_quanta[w, j]
                if quanta == 0:
                    break
                old, new = bucket_now[w, j], bucket_after[w, i, j]
                sizes[old] -= quanta
                gains[old] -= gain_now[w, j]
                sizes[new] += quanta
                gains[new] += gain_after[w, i, j]
                if old > mark:
                    used -= quanta
                    earned -= gain_now[w, j]
                if new > mark:
                    used += quanta
                    earned += gain_after[w, i, j]
        if spare < 0.0:
            return -1.0
        while used > spare:
            mark += 1
            used -= sizes[mark]
            earned -= gains[mark]
        while mark >= 0 and used + sizes[mark] <= spare:
            used += sizes[mark]
            earned += gains[mark]
            mark -= 1
        until = window_s
        if position < len(order):
            until = min(window_s, times[order[position]])
        rate = base + earned
        if mark >= 0 and sizes[mark] > 0.0:
            rate += (spare - used) * gains[mark] / sizes[mark]
        total += rate * (until - moment)
        if opens:
            marks[interval] = mark
            interval += 1
        moment = until
    return total


@compiled
def packs(number: Ints, free: Ints, left: Ints) -> bool:
    """Whether ``number[size]`` jobs of every size fit on GPUs with ``free`` quanta: first fit, largest first."""
    left[:] = free
    for back in range(1, len(number)):
        size = len(number) - back
        many = number[size]
        for x in range(len(left)):
            if many == 0:
                break
            taken = min(many, left[x] // size)
            many -= taken
            left[x] -= taken * size
        if many > 0:
            return False
    return True


@compiled
def upgrade(sizes: Ints, q: Floats, num_choices: Ints, v: int, level: int, limit: int) -> tuple[float, int]:
    """(gain per quantum, choice) of the best larger choice of ``v`` that takes fewer than ``limit`` quanta."""
    best, choice = 0.0, -1
    for k in range(level + 1, num_choices[v]):
        if sizes[v, k] >= limit:
            break
        ratio = (q[v, k] - q[v, level]) / max(1, sizes[v, k] - sizes[v, level])
        if ratio > best:
            best, choice = ratio, k
    return best, choice


@compiled
def deal(
    mark: int,
    swapped: Ints,
    which: Ints,
    rate: Floats,
    pay: Floats,
    weight: Floats,
    floor: Floats,
    sizes: Ints,
    q: Floats,
    num_choices: Ints,
    step_choice: Ints,
    bucket_now: Ints,
    bucket_after: Ints,
    free: Ints,
    left: Ints,
    number: Ints,
    level: Ints,
    limits: Ints,
    ladder: Floats,
    ladder_k: Ints,
) -> float:
    """A choice for every stream such that first fit packs all of them on what is ``free``; worth per second, or -1.

    Begins with the steps that the pooled threshold ``mark`` takes (fewer where they do not pack), then upgrades, most
    accuracy per quantum first. ``pay``: weight times the part of the interval that counts.
    """
    count, depth = len(level), step_choice.shape[1]
    spare = 0
    fits = False
    for attempt in range(5):
        above = mark + (0, 4, 16, 64, NUM_BUCKETS)[attempt]
        spare = 0
        for x in range(len(free)):
            spare += free[x]
        number[:] = 0
        for w in range(count):
            k = 0
            while k < num_choices[w] and rate[w] * q[w, k] < floor[w] - TOLERANCE:
                k += 1
            if k == num_choices[w]:
                return -1.0
            for j in range(depth):
                bucket = bucket_after[w, which[w], j] if swapped[w] else bucket_now[w, j]
                if step_choice[w, j] < 0 or bucket <= above or pay[w] < 0.5 * weight[w]:
                    break
                k = max(k, step_choice[w, j])
            level[w] = k
            number[sizes[w, k]] += 1
            spare -= sizes[w, k]
        fits = spare >= 0 and packs(number, free, left)
        if fits:
            break
    if not fits:
        return -1.0
    for w in range(count):
        if spare == 0:
            break
        limits[w] = spare + sizes[w, level[w]] + 1
        ratio, ladder_k[w] = upgrade(sizes, q, num_choices, w, level[w], limits[w])
        ladder[w] = ratio * pay[w] * rate[w]
    while spare > 0:
        best, w = 0.0, -1
        for v in range(count):
            if ladder[v] > best:
                best, w = ladder[v], v
        if w < 0:
            break
        k, old = ladder_k[w], level[w]
        more = sizes[w, k] - sizes[w, old]
        fits = more <= spare
        if fits:
            number[sizes[w, old]] -= 1
            number[sizes[w, k]] += 1
            fits = packs(number, free, left)
            if not fits:
                number[sizes[w, old]] += 1
                number[sizes[w, k]] -= 1
        if fits:
            spare -= more
            level[w] = k
        else:
            limits[w] = sizes[w, k]  # from now on only smaller ones
        ratio, ladder_k[w] = upgrade(sizes, q, num_choices, w, level[w], limits[w])
        ladder[w] = ratio * pay[w] * rate[w]
    earned = 0.0
    for w in range(count):
        earned += pay[w] * rate[w] * q[w, level[w]]
    return earned


@compiled
def replace(
    v: int,
    u: int,
    g: int,
    queue: Ints,
    queued: Ints,
    which: Ints,
    granted: Ints,
    where: Ints,
    caps: Ints,
    wanted: Ints,
    num_wanted: Ints,
    link: Ints,
    num_gpus: int,
    undo: Ints,
) -> bool:
    """Put a retraining of ``u``, which has none, where that of ``v`` is in queue ``g``; ``v`` has none then."""
    i = wanted[u, int(num_wanted[u] * np.random.random() ** 2)]
    if g >= num_gpus:
        for k in range(num_wanted[u]):
            if link[u, wanted[u, k]] == g:
                i = wanted[u, k]
                break
    if link[u, i] != (g if g >= num_gpus else -1):
        return False
    undo[0], undo[1], undo[2], undo[3], undo[4], undo[5] = v, u, g, -1, which[v], granted[v]
    undo[6], undo[7], undo[8], undo[9] = queued[g], 0, caps[g], 0
    undo[10], undo[11] = which[u], granted[u]
    place = 0
    while queue[g, place] != v:
        place += 1
    queue[g, place] = u
    where[u], which[u], granted[u] = g, i, granted[v]
    where[v], which[v] = -1, -1
    return True


@compiled
def change(
    queue: Ints,
    queued: Ints,
    which: Ints,
    granted: Ints,
    where: Ints,
    caps: Ints,
    wanted: Ints,
    num_wanted: Ints,
    pinned: Ints,
    link: Ints,
    capacity: int,
    num_gpus: int,
    splitting: float,
    scarce: bool,
    undo: Ints,
) -> bool:
    """One random change of the queues, in place. ``undo``: v, u, queues g and h, then what v, g, h and u had.

    ``scarce``: labels or turns of links are, so that one retraining often has to make room for another one.
    """
    count = len(which)
    v = int(np.random.random() * count)
    draw = np.random.random()
    g = where[v]
    if draw < 0.3 and g >= 0:  # exchange with another one
        u = int(np.random.random() * count)
        h = where[u]
        if h < 0 and scarce and u != v and num_wanted[u] > 0:
            return replace(
                v, u, g, queue, queued, which, granted, where, caps, wanted, num_wanted, link, num_gpus, undo
            )
        if u == v or h < 0 or (g != h and max(g, h) >= num_gpus):
            return False
        undo[0], undo[1], undo[2], undo[3], undo[4], undo[5] = v, u, g, h, which[v], granted[v]
        undo[6], undo[7], undo[8], undo[9] = queued[g], queued[h], caps[g], caps[h]
        x, y = 0, 0
        while queue[g, x] != v:
            x += 1
        while queue[h, y] != u:
            y += 1
        queue[g, x], queue[h, y] = u, v
        where[v], where[u] = h, g
        return True
    if num_wanted[v] == 0:
        return False
    dropped = g >= 0 and draw < 0.33
    i = which[v]
    if not dropped and (g < 0 or np.random.random() < 0.4):
        i = wanted[v, int(num_wanted[v] * np.random.random() ** 2)]
    h = g
    if not dropped and (g < 0 or draw < 0.85):
        h = int(np.random.random() * num_gpus)
    if pinned[v, i] >= 0 and not dropped:
        h = pinned[v, i]
    if not dropped:
        if link[v, i] >= 0:
            h = link[v, i]
        elif h >= num_gpus:
            h = int(np.random.random() * num_gpus)
    undo[0], undo[1], undo[2], undo[3], undo[4], undo[5] = v, -1, g, h, which[v], granted[v]
    undo[6], undo[7], undo[8], undo[9] = queued[max(0, g)], queued[h], caps[max(0, g)], caps[h]
    place = 0
    if g >= 0:
        while queue[g, place] != v:
            place += 1
        for x in range(place, queued[g] - 1):
            queue[g, x] = queue[g, x + 1]
        queued[g] -= 1
    if dropped:
        which[v], where[v] = -1, -1
        return True
    which[v] = i
    if g < 0:
        granted[v] = capacity
    if np.random.random() < splitting:
        granted[v] = capacity if np.random.random() < 0.5 else 1 + int(np.random.random() * capacity)
    at = min(place, queued[h])
    if g < 0 or draw < 0.85 or g != h:
        at = int(np.random.random() * (queued[h] + 1))
    if pinned[v, i] >= 0:
        at = 0
    for back in range(queued[h] - at):
        x = queued[h] - back
        queue[h, x] = queue[h, x - 1]
    queue[h, at] = v
    queued[h] += 1
    where[v] = h
    if np.random.random() < 0.05:
        caps[h] = capacity if np.random.random() < 0.4 else 1 + int(np.random.random() * capacity)
    return True


@compiled_at_once
def anneal(
    queue: Ints,  # G x V: streams in their turn
    queued: Ints,  # G
    which: Ints,  # V: retraining, -1 = none
    granted: Ints,  # V: quanta of it
    where: Ints,  # V: GPU, -1 = none
    caps: Ints,  # G: quanta that all retrainings there have together
    sizes: Ints,  # V x K
    q: Floats,  # V x K
    num_choices: Ints,  # V
    weight: Floats,  # V
    now: Floats,  # V
    floor: Floats,  # V
    after: Floats,  # V x I
    seconds: Floats,  # V x I, on a whole GPU of speed 1
    pinned: Ints,  # V x I
    wanted: Ints,  # V x I: retrainings worth trying
    num_wanted: Ints,  # V
    rates: Floats,  # quanta + 1
    window_s: float,
    least: int,  # quanta of the smallest choices together
    splitting: float,
    base_now: Floats,  # V: worth per second of the smallest choice
    base_after: Floats,  # V x I
    step_quanta: Ints,  # V x J, 0 = no such step
    step_choice: Ints,  # V x J: choice that the step leads to, -1 = none
    gain_now: Floats,  # V x J: worth per second
    gain_after: Floats,  # V x I x J
    bucket_now: Ints,  # V x J
    bucket_after: Ints,  # V x I x J
    own_s: Floats,  # V: end of the own window
    link: Ints,  # V x I: queue of the link, -1 = on a GPU
    up_s: Floats,  # V x I
    wait_s: Floats,  # V x I
    down_s: Floats,  # V x I
    own_windows: bool,  # whether some own window ends before the plan's
    labels_s: Floats,  # V x I
    label_budget_s: float,
    num_gpus: int,
    num_running: int,  # unused retrainings in the cloud that run already are marked in ``pinned`` as -2
    seed: int,
    first: int,
    last: int,
    steps: int,
    hot: float,
    goal: float,
    packing: bool,
    margin: float,
    best: float,
    best_queue: Ints,
    best_queued: Ints,
    best_which: Ints,
    best_granted: Ints,
    best_where: Ints,
    best_caps: Ints,
    levels: Ints,  # 2 V + 2 x V: choice in every interval, written when steps = 0
    moments: Floats,  # 2 V + 3: the same
) -> tuple[float, int]:
    """Steps ``first`` to ``last`` of ``steps`` of annealing, in place; (best worth, steps made).

    ``packing``: the worth is that of packed plans, and a change is packed only if its pooled worth is no more than
    ``margin`` too low; otherwise the pooled worth is all that counts. 0 steps: (worth, intervals), with ``levels``.
    """
    count = len(which)
    capacity = len(rates) - 1
    kinds = 3 if own_windows else 2
    times = np.full(kinds * count, NEVER)
    ends, starts = times[:count], times[count : 2 * count]
    if own_windows:
        times[2 * count :] = own_s
    running = np.zeros(pinned.shape, dtype=np.int64)
    for w in range(count):
        for j in range(pinned.shape[1]):
            running[w, j] = 1 if num_running > 0 and pinned[w, j] == -2 else 0
    labels_used = 0.0
    for w in range(count):
        if which[w] >= 0:
            labels_used += labels_s[w, which[w]]
    labels_known = labels_used
    pay = weight.copy()
    held, order = granted.copy(), np.arange(kinds * count)
    undo = np.full(12, -1)
    scarce = len(queued) > num_gpus or label_budget_s < NEVER
    open_sizes, open_gains = np.zeros(NUM_BUCKETS), np.zeros(NUM_BUCKETS)
    open_base = 0.0
    for w in range(count):
        open_base += base_now[w]
        for j in range(step_quanta.shape[1]):
            if step_quanta[w, j] > 0:
                open_sizes[bucket_now[w, j]] += step_quanta[w, j]
                open_gains[bucket_now[w, j]] += gain_now[w, j]
    sizes_left, gains_left = open_sizes.copy(), open_gains.copy()
    marks = np.zeros(kinds * count + 2, dtype=np.int64)
    free, left = np.zeros(num_gpus, dtype=np.int64), np.zeros(num_gpus, dtype=np.int64)
    level, swapped, rate = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64), np.zeros(count)
    number = np.zeros(capacity + 1, dtype=np.int64)
    ladder, ladder_k = np.zeros(count), np.zeros(count, dtype=np.int64)
    limits = np.zeros(count, dtype=np.int64)
    earned_before, reached = np.zeros(kinds * count + 3), np.zeros(kinds * count + 3)  # of the queues as accepted
    fresh_before, fresh_reached = np.zeros(kinds * count + 3), np.zeros(kinds * count + 3)
    known = 0
    feasible = labels_used <= label_budget_s
    for x in range(len(queued)):
        feasible = feasible and schedule(
            x, queue, queued, which, granted, caps, seconds, pinned, rates, own_s, link, up_s, wait_s, down_s, running,
            num_gpus, starts, ends, held,
        )  # fmt: skip
    kept_starts, kept_ends, kept_held, kept_order = starts.copy(), ends.copy(), held.copy(), order.copy()
    kept_queue, kept_which, kept_where = queue.copy(), which.copy(), where.copy()
    worth_now, loss_now = -1.0, 0.0
    np.random.seed(seed + first)
    step = first - 1  # the first turn evaluates the queues as they are
    while step < last:
        opening = step < first
        step += 1
        changed_s = 0.0  # before this moment nothing is different from the accepted queues
        v, u, g, h = -1, -1, -1, -1
        if not opening:
            if not change(
                queue, queued, which, granted, where, caps, wanted, num_wanted, pinned, link, capacity, num_gpus,
                splitting, scarce, undo,
            ):  # fmt: skip
                continue
            v, u, g, h = undo[0], undo[1], undo[2], undo[3]
            labels_used = labels_known
            if u < 0:
                if g >= 0:
                    labels_used -= labels_s[v, undo[4]]
                if where[v] >= 0:
                    labels_used += labels_s[v, which[v]]
            elif h < 0:
                labels_used += labels_s[u, which[u]] - labels_s[v, undo[4]]
            feasible = labels_used <= label_budget_s
            if h >= 0:
                feasible = feasible and schedule(
                    h, queue, queued, which, granted, caps, seconds, pinned, rates, own_s, link, up_s, wait_s, down_s,
                    running, num_gpus, starts, ends, held,
                )  # fmt: skip
            if g >= 0 and g != h:
                feasible = feasible and schedule(
                    g, queue, queued, which, granted, caps, seconds, pinned, rates, own_s, link, up_s, wait_s, down_s,
                    running, num_gpus, starts, ends, held,
                )  # fmt: skip
            if where[v] < 0:
                starts[v], ends[v] = NEVER, NEVER
        threshold = -1.0
        if not opening:
            cooling = 1.0 - (step - 1) / steps
            temperature = hot * cooling * cooling
            threshold = worth_now
            if temperature > 0.0:
                threshold += temperature * np.log(np.random.random() + 1e-300)
        total, loss = -1.0, 0.0
        if feasible:
            for x in range(1, len(order)):
                event = order[x]
                moment = times[event]
                y = x - 1
                while y >= 0:
                    other = order[y]
                    if times[other] <= moment:
                        break
                    order[y + 1] = other
                    y -= 1
                order[y + 1] = event
            sizes_left[:] = open_sizes
            gains_left[:] = open_gains
            total = pooled(
                order, times, held, which, float(num_gpus * capacity - least), open_base, base_now, base_after,
                step_quanta, gain_now, gain_after, bucket_now, bucket_after, sizes_left, gains_left, window_s, marks,
            )  # fmt: skip
            feasible = total >= 0.0
        intervals = 0
        if feasible and packing and (opening or total - loss_now >= threshold - margin):
            loss = total
            if not opening:
                changed_s = window_s
                for turn in range(2):
                    x = g if turn == 0 else h
                    if x < 0:
                        continue
                    for y in range(queued[x]):
                        w = queue[x, y]
                        if (
                            starts[w] != kept_starts[w]
                            or ends[w] != kept_ends[w]
                            or kept_where[w] != x
                            or held[w] != kept_held[w]
                        ):
                            changed_s = min(changed_s, starts[w], kept_starts[w], ends[w], kept_ends[w])
                        elif kept_which[w] != which[w]:
                            changed_s = min(changed_s, ends[w])
                if where[v] < 0:
                    changed_s = min(changed_s, kept_starts[v], kept_ends[v])
            free[:] = capacity
            rate[:] = now
            swapped[:] = 0
            total, moment, position = 0.0, 0.0, 0
            while moment < window_s:
                while position < len(order):
                    event = order[position]
                    if times[event] > moment:
                        break
                    position += 1
                    if event >= 2 * count:
                        continue
                    w = event if event < count else event - count
                    if event >= count:
                        free[where[w]] -= held[w]
                    else:
                        if where[w] < num_gpus:
                            free[where[w]] += held[w]
                        rate[w] = after[w, which[w]]
                        swapped[w] = 1
                until, ahead = window_s, position
                while ahead < len(order) and order[ahead] >= 2 * count:
                    ahead += 1
                if ahead < len(order):
                    until = min(window_s, times[order[ahead]])
                if intervals + 1 < known and reached[intervals + 1] <= changed_s and reached[intervals + 1] == until:
                    total = earned_before[intervals + 1]
                else:
                    if own_windows:
                        for w in range(count):
                            part = (own_s[w] - moment) / (until - moment)
                            pay[w] = weight[w] * min(1.0, max(0.0, part))
                    earned = deal(
                        marks[intervals], swapped, which, rate, pay, weight, floor, sizes, q, num_choices, step_choice,
                        bucket_now, bucket_after, free, left, number, level, limits, ladder, ladder_k,
                    )  # fmt: skip
                    if earned < 0.0:
                        feasible = False
                        break
                    total += earned * (until - moment)
                    if steps == 0:
                        levels[intervals] = level
                        moments[intervals], moments[intervals + 1] = moment, until
                intervals += 1
                fresh_before[intervals], fresh_reached[intervals] = total, until
                moment = until
            loss -= total
        elif packing:
            feasible = False
        # ---------------------------------------------------------------- accept or take back
        if steps == 0:
            return (total if feasible else -1.0), intervals
        if opening or (feasible and total >= threshold):
            worth_now, loss_now = (total if feasible else -1.0), loss
            known = intervals + 1
            labels_known = labels_used
            earned_before, fresh_before = fresh_before, earned_before
            reached, fresh_reached = fresh_reached, reached
            kept_order[:] = order
            for turn in range(2):
                x = g if turn == 0 else h
                if x < 0:
                    continue
                for y in range(queued[x]):
                    w = queue[x, y]
                    kept_queue[x, y] = w
                    kept_starts[w], kept_ends[w], kept_held[w] = starts[w], ends[w], held[w]
                    kept_which[w], kept_where[w] = which[w], where[w]
            if v >= 0 and where[v] < 0:
                kept_starts[v], kept_ends[v], kept_which[v], kept_where[v] = NEVER, NEVER, -1, -1
            if feasible and worth_now > best + 1e-10:
                best = worth_now
                best_queue[:] = queue
                best_queued[:] = queued
                best_which[:] = which
                best_granted[:] = granted
                best_where[:] = where
                best_caps[:] = caps
                if best >= goal:
                    return best, step
        else:
            which[v], granted[v], where[v] = undo[4], undo[5], g
            if g >= 0:
                queued[g], caps[g] = undo[6], undo[8]
            if h >= 0 and h != g:
                queued[h], caps[h] = undo[7], undo[9]
            if u >= 0:
                where[u] = h
                if h < 0:
                    which[u], granted[u], starts[u], ends[u] = undo[10], undo[11], NEVER, NEVER
            for turn in range(2):
                x = g if turn == 0 else h
                if x >= 0:
                    for y in range(queued[x]):
                        w = kept_queue[x, y]
                        queue[x, y] = w
                        starts[w], ends[w], held[w] = kept_starts[w], kept_ends[w], kept_held[w]
            if g < 0:
                starts[v], ends[v] = NEVER, NEVER
            order[:] = kept_order
    return best, step
