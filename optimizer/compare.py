"""Several policies on the same problems: a table for people, or a JSON list for programs.

Every policy is asked through a warm ``Planner``, as a site would ask it, and judged by the judge.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from optimizer.objective import Verdict, judge, upper_bound_trivial
from optimizer.planner import Planner
from optimizer.policies import timeline_cache
from optimizer.policies.registry import policy_entry
from optimizer.problems import (
    PROBLEM_ENDING,
    load_problem,
    parse_size,
    random_problem,
    save_problem,
    servable,
    with_limits,
)
from protocol.codec import save_json
from protocol.errors import InputError, PlanError
from protocol.plan import Plan, Problem
from protocol.schema import Record

WARM_UP_S = 60.0


class Row(Record, frozen=True, kw_only=True):
    """One policy on one problem. ``seconds``: wall time from asking a warm planner to holding the plan.

    ``gap`` = (bound - value) / bound, None where the policy proves no bound. ``status``: as in
    ``SolveReport``, or "failed" when there is no plan at all (value 0 then).
    """

    problem: str
    policy: str
    feasible: bool
    value: float
    bound: float | None
    gap: float | None
    seconds: float
    status: str


class Outcome(Record, frozen=True, kw_only=True):
    """A row and what it was made from."""

    row: Row
    plan: Plan | None
    remark: str


def compare(
    problem_paths: Sequence[str | Path],
    *,
    random: str | None = None,
    seed: int = 0,
    save: str | Path | None = None,
    limits: bool = False,
    planning_quantile: float | None = None,
    policies: Sequence[str] = ("timeline", "milp", "thief", "uniform", "none"),
    as_json: bool = False,
    budget_s: float = 10.0,
    plan_out: str | Path | None = None,
    console: Console | None = None,
) -> list[Row]:
    """Solve each problem with each policy and print what came out; returns the printed rows.

    Args:
        problem_paths: saved problems.
        random: STREAMSxGPUSxCONFIGURATIONS of a problem to make besides, from ``seed``; ``save`` keeps it.
        limits: give the random problem latency limits, own windows, a label budget, unsure gains and a link.
        planning_quantile: plan on this quantile of uncertain gains; None = as the problem says.
        policies: names as in ``policies.registry``.
        as_json: print a JSON list of rows instead of tables.
        budget_s: seconds that a policy may take for a problem.
        plan_out: folder to write the plans into, and the problems that they answer.
        console: where to print; standard output where None.

    Raises:
        InputError: a problem, size, policy or folder is not usable; nothing has been solved then.
    """
    if save is not None and random is None:
        raise InputError("--save keeps a random problem: give --random STREAMSxGPUSxCONFIGURATIONS as well")
    if limits and random is None:
        raise InputError("--limits changes a random problem: give --random STREAMSxGPUSxCONFIGURATIONS as well")
    if planning_quantile is not None and not 0.0 < planning_quantile <= 0.5:
        raise InputError(f"--planning-quantile {planning_quantile:g}: above 0 and at most 0.5 (what is expected)")
    if not policies:
        raise InputError("--policies: name at least one policy")
    for name in policies:
        policy_entry(name)
    problems: dict[str, Problem] = {str(path): load_problem(path) for path in problem_paths}
    if random is not None:
        drawn = random_problem(*parse_size(random), seed)
        made = servable(drawn)
        if made is not drawn and not as_json:
            text = f"share quantum {made.share_quantum:g}: at {drawn.share_quantum:g} {len(drawn.gpus)} GPUs"
            (console or Console()).print(f"{text} have too few quanta for {len(drawn.streams)} streams")
        if limits:
            made = with_limits(made, seed)
        problems[f"{random.strip()}-seed{seed}{'-limits' if limits else ''}"] = made
        if save is not None:
            save_problem(made, save)
    if not problems:
        raise InputError("nothing to compare: name problem files, or make a problem with --random 10x8x18")
    if planning_quantile is not None:
        problems = {
            name: msgspec.structs.replace(problem, planning_quantile=planning_quantile)
            for name, problem in problems.items()
        }
    folder = _folder(plan_out)
    outcomes = solve_all(problems, list(dict.fromkeys(policies)), budget_s)
    if folder is not None:
        for name, problem in problems.items():
            save_problem(problem, folder / (_stem(name) + PROBLEM_ENDING))
        for outcome in outcomes:
            if outcome.plan is not None:
                save_json(outcome.plan, folder / _file_name(outcome.row))
    rows = [outcome.row for outcome in outcomes]
    console = console or Console()
    if as_json:
        # Not through rich: its line wrapping would break long names.
        console.file.write(msgspec.json.format(msgspec.json.encode(rows), indent=2).decode() + "\n")
    else:
        for name, problem in problems.items():
            shown = [outcome for outcome in outcomes if outcome.row.problem == name]
            size = f"{len(problem.streams)} streams, {len(problem.gpus)} GPUs, {problem.window_s:g} s"
            console.print(f"{name}: {size}", soft_wrap=True, highlight=False, markup=False)
            console.print(_table(problem, shown))
            for outcome in shown:
                if outcome.remark:
                    console.print(f"  {outcome.row.policy}: {outcome.remark}", markup=False, highlight=False)
    return rows


def solve_all(problems: dict[str, Problem], policies: Sequence[str], budget_s: float) -> list[Outcome]:
    """Outcomes by problem, then by policy, in the order given."""
    found: dict[tuple[str, str], Outcome] = {}
    if "timeline" in policies:
        timeline_cache.wait_compiled(WARM_UP_S)  # once per installation; a site would have it long since
    for policy in policies:
        with Planner(policy, budget_s) as planner:
            planner.wait_until_warm(WARM_UP_S)
            planner.solve(random_problem(2, 1, 3, seed=0))
            for name, problem in problems.items():
                found[name, policy] = _solve(planner, name, problem)
    return [found[name, policy] for name in problems for policy in policies]


def _solve(planner: Planner, name: str, problem: Problem) -> Outcome:
    started_s = time.perf_counter()
    try:
        plan = planner.solve(problem)
    except PlanError as error:
        seconds = time.perf_counter() - started_s
        row = Row(
            problem=name,
            policy=planner.policy_name,
            feasible=False,
            value=0.0,
            bound=None,
            gap=None,
            seconds=seconds,
            status="failed",
        )
        return Outcome(row=row, plan=None, remark=str(error))
    seconds = time.perf_counter() - started_s
    verdict = judge(problem, plan)
    row = Row(
        problem=name,
        policy=planner.policy_name,
        feasible=verdict.feasible,
        value=verdict.value,
        bound=plan.report.bound,
        gap=plan.report.gap,
        seconds=seconds,
        status=plan.report.status,
    )
    return Outcome(row=row, plan=plan, remark=_remark(planner.policy_name, plan, verdict))


def _remark(policy: str, plan: Plan, verdict: Verdict) -> str:
    parts = [] if plan.report.policy == policy else [f"by {plan.report.policy}"]
    if plan.report.detail:
        parts.append(plan.report.detail)
    parts += [violation.text for violation in verdict.violations[:3]]
    return "; ".join(dict.fromkeys(parts))


def _folder(plan_out: str | Path | None) -> Path | None:
    if plan_out is None:
        return None
    folder = Path(plan_out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--plan-out {folder}: cannot be made: {error.strerror}") from error
    return folder


def _stem(name: str) -> str:
    """What files of the problem ``name`` begin with."""
    stem = Path(name).stem if name.endswith(".json") else name
    return re.sub(r"[^A-Za-z0-9._-]+", "_", stem)


def _file_name(row: Row) -> str:
    return _stem(f"{_stem(row.problem)}-{row.policy}") + ".json"


def _table(problem: Problem, outcomes: Sequence[Outcome]) -> Table:
    caption = f"each stream alone on the site would reach {upper_bound_trivial(problem):.4f}"
    if any(outcome.row.policy == "milp" for outcome in outcomes):
        caption += "\nthe bound of milp is for static plans"
    table = Table(box=SIMPLE_HEAD, caption=caption)
    table.add_column("policy", no_wrap=True)
    for heading in ("accuracy", "bound", "gap", "seconds"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("status", "verdict"):
        table.add_column(heading, no_wrap=True)
    best = max((o.row.value for o in outcomes if o.row.feasible), default=None)
    for outcome in outcomes:
        row = outcome.row
        value = f"{row.value:.4f}"
        if best is not None and row.feasible and row.value >= best - 1e-9:
            value = f"[bold green]{value}[/]"
        table.add_row(
            row.policy,
            value,
            "" if row.bound is None else f"{row.bound:.4f}",
            "" if row.gap is None else f"{row.gap:.3%}",
            f"{row.seconds:.3f}",
            row.status,
            "feasible" if row.feasible else "[red]not feasible[/]",
        )
    return table
