"""`ekya-optimizer explain`: why a plan does what it does, one stream or all of them, in words and in one plot."""

from __future__ import annotations

from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from optimizer.execution import gpu_classes
from optimizer.explain_figure import draw_plan
from optimizer.explain_words import Explained, explain_stream
from optimizer.problems import PROBLEM_ENDING, load_problem
from protocol.codec import load_json
from protocol.errors import InputError
from protocol.plan import Plan, Problem

MANY_CHOICES = 60  # with more streams the overview leaves their choices out


def explain(
    plan_path: Path,
    *,
    problem_path: Path | None = None,
    stream_id: str | None = None,
    out: Path | None = None,
    console: Console | None = None,
) -> Explained:
    """`ekya-optimizer explain`: print why, and draw the plan with its prices into ``out``.

    Args:
        problem_path: the problem that the plan answers; where None, the file of the same name in the folder
            ``problems`` beside the plan's folder, as runs keep them, or ``NAME.problem.json`` beside the plan
            ``NAME-POLICY.json``, as comparisons do.
        stream_id: explain this stream; where None, give an overview of all.

    Raises:
        InputError: a file is unusable, plan and problem do not belong together, or there is no such stream.
    """
    plan = _load_plan(plan_path)
    where = problem_path or _problem_of(plan_path)
    problem = load_problem(where)
    explained = Explained(problem, plan)
    strange = [v for v in explained.verdict.violations if v.kind not in ("floor", "capacity", "memory")]
    if strange:
        raise InputError(f"{plan_path}: does not answer {where}: {strange[0].text}")
    if stream_id is not None and stream_id not in explained.profiles:
        raise InputError(f"--stream {stream_id}: the plan has no such stream; there are {', '.join(_few(explained))}")
    console = console or Console()
    report = plan.report
    bound = _proven(plan)
    console.print(
        f"Plan by {report.policy} ({report.status}) for {len(problem.streams)} streams on {len(problem.gpus)} GPUs, "
        f"{problem.window_s:g} s: accuracy {explained.verdict.value:.4f}{bound}.",
        highlight=False,
    )
    if report.detail:
        console.print(f"The planner says: {report.detail}", highlight=False, markup=False)
    if stream_id is not None:
        for text in explain_stream(explained, stream_id):
            console.print(text, highlight=False, markup=False)
    else:
        console.print(_overview(explained))
    console.print(_price_table(explained))
    if out is not None:
        draw_plan(explained, stream_id, out)
        console.print(f"written: {out}", highlight=False)
    return explained


def _load_plan(path: Path) -> Plan:
    try:
        return load_json(path, Plan)
    except InputError:
        if not _is_problem(path):
            raise
    raise InputError(
        f"{path}: is a problem, not a plan; `ekya-optimizer compare {path} --plan-out DIR` makes plans of it"
    )


def _is_problem(path: Path) -> bool:
    try:
        load_json(path, Problem)
    except InputError:
        return False
    return True


def _problem_of(plan_path: Path) -> Path:
    """Where the problem of a plan lies. Raises InputError when it is nowhere."""
    folder = plan_path.resolve().parent
    of_run = folder.parent / "problems" / plan_path.name
    if of_run.is_file():
        return of_run
    beside = [
        path
        for path in folder.glob(f"*{PROBLEM_ENDING}")
        if plan_path.stem.startswith(path.name.removesuffix(PROBLEM_ENDING) + "-")
    ]
    if not beside:
        raise InputError(
            f"{plan_path}: its problem is neither at {of_run} nor beside it (*{PROBLEM_ENDING}); "
            "name it with --problem PROBLEM.json"
        )
    return max(beside, key=lambda path: len(path.name))


def _proven(plan: Plan) -> str:
    """What its bound says; the bound of ``milp`` is for plans of fixed shares only."""
    report = plan.report
    if report.bound is None:
        return ""
    best = "the best plan of fixed shares" if report.policy == "milp" else "the best of all plans"
    gap = report.gap or 0.0
    return f", proven to be {best}" if gap < 5e-5 else f", proven to be within {gap:.2%} of {best}"


def _few(explained: Explained) -> list[str]:
    names = list(explained.profiles)
    return names if len(names) <= 12 else [*names[:12], f"{len(names) - 12} more"]


def _overview(explained: Explained) -> Table:
    few = len(explained.profiles) <= MANY_CHOICES
    caption = (
        "next best: with another retraining configuration, everything else as planned; change of the site's accuracy "
        "in points"
    )
    table = Table(box=SIMPLE_HEAD, caption=caption if few else None, padding=(0, 1, 0, 0))
    for heading in ("stream", "accuracy", "retraining", "served with", *(("next best",) if few else ())):
        table.add_column(heading, overflow="fold", justify="right" if heading == "accuracy" else "left")
    for stream_id, assignment in explained.assignments.items():
        verdict, step = explained.verdicts[stream_id], assignment.retrain
        retraining = "none"
        if step is not None and verdict.retrain_start_s is not None and verdict.retrain_end_s is not None:
            retraining = (
                f"{step.retrain_id} on {step.gpu_id} at {step.share:g}, "
                f"{verdict.retrain_start_s:.0f} to {verdict.retrain_end_s:.0f} s"
            )
        elif assignment.cloud is not None and verdict.retrain_end_s is not None:
            retraining = f"{assignment.cloud.retrain_id} in the cloud, there at {verdict.retrain_end_s:.0f} s"
        cells = [
            stream_id,
            f"{verdict.value:.4f}",
            retraining,
            " then ".join(dict.fromkeys(serving.inference_id for serving in assignment.inference)),
        ]
        if few:
            other = next(iter(explained.others(stream_id)), None)
            change = 0.0 if other is None else 100.0 * (other.site_value - explained.verdict.value)
            cells.append("" if other is None else f"{other.retrain_id or 'no retraining'}: {change:+.3f}")
        table.add_row(*cells)
    return table


def _price_table(explained: Explained) -> Table:
    prices = explained.prices
    elsewhere = " without the cloud" if any(stream.cloud for stream in explained.problem.streams) else ""
    table = Table(
        box=SIMPLE_HEAD,
        title="What a GPU is worth, slot by slot",
        caption="points of mean accuracy for a whole GPU during one of the window's "
        f"{explained.problem.num_slots} slots; prices of the best plan{elsewhere}, which "
        f"reaches at most {prices.bound:.4f}",
        padding=(0, 1, 0, 0),
    )
    kinds = [tuple(explained.problem.gpus[g].gpu_id for g in members) for _, members in gpu_classes(explained.problem)]
    table.add_column("slot", justify="right", no_wrap=True)
    for names in kinds:
        table.add_column(names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} alike", justify="right")
    rows: dict[tuple[float, float], list[str]] = {}
    for slot in prices.slots:
        rows.setdefault((slot.start_s, slot.end_s), []).append(f"{slot.points:.4f}")
    merged: list[tuple[float, float, list[str]]] = []
    for (start_s, end_s), cells in rows.items():
        if merged and merged[-1][2] == cells:  # slots of equal prices are one line
            merged[-1] = (merged[-1][0], end_s, cells)
        else:
            merged.append((start_s, end_s, cells))
    for start_s, end_s, cells in merged:
        table.add_row(f"{start_s:g} to {end_s:g} s", *cells)
    return table
