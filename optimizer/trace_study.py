"""Trace-driven studies: the real coordinator and real policies on measured retrainings, in virtual time.

Every accuracy made here is a simulated one: executors follow the execution model of ``protocol.plan``
exactly and instantly. Decision times are real, measured in this process.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

import msgspec

from optimizer.checks import check_quantum
from optimizer.coordinator import Coordinator
from optimizer.objective import judge, stamped
from optimizer.policies.baselines import cheapest
from optimizer.policies.reductions import lowered
from optimizer.policies.registry import Policy, get_policy, policy_entry
from optimizer.policies.thief import thief
from optimizer.problems import random_problem
from optimizer.simulator import SimulatedCloud, SimulatedExecutor, Simulation
from optimizer.state import SiteState
from optimizer.trace_cloud import LINKS, CloudChoice, arrivals, cloud_factor
from optimizer.trace_reuse import ReuseTable, is_reuse, load_reuse, only, reuse_policy
from optimizer.trace_world import StudyKnobs, TraceProfiler, TraceSite, TraceWorld, initial_gpus
from optimizer.traces import (
    BUILT_IN_TABLE,
    PREDICTED,
    PROFILING,
    InferenceTable,
    Trace,
    draw_streams,
    load_inference_table,
    load_trace,
)
from protocol.errors import InputError, PlanError
from protocol.events import RetrainFinished
from protocol.plan import Plan, Problem, SolveReport
from protocol.schema import GpuSpec, Record

INCUMBENT_BUDGET_S = 0.05
WARM_UP_S = 60.0
MORE_TIME = 20.0


class StudyRow(Record, frozen=True, kw_only=True):
    """One policy on one site. Accuracies are simulated, decision times are real.

    ``accuracy``: window-averaged inference accuracy, mean over streams and windows. ``gpu_use_*``: share
    of all GPUs' time that jobs were granted. ``floors_broken``: stream-windows in which the accuracy was below
    the floor at some time. ``promoted``, ``refused``: retrainings that ended and went live, or did not;
    ``unfinished``: started, but over before they ended. ``unplanned``: questions without any plan.
    """

    policy: str
    streams: int
    gpus: int
    seed: int
    accuracy: float
    accuracy_per_window: tuple[float, ...]
    decision_seconds_median: float
    decision_seconds_max: float
    decisions: int
    gpu_use_inference: float
    gpu_use_retraining: float
    floors_broken: int
    promoted: int
    refused: int
    unfinished: int
    unplanned: int
    windows: int
    window_s: float
    profiles: str
    simulated: bool = True


class Study:
    """A trace, an inference table, and how they are turned into sites; runs are remembered.

    Args:
        knobs: windows, floors, what the planner is told, and so on.
        budget_s: seconds of wall time that a policy may take for a decision.
    """

    def __init__(
        self, trace: Trace, table: InferenceTable, knobs: StudyKnobs, budget_s: float, reuse: ReuseTable | None = None
    ) -> None:
        self.trace, self.table, self.knobs, self.budget_s, self.reuse = trace, table, knobs, budget_s, reuse
        self._rows: dict[tuple[str, int, int, int], StudyRow] = {}
        self._solvers: dict[str, InProcess] = {}

    def row(self, policy: str, num_streams: int, num_gpus: int, seed: int) -> StudyRow:
        """Simulate one policy on the site drawn by ``seed``."""
        key = (policy, num_streams, num_gpus, seed)
        if key not in self._rows:
            drawn = draw_streams(self.trace, self.table, num_streams, seed)
            site = TraceSite(self.trace, self.table, drawn, self.knobs, self.reuse)
            made = cloud_row if policy in LINKS else simulated_row
            solver = self._solver("none" if policy in LINKS else policy)
            self._rows[key] = made(site, policy, solver, num_gpus, seed)
        return self._rows[key]

    @property
    def num_simulated(self) -> int:
        """How many sites have been simulated so far."""
        return len(self._rows)

    def _solver(self, policy: str) -> InProcess:
        if policy not in self._solvers:
            self._solvers[policy] = InProcess(policy, self.budget_s, free_profiling=not self.knobs.profiling)
        return self._solvers[policy]


class InProcess:
    """A policy as the planner would use it, but in this process: for exact ones the best of all that is at hand.

    The first call of a policy loads its solver; a small problem is solved here so that no decision pays for it.
    """

    def __init__(self, name: str, budget_s: float, *, free_profiling: bool) -> None:
        self.name, self.budget_s = name, budget_s
        self._policy: Policy = reuse_policy(name) if is_reuse(name) else get_policy(name)
        self._exact = not is_reuse(name) and policy_entry(name).exact
        self._free_profiling = free_profiling
        self._policy(random_problem(2, 1, 3, seed=0), WARM_UP_S)

    def __call__(self, problem: Problem, last: Plan | None) -> Plan:
        if self._free_profiling and any(gpu.reserved_share > 0.0 for gpu in problem.gpus):
            return cheapest(problem)  # in force for no time at all
        if not is_reuse(self.name):
            problem = only(problem, None)
        problem = lowered(problem)  # plans are made and chosen at the planning quantile
        if not self._exact:
            try:
                return self._policy(problem, self.budget_s)
            except PlanError:
                # On a busy machine a solver may find nothing in time; the decision then takes as long as it takes.
                return self._policy(problem, MORE_TIME * self.budget_s)
        found: list[Plan] = []
        for make in self._methods(problem, last):
            try:
                plan = make()
            except PlanError:
                continue
            if judge(problem, plan).only_floors_broken:
                found.append(plan)
        if not found:
            raise PlanError("no plan can be executed: the streams cannot all be served")
        return max(found, key=lambda plan: judge(problem, plan).rank)

    def _methods(self, problem: Problem, last: Plan | None) -> list[Callable[[], Plan]]:
        methods: list[Callable[[], Plan]] = [
            lambda: self._policy(problem, self.budget_s),
            lambda: thief(problem, INCUMBENT_BUDGET_S),
        ]
        if last is not None:
            report = SolveReport(policy="last plan", status="heuristic")
            still = msgspec.structs.replace(last, window_s=problem.window_s, report=report)
            methods.append(lambda: stamped(problem, still))
        return methods


def simulate_site(site: TraceSite, policy: str, solver: InProcess, num_gpus: int) -> tuple[Simulation, TraceWorld]:
    """Run all windows of a site."""
    world = TraceWorld(site)
    config = site.config(policy)
    coordinator = Coordinator(
        msgspec.structs.replace(config, min_executors=num_gpus),
        TraceProfiler(site),
        SiteState(site=config.name),
        num_windows=site.knobs.warm_up + site.knobs.num_windows,
        links=site.links,
    )
    run = Simulation(coordinator, [], world, solver, tick_s=config.window_s, cloud=SimulatedCloud(site.links, world))
    for gpu_id in initial_gpus(num_gpus):
        run.join(SimulatedExecutor(GpuSpec(gpu_id=gpu_id), world, announces_ready=True))
    run.run()
    return run, world


def simulated_row(site: TraceSite, policy: str, solver: InProcess, num_gpus: int, seed: int) -> StudyRow:
    """Simulate one policy and sum it up."""
    run, world = simulate_site(site, policy, solver, num_gpus)
    return summed_up(site, policy, run, world, seed)


def summed_up(site: TraceSite, policy: str, run: Simulation, world: TraceWorld, seed: int) -> StudyRow:
    """What a finished simulation found. The warm-up is left out."""
    knobs, num_gpus = site.knobs, len(run.executors)
    windows = range(knobs.warm_up, knobs.warm_up + knobs.num_windows)
    measures = {w: [run.measures[stream_id, w] for stream_id in site.streams] for w in windows}
    per_window = tuple(sum(one.accuracy_s / one.seconds for one in measures[w]) / len(measures[w]) for w in windows)
    ended = [e for e in run.events if isinstance(e, RetrainFinished) and e.window in windows]
    decisions = [d for d in run.decisions if d.window in windows and (knobs.profiling or d.phase != "profiling")]
    seconds = [d.seconds for d in decisions]
    gpu_s = num_gpus * knobs.window_s * knobs.num_windows

    def use(*kinds: str) -> float:
        return sum(run.share_s.get((kind, w), 0.0) for kind in kinds for w in windows) / gpu_s

    started = sum(1 for _, window in world.started if window in windows)
    return StudyRow(
        policy=policy,
        streams=len(site.streams),
        gpus=num_gpus,
        seed=seed,
        accuracy=sum(per_window) / len(per_window),
        accuracy_per_window=per_window,
        decision_seconds_median=statistics.median(seconds),
        decision_seconds_max=max(seconds),
        decisions=len(seconds),
        gpu_use_inference=use("inference"),
        gpu_use_retraining=use("retrain"),
        floors_broken=sum(one.least < knobs.min_accuracy - 1e-9 for found in measures.values() for one in found),
        promoted=sum(e.promoted for e in ended),
        refused=sum(not e.promoted for e in ended),
        unfinished=max(0, started - len(ended)),
        unplanned=sum(d.plan is None for d in decisions),
        windows=knobs.num_windows,
        window_s=knobs.window_s,
        profiles="predicted" if knobs.predicted else "true",
    )


def cloud_row(site: TraceSite, policy: str, solver: InProcess, num_gpus: int, seed: int) -> StudyRow:
    """Retraining in the cloud: the site as it is without retraining, models arriving over the link."""
    knobs = site.knobs
    run, world = simulate_site(site, "none", solver, num_gpus)
    row = summed_up(site, "none", run, world, seed)
    per_window: list[float] = []
    promoted = refused = unfinished = 0
    for window in range(knobs.warm_up, knobs.warm_up + knobs.num_windows):
        choices = {stream_id: _cloud_choice(site, stream_id, window) for stream_id in site.streams}
        due = arrivals(list(choices.values()), policy, knobs.window_s)
        total = 0.0
        for stream_id, choice in choices.items():
            measure = run.measures[stream_id, window]
            factor = cloud_factor(choice, due.get(stream_id), knobs.window_s, gate=knobs.gate)
            total += measure.accuracy_s / measure.seconds * factor
            if stream_id in due:
                late = due[stream_id] >= knobs.window_s
                live = not late and (choice.after > choice.before or not knobs.gate)
                promoted, refused, unfinished = promoted + live, refused + (not late and not live), unfinished + late
        per_window.append(total / len(choices))
    return msgspec.structs.replace(
        row,
        policy=policy,
        accuracy=sum(per_window) / len(per_window),
        accuracy_per_window=tuple(per_window),
        promoted=promoted,
        refused=refused,
        unfinished=unfinished,
    )


def _cloud_choice(site: TraceSite, stream_id: str, window: int) -> CloudChoice:
    traced, told = site.window(stream_id, window), site.profile(stream_id, window)
    best = max(range(len(traced.retrainings)), key=lambda i: told.retrain[i].accuracy_after)
    return CloudChoice(
        stream_id=stream_id,
        before=traced.accuracy_now,
        promised=told.retrain[best].accuracy_after,
        after=traced.retrainings[best].accuracy_after,
    )


def make_study(
    trace: Path, inference: Path | None, knobs: StudyKnobs, budget_s: float, reuse: Path | None = None
) -> Study:
    """Read the files of a study and check its numbers. InputError for everything that is unusable."""
    for name, value, least in (
        ("--windows", knobs.num_windows, 1.0),
        ("--window-s", knobs.window_s, 5.0),
        ("--budget", budget_s, 0.01),
    ):
        if not least <= value <= 1e6:
            raise InputError(f"{name} {value:g}: at least {least:g} is needed")
    for name, value in (("--full-share", knobs.full_share), ("--share-quantum", knobs.share_quantum)):
        if not 0.0 < value <= 1.0:
            raise InputError(f"{name} {value:g}: a share of a GPU is above 0 and at most 1")
    check_quantum(knobs.share_quantum, "--share-quantum")
    if not 0.0 < knobs.planning_quantile <= 0.5:
        raise InputError(f"--planning-quantile {knobs.planning_quantile:g}: above 0 and at most 0.5 (what is expected)")
    if knobs.link and knobs.link not in LINKS:
        raise InputError(f"--link {knobs.link.replace('cloud:', '')}: the links are {', '.join(sorted(LINKS))}")
    if not 0.0 <= knobs.min_accuracy <= 1.0:
        raise InputError(f"--min-accuracy {knobs.min_accuracy:g}: an accuracy is 0 to 1")
    table = BUILT_IN_TABLE if inference is None else load_inference_table(inference)
    traced = load_trace(trace)
    if knobs.predicted:
        traced.need(PREDICTED, "--predicted")
    if knobs.profiling:
        traced.need((PROFILING,), "--profiling")
    return Study(traced, table, knobs, budget_s, None if reuse is None else load_reuse(reuse, traced))
