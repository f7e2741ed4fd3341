"""The life of jobs: restarts, results, hand-overs, checkpoints. No processes, the clock is a number."""

from __future__ import annotations

import pytest

from executor.agent import Replace, Start, Tell
from executor.limits import RestartPolicy
from executor.links import (
    HandedOver,
    HandOver,
    JobBroken,
    JobDone,
    Progress,
    Ready,
    SetShare,
    SwapModel,
    Swapped,
    SwapRefused,
    TakeOver,
    TookOver,
)
from executor.outbox import Outbox
from executor.roster import REMEMBERED, Roster
from executor.roster_entry import Halt, Launch, Order, Worker
from protocol.events import Notice, WorkerChanged
from protocol.messages import InferenceJob, Job, JobFailed
from protocol.schema import CheckpointRef
from tests.executor import optimizer_model as model
from tests.executor.problem_worker import result_of

POLICY = RestartPolicy(limit=3, backoff_s=1.0, backoff_max_s=4.0, slow_s=30.0, stable_s=10.0)


def make() -> tuple[Roster, Outbox]:
    outbox = Outbox()
    return Roster("e1", "g1", outbox, POLICY), outbox


def begin(roster: Roster, job: Job, now: float = 0.0, ready: bool = True, live: bool = True) -> Worker:
    effects = roster.carry_out(Start(job=job), now, live)
    assert isinstance(effects[0], Launch)
    worker = effects[0].worker
    roster.launched(worker.worker_id, 1000 + worker.worker_id)
    if ready:
        roster.reported(worker.worker_id, Ready(pid=worker.pid, startup_s=0.5), now)
    return worker


def failures(outbox: Outbox) -> list[JobFailed]:
    return [event for event in outbox.due(1e9) if isinstance(event, JobFailed)]


def test_an_inference_worker_that_dies_is_tried_again_with_growing_pauses_and_reported_once() -> None:
    roster, outbox = make()
    job, now, pauses = model.inference(), 0.0, []
    for _ in range(6):
        worker = begin(roster, job, now)
        roster.left(worker.worker_id, "killed by SIGKILL", now)
        (waiting,) = roster.views()
        assert (waiting.state, waiting.share_held) == ("backoff", 0.0)
        pauses.append(waiting.resumes_s - now)
        now = waiting.resumes_s
    assert pauses == [1.0, 2.0, 30.0, 30.0, 30.0, 30.0]
    (failed,) = failures(outbox)
    assert failed.job_id == "inference/s1"
    assert "every 30 s" in failed.reason
    assert roster.statuses()[0].state == "failed"
    assert roster.statuses()[0].restarts == 5


def test_a_worker_counts_as_good_only_after_a_stable_time() -> None:
    roster, outbox = make()
    job = model.inference()
    for now in (0.0, 100.0, 200.0, 300.0):
        worker = begin(roster, job, now)
        roster.left(worker.worker_id, "crash", now + 10.0)
        assert roster.views()[0].resumes_s == now + 11.0
    assert not failures(outbox)


def test_wrong_input_is_reported_at_once_and_tried_slowly() -> None:
    roster, outbox = make()
    worker = begin(roster, model.inference(), ready=False)
    roster.reported(worker.worker_id, JobBroken(kind="input", reason="video.mp4: no such file"), 0.0)
    roster.left(worker.worker_id, "exit code 1", 0.0)
    assert "video.mp4" in failures(outbox)[0].reason
    assert roster.views()[0].resumes_s == 30.0
    roster.retry_now("inference/s1")
    assert roster.views()[0].resumes_s == 0.0


def test_a_retraining_that_dies_fails_once_and_is_not_begun_again() -> None:
    roster, outbox = make()
    worker = begin(roster, model.retraining())
    roster.reported(worker.worker_id, JobBroken(kind="memory", reason="3 GiB wanted"), 0.0)
    roster.left(worker.worker_id, "exit code 1", 0.0)
    assert [(f.kind, f.reason) for f in failures(outbox)] == [("retrain", "memory: 3 GiB wanted")]
    assert "retrain/s1/0" in roster.settled
    assert len(roster) == 0


def test_a_result_is_kept_until_it_is_acknowledged_even_when_the_job_is_no_longer_wanted() -> None:
    roster, outbox = make()
    job = model.retraining()
    worker = begin(roster, job)
    roster.halt(worker.worker_id, "not_in_plan")
    roster.reported(worker.worker_id, JobDone(result=result_of(job)), 1.0)
    roster.reported(worker.worker_id, JobDone(result=result_of(job)), 1.0)
    roster.left(worker.worker_id, "exit code 0", 1.0)
    (event,) = outbox.due(1.0)
    outbox.sent(event.event_id, 1.0)
    assert outbox.due(1.5) == []
    assert outbox.due(2.0) == [event]
    outbox.hold_again()
    assert outbox.due(1.5) == [event]
    outbox.acknowledge(event.event_id)
    outbox.acknowledge(event.event_id)
    assert outbox.due(9.0) == []


def test_a_shrunk_share_is_free_only_when_the_worker_has_read_the_order() -> None:
    roster, _ = make()
    worker = begin(roster, model.inference(share=0.8))
    roster.carry_out(Tell(job_id="inference/s1", command=SetShare(share=0.3)), 10.0)
    held = []
    for now, share in ((10.0, None), (10.1, 0.8), (10.2, None), (20.0, 0.8), (20.1, 0.3)):
        roster.reported(worker.worker_id, Progress(count=1, share_achieved=None, share=share), now)
        held.append(roster.views()[0].share_held)
    assert held == [0.8, 0.8, 0.8, 0.8, 0.3]
    roster.carry_out(Tell(job_id="inference/s1", command=SetShare(share=0.1)), 30.0)
    roster.reported(worker.worker_id, Progress(count=1, share_achieved=None), 30.3)
    assert roster.views()[0].share_held == 0.1


