"""What the profiler keeps beside trials: gates, live accuracy, costs, share curves; files of the first schema."""

from __future__ import annotations

import json
import math
import sqlite3
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import pytest

from profiler.costs import CostModel, group_key
from profiler.history import History
from profiler.records import Outcome, StreamHistory, WindowHistory
from profiler.service import SiteProfiler
from profiler.shares import ShareRun, fit_share_curve
from profiler.slowness import learn_slowness
from profiler.targets import SiteWindow
from protocol.events import StreamAccuracy
from protocol.schema import EpochResult, Record, RetrainConfig, RetrainRun
from tests.profiler.profiler_world import INFERENCE, RETRAIN, SPEC, World

_SCHEMA_1 = """
CREATE TABLE windows (
    id INTEGER PRIMARY KEY AUTOINCREMENT, run TEXT NOT NULL, stream TEXT NOT NULL, window INTEGER NOT NULL,
    time_s REAL NOT NULL, realised REAL, predicted REAL, trial BLOB, estimate BLOB, UNIQUE (run, stream, window));
CREATE TABLE outcomes (
    window_id INTEGER NOT NULL REFERENCES windows (id), config TEXT NOT NULL, time_s REAL NOT NULL,
    accuracy_predicted REAL, accuracy_after REAL, seconds_predicted REAL, busy_s REAL, promoted INTEGER NOT NULL,
    payload BLOB NOT NULL, PRIMARY KEY (window_id, config));
PRAGMA user_version = 1;
"""


class Decision(Record, frozen=True, kw_only=True):
    stream_id: str = "north"
    window: int = 3
    stage: Literal["gate", "canary"] = "gate"
    decision: Literal["promoted", "refused", "rolled_back"] = "promoted"
    retrain_id: str = "full-e8-d100"
    version: int = 4
    confidence: float | None = 0.93
    reason: str = "14 : 3 of 40 road users: better"
    votes: tuple[int, int] = (14, 3)


def profiler(path: Path, *, run: str = "") -> SiteProfiler:
    return SiteProfiler(
        History(path, run=run), RETRAIN, INFERENCE, num_streams=1, budget_gpu_s=5.0, wall_clock=lambda: 1000.0
    )


def play(site: SiteProfiler, world: World, windows: range) -> None:
    for window in windows:
        trial = world.trial(window, (RETRAIN[4], RETRAIN[10]))
        site.estimate(SPEC, trial, world.dataset(window))
        outcome = world.outcome(window, RETRAIN[3 + 8 * (window % 2)])
        site.retrained(SPEC, outcome.result, 0.8, world.gpu_seconds(outcome.result.config), True)
        site.window_closed("north", window, 0.7, 0.68)


def test_a_restarted_system_estimates_as_before(tmp_path: Path) -> None:
    world = World(3)
    first = profiler(tmp_path / "h.sqlite")
    play(first, world, range(4))
    trial, dataset = world.trial(4, (RETRAIN[4],)), world.dataset(4)
    choice = first.choose(SPEC, 4, dataset)
    second = profiler(tmp_path / "h.sqlite")
    assert second.choose(SPEC, 4, dataset) == choice
    # The same file and the same question: nothing that an estimate rests on lives in the process alone.
    assert second.estimate(SPEC, trial, dataset) == first.estimate(SPEC, trial, dataset)


