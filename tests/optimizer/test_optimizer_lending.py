"""What nobody was promised of a GPU is lent to serving."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimizer.lending import lent
from optimizer.simulator import SimulatedExecutor
from protocol import messages as m
from protocol.schema import (
    CheckpointRef,
    CitySource,
    DatasetRef,
    GpuSpec,
    InferenceConfig,
    RetrainConfig,
    StreamSpec,
)
from tests.optimizer.coordinator_world import simulation, site


def _stream(name: str) -> StreamSpec:
    return StreamSpec(stream_id=name, source=CitySource(seed=1), classes=("a", "b"))


def serving(name: str, share: float) -> m.InferenceJob:
    model = CheckpointRef(path="m", sha256="0" * 64, stream_id=name, version=1)
    config = InferenceConfig(config_id="full")
    return m.InferenceJob(
        job_id=f"serve/{name}", stream=_stream(name), share=share, config=config, checkpoint=model, position_s=0.0
    )


def retraining(name: str, share: float) -> m.RetrainJob:
    labels = DatasetRef(path="d", stream_id=name, window=0, num_train=10, num_validation=5, class_counts=(8, 7))
    return m.RetrainJob(
        job_id=f"retrain/{name}",
        stream=_stream(name),
        share=share,
        window=0,
        dataset=labels,
        checkpoint=None,
        config=RetrainConfig(config_id="all", epochs=1),
        next_version=2,
    )


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 100)), max_size=12))
def test_serving_gets_what_is_free_and_nothing_is_promised_twice(drawn: list[tuple[bool, int]]) -> None:
    jobs: list[m.Job] = []
    free = 100
    for number, (serves, hundredths) in enumerate(drawn):
        if hundredths <= free:
            free -= hundredths
            make = serving if serves else retraining
            jobs.append(make(f"s{number}", hundredths / 100))
    found = lent(jobs)
    assert [job.job_id for job in found] == [job.job_id for job in jobs]
    total = math.fsum(job.share for job in jobs)
    assert math.fsum(job.share for job in found) <= max(0.95, total) + 1e-9
    for before, after in zip(jobs, found, strict=True):
        assert after.share >= before.share
        assert after.share == before.share or isinstance(after, m.InferenceJob)
    num_serving = sum(isinstance(job, m.InferenceJob) for job in jobs)
    if num_serving and total <= 0.9:
        assert math.fsum(job.share for job in found) > 0.95 - 0.01 * (num_serving + 1e-6)


def test_it_is_lent_in_proportion() -> None:
    first, second, third = lent([serving("a", 0.1), retraining("b", 0.25), serving("c", 0.2)])
    assert (first.share, second.share, third.share) == pytest.approx((0.1 + 0.13, 0.25, 0.2 + 0.26))


@pytest.mark.parametrize("lends", [True, False])
def test_an_executor_that_can_change_shares_live_is_lent_all_and_no_plan_notices(lends: bool) -> None:
    run, world, _ = simulation(site(2), join=False, num_windows=2)
    executor = SimulatedExecutor(GpuSpec(gpu_id="gpu0"), world, can_resize_live=lends)
    run.join(executor)
    more = 0
    for _ in range(2000):
        if run.finish is not None:
            break
        run.run(until_s=run.now + 0.5)
        assert executor.granted() <= 1.0 + 1e-9
        planned = {s.stream_id: s.serving_share for s in run.coordinator.state.streams.values()}
        more += any(job.share > planned[job.stream.stream_id] + 0.02 for job in executor.serving.values())
    assert run.finish is not None
    assert bool(more) is lends
