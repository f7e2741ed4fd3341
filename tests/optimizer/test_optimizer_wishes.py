"""Weights, floors and latency limits are honoured by every policy, and what could not be kept is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from optimizer import cli
from optimizer.config import parse_site
from optimizer.objective import attainable_floor, judge
from optimizer.planner import Planner
from optimizer.policies.registry import POLICIES, get_policy
from optimizer.problems import check_problem, load_problem, random_problem, with_limits
from protocol.errors import ConfigError
from protocol.plan import InferenceProfile, Problem, StreamProfile
from protocol.schema import GpuSpec

EVERY = [*POLICIES, "uniform:low:0.5"]
# What spends shares evenly on purpose does not look at weights.
BY_WEIGHT = [name for name in POLICIES if name not in ("uniform", "fair", "thief:fixed-shares")]


def ladder(stream_id: str, **fields: Any) -> StreamProfile:
    """Accuracy 0.8; the more share the better, from 0.2 at 0.1 GPU to all of it at 0.8."""
    inference = tuple(
        InferenceProfile(
            inference_id=f"i{quanta}", gpu_share_needed=quanta / 10, relative_accuracy=0.1 + 0.9 * quanta / 8
        )
        for quanta in range(1, 9)
    )
    return StreamProfile(stream_id=stream_id, accuracy_now=0.8, inference=inference, **fields)


def two(a: StreamProfile, b: StreamProfile) -> Problem:
    return Problem(window_s=100.0, gpus=(GpuSpec(gpu_id="g"),), streams=(a, b))


@pytest.mark.parametrize("name", BY_WEIGHT)
def test_the_stream_that_weighs_more_is_served_better(name: str) -> None:
    for heavy in (0, 1):
        weights = [10.0 if v == heavy else 1.0 for v in range(2)]
        problem = two(ladder("a", weight=weights[0]), ladder("b", weight=weights[1]))
        verdict = judge(problem, get_policy(name)(problem, 5.0))
        assert verdict.feasible
        assert verdict.streams[heavy].value > verdict.streams[1 - heavy].value + 0.1, name


@pytest.mark.parametrize("name", EVERY)
def test_a_floor_that_can_be_kept_is_kept(name: str) -> None:
    for strict in (0, 1):
        floors = [0.7 if v == strict else 0.0 for v in range(2)]
        problem = two(ladder("a", min_accuracy=floors[0], weight=1.0), ladder("b", min_accuracy=floors[1], weight=5.0))
        verdict = judge(problem, get_policy(name)(problem, 5.0))
        assert verdict.feasible, (name, verdict.violations)
        assert verdict.streams[strict].min_accuracy >= 0.7 - 1e-9


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("seed", range(3))
def test_floors_of_random_problems_are_kept(name: str, seed: int) -> None:
    problem = random_problem(5, 4, 6, seed)
    streams = tuple(msgspec.structs.replace(s, min_accuracy=0.6 * s.accuracy_now) for s in problem.streams)
    problem = msgspec.structs.replace(problem, streams=streams)
    verdict = judge(problem, get_policy(name)(problem, 5.0))
    assert verdict.feasible, (name, seed, verdict.violations)
    for stream, one in zip(problem.streams, verdict.streams, strict=True):
        floor = min(stream.min_accuracy, attainable_floor(stream, problem.gpus, problem.share_quantum))
        assert one.min_accuracy >= floor - 1e-9


def slow(limit_s: float) -> StreamProfile:
    plain = ladder("a", max_latency_s=limit_s)
    inference = tuple(
        msgspec.structs.replace(profile, latency_s=0.1 * (index + 1)) for index, profile in enumerate(plain.inference)
    )
    return msgspec.structs.replace(plain, inference=inference)


@pytest.mark.parametrize("name", EVERY)
def test_no_policy_uses_a_configuration_that_is_too_slow(name: str) -> None:
    problem = two(slow(0.35), ladder("b"))
    plan = get_policy(name)(problem, 5.0)
    assert judge(problem, plan).feasible
    used = {step.inference_id for step in plan.assignments[0].inference}
    assert used <= {"i1", "i2", "i3"}, name


def test_a_limit_that_nothing_keeps_is_told_with_what_is_attained() -> None:
    with Planner("thief", 2.0) as planner:
        report = planner.solve(two(slow(0.05), ladder("b"))).report
        assert "no configuration keeps the latency limit of a (0.1 s of 0.05 s)" in report.detail


def test_limits_that_cannot_be_kept_together_are_told_and_the_streams_served() -> None:
    def tight(stream_id: str) -> StreamProfile:
        quick = InferenceProfile(inference_id="quick", gpu_share_needed=0.7, relative_accuracy=1.0, latency_s=0.1)
        late = InferenceProfile(inference_id="late", gpu_share_needed=0.2, relative_accuracy=0.9, latency_s=0.9)
        return StreamProfile(stream_id=stream_id, accuracy_now=0.8, inference=(quick, late), max_latency_s=0.2)

    problem = two(tight("a"), tight("b"))
    for name in ("milp", "thief", "timeline"):
        with Planner(name, 5.0) as planner:
            planner.wait_until_warm(60.0)
            plan = planner.solve(problem)
            verdict = judge(problem, plan)
            assert [violation.kind for violation in verdict.violations] == ["latency"], name
            assert "slower than their limit" in plan.report.detail
            assert plan.report.bound is None


# ---------------------------------------------------------------- where they are set


@pytest.mark.parametrize("seed", range(5))
def test_random_problems_with_limits_are_good_problems_with_all_of_them(seed: int) -> None:
    plain = random_problem(10, 8, 18, seed)
    problem = with_limits(plain, seed)
    check_problem(problem)
    assert random_problem(10, 8, 18, seed) == plain
    assert problem.links
    assert problem.label_budget_s
    assert problem.planning_quantile == 0.3
    assert any(stream.cloud for stream in problem.streams)
    assert any(stream.window_s for stream in problem.streams)
    limited = [stream for stream in problem.streams if stream.max_latency_s is not None]
    assert limited
    for stream in limited:
        latencies = [profile.latency_s for profile in stream.inference]
        assert min(latencies) < (stream.max_latency_s or 0.0) < max(latencies)
    for name in ("thief", "milp"):
        assert judge(problem, get_policy(name)(problem, 5.0)).feasible


SITE: dict[str, Any] = {
    "name": "s",
    "streams": [{"stream_id": "a", "source": {"type": "city", "seed": 1}, "classes": ["car", "bus"]}],
    "inference": [{"config_id": "full"}],
}


def test_a_site_file_sets_limits_and_quantile() -> None:
    stream = SITE["streams"][0] | {"max_latency_s": 0.25, "retrain_every": 4}
    site = parse_site(SITE | {"streams": [stream], "planning_quantile": 0.25}, "site.toml", Path())
    assert (site.streams[0].max_latency_s, site.streams[0].retrain_every, site.planning_quantile) == (0.25, 4, 0.25)


@pytest.mark.parametrize(
    ("site", "said"),
    [
        ({"planning_quantile": 0.8}, "planning_quantile"),
        ({"share_quantum": 0.3}, "share_quantum: 0.3 does not divide a GPU"),
        ({"streams": [SITE["streams"][0] | {"max_latency_s": 0}]}, "max_latency_s"),
        ({"streams": [SITE["streams"][0] | {"retrain_every": 0}]}, "retrain_every"),
        ({"links": []}, "unknown key 'links'"),
    ],
)
def test_a_site_file_with_bad_limits_is_refused(site: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
        parse_site(SITE | site, "site.toml", Path())


def test_compare_makes_problems_with_limits_and_sets_the_quantile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "p.json"
    argv = ["compare", "--random", "3x2x6", "--limits", "--policies", "thief", "--json", "--save", str(saved)]
    monkeypatch.setattr("sys.argv", ["ekya-optimizer", *argv, "--planning-quantile", "0.1"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code in (0, None)
    (row,) = msgspec.json.decode(capsys.readouterr().out)
    assert row["problem"] == "3x2x6-seed0-limits"
    assert row["feasible"]
    assert load_problem(saved).links
    for options, said in ((["--limits"], "--limits"), (["--planning-quantile", "0.7"], "--planning-quantile")):
        monkeypatch.setattr("sys.argv", ["ekya-optimizer", "compare", str(saved), *options])
        with pytest.raises(SystemExit) as failed:
            cli.main()
        assert failed.value.code == 2
        assert said in capsys.readouterr().err
