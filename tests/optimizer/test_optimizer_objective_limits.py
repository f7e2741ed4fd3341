"""The judge on latency limits, own windows, label budgets and retrainings in the cloud, valued by hand."""

from __future__ import annotations

from typing import Any

import pytest

from optimizer.execution import asked_latency_s, own_window_s, transfer_times
from optimizer.objective import attainable_floor, judge, stamped, upper_bound_trivial
from protocol.plan import Assignment, CloudProfile, CloudStep, InferenceProfile, RetrainProfile
from protocol.schema import GpuSpec, LinkSpec
from tests.optimizer.test_optimizer_objective import assign, plan, problem, serve, stream, train

LINK = LinkSpec(link_id="wan", up_bytes_per_s=10.0, down_bytes_per_s=20.0)


def cloud(retrain_id: str = "c", **fields: Any) -> CloudProfile:
    """100 bytes up (10 s), 5 s in the cloud, 400 bytes down (20 s), to 0.9."""
    base: dict[str, Any] = {
        "link_id": "wan",
        "accuracy_after": 0.9,
        "up_bytes": 100,
        "cloud_seconds": 5.0,
        "down_bytes": 400,
    }
    return CloudProfile(retrain_id=retrain_id, **(base | fields))


def sent(stream_id: str, *steps: Any, turn: int = 0, retrain_id: str = "c") -> Assignment:
    return Assignment(
        stream_id=stream_id, inference=steps or (serve(),), cloud=CloudStep(retrain_id=retrain_id, turn=turn)
    )


def slow_and_quick(**fields: Any) -> Any:
    return stream(
        "a",
        inference=(
            InferenceProfile(inference_id="cheap", gpu_share_needed=0.15, relative_accuracy=0.6, latency_s=0.2),
            InferenceProfile(inference_id="full", gpu_share_needed=0.4, relative_accuracy=1.0, latency_s=0.5),
        ),
        **fields,
    )


def kinds(found: Any) -> list[str]:
    return [violation.kind for violation in found.violations]


# ---------------------------------------------------------------- latency


def test_a_configuration_slower_than_the_limit_is_refused_but_can_be_carried_out() -> None:
    limited = problem(slow_and_quick(max_latency_s=0.3))
    late = judge(limited, plan(assign("a", serve("full", share=0.4))))
    assert kinds(late) == ["latency"]
    assert late.only_floors_broken
    assert late.streams[0].max_latency_s == 0.5
    assert "0.5" in late.violations[0].text
    assert judge(limited, plan(assign("a", serve()))).feasible


def test_a_limit_that_nothing_keeps_asks_for_the_smallest_latency() -> None:
    limited = problem(slow_and_quick(max_latency_s=0.1))
    assert asked_latency_s(limited.streams[0], limited.gpus, 0.1) == 0.2
    assert judge(limited, plan(assign("a", serve()))).feasible
    assert kinds(judge(limited, plan(assign("a", serve("full", share=0.4))))) == ["latency"]


def test_the_floor_counts_only_on_configurations_that_keep_the_latency() -> None:
    limited = problem(slow_and_quick(max_latency_s=0.3, min_accuracy=0.45))
    assert attainable_floor(limited.streams[0], limited.gpus, 0.1) == pytest.approx(0.3)
    assert judge(limited, plan(assign("a", serve()))).feasible


# ---------------------------------------------------------------- own windows


def test_a_stream_counts_over_its_own_window_only() -> None:
    short = problem(stream("a", window_s=50.0), stream("b"))
    found = judge(short, plan(assign("a", retrain=train(0.5)), assign("b")))
    # a: 40 of its 50 s at 0.5 * 0.6, 10 s at 0.9 * 0.6
    assert found.streams[0].value == pytest.approx(0.8 * 0.3 + 0.2 * 0.54)
    assert found.streams[1].value == pytest.approx(0.3)


@pytest.mark.parametrize("window_s", [30.0, 40.0])
def test_a_retraining_that_ends_after_the_own_window_is_worth_nothing_but_occupies_its_gpu(window_s: float) -> None:
    short = problem(stream("a", window_s=window_s), stream("b"))
    found = judge(short, plan(assign("a", retrain=train(0.5)), assign("b", serve("full", share=0.4))))
    assert found.streams[0].value == pytest.approx(0.3)
    assert kinds(found) == ["capacity"]  # 0.2 + 0.5 + 0.4 for all 40 s


def test_a_window_longer_than_the_plan_is_the_plans() -> None:
    long = stream("a", window_s=500.0)
    assert own_window_s(long, 100.0) == 100.0
    assert own_window_s(stream("a"), 100.0) == 100.0
    with_it = judge(problem(long), plan(assign("a", retrain=train(0.5))))
    assert with_it.value == judge(problem(stream("a")), plan(assign("a", retrain=train(0.5)))).value


def test_share_and_floor_go_on_after_the_own_window() -> None:
    short = problem(stream("a", window_s=50.0, min_accuracy=0.45), stream("b"))
    steps = (serve("full", share=0.4), serve("cheap", after=("b",)))
    late = plan(assign("a", *steps), assign("b", serve(gpu_id="g1"), retrain=train(0.3, gpu_id="g1")))
    found = judge(short, late)  # b's retraining ends after 67 s
    assert found.streams[0].value == pytest.approx(0.5)
    assert kinds(found) == ["floor"]


# ---------------------------------------------------------------- labels


