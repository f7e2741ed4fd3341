"""Studies on traces that can be worked out on paper.

One stream, one GPU, 100 s windows, no frame may be skipped: inference takes 0.3 of the GPU (0.25 rounded
up to tenths), a retraining of 20 GPU-seconds gets the other 0.7 and ends after 20 / 0.7 = 28.57 s.
"""

from __future__ import annotations

import json
from io import StringIO
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console

from optimizer import cli
from optimizer.simulate import check_policies, simulate
from optimizer.trace_reuse import load_reuse
from optimizer.trace_study import InProcess, Study, StudyRow, simulate_site
from optimizer.trace_world import TraceSite
from optimizer.traces import draw_streams
from protocol.errors import InputError
from protocol.events import PlanSolved
from tests.optimizer.tiny_trace import random_rows, row, study, write_trace

END_S = 20.0 / 0.7
EXACT = ("milp", "timeline")


def average(*parts: tuple[float, float], window_s: float = 100.0) -> float:
    """Window average of (accuracy, from when on); the first from 0."""
    ends = [from_s for _, from_s in parts[1:]] + [window_s]
    return sum(a * (end - start) for (a, start), end in zip(parts, ends, strict=True)) / window_s


@pytest.mark.parametrize("policy", ["milp", "timeline", "thief"])
def test_one_stream_is_retrained_with_what_inference_leaves(tmp_path: Path, policy: str) -> None:
    found = study(tmp_path, [row()]).row(policy, 1, 1, 0)
    assert found.accuracy == pytest.approx(average((0.5, 0.0), (0.9, END_S)), abs=1e-6)
    assert found.accuracy_per_window == (found.accuracy,)
    assert (found.promoted, found.refused, found.unfinished, found.unplanned) == (1, 0, 0, 0)
    assert found.gpu_use_inference == pytest.approx(0.3)
    assert found.gpu_use_retraining == pytest.approx(0.7 * END_S / 100.0)
    assert 0.0 < found.decision_seconds_median <= found.decision_seconds_max


def test_without_retraining_nothing_is_gained(tmp_path: Path) -> None:
    found = study(tmp_path, [row()]).row("none", 1, 1, 0)
    assert found.accuracy == pytest.approx(0.5)
    assert (found.promoted, found.gpu_use_retraining) == (0, 0.0)


@pytest.mark.parametrize("policy", EXACT)
def test_a_model_that_turns_out_worse_is_refused_by_the_gate_and_goes_live_without_it(
    tmp_path: Path, policy: str
) -> None:
    rows = [row(after=0.4, told=0.9)]
    gated = study(tmp_path, rows, predicted=True).row(policy, 1, 1, 0)
    assert gated.accuracy == pytest.approx(0.5)
    assert (gated.promoted, gated.refused) == (0, 1)
    open_gate = study(tmp_path, rows, predicted=True, gate=False).row(policy, 1, 1, 0)
    assert open_gate.accuracy == pytest.approx(average((0.5, 0.0), (0.4, END_S)), abs=1e-6)
    assert (open_gate.promoted, open_gate.refused) == (1, 0)
    informed = study(tmp_path, rows).row(policy, 1, 1, 0)
    assert informed.accuracy == pytest.approx(0.5)
    assert (informed.promoted, informed.refused) == (0, 0)


@pytest.mark.parametrize("told_s", [10.0, 20.0, 60.0])
def test_a_retraining_ends_when_it_ends_whatever_was_told(tmp_path: Path, told_s: float) -> None:
    found = study(tmp_path, [row(gpu_s=40.0, told_s=told_s)], predicted=True).row("milp", 1, 1, 0)
    assert found.accuracy == pytest.approx(average((0.5, 0.0), (0.9, 2.0 * END_S)), abs=1e-6)


def test_a_retraining_that_is_not_over_by_the_end_of_the_window_changes_nothing(tmp_path: Path) -> None:
    found = study(tmp_path, [row(gpu_s=90.0, told_s=20.0)], predicted=True, num_windows=2).row("milp", 1, 1, 0)
    assert found.accuracy_per_window == pytest.approx((0.5, 0.5))
    assert (found.promoted, found.unfinished) == (0, 2)


def test_every_window_begins_with_the_traces_accuracy_and_windows_come_round_again(tmp_path: Path) -> None:
    rows = [row(window=1), row(window=2, before=0.6, after=0.8)]
    found = study(tmp_path, rows, num_windows=3).row("milp", 1, 1, 0)
    first, second = average((0.5, 0.0), (0.9, END_S)), average((0.6, 0.0), (0.8, END_S))
    assert found.accuracy_per_window == pytest.approx((first, second, first), abs=1e-6)


