"""The worked example: what the docs say of the paper's Table 1 is what policies make of it, and right by hand."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "worked_example.py"
# Window averages worked out on paper, per policy: (A, B) in window 1 and in window 2.
HAND = {
    "timeline": (
        ((115 * 0.65 + 5 * 0.70) / 120, (50 * 0.50 + 70 * 0.85) / 120),
        ((40 * 0.70 + 80 * 0.90) / 120, (110 * 0.85 + 10 * 0.90) / 120),
    ),
    "milp": ((0.65, (50 * 0.50 + 70 * 0.85) / 120), ((40 * 0.65 + 80 * 0.90) / 120, 0.85)),
    "thief": ((0.65, (50 * 0.50 + 70 * 0.85) / 120), ((40 * 0.65 + 80 * 0.90) / 120, 0.85)),
    "none": ((0.65, 0.50), (0.65, 0.50)),
    "fair": (
        (0.8 * ((65 / 0.7) * 0.65 + (120 - 65 / 0.7) * 0.70) / 120, 0.8 * 0.50),
        (0.8 * ((40 / 0.7) * 0.70 + (120 - 40 / 0.7) * 0.90) / 120, 0.8 * 0.50),
    ),
    "uniform:high:0.5": (
        (0.65, 0.8 * ((80 / 0.7) * 0.50 + (120 - 80 / 0.7) * 0.90) / 120),
        (0.8 * ((40 / 0.7) * 0.65 + (120 - 40 / 0.7) * 0.90) / 120, 0.8 * 0.90),
    ),
    "uniform": ((0.65, 0.8 * (50 * 0.50 + 70 * 0.85) / 120), ((80 * 0.65 + 40 * 0.90) / 120, 0.85)),
}


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("worked_example", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def documented() -> dict[str, tuple[float, float, float]]:
    text = (ROOT / "docs" / "formulation.md").read_text()
    section = text[text.index("## A worked example") : text.index("## Timeline plan")]
    rows = re.findall(r"^\| ([a-z:0-9.]+) \| (0\.\d{4}) \| (0\.\d{4}) \| (0\.\d{4}) \|$", section, re.MULTILINE)
    return {name: (float(first), float(second), float(both)) for name, first, second, both in rows}


@pytest.mark.parametrize("policy", HAND)
def test_every_policy_makes_of_it_what_the_docs_say_and_paper_and_pencil_confirm(policy: str) -> None:
    windows = script().both_windows(policy)
    for (_, verdict), by_hand in zip(windows, HAND[policy], strict=True):
        assert verdict.feasible
        assert [stream.value for stream in verdict.streams] == pytest.approx(by_hand, abs=1e-9)
    first, second = (verdict.value for _, verdict in windows)
    assert documented()[policy] == pytest.approx((first, second, (first + second) / 2), abs=5.1e-5)


def test_the_plan_of_timeline_is_proven_to_be_the_best() -> None:
    for plan, verdict in script().both_windows("timeline"):
        assert plan.report.status == "optimal"
        assert plan.report.bound == pytest.approx(verdict.value, abs=1e-6)


def test_the_command_of_the_docs_prints_the_table_of_the_docs() -> None:
    printed = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=True, timeout=300.0)
    for name, values in documented().items():
        assert f"| {name} | " + " | ".join(f"{value:.4f}" for value in values) + " |" in printed.stdout
    assert set(documented()) == set(script().POLICIES)
