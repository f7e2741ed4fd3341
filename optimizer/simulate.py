"""`ekya-optimizer simulate`: trace-driven studies of several policies and sizes, as tables, JSON and plots."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from optimizer.policies.registry import policy_entry
from optimizer.trace_cloud import LINKS
from optimizer.trace_figures import write_simulate_figures
from optimizer.trace_reuse import ReuseTable, is_reuse
from optimizer.trace_study import Study, StudyRow
from optimizer.traces import parse_list
from protocol.errors import InputError


def check_policies(names: Sequence[str], reuse: ReuseTable | None = None) -> list[str]:
    """The distinct names; InputError when one is unknown or there is none."""
    if not names:
        raise InputError("--policies: name at least one policy, like timeline,milp,thief,none")
    for name in names:
        if name.startswith("cloud:"):
            if name not in LINKS:
                raise InputError(f"unknown policy {name!r}; the links are {', '.join(LINKS)}")
        elif is_reuse(name):
            if reuse is None:
                raise InputError(f"policy {name} needs the accuracy of old models: give --reuse TABLE.csv")
            if name not in reuse.policies:
                raise InputError(f"unknown policy {name!r}; {reuse.source} makes possible {', '.join(reuse.policies)}")
        else:
            policy_entry(name)
    return list(dict.fromkeys(names))


def counts(text: str, option: str, most: int = 10_000) -> tuple[int, ...]:
    """Positive whole numbers of an option, ascending."""
    values = parse_list(text, option, int)
    if values[0] < 1 or values[-1] > most:
        raise InputError(f"{option} {text}: numbers are 1 to {most}")
    return values


def simulate(
    study: Study,
    *,
    policies: Sequence[str],
    streams: str,
    gpus: str,
    seeds: str,
    as_json: bool = False,
    out: Path | None = None,
    console: Console | None = None,
) -> list[StudyRow]:
    """`ekya-optimizer simulate`: every policy on every size and seed; prints a table or JSON, returns the rows.

    Raises:
        InputError: a list, a policy or the folder is unusable; nothing has been simulated then.
    """
    names = check_policies(policies, study.reuse)
    sizes = [(s, g) for g in counts(gpus, "--gpus") for s in counts(streams, "--streams")]
    drawn = parse_list(seeds, "--seed", int)
    if drawn[0] < 0:
        raise InputError(f"--seed {seeds}: a seed is 0 or more")
    folder = make_folder(out)
    console = console or Console()
    began = time.monotonic()
    rows: list[StudyRow] = []
    with console.status("") as status:  # on a terminal only
        for done, ((s, g), name) in enumerate(itertools.product(sizes, names)):
            passed_s = time.monotonic() - began
            status.update(
                f"{done} of {len(sizes) * len(names)} done in {passed_s:.0f} s; {name}: {s} streams on {g} GPUs"
            )
            rows += [study.row(name, s, g, seed) for seed in drawn]
    if as_json:
        console.file.write(msgspec.json.format(msgspec.json.encode(rows), indent=2).decode() + "\n")
    else:
        for line in remarks(study):
            console.print(line, highlight=False)
        for s, g in sizes:
            shown = [row for row in rows if (row.streams, row.gpus) == (s, g)]
            console.print(_table(shown, names))
            if any(row.unplanned for row in shown):
                console.print(
                    f"{s} streams do not fit on {g} GPUs at a share quantum of {study.knobs.share_quantum:g}: some are "
                    "not served and count as 0. A smaller --share-quantum may serve all.",
                    highlight=False,
                )
        console.print(f"{len(rows)} simulations in {time.monotonic() - began:.1f} s", highlight=False)
    if folder is not None:
        write_json(rows, folder / "simulate.json")
        paths = write_simulate_figures(rows, names, folder)
        if not as_json:
            console.print("written: " + ", ".join(str(path) for path in [folder / "simulate.json", *paths]))
    return rows


def make_folder(out: Path | None) -> Path | None:
    """Make the folder of ``--out``. InputError when that is impossible."""
    if out is None:
        return None
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be made: {error.strerror}") from None
    return out


def write_json(value: object, path: Path) -> None:
    """Write indented JSON. InputError when the file cannot be written."""
    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None


def remarks(study: Study) -> list[str]:
    """What somebody who reads the numbers has to know."""
    knobs = study.knobs
    cost = "takes its measured GPU-seconds in every window" if knobs.profiling else "and labelling cost nothing"
    gate = "refuses models that are no better" if knobs.gate else "is off: every model goes live"
    return [
        "Every accuracy below is simulated: executors follow the execution model exactly. Decision times are real.",
        f"Trace {study.trace.source}: {len(study.trace.cities)} cities. Inference: {study.table.source}; "
        f"full rate at {knobs.full_share:g} GPU.",
        f"The planner is told {'predicted' if knobs.predicted else 'true'} profiles. Micro-profiling {cost}. "
        f"The gate {gate}.",
        "A stream's accuracy before retraining is the mean of the values that the trace has for its window.",
    ]


def _table(rows: Sequence[StudyRow], names: Sequence[str]) -> Table:
    first = rows[0]
    seeds = sorted({row.seed for row in rows})
    drawn = f"seed {seeds[0]}" if len(seeds) == 1 else f"mean of {len(seeds)} seeds"
    title = f"{first.streams} streams, {first.gpus} GPUs, {first.windows} windows of {first.window_s:g} s, {drawn}"
    caption = (
        "decision: median and longest wall time in seconds; GPU use: inference + retraining, of all GPUs' time; "
        "floors: stream-windows below the floor; retrainings: gone live, refused, cut off before they ended"
    )
    table = Table(box=SIMPLE_HEAD, title=title, caption=caption, padding=(0, 1, 0, 0))
    table.add_column("policy", no_wrap=True)
    for heading in ("accuracy", "decision", "GPU use", "floors", "retrainings"):
        table.add_column(heading, justify="right", no_wrap=True)
    best = max(mean(rows, name, "accuracy") for name in names)
    for name in names:
        accuracy = mean(rows, name, "accuracy")
        text = f"{accuracy:.4f}"
        own = [row for row in rows if row.policy == name]
        median = statistics.median(row.decision_seconds_median for row in own)
        use = [mean(rows, name, f"gpu_use_{kind}") for kind in ("inference", "retraining")]
        table.add_row(
            name,
            f"[bold green]{text}[/]" if accuracy >= best - 1e-9 else text,
            f"{median:.3f}, {max(row.decision_seconds_max for row in own):.2f}",
            f"{use[0]:.0%} + {use[1]:.0%}",
            f"{mean(rows, name, 'floors_broken'):g}",
            ", ".join(f"{round(mean(rows, name, key), 1):g}" for key in ("promoted", "refused", "unfinished")),
        )
    return table


def mean(rows: Sequence[StudyRow], policy: str, field: str) -> float:
    """Mean of a field over the rows of one policy."""
    values = [float(getattr(row, field)) for row in rows if row.policy == policy]
    return sum(values) / len(values)