def test_micro_profiling_takes_its_time_when_it_is_asked_to(tmp_path: Path) -> None:
    # 10 GPU-seconds at the profiling share 0.4 take 25 s; only then is the retraining planned.
    found = study(tmp_path, [row()], profiling=True, num_windows=2).row("milp", 1, 1, 0)
    expected = average((0.5, 0.0), (0.9, 25.0 + END_S))
    assert found.accuracy_per_window == pytest.approx((expected, expected), abs=1e-6)


def test_two_streams_share_one_gpu_one_after_the_other(tmp_path: Path) -> None:
    # 0.6 serve, 0.4 retrain: 8 GPU-seconds take 20 s. One after the other is better than side by side.
    rows = [row("a", gpu_s=8.0), row("b", gpu_s=8.0, after=0.7)]
    found = study(tmp_path, rows).row("timeline", 2, 1, 0)
    best = (average((0.5, 0.0), (0.9, 20.0)) + average((0.5, 0.0), (0.7, 40.0))) / 2
    side_by_side = (average((0.5, 0.0), (0.9, 40.0)) + average((0.5, 0.0), (0.7, 40.0))) / 2
    assert found.accuracy == pytest.approx(best, abs=1e-6)
    assert found.accuracy > side_by_side


def test_streams_that_move_hold_no_share_twice(tmp_path: Path) -> None:
    table = "subsampling,c1\n1,1\n2,0.8\n5,0.4\n20,0.1\n"
    made = study(tmp_path, random_rows(8), table=table, num_windows=3)
    site = TraceSite(made.trace, made.table, draw_streams(made.trace, made.table, 6, 0), made.knobs)
    run, _ = simulate_site(site, "timeline", InProcess("timeline", 0.3, free_profiling=True), 3)
    homes = {
        (event.window, planned.stream_id, planned.inference_gpu)
        for event in run.events
        if isinstance(event, PlanSolved)
        for planned in event.streams
    }
    assert len(homes) > 18  # somebody moved
    assert run.peak_share <= 1.0 + 1e-9


def test_streams_below_their_floor_are_counted(tmp_path: Path) -> None:
    made = study(tmp_path, [row()], min_accuracy=0.6)
    assert made.row("none", 1, 1, 0).floors_broken == 1
    assert study(tmp_path, [row()], min_accuracy=0.5).row("none", 1, 1, 0).floors_broken == 0


def test_more_streams_than_can_be_served_have_no_plan_and_no_accuracy(tmp_path: Path) -> None:
    found = study(tmp_path, [row()]).row("thief", 11, 1, 0)
    assert found.unplanned > 0
    assert found.accuracy == 0.0


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("predicted", [False, True])
def test_more_gpus_are_never_worse(tmp_path: Path, seed: int, predicted: bool) -> None:
    table = "subsampling,c1,c2\n1,1,1\n2,0.8,0.7\n5,0.4,0.5\n20,0.1,0.1\n"
    made = study(tmp_path, random_rows(seed), table=table, num_windows=2, predicted=predicted)
    found = [made.row("milp", 5, gpus, seed).accuracy for gpus in (1, 2, 4, 8)]
    # With predictions a larger site may follow a wrong one further.
    tolerance = 0.03 if predicted else 0.003
    assert all(later >= earlier - tolerance for earlier, later in pairwise(found))
    assert found[-1] > found[0]


def test_exact_planning_is_at_least_as_good_as_its_rivals_on_true_profiles(tmp_path: Path) -> None:
    table = "subsampling,c1\n1,1\n2,0.8\n5,0.4\n20,0.1\n"
    made = study(tmp_path, random_rows(4), table=table, num_windows=2)
    by_policy = {name: made.row(name, 6, 2, 0).accuracy for name in ("milp", "thief", "uniform", "none", "fair")}
    assert by_policy["milp"] >= max(by_policy.values()) - 0.003


def test_equal_seeds_give_equal_studies_and_others_differ(tmp_path: Path) -> None:
    def once(seed: int) -> StudyRow:
        return study(tmp_path, random_rows(7), num_windows=2).row("thief", 4, 2, seed)

    first, second = once(1), once(1)
    assert first.accuracy_per_window == second.accuracy_per_window
    assert (first.promoted, first.refused) == (second.promoted, second.refused)
    assert once(2).accuracy != first.accuracy


