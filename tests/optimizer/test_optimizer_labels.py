"""The label budget: who gets how many frames, and that everything a golden model does is charged to it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimizer.config import LabelsConfig, load_site
from optimizer.drifting import Detector
from optimizer.label_budget import LabelNeed, allocate, need_of
from optimizer.simulator import Simulation
from protocol import messages as m
from protocol.errors import ConfigError
from protocol.events import LabelsCollected, LabelsSpent, Notice
from protocol.schema import CanaryResult, LabelResult, TrialResult
from tests.optimizer.coordinator_world import TestWorld, simulation, site

FRACTIONS = st.none() | st.floats(0.0, 1.0)


@st.composite
def needs(draw: st.DrawFn) -> list[LabelNeed]:
    return [
        LabelNeed(
            stream_id=f"s{number}",
            num_wanted=draw(st.integers(0, 60)),
            seconds_per_frame=draw(st.sampled_from([0.0, 0.01, 0.02, 0.05, 0.3])),
            drift=draw(FRACTIONS),
            accuracy=draw(FRACTIONS),
            doubt=draw(FRACTIONS),
            weight=draw(st.sampled_from([0.5, 1.0, 3.0])),
        )
        for number in range(draw(st.integers(1, 6)))
    ]


ALLOCATIONS = st.sampled_from(["uniform", "adaptive"])
CASES = {
    "streams": needs(),
    "budget_s": st.floats(0.0, 5.0),
    "allocation": ALLOCATIONS,
    "uniform_share": st.floats(0.01, 1.0),
    "min_frames": st.integers(1, 12),
}


def cost(streams: list[LabelNeed], counts: dict[str, int]) -> float:
    return sum(counts[s.stream_id] * s.seconds_per_frame for s in streams)


@settings(max_examples=300, deadline=None)
@given(**CASES)
def test_the_budget_is_never_exceeded_and_nobody_gets_more_than_the_label_rate_asks_for(
    streams: list[LabelNeed], budget_s: float, allocation: str, uniform_share: float, min_frames: int
) -> None:
    counts = allocate(
        streams,
        budget_s,
        allocation=allocation,  # type: ignore[arg-type]
        uniform_share=uniform_share,
        min_frames=min_frames,
    )
    assert set(counts) == {s.stream_id for s in streams}
    assert cost(streams, counts) <= budget_s * (1.0 + 1e-9) + 1e-9
    assert all(0 <= counts[s.stream_id] <= s.num_wanted for s in streams)
    left = budget_s - cost(streams, counts)
    hungry = [s for s in streams if counts[s.stream_id] < s.num_wanted]
    assert not hungry or left < max(s.seconds_per_frame for s in hungry) + 1e-9, "seconds lie idle"


@settings(max_examples=300, deadline=None)
@given(**CASES)
def test_every_stream_has_its_least_number_before_one_gets_more(
    streams: list[LabelNeed], budget_s: float, allocation: str, uniform_share: float, min_frames: int
) -> None:
    counts = allocate(
        streams,
        budget_s,
        allocation=allocation,  # type: ignore[arg-type]
        uniform_share=uniform_share,
        min_frames=min_frames,
    )
    least = {s.stream_id: min(min_frames, s.num_wanted) for s in streams}
    if sum(least[s.stream_id] * s.seconds_per_frame for s in streams) <= budget_s:
        assert all(counts[name] >= least[name] for name in least)
    elif any(counts[s.stream_id] < least[s.stream_id] for s in streams):
        paid = [s for s in streams if s.seconds_per_frame > 0.0]
        assert (
            all(counts[s.stream_id] <= least[s.stream_id] or s not in paid for s in streams)
            or len({s.seconds_per_frame for s in paid}) > 1
        )


@settings(max_examples=300, deadline=None)
@given(more=st.floats(0.0, 1.0), number=st.integers(0, 5), **CASES)
def test_a_stream_that_drifts_more_never_gets_less(
    streams: list[LabelNeed],
    budget_s: float,
    allocation: str,
    uniform_share: float,
    min_frames: int,
    more: float,
    number: int,
) -> None:
    which = streams[number % len(streams)]
    drift = which.drift or 0.0
    calm = msgspec.structs.replace(which, drift=drift)
    wild = msgspec.structs.replace(which, drift=drift + more * (1.0 - drift))
    counts = [
        allocate(
            [version if s is which else s for s in streams],
            budget_s,
            allocation=allocation,  # type: ignore[arg-type]
            uniform_share=uniform_share,
            min_frames=min_frames,
        )[which.stream_id]
        for version in (calm, wild)
    ]
    assert counts[0] <= counts[1]


def test_adaptive_gives_a_drifted_stream_more_and_uniform_gives_all_the_same() -> None:
    streams = [
        LabelNeed(stream_id=f"s{n}", num_wanted=40, seconds_per_frame=0.02, drift=0.9 if n == 0 else 0.0, doubt=0.2)
        for n in range(4)
    ]
    even = allocate(streams, 0.8, allocation="uniform", uniform_share=0.4, min_frames=4)
    assert set(even.values()) == {10}
    counts = allocate(streams, 0.8, allocation="adaptive", uniform_share=0.4, min_frames=4)
    assert sum(counts.values()) == 40
    assert counts["s0"] >= 18
    assert min(counts.values()) >= 4
    assert need_of(streams[0]) > 3 * need_of(streams[1])


def test_labels_are_needed_where_errors_are_to_be_expected() -> None:
    def need(**known: float) -> float:
        return need_of(LabelNeed(stream_id="a", num_wanted=9, seconds_per_frame=1.0, **known))

    assert need(accuracy=0.9, drift=0.0) == pytest.approx(0.1)
    assert need(accuracy=0.9, drift=0.5) == pytest.approx(0.55)
    assert need(accuracy=0.5, drift=0.0) > need(accuracy=0.9, drift=0.0)
    assert need(accuracy=0.9, drift=0.0, doubt=0.4) == pytest.approx(0.4), "a student that is unsure is not that good"
    assert need(accuracy=1.0, drift=0.0) > 0.0


def test_what_is_not_known_of_a_drift_counts_as_some() -> None:
    unknown, none, much = (
        LabelNeed(stream_id="a", num_wanted=9, seconds_per_frame=1.0, drift=drift) for drift in (None, 0.0, 0.9)
    )
    assert need_of(none) < need_of(unknown) < need_of(much)


# ---------------------------------------------------------------- disagreement with golden labels


def test_labels_that_disagree_with_the_model_raise_the_drift_score_by_name() -> None:
    detector = Detector()
    assert detector.labelled(0.8, 40, expected=0.82).score == 0.0
    worse = detector.labelled(0.6, 40)
    assert worse.signal == "labels"
    worst = detector.labelled(0.3, 40)
    assert 0.0 < worse.score < worst.score <= 1.0
    assert not worst.alarm
    assert detector.labelled(0.8, 40).score == 0.0


def test_few_labels_say_little_none_say_nothing_and_a_new_model_is_judged_afresh() -> None:
    scores = []
    for num_pieces in (0, 3, 300):
        detector = Detector()
        detector.labelled(0.8, 100)
        scores.append(detector.labelled(0.5, num_pieces).score)
    assert scores[0] == 0.0
    assert scores[0] < scores[1] < scores[2]
    detector = Detector()
    detector.labelled(0.8, 100)
    detector.reset(new_model=False)
    assert detector.labelled(0.5, 100).score > 0.3
    detector.reset()
    assert detector.labelled(0.5, 100).score == 0.0


# ---------------------------------------------------------------- in the coordinator


class Charging(TestWorld):
    """Every labelled frame takes 0.1 golden seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.labels: list[m.LabelJob] = []
        self.looks: list[m.CanaryJob] = []
        self.clips: list[int] = []

    def label(self, job: m.LabelJob) -> tuple[float, LabelResult]:
        seconds, result = super().label(job)
        self.labels.append(job)
        wanted = int((job.to_s - job.from_s) * job.stream.label_fps)
        num_frames = min(wanted, job.num_frames) if job.num_frames else wanted
        agreement = None if job.checkpoint is None else 0.5
        return seconds, msgspec.structs.replace(
            result, num_frames=num_frames, golden_s=0.1 * num_frames, agreement=agreement, num_pieces=9
        )

    def trial(self, job: m.TrialJob) -> tuple[float, TrialResult]:
        seconds, result = super().trial(job)
        self.clips.append(job.num_frames if job.inference else 0)
        return seconds, msgspec.structs.replace(result, golden_s=0.1 * self.clips[-1])

    def canary(self, job: m.CanaryJob) -> tuple[float, CanaryResult]:
        seconds, result = super().canary(job)
        self.looks.append(job)
        num_frames = round((job.to_s - job.from_s) * job.label_fps)
        return seconds, msgspec.structs.replace(result, num_frames=num_frames, golden_s=0.1 * num_frames)


