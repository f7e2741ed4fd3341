"""Problems that cannot be planned end `compare` with code 2 and one line that names file, field and stream or GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from optimizer import cli
from optimizer.checks import check_quantum
from optimizer.planner import Planner
from optimizer.problems import check_problem, random_problem, save_problem
from protocol.errors import InputError, PlanError
from protocol.plan import CloudProfile, Problem
from protocol.schema import LinkSpec

CLOUD = {
    "retrain_id": "c",
    "link_id": "x",
    "accuracy_after": 0.5,
    "up_bytes": 1,
    "cloud_seconds": 1,
    "down_bytes": 1,
}


def refused(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that `compare` ends with."""
    monkeypatch.setattr("sys.argv", ["ekya-optimizer", "compare", str(path)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    captured = capsys.readouterr()
    assert ended.value.code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith(f"ekya-optimizer: {path}: ")
    return captured.err.partition(f"{path}: ")[2]


@pytest.mark.parametrize(
    ("keys", "value", "named"),
    [
        (("streams", 1, "retrain", 0, "gpu_seconds"), -3, "streams[s1].retrain[c0e5].gpu_seconds"),
        (("streams", 1, "retrain", 0, "gpu_seconds"), 0, "streams[s1].retrain[c0e5].gpu_seconds"),
        (("streams", 1, "retrain", 0, "gpu_seconds"), 1e300, "streams[s1].retrain[c0e5].gpu_seconds"),
        (("streams", 1, "accuracy_now"), float("nan"), "streams[s1].accuracy_now: nan"),
        (("streams", 1, "weight"), float("inf"), "streams[s1].weight: inf"),
        (("streams", 1, "weight"), 1e300, "streams[s1].weight"),
        (("streams", 1, "weight"), 1e-300, "streams[s1].weight"),
        (("streams", 1, "min_accuracy"), 1.2, "streams[s1].min_accuracy"),
        (("streams", 1, "max_latency_s"), 0, "streams[s1].max_latency_s"),
        (("streams", 1, "window_s"), -2, "streams[s1].window_s"),
        (("streams", 1, "serving_gpu"), "gpu77", "streams[s1].serving_gpu: there is no GPU 'gpu77'"),
        (("streams", 1, "inference"), [], "streams[s1].inference"),
        (("streams", 1, "retrain"), None, "streams[s1].retrain"),
        (("streams", 1, "accuracy_now"), "0.5", "streams[s1].accuracy_now"),
        (("streams", 1, "acc"), 1, "unknown field `acc`"),
        (("streams", 1, "cloud"), [CLOUD], "streams[s1].cloud[c].link_id: there is no link 'x'"),
        (("streams", 0, "inference", 0, "gpu_share_needed"), -1, "streams[s0].inference[every1].gpu_share_needed"),
        (("streams", 0, "inference", 0, "latency_s"), -1, "streams[s0].inference[every1].latency_s"),
        (("streams", 1, "stream_id"), "s0", "stream_id 's0' appears more than once"),
        (("streams", 1, "retrain", 1, "retrain_id"), "c0e5", "streams[s1].retrain"),
        (("streams",), [], "streams: "),
        (("gpus",), [], "gpus: "),
        (("gpus", 1, "gpu_id"), "gpu0", "gpu_id 'gpu0' appears more than once"),
        (("gpus", 1, "reserved_share"), 1.5, "gpus[gpu1].reserved_share"),
        (("gpus", 0, "memory_bytes"), 10**40, "gpus[gpu0].memory_bytes"),
        (("gpus", 0, "speed"), 1e-200, "gpus[gpu0].speed"),
        (("gpus", 0, "share_efficiency"), [[0.5, 0.7], [0.2, 0.9]], "gpus[gpu0].share_efficiency"),
        (("share_quantum",), 0.3, "share_quantum: 0.3 does not divide a GPU"),
        (("share_quantum",), 0.7, "share_quantum: 0.7 does not divide a GPU"),
        (("share_quantum",), 1e-7, "share_quantum"),
        (("share_quantum",), 2, "share_quantum"),
        (("num_slots",), 10**9, "num_slots"),
        (("window_s",), -1, "window_s"),
        (("window_s",), 1e12, "window_s"),
        (("planning_quantile",), 0.9, "planning_quantile"),
        (("label_budget_s",), -1, "label_budget_s"),
        (("links",), [{"link_id": "wan", "up_bytes_per_s": -5, "down_bytes_per_s": 1}], "links[wan].up_bytes_per_s"),
        (("links",), [{"link_id": "wan", "up_bytes_per_s": 1, "down_bytes_per_s": 0}], "links[wan].down_bytes_per_s"),
        (("links",), [{"link_id": "w", "up_bytes_per_s": 1, "down_bytes_per_s": 1e300}], "links[w].down_bytes_per_s"),
        (("format",), "ekya-problem/9", "format: "),
        (("format",), 3, "format: "),
    ],
)
def test_a_bad_field_is_named_with_its_stream_or_gpu(
    keys: tuple[Any, ...],
    value: Any,
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "p.json"
    save_problem(random_problem(2, 2, 3, 1), path)
    content = json.loads(path.read_text())
    node = content
    for key in keys[:-1]:
        node = node[key]
    node[keys[-1]] = value
    path.write_text(json.dumps(content))
    assert named in refused(path, monkeypatch, capsys)


def text_of_a_problem(tmp_path: Path) -> str:
    save_problem(random_problem(2, 2, 3, 1), tmp_path / "good.json")
    return (tmp_path / "good.json").read_text()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda text: b"", "is empty"),
        (lambda text: b" \n", "is empty"),
        (lambda text: (text + " xyz").encode(), "trailing"),
        (lambda text: (text + text).encode(), "trailing"),
        (lambda text: text[:300].encode(), "is not JSON"),
        (lambda text: text.encode("utf-16"), "is not JSON"),
        (lambda text: bytes(range(256)), "is not JSON"),
        (lambda text: b"a = 1\n", "is not JSON"),
        (lambda text: b"[]", "object"),
        (lambda text: b"null", "object"),
        (lambda text: b"[" * 200_000, "object"),
        (lambda text: b'{"streams":' * 50_000 + b"1" + b"}" * 50_000, "streams"),
        (lambda text: text.replace("200.0", "1e999", 1).encode(), "window_s"),
        (lambda text: text.replace("200.0", "-Infinity", 1).encode(), "window_s: -inf"),
    ],
)
def test_a_file_that_holds_no_problem_says_what_it_is(
    make: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.json"
    path.write_bytes(make(text_of_a_problem(tmp_path)))
    assert said in refused(path, monkeypatch, capsys)


def test_a_folder_and_a_missing_file_are_no_problems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "cannot be read" in refused(tmp_path, monkeypatch, capsys)
    assert "cannot be read" in refused(tmp_path / "none.json", monkeypatch, capsys)


def with_stream(**fields: Any) -> Problem:
    problem = random_problem(2, 2, 3, 1)
    return msgspec.structs.replace(
        problem, streams=(problem.streams[0], msgspec.structs.replace(problem.streams[1], **fields))
    )


BAD_LINK = LinkSpec(link_id="w", up_bytes_per_s=-1.0, down_bytes_per_s=1.0)
MADE_IN_CODE = [
    (with_stream(accuracy_now=1.5), "streams[s1].accuracy_now"),
    (with_stream(weight=-1.0), "streams[s1].weight"),
    (with_stream(max_latency_s=float("nan")), "streams[s1].max_latency_s"),
    (with_stream(stream_id=""), "stream_id"),
    (with_stream(serving_gpu="gone"), "streams[s1].serving_gpu"),
    (msgspec.structs.replace(with_stream(), gpus=()), "gpus"),
    (msgspec.structs.replace(with_stream(), links=(BAD_LINK,)), "links[w].up_bytes_per_s"),
    (with_stream(cloud=(msgspec.convert(CLOUD, CloudProfile),)), "streams[s1].cloud[c].link_id"),
]


@pytest.mark.parametrize(("problem", "named"), MADE_IN_CODE)
def test_problems_made_in_code_are_checked_at_the_planners_door(problem: Problem, named: str) -> None:
    with pytest.raises(InputError) as caught:
        check_problem(problem)
    assert named in str(caught.value)
    with Planner("thief", 1.0) as planner, pytest.raises(PlanError) as failed:
        planner.solve(problem)
    assert named in str(failed.value)


@pytest.mark.parametrize("quantum", [1.0, 0.5, 1 / 3, 0.333, 0.25, 0.1, 0.05, 1 / 7, 0.033, 0.01, 0.001])
def test_quanta_that_divide_a_gpu_are_taken(quantum: float) -> None:
    check_quantum(quantum, "share_quantum")
