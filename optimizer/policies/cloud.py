"""Retraining in the cloud for static plans: earliest arrivals, the order on a link, and a greedy choice.

A stream that is retrained in the cloud keeps its inference configuration: it holds no share that could
be used otherwise afterwards. On a link l with transfers in a fixed order, rule 8 of ``protocol.plan``:

    U_k = U_(k-1) + up_k          D_k = max(D_(k-1), U_k + cloud_k) + down_k

*Earliest arrival.* Whoever the k streams in front of o are, they take at least the k smallest up-link and
down-link times of the other streams, so that

    L(o, k) = max(sum of the k smallest up + up_o + cloud_o + down_o,
                  min over the others of (up + cloud) + sum of the k smallest down + down_o     for k >= 1)

is never after the real arrival of o in turn k. With equal transfers it is the real arrival.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from optimizer.execution import own_window_s, retrain_seconds, share_of, transfer_times
from optimizer.policies.choices import Turn
from optimizer.policies.packing import Placed
from protocol.plan import CloudProfile, Problem
from protocol.schema import LinkSpec

MOST_TURNS = 12  # told apart by the exact policy; further ones count as the last of these
PERMUTED = 6  # so many transfers are put into the best of all orders


def turns(problem: Problem) -> dict[tuple[int, int], list[Turn]]:
    """Per (stream, its cloud choice) the turns in which the model could be there before its window ends."""
    found: dict[tuple[int, int], list[Turn]] = {}
    for link in problem.links:
        users = [(v, c, p) for v, s in enumerate(problem.streams) for c, p in enumerate(s.cloud) if _on(p, link)]
        ups, downs, firsts = (_least(users, cost, link) for cost in (_up_s, _down_s, _first_s))
        for v, c, profile in users:
            end_s = own_window_s(problem.streams[v], problem.window_s)
            ups_before, downs_before = _sums(ups, v), _sums(downs, v)
            first_s = min((s for u, s in firsts.items() if u != v), default=0.0)
            rest_s = profile.cloud_seconds + _down_s(profile, link)
            choices: list[Turn] = []
            for k in range(len(ups_before)):
                earliest_s = ups_before[k] + _up_s(profile, link) + rest_s
                if k:
                    earliest_s = max(earliest_s, first_s + downs_before[k] + _down_s(profile, link))
                if earliest_s >= end_s:
                    break
                last = k == MOST_TURNS - 1
                choices.append(Turn(link.link_id, k, earliest_s, len(ups_before) - k if last else 1))
                if last:
                    break
            found[v, c] = choices
    return found


def _on(profile: CloudProfile, link: LinkSpec) -> bool:
    return profile.link_id == link.link_id


def _up_s(profile: CloudProfile, link: LinkSpec) -> float:
    return profile.up_bytes / link.up_bytes_per_s


def _down_s(profile: CloudProfile, link: LinkSpec) -> float:
    return profile.down_bytes / link.down_bytes_per_s


def _first_s(profile: CloudProfile, link: LinkSpec) -> float:
    return _up_s(profile, link) + profile.cloud_seconds


def _least(
    users: Sequence[tuple[int, int, CloudProfile]], cost: Callable[[CloudProfile, LinkSpec], float], link: LinkSpec
) -> dict[int, float]:
    """The least of a cost over each stream's choices."""
    least: dict[int, float] = {}
    for v, _, profile in users:
        least[v] = min(least.get(v, math.inf), cost(profile, link))
    return least


def _sums(costs: dict[int, float], without: int) -> list[float]:
    """Sums of the 0, 1, 2, ... smallest costs of the other streams."""
    others = sorted(cost for v, cost in costs.items() if v != without)
    return [0.0, *itertools.accumulate(others)]


# ---------------------------------------------------------------- from choices to an order


def arrivals(problem: Problem, placed: Sequence[Placed]) -> dict[int, float]:
    """When the models of the streams that are retrained in the cloud are there."""
    times: dict[int, float] = {}
    for link in problem.links:
        queue = _queue(problem, placed, link)
        profiles = [problem.streams[v].cloud[placed[v].cloud] for v in queue]
        times.update({v: time[1] for v, time in zip(queue, transfer_times(link, profiles), strict=True)})
    return times