def spent(run: Simulation) -> list[LabelsSpent]:
    return [e for e in run.events if isinstance(e, LabelsSpent)]


def run_site(labels: LabelsConfig, num_windows: int = 5) -> tuple[Simulation, Charging]:
    world = Charging()
    run, _, _ = simulation(site(num_streams=3, labels=labels), num_gpus=2, num_windows=num_windows, world=world)
    run.run(until_s=100.0 * (num_windows + 2))
    return run, world


def test_without_a_budget_label_rates_decide_and_seconds_are_only_counted() -> None:
    run, world = run_site(LabelsConfig())
    later = [job for job in world.labels if job.window > 0]
    assert later
    assert {job.num_frames for job in later} == {0}
    assert {job.uniform_share for job in later} == {1.0}
    assert all(e.budget_gpu_s is None for e in spent(run))
    assert sum(e.labels_s for e in spent(run)) == pytest.approx(0.1 * 60 * len(later))


@pytest.mark.parametrize("allocation", ["uniform", "adaptive"])
def test_labels_clips_and_comparisons_of_all_streams_stay_within_the_budget(allocation: str) -> None:
    run, world = run_site(LabelsConfig(budget_gpu_s=6.0, allocation=allocation))  # type: ignore[arg-type]
    events = spent(run)
    assert [e.window for e in events] == list(range(5))
    assert world.looks
    assert sum(e.canary_s for e in events) > 0.0
    for event in events[1:]:
        assert event.budget_gpu_s is not None
        assert event.labels_s <= 0.75 * event.budget_gpu_s + 1e-6
        # A look that began in the window before is charged here: about a frame or two of slack.
        assert event.labels_s + event.trials_s + event.canary_s <= event.budget_gpu_s + 0.5
    later = [job for job in world.labels if job.window > 0]
    assert all(8 <= job.num_frames < 60 for job in later)
    assert all(job.checkpoint is not None for job in later)
    assert {job.uniform_share for job in later} == ({0.4} if allocation == "adaptive" else {1.0})
    collected = [e for e in run.events if isinstance(e, LabelsCollected) and e.window > 0]
    assert {e.agreement for e in collected} == {0.5}
    assert all(e.golden_s > 0.0 for e in collected)