def test_labelling_stays_within_its_budget() -> None:
    costly = (RetrainProfile(retrain_id="r", accuracy_after=0.9, gpu_seconds=20.0, label_seconds=6.0),)
    streams = (stream("a", retrain=costly), stream("b", retrain=costly))
    both = plan(assign("a", retrain=train(0.3)), assign("b", serve(gpu_id="g1"), retrain=train(0.3, "g1")))
    assert judge(problem(*streams), both).feasible
    assert judge(problem(*streams, label_budget_s=12.0), both).feasible
    refused = judge(problem(*streams, label_budget_s=11.9), both)
    assert kinds(refused) == ["labels"]
    assert not refused.only_floors_broken
    one = plan(assign("a", retrain=train(0.3)), assign("b"))
    assert judge(problem(*streams, label_budget_s=6.0), one).feasible


def test_labels_of_retrainings_in_the_cloud_count_as_well() -> None:
    site = problem(stream("a", cloud=(cloud(label_seconds=5.0),)), links=(LINK,), label_budget_s=4.0)
    assert kinds(judge(site, plan(sent("a")))) == ["labels"]


# ---------------------------------------------------------------- cloud


def test_transfers_go_one_after_the_other_in_each_direction() -> None:
    small, large = cloud(), cloud(up_bytes=300, down_bytes=100)
    assert transfer_times(LINK, [small, large]) == [(0.0, 35.0), (10.0, 50.0)]
    assert transfer_times(LINK, [large, small]) == [(0.0, 40.0), (30.0, 65.0)]
    # The second model waits until the first is down.
    assert transfer_times(LINK, [cloud(down_bytes=1000), small]) == [(0.0, 65.0), (10.0, 85.0)]


def test_a_retraining_in_the_cloud_takes_no_share_and_counts_from_the_arrival_of_its_model() -> None:
    site = problem(stream("a", cloud=(cloud(),)), stream("b", cloud=(cloud(),)), links=(LINK,))
    found = judge(site, plan(sent("a", turn=1), sent("b", serve(gpu_id="g1"), turn=0)))
    assert found.feasible, found.violations
    assert [(s.retrain_start_s, s.retrain_end_s) for s in found.streams] == [(10.0, 55.0), (0.0, 35.0)]
    assert found.streams[0].value == pytest.approx(0.55 * 0.3 + 0.45 * 0.54)
    assert found.streams[1].value == pytest.approx(0.35 * 0.3 + 0.65 * 0.54)
    assert [gpu.peak_share for gpu in found.gpus] == [0.2, 0.2]


def test_equal_turns_go_in_the_plans_order_of_streams() -> None:
    site = problem(stream("a", cloud=(cloud(),)), stream("b", cloud=(cloud(),)), links=(LINK,))
    found = judge(site, plan(sent("a"), sent("b")))
    assert [s.retrain_end_s for s in found.streams] == [35.0, 55.0]


def test_others_may_wait_for_the_model_from_the_cloud() -> None:
    site = problem(stream("a", cloud=(cloud(),)), stream("b"), links=(LINK,))
    steps = (serve(), serve("full", share=0.4, after=("a",)))
    found = judge(site, plan(sent("a", *steps), assign("b", serve(gpu_id="g1"), retrain=train(0.5, after=("a",)))))
    assert found.feasible, found.violations
    assert found.streams[0].step_starts_s == (0.0, 35.0)
    assert (found.streams[1].retrain_start_s, found.streams[1].retrain_end_s) == (35.0, 75.0)


def test_a_transfer_that_runs_keeps_its_turn_in_front() -> None:
    running = cloud(up_bytes=0, cloud_seconds=1.0, running=True)
    site = problem(stream("a", cloud=(cloud(),)), stream("b", cloud=(running,)), links=(LINK,))
    assert kinds(judge(site, plan(sent("a", turn=0), sent("b", turn=1)))) == ["link_order"]
    assert judge(site, plan(sent("a", turn=1), sent("b", turn=0))).feasible
    assert judge(site, plan(assign("a"), assign("b"))).feasible  # it may be given up


def test_impossible_retrainings_in_the_cloud_are_refused() -> None:
    site = problem(stream("a", cloud=(cloud(),)), links=(LINK,))
    assert kinds(judge(site, plan(sent("a", retrain_id="r")))) == ["unknown_retrain"]
    both = Assignment(stream_id="a", inference=(serve(),), retrain=train(0.3), cloud=CloudStep(retrain_id="c"))
    assert "two_retrainings" in kinds(judge(site, plan(both)))
    assert kinds(judge(problem(stream("a", cloud=(cloud(),))), plan(sent("a")))) == ["unknown_retrain"]  # no link


def test_a_model_in_transit_takes_its_memory() -> None:
    tight = (GpuSpec(gpu_id="g0", memory_bytes=15),)
    site = problem(stream("a", cloud=(cloud(swap_bytes=6),)), links=(LINK,), gpus=tight)
    assert kinds(judge(site, plan(sent("a")))) == ["memory"]


def test_stamps_and_the_trivial_bound_know_the_cloud() -> None:
    site = problem(stream("a", retrain=(), cloud=(cloud(),)), links=(LINK,))
    written = stamped(site, plan(sent("a"))).assignments[0].cloud
    assert written is not None
    assert (written.planned_start_s, written.planned_end_s) == (0.0, 35.0)
    assert upper_bound_trivial(site) == pytest.approx(0.35 * 0.5 + 0.65 * 0.9)