def _queue(problem: Problem, placed: Sequence[Placed], link: LinkSpec) -> list[int]:
    """The streams whose retrainings use ``link``, in their order, those that run already in front."""
    users = [v for v, p in enumerate(placed) if p.cloud >= 0 and _on(problem.streams[v].cloud[p.cloud], link)]
    running = {v: problem.streams[v].cloud[placed[v].cloud].running for v in users}
    return sorted(users, key=lambda v: (not running[v], placed[v].turn, v))


def in_order(problem: Problem, placed: Sequence[Placed]) -> list[Placed]:
    """The same choices in a better order on every link; models that come too late are not fetched at all."""
    result = list(placed)
    for link in problem.links:
        while queue := _queue(problem, result, link):
            queue = _best_order(problem, result, link, queue)
            for turn, v in enumerate(queue):
                result[v] = replace(result[v], turn=turn)
            times = arrivals(problem, result)
            late = [v for v in queue if times[v] >= own_window_s(problem.streams[v], problem.window_s)]
            if not late:
                break
            result[late[-1]] = without_cloud(result[late[-1]])
    return result


def without_cloud(choice: Placed) -> Placed:
    """The stream is only served."""
    return Placed(choice.lam, choice.gpu)


def _best_order(problem: Problem, placed: Sequence[Placed], link: LinkSpec, queue: list[int]) -> list[int]:
    rates: dict[int, float] = {}
    profiles: dict[int, CloudProfile] = {}
    for v in queue:
        stream = problem.streams[v]
        profile = profiles[v] = stream.cloud[placed[v].cloud]
        q = stream.inference[placed[v].lam].relative_accuracy
        rates[v] = stream.weight * q * (profile.accuracy_after - stream.accuracy_now)

    def lost(order: Sequence[int]) -> float:
        """Accuracy-seconds, by weight and own window, that are lost to waiting."""
        total = 0.0
        for v, (_, end_s) in zip(order, transfer_times(link, [profiles[v] for v in order]), strict=True):
            own_s = own_window_s(problem.streams[v], problem.window_s)
            total += rates[v] / own_s * min(end_s, own_s)
        return total

    running = [v for v in queue if profiles[v].running]
    free = [v for v in queue if not profiles[v].running]
    if len(running) <= PERMUTED and len(free) <= PERMUTED and len(running) * len(free) <= PERMUTED:
        pairs = itertools.product(itertools.permutations(running), itertools.permutations(free))
        return min(([*a, *b] for a, b in pairs), key=lost)
    best, least = list(queue), lost(queue)
    for _ in range(len(queue)):
        before = least
        for i in range(len(queue) - 1):
            if profiles[best[i]].running != profiles[best[i + 1]].running:
                continue
            other = [*best[:i], best[i + 1], best[i], *best[i + 2 :]]
            if lost(other) < least:
                best, least = other, lost(other)
        if least == before:
            break
    return best


# ---------------------------------------------------------------- greedy


