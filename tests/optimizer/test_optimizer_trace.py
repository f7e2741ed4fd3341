"""Traces and inference tables: what is read, what is refused, and how streams are drawn."""

from __future__ import annotations

from pathlib import Path

import pytest

from optimizer.trace_reuse import ReuseTable, load_reuse
from optimizer.traces import (
    BUILT_IN_TABLE,
    COLUMNS,
    PREDICTED,
    PROFILING,
    draw_streams,
    load_inference_table,
    load_trace,
    parse_list,
)
from protocol.errors import InputError
from tests.optimizer.tiny_trace import random_rows, row, write_trace

HEADER = ",".join(COLUMNS)
GOOD = "a,1,0,5,0.5,0.9,20,0.9,20,10"


def test_windows_are_ordered_and_the_serving_accuracy_is_the_mean_over_a_window(tmp_path: Path) -> None:
    rows = [row(window=2, before=0.7), row(window=1, before=0.5), row(window=1, config=3, before=0.6)]
    trace = load_trace(write_trace(tmp_path / "t.csv", rows))
    first, second = trace.cities["a"]
    assert first.accuracy_now == pytest.approx(0.55)
    assert [r.retrain_id for r in first.retrainings] == ["c0e5", "c3e5"]
    assert second.accuracy_now == 0.7


def test_further_columns_and_blank_lines_and_a_byte_order_mark_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(f"\ufeff{HEADER},note\n{GOOD},hello\n\n")
    assert load_trace(path).cities["a"][0].retrainings[0].gpu_seconds == 20.0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "line 1: column city is missing"),
        (HEADER.replace("gpu_seconds,", "") + "\n", "line 1: column gpu_seconds is missing"),
        (HEADER + ",city\n", "column city appears more than once"),
        (HEADER + "\n", "holds no retrainings"),
        (f"{HEADER}\n{GOOD}\na,1,1,5,0.5,lots,20,0.9,20,10\n", "line 3, column accuracy_after: 'lots' is not a number"),
        (f"{HEADER}\na,1,1,5,0.5,nan,20,0.9,20,10\n", "line 2, column accuracy_after: 'nan' is not a finite number"),
        (f"{HEADER}\na,1,1,5,0.5,1.2,20,0.9,20,10\n", "line 2, column accuracy_after: 1.2 is out of range"),
        (f"{HEADER}\na,1,1,5,-0.1,0.5,20,0.9,20,10\n", "column accuracy_before: -0.1 is out of range"),
        (f"{HEADER}\na,1,1,5,0.5,0.9,0,0.9,20,10\n", "column gpu_seconds: 0 is out of range; allowed: above 0"),
        (f"{HEADER}\na,1,1,5,0.5,0.9,20,0.9,-3,10\n", "column gpu_seconds_predicted: -3 is out of range"),
        (f"{HEADER}\na,1.5,1,5,0.5,0.9,20,0.9,20,10\n", "column window: 1.5 is not a whole number"),
        (f"{HEADER}\na,0,1,5,0.5,0.9,20,0.9,20,10\n", "column window: 0 is out of range"),
        (f"{HEADER}\n,1,1,5,0.5,0.9,20,0.9,20,10\n", "column city: is empty"),
        (f"{HEADER}\n{GOOD}\n{GOOD}\n", "line 3, column config: repeats line 2"),
        (f"{HEADER}\na,1,1\n", "line 2: 3 values where 10 are due"),
    ],
)
def test_a_bad_trace_is_refused_with_file_line_and_column(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(InputError) as refused:
        load_trace(path)
    assert str(path) in str(refused.value)
    assert said in str(refused.value)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        load_trace(tmp_path / "missing.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(InputError, match="not UTF-8"):
        load_trace(tmp_path / "binary.csv")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("subsampling\n1\n", "no column besides subsampling"),
        ("n,c1\n1,1\n", "column subsampling is missing"),
        ("subsampling,c1\n", "holds no rows"),
        ("subsampling,c1\n2,0.5\n", "line 2, column subsampling: is 2; the first row must be 1"),
        ("subsampling,c1\n1,1\n1,0.9\n", "line 3, column subsampling: is 1 after 1"),
        ("subsampling,c1\n1,1\n2,1.5\n", "line 3, column c1: 1.5 is out of range"),
    ],
)
def test_a_bad_inference_table_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "table.csv"
    path.write_text(text)
    with pytest.raises(InputError) as refused:
        load_inference_table(path)
    assert said in str(refused.value)


