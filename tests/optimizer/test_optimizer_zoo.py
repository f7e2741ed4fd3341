"""The zoo of earlier models: what is kept, what is looked at, what goes; and a site whose scenes come back."""

from __future__ import annotations

import hashlib
import math
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest

from optimizer import zoo
from optimizer.config import ZooConfig, parse_site
from optimizer.ports import Input, Output, Tidy
from optimizer.recorder import RunFolder
from optimizer.simulator import Simulation, exact_votes
from optimizer.state import SiteState, Situation, ZooState
from profiler.knowledge import SiteKnowledge
from profiler.records import Estimate, StreamHistory
from profiler.zoo import zoo_profiles
from protocol import messages as m
from protocol.errors import ConfigError
from protocol.events import ZooChanged
from protocol.plan import StreamProfile
from protocol.schema import (
    CheckpointRef,
    CitySource,
    Conditions,
    DatasetRef,
    LabelResult,
    RetrainResult,
    StreamSpec,
    TrialResult,
    ZooTrial,
)
from tests.optimizer.coordinator_world import COSTS, RETRAIN, TestProfiler, TestWorld, simulation, site

SPEC = StreamSpec(stream_id="s0", source=CitySource(seed=0), classes=("car", "bus"))
DAY = Conditions(class_mix=(0.9, 0.1), light=(0.6, 0.6, 0.6, 0.2))
NIGHT = Conditions(class_mix=(0.5, 0.5), light=(0.1, 0.1, 0.2, 0.1))


def checkpoint(name: str, num_bytes: int = 100, stream_id: str = "s0") -> CheckpointRef:
    sha256 = hashlib.sha256(name.encode()).hexdigest()
    return CheckpointRef(path=f"checkpoints/{name}", sha256=sha256, stream_id=stream_id, version=1, num_bytes=num_bytes)


def between(share: float) -> Conditions:
    """Conditions on the way from day (0) to night (1)."""
    mixed = [
        tuple(a + share * (b - a) for a, b in zip(x, y, strict=True))
        for x, y in ((DAY.class_mix, NIGHT.class_mix), (DAY.light, NIGHT.light))
    ]
    return Conditions(class_mix=mixed[0], light=mixed[1])


def filled(*situations: tuple[str, int, Conditions, dict[str, float]]) -> tuple[ZooState, dict[str, int]]:
    """A zoo of the models that are named, and their numbers."""
    state, numbers = ZooState(), dict[str, int]()
    for stream_id, window, conditions, accuracies in situations:
        for name in accuracies:
            if name not in numbers:
                spec = msgspec.structs.replace(SPEC, stream_id=stream_id)
                model = zoo.keep(state, spec, checkpoint(name, stream_id=stream_id), window, window, 0.9)
                numbers[name] = model.number
        known = {numbers[name]: accuracy for name, accuracy in accuracies.items()}
        zoo.note(state, Situation(stream_id=stream_id, window=window, conditions=conditions, accuracies=known))
    return state, numbers


def test_alike_stretches_are_near_and_others_far() -> None:
    assert zoo.distance(DAY, DAY) == 0.0
    assert zoo.distance(DAY, between(0.1)) < zoo.distance(DAY, between(0.5)) < zoo.distance(DAY, NIGHT)
    assert zoo.distance(DAY, NIGHT) == zoo.distance(NIGHT, DAY) > 1.0
    assert zoo.distance(DAY, Conditions(class_mix=(1.0,))) == math.inf
    assert zoo.distance(DAY, Conditions(class_mix=(0.9, 0.1))) == 0.0  # nothing is known of its pictures


def test_models_that_were_good_under_such_conditions_are_looked_at_first() -> None:
    state, numbers = filled(
        ("s0", 0, DAY, {"day": 0.9}), ("s0", 1, NIGHT, {"night": 0.85, "day": 0.3}), ("s1", 1, NIGHT, {"other": 0.8})
    )

    def found(conditions: Conditions | None, **options: object) -> list[int]:
        wanted = {"serving_sha256": "", "dataset_window": 9, "count": 3} | options
        return [model.number for model in zoo.candidates(state, SPEC, conditions, **wanted)]  # type: ignore[arg-type]

    assert found(between(0.05))[0] == numbers["day"]
    assert found(between(0.95)) == [numbers["night"], numbers["other"], numbers["day"]]
    assert found(between(0.95), count=1) == [numbers["night"]]
    # What is clearly worse than the serving model is not looked at.
    assert found(NIGHT, serving_sha256=checkpoint("night").sha256) == [numbers["other"]]
    assert found(NIGHT, serving_sha256=checkpoint("day").sha256) == [numbers["night"], numbers["other"]]
    # What was trained on these very labels knows them; the neighbour's of the same window does not.
    assert found(NIGHT, dataset_window=1) == [numbers["other"], numbers["day"]]
    assert set(found(None)) == set(numbers.values())