def with_cloud(
    problem: Problem, placed: Sequence[Placed], wanted: Collection[tuple[int, int]] | None = None
) -> list[Placed]:
    """Send one retraining after the other to the cloud, each time the one that gains most per second of its link.

    A stream that is retrained on a GPU is sent only if that is better for it; its share is left unused then.
    ``wanted``: only these choices (stream, index in its ``cloud``) are considered; None = all.
    """
    result = list(placed)
    if not any(stream.cloud for stream in problem.streams):
        return result
    links = {link.link_id: link for link in problem.links}
    left_s = math.inf if problem.label_budget_s is None else problem.label_budget_s - _labels(problem, result)
    values = {v: _value(problem, v, choice) for v, choice in enumerate(result)}
    queues: dict[str, list[CloudProfile]] = defaultdict(list)
    waiting = [(v, c) for v, s in enumerate(problem.streams) for c in range(len(s.cloud)) if result[v].cloud < 0]
    if wanted is not None:
        waiting = [entry for entry in waiting if entry in wanted]
    room = _free_bytes(problem, result)
    waiting.sort(key=lambda entry: not problem.streams[entry[0]].cloud[entry[1]].running)
    while waiting:
        best: tuple[bool, float, int, int, float] | None = None
        for v, c in waiting:
            profile = problem.streams[v].cloud[c]
            link = links[profile.link_id]
            if profile.label_seconds > left_s + _labels_of(problem, v, result[v]) + 1e-9:
                continue
            if profile.swap_bytes > room[result[v].gpu]:
                continue
            end_s = transfer_times(link, [*queues[profile.link_id], profile])[-1][1]
            choice = Placed(result[v].lam, result[v].gpu, cloud=c, lam_after=result[v].lam, gpu_after=result[v].gpu)
            gain = problem.streams[v].weight * (_value(problem, v, choice, end_s) - values[v])
            if gain <= 1e-12:
                continue
            per_second = gain / max(_up_s(profile, link), _down_s(profile, link), 1e-9)
            if best is None or (profile.running, per_second) > best[:2]:
                best = (profile.running, per_second, v, c, end_s)
        if best is None:
            break
        _, _, v, c, end_s = best
        profile = problem.streams[v].cloud[c]
        left_s += _labels_of(problem, v, result[v]) - profile.label_seconds
        lam, gpu = result[v].lam, result[v].gpu
        room[gpu] -= profile.swap_bytes
        turn = len(queues[profile.link_id])
        result[v] = Placed(lam, gpu, cloud=c, turn=turn, lam_after=lam, gpu_after=gpu)
        queues[profile.link_id].append(profile)
        waiting = [entry for entry in waiting if entry[0] != v]
    return in_order(problem, result)


def _value(problem: Problem, v: int, choice: Placed, end_s: float = math.inf) -> float:
    """A stream's window average without what changes cost; ``end_s``: when a model from the cloud is there."""
    stream = problem.streams[v]
    own_s = own_window_s(stream, problem.window_s)
    q = q_after = stream.inference[choice.lam].relative_accuracy
    after = stream.accuracy_now
    if choice.cloud >= 0:
        after = stream.cloud[choice.cloud].accuracy_after
    elif choice.gamma >= 0:
        profile, gpu = stream.retrain[choice.gamma], problem.gpus[choice.retrain_gpu]
        end_s = retrain_seconds(profile, gpu, share_of(choice.r, problem.share_quantum))
        after, q_after = profile.accuracy_after, stream.inference[choice.lam_after].relative_accuracy
    before_s = min(end_s, own_s)
    return (stream.accuracy_now * q * before_s + after * q_after * (own_s - before_s)) / own_s


def _free_bytes(problem: Problem, placed: Sequence[Placed]) -> list[float]:
    """Memory of every GPU that is free all window long, inf where it is unlimited."""
    room = [float(gpu.memory_bytes) if gpu.memory_bytes else math.inf for gpu in problem.gpus]
    for stream, choice in zip(problem.streams, placed, strict=True):
        served = stream.inference[choice.lam].memory_bytes
        if choice.gamma >= 0:
            profile = stream.retrain[choice.gamma]
            room[choice.retrain_gpu] -= profile.memory_bytes
            served += profile.swap_bytes
            if choice.gpu_after != choice.gpu:
                room[choice.gpu_after] -= stream.inference[choice.lam_after].memory_bytes
            else:
                served = max(served, stream.inference[choice.lam_after].memory_bytes)
        room[choice.gpu] -= served
    return room


def _labels_of(problem: Problem, v: int, choice: Placed) -> float:
    stream = problem.streams[v]
    if choice.cloud >= 0:
        return stream.cloud[choice.cloud].label_seconds
    return stream.retrain[choice.gamma].label_seconds if choice.gamma >= 0 else 0.0


def _labels(problem: Problem, placed: Sequence[Placed]) -> float:
    return math.fsum(_labels_of(problem, v, choice) for v, choice in enumerate(placed))
