"""Two ways to run a site, side by side and for real: ``python benchmarks/bench_end_to_end.py examples/city.toml``.

    --variants calibrated,paper      profiling of this project against the paper's micro-profiler (the default)
    --variants timeline,milp         two policies
    --variants calibrated,profiling.when=before      an option of the site file; its value as it is, or in quotes

    --variants timeline,milp,paper   three; every other one is compared with the first

Per seed the variants run at the same time, each on cores of its own (``--run-cores``, the executor on the first of
them), so that whatever else the machine does meets all; those that differ in nothing but the policy run one after the
other from the same first models instead (``--apart``: at the same time as well). A seed changes the cameras of a
procedural site, or where a recorded one begins (``start_s``). Prints accuracy per seed, the mean difference with its
95 % interval (Student's t, over seeds), frames dropped and GPU-seconds of trials. ``--json FILE`` keeps what is done; a
second call goes on there.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

import msgspec
from rich.console import Console
from rich.table import Table
from scipy import stats

from optimizer.report import build_report, read_events
from protocol.events import WindowClosed, WorkerChanged
from protocol.schema import Record

PROFILING = ("calibrated", "paper")
_MOST_S_PER_WINDOW, _MOST_S_BEFORE = 120.0, 600.0


class Outcome(Record, frozen=True, kw_only=True):
    """One run. Accuracies are 0..1, averaged over streams and windows; ``trial_gpu_s`` per window."""

    site: str
    variant: str
    seed: int
    accuracy: float
    per_window: tuple[float, ...]
    predicted: float
    abs_error: float
    dropped: float
    retrained: int
    trial_gpu_s: float


def seeded(site: Path, seed: int, folder: Path, option: str = "") -> Path:
    """The site with other cameras (seed 0: as it is) and an ``option`` set, written to ``folder``; files are named
    absolutely."""
    text = site.read_text()

    def absolute(match: re.Match[str]) -> str:
        return f'{match[1]} = "{(site.parent / match[2]).resolve()}"'

    text = re.sub(r'\b(video|samples|path|file) = "([^"]+)"', absolute, text)
    text = re.sub(r"(?m)^seed = (\d+)", lambda m: f"seed = {int(m[1]) + 1000 * seed}", text)
    text = re.sub(r"(?m)^start_s = ([\d.]+)", lambda m: f"start_s = {float(m[1]) + 7.0 * seed}", text)
    if option:
        text = _with_option(text, option)
    written = folder / f"{site.stem}-{seed}-{option or 'plain'}.toml"
    written.write_text(text)
    return written


def _with_option(text: str, option: str) -> str:
    """TOML ``text`` with ``section.key=value`` in place of what it says there."""
    name, _, value = option.partition("=")
    section, _, key = name.rpartition(".")
    if not re.fullmatch(r"[\d.]+|true|false", value):
        value = f'"{value}"'
    lines, where, out = text.splitlines(), "", []
    for line in [*lines, "[end]"]:
        head = re.fullmatch(r"\[+([^\]]+)\]+.*", line)
        if head is not None:
            if where == section:
                out.append(f"{key} = {value}")
                section = "\0"
            where = head[1]
        if where != section or not re.match(rf"{re.escape(key)}\s*=", line):
            out.append(line)
    if section != "\0":
        out[-1:] = [f"[{section}]", f"{key} = {value}", "[end]"]
    return "\n".join(out[:-1]) + "\n"


def policy_of(variant: str) -> str:
    """The policy that a variant runs under."""
    return "timeline" if variant in PROFILING or "=" in variant else variant


def groups_of(variants: tuple[str, ...], apart: bool) -> list[tuple[str, ...]]:
    """Variants that share their first models: policies alone differ, and no policy comes twice."""
    policies = tuple(v for v in variants if policy_of(v) == v or v == "calibrated")
    names = [policy_of(v) for v in policies]
    if apart or len(set(names)) < len(names):
        return [(v,) for v in variants]
    return [g for g in [policies, *((v,) for v in variants if v not in policies)] if g]


def run(
    site: Path, variants: tuple[str, ...], seed: int, windows: int, cores: tuple[int, ...], folder: Path
) -> list[Outcome]:
    """Run the variants of a group on ``cores``. RuntimeError with what was said when it fails."""
    first = variants[0]
    out = folder / f"{site.stem}-{first}-{seed}"
    option = first if "=" in first else ""
    policies = [policy_of(variant) for variant in variants]
    profiling = ["--profiling", first] if first in PROFILING else []
    command = [sys.executable, "-m", "optimizer.cli", "experiment", str(seeded(site, seed, folder, option)), *profiling]
    command += ["--policies", ",".join(policies), "--windows", str(windows)]
    command += ["--out", str(out), "--devices", f"cpu:{cores[0]}"]
    limit_s = _MOST_S_BEFORE + len(policies) * windows * _MOST_S_PER_WINDOW
    ended = subprocess.run(
        command,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
        capture_output=True,
        text=True,
        timeout=limit_s,
        check=False,
    )
    if ended.returncode != 0:
        said = f"{ended.stdout[-2000:]}{ended.stderr[-2000:]}"
        raise RuntimeError(f"{', '.join(variants)}, seed {seed}: exit code {ended.returncode}\n{said}")
    return [
        outcome(site.stem, variant, seed, out / policy / "events.jsonl")
        for variant, policy in zip(variants, policies, strict=True)
    ]


def outcome(site: str, variant: str, seed: int, path: Path) -> Outcome:
    """What the events of a run say."""
    events = read_events(path)
    report = build_report(events)
    closed = [s for e in events if isinstance(e, WindowClosed) for s in e.streams]
    began: dict[str, WorkerChanged] = {}
    trial_gpu_s = 0.0
    for event in events:
        if isinstance(event, WorkerChanged) and event.kind == "trial":
            if event.change == "ready":
                began[event.job_id] = event
            elif event.job_id in began and event.change in ("finished", "failed", "stopped"):
                first = began.pop(event.job_id)
                trial_gpu_s += (event.time_s - first.time_s) * first.share
    frames = sum(s.num_frames for s in closed)
    per_window = tuple(
        statistics.fmean(s.realised for s in w.streams if s.realised is not None) for w in report.windows if w.streams
    )
    return Outcome(
        site=site,
        variant=variant,
        seed=seed,
        accuracy=report.mean_realised or 0.0,
        per_window=per_window,
        predicted=report.mean_predicted or 0.0,
        abs_error=report.mean_abs_error or 0.0,
        dropped=sum(s.num_dropped for s in closed) / frames if frames else 0.0,
        retrained=len(report.retrainings),
        trial_gpu_s=trial_gpu_s / max(1, len(report.windows)),
    )


def show(outcomes: list[Outcome], variants: tuple[str, ...], console: Console) -> None:
    """Accuracy per seed, and the mean paired difference of the first variant from each other one with its interval."""
    table = Table(title=f"{outcomes[0].site}: window-averaged accuracy in %")
    for name in ("seed", *variants, "windows"):
        table.add_column(name, justify="right")
    by = {(o.seed, o.variant): o for o in outcomes}
    for seed in sorted({o.seed for o in outcomes}):
        found = [by.get((seed, variant)) for variant in variants]
        cells = ["-" if o is None else f"{100 * o.accuracy:.1f}" for o in found]
        windows = (" ".join(f"{100 * a:.0f}" for a in o.per_window) for o in found if o is not None)
        table.add_row(str(seed), *cells, " | ".join(windows))
    console.print(table)
    for variant in variants:
        mine = [o for o in outcomes if o.variant == variant]
        if mine:
            console.print(
                f"{variant}: mean {100 * statistics.fmean(o.accuracy for o in mine):.2f} %, error of prediction "
                f"{100 * statistics.fmean(o.abs_error for o in mine):.1f} points, "
                f"{100 * statistics.fmean(o.dropped for o in mine):.1f} % of the frames dropped, "
                f"{statistics.fmean(o.retrained for o in mine):.1f} retrainings, "
                f"trials {statistics.fmean(o.trial_gpu_s for o in mine):.2f} GPU-s per window"
            )
    first = {o.seed: o.accuracy for o in outcomes if o.variant == variants[0]}
    for variant in variants[1:]:
        pairs = [(first[o.seed], o.accuracy) for o in outcomes if o.variant == variant and o.seed in first]
        if len(pairs) > 1:
            differences = [100 * (ours - theirs) for ours, theirs in pairs]
            n, mean = len(differences), statistics.fmean(differences)
            half = float(stats.t.ppf(0.975, n - 1)) * statistics.stdev(differences) / n**0.5
            each = ", ".join(f"{d:+.1f}" for d in differences)
            console.print(f"{variants[0]} - {variant}: {mean:+.2f} +- {half:.2f} points over {n} seeds (95 %): {each}")


def main() -> int:
    """Run what is not there yet and show everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site", type=Path)
    parser.add_argument("--variants", default="calibrated,paper")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--cores", default=",".join(str(c) for c in sorted(os.sched_getaffinity(0))))
    parser.add_argument("--run-cores", type=int, default=1, help="cores of one run (1)")
    parser.add_argument(
        "--apart", action="store_true", help="policies side by side too, each with first models of its own"
    )
    parser.add_argument("--json", type=Path, default=None, help="keep outcomes here, go on with what is missing")
    options = parser.parse_args()
    variants = tuple(options.variants.split(","))
    cores = [int(core) for core in options.cores.split(",")]
    lanes: Queue[tuple[int, ...]] = Queue()
    for start in range(0, len(cores) - options.run_cores + 1, options.run_cores):
        lanes.put(tuple(cores[start : start + options.run_cores]))
    console = Console()
    done: list[Outcome] = []
    if options.json is not None and options.json.exists():
        done = msgspec.json.decode(options.json.read_bytes(), type=list[Outcome])
    seeds = range(options.first, options.first + options.seeds)
    there = {(o.site, o.seed, o.variant) for o in done}
    groups = groups_of(variants, options.apart)
    missing = [(s, tuple(v for v in g if (options.site.stem, s, v) not in there)) for s in seeds for g in groups]
    wanted = [(seed, group) for seed, group in missing if group]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(max(1, lanes.qsize())) as pool:

        def one(seed: int, group: tuple[str, ...]) -> list[Outcome]:
            lane = lanes.get()
            try:
                return run(options.site, group, seed, options.windows, lane, Path(folder))
            finally:
                lanes.put(lane)

        for future in [pool.submit(one, seed, group) for seed, group in wanted]:
            try:
                found = future.result()
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                console.print(str(error), markup=False)
                continue
            for one_run in found:
                console.print(f"seed {one_run.seed} {one_run.variant}: {100 * one_run.accuracy:.1f} %")
            done += found
            if options.json is not None:
                options.json.write_bytes(msgspec.json.format(msgspec.json.encode(done)))
    mine = [o for o in done if o.site == options.site.stem and o.variant in variants]
    if mine:
        show(mine, variants, console)
    return 0 if len(mine) >= options.seeds * len(variants) else 1


if __name__ == "__main__":
    sys.exit(main())
