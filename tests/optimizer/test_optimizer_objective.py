"""The judge: hand-made plans of every kind, valued by hand or refused for the right reason."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimizer.execution import needed_quanta, quanta_of, retrain_seconds, share_efficiency
from optimizer.objective import judge, stamped, upper_bound_trivial
from protocol.plan import (
    Assignment,
    InferenceProfile,
    InferenceStep,
    Plan,
    Problem,
    RetrainProfile,
    RetrainStep,
    SolveReport,
    StreamProfile,
)
from protocol.schema import GpuSpec

REPORT = SolveReport(policy="hand", status="heuristic")


def stream(stream_id: str, **fields: Any) -> StreamProfile:
    """A stream of accuracy 0.5 with a cheap and a full configuration and one retraining to 0.9 for 20 GPU-seconds."""
    base: dict[str, Any] = {
        "accuracy_now": 0.5,
        "inference": (
            InferenceProfile(inference_id="cheap", gpu_share_needed=0.15, relative_accuracy=0.6, memory_bytes=10),
            InferenceProfile(inference_id="full", gpu_share_needed=0.4, relative_accuracy=1.0, memory_bytes=20),
        ),
        "retrain": (RetrainProfile(retrain_id="r", accuracy_after=0.9, gpu_seconds=20.0, memory_bytes=50),),
    }
    return StreamProfile(stream_id=stream_id, **(base | fields))


def problem(*streams: StreamProfile, **fields: Any) -> Problem:
    base: dict[str, Any] = {"window_s": 100.0, "gpus": (GpuSpec(gpu_id="g0"), GpuSpec(gpu_id="g1"))}
    return Problem(streams=streams or (stream("a"), stream("b")), **(base | fields))


def serve(
    inference_id: str = "cheap", gpu_id: str = "g0", share: float = 0.2, after: tuple[str, ...] = ()
) -> InferenceStep:
    return InferenceStep(inference_id=inference_id, gpu_id=gpu_id, share=share, after=after)


def train(share: float = 0.5, gpu_id: str = "g0", after: tuple[str, ...] = (), retrain_id: str = "r") -> RetrainStep:
    return RetrainStep(retrain_id=retrain_id, gpu_id=gpu_id, share=share, after=after)


def assign(stream_id: str, *steps: InferenceStep, retrain: RetrainStep | None = None) -> Assignment:
    return Assignment(stream_id=stream_id, inference=steps or (serve(),), retrain=retrain)


def plan(*assignments: Assignment, window_s: float = 100.0) -> Plan:
    return Plan(window_s=window_s, assignments=assignments, report=REPORT)


def test_a_plan_is_worth_its_window_average() -> None:
    p = plan(assign("a", serve(), serve("full", share=0.7, after=("a",)), retrain=train(0.5)), assign("b"))
    verdict = judge(problem(), p)
    assert verdict.feasible, verdict.violations
    # a: 40 s at 0.5 * 0.6, 60 s at 0.9 * 1; b: 0.5 * 0.6 all along
    assert verdict.streams[0].value == pytest.approx(0.4 * 0.3 + 0.6 * 0.9)
    assert verdict.streams[1].value == pytest.approx(0.3)
    assert verdict.value == pytest.approx((0.66 + 0.3) / 2)
    assert verdict.streams[0].min_accuracy == pytest.approx(0.3)
    assert (verdict.streams[0].retrain_start_s, verdict.streams[0].retrain_end_s) == (0.0, 40.0)
    assert [g.peak_share for g in verdict.gpus] == [0.9, 0.0]
    assert [g.peak_memory_bytes for g in verdict.gpus] == [70, 0]


def test_weights_count() -> None:
    verdict = judge(
        problem(stream("a", weight=3.0), stream("b")), plan(assign("a", serve("full", share=0.4)), assign("b"))
    )
    assert verdict.value == pytest.approx((3 * 0.5 + 0.3) / 4)


def test_a_retraining_that_ends_after_the_window_changes_nothing() -> None:
    verdict = judge(
        problem(), plan(assign("a", serve(), serve("full", share=0.4, after=("a",)), retrain=train(0.1)), assign("b"))
    )
    assert verdict.feasible
    assert verdict.streams[0].value == pytest.approx(0.3)
    assert verdict.streams[0].retrain_end_s == pytest.approx(200.0)


def test_queued_retrainings_start_on_the_end_of_the_one_in_front() -> None:
    p = plan(
        assign("a", retrain=train(0.5)),
        assign("b", serve(), serve("full", share=0.4, after=("a", "b")), retrain=train(0.5, after=("a",))),
    )
    verdict = judge(problem(), p)
    assert verdict.feasible
    assert (verdict.streams[1].retrain_start_s, verdict.streams[1].retrain_end_s) == (40.0, 80.0)
    assert verdict.streams[1].step_starts_s == (0.0, 80.0)
    assert verdict.streams[1].value == pytest.approx(0.8 * 0.3 + 0.2 * 0.9)


def test_changes_and_migrations_cost_their_seconds() -> None:
    a = stream("a", serving_gpu="g0", serving_inference="full", retrain=())
    costs = {"config_change_s": 2.0, "migration_s": 5.0}

    def value(step: InferenceStep) -> float:
        return judge(problem(a, **costs), plan(assign("a", step))).value

    assert value(serve("full", share=0.4)) == pytest.approx(0.5)
    assert value(serve("cheap")) == pytest.approx(0.98 * 0.3)
    assert value(serve("full", "g1", 0.4)) == pytest.approx(0.95 * 0.5)
    assert value(serve("cheap", "g1")) == pytest.approx(0.95 * 0.3)


def test_a_change_inside_the_hand_over_of_another_is_paid_once() -> None:
    a = stream("a", serving_gpu="g0", serving_inference="full")
    p = plan(assign("a", serve("cheap"), serve("full", share=0.4, after=("a",)), retrain=train(0.5)))
    verdict = judge(problem(a, config_change_s=50.0), p)
    # unserved from 0 to 50 (first change) and from 40 to 90 (second): 10 s are left
    assert verdict.value == pytest.approx(0.1 * 0.9)


def test_speed_and_share_efficiency_shape_the_length_of_a_retraining() -> None:
    fast = GpuSpec(gpu_id="g0", speed=2.0, share_efficiency=((0.5, 0.8), (1.0, 1.0)))
    p = plan(assign("a", serve(share=0.1), retrain=train(0.5)))
    verdict = judge(problem(stream("a"), gpus=(fast,)), p)
    assert verdict.feasible
    assert verdict.streams[0].retrain_end_s == pytest.approx(20.0 / (2.0 * 0.8))
    assert share_efficiency(fast, 0.25) == pytest.approx(0.4)
    assert share_efficiency(fast, 0.75) == pytest.approx(0.9)
    assert share_efficiency(GpuSpec(gpu_id="x", share_efficiency=((0.5, 0.8),)), 0.75) == pytest.approx(0.9)
    assert share_efficiency(GpuSpec(gpu_id="x"), 0.3) == pytest.approx(0.3)


def test_a_hand_over_of_share_at_one_instant_is_no_peak() -> None:
    p = plan(
        assign("a", serve(), serve("full", share=1.0, after=("a",)), retrain=train(0.8)),
        assign("b", serve(gpu_id="g1")),
    )
    assert judge(problem(), p).feasible


BAD_PLANS: dict[str, tuple[str, Plan]] = {
    "another window": ("window", plan(assign("a"), assign("b"), window_s=90.0)),
    "another order": ("order", plan(assign("b"), assign("a"))),
    "a stream left out": ("missing_stream", plan(assign("a"))),
    "a stream twice": ("duplicate_stream", plan(assign("a"), assign("b"), assign("b"))),
    "a stream that is not there": ("unknown_stream", plan(assign("a"), assign("b"), assign("c"))),
    "an unknown GPU": ("unknown_gpu", plan(assign("a", serve(gpu_id="g9")), assign("b"))),
    "an unknown GPU for retraining": ("unknown_gpu", plan(assign("a", retrain=train(gpu_id="g9")), assign("b"))),
    "an unknown inference configuration": ("unknown_inference", plan(assign("a", serve("best")), assign("b"))),
    "an unknown retraining configuration": (
        "unknown_retrain",
        plan(assign("a", retrain=train(retrain_id="x")), assign("b")),
    ),
    "retrainings in a circle": (
        "never_starts",
        plan(assign("a", retrain=train(0.2, after=("b",))), assign("b", retrain=train(0.2, after=("a",)))),
    ),
    "a retraining after itself": ("never_starts", plan(assign("a", retrain=train(0.2, after=("a",))), assign("b"))),
    "a retraining after none": ("never_starts", plan(assign("a", retrain=train(0.2, after=("b",))), assign("b"))),
    "an inference step after none": ("never_starts", plan(assign("a", serve(), serve(after=("b",))), assign("b"))),
    "a first step that waits": (
        "never_starts",
        plan(assign("a", serve(after=("a",)), retrain=train(0.2)), assign("b")),
    ),
    "a share between two quanta": ("share_quantum", plan(assign("a", serve(share=0.25)), assign("b"))),
    "a retraining share between two quanta": ("share_quantum", plan(assign("a", retrain=train(0.33)), assign("b"))),
    "too little for the live stream": ("share_too_small", plan(assign("a", serve(share=0.1)), assign("b"))),
    "too little for a later step": (
        "share_too_small",
        plan(assign("a", serve(), serve("full", share=0.3, after=("a",)), retrain=train()), assign("b")),
    ),
    "more than a GPU": ("share_too_large", plan(assign("a", serve(share=1.1)), assign("b"))),
    "too much on one GPU": (
        "capacity",
        plan(assign("a", retrain=train(0.5)), assign("b", serve("full", share=0.4))),
    ),
    "too much after a swap": (
        "capacity",
        plan(assign("a", serve(), serve("full", share=0.9, after=("a",)), retrain=train(0.5)), assign("b")),
    ),
    "the wrong GPU for a running retraining": (
        "pinned_gpu",
        plan(assign("a", retrain=train(0.2, retrain_id="running")), assign("b")),
    ),
    "a running retraining made to wait": (
        "pinned_gpu",
        plan(
            assign("a", retrain=train(0.2, "g1", after=("b",), retrain_id="running")),
            assign("b", retrain=train(0.2)),
        ),
    ),
}


@pytest.mark.parametrize("name", BAD_PLANS)
def test_the_judge_refuses(name: str) -> None:
    kind, bad = BAD_PLANS[name]
    running = RetrainProfile(retrain_id="running", accuracy_after=0.9, gpu_seconds=5.0, pinned_gpu="g1")
    a = stream("a", retrain=(*stream("a").retrain, running))
    verdict = judge(problem(a, stream("b")), bad)
    assert not verdict.feasible
    assert {violation.kind for violation in verdict.violations} == {kind}


def test_reserved_share_is_not_handed_out() -> None:
    gpus = (GpuSpec(gpu_id="g0", reserved_share=0.25),)
    p = plan(assign("a", serve("full", share=0.4)), assign("b", serve("full", share=0.4)))
    verdict = judge(problem(gpus=gpus), p)
    assert [violation.kind for violation in verdict.violations] == ["capacity"]
    assert judge(problem(gpus=gpus), plan(assign("a", serve("full", share=0.4)), assign("b"))).feasible


@pytest.mark.parametrize(("memory", "fits"), [(80, True), (79, False)])
def test_memory_counts_inference_and_retraining(memory: int, fits: bool) -> None:
    gpus = (GpuSpec(gpu_id="g0", memory_bytes=memory),)
    verdict = judge(problem(gpus=gpus), plan(assign("a", retrain=train(0.2)), assign("b", serve("full", share=0.4))))
    assert [violation.kind for violation in verdict.violations] == ([] if fits else ["memory"])


@pytest.mark.parametrize(("memory", "fits"), [(17, True), (16, False)])
def test_memory_counts_the_model_that_is_about_to_be_swapped_in(memory: int, fits: bool) -> None:
    r = RetrainProfile(retrain_id="r", accuracy_after=0.9, gpu_seconds=20.0, memory_bytes=50, swap_bytes=7)
    gpus = (GpuSpec(gpu_id="g0", memory_bytes=memory), GpuSpec(gpu_id="g1"))
    verdict = judge(problem(stream("a", retrain=(r,)), gpus=gpus), plan(assign("a", retrain=train(0.2, "g1"))))
    assert [violation.kind for violation in verdict.violations] == ([] if fits else ["memory"])


def test_memory_of_an_ended_retraining_is_free_again() -> None:
    gpus = (GpuSpec(gpu_id="g0", memory_bytes=70),)
    p = plan(
        assign("a", retrain=train(0.5)),
        assign("b", retrain=train(0.5, after=("a",))),
    )
    assert judge(problem(gpus=gpus), p).feasible


def test_a_floor_that_could_be_met_must_be_met() -> None:
    low = stream("a", min_accuracy=0.45)
    assert not judge(problem(low), plan(assign("a"))).feasible
    assert [v.kind for v in judge(problem(low), plan(assign("a"))).violations] == ["floor"]
    assert judge(problem(low), plan(assign("a", serve("full", share=0.4)))).feasible


def test_a_floor_out_of_reach_asks_for_the_least_violation() -> None:
    high = stream("a", min_accuracy=0.8)
    assert judge(problem(high), plan(assign("a", serve("full", share=0.4)))).feasible
    assert not judge(problem(high), plan(assign("a"))).feasible


def test_a_floor_holds_after_the_swap_as_well() -> None:
    worse = RetrainProfile(retrain_id="r", accuracy_after=0.3, gpu_seconds=20.0)
    a = stream("a", min_accuracy=0.4, retrain=(worse,))
    verdict = judge(problem(a), plan(assign("a", serve("full", share=0.4), retrain=train(0.5))))
    assert [violation.kind for violation in verdict.violations] == ["floor"]


def test_stamped_times_are_the_judges() -> None:
    p = plan(
        assign("a", retrain=train(0.5)),
        assign("b", serve(), serve("full", share=0.4, after=("a", "b")), retrain=train(0.5, after=("a",))),
    )
    b = stamped(problem(), p).assignments[1]
    assert b.inference[1].planned_start_s == 80.0
    assert b.retrain is not None
    assert (b.retrain.planned_start_s, b.retrain.planned_end_s) == (40.0, 80.0)


def test_shares_written_as_decimals_are_whole_quanta() -> None:
    for quantum in (0.1, 0.05, 0.02, 0.01, 1 / 3, 1 / 7):
        for quanta in range(1, int(1 / quantum) + 1):
            assert quanta_of(quanta * quantum, quantum) == quanta
    need = InferenceProfile(inference_id="x", gpu_share_needed=0.1 + 0.2, relative_accuracy=1.0)
    assert needed_quanta(need, GpuSpec(gpu_id="g"), 0.1) == 3


@settings(max_examples=150, deadline=None)
@given(
    accuracy=st.floats(0.0, 1.0),
    after=st.floats(0.0, 1.0),
    cost=st.floats(0.1, 300.0),
    share=st.integers(1, 8),
    first=st.sampled_from(["cheap", "full"]),
)
def test_no_plan_of_one_stream_is_above_the_trivial_bound(
    accuracy: float, after: float, cost: float, share: int, first: str
) -> None:
    retraining = RetrainProfile(retrain_id="r", accuracy_after=after, gpu_seconds=cost)
    a = stream("a", accuracy_now=accuracy, retrain=(retraining,))
    steps = (serve(first, share=0.4), serve("full", share=0.4, after=("a",)))
    one = problem(a)
    verdict = judge(one, plan(assign("a", *steps, retrain=train(share / 10, "g1"))))
    assert verdict.feasible
    assert 0.0 <= verdict.value <= upper_bound_trivial(one) + 1e-12
    swap_s = retrain_seconds(retraining, one.gpus[1], share / 10)
    assert verdict.streams[0].retrain_end_s == pytest.approx(swap_s)


def test_the_judge_never_raises_on_nonsense() -> None:
    nonsense = plan(
        assign("a", serve("x", "nowhere", 0.123, ("zz",)), retrain=train(0.77, "nowhere", ("a", "b", "zz"), "none")),
        assign("a"),
        assign("zz", serve("x", "y", 1.0)),
    )
    verdict = judge(problem(), nonsense)
    assert not verdict.feasible
    assert verdict.value == 0.0
    assert msgspec.json.encode(verdict)


def test_a_thousand_streams_are_judged_at_once() -> None:
    streams = tuple(stream(f"s{i}") for i in range(1000))
    gpus = tuple(GpuSpec(gpu_id=f"g{i}") for i in range(500))
    big = problem(*streams, gpus=gpus)
    p = plan(
        *(
            assign(
                f"s{i}",
                serve(gpu_id=f"g{i // 2}"),
                serve("full", f"g{i // 2}", 0.4, (f"s{i}",)),
                retrain=train(0.3, f"g{i // 2}"),
            )
            for i in range(1000)
        )
    )
    assert judge(big, p).feasible