def test_the_cloud_sends_models_one_after_the_other(tmp_path: Path) -> None:
    # 4 Mb/s * 0.1 * 100 s = 40 Mb up at 5.1, 398 Mb down at 17.5: 7.84 s + 22.74 s, the second model 22.74 s later.
    rows = [row("a"), row("b", after=0.7)]
    found = study(tmp_path, rows).row("cloud:cellular", 2, 1, 0)
    up_s, down_s = 40.0 / 5.1, 398.0 / 17.5
    first, second = average((0.5, 0.0), (0.9, up_s + down_s)), average((0.5, 0.0), (0.7, up_s + 2 * down_s))
    assert found.accuracy == pytest.approx((first + second) / 2, abs=1e-6)
    assert found.promoted == 2


def test_a_link_that_is_too_slow_changes_nothing(tmp_path: Path) -> None:
    found = study(tmp_path, [row()], window_s=25.0).row("cloud:satellite", 1, 1, 0)
    assert found.accuracy == pytest.approx(0.5)
    assert (found.promoted, found.unfinished) == (0, 1)


@pytest.mark.parametrize("policy", ["thief:fixed-shares", "thief:fixed-config", "fair", "uniform", "uniform:low:0.5"])
def test_every_baseline_runs_a_study(tmp_path: Path, policy: str) -> None:
    found = study(tmp_path, random_rows(3), num_windows=2).row(policy, 3, 2, 0)
    assert 0.0 < found.accuracy < 1.0
    assert found.unplanned == 0


def test_with_fixed_shares_nobody_takes_what_another_does_not_need(tmp_path: Path) -> None:
    # Each of two streams has 0.5, of which 0.4 serve (0.3 would do) and 0.1 retrains: 5 GPU-seconds take 50 s.
    made = study(tmp_path, [row("a", before=0.8, gpu_s=5.0), row("b", after=0.5)])
    found = made.row("thief:fixed-shares", 2, 1, 0)
    assert found.accuracy == pytest.approx((average((0.8, 0.0), (0.9, 50.0)) + 0.5) / 2, abs=1e-6)
    free = made.row("thief", 2, 1, 0)
    assert free.accuracy == pytest.approx((average((0.8, 0.0), (0.9, 12.5)) + 0.5) / 2, abs=1e-6)


def test_json_holds_what_programs_need(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = study(tmp_path, random_rows(2))
    out = StringIO()
    rows = simulate(
        made, policies=["thief", "none"], streams="2,3", gpus="1", seeds="0,1", as_json=True, console=Console(file=out)
    )
    plain = json.loads(out.getvalue())
    assert len(plain) == len(rows) == 8
    wanted = {"policy", "streams", "gpus", "seed", "accuracy", "accuracy_per_window"}
    wanted |= {"decision_seconds_median", "decision_seconds_max"}
    assert all(wanted <= set(one) for one in plain)
    assert {(one["policy"], one["streams"], one["seed"]) for one in plain} == {
        (p, s, seed) for p in ("thief", "none") for s in (2, 3) for seed in (0, 1)
    }


def test_out_gets_json_and_plots(tmp_path: Path) -> None:
    made = study(tmp_path, random_rows(2))
    out = StringIO()
    simulate(
        made,
        policies=["thief", "none"],
        streams="2,3",
        gpus="1,2",
        seeds="0",
        out=tmp_path / "new" / "folder",
        console=Console(file=out, width=120),
    )
    names = {path.name for path in (tmp_path / "new" / "folder").iterdir()}
    plots = {f"accuracy_by_{what}.{kind}" for what in ("streams", "gpus") for kind in ("svg", "png")}
    assert names == {"simulate.json"} | plots
    assert "simulated" in out.getvalue()
    assert "thief" in out.getvalue()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--policies", "milp,best"], "unknown policy 'best'"),
        (["--policies", "cloud:carrier-pigeon"], "the links are cloud:cellular"),
        (["--policies", ","], "name at least one policy"),
        (["--streams", "0"], "--streams 0: numbers are 1 to"),
        (["--gpus", "two"], "--gpus two: write whole numbers"),
        (["--seed", "-1"], "--seed -1: a seed is 0 or more"),
        (["--window-s", "nan"], "--window-s nan"),
        (["--full-share", "0"], "--full-share 0"),
        (["--min-accuracy", "1.5"], "--min-accuracy 1.5"),
        (["--inference", "nowhere.csv"], "nowhere.csv: cannot be read"),
    ],
)
def test_unusable_options_end_with_code_2_and_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    said: str,
) -> None:
    trace = write_trace(tmp_path / "trace.csv", [row()])
    monkeypatch.setattr("sys.argv", ["ekya-optimizer", "simulate", str(trace), *options])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    captured = capsys.readouterr()
    assert ended.value.code == 2
    assert said in captured.err
    assert captured.out == ""


