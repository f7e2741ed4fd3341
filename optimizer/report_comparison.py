"""The same streams under several policies: table, picture, files."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
from rich.table import Table

from optimizer.report_data import Comparison, PolicyRow, Report
from optimizer.report_html import comparison_page
from optimizer.report_tables import percent
from protocol.errors import InputError


def build_comparison(reports: Mapping[str, Report | Sequence[Report]]) -> Comparison:
    """Sum up an experiment: one report, or one per run, for every policy. Best realised accuracy first."""
    rows = []
    for policy, given in reports.items():
        runs = (given,) if isinstance(given, Report) else tuple(given)
        rows.append(_policy_row(policy, runs))
    site = next((r.site for given in reports.values() for r in ((given,) if isinstance(given, Report) else given)), "")
    return Comparison(
        site=site,
        policies=tuple(sorted(rows, key=lambda r: -1.0 if r.mean_realised is None else r.mean_realised))[::-1],
    )


def _policy_row(policy: str, runs: Sequence[Report]) -> PolicyRow:
    solves = [solve.seconds for run in runs for solve in run.solves if solve.phase != "profiling"]
    return PolicyRow(
        policy=policy,
        num_runs=len(runs),
        mean_realised=_mean([run.mean_realised for run in runs]),
        mean_predicted=_mean([run.mean_predicted for run in runs]),
        mean_abs_error=_mean([run.mean_abs_error for run in runs]),
        windows=tuple(w.realised for run in runs for w in run.windows if w.realised is not None),
        num_retrainings=sum(len(run.retrainings) for run in runs),
        num_promoted=sum(r.promoted for run in runs for r in run.retrainings),
        median_solve_s=statistics.median(solves) if solves else None,
    )


def write_comparison(comparison: Comparison, out_dir: Path) -> tuple[Path, Path]:
    """Write ``comparison.json`` and the self-contained ``comparison.html``. Raises InputError when it cannot."""
    json_path, html_path = out_dir / "comparison.json", out_dir / "comparison.html"
    page = comparison_page(comparison)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        json_path.write_bytes(msgspec.json.format(msgspec.json.encode(comparison), indent=1))
        html_path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{out_dir}: the table cannot be written ({error.strerror}); choose another folder") from None
    return json_path, html_path


def comparison_table(comparison: Comparison) -> Table:
    """One row per policy, best first."""
    table = Table(title="Window-averaged inference accuracy in %", title_justify="left")
    table.add_column("policy", no_wrap=True)
    for title in ("realised", "to best", "windows min–max", "predicted", "|error|", "retrained", "promoted", "solve s"):
        table.add_column(title, justify="right", no_wrap=True)
    best = next((row.mean_realised for row in comparison.policies if row.mean_realised is not None), None)
    for row in comparison.policies:
        behind = None if row.mean_realised is None or best is None else row.mean_realised - best
        table.add_row(
            row.policy,
            percent(row.mean_realised),
            "–" if behind is None else f"{100.0 * behind:+.1f}",
            f"{percent(min(row.windows))}–{percent(max(row.windows))}" if row.windows else "–",
            percent(row.mean_predicted),
            percent(row.mean_abs_error),
            str(row.num_retrainings),
            str(row.num_promoted),
            "–" if row.median_solve_s is None else f"{row.median_solve_s:.2f}",
        )
    return table


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
