"""Comparing policies: the rows, the JSON, the files, and what it refuses."""

from __future__ import annotations

import io
import json
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from optimizer.compare import compare
from optimizer.objective import judge
from optimizer.problems import load_problem, random_problem, save_problem
from protocol.errors import InputError
from protocol.plan import Plan

FIELDS = {"problem", "policy", "feasible", "value", "bound", "gap", "seconds", "status"}


def console() -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, width=80), text


def test_json_rows_have_exactly_the_promised_fields(tmp_path: Path) -> None:
    out, text = console()
    save = tmp_path / "p.json"
    compare(
        [],
        random="5x2x9",
        seed=1,
        save=save,
        policies=["milp", "thief", "uniform", "none"],
        as_json=True,
        plan_out=tmp_path / "plans",
        console=out,
    )
    rows = json.loads(text.getvalue())
    assert [row["policy"] for row in rows] == ["milp", "thief", "uniform", "none"]
    problem = load_problem(save)
    assert problem == random_problem(5, 2, 9, 1)
    for row in rows:
        assert set(row) == FIELDS
        assert row["feasible"] is True
        assert 0.0 < row["value"] < 1.0
        assert row["seconds"] > 0.0
        plan = msgspec.json.decode((tmp_path / "plans" / f"5x2x9-seed1-{row['policy']}.json").read_bytes(), type=Plan)
        assert judge(problem, plan).value == row["value"]
    milp, *others = rows
    assert milp["gap"] == pytest.approx((milp["bound"] - milp["value"]) / milp["bound"])
    assert all(row["gap"] is None and row["bound"] is None for row in others)
    assert all(row["value"] <= milp["bound"] for row in rows)


def test_saved_problems_are_compared_in_a_table(tmp_path: Path) -> None:
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for seed, path in enumerate(paths):
        save_problem(random_problem(3, 1, 6, seed), path)
    out, text = console()
    rows = compare(paths, policies=["thief", "fair"], console=out)
    assert len(rows) == 4
    for path in paths:
        assert f"{path}: 3 streams" in text.getvalue()
    assert "feasible" in text.getvalue()


def test_a_problem_without_a_plan_is_a_row_and_not_the_end(tmp_path: Path) -> None:
    save_problem(random_problem(12, 1, 3, 0), tmp_path / "p.json")
    out, text = console()
    compare([tmp_path / "p.json"], policies=["thief"], as_json=True, console=out)
    (row,) = json.loads(text.getvalue())
    assert (row["feasible"], row["status"], row["value"]) == (False, "failed", 0.0)


def test_wrong_input_is_refused_before_anything_is_solved(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown policy"):
        compare([], random="2x1x3", policies=["best"])
    with pytest.raises(InputError, match="at least one policy"):
        compare([], random="2x1x3", policies=[])
    with pytest.raises(InputError, match="nothing to compare"):
        compare([])
    with pytest.raises(InputError, match="--save"):
        compare([], save=tmp_path / "x.json")
    with pytest.raises(InputError, match="size"):
        compare([], random="2x1")
    with pytest.raises(InputError, match="cannot be read"):
        compare([tmp_path / "none.json"])
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--plan-out"):
        compare([], random="2x1x3", plan_out=tmp_path / "file" / "below")
