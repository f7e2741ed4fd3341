"""``make gpu-check`` without a GPU: the transcript says why, and every MPS check runs against the model of the control
program, with clients that work on a core. What it finds is then known beforehand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from executor.gpu_check.__main__ import CHECKS, run_checks
from executor.gpu_check.bench import Bench, gap_of
from executor.gpu_check.clients import Clients
from executor.gpu_check.transcript import Details, SkipCheckError, Transcript
from executor.shares.nvml import find_gpu
from protocol.errors import DeviceError

MODEL = Path(__file__).with_name("mps_control_model.py")


def no_gpu() -> bool:
    try:
        find_gpu(0)
    except DeviceError:
        return True
    return False


@pytest.mark.process
@pytest.mark.skipif(not no_gpu(), reason="this machine has a GPU: run make gpu-check")
def test_without_a_gpu_every_check_is_skipped_with_a_reason(tmp_path: Path) -> None:
    out = tmp_path / "t.json"
    done = subprocess.run(
        [sys.executable, "-m", "executor.gpu_check", "--out", str(out)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 4, done.stderr
    transcript = json.loads(out.read_text())
    assert transcript["finished"]
    assert [check["name"] for check in transcript["checks"]] == [name for name, *_ in CHECKS]
    skipped = [check for check in transcript["checks"] if check["name"] != "machine"]
    assert all(check["status"] == "skipped" and check["reason"] for check in skipped)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--out", "/nowhere/t.json"], "--out"),
        (["--out", "t.json", "--only", "nonsense"], "nonsense"),
        (["--out", "t.json", "--seconds", "0"], "--seconds"),
    ],
)
def test_wrong_arguments_end_with_code_2(tmp_path: Path, arguments: list[str], named: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "executor.gpu_check", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 2
    assert named in done.stderr


def test_a_check_that_fails_or_hangs_stops_nothing(tmp_path: Path) -> None:
    transcript = Transcript(tmp_path / "t.json", 60.0)

    def hangs(details: Details) -> None:
        details["found"] = 1
        time.sleep(60.0)

    def breaks(details: Details) -> None:
        raise ValueError("broken")

    def skips(details: Details) -> None:
        raise SkipCheckError("no such thing here")

    def tidy() -> None:
        raise OSError("cannot tidy up")

    assert not transcript.run("hangs", hangs, 0.3, 0.0, tidy)
    assert not transcript.run("breaks", breaks, 5.0, 0.0, lambda: None)
    assert not transcript.run("skips", skips, 5.0, 0.0, lambda: None)
    assert not transcript.run("late", skips, 5.0, 100.0, lambda: None)
    assert transcript.run("works", lambda details: None, 5.0, 0.0, lambda: None)
    checks = json.loads((tmp_path / "t.json").read_text())["checks"]
    assert [check["status"] for check in checks] == ["failed", "failed", "skipped", "skipped", "passed"]
    assert checks[0]["details"] == {"found": 1}
    assert "CheckTimeoutError" in checks[0]["reason"]
    assert checks[0]["tidy"] == "OSError: cannot tidy up"
    assert "seconds" in checks[3]["reason"]


def test_a_lost_frame_and_a_gap_are_seen() -> None:
    found = gap_of([[0, 0.0, 0.01], [1, 0.1, 0.11]], [[3, 0.3, 0.35], [4, 0.4, 0.41]], 10.0)
    assert found["frames_lost"] == 1
    assert found["added_ms"] == 140.0


@pytest.fixture(scope="module")
def transcript(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A whole run against the model."""
    root = tmp_path_factory.mktemp("gc")
    program = root / "nvidia-cuda-mps-control"
    program.write_text(f"#!{Path(sys.executable).resolve()} -IS\n" + MODEL.read_text())
    program.chmod(0o755)
    bench = Bench(
        Transcript(root / "t.json", 1000.0),
        Clients("cpu:0", "tests.executor.gpu_check_client:main", "tests.executor.gpu_check_client"),
        "GPU-1",
        str(program),
        num_units=132,
        measure_s=0.05,
        matrix=32,
        nets=("edge_cnn",),
        rounds=1,
        queries=2,
        watch_s=0.5,
        percentages=(100, 20),
        directory=str(root / "m"),
        worker="tests.executor.problem_worker:main",
        extra={"MPS_MODEL": str(program)},
    )
    run_checks(bench, skip=("mps_many", "machine", "pacing", "mps_two_at_half", "mps_fault_assert"))
    found: dict[str, Any] = json.loads((root / "t.json").read_text())
    return {check["name"]: check for check in found["checks"]}


@pytest.mark.process
@pytest.mark.timeout(300)
def test_every_check_passes_against_the_model(transcript: dict[str, Any]) -> None:
    failed = {name: check["reason"] for name, check in transcript.items() if check["status"] != "passed"}
    assert not failed


@pytest.mark.process
def test_the_check_finds_what_the_model_is_known_to_do(transcript: dict[str, Any]) -> None:
    table = transcript["mps_table"]["details"]["percent_to_units"]
    assert table["100"] == 132
    assert table["50"] == 66
    assert table["12.5"] == 16
    assert transcript["mps_unreachable"]["details"]["runs_silently_without_mps"]
    assert transcript["mps_memory_cap"]["details"]["capped"]
    killed = transcript["mps_killed"]["details"]
    assert killed["server_states"][-1][1] == "FAULT"
    assert killed["brought_back_by"] == "all clients leaving"
    terminated = transcript["mps_terminate_busy"]["details"]
    assert terminated["terminate_client_succeeded"]
    assert terminated["brought_back_by"].startswith("nothing")
    assert not terminated["stream"]["hurt"]
    for row in transcript["mps_hand_over"]["details"]["hand_overs"]:
        assert row["frames_lost"] == row["frames_twice"] == 0
    workers = transcript["mps_workers"]["details"]
    assert (workers["worker_1"]["num_units"], workers["worker_2"]["num_units"]) == (26, 78)
    commands = transcript["mps_attach"]["commands"]
    assert any(entry["command"].startswith("get_client_list") and entry["exit_code"] == 0 for entry in commands)