def test_a_clip_that_the_budget_does_not_pay_for_is_left_out() -> None:
    _, world = run_site(LabelsConfig(budget_gpu_s=3.0))
    assert world.clips[:3] == [10, 10, 10], "the first profile is measured whole"
    assert set(world.clips[3:]) == {0}


def test_a_budget_that_pays_for_nobody_is_said_and_the_streams_are_served_on() -> None:
    run, world = run_site(LabelsConfig(budget_gpu_s=0.25), num_windows=3)
    assert any("labels.budget_gpu_s has nothing for" in e.text for e in run.events if isinstance(e, Notice))
    assert all(job.num_frames > 0 for job in world.labels if job.window > 0)
    assert all(s.serving_executor for s in run.coordinator.state.streams.values())


# ---------------------------------------------------------------- in the site file

SITE = """
name = "yard"
streams = [{ stream_id = "gate", source = { type = "city", seed = 3 }, classes = ["person", "car"] }]
inference = [{ config_id = "full", resolution_px = 32 }]
[labels]
"""


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ("budget_gpu_s = 0.0", "labels.budget_gpu_s"),
        ('allocation = "clever"', "labels.allocation"),
        ("uniform_share = 0.0", "labels.uniform_share"),
        ("uniform_share = 1.5", "labels.uniform_share"),
        ("kept_share = 1.0", "labels.kept_share"),
        ("min_frames = 0", "labels.min_frames"),
        ("budget_s = 1.0", "budget_s"),
    ],
)
def test_a_label_budget_that_makes_no_sense_is_refused_by_its_field(tmp_path: Path, line: str, field: str) -> None:
    path = tmp_path / "site.toml"
    path.write_text(SITE + line)
    with pytest.raises(ConfigError, match=field):
        load_site(path)


def test_a_label_budget_is_read_and_left_out_it_is_no_limit(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    path.write_text(SITE)
    assert load_site(path).labels == LabelsConfig(budget_gpu_s=None, allocation="uniform")
    path.write_text(SITE + 'budget_gpu_s = 2.5\nallocation = "adaptive"\nuniform_share = 0.5')
    assert load_site(path).labels == LabelsConfig(budget_gpu_s=2.5, allocation="adaptive", uniform_share=0.5)