def test_a_file_of_the_first_schema_is_read_and_goes_on(tmp_path: Path) -> None:
    path, world = tmp_path / "h.sqlite", World(5)
    outcome = world.outcome(0, RETRAIN[3])
    old = msgspec.to_builtins(outcome)
    del old["run"]  # the first schema knew no run
    with sqlite3.connect(path) as db:
        db.executescript(_SCHEMA_1)
        trial = msgspec.msgpack.encode(world.trial(0, (RETRAIN[4],)))
        db.execute("INSERT INTO windows VALUES (1, '', 'north', 0, 5.0, 0.6, 0.7, ?, NULL)", (trial,))
        row = (1, RETRAIN[3].config_id, 6.0, 0.8, 0.8, 4.0, 5.0, 1, msgspec.msgpack.encode(old))
        db.execute("INSERT INTO outcomes VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
    db.close()
    with History(path) as history:
        (window,) = history.view("north").windows
        assert window.outcomes == (outcome,)
        assert window.realised == 0.6
        assert history.gates("north") == ()
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (4,)
    db.close()
    assert not list(tmp_path.glob("*.corrupt*"))


def test_gate_decisions_are_kept_once_with_all_their_evidence(tmp_path: Path) -> None:
    site = profiler(tmp_path / "h.sqlite")
    canary = Decision(stage="canary", decision="rolled_back", confidence=None, reason="2 : 19: worse")
    for decision in (Decision(), Decision(), canary):
        site.record_gate(decision)
    with History(tmp_path / "h.sqlite") as history:
        gate, after = history.gates("north")
    assert (gate.stage, gate.decision, gate.version, gate.confidence) == ("gate", "promoted", 4, 0.93)
    assert json.loads(gate.evidence)["votes"] == [14, 3]
    assert (after.decision, after.confidence, after.reason) == ("rolled_back", None, "2 : 19: worse")


def test_live_accuracy_is_kept_by_model_as_with_the_best_inference_configuration(tmp_path: Path) -> None:
    site, world = profiler(tmp_path / "h.sqlite"), World(1)
    profile = site.estimate(SPEC, world.trial(0, (RETRAIN[4],)), world.dataset(0))
    relative = {p.inference_id: p.relative_accuracy for p in profile.inference}
    for version, inference, accuracy in ((1, INFERENCE[0], 0.5), (2, INFERENCE[2], 0.6), (2, INFERENCE[0], 0.7)):
        site.measured(
            StreamAccuracy(
                stream_id="north",
                window=0,
                accuracy=accuracy,
                accuracy_sum=10 * accuracy,
                num_scored=10,
                num_frames=10,
                num_analysed=10,
                num_dropped=0,
                num_objects=50,
                fps=10.0,
                latency_ms_p50=5.0,
                model_version=version,
                inference_id=inference.config_id,
            )
        )
    site.window_closed("north", 0, 0.6, 0.6)
    with History(tmp_path / "h.sqlite") as history:
        (window,) = history.view("north").windows
    assert [(row.version, row.num_frames) for row in window.live] == [(1, 10), (2, 20)]
    assert window.live[0].accuracy == pytest.approx(0.5)
    expected = min(1.0, (10 * 0.6 / relative[INFERENCE[2].config_id] + 7.0) / 20)
    assert window.live[1].accuracy == pytest.approx(expected)


def test_costs_of_the_site_are_a_running_mean_per_group_and_device(tmp_path: Path) -> None:
    key = group_key(RETRAIN[0])
    with History(tmp_path / "h.sqlite") as history:
        for seconds in (0.001, 0.003):
            cost = CostModel(startup_s=0.2, seconds_per_sample=seconds, validation_s=0.05)
            history.record_cost(key, "cpu/pacing", cost, time_s=1.0)
    with History(tmp_path / "h.sqlite") as history:
        assert history.costs("cuda/mps") == {}
        assert history.costs("cpu/pacing")[key].seconds_per_sample == pytest.approx(0.002)


def ran(
    busy_s: float,
    share: float,
    elapsed_s: float,
    *,
    stream: str = "north",
    order: int = 0,
    inside_s: float | None = None,
) -> SiteWindow:
    """A window of a stream whose one retraining was busy for ``busy_s`` and took ``elapsed_s`` at ``share``, of them
    ``inside_s`` (all of them) in its worker."""
    outcome = World(2).outcome(order, RETRAIN[10])
    run = RetrainRun(executor_id="a", device="cpu", share=share, elapsed_s=elapsed_s, work_s=share * elapsed_s)
    result = msgspec.structs.replace(outcome.result, busy_s=busy_s, seconds=inside_s or elapsed_s)
    history = WindowHistory(window=order, outcomes=(msgspec.structs.replace(outcome, result=result, run=run),))
    return SiteWindow(order=order, stream_id=stream, history=history)


@pytest.mark.parametrize(("start_s", "factor"), [(0.2, 1.0), (1.0, 1.6), (0.0, 2.5)])
def test_what_the_clock_adds_to_busy_seconds_is_learned_from_all_streams(start_s: float, factor: float) -> None:
    draw = np.random.default_rng(8)
    windows = []
    for index in range(12):
        busy_s, share = float(draw.uniform(0.5, 6.0)), float(draw.choice([0.2, 0.4, 0.7]))
        elapsed_s = (start_s + factor * busy_s / share) * math.exp(0.05 * draw.normal())
        windows.append(ran(busy_s, share, elapsed_s, stream=f"s{index % 4}", order=index // 4))
    found = learn_slowness(windows)
    for busy_s, share in ((0.8, 0.5), (3.0, 0.5), (6.0, 0.5)):
        assert found.work_s(busy_s) == pytest.approx(share * (start_s + factor * busy_s / share), rel=0.1)


def test_waiting_for_a_share_is_not_taken_for_slowness_even_where_most_of_a_window_waited() -> None:
    def waited(order: int, wait_s: float) -> list[SiteWindow]:
        return [
            ran(1.0 + i, 0.5, 2.2 * (1.0 + i) + wait_s, stream=f"s{i}", order=order, inside_s=2.2 * (1.0 + i))
            for i in range(4)
        ]

    calm = [*waited(0, 0.2), *waited(1, 0.2)]
    found, after = learn_slowness(calm), learn_slowness([*calm, *waited(2, 3.0)])
    assert found.factor == pytest.approx(1.1, abs=0.05)
    assert found.start_s == pytest.approx(0.25, abs=0.15)
    assert after.factor == pytest.approx(found.factor, abs=0.03)
    assert after.start_s == pytest.approx(found.start_s, abs=0.1)
    # What stays so is learned.
    assert learn_slowness([*calm, *(w for order in (2, 3, 4) for w in waited(order, 3.0))]).start_s > 2.5


def test_one_retraining_that_had_to_wait_hardly_counts() -> None:
    calm = [ran(1.0 + 0.3 * i, 0.5, 0.3 + 1.1 * (1.0 + 0.3 * i) / 0.5, stream=f"s{i}") for i in range(6)]
    waited = ran(1.0, 0.5, 0.3 + 1.1 * 1.0 / 0.5 + 3.0, stream="s9")
    expected = learn_slowness(calm).work_s(1.5)
    assert learn_slowness([*calm, waited]).work_s(1.5) == pytest.approx(expected, rel=0.06)


def test_a_machine_that_has_become_busy_is_noticed_within_a_window() -> None:
    calm = [ran(2.0, 0.5, 4.2, stream=f"s{i}", order=order) for order in range(4) for i in range(3)]
    busy = [ran(2.0, 0.5, 9.0, stream=f"s{i}", order=4) for i in range(3)]
    assert learn_slowness(calm).factor == pytest.approx(1.0, abs=0.08)
    assert learn_slowness([*calm, *busy]).factor > 1.4
    assert learn_slowness([]).work_s(3.0) == 3.0, "nothing is added to what nothing is known of"


def _one_window(world: World, *, trial_of: object, outcome: Outcome) -> StreamHistory:
    from profiler.microprofiler import estimate_in_detail
    from protocol.schema import TrialResult

    assert isinstance(trial_of, TrialResult)
    estimate = estimate_in_detail(
        SPEC, trial_of, world.dataset(0), RETRAIN, INFERENCE, StreamHistory(stream_id="north")
    )
    row = WindowHistory(window=0, trial=trial_of, estimate=estimate, outcomes=(outcome,))
    return StreamHistory(stream_id="north", windows=(row,))


def test_trials_that_come_in_pieces_are_one_window_of_experience(tmp_path: Path) -> None:
    world = World(5)
    whole, pieces = profiler(tmp_path / "whole.sqlite"), profiler(tmp_path / "pieces.sqlite")
    for site in (whole, pieces):
        play(site, World(3), range(2))
    trial, dataset = world.trial(2, (RETRAIN[4], RETRAIN[10])), world.dataset(2)
    look = msgspec.structs.replace(trial, retrain=(), inference=())
    pieces.estimate(SPEC, look, dataset)
    pieces.estimate(SPEC, msgspec.structs.replace(trial, inference=()), dataset)
    assert pieces.estimate(SPEC, trial, dataset) == whole.estimate(SPEC, trial, dataset)


def test_the_next_cost_is_what_the_retraining_of_its_kind_took_and_not_what_the_trial_let_expect(
    tmp_path: Path,
) -> None:
    site, world, config = profiler(tmp_path / "h.sqlite"), World(7), RETRAIN[4]
    site.estimate(SPEC, world.trial(0, (RETRAIN[4], RETRAIN[10])), world.dataset(0))
    result = world.outcome(0, config).result
    epochs = tuple(EpochResult(epoch=e, accuracy=0.7, loss=1.0, busy_s=0.3) for e in range(config.epochs + 1))
    result = msgspec.structs.replace(
        result, epochs=epochs, busy_s=4.0 + 0.3 * config.epochs, seconds=2 * 4.1 + 0.6 * config.epochs
    )
    work_s = 4.2 + 0.3 * config.epochs
    run = RetrainRun(executor_id="a", device="cpu/pacing", share=0.5, elapsed_s=2 * work_s, work_s=work_s)
    site.retrained(SPEC, result, 0.8, 1.0, True, run=run)
    found = site.estimate(SPEC, world.trial(1, (RETRAIN[4], RETRAIN[10])), world.dataset(1))
    cost = next(p.gpu_seconds for p in found.retrain if p.retrain_id == config.config_id)
    assert cost == pytest.approx(work_s, rel=0.05)


# ---------------------------------------------------------------- phi


def runs(exponent: float, shares: tuple[float, ...], seed: int, noise: float = 0.05) -> list[ShareRun]:
    draw = np.random.default_rng(seed)
    return [
        ShareRun(share=r, seconds=10.0 * r**-exponent * 1.2 * math.exp(noise * draw.normal()), gpu_seconds=10.0)
        for r in shares
    ]


@pytest.mark.parametrize("exponent", [1.0, 0.7, 0.5])
def test_the_share_curve_is_found_from_a_dozen_retrainings(exponent: float) -> None:
    curve = fit_share_curve(runs(exponent, (0.1, 0.2, 0.3, 0.5, 0.8, 1.0) * 2, seed=4))
    assert curve is not None
    assert curve.exponent == pytest.approx(exponent, abs=0.06)
    assert curve.differs == (exponent < 1.0)
    assert curve.points[-1] == (1.0, 1.0)
    assert all(a < b for (_, a), (_, b) in zip(curve.points, curve.points[1:], strict=False))


def test_a_student_that_waits_for_its_host_needs_no_share_as_measured_on_an_h100() -> None:
    path = Path(__file__).parent.parent / "executor" / "transcripts" / "h100-driver-580.json"
    checks = json.loads(path.read_bytes())["checks"]
    measured = next(
        c["details"] for c in checks if "phi" in c["details"].get("100_percent", {}).get("edge_cnn_train_b32", ())
    )
    for student in ("edge_cnn_train_b32", "resnet18_train_b32", "resnet18_train_b256"):
        phi = {int(name.split("_")[0]) / 100.0: row[student]["phi"] for name, row in measured.items()}
        # Three retrainings at each share, as if they took what the measured throughput says.
        ran = [ShareRun(share=r, seconds=10.0 / phi[r], gpu_seconds=10.0) for r in phi for _ in range(3)]
        curve = fit_share_curve(ran)
        assert curve is not None
        assert curve.differs
        assert curve.exponent < 0.25
        for share, value in phi.items():
            assert dict(curve.points)[share] == pytest.approx(value, abs=0.25), (student, share)


def test_retrainings_at_one_share_say_nothing_about_the_curve() -> None:
    assert fit_share_curve(runs(0.5, (0.4,) * 20, seed=1)) is None
    assert fit_share_curve(runs(0.5, (0.1, 0.9), seed=1)) is None


def test_one_starved_retraining_does_not_bend_the_curve() -> None:
    held_up = ShareRun(share=0.1, seconds=4000.0, gpu_seconds=10.0)
    curve = fit_share_curve([*runs(1.0, (0.1, 0.2, 0.3, 0.5, 0.8, 1.0) * 2, seed=6), held_up])
    assert curve is not None
    assert curve.exponent > 0.9


def test_a_measured_share_curve_survives_a_restart_and_reaches_the_planner(tmp_path: Path) -> None:
    site, world = profiler(tmp_path / "h.sqlite"), World(7)
    for window, share in enumerate((0.1, 0.2, 0.4, 0.6, 0.8, 1.0)):
        config = RetrainConfig(config_id=f"c{window}", epochs=4)
        result = msgspec.structs.replace(world.outcome(window, config).result)
        run = RetrainRun(executor_id="a", device="cuda/mps", share=share, elapsed_s=5.0 * share**-0.6, work_s=5.0)
        site.retrained(SPEC, result, 0.8, 5.0, True, run=run)
    again = profiler(tmp_path / "h.sqlite")
    assert dict(again.share_efficiency("cuda/mps"))[0.5] == pytest.approx(0.5**0.6, abs=0.03)
    assert again.share_efficiency("cpu/pacing") == ()
