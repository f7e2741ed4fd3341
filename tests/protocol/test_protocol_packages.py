"""The packages of the program are looked for together."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import protocol
from protocol.messages import PROTOCOL_VERSION

ROOT = Path(__file__).resolve().parents[2]


def complain(first: Path) -> str:
    """What the check says when ``first`` is searched before the checkout."""
    path = os.pathsep.join([str(first), str(ROOT)])
    code = "from protocol.packages import check_packages; check_packages()"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        cwd=first,
        capture_output=True,
        check=False,
    )
    return run.stderr.decode()


def test_packages_from_one_directory_are_fine(tmp_path: Path) -> None:
    assert complain(tmp_path) == ""


def test_a_foreign_package_in_front_of_ours_is_named(tmp_path: Path) -> None:
    (tmp_path / "profiler").mkdir()
    (tmp_path / "profiler" / "__init__.py").touch()
    told = complain(tmp_path)
    assert "InputError" in told
    assert f"profiler from {tmp_path}" in told


@pytest.mark.parametrize("package", ["optimizer", "executor"])
def test_every_command_says_its_version_and_needs_nothing_else_for_it(package: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"{package}.cli", "--version"], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == f"ekya-{package} {protocol.__version__} (protocol {PROTOCOL_VERSION})\n"


@pytest.mark.parametrize(("asked", "used"), [(None, "1"), ("3", "3")])
def test_matrices_of_the_optimizer_take_one_thread_unless_told_otherwise(asked: str | None, used: str) -> None:
    code = (
        "import os, sys, optimizer.cli\n"
        "assert 'numpy' not in sys.modules, 'it would be read too late'\n"
        "sys.argv = ['ekya-optimizer', '--version']\n"
        "try:\n    optimizer.cli.main()\n"
        "finally:\n    print(os.environ['OPENBLAS_NUM_THREADS'])\n"
    )
    env = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    if asked is not None:
        env["OPENBLAS_NUM_THREADS"] = asked
    run = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == used
