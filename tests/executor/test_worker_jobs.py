"""Real worker processes, started as an executor starts them, on a stream that costs nothing."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

import msgspec
import pytest
import torch

from executor import worker
from executor.learning import checkpoints
from executor.learning.models import build_student
from executor.links import (
    Command,
    EpochDone,
    JobBroken,
    JobDone,
    Progress,
    Ready,
    Report,
    SetInference,
    SetShare,
    StartJob,
    StopJob,
    StreamStats,
    SwapModel,
    Swapped,
    SwapRefused,
)
from protocol.codec import decode, encode
from protocol.messages import CanaryJob, InferenceJob, Job, LabelJob, RetrainJob, TrialJob
from protocol.schema import (
    CanaryResult,
    CheckpointRef,
    DatasetRef,
    InferenceConfig,
    LabelResult,
    RetrainConfig,
    RetrainResult,
    StreamSpec,
    StudentSpec,
    TrialResult,
)
from tests.executor import tiny_source

pytestmark = pytest.mark.process

R = TypeVar("R")
CORE = min(os.sched_getaffinity(0))
STREAM = tiny_source.spec(fps=40.0, student=StudentSpec(head_width=8))
CONFIG = InferenceConfig(config_id="every", resolution_px=16)


def enter(connection: Connection) -> None:
    """What the executor's forkserver child runs, with the tiny source in the place of a camera."""
    worker.main(connection, tiny_source.TinySource)


class Running:
    """One worker process and its pipe."""

    def __init__(
        self,
        store: Path,
        job: Job,
        device: str = f"cpu:{CORE}",
        pace: bool = True,
        target: Callable[[Connection], None] = enter,
        **more: object,
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["executor.preload", "tests.executor.tiny_source"])
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=target, args=(theirs,))
        self.process.start()
        theirs.close()
        self.reports: list[Report] = []
        self.send(StartJob(job=job, store=str(store), device=device, pace=pace, stats_interval_s=0.2, **more))  # type: ignore[arg-type]

    def send(self, command: Command) -> None:
        self.connection.send_bytes(encode(command))

    def until(self, kind: type[R], where: Callable[[R], bool] = lambda _: True, within_s: float = 40.0) -> R:
        """The next report of a kind; all others before it are kept as well."""
        deadline = time.monotonic() + within_s
        while (left := deadline - time.monotonic()) > 0:
            if not self.connection.poll(left):
                break
            try:
                report = decode(self.connection.recv_bytes(), Report)
            except EOFError:
                break
            self.reports.append(report)
            if isinstance(report, kind) and where(report):
                return report
            if isinstance(report, JobBroken) and kind is not JobBroken:
                break
        raise AssertionError(f"no {kind.__name__}; reports: {self.reports[-8:]}, exit code {self.process.exitcode}")

    def exit_code(self, within_s: float = 20.0) -> int | None:
        self.process.join(within_s)
        return self.process.exitcode

    def all(self, kind: type[R]) -> list[R]:
        return [report for report in self.reports if isinstance(report, kind)]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    running: list[Running] = []

    def begin(job: Job, **options: object) -> Running:
        running.append(Running(tmp_path, job, **options))  # type: ignore[arg-type]
        return running[-1]

    yield begin
    for each in running:
        if each.process.is_alive():
            each.process.kill()
        each.process.join(10)
        each.connection.close()


def save(store: Path, version: int, seed: int = 0, classes: tuple[str, ...] = tiny_source.CLASSES) -> CheckpointRef:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    student = build_student(StudentSpec(head_width=8), len(classes))
    return checkpoints.save(store, student, stream_id=STREAM.stream_id, version=version, classes=classes, crop_px=16)


def inference_job(store: Path, share: float = 1.0, stream: StreamSpec = STREAM) -> InferenceJob:
    return InferenceJob(
        job_id="serve", stream=stream, share=share, config=CONFIG, checkpoint=save(store, 1), position_s=100.0
    )