@pytest.mark.parametrize(
    "other",
    [{"classes": ("car", "bus", "van")}, {"task": "detection"}, {"crop_px": 32}],
    ids=lambda other: next(iter(other)),
)
def test_a_model_is_offered_only_to_streams_that_it_fits(other: dict[str, object]) -> None:
    state, _ = filled(("s0", 0, DAY, {"day": 0.9}))
    spec = msgspec.structs.replace(SPEC, **other)
    assert zoo.candidates(state, spec, DAY, serving_sha256="", dataset_window=5, count=4) == []


def test_the_same_weights_are_kept_once() -> None:
    state, numbers = filled(("s0", 0, DAY, {"day": 0.9}))
    again = zoo.keep(
        state, SPEC, msgspec.structs.replace(checkpoint("day"), version=7, path="checkpoints/again"), 4, 4, 0.5
    )
    assert (len(state.models), again.number, again.last_used) == (1, numbers["day"], 4)
    assert again.checkpoint.path == "checkpoints/again"


def test_the_only_model_for_an_old_scene_outlives_many_newer_ones_that_are_alike() -> None:
    situations = [("s0", 0, NIGHT, {"night": 0.8})]
    situations += [("s0", window, between(0.01 * window), {f"day-{window}": 0.9}) for window in range(1, 11)]
    state, numbers = filled(*situations)
    worth = zoo.usefulness(state)
    assert max(worth, key=lambda number: worth[number]) == numbers["night"]
    gone = zoo.give_up(state, 300, free=(), pinned=())
    assert len(gone) == 8
    assert numbers["night"] in {model.number for model in state.models}
    assert all(set(s.accuracies) <= {model.number for model in state.models} for s in state.situations)


@pytest.mark.parametrize("seed", range(20))
def test_the_budget_holds_and_what_is_needed_stays(seed: int) -> None:
    draw = random.Random(seed)
    print("seed", seed)
    state = ZooState()
    for number in range(draw.randrange(1, 15)):
        ref = checkpoint(f"m{number}", num_bytes=draw.randrange(1, 200))
        model = zoo.keep(state, SPEC, ref, number, number, draw.random())
        accuracies = {model.number: draw.random()}
        conditions = between(draw.random())
        zoo.note(state, Situation(stream_id="s0", window=number, conditions=conditions, accuracies=accuracies))
    everything = list(state.models)
    free = {model.checkpoint.sha256 for model in draw.sample(everything, draw.randrange(len(everything) + 1))}
    pinned = free | {model.checkpoint.sha256 for model in draw.sample(everything, draw.randrange(len(everything) + 1))}
    budget = draw.randrange(0, 800)
    gone = zoo.give_up(state, budget, free=free, pinned=pinned)
    kept = [model for model in state.models if model.checkpoint.sha256 not in free]
    assert {model.number for model in state.models} | {model.number for model in gone} == {
        model.number for model in everything
    }
    assert not {model.checkpoint.sha256 for model in gone} & pinned
    assert zoo.num_bytes(kept) <= budget or all(model.checkpoint.sha256 in pinned for model in kept)


def test_no_more_than_a_fixed_number_of_situations_is_remembered() -> None:
    state, _ = filled(("s0", 0, NIGHT, {"night": 0.8}))
    model = state.models[0]
    for window in range(1, zoo.MAX_SITUATIONS + 10):
        accuracies = {model.number: 0.5}
        situation = Situation(
            stream_id="s0", window=window, conditions=between(0.001 * (window % 7)), accuracies=accuracies
        )
        zoo.note(state, situation)
    assert len(state.situations) == zoo.MAX_SITUATIONS
    assert state.situations[0].conditions == NIGHT  # what differs is not what goes


# ---------------------------------------------------------------- a site whose scenes come back


def scene(window: int) -> Conditions:
    """Labels of window w are those of the window before it; the scene changes every two windows."""
    return DAY if (max(window, 1) - 1) // 2 % 2 == 0 else NIGHT


