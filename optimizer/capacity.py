"""How many streams a policy supports, and how many GPUs it needs: searches over trace-driven simulations.

Both searches halve an interval and so take for granted that accuracy falls with the streams and rises
with the GPUs. On a trace it does so only on the whole: streams differ, and a further stream may be an
easy one. Every answer was simulated itself, and so was its neighbour that no longer suffices.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from optimizer.simulate import check_policies, counts, make_folder, remarks, write_json
from optimizer.trace_figures import line, outside_legend, write_figure
from optimizer.trace_study import Study
from optimizer.traces import parse_list
from protocol.errors import InputError
from protocol.schema import Record

# Accuracies that differ by less are the same: far below what any study resolves.
SAME = 1e-9


class CapacityRow(Record, frozen=True, kw_only=True):
    """The most streams that a policy keeps at the target on a number of GPUs.

    ``accuracy``: at that many streams, None where not even one stream reaches the target. ``at_limit``: the
    search ended at ``--max-streams`` or at one quantum per stream, more was not tried.
    """

    policy: str
    gpus: int
    target: float
    streams: int
    accuracy: float | None
    at_limit: bool
    seeds: tuple[int, ...]
    simulated: bool = True


class NeedRow(Record, frozen=True, kw_only=True):
    """The fewest GPUs on which ``policy`` is as accurate as ``reference`` is on ``reference_gpus``.

    ``gpus`` and ``factor`` (gpus / reference_gpus) are None where ``searched_to`` GPUs do not suffice.
    """

    reference: str
    reference_gpus: int
    reference_accuracy: float
    policy: str
    streams: int
    gpus: int | None
    accuracy: float
    factor: float | None
    searched_to: int
    seeds: tuple[int, ...]
    simulated: bool = True


class CapacityResult(Record, frozen=True, kw_only=True):
    """Both tables of `ekya-optimizer capacity`."""

    capacity: tuple[CapacityRow, ...]
    needs: tuple[NeedRow, ...]


def accuracy(study: Study, policy: str, num_streams: int, num_gpus: int, seeds: Sequence[int]) -> float:
    """Mean simulated accuracy over the seeds."""
    return sum(study.row(policy, num_streams, num_gpus, seed).accuracy for seed in seeds) / len(seeds)


def most_streams(
    study: Study, policy: str, num_gpus: int, target: float, seeds: Sequence[int], limit: int
) -> CapacityRow:
    """The most streams, at most ``limit``, whose mean accuracy is at least ``target``."""
    # Every stream takes a quantum at least: with more than these nothing can be planned.
    most = min(limit, num_gpus * math.floor(1.0 / study.knobs.share_quantum + 1e-9))

    def enough(count: int) -> bool:
        return accuracy(study, policy, count, num_gpus, seeds) >= target - SAME

    good, bad, step = 0, most + 1, 1
    while good < most:  # double until it no longer suffices: large sites are the slow ones
        count = min(most, good + step)
        if not enough(count):
            bad = count
            break
        good, step = count, 2 * step
    while bad - good > 1:
        middle = (good + bad) // 2
        if enough(middle):
            good = middle
        else:
            bad = middle
    return CapacityRow(
        policy=policy,
        gpus=num_gpus,
        target=target,
        streams=good,
        accuracy=accuracy(study, policy, good, num_gpus, seeds) if good else None,
        at_limit=good == most,
        seeds=tuple(seeds),
    )


def fewest_gpus(
    study: Study, policy: str, num_streams: int, wanted: float, seeds: Sequence[int], first: int, limit: int
) -> int | None:
    """The fewest GPUs, at most ``limit``, with a mean accuracy of at least ``wanted``; ``first`` is a guess."""

    def enough(count: int) -> bool:
        return accuracy(study, policy, num_streams, count, seeds) >= wanted - SAME

    bad, good = 0, min(first, limit)
    while not enough(good):
        if good == limit:
            return None
        bad, good = good, min(limit, 2 * good)
    while good - bad > 1:
        middle = (good + bad) // 2
        if enough(middle):
            good = middle
        else:
            bad = middle
    return good


def measure_capacity(
    study: Study,
    policies: Sequence[str],
    gpus: Sequence[int],
    target: float,
    seeds: Sequence[int],
    *,
    max_streams: int,
    num_streams: int | None,
    max_gpus: int,
    progress: Callable[[str], None] = lambda _: None,
) -> CapacityResult:
    """Both searches; GPUs are compared with those of the first policy, at ``num_streams`` (None: not at all).

    ``progress`` is told what is searched for.
    """
    capacity: list[CapacityRow] = []
    searches = len(gpus) * (len(policies) + (len(policies) - 1 if num_streams is not None else 0))
    numbers = itertools.count(1)
    for g in gpus:
        for name in policies:
            progress(f"search {next(numbers)} of {searches}: streams that {name} keeps at {target:g} on {g} GPUs")
            capacity.append(most_streams(study, name, g, target, seeds, max_streams))
    needs: list[NeedRow] = []
    for g in gpus if num_streams is not None else ():
        assert num_streams is not None
        reference = policies[0]
        wanted = accuracy(study, reference, num_streams, g, seeds)
        for name in policies[1:]:
            progress(f"search {next(numbers)} of {searches}: GPUs on which {name} is as good as {reference} on {g}")
            needed = fewest_gpus(study, name, num_streams, wanted, seeds, g, max(g, max_gpus))
            at = max(g, max_gpus) if needed is None else needed
            needs.append(
                NeedRow(
                    reference=reference,
                    reference_gpus=g,
                    reference_accuracy=wanted,
                    policy=name,
                    streams=num_streams,
                    gpus=needed,
                    accuracy=accuracy(study, name, num_streams, at, seeds),
                    factor=None if needed is None else needed / g,
                    searched_to=max(g, max_gpus),
                    seeds=tuple(seeds),
                )
            )
    return CapacityResult(capacity=tuple(capacity), needs=tuple(needs))


def capacity(
    study: Study,
    *,
    policies: Sequence[str],
    gpus: str,
    target: float,
    seeds: str,
    max_streams: int = 64,
    num_streams: int | None = None,
    max_gpus: int = 32,
    as_json: bool = False,
    out: Path | None = None,
    console: Console | None = None,
) -> CapacityResult:
    """`ekya-optimizer capacity`: prints tables or JSON, returns what was found.

    Raises:
        InputError: a number, a list, a policy or the folder is unusable; nothing has been simulated then.
    """
    names = check_policies(policies, study.reuse)
    sizes = counts(gpus, "--gpus")
    drawn = parse_list(seeds, "--seed", int)
    if not 0.0 < target <= 1.0:
        raise InputError(f"--target {target:g}: an accuracy is above 0 and at most 1")
    for name, value in (("--max-streams", max_streams), ("--max-gpus", max_gpus), ("--streams", num_streams)):
        if value is not None and value < 1:
            raise InputError(f"{name} {value}: at least 1 is needed")
    if drawn[0] < 0:
        raise InputError(f"--seed {seeds}: a seed is 0 or more")
    folder = make_folder(out)
    console = console or Console()
    began = time.monotonic()
    with console.status("") as status:  # on a terminal only
        result = measure_capacity(
            study,
            names,
            sizes,
            target,
            drawn,
            max_streams=max_streams,
            num_streams=num_streams,
            max_gpus=max_gpus,
            progress=lambda text: status.update(f"{text} ({study.num_simulated} simulations)"),
        )
    if as_json:
        console.file.write(msgspec.json.format(msgspec.json.encode(result), indent=2).decode() + "\n")
    else:
        for text in remarks(study):
            console.print(text, highlight=False)
        source = f"seed {drawn[0]}" if len(drawn) == 1 else f"mean of {len(drawn)} seeds"
        console.print(f"\nStreams at an accuracy of at least {target:g} ({source}):", highlight=False)
        console.print(_capacity_table(result.capacity, names, sizes))
        if result.needs:
            console.print(f"GPUs needed for the accuracy of {names[0]}, {num_streams} streams:", highlight=False)
            console.print(_needs_table(result.needs, names, sizes))
        console.print(f"{study.num_simulated} simulations in {time.monotonic() - began:.1f} s", highlight=False)
    if folder is not None:
        write_json(result, folder / "capacity.json")
        paths = _figure(result.capacity, names, target, folder)
        if not as_json:
            console.print("written: " + ", ".join(str(path) for path in [folder / "capacity.json", *paths]))
    return result


def _capacity_table(rows: Sequence[CapacityRow], names: Sequence[str], sizes: Sequence[int]) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("policy", no_wrap=True)
    for g in sizes:
        table.add_column(f"{g} GPU" + ("s" if g > 1 else ""), justify="right", no_wrap=True)
    for name in names:
        own = {row.gpus: row for row in rows if row.policy == name}
        table.add_row(name, *(f"{own[g].streams}{' or more' if own[g].at_limit else ''}" for g in sizes))
    return table


def _needs_table(rows: Sequence[NeedRow], names: Sequence[str], sizes: Sequence[int]) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("policy", no_wrap=True)
    for g in sizes:
        wanted = next(row.reference_accuracy for row in rows if row.reference_gpus == g)
        table.add_column(f"{wanted:.4f} on {g}", justify="right", no_wrap=True)
    table.add_row(rows[0].reference, *(str(g) for g in sizes))
    for name in names[1:]:
        own = {row.reference_gpus: row for row in rows if row.policy == name}
        cells = []
        for g in sizes:
            row = own[g]
            cells.append(f"more than {row.searched_to}" if row.gpus is None else f"{row.gpus} ({row.factor:.1f}x)")
        table.add_row(name, *cells)
    return table


def _figure(rows: Sequence[CapacityRow], names: Sequence[str], target: float, folder: Path) -> list[Path]:
    def draw(figure: Figure) -> None:
        panel = figure.subplots()
        for index, name in enumerate(names):
            own = sorted((row for row in rows if row.policy == name), key=lambda row: row.gpus)
            line(panel, [row.gpus for row in own], [row.streams for row in own], index, name)
        panel.set_xlabel("GPUs")
        panel.set_ylabel(f"streams at accuracy >= {target:g} (simulated)")
        panel.set_ylim(bottom=0)
        outside_legend(figure, panel)

    return write_figure(draw, (5.6, 3.4), folder / "capacity")