def test_a_share_that_the_kernel_takes_away_is_free_at_once() -> None:
    roster = Roster("e1", "g1", Outbox(), POLICY, shrinks_at_once=True)
    job = model.retraining(share=0.5)
    begin(roster, job)
    roster.carry_out(Tell(job_id=job.job_id, command=SetShare(share=0.1)), 1.0)
    (view,) = roster.views()
    assert view.share_held == pytest.approx(0.1)


def test_a_refused_checkpoint_does_not_come_back_with_a_restart() -> None:
    roster, _ = make()
    worker = begin(roster, model.inference(version=1))
    bad = model.checkpoint("s1", 2)
    roster.carry_out(Tell(job_id="inference/s1", command=SwapModel(checkpoint=bad)), 1.0)
    roster.reported(worker.worker_id, SwapRefused(version=2, reason="SHA-256 differs"), 1.0)
    assert any(isinstance(event, Notice) and "SHA-256" in event.text for event in roster.events)
    roster.left(worker.worker_id, "crash", 2.0)
    assert checkpoint_of(begin(roster, model.inference(checkpoint=bad), 5.0)).version == 1


def test_a_swapped_model_is_the_one_that_a_restart_falls_back_to() -> None:
    roster, _ = make()
    worker = begin(roster, model.inference(version=1))
    for version in (2, 3):
        good = model.checkpoint("s1", version)
        roster.carry_out(Tell(job_id="inference/s1", command=SwapModel(checkpoint=good)), 1.0)
        if version == 2:
            roster.reported(worker.worker_id, Swapped(version=2, gap_ms=3.0), 1.0)
    assert roster.statuses()[0].model_version == 2
    swap = [e for e in roster.events if isinstance(e, WorkerChanged) and e.change == "swapped"]
    assert [e.gap_ms for e in swap] == [3.0]
    roster.left(worker.worker_id, "crash", 2.0)
    again = begin(roster, model.inference(version=3), 5.0, ready=False)
    roster.reported(again.worker_id, JobBroken(kind="checkpoint", reason="truncated"), 6.0)
    roster.left(again.worker_id, "exit code 1", 6.0)
    assert checkpoint_of(begin(roster, model.inference(version=3), 9.0)).version == 2


def checkpoint_of(worker: Worker) -> CheckpointRef:
    assert isinstance(worker.job, InferenceJob)
    return worker.job.checkpoint


def hand_over(roster: Roster, old: Worker, now: float) -> Worker:
    (launch,) = roster.carry_out(Replace(job=model.inference(share=0.6)), now, live=False)
    assert isinstance(launch, Launch)
    roster.launched(launch.worker.worker_id, 2000)
    states = {view.share_cap: view.state for view in roster.views()}
    assert states == {old.share_cap: "replacing", 0.6: "starting"}
    return launch.worker


def test_a_hand_over_stops_the_old_worker_when_the_new_one_is_ready() -> None:
    roster, _ = make()
    old = begin(roster, model.inference(share=0.2), live=False)
    new = hand_over(roster, old, 1.0)
    take, halt = roster.reported(new.worker_id, Ready(pid=2000, startup_s=1.0), 2.0)
    assert isinstance(take, Order)
    assert isinstance(take.command, TakeOver)
    assert isinstance(halt, Halt)
    assert (take.worker, halt.worker, halt.reason) == (new, old, "handed_over")
    assert halt.farewell == HandOver(at_s=take.command.at_s)
    assert take.command.at_s > 2.0
    roster.reported(new.worker_id, TookOver(at_s=2.3), 2.4)
    roster.reported(old.worker_id, HandedOver(at_s=2.2), 2.4)
    (told,) = [e for e in roster.events if isinstance(e, WorkerChanged) and e.change == "handed_over"]
    assert told.gap_ms == pytest.approx(100.0)
    roster.left(old.worker_id, "exit code 0", 3.0)
    assert [(w.pid, w.state) for w in roster] == [(2000, "ready")]


def test_a_hand_over_that_fails_leaves_the_old_worker_serving_and_waits_before_the_next() -> None:
    roster, outbox = make()
    old = begin(roster, model.inference(share=0.2), live=False)
    new = hand_over(roster, old, 1.0)
    roster.left(new.worker_id, "crash", 2.0)
    (serving,) = roster.views()
    assert (serving.state, serving.resumes_s) == ("ready", 3.0)
    assert not failures(outbox)


def test_a_worker_that_dies_during_its_hand_over_is_followed_by_its_successor() -> None:
    roster, _ = make()
    old = begin(roster, model.inference(share=0.2), live=False)
    new = hand_over(roster, old, 1.0)
    roster.left(old.worker_id, "crash", 2.0)
    assert roster.reported(new.worker_id, Ready(pid=2000, startup_s=1.0), 3.0) == [Order(new, TakeOver(at_s=3.0))]
    assert [(w.worker_id, w.state) for w in roster] == [(new.worker_id, "ready")]


def test_memory_of_ended_jobs_is_bounded() -> None:
    roster, outbox = make()
    for i in range(REMEMBERED + 50):
        job = model.retraining(job_id=f"job-{i}")
        worker = begin(roster, job)
        roster.reported(worker.worker_id, JobDone(result=result_of(job)), 0.0)
        roster.left(worker.worker_id, "exit code 0", 0.0)
        outbox.acknowledge(i + 1)
    assert len(roster.settled) == REMEMBERED
    assert (len(outbox), len(roster)) == (0, 0)
