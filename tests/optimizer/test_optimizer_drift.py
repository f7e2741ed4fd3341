"""The drift detector on made-up signals, and what a sudden drift sets going in the coordinator."""

from __future__ import annotations

import numpy as np
import pytest

from optimizer.config import DriftConfig
from optimizer.drifting import BLOCK_S, REFERENCE_BLOCKS, Detector
from optimizer.ports import Measured
from optimizer.simulator import Simulation
from protocol.events import DriftScored, PlanSolved, RetrainFinished, StreamAccuracy
from protocol.schema import StreamSignals
from tests.optimizer.coordinator_world import TestWorld, simulation, site


def street(seed: int, num_seconds: int, *, change_s: int | None = None, **change: float) -> list[StreamSignals]:
    """Signals of a street a second: crops that stay in view for some seconds, so that seconds resemble each other."""
    draw = np.random.default_rng(seed)
    found, wander = [], np.zeros(5)
    for second in range(num_seconds):
        wander = 0.8 * wander + 0.6 * draw.normal(0.0, 1.0, 5)
        changed = change_s is not None and second >= change_s
        light = 0.45 + (change.get("light", 0.0) if changed else 0.0)
        sure = 0.8 + (change.get("confidence", 0.0) if changed else 0.0)
        buses = 0.1 + (change.get("buses", 0.0) if changed else 0.0)
        counts = draw.multinomial(8, [buses, 0.3, 0.7 - buses])
        found.append(
            StreamSignals(
                num_objects=8,
                confidence=float(np.clip(sure + 0.04 * wander[0], 0.0, 1.0)),
                class_counts=tuple(int(n) for n in counts),
                look=tuple(float(np.clip(light + 0.02 * w, 0.0, 1.0)) for w in wander[1:]),
            )
        )
    return found


def alarms(signals: list[StreamSignals]) -> list[int]:
    detector = Detector()
    found = []
    for second, signal in enumerate(signals):
        report = detector.add(signal, 1.0)
        if report is not None and report.alarm:
            found.append(second)
            detector.reset()
    return found


def test_a_street_that_stays_as_it_is_raises_hardly_an_alarm() -> None:
    hours = sum(len(alarms(street(seed, 600))) for seed in range(60)) / (60 * 600 / 3600)
    assert hours <= 2.0, "false alarms per hour of stream, seeds 0 to 59"


@pytest.mark.parametrize("change", [{"light": -0.2}, {"confidence": -0.3}, {"buses": 0.6}])
def test_a_sudden_change_of_light_of_confidence_or_of_the_mix_is_noticed_within_seconds(
    change: dict[str, float],
) -> None:
    delays = []
    for seed in range(20):
        found = [a for a in alarms(street(seed, 160, change_s=100, **change)) if a >= 100]
        delays.append(found[0] - 100 if found else 1000)
    assert np.median(delays) <= 20
    assert max(delays) <= 40


def test_the_score_says_how_far_the_stream_has_drifted() -> None:
    scores = []
    for light in (0.0, -0.08, -0.3):
        detector = Detector()
        for signal in street(5, 100, change_s=60, light=light):
            detector.add(signal, 1.0)
        scores.append(detector.report.score)
    assert 0.0 <= scores[0] < 0.3 < scores[2] <= 1.0
    assert scores[0] < scores[1] < scores[2]


def test_nothing_is_said_before_there_is_a_reference_and_empty_streets_are_no_drift() -> None:
    detector = Detector()
    reports = [detector.add(signal, 1.0) for signal in street(1, int(BLOCK_S * REFERENCE_BLOCKS))]
    assert not any(reports)


# ---------------------------------------------------------------- in the coordinator


def until_executing(config: DriftConfig) -> tuple[Simulation, TestWorld]:
    run, world, _ = simulation(site(num_streams=1, drift=config), num_windows=None)
    while run.coordinator.state.window < 1 or run.coordinator.state.phase != "executing":
        run.run(until_s=run.now + 0.5)
    return run, world


def serve(run: Simulation, signals: list[StreamSignals]) -> None:
    """A second of virtual time per report of s0's worker."""
    for signal in signals:
        run.run(until_s=run.now + 1.0)
        event = StreamAccuracy(
            stream_id="s0",
            window=run.coordinator.state.window,
            accuracy=None,
            accuracy_sum=0.0,
            num_scored=0,
            num_frames=10,
            num_analysed=10,
            num_dropped=0,
            num_objects=8,
            fps=10.0,
            latency_ms_p50=1.0,
            model_version=1,
            inference_id="full",
            signals=signal,
        )
        run.give(Measured(event=event))


def test_a_sudden_drift_has_the_stream_labelled_profiled_and_planned_in_the_same_window() -> None:
    run, world = until_executing(DriftConfig(label_s=5.0, least_left=0.1))
    window = run.coordinator.state.window
    serve(run, street(3, 45, change_s=25, light=-0.3))
    told = [e for e in run.events if isinstance(e, DriftScored) and e.alarm]
    assert len(told) == 1
    assert told[0].signal.startswith("look")
    run.run(until_s=run.now + 15.0)
    assert run.coordinator.state.window == window
    assert [job for job in world.started if job.startswith("label/") and job.endswith("/drift")]
    assert [job for job in world.started if job.startswith("trial/") and job.endswith("/drift")]
    reasons = [e.reason for e in run.events if isinstance(e, PlanSolved) and e.window == window]
    assert any("drifts" in reason for reason in reasons)
    assert any("was profiled after its drift" in reason for reason in reasons)
    assert run.peak_share <= 1.0 + 1e-9
    state = run.coordinator.state.streams["s0"]
    assert state.alarm is None
    assert state.drift is not None


def test_late_in_a_window_or_when_switched_off_a_drift_waits_for_the_next_one() -> None:
    for config in (DriftConfig(react=False), DriftConfig(least_left=0.95)):
        run, world = until_executing(config)
        serve(run, street(3, 45, change_s=25, light=-0.3))
        assert [e for e in run.events if isinstance(e, DriftScored) and e.alarm]
        assert not [job for job in world.started if job.endswith("/drift")]


def test_every_window_ends_with_a_score_and_the_next_one_begins_afresh() -> None:
    run, _ = until_executing(DriftConfig(react=False))
    window = run.coordinator.state.window
    serve(run, street(4, 30))
    run.run(until_s=run.coordinator.window_end_s() + 3.0)
    scored = [e for e in run.events if isinstance(e, DriftScored) and e.window == window and not e.alarm]
    assert len(scored) == 1
    assert scored[0].score < 0.5
    run.run(until_s=run.now + 200.0)
    assert [e for e in run.events if isinstance(e, RetrainFinished) and e.window > window]