class TwoScenes(TestWorld):
    """A model is worth 0.9 (or what its retraining reached) in the scene that it was trained on, 0.3 in the other."""

    def __init__(self) -> None:
        super().__init__()
        self.scenes: dict[str, Conditions] = {}
        self.jobs: list[m.RetrainJob] = []

    def label(self, job: m.LabelJob) -> tuple[float, LabelResult]:
        seconds, result = super().label(job)
        return seconds, msgspec.structs.replace(result, conditions=scene(job.window))

    def retrain(self, job: m.RetrainJob) -> tuple[float, RetrainResult]:
        self.jobs.append(job)
        before = self._model(job.checkpoint, job.window) if job.checkpoint else 0.0
        if job.config.epochs == 0:
            assert job.start is not None
            after, seconds = self._model(job.start, job.window), 0.2
            taken = msgspec.structs.replace(job.start, version=job.next_version, path=f"checkpoints/{job.job_id}")
            result = RetrainResult(
                stream_id=job.stream.stream_id,
                window=job.window,
                config=job.config,
                checkpoint=taken,
                accuracy_before=before,
                accuracy_after=after,
                num_validation=80,
                epochs=(),
                busy_s=seconds,
                seconds=seconds,
                paired=exact_votes(before, after),
            )
            return seconds, result
        plain_config = next((c for c in RETRAIN if job.config.config_id.endswith(c.config_id)), job.config)
        plain = msgspec.structs.replace(job, config=plain_config)
        _, result = super().retrain(plain)
        assert result.checkpoint is not None
        self.scenes[result.checkpoint.sha256] = scene(job.window)
        reached = {"cheap": 0.6, "dear": 0.9, "bootstrap": 0.9}[plain.config.config_id]
        self.models[result.checkpoint.sha256] = (reached, job.window)
        return COSTS[plain.config.config_id], msgspec.structs.replace(
            result,
            config=job.config,
            accuracy_before=before,
            accuracy_after=reached,
            paired=exact_votes(before, reached),
            checkpoint=msgspec.structs.replace(result.checkpoint, path=f"checkpoints/{job.job_id}", num_bytes=1000),
        )

    def trial(self, job: m.TrialJob) -> tuple[float, TrialResult]:
        seconds, result = super().trial(job)
        rows = []
        for earlier in job.zoo:
            accuracy = self._model(earlier.checkpoint, job.window)
            rows.append(
                ZooTrial(
                    number=earlier.number,
                    accuracy=accuracy,
                    accuracy_low=max(0.0, accuracy - 0.1),
                    accuracy_high=min(1.0, accuracy + 0.1),
                    accuracy_serving=result.accuracy_now,
                    paired=exact_votes(result.accuracy_now, accuracy),
                    confidence=0.7,
                    busy_s=0.05,
                )
            )
        return seconds, msgspec.structs.replace(result, zoo=tuple(rows))

    def _model(self, checkpoint: CheckpointRef, window: int) -> float:
        reached, _ = self.models[checkpoint.sha256]
        return reached if self.scenes[checkpoint.sha256] == scene(window) else 0.3


class OfferingProfiler(TestProfiler):
    """As the real one: what the zoo measured becomes configurations."""

    def estimate(self, spec: StreamSpec, trial: TrialResult, dataset: DatasetRef) -> StreamProfile:
        profile = super().estimate(spec, trial, dataset)
        estimate = Estimate(
            profile=profile,
            window=trial.window,
            accuracy_validated=trial.accuracy_now,
            live_correction=0.0,
            retrain=(),
            inference=(),
        )
        history = StreamHistory(stream_id=spec.stream_id)
        offers = zoo_profiles(estimate, trial, dataset, RETRAIN, history, SiteKnowledge())
        return msgspec.structs.replace(profile, retrain=(*profile.retrain, *offers))


def two_scenes(num_windows: int = 6, state: SiteState | None = None, **changes: object) -> tuple[Simulation, TwoScenes]:
    world = TwoScenes()
    run, _, _ = simulation(
        site(2, **changes), num_windows=num_windows, world=world, state=state, profiler=OfferingProfiler()
    )
    return run, world


def collect(run: Simulation) -> list[Output]:
    """Everything that the coordinator says in a whole run."""
    outputs: list[Output] = []
    handle = run.coordinator.handle

    def listen(event: Input, now: float) -> list[Output]:
        said = handle(event, now)
        outputs.extend(said)
        return said

    run.coordinator.handle = listen  # type: ignore[method-assign]
    run.run()
    return outputs


