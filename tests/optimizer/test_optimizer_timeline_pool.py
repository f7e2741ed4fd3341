"""The search over queues: its worth is the judge's, it is reproducible, and it gets near the bound in so many steps."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from optimizer.objective import judge
from optimizer.policies import timeline_cache
from optimizer.policies.timeline import timeline
from optimizer.policies.timeline_bound import Dual, dual_of_few, opening_grid, refined
from optimizer.policies.timeline_layout import Layout, Tables
from optimizer.policies.timeline_model import build_model
from optimizer.policies.timeline_plan import assignments_of
from optimizer.policies.timeline_pool import PoolSearch, moves_are_free
from optimizer.policies.timeline_start import pack_inference, promising_trainings, queue_retrainings
from optimizer.problems import random_problem, servable
from protocol.plan import Plan, Problem, SolveReport

pytestmark = pytest.mark.timeout(600)  # the first search on a machine is compiled


@pytest.fixture(scope="module", autouse=True)
def _loaded() -> None:
    assert timeline_cache.wait_compiled(500.0)
    assert timeline_cache.prepare(60.0)


def begun(problem: Problem) -> tuple[Layout, Dual]:
    model = build_model(problem)
    layout = pack_inference(Tables(model))
    assert layout is not None
    dual = dual_of_few(model, opening_grid(problem.window_s, problem.num_slots), time.monotonic() + 60.0)
    queue_retrainings(layout, dual)
    return layout, dual


def searched(problem: Problem, steps: int, seed: int = 1) -> tuple[PoolSearch, Dual]:
    layout, dual = begun(problem)
    pool = PoolSearch(layout, promising_trainings(layout, dual, dual.bound - layout.total), seed)
    pool.run(math.inf, steps, 3e-3 / len(problem.streams), math.inf)
    return pool, dual


@pytest.mark.parametrize(
    ("size", "floor"), [((8, 3, 9), 0.0), ((12, 4, 18), 0.0), ((9, 6, 18), 0.2), ((5, 1, 18), 0.0)]
)
def test_the_worth_of_queues_is_what_the_judge_says_of_their_plan(size: tuple[int, int, int], floor: float) -> None:
    for seed in range(5):
        problem = random_problem(*size, seed)
        streams = tuple(msgspec.structs.replace(s, min_accuracy=floor) for s in problem.streams)
        problem = msgspec.structs.replace(problem, streams=streams)
        pool, dual = searched(problem, 3000)
        report = SolveReport(policy="timeline", status="feasible")
        plan = Plan(window_s=problem.window_s, assignments=assignments_of(pool.placed()), report=report)
        verdict = judge(problem, plan)
        assert verdict.feasible, (seed, verdict.violations[:1])
        assert verdict.value == pytest.approx(pool.best, abs=1e-9), seed
        assert verdict.value <= dual.bound + 1e-9, seed


def test_equal_seeds_find_equal_queues() -> None:
    problem = random_problem(12, 5, 18, 3)
    one, other = (searched(problem, 8000)[0] for _ in range(2))
    assert one.best == other.best
    assert one.placed() == other.placed() or assignments_of(one.placed()) == assignments_of(other.placed())


def test_so_many_steps_bring_twenty_streams_this_near_to_the_bound() -> None:
    gaps = []
    for seed in range(3):
        pool, dual = searched(random_problem(20, 8, 18, seed), 40_000)
        gaps.append((dual.bound - pool.best) / dual.bound)
    print("gaps", gaps)
    assert max(gaps) < 4e-3


def test_with_many_streams_packing_takes_little_off_the_pooled_worth() -> None:
    for seed in range(3):
        pool, dual = searched(random_problem(70, 12, 18, seed), 20_000)
        packed = pool.packed()
        assert not pool.packing
        assert 0.999 * pool.best < packed < 1.0005 * pool.best, seed
        assert packed <= dual.bound + 1e-9, seed


def test_a_finer_grid_never_proves_less_than_the_plans_at_hand() -> None:
    for seed in range(3):
        pool, dual = searched(random_problem(12, 5, 18, seed), 10_000)
        finer = refined(dual, pool.best, time.monotonic() + 60.0)
        assert pool.best - 1e-12 <= finer.bound <= dual.bound, seed
        longer, _ = searched(random_problem(12, 5, 18, seed), 60_000, seed=9)
        assert longer.best <= finer.bound + 1e-9, seed


def test_a_machine_without_machine_code_plans_at_once_and_has_it_compiled_by_another_process(tmp_path: Path) -> None:
    """A copy of the source, so that neither a marker nor a cache is there: the first plan does not wait for them."""
    program = f"""
import sys, time
from pathlib import Path
from optimizer.policies import timeline_cache
from optimizer.policies.timeline import timeline
from optimizer.problems import random_problem
timeline_cache._folder = lambda: Path({str(tmp_path)!r})
started = []
timeline_cache.start_compiling = lambda: started.append(1)
plan = timeline(random_problem(6, 2, 9, 0), 1.0)
assert started and timeline_cache.kernel() is None, "it should have gone on without"
assert "numba" not in sys.modules, "it should not have compiled here"
print(plan.report.value)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert 0.0 < float(done.stdout) < 1.0


def test_a_marker_without_machine_code_counts_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline_cache, "_folder", lambda: tmp_path)
    assert not timeline_cache.is_compiled()
    timeline_cache._marker().write_text(str(tmp_path))
    assert not timeline_cache.is_compiled()
    (tmp_path / "timeline_kernels.anneal-1.nbc").write_bytes(b"")
    assert timeline_cache.is_compiled()


def test_it_is_used_only_where_moving_is_free_and_nothing_else_counts() -> None:
    problem = random_problem(6, 2, 9, 0)
    assert moves_are_free(Tables(build_model(problem)))
    assert not moves_are_free(Tables(build_model(msgspec.structs.replace(problem, migration_s=1.0))))
    faster = (msgspec.structs.replace(problem.gpus[0], speed=2.0), *problem.gpus[1:])
    assert not moves_are_free(Tables(build_model(msgspec.structs.replace(problem, gpus=faster))))


def test_a_plan_for_twenty_streams_is_feasible_and_below_its_bound() -> None:
    problem = random_problem(20, 8, 18, 4)
    plan = timeline(problem, 5.0)
    verdict = judge(problem, plan)
    assert verdict.feasible
    assert plan.report.bound is not None
    assert verdict.value <= plan.report.bound + 1e-9


def test_a_quantum_that_cannot_serve_every_stream_is_made_finer_and_no_other() -> None:
    assert servable(random_problem(10, 8, 3, 0)).share_quantum == 0.1
    assert servable(random_problem(1000, 64, 1, 0)).share_quantum == 0.02