def test_the_table_is_linear_between_rows_and_nothing_beyond(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("subsampling,c1,c2\n1,1,1\n2,0.8,0.6\n4,0.4,0.2\n")
    table = load_inference_table(path)
    assert table.relative_accuracy(0, 1.5) == pytest.approx(0.9)
    assert table.relative_accuracy(1, 3.0) == pytest.approx(0.4)
    assert table.relative_accuracy(1, 4.1) == 0.0
    assert BUILT_IN_TABLE.relative_accuracy(0, 1.0) == 1.0


@pytest.mark.parametrize("seed", range(5))
def test_a_draw_begins_with_every_smaller_draw_and_repeats_cities_only_beyond_their_number(
    tmp_path: Path, seed: int
) -> None:
    trace = load_trace(write_trace(tmp_path / "t.csv", random_rows(1, num_cities=5)))
    many = draw_streams(trace, BUILT_IN_TABLE, 20, seed)
    for count in (1, 3, 5, 8):
        assert draw_streams(trace, BUILT_IN_TABLE, count, seed) == many[:count]
    assert len({stream.city for stream in many[:5]}) == 5
    assert len({stream.stream_id for stream in many}) == 20
    assert many == draw_streams(trace, BUILT_IN_TABLE, 20, seed)


def test_another_seed_draws_other_streams(tmp_path: Path) -> None:
    trace = load_trace(write_trace(tmp_path / "t.csv", random_rows(1)))
    draws = {tuple(s.city for s in draw_streams(trace, BUILT_IN_TABLE, 6, seed)) for seed in range(10)}
    assert len(draws) > 5


def test_city_names_become_usable_stream_names(tmp_path: Path) -> None:
    trace = load_trace(write_trace(tmp_path / "t.csv", [row("Bad Homburg/v.d.H. ö")]))
    (stream,) = draw_streams(trace, BUILT_IN_TABLE, 1, 0)
    assert stream.stream_id == "s00-Bad_Homburg_v.d.H._"


def test_lists_of_numbers() -> None:
    assert parse_list("8,2,2", "--gpus", int) == (2, 8)
    with pytest.raises(InputError, match="--gpus 2,x: write whole numbers"):
        parse_list("2,x", "--gpus", int)


def test_columns_in_any_order_quoted_and_with_windows_line_ends_say_the_same(tmp_path: Path) -> None:
    plain = load_trace(write_trace(tmp_path / "t.csv", random_rows(3)))
    lines = (tmp_path / "t.csv").read_text().splitlines()
    order = [4, 9, 0, 2, 7, 1, 3, 8, 6, 5]
    rows = [[line.split(",")[i] for i in order] for line in lines]
    text = "\r\n".join(",".join(f'"{cell}"' for cell in (*cells, "more")) for cells in rows) + "\r\n"
    path = tmp_path / "other.csv"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert load_trace(path).cities == plain.cities


@pytest.mark.parametrize("missing", ["accuracy_after_predicted", "gpu_seconds_predicted", "microprofile_seconds"])
def test_what_only_some_studies_need_may_be_missing(tmp_path: Path, missing: str) -> None:
    header, cells = HEADER.split(","), GOOD.split(",")
    kept = [i for i, name in enumerate(header) if name != missing]
    path = tmp_path / "t.csv"
    path.write_text("\n".join(",".join(row[i] for i in kept) for row in (header, cells)) + "\n")
    trace = load_trace(path)
    assert trace.missing == (missing,)
    option, columns = ("--profiling", (PROFILING,)) if missing == PROFILING else ("--predicted", PREDICTED)
    with pytest.raises(InputError, match=f"{option}: .* has no column {missing}"):
        trace.need(columns, option)


REUSE = "city,window,from_city,from_window,accuracy,class_distance,time_distance\n"


def reuse_table(tmp_path: Path, text: str) -> ReuseTable:
    trace = load_trace(write_trace(tmp_path / "t.csv", [row("a"), row("a", 2), row("b"), row("b", 2)]))
    path = tmp_path / "reuse.csv"
    path.write_text(text)
    return load_reuse(path, trace)


def test_old_models_are_picked_by_accuracy_age_and_distance(tmp_path: Path) -> None:
    table = reuse_table(tmp_path, REUSE + "a,2,a,1,0.6,0.3,5\na,2,b,1,0.8,0.1,9\na,2,a,0,0.7,0.9,1\n")
    assert table.policies == ("reuse", "reuse:latest", "reuse:class", "reuse:time")
    picked = {name: table.pick(name, "a", 2) for name in table.policies}
    assert [old.accuracy for old in picked.values() if old is not None] == [0.8, 0.6, 0.8, 0.7]
    assert table.pick("reuse", "b", 2) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (REUSE, "holds no old models"),
        (REUSE.replace("accuracy,", ""), "column accuracy is missing"),
        (REUSE + "c,2,a,1,0.6,0,0\n", "column city: 'c' is not in"),
        (REUSE + "a,3,a,1,0.6,0,0\n", "column window: .* has no window 3 of a"),
        (REUSE + "a,2,b,2,0.6,0,0\n", "column from_window: 2 is not before window 2"),
        (REUSE + "a,2,b,1,6,0,0\n", "column accuracy: 6 is out of range"),
        (REUSE + "a,2,b,1,0.6,-1,0\n", "column class_distance: -1 is out of range"),
        (REUSE.replace("class", "by class") + "a,2,b,1,0.6,1,0\n", "column by class_distance"),
    ],
)
def test_a_bad_table_of_old_models_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        reuse_table(tmp_path, text)