def label_job(**options: object) -> LabelJob:
    stream = tiny_source.spec(student=StudentSpec(head_width=8), **options)  # type: ignore[arg-type]
    return LabelJob(job_id="label", stream=stream, share=1.0, window=0, from_s=-10.0, to_s=10.0)


def retrain_job(dataset: DatasetRef, **options: object) -> RetrainJob:
    config = {"config_id": "full", "epochs": 3, "batch_size": 16, "head_width": 8, "learning_rate": 3e-3}
    return RetrainJob(
        job_id="retrain",
        stream=STREAM,
        share=1.0,
        window=0,
        dataset=dataset,
        checkpoint=None,
        config=RetrainConfig(**(config | options)),  # type: ignore[arg-type]
        next_version=1,
    )


def labelled(begin: Callable[..., Running]) -> DatasetRef:
    result = begin(label_job()).until(JobDone).result
    assert isinstance(result, LabelResult)
    return result.dataset


# ---------------------------------------------------------------- the four kinds of jobs


def test_a_stream_is_labelled_bootstrapped_profiled_and_served(tmp_path: Path, start: Callable[..., Running]) -> None:
    labelling = start(label_job(label_s=0.002))
    done = labelling.until(JobDone).result
    assert isinstance(done, LabelResult)
    assert done.num_frames == 80
    assert labelling.all(Ready)
    assert labelling.exit_code() == 0

    retraining = start(retrain_job(done.dataset))
    result = retraining.until(JobDone).result
    assert isinstance(result, RetrainResult)
    assert result.checkpoint is not None
    assert result.accuracy_after > 0.7
    assert [done.epoch.epoch for done in retraining.all(EpochDone)] == [0, 1, 2, 3]
    assert retraining.exit_code() == 0

    trial = TrialJob(
        job_id="trial",
        stream=STREAM,
        share=1.0,
        window=0,
        dataset=done.dataset,
        checkpoint=result.checkpoint,
        retrain=(result.config,),
        inference=(CONFIG,),
        data_share=0.2,
        num_epochs=1,
        num_frames=20,
        clip_end_s=10.0,
    )
    trials = start(trial).until(JobDone).result
    assert isinstance(trials, TrialResult)
    assert trials.accuracy_now == result.accuracy_after
    assert (len(trials.retrain), len(trials.inference)) == (1, 1)

    job = msgspec.structs.replace(inference_job(tmp_path), checkpoint=result.checkpoint)
    serving = start(job)
    serving.until(Ready)
    serving.until(StreamStats, lambda stats: stats.num_dropped == 0 and stats.num_frames > 3)
    stats = serving.until(StreamStats, lambda stats: stats.num_scored > 3)
    assert stats.accuracy_sum / stats.num_scored > 0.6
    assert (stats.inference_id, stats.model_version, stats.conditions) == ("every", 1, "test light")
    serving.send(StopJob(reason="test"))
    assert serving.exit_code() == 0


# ---------------------------------------------------------------- serving


def test_a_canary_compares_two_models_and_names_one_that_is_lost(tmp_path: Path, start: Callable[..., Running]) -> None:
    model = inference_job(tmp_path).checkpoint
    job = CanaryJob(
        job_id="canary",
        stream=STREAM,
        share=0.5,
        window=1,
        from_s=20.0,
        to_s=25.0,
        label_fps=2.0,
        candidate=model,
        previous=model,
    )
    canary = start(job)
    result = canary.until(JobDone).result
    assert isinstance(result, CanaryResult)
    assert result.num_frames == 10
    assert result.paired.num_objects > 0
    assert result.paired.num_won == result.paired.num_lost == 0
    assert canary.exit_code() == 0
    lost = msgspec.structs.replace(model, path="checkpoints/none.safetensors")
    assert start(msgspec.structs.replace(job, candidate=lost)).until(JobBroken).kind == "checkpoint"


