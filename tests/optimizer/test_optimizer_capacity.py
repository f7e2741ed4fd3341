"""Streams per GPU and GPUs per accuracy, on traces for which both can be counted."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from optimizer import cli
from optimizer.capacity import accuracy, capacity, fewest_gpus, measure_capacity, most_streams
from tests.optimizer.tiny_trace import random_rows, row, study, write_trace

SERVED_ONLY = [row(before=0.8, after=0.8)]  # nothing to gain: a GPU serves three streams at 0.3 each, a fourth nothing


@pytest.mark.parametrize(("gpus", "streams"), [(1, 3), (2, 6), (3, 9)])
@pytest.mark.parametrize("policy", ["none", "milp"])
def test_three_streams_fit_on_a_gpu(tmp_path: Path, policy: str, gpus: int, streams: int) -> None:
    made = study(tmp_path, SERVED_ONLY)
    found = most_streams(made, policy, gpus, 0.75, [0], limit=64)
    assert found.streams == streams
    assert found.accuracy == pytest.approx(0.8)
    assert not found.at_limit
    assert accuracy(made, policy, streams + 1, gpus, [0]) < 0.75


def test_a_lower_target_admits_streams_that_are_not_served_well(tmp_path: Path) -> None:
    # Three of n streams are served: 0.8 * 3 / n >= 0.5 up to n = 4.
    assert most_streams(study(tmp_path, SERVED_ONLY), "milp", 1, 0.5, [0], limit=64).streams == 4


def test_a_target_out_of_reach_leaves_no_stream(tmp_path: Path) -> None:
    found = most_streams(study(tmp_path, SERVED_ONLY), "milp", 2, 0.85, [0], limit=64)
    assert (found.streams, found.accuracy, found.at_limit) == (0, None, False)


def test_a_search_that_ends_at_its_limit_says_so(tmp_path: Path) -> None:
    found = most_streams(study(tmp_path, SERVED_ONLY), "none", 4, 0.75, [0], limit=5)
    assert (found.streams, found.at_limit) == (5, True)


def test_gpus_needed_are_counted(tmp_path: Path) -> None:
    made = study(tmp_path, SERVED_ONLY)
    assert [fewest_gpus(made, "none", n, 0.8, [0], first=1, limit=8) for n in (3, 4, 6, 7)] == [1, 2, 2, 3]
    assert fewest_gpus(made, "none", 3, 0.9, [0], first=1, limit=8) is None
    assert fewest_gpus(made, "none", 3, 0.8, [0], first=8, limit=8) == 1


def test_both_searches_agree_with_looking_at_every_size(tmp_path: Path) -> None:
    table = "subsampling,c1\n1,1\n2,0.8\n5,0.4\n20,0.1\n"
    made = study(tmp_path, random_rows(5), table=table)
    result = measure_capacity(made, ["thief", "none"], [1, 2], 0.62, [0, 1], max_streams=12, num_streams=5, max_gpus=8)
    for found in result.capacity:
        held = [
            n
            for n in range(1, 13)
            if n <= 10 * found.gpus and accuracy(made, found.policy, n, found.gpus, [0, 1]) >= 0.62
        ]
        # Where accuracy does not fall steadily, what is found is one of the places at which it crosses the target.
        assert found.streams == 0 or found.streams in held
        assert found.streams + 1 not in held or found.at_limit
    for need in result.needs:
        assert need.reference == "thief"
        assert need.reference_accuracy == accuracy(made, "thief", 5, need.reference_gpus, [0, 1])
        assert need.gpus is None or need.accuracy >= need.reference_accuracy - 1e-9
        if need.gpus is not None and need.gpus > 1:
            assert accuracy(made, "none", 5, need.gpus - 1, [0, 1]) < need.reference_accuracy


def test_tables_json_and_plot(tmp_path: Path) -> None:
    made = study(tmp_path, SERVED_ONLY)
    out = StringIO()
    capacity(
        made,
        policies=["milp", "none"],
        gpus="1,2",
        target=0.75,
        seeds="0",
        num_streams=4,
        max_gpus=4,
        out=tmp_path / "out",
        console=Console(file=out, width=120),
    )
    assert "Streams at an accuracy of at least 0.75" in out.getvalue()
    assert "GPUs needed for the accuracy of milp, 4 streams" in out.getvalue()
    plain = json.loads((tmp_path / "out" / "capacity.json").read_text())
    assert {(r["policy"], r["gpus"], r["streams"]) for r in plain["capacity"]} == {
        ("milp", 1, 3),
        ("milp", 2, 6),
        ("none", 1, 3),
        ("none", 2, 6),
    }
    assert all(need["factor"] == 1.0 for need in plain["needs"])
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".json", ".svg", ".png"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--target", "1.5"], "--target 1.5"),
        (["--target", "0"], "--target 0"),
        (["--max-streams", "0"], "--max-streams 0"),
        (["--streams", "0"], "--streams 0"),
        (["--gpus", "1,,2"], "--gpus 1,,2: write whole numbers"),
        (["--policies", "magic"], "unknown policy 'magic'"),
    ],
)
def test_unusable_options_end_with_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    said: str,
) -> None:
    trace = write_trace(tmp_path / "trace.csv", SERVED_ONLY)
    monkeypatch.setattr("sys.argv", ["ekya-optimizer", "capacity", str(trace), *options])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_the_command_prints_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = write_trace(tmp_path / "trace.csv", SERVED_ONLY)
    argv = ["capacity", str(trace), "--gpus", "1", "--policies", "none", "--windows", "1", "--json", "--target", "0.79"]
    monkeypatch.setattr("sys.argv", ["ekya-optimizer", *argv])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code in (0, None)
    plain = json.loads(capsys.readouterr().out)
    assert plain["capacity"][0]["streams"] == 3
    assert plain["needs"] == []
