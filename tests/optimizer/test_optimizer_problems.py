"""Random problems have the promised figures; files are checked strictly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from optimizer.objective import upper_bound_trivial
from optimizer.policies.registry import get_policy
from optimizer.problems import check_problem, load_problem, parse_size, random_problem, save_problem
from protocol.errors import InputError
from protocol.plan import InferenceProfile, Problem, StreamProfile
from protocol.schema import GpuSpec


@pytest.mark.parametrize("seed", range(5))
def test_random_problems_have_the_promised_figures(seed: int) -> None:
    problem = random_problem(10, 8, 18, seed)
    assert (len(problem.streams), len(problem.gpus), problem.window_s, problem.share_quantum) == (10, 8, 200.0, 0.1)
    costs = [p.gpu_seconds for s in problem.streams for p in s.retrain]
    assert min(costs) >= 3.0
    assert max(costs) <= 315.0
    assert max(costs) / min(costs) > 30
    for stream in problem.streams:
        assert len(stream.retrain) == 18
        assert 0.30 <= stream.accuracy_now <= 0.75
        assert stream.inference[0].gpu_share_needed == 0.25
        assert stream.inference[0].relative_accuracy == 1.0
        gains = [p.accuracy_after - stream.accuracy_now for p in stream.retrain]
        assert min(gains) >= 0.0
        assert max(gains) <= 0.5 + 1e-9
        for group in range(6):
            short, middle, long = (stream.retrain[3 * group + i] for i in range(3))
            assert short.accuracy_after <= middle.accuracy_after <= long.accuracy_after
            first = (middle.accuracy_after - short.accuracy_after) / (middle.gpu_seconds - short.gpu_seconds)
            second = (long.accuracy_after - middle.accuracy_after) / (long.gpu_seconds - middle.gpu_seconds + 1e-9)
            assert second <= first + 1e-6
    check_problem(problem)


def test_the_same_seed_gives_the_same_problem() -> None:
    assert random_problem(4, 2, 7, 3) == random_problem(4, 2, 7, 3)
    assert random_problem(4, 2, 7, 3) != random_problem(4, 2, 7, 4)
    assert len(random_problem(4, 2, 7, 3).streams[0].retrain) == 7


@pytest.mark.parametrize("seed", range(3))
def test_random_problems_are_contended(seed: int) -> None:
    problem = random_problem(10, 8, 18, seed)
    best = get_policy("milp")(problem, 20.0)
    assert best.report.value < upper_bound_trivial(problem) - 0.005
    assert best.report.value > get_policy("none")(problem, 20.0).report.value + 0.02
    assert len({a.retrain.retrain_id for a in best.assignments if a.retrain}) > 2


def test_a_saved_problem_is_the_same_when_read(tmp_path: Path) -> None:
    problem = random_problem(3, 2, 5, 1)
    save_problem(problem, tmp_path / "p.json")
    assert load_problem(tmp_path / "p.json") == problem


@pytest.mark.parametrize("text", ["", "10x8", "10x8x18x2", "ax8x18", "0x8x18", "10x0x18", "-1x2x3", "1e1x2x3"])
def test_sizes_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="size"):
        parse_size(text)


def test_sizes_are_read() -> None:
    assert parse_size("10x8x18") == (10, 8, 18)


def changed(path: Path, change: Callable[[Any], None]) -> Path:
    save_problem(random_problem(2, 2, 3, 1), path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


def setter(*keys: Any) -> Callable[[Any], None]:
    """Set the value at the path ``keys[:-1]`` to ``keys[-1]``."""

    def change(content: Any) -> None:
        for key in keys[:-2]:
            content = content[key]
        content[keys[-2]] = keys[-1]

    return change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (setter("streams", 0, "accuracy_now", 1.5), "accuracy_now"),
        (setter("streams", 0, "accuracy_now", float("nan")), "p.json"),
        (setter("streams", 0, "accuracy_now", "0.5"), "accuracy_now"),
        (setter("streams", 0, "accuracy", 0.5), "accuracy"),
        (setter("window_s", 0), "window_s"),
        (setter("share_quantum", 0), "share_quantum"),
        (setter("format", "ekya-problem/9"), "format"),
        (setter("gpus", []), "gpus"),
        (setter("streams", []), "streams"),
        (setter("streams", 1, "stream_id", "s0"), "stream_id 's0'"),
        (setter("gpus", 1, "gpu_id", "gpu0"), "gpu_id 'gpu0'"),
        (setter("streams", 0, "inference", 1, "inference_id", "every1"), "inference_id 'every1'"),
        (setter("streams", 0, "retrain", 1, "retrain_id", "c0e5"), "retrain_id 'c0e5'"),
        (setter("streams", 0, "retrain", 1, "pinned_gpu", "gpu9"), "pinned_gpu"),
        (setter("streams", 0, "inference", 0, "gpu_share_needed", 1e999), "p.json"),
        (setter("gpus", 0, "share_efficiency", [[0.5, 0.6], [0.2, 0.3]]), "share_efficiency"),
        (setter("gpus", 0, "share_efficiency", [[0.5, 0.0]]), "share_efficiency"),
        (setter("gpus", 0, "speed", -1.0), "speed"),
    ],
)
def test_a_bad_problem_file_is_refused_with_file_and_field(
    change: Callable[[Any], None], named: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        load_problem(changed(tmp_path / "p.json", change))
    assert "p.json" in str(caught.value)
    assert named in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"[" * 100_000])
def test_a_file_that_is_no_problem_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_bytes(content)
    with pytest.raises(InputError, match=r"p\.json"):
        load_problem(tmp_path / "p.json")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        load_problem(tmp_path / "none.json")
    with pytest.raises(InputError, match="cannot be written"):
        save_problem(random_problem(1, 1, 1, 0), tmp_path / "none" / "p.json")


def test_numbers_made_in_code_are_checked_as_well() -> None:
    infinite = InferenceProfile(inference_id="i", gpu_share_needed=float("inf"), relative_accuracy=1.0)
    stream = StreamProfile(stream_id="s", accuracy_now=0.5, inference=(infinite,))
    with pytest.raises(InputError, match="gpu_share_needed"):
        check_problem(Problem(window_s=1.0, gpus=(GpuSpec(gpu_id="g"),), streams=(stream,)))