def test_frames_keep_coming_at_the_streams_rate_and_none_is_lost(tmp_path: Path, start: Callable[..., Running]) -> None:
    serving = start(inference_job(tmp_path, share=0.5))
    serving.until(Ready)
    begun = time.monotonic()
    for config_id in ("a", "b", "c"):
        serving.send(SetInference(config=InferenceConfig(config_id=config_id, frame_interval=4, resolution_px=8)))
        serving.until(StreamStats, lambda stats, wanted=config_id: stats.inference_id == wanted)  # type: ignore[misc]
    serving.send(StopJob(reason="test"))
    elapsed = time.monotonic() - begun
    with pytest.raises(AssertionError):
        serving.until(JobDone)
    stats = serving.all(StreamStats)
    total = sum(each.num_frames for each in stats)
    # Nothing is lost at changes: frames counted are those of the stream's clock, up to the second that may queue.
    assert total >= 40.0 * elapsed - 60
    assert all(each.num_analysed <= each.num_frames // 4 + 1 for each in stats if each.inference_id != "every")


def test_a_worker_without_enough_share_drops_frames_and_counts_them(
    tmp_path: Path, start: Callable[..., Running]
) -> None:
    config = InferenceConfig(config_id="large", resolution_px=96)
    serving = start(msgspec.structs.replace(inference_job(tmp_path, share=0.05), config=config))
    serving.until(Ready)
    stats = serving.until(StreamStats, lambda stats: stats.num_dropped > 5)
    assert stats.num_analysed + stats.num_dropped <= stats.num_frames
    serving.send(SetShare(share=1.0))  # is answered in the middle of a long rest
    serving.until(StreamStats, lambda stats: stats.num_dropped == 0 and stats.num_analysed > 3)


def test_a_rest_of_many_seconds_reports_progress_and_can_be_stopped(start: Callable[..., Running]) -> None:
    job = msgspec.structs.replace(label_job(label_s=0.1), share=0.002)
    labelling = start(job)
    counts = [labelling.until(Progress).count for _ in range(4)]
    assert counts == sorted(set(counts))
    labelling.send(SetShare(share=0.003))
    assert labelling.until(Progress, lambda progress: progress.share == 0.003).count >= counts[-1]
    labelling.send(StopJob(reason="test"))
    assert labelling.exit_code() == 0


def test_models_are_swapped_one_after_the_other_and_a_corrupt_one_never_serves(
    tmp_path: Path, start: Callable[..., Running]
) -> None:
    serving = start(inference_job(tmp_path))
    serving.until(StreamStats)
    serving.send(SwapModel(checkpoint=save(tmp_path, 2, seed=2)))
    swapped = serving.until(Swapped)
    assert swapped.version == 2
    assert swapped.gap_ms > 0

    corrupt = save(tmp_path, 3, seed=3)
    path = tmp_path / corrupt.path
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    serving.send(SwapModel(checkpoint=corrupt))
    refused = serving.until(SwapRefused)
    assert refused.version == 3
    assert "SHA-256" in refused.reason
    assert serving.until(StreamStats, lambda stats: stats.num_analysed > 0).model_version == 2

    serving.send(SwapModel(checkpoint=save(tmp_path, 4, classes=("other", "things", "here"))))
    assert "its classes are" in serving.until(SwapRefused).reason

    serving.send(SwapModel(checkpoint=save(tmp_path, 5, seed=5)))
    assert serving.until(Swapped).version == 5
    assert serving.until(StreamStats, lambda stats: stats.num_analysed > 0).model_version == 5
    dropped = sum(stats.num_dropped for stats in serving.all(StreamStats)[2:])
    assert dropped == 0


# ---------------------------------------------------------------- ends


def test_a_worker_leaves_when_its_executor_is_gone(tmp_path: Path, start: Callable[..., Running]) -> None:
    serving = start(inference_job(tmp_path))
    serving.until(StreamStats)
    serving.connection.close()
    assert serving.exit_code() == 0


def test_a_termination_signal_ends_a_worker_at_once(tmp_path: Path, start: Callable[..., Running]) -> None:
    serving = start(inference_job(tmp_path))
    serving.until(StreamStats)
    os.kill(serving.process.pid or 0, signal.SIGINT)  # is the executor's to answer
    serving.until(StreamStats)
    os.kill(serving.process.pid or 0, signal.SIGTERM)
    assert serving.exit_code(5.0) == -signal.SIGTERM


def test_a_stopped_retraining_hands_in_its_best_model_so_far(start: Callable[..., Running]) -> None:
    retraining = start(retrain_job(labelled(start), epochs=1000))
    retraining.until(EpochDone, lambda done: done.epoch.epoch == 1)
    retraining.send(StopJob(reason="test"))
    result = retraining.until(JobDone).result
    assert isinstance(result, RetrainResult)
    assert result.checkpoint is not None
    assert "stopped in epoch" in result.reason
    assert retraining.exit_code() == 0


# ---------------------------------------------------------------- what can be wrong


@pytest.mark.parametrize(
    ("device", "text"),
    [("cpu:4096", "core 4096"), ("tpu:0", "cpu:K"), ("cuda:99", "cuda:99")],
)
def test_a_device_that_does_not_exist_is_named(
    tmp_path: Path, start: Callable[..., Running], device: str, text: str
) -> None:
    broken = start(inference_job(tmp_path), device=device).until(JobBroken)
    assert broken.kind == "device"
    assert text in broken.reason


def test_a_source_that_cannot_be_opened_is_the_users_input(tmp_path: Path, start: Callable[..., Running]) -> None:
    stream = msgspec.structs.replace(STREAM, stream_id="missing")
    serving = start(msgspec.structs.replace(inference_job(tmp_path), stream=stream))
    broken = serving.until(JobBroken)
    assert (broken.kind, broken.reason) == ("input", "stream missing: video nowhere.mp4: no such file")
    assert serving.exit_code() == 0


def test_a_training_that_diverges_is_reported_as_such(tmp_path: Path, start: Callable[..., Running]) -> None:
    broken = start(retrain_job(labelled(start), learning_rate=10.0)).until(JobBroken)
    assert broken.kind == "diverged"
    assert not list(tmp_path.glob("checkpoints/**/*.safetensors"))


def test_a_missing_checkpoint_is_reported_as_such(tmp_path: Path, start: Callable[..., Running]) -> None:
    job = inference_job(tmp_path)
    (tmp_path / job.checkpoint.path).unlink()
    assert start(job).until(JobBroken).kind == "checkpoint"


def test_memory_that_runs_out_is_reported_as_such(tmp_path: Path, start: Callable[..., Running]) -> None:
    config = InferenceConfig(config_id="huge", resolution_px=640)
    stream = msgspec.structs.replace(STREAM, stream_id="greedy")
    serving = start(msgspec.structs.replace(inference_job(tmp_path), config=config, stream=stream))
    broken = serving.until(JobBroken)
    assert broken.kind == "memory"


def test_a_malformed_command_disturbs_nothing(tmp_path: Path, start: Callable[..., Running]) -> None:
    serving = start(inference_job(tmp_path))
    serving.until(StreamStats)
    serving.connection.send_bytes(b"\xc1 nonsense")
    serving.connection.send_bytes(b"\x80")
    serving.until(StreamStats)
    serving.until(StreamStats)
    assert serving.process.is_alive()


def test_a_job_that_is_not_understood_is_reported(tmp_path: Path, start: Callable[..., Running]) -> None:
    stream = msgspec.structs.replace(STREAM, crop_px=1_000_000)
    broken = start(msgspec.structs.replace(inference_job(tmp_path), stream=stream)).until(JobBroken)
    assert broken.kind == "internal"
    assert "crop_px" in broken.reason
