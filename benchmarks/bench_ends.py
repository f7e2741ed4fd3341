"""When retrainings end, against when they were expected to, with real executors on a busy machine.

    python benchmarks/bench_ends.py [--windows N] [--busy K] [--json FILE]

Four cameras of the procedural city are served by two executors of one core each. In every window each of them is
retrained with one configuration of a few that take from 1 to 15 GPU-seconds, at whatever share the plan gives, beside
serving, labels, trials and canaries. ``--busy`` processes (default 1) that do nothing but use a core run beside it all.
The whole system runs as in production; what is printed comes from its telemetry: the time from the optimizer's command
to the report of a retraining that was trained whole, and what was expected of it

* at its start: the profiler's cost and the plan's share,
* half way: corrected by its epochs,

each taken at the shares that the retraining turned out to have, since plans change while it runs. The first window's
retrainings are expected from trials alone; later ones from what retrainings before them took.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from optimizer.commands import make_profiler
from optimizer.config import CorrectionConfig, GateConfig, SiteConfig, parse_site
from optimizer.local import local_devices, run_site
from optimizer.report import build_report, read_events
from optimizer.report_data import RetrainRow
from optimizer.report_trials import end_errors
from protocol.schema import RetrainConfig

ROOT = Path(__file__).parents[1]
# Heads are small and quick, whole networks dear: (trained fraction, epochs, data fraction).
CONFIGS = ((0.0, 20, 1.0), (0.0, 60, 1.0), (0.5, 4, 1.0), (1.0, 3, 0.5), (1.0, 4, 1.0))
BURN = "x = 0\nwhile True:\n    x += 1\n"


def site() -> SiteConfig:
    """The streams of examples/city.toml with retrainings that are worth timing, each of them run to its end."""
    raw = tomllib.loads((ROOT / "examples" / "city.toml").read_text())
    plain = parse_site(raw, "examples/city.toml", ROOT / "examples")
    retrain = tuple(
        RetrainConfig(
            config_id=f"t{round(100 * trained)}-e{epochs}-d{round(100 * data)}",
            epochs=epochs,
            data_fraction=data,
            trained_fraction=trained,
            learning_rate=0.002,
        )
        for trained, epochs, data in CONFIGS
    )
    # No gate, so that a configuration is never ruled out; no stop, so that each is trained whole.
    return msgspec.structs.replace(
        plain,
        control="tcp://127.0.0.1:*",
        retrain=retrain,
        gate=GateConfig(always_promote=True, canary_s=10.0),
        correction=CorrectionConfig(stop=False),
        streams=tuple(msgspec.structs.replace(stream, fps=12.0) for stream in plain.streams),
    )


def quantiles(errors: tuple[float, ...]) -> str:
    """Median and 90th percentile in per cent."""
    if not errors:
        return "–"
    return f"{100 * statistics.median(errors):.1f} % / {100 * float(np.quantile(errors, 0.9)):.1f} %"


def show(console: Console, rows: list[RetrainRow], busy: int) -> None:
    table = Table(
        title=f"Ends of retrainings, {busy} busy process(es) beside: relative error, median / 90th percentile"
    )
    for head in ("", "retrainings", "at the start", "half way"):
        table.add_column(head, justify="left" if not head else "right")
    kinds = [("all", rows)]
    kinds += [(name, [r for r in rows if r.retrain_id == name]) for name in sorted({r.retrain_id for r in rows})]
    kinds.append(("from the second window on", [r for r in rows if r.window > 0]))
    kinds.append(("longer than 3 s", [r for r in rows if (r.elapsed_s or 0.0) > 3.0]))
    for name, some in kinds:
        start, half = end_errors(some)
        table.add_row(name, str(len(start)), quantiles(start), quantiles(half))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=6, help="retraining windows of 40 s")
    parser.add_argument("--busy", type=int, default=1, help="processes that keep the machine busy")
    parser.add_argument("--out", type=Path, help="keep the run here")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    asked = parser.parse_args()
    console = Console()
    burners = [subprocess.Popen([sys.executable, "-c", BURN]) for _ in range(asked.busy)]
    try:
        with tempfile.TemporaryDirectory() as folder:
            out = asked.out or Path(folder)
            knobs = site()
            devices = local_devices(2)
            run_site(
                knobs,
                out,
                make_profiler(knobs),
                num_windows=asked.windows,
                devices=devices,
                console=console,
                live=False,
            )
            report = build_report(read_events(out / "events.jsonl"))
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()
    rows = [row for row in report.retrainings if row.elapsed_s]
    for row in rows:
        console.print(
            f"{row.window} {row.stream_id:8s} {row.retrain_id:14s} took {row.elapsed_s or 0.0:6.2f} s, expected "
            f"{row.elapsed_predicted_s or 0.0:6.2f} s at the start, {row.elapsed_half_s or 0.0:6.2f} s half way"
            f"{'' if row.whole else ', cut short'}",
            highlight=False,
        )
    show(console, rows, asked.busy)
    console.print(f"load {os.getloadavg()[0]:.1f}", highlight=False)
    if asked.json:
        asked.json.write_text(json.dumps([msgspec.to_builtins(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