def test_models_that_serve_or_may_again_are_never_tidied_away() -> None:
    run, _ = two_scenes(zoo=ZooConfig(max_mb=100.0))
    tidied = [output for output in collect(run) if isinstance(output, Tidy)]
    assert len(tidied) == 6
    state = run.coordinator.state
    for model in state.zoo.models:
        assert model.checkpoint.path in tidied[-1].in_use
    for stream in state.streams.values():
        assert stream.checkpoint is not None
        assert stream.checkpoint.path in tidied[-1].in_use


def test_a_scene_that_comes_back_gets_its_old_model_back_at_once_and_the_gate_judges_it() -> None:
    run, world = two_scenes(zoo=ZooConfig(max_mb=100.0))
    run.run()
    taken = [job for job in world.jobs if job.config.epochs == 0]
    assert taken, [job.config.config_id for job in world.jobs]
    for job in taken:
        assert job.start is not None
        assert job.config.config_id == f"zoo-{job.config.base}"
        assert world.scenes[job.start.sha256] == scene(job.window)
    assert 5 in {job.window for job in taken}  # the day is back
    served = {s.stream_id: s.checkpoint for s in run.coordinator.state.streams.values()}
    for stream_id in {job.stream.stream_id for job in taken if job.window == 5}:
        current = served[stream_id]
        assert current is not None
        assert world.scenes[current.sha256] == DAY


def test_what_is_kept_and_what_is_given_up_is_told() -> None:
    run, _ = two_scenes(zoo=ZooConfig(max_mb=0.0015))
    run.run()
    told = [event for event in run.events if isinstance(event, ZooChanged)]
    assert {event.change for event in told} == {"kept", "given_up"}
    state = run.coordinator.state
    serving = {s.checkpoint.sha256 for s in state.streams.values() if s.checkpoint}
    beside = [model for model in state.zoo.models if model.checkpoint.sha256 not in serving]
    assert zoo.num_bytes(beside) <= 1500


def test_without_a_zoo_nothing_is_kept_looked_at_or_deleted() -> None:
    run, world = two_scenes()  # the default
    outputs = collect(run)
    assert run.coordinator.state.zoo.models == []
    assert all(job.start is None for job in world.jobs)
    assert not any(isinstance(output, Tidy) for output in outputs)


def test_the_zoo_survives_a_restart_and_a_new_run() -> None:
    run, _ = two_scenes(num_windows=4, zoo=ZooConfig(max_mb=100.0))
    run.run()
    state = run.coordinator.state
    copy = msgspec.msgpack.decode(msgspec.msgpack.encode(state), type=SiteState)
    assert copy.zoo == state.zoo
    assert copy.zoo.models
    again = zoo.in_new_run(copy.zoo, 4)
    assert all(s.window < 0 for s in again.situations)
    assert [model.checkpoint for model in again.models] == [model.checkpoint for model in copy.zoo.models]
    assert again.last_number == copy.zoo.last_number


# ---------------------------------------------------------------- files and settings


def test_a_model_is_deleted_when_it_was_of_no_use_twice(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    names = [f"checkpoints/s0/v{number:06d}-aa.safetensors" for number in range(3)]
    for name in names:
        path = folder.store / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"weights")
        path.with_suffix(".json").write_bytes(b"{}")
    folder.tidy({names[0], names[1]})
    assert all((folder.store / name).exists() for name in names)
    folder.tidy({names[0]})
    assert [(folder.store / name).exists() for name in names] == [True, True, False]
    assert not (folder.store / names[2]).with_suffix(".json").exists()
    folder.tidy({names[0], names[1]})  # it is of use again
    folder.tidy({names[0]})
    assert (folder.store / names[1]).exists()
    folder.close()


@pytest.mark.parametrize(
    ("retrain", "words"),
    [({"epochs": 0}, "epochs: must be at least 1"), ({"epochs": 2, "base": 3}, "base: is set by the system")],
)
def test_configurations_of_a_site_file_train_and_begin_from_what_serves(
    retrain: dict[str, object], words: str, tmp_path: Path
) -> None:
    raw: dict[str, Any] = {
        "name": "site",
        "streams": [{"stream_id": "s0", "source": {"type": "city", "seed": 1}, "classes": ["car", "bus"]}],
        "inference": [{"config_id": "full"}],
        "retrain": [{"config_id": "r1", **retrain}],
    }
    with pytest.raises(ConfigError, match=rf"site.toml: retrain\[0\].{words}"):
        parse_site(raw, "site.toml", tmp_path)
    raw["retrain"] = []
    raw["zoo"] = {"max_mb": -1.0}
    with pytest.raises(ConfigError, match=r"zoo\.max_mb"):
        parse_site(raw, "site.toml", tmp_path)