def test_a_bad_trace_ends_the_command_with_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = write_trace(tmp_path / "trace.csv", [row(after=7.0)])
    monkeypatch.setattr("sys.argv", ["ekya-optimizer", "simulate", str(trace)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert f"{trace}: line 2, column accuracy_after: 7 is out of range" in capsys.readouterr().err


def test_the_command_prints_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = write_trace(tmp_path / "trace.csv", [row()])
    argv = ["simulate", str(trace), "--streams", "1", "--gpus", "1", "--policies", "thief,none", "--windows", "2"]
    monkeypatch.setattr("sys.argv", ["ekya-optimizer", *argv])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code in (0, None)
    printed = capsys.readouterr().out
    assert "Every accuracy below is simulated" in printed
    assert "built-in table" in printed


def test_a_policy_named_twice_is_studied_once() -> None:
    assert check_policies(["thief", "milp", "thief"]) == ["thief", "milp"]
    with pytest.raises(InputError):
        check_policies([])


def test_an_old_model_that_fits_is_loaded_and_one_that_does_not_is_left(tmp_path: Path) -> None:
    # The second window: retraining takes 20 GPU-seconds at share 0.7, loading an old model 7.
    rows = [row(window=1), row(window=2)]
    plain = study(tmp_path, rows, num_windows=2)
    table = tmp_path / "reuse.csv"
    header = "city,window,from_city,from_window,accuracy,gpu_seconds,class_distance\n"
    table.write_text(header + "a,2,a,1,0.7,7,0.9\na,2,b,1,0.4,7,0.1\n")
    made = Study(plain.trace, plain.table, plain.knobs, 2.0, load_reuse(table, plain.trace))
    assert made.row("reuse", 1, 1, 0).accuracy_per_window == pytest.approx((0.5, average((0.5, 0.0), (0.7, 10.0))))
    assert made.row("reuse:latest", 1, 1, 0).accuracy == made.row("reuse", 1, 1, 0).accuracy
    assert made.row("reuse:class", 1, 1, 0).accuracy == pytest.approx(0.5)
    # Nobody else is offered old models.
    assert made.row("milp", 1, 1, 0).accuracy == pytest.approx(plain.row("milp", 1, 1, 0).accuracy)
    assert check_policies(["reuse:class"], made.reuse) == ["reuse:class"]
    with pytest.raises(InputError, match="makes possible reuse, reuse:latest, reuse:class"):
        check_policies(["reuse:place"], made.reuse)
    with pytest.raises(InputError, match="needs the accuracy of old models: give --reuse"):
        check_policies(["reuse"])


def test_a_foreign_trace_with_other_cities_extreme_costs_and_no_predictions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "foreign.csv"
    path.write_bytes(
        b"\xef\xbb\xbfgpu_seconds,epochs,accuracy_after,note,window,config,accuracy_before,city\r\n"
        b'0.000001,1,0.9,"a, b",3,0,0.5,"Sao Paulo, ""Centro"""\r\n'
        b'100000000,30,1,,3,1,0.5,"Sao Paulo, ""Centro"""\r\n'
        b'5,3,0,,7,0,0,"Sao Paulo, ""Centro"""\r\n'
    )
    command = ["ekya-optimizer", "simulate", str(path), "--streams", "2,3", "--gpus", "1,2", "--windows", "4"]
    monkeypatch.setattr("sys.argv", [*command, "--budget", "0.1", "--json"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    found = json.loads(capsys.readouterr().out)
    assert [one["policy"] for one in found[:5]] == ["timeline", "milp", "thief", "uniform", "none"]
    assert len(found) == 20
    assert all(0.0 <= a <= 1.0 and len(one["accuracy_per_window"]) == 4 for one in found for a in [one["accuracy"]])
    retrained = max(one["accuracy"] for one in found)
    assert retrained == pytest.approx(0.45, abs=0.01)  # 0.9 and 0 in turn
    monkeypatch.setattr("sys.argv", [*command, "--predicted"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "--predicted: " in (said := capsys.readouterr().err)
    assert "has no column accuracy_after_predicted; add it, or leave --predicted out" in said
