"""A site on a label budget, with real processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.events import LabelsCollected, LabelsSpent
from tests.integration.rig import SITE, Rig

pytestmark = [pytest.mark.process, pytest.mark.timeout(240)]

BUDGET = """
[labels]
budget_gpu_s = 0.06
allocation = "adaptive"
min_frames = 4

[stream_defaults]
"""


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path, window_s=10.0, site=SITE.replace("\n[stream_defaults]\n", BUDGET))
    yield made
    made.close()


def test_a_site_labels_within_its_budget_and_says_what_that_told_and_cost(rig: Rig) -> None:
    optimizer, executor = rig.optimizer("--windows", "3"), rig.executor(0, "--wait", "120")
    assert optimizer.wait(210) == 0, rig.log("optimizer")
    assert executor.wait(20) == 0
    collected = [e for e in rig.events(LabelsCollected) if e.window > 0]
    assert collected, "a busy machine may drop a stream's labels, but not all"
    for event in collected:
        assert 0 < event.num_frames < 18, "the label rate asks for 18"
        assert event.uniform_share == 0.4
        assert event.golden_s > 0.0
        assert event.agreement is not None
        assert 0.0 <= event.agreement_low <= event.agreement <= event.agreement_high <= 1.0
    spent = rig.events(LabelsSpent)
    assert [e.window for e in spent] == [0, 1, 2]
    for account in spent:
        assert account.budget_gpu_s is not None
        # What a frame costs is known from the labels before; a busy machine makes it dearer.
        assert account.labels_s + account.trials_s + account.canary_s <= 3.0 * 0.06
    page = (rig.out / "report.html").read_text(encoding="utf-8")
    assert "Drift and golden labels" in page
    assert "Busy seconds of golden models" in page
