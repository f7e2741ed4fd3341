"""Reasons that can be checked on paper, and by the judge."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from optimizer import cli
from optimizer.compare import compare
from optimizer.explain import explain
from optimizer.explain_choices import Room, choices, quantum_values, with_assignment
from optimizer.explain_figure import bars
from optimizer.explain_words import Explained, explain_stream, slot_prices
from optimizer.objective import judge
from optimizer.policies.registry import get_policy
from optimizer.problems import random_problem, save_problem
from protocol.codec import save_json
from protocol.errors import InputError
from protocol.plan import (
    Assignment,
    CloudProfile,
    CloudStep,
    InferenceProfile,
    InferenceStep,
    Plan,
    Problem,
    RetrainProfile,
    RetrainStep,
    SolveReport,
    StreamProfile,
)
from protocol.schema import GpuSpec, LinkSpec

FULL = InferenceProfile(inference_id="full", gpu_share_needed=0.4, relative_accuracy=1.0)
HALF = InferenceProfile(inference_id="half", gpu_share_needed=0.2, relative_accuracy=0.8)
SHORT = RetrainProfile(retrain_id="short", accuracy_after=0.8, gpu_seconds=12.0)
LONG = RetrainProfile(retrain_id="long", accuracy_after=0.9, gpu_seconds=30.0)


def stream(stream_id: str, **changes: object) -> StreamProfile:
    plain = StreamProfile(stream_id=stream_id, accuracy_now=0.5, inference=(FULL, HALF), retrain=(SHORT, LONG))
    return msgspec.structs.replace(plain, **changes)


SKY = CloudProfile(
    retrain_id="sky", link_id="up", accuracy_after=0.9, up_bytes=20_000_000, cloud_seconds=10.0, down_bytes=20_000_000
)
LINK = LinkSpec(link_id="up", up_bytes_per_s=1e6, down_bytes_per_s=2e6)


def problem(*streams: StreamProfile, num_gpus: int = 1, window_s: float = 100.0) -> Problem:
    gpus = tuple(GpuSpec(gpu_id=f"gpu{i}") for i in range(num_gpus))
    return Problem(window_s=window_s, gpus=gpus, streams=streams)


def serve(inference_id: str, share: float, *after: str) -> InferenceStep:
    return InferenceStep(inference_id=inference_id, gpu_id="gpu0", share=share, after=after)


def plan(*assignments: Assignment, window_s: float = 100.0) -> Plan:
    report = SolveReport(policy="by hand", status="heuristic")
    return Plan(window_s=window_s, assignments=assignments, report=report)


def retrain(retrain_id: str, share: float, *after: str) -> RetrainStep:
    return RetrainStep(retrain_id=retrain_id, gpu_id="gpu0", share=share, after=after)


ALONE = problem(stream("a"))
IDLE = plan(Assignment(stream_id="a", inference=(serve("full", 0.4),)))
# b retrains at 0.2 with short: 12 / 0.2 = 60 s; a has 0.4 + nothing until then.
PAIR = problem(stream("a"), stream("b"))
PAIR_PLAN = plan(
    Assignment(stream_id="a", inference=(serve("full", 0.4),)),
    Assignment(stream_id="b", inference=(serve("full", 0.4),), retrain=retrain("short", 0.2)),
)


def test_choices_of_a_stream_alone_are_those_worked_out_on_paper() -> None:
    found = {choice.retrain_id: choice for choice in choices(ALONE, IDLE, judge(ALONE, IDLE), "a")}
    assert set(found) == {None, "short", "long"}
    assert found[None].value == pytest.approx(0.5)
    # short at 0.6 beside full: 20 s of 0.5, then 0.8; at 0.8 beside half: 15 s of 0.4, then 0.8.
    assert found["short"].value == pytest.approx(max(0.5 * 0.2 + 0.8 * 0.8, 0.5 * 0.8 * 0.15 + 0.8 * 0.85))
    # long at 0.6: 50 s; at 0.8: 37.5 s of 0.4, then 0.9.
    assert found["long"].value == pytest.approx(max(0.25 + 0.45, 0.4 * 0.375 + 0.9 * 0.625))


def test_what_others_hold_is_not_offered_before_they_let_go() -> None:
    verdict = judge(PAIR, PAIR_PLAN)
    room = Room(PAIR, PAIR_PLAN, verdict, "a")
    assert [(i.start_s, i.end_s, i.events) for i in room.intervals] == [
        (0.0, pytest.approx(60.0), ()),
        (pytest.approx(60.0), 100.0, ("b",)),
    ]
    assert room.quanta["gpu0"] == [4, 6]
    found = {choice.retrain_id: choice for choice in choices(PAIR, PAIR_PLAN, verdict, "a")}
    # Two quanta beside half: 12 / 0.2 = 60 s of 0.4; full needs all four. After b: 0.2 beside full is too late.
    assert found["short"].value == pytest.approx(0.4 * 0.6 + 0.8 * 0.4)
    assert "long" not in found
    assert found["short"].site_value == pytest.approx((0.4 * 0.6 + 0.8 * 0.4 + 0.5 * 0.6 + 0.8 * 0.4) / 2)


def test_exchanging_the_configuration_keeps_the_order_of_events() -> None:
    # b starts when a has ended, on a's share: 12 / 0.2 = 60 s each, or 30 / 0.2 = 150 s with long, too late.
    both = problem(stream("a"), stream("b"), window_s=300.0)
    made = plan(
        Assignment(stream_id="a", inference=(serve("full", 0.4),), retrain=retrain("short", 0.2)),
        Assignment(stream_id="b", inference=(serve("full", 0.4),), retrain=retrain("short", 0.2, "a")),
        window_s=300.0,
    )
    found = {choice.retrain_id: choice for choice in choices(both, made, judge(both, made), "a")}
    alone = found[None].assignment  # and b, which waited for it, begins at once
    assert alone.retrain is None
    without = judge(both, with_assignment(made, alone))
    assert without.feasible
    assert without.streams[1].retrain_start_s == 0.0
    a, b = (0.5 * 150 + 0.9 * 150) / 300, (0.5 * 210 + 0.8 * 90) / 300
    assert found["long"].site_value == pytest.approx((a + b) / 2)


def test_one_more_quantum_is_worth_what_it_brings_the_stream() -> None:
    tight = problem(stream("a", retrain=()), stream("b", retrain=()), stream("c", retrain=()))
    made = plan(
        Assignment(stream_id="a", inference=(serve("half", 0.2),)),
        Assignment(stream_id="b", inference=(serve("full", 0.4),)),
        Assignment(stream_id="c", inference=(serve("half", 0.3),)),
    )
    verdict = judge(tight, made)
    # 0.3 are left for a; with 0.4 it could analyse every frame: 0.5 instead of 0.4.
    assert quantum_values(tight, made, verdict, "a") == {"gpu0": pytest.approx(0.1)}
    assert quantum_values(tight, made, verdict, "b") == {"gpu0": 0.0}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("policy", ["timeline", "thief"])
def test_every_choice_can_be_carried_out_and_none_beats_the_bound(seed: int, policy: str) -> None:
    made = random_problem(5, 2, 9, seed)
    chosen = get_policy(policy)(made, 0.5)
    verdict = judge(made, chosen)
    bound = slot_prices(made).bound
    assert bound >= verdict.value - 1e-9
    for one in made.streams:
        for choice in choices(made, chosen, verdict, one.stream_id):
            judged = judge(made, with_assignment(chosen, choice.assignment))
            assert judged.only_floors_broken
            assert judged.value == pytest.approx(choice.site_value)
            assert choice.site_value <= bound + 1e-6


def test_prices_fall_towards_the_end_of_a_contended_window_and_vanish_where_nothing_is_short() -> None:
    contended = slot_prices(random_problem(8, 2, 9, 1)).slots
    assert all(slot.points >= 0.0 for slot in contended)
    assert contended[0].points > contended[-1].points
    idle = slot_prices(problem(stream("a"), num_gpus=8)).slots
    assert max(slot.points for slot in idle) < 1e-3


def test_gpus_of_different_speed_have_prices_of_their_own() -> None:
    made = random_problem(6, 2, 9, 2)
    fast = msgspec.structs.replace(made.gpus[0], speed=2.0)
    prices = slot_prices(msgspec.structs.replace(made, gpus=(fast, made.gpus[1])))
    assert {slot.gpus for slot in prices.slots} == {("gpu0",), ("gpu1",)}
    assert prices.points("gpu0", 1.0, 0.0, 100.0) > prices.points("gpu1", 1.0, 0.0, 100.0) > 0.0
    assert prices.points("gpu0", 0.5, 0.0, 100.0) == pytest.approx(prices.points("gpu0", 1.0, 0.0, 100.0) / 2)


# ---------------------------------------------------------------- words


def words(made: Problem, chosen: Plan, stream_id: str) -> str:
    return "\n".join(explain_stream(Explained(made, chosen), stream_id))


def test_a_plan_that_leaves_a_gain_lying_is_told_so() -> None:
    said = words(ALONE, IDLE, "a")
    assert "a is not retrained: its model stays at 0.5000" in said
    assert "would raise the site's accuracy by 24.000 points: the plan is not the best possible" in said
    assert "everything else as planned, would raise" in said
    assert ": 0.7400" in said


def test_a_retraining_is_explained_by_what_would_be_lost_without_it() -> None:
    said = words(PAIR, PAIR_PLAN, "b")
    assert "b is retrained with short on gpu0 at share 0.2 from 0.0 s to 60.0 s: 0.5000 -> 0.8000" in said
    # b: 0.5 * 0.6 + 0.8 * 0.4 = 0.62 instead of 0.5; half of that for the site.
    assert "it would have 0.5000; the site would lose 6.000 points" in said
    assert "The share of gpu0 is used up at some time: 1 of 1." in said


@pytest.mark.parametrize(
    ("retrainings", "said"),
    [
        ((), "None of its retraining configurations is expected to make its model better."),
        (
            (RetrainProfile(retrain_id="worse", accuracy_after=0.4, gpu_seconds=5.0),),
            "None of its retraining configurations is expected to make its model better.",
        ),
        (
            (RetrainProfile(retrain_id="epic", accuracy_after=0.9, gpu_seconds=500.0),),
            "Even its cheapest useful retraining, epic, takes 500.0 s on a whole GPU; the window has 100 s.",
        ),
    ],
)
def test_why_nothing_is_retrained(retrainings: tuple[RetrainProfile, ...], said: str) -> None:
    assert said in words(problem(stream("a", retrain=retrainings)), IDLE, "a")


def test_a_stream_for_which_others_leave_no_room_is_told_so() -> None:
    crowd = problem(*(stream(f"s{i}") for i in range(5)))
    held = plan(*(Assignment(stream_id=f"s{i}", inference=(serve("half", 0.2),)) for i in range(5)))
    assert "What the other streams leave free is not enough for any useful retraining" in words(crowd, held, "s2")


def test_floors_and_memory_that_limit_are_named() -> None:
    floored = problem(stream("a", min_accuracy=0.45))
    gpu = GpuSpec(gpu_id="gpu0", memory_bytes=1000)
    heavy = msgspec.structs.replace(FULL, memory_bytes=950)
    tight = msgspec.structs.replace(
        floored, gpus=(gpu,), streams=(stream("a", min_accuracy=0.45, inference=(heavy, HALF)),)
    )
    said = words(tight, IDLE, "a")
    assert "Its floor rules out 1 of 2 inference configurations before a swap; full keeps 0.0500 above it." in said
    assert "The memory of gpu0 is 95% full at its peak: it limits the plan." in said
    hopeless = problem(stream("a", min_accuracy=0.9))
    assert "Its floor 0.9000 cannot be met by any configuration; 0.5000 is asked for instead." in words(
        hopeless, IDLE, "a"
    )


# ---------------------------------------------------------------- the command


def run_folder(folder: Path) -> Path:
    """A plan and its problem where a run keeps them."""
    for name in ("plans", "problems"):
        (folder / name).mkdir()
    made = random_problem(4, 2, 9, 3)
    save_problem(made, folder / "problems" / "w001-002-plan.json")
    save_json(get_policy("thief")(made, 1.0), folder / "plans" / "w001-002-plan.json")
    return folder / "plans" / "w001-002-plan.json"


def test_the_problem_of_a_run_is_found_beside_its_plan(tmp_path: Path) -> None:
    out = StringIO()
    explain(run_folder(tmp_path), console=Console(file=out, width=140))
    said = out.getvalue()
    assert "Plan by thief (heuristic) for 4 streams on 2 GPUs, 200 s" in said
    assert all(f" s{i} " in said for i in range(4))
    assert "What a GPU is worth, slot by slot" in said


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_plot_is_written(tmp_path: Path, suffix: str) -> None:
    target = tmp_path / f"plan.{suffix}"
    explain(run_folder(tmp_path), stream_id="s1", out=target, console=Console(file=StringIO()))
    content = target.read_bytes()
    assert content.startswith(b"<?xml") if suffix == "svg" else content.startswith(b"\x89PNG")
    if suffix == "svg":
        assert b"s1" in content or b"glyph" in content


def test_bars_of_one_gpu_never_share_a_row(tmp_path: Path) -> None:
    made = random_problem(8, 2, 9, 5)
    explained = Explained(made, get_policy("timeline")(made, 0.5))
    for gpu in made.gpus:
        found = bars(explained, gpu.gpu_id)
        assert found
        assert max(row for bar in found for row in bar.rows) < 10
        for one in found:
            for other in found:
                apart = one.end_s <= other.start_s + 1e-6 or other.end_s <= one.start_s + 1e-6
                assert one is other or apart or not set(one.rows) & set(other.rows)


def test_a_plan_and_a_problem_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    path = run_folder(tmp_path)
    save_problem(random_problem(5, 2, 9, 3), tmp_path / "other.json")
    with pytest.raises(InputError, match=r"does not answer .*other.json: stream 's4' is not served"):
        explain(path, problem_path=tmp_path / "other.json", console=Console(file=StringIO()))


def test_plans_of_a_comparison_find_their_problem_beside_them(tmp_path: Path) -> None:
    save_problem(random_problem(3, 1, 6, 0), tmp_path / "site.json")
    compare([tmp_path / "site.json"], random="3x1x6", seed=7, policies=["thief", "none"], plan_out=tmp_path / "out")
    for name in ("site-thief", "site-none", "3x1x6-seed7-thief", "3x1x6-seed7-none"):
        text = StringIO()
        explain(tmp_path / "out" / f"{name}.json", console=Console(file=text, width=120))
        assert "for 3 streams on 1 GPUs" in text.getvalue()


def test_mistakes_end_with_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_folder(tmp_path)
    (tmp_path / "plans" / "lonely.json").write_bytes(path.read_bytes())
    (tmp_path / "broken.json").write_text("{")
    save_problem(random_problem(2, 1, 3, 0), tmp_path / "problem.json")
    for arguments, said in (
        ([str(path), "--stream", "s9"], "the plan has no such stream; there are s0, s1, s2, s3"),
        ([str(tmp_path / "plans" / "lonely.json")], "name it with --problem"),
        ([str(tmp_path / "broken.json")], "broken.json"),
        ([str(tmp_path / "problem.json")], "is a problem, not a plan; `ekya-optimizer compare"),
        ([str(path), "--out", str(tmp_path / "plan.txt")], "plan.txt: cannot be written"),
        ([str(path), "--out", str(tmp_path / "nowhere" / "plan.svg")], "cannot be written"),
    ):
        monkeypatch.setattr("sys.argv", ["ekya-optimizer", "explain", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 2
        assert said in " ".join(capsys.readouterr().err.split())


def test_retraining_in_the_cloud_is_explained_and_offered() -> None:
    # Up 20 s, 10 s in the cloud, down 10 s: there after 40 s.
    pair = msgspec.structs.replace(problem(stream("a", cloud=(SKY,)), stream("b", cloud=(SKY,))), links=(LINK,))
    made = plan(
        Assignment(stream_id="a", inference=(serve("full", 0.4),), cloud=CloudStep(retrain_id="sky")),
        Assignment(stream_id="b", inference=(serve("full", 0.4),)),
    )
    explained = Explained(pair, made)
    assert explained.verdict.feasible
    said = "\n".join(explain_stream(explained, "a"))
    assert "a is retrained in the cloud with sky over up, turn 1, from 0.0 s; its model is there at 40.0 s" in said
    assert "It takes no share of any GPU." in said
    assert "Without retraining, everything else as planned, it would have 0.5000" in said
    # b has the share of the GPU, or the second turn of the link: up from 20 to 40 s, there at 60 s.
    found = {choice.retrain_id: choice for choice in explained.choices("b")}
    assert found["sky"].end_s == pytest.approx(60.0)
    assert found["sky"].value == pytest.approx((0.5 * 60 + 0.9 * 40) / 100)
    assert "sky in the cloud, there at 60 s" in "\n".join(explain_stream(explained, "b"))


@pytest.mark.parametrize("policy", ["timeline", "thief", "uniform:low:0.5", "none"])
def test_plans_of_every_kind_are_explained_and_drawn(policy: str, tmp_path: Path) -> None:
    asked = random_problem(5, 2, 6, 11)
    (tmp_path / "problems").mkdir()
    (tmp_path / "plans").mkdir()
    save_problem(asked, tmp_path / "problems" / "p.json")
    save_json(get_policy(policy)(asked, 1.0), tmp_path / "plans" / "p.json")
    for stream_id in (None, asked.streams[0].stream_id):
        out = StringIO()
        explain(
            tmp_path / "plans" / "p.json",
            stream_id=stream_id,
            out=tmp_path / "p.svg",
            console=Console(file=out, width=120),
        )
        assert "Plan by" in out.getvalue()
        assert "What a GPU is worth" in out.getvalue()
        assert stream_id is None or "next best choices" in out.getvalue() or "Nothing else fits" in out.getvalue()
        assert (tmp_path / "p.svg").stat().st_size > 1000
