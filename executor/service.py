"""The shell of an executor: sockets, worker pipes, signals, one poll loop. Decisions are made elsewhere."""

from __future__ import annotations

import logging
import math
import os
import signal
import socket as sockets_of_python
import time
from collections.abc import Callable
from typing import Any, cast

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from executor.agent import Fence, Replace, Start, changes_of, reconcile
from executor.config import ExecutorConfig
from executor.links import (
    JobBroken,
    JobDone,
    Progress,
    Ready,
    Report,
    SetShare,
    StartJob,
    SwapModel,
    Swapped,
    SwapRefused,
)
from executor.outbox import Outbox
from executor.processes import ForkServer
from executor.roster import Roster
from executor.roster_entry import Effect, Halt, Launch, Worker
from executor.shares.backend import ShareBackend
from executor.shares.devices import Device, gpu_spec
from executor.signals import SignalWakeup
from executor.supervisor import Exited, Supervisor
from executor.telemetry import numbers_of
from protocol import sockets
from protocol.errors import InputError, UnreachableError, VersionMismatchError, WorkerError
from protocol.events import Notice, TelemetryEvent
from protocol.logs import line
from protocol.messages import (
    PROTOCOL_VERSION,
    Ack,
    ApplyPlan,
    Goodbye,
    Heartbeat,
    Hello,
    InferenceJob,
    Job,
    Leave,
    PlanRefused,
    Rejected,
    SnapshotRequest,
    ToServer,
    Welcome,
)
from protocol.telemetry import EventSink, NullPublisher, Publisher

log = logging.getLogger(__name__)

MAX_POLL_S = 0.2
HELLO_INTERVAL_S = 1.0
STALL_S = 0.5


class Service:
    """One executor. ``run`` returns the exit code; everything it started is gone by then."""

    def __init__(
        self,
        config: ExecutorConfig,
        device: Device,
        backend: ShareBackend,
        signals: SignalWakeup | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.device = device
        self.backend = backend
        host = sockets_of_python.gethostname()
        self.executor_id = config.executor_id or default_id(host, device)
        self.incarnation = os.urandom(8).hex()
        self._host = host
        self._clock = clock
        self._signals = signals or SignalWakeup()
        spec = gpu_spec(device, self.executor_id, config.speed)
        self._gpu = msgspec.structs.replace(spec, reserved_share=config.reserved_share)
        self._outbox = Outbox()
        self._fence = Fence(self.executor_id)
        self._roster = Roster(
            self.executor_id,
            self._gpu.gpu_id,
            self._outbox,
            config.restarts,
            pause_s=config.hand_overs.pause_s,
            shrinks_at_once=backend.holds_at_once,
        )
        self._forkserver = ForkServer(config.preload, config.log_level)
        self._supervisor = Supervisor(config.worker, config.limits, backend.evict, clock, self._forkserver)
        self._context: sockets.Context = zmq.Context()
        self._client = sockets.ControlClient(self._context, config.connect, clock)
        self._monitor = self._client.socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        self._publisher: EventSink = NullPublisher()
        self._publisher_socket: sockets.Socket | None = None
        self._publisher_address = ""
        self._welcome: Welcome | None = None
        self._warm = False
        self._connected = False
        self._alone = False
        self._heard_s = clock()
        self._hello_due_s = 0.0
        self._hello_sent_s = -HELLO_INTERVAL_S
        self._heartbeat_due_s = 0.0
        self._question_due_s = 0.0
        self._loop_count = 0
        self._turned_s = clock()
        self._stalled_s = self._stall_over_s = 0.0
        self._site_offset_s: float | None = None
        self._leaving = ""
        self._complaint = ""

    # ------------------------------------------------------------ the loop

    def run(self) -> int:
        """Join, work, leave.

        Raises:
            UnreachableError: nobody answered within ``wait_s``.
            InputError: the optimizer has rejected this executor, or speaks another protocol version.
        """
        started_s = self._clock()
        self._forkserver.ensure_running()
        log.info(
            "%s", line("executor_start", executor=self.executor_id, device=self.device.text, share=self.backend.name)
        )
        try:
            while True:
                polled_s = self._clock()
                self._wait(polled_s)
                now = self._clock()
                self._loop_count += 1
                self._take_signals()
                self._take_connection_events()
                self._take_messages(self._earliest_receipt(polled_s, now), now)
                self._take_worker_events()
                self._look_after_backend()
                self._notice_silence(self._clock())
                self._reconcile(self._clock())
                self._send_due(self._clock())
                self._publish()
                if self._complaint:
                    raise InputError(self._complaint)
                if self._leaving and not len(self._supervisor):
                    self._send(Goodbye(executor_id=self.executor_id, reason=self._leaving))
                    return 0
                if self._welcome is None and 0.0 < self.config.wait_s < self._clock() - started_s:
                    raise UnreachableError(
                        f"no optimizer answers at {self.config.connect} within {self.config.wait_s:g} s (--wait); "
                        "is it running, and is this the control address that it printed?"
                    )
        finally:
            self._close()

    def _wait(self, now: float) -> None:
        poller = zmq.Poller()
        poller.register(self._client.socket, zmq.POLLIN)
        poller.register(self._monitor, zmq.POLLIN)
        poller.register(self._signals.fileno(), zmq.POLLIN)
        for fd in self._supervisor.read_fds():
            poller.register(fd, zmq.POLLIN)
        for fd in self._supervisor.write_fds():
            poller.register(fd, zmq.POLLIN | zmq.POLLOUT)
        due = min(now + MAX_POLL_S, self._supervisor.next_due_s(), self._roster.next_due_s())
        poller.poll(math.ceil(max(0.0, due - now) * 1000.0))

    def _close(self) -> None:
        self._supervisor.close()
        self.backend.close()
        self._client.socket.disable_monitor()
        self._monitor.close(0)
        self._client.close()
        if self._publisher_socket is not None:
            self._publisher_socket.close()
        self._context.term()  # waits LINGER_MS at most for what is still to leave
        self._signals.close()
        log.info(
            "%s", line("executor_stop", executor=self.executor_id, reason=self._leaving or self._complaint or "error")
        )

    # ------------------------------------------------------------ incoming

    def _take_signals(self) -> None:
        for number in self._signals.taken():
            if number in (signal.SIGINT, signal.SIGTERM):
                self._leave(number.name, quick=bool(self._leaving))

    def _leave(self, reason: str, quick: bool = False) -> None:
        self._leaving = self._leaving or reason
        log.info("%s", line("executor_leaving", reason=reason, quick=quick))
        self._halt_all(reason, quick)

    def _halt_all(self, reason: str, quick: bool = False) -> None:
        for worker in self._roster:
            for effect in self._roster.halt(worker.worker_id, reason):
                self._carry_out(effect, self._clock(), quick)

    def _take_connection_events(self) -> None:
        while self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)["event"]
            self._connected = event == zmq.EVENT_HANDSHAKE_SUCCEEDED
            log.info("%s", line("connected" if self._connected else "disconnected", address=self.config.connect))
            if self._connected:
                self._hello_due_s = 0.0  # whoever is there now, the same optimizer or its successor, is to know us

    def _earliest_receipt(self, polled_s: float, now: float) -> float:
        """The earliest time at which a message that is read at ``now`` can have come in.

        The loop was waiting from ``polled_s`` on. After a stall (this process was stopped, the machine slept)
        old messages still trickle in from the kernel for a moment.
        """
        if now - self._turned_s > MAX_POLL_S + STALL_S:
            self._stalled_s, self._stall_over_s = self._turned_s, now + STALL_S
        self._turned_s = now
        return min(polled_s, self._stalled_s) if now < self._stall_over_s else polled_s

    def _take_messages(self, received_s: float, now: float) -> None:
        for message in self._client.recv():
            if isinstance(message, VersionMismatchError):
                self._complaint = str(message)
            if isinstance(message, Exception):
                continue
            self._heard_s = now
            if isinstance(message, Welcome):
                self._join(message, now)
            elif isinstance(message, Rejected):
                self._rejected(message)
            elif isinstance(message, ApplyPlan):
                self._apply(message, received_s, self._clock())
            elif isinstance(message, Ack):
                self._outbox.acknowledge(message.event_id)
            elif isinstance(message, Leave):
                self._leave(f"optimizer: {message.reason}")

    def _join(self, welcome: Welcome, now: float) -> None:
        old, self._welcome = self._welcome, welcome
        if old is not None and old.store != welcome.store:
            self._move(old.store, welcome.store)
        self._hello_due_s = float("inf")
        if old is None or old.term != welcome.term:
            log.info("%s", line("joined", site=welcome.site, term=welcome.term, held=str(self._fence.held)))
            self._site_offset_s = None
        self._outbox.hold_again()
        self._heartbeat_due_s = now
        address = sockets.seen_from(welcome.telemetry_address, self.config.connect)
        if address != self._publisher_address:
            if self._publisher_socket is not None:
                self._publisher_socket.close()
            self._publisher_socket = sockets.telemetry_publisher(self._context, address)
            self._publisher = Publisher(cast(Any, self._publisher_socket), self.executor_id, site_clock=self.site_s)
            self._publisher_address = address
            if self.backend.remark:
                self._tell(Notice(level="warning", text=f"{self.executor_id}: {self.backend.remark}"))

    def _move(self, old: str, new: str) -> None:
        """Another store is another site: nothing that runs here or is remembered belongs to it."""
        log.warning("%s", line("site_changed", old=old, new=new))
        self._halt_all("site_changed")
        self._fence.desired = ()
        self._roster.forget_all()
        self._outbox.clear()

    def _rejected(self, message: Rejected) -> None:
        if message.retry:
            log.warning("%s", line("rejected", reason=message.reason, retry=True))
            self._hello_due_s = min(self._hello_due_s, self._hello_sent_s + HELLO_INTERVAL_S)
        else:
            self._complaint = f"the optimizer at {self.config.connect} rejects this executor: {message.reason}"

    def _apply(self, plan: ApplyPlan, received_s: float, now: float) -> None:
        if self._leaving:
            return
        before, old_jobs = self._fence.held, {job.job_id: job for job in self._fence.desired}
        answer = self._fence.judge(plan, received_s, now, self._roster.settled.keys())
        self._send(answer)
        refused = isinstance(answer, PlanRefused)
        if refused or before != self._fence.held:
            name = "plan_refused" if refused else "plan_applied"
            log.info(
                "%s", line(name, version=_short(plan), jobs=len(plan.jobs), reason=getattr(answer, "reason", None))
            )
        if not refused and before != self._fence.held:
            for job in plan.jobs:
                old = old_jobs.get(job.job_id)
                if old is not None and changes_of(old, job):
                    self._roster.retry_now(job.job_id)
            positions = [job.position_s for job in plan.jobs if isinstance(job, InferenceJob)]
            if positions:
                offset = max(positions) - now
                self._site_offset_s = max(offset, self._site_offset_s if self._site_offset_s is not None else offset)

    def site_s(self) -> float:
        """Seconds of the site's stream clock, as far as this executor knows it from plans."""
        return max(0.0, self._clock() + self._site_offset_s) if self._site_offset_s is not None else 0.0

    def _take_worker_events(self) -> None:
        for event in self._supervisor.poll():
            now = self._clock()
            if isinstance(event, Exited):
                gone = self._roster.get(event.worker_id)
                if gone is not None:
                    self.backend.release(gone.pid)
                self._roster.left(event.worker_id, event.reason, now)
            else:
                self._report(event.worker_id, event.report, now)

    def _report(self, worker_id: int, report: Report, now: float) -> None:
        worker = self._roster.get(worker_id)
        if worker is None:
            return
        if isinstance(report, Ready):
            try:
                self.backend.attached(report, worker.share_cap)
            except WorkerError as error:
                self._supervisor.stop(worker_id, f"not held to its share: {error}", quick=True)
                return
            if worker.state != "stopping":
                self.backend.hold(report.pid, worker.job.share)
        elif isinstance(report, Swapped | SwapRefused):
            self.backend.hold(worker.pid, worker.job.share)
        elif isinstance(report, JobDone):
            self.backend.lift(worker.pid)
        elif isinstance(report, JobBroken) and report.fault and worker.state != "stopping":
            trouble = self.backend.fault(worker.pid, report.reason, now)
            if trouble:
                self._incident(trouble, worker)
        if isinstance(report, Progress):
            report = msgspec.structs.replace(
                report,
                share_achieved=self.backend.observe(report.share_achieved, worker.share_cap),
                share=self.backend.observe(report.share, worker.share_cap),
            )
        for effect in self._roster.reported(worker_id, report, now):
            self._carry_out(effect, now)
        window = self._fence.held.window if self._fence.held else -1
        for numbers in numbers_of(worker, report, self._gpu.gpu_id, self.backend.name, window):
            self._tell(numbers)

    def _look_after_backend(self) -> None:
        trouble = self.backend.check(self._clock())
        if trouble:
            self._incident(trouble, None)

    def _incident(self, trouble: str, culprit: Worker | None) -> None:
        """The device has failed under all workers: they leave, and are started again when the backend is well."""
        log.error("%s", line("share_backend_failed", reason=trouble, job=culprit.job.job_id if culprit else None))
        suspect = f"; first met by {culprit.job.job_id}" if culprit else ""
        self._tell(Notice(level="error", text=f"{self.executor_id}: {trouble}{suspect}"))
        for worker in self._roster:
            self._roster.interrupt(worker.worker_id, trouble, culprit=worker is culprit)
            self._supervisor.stop(worker.worker_id, trouble, quick=True)

    def _notice_silence(self, now: float) -> None:
        """Fail static: the optimizer's answers decide, not the connection, since a hung one keeps connections up."""
        if self._welcome is None:
            return
        silence_s = now - self._heard_s
        if silence_s > self._welcome.silence_s / 2.0 and now >= self._question_due_s:
            # The optimizer says nothing while nothing changes. This question it answers without any effect.
            self._send(SnapshotRequest())
            self._question_due_s = now + self._welcome.silence_s / 4.0
        alone = silence_s > self._welcome.silence_s
        if alone != self._alone:
            self._alone = alone
            text = "the optimizer is silent: serving the last plan" if alone else "the optimizer is back"
            log.warning("%s", line("alone" if alone else "not_alone", silence_s=silence_s, reason=text))
            self._tell(Notice(level="warning" if alone else "info", text=f"{self.executor_id}: {text}"))

    # ------------------------------------------------------------ workers

    def _reconcile(self, now: float) -> None:
        if self._leaving:
            return
        commands = reconcile(
            self._fence.desired,
            self._roster.views(),
            now,
            settled=self._roster.settled.keys(),
            alone=self._alone,
            hand_overs=self.config.hand_overs,
        )
        for command in commands:
            if self.backend.waiting and isinstance(command, Start | Replace):
                continue
            for effect in self._roster.carry_out(command, now, self.backend.can_resize_live):
                self._carry_out(effect, now)

    def _carry_out(self, effect: Effect, now: float, quick: bool = False) -> None:
        worker = effect.worker
        if isinstance(effect, Launch):
            self._launch(worker, now)
        elif isinstance(effect, Halt):
            if effect.farewell is None:
                self.backend.lift(worker.pid)
            self._supervisor.stop(worker.worker_id, effect.reason, quick, effect.farewell)
        else:
            order = effect.command
            if isinstance(order, SetShare):
                self.backend.hold(worker.pid, order.share)
                order = SetShare(share=self.backend.paced_share(order.share, worker.share_cap))
            elif isinstance(order, SwapModel):
                self.backend.lift(worker.pid)
            self._supervisor.send(worker.worker_id, order)

    def _launch(self, worker: Worker, now: float) -> None:
        try:
            environment = self.backend.worker_environment(worker.job, worker.job.share)
            job = self._as_started(worker.job, now, self.backend.paced_share(worker.job.share, worker.share_cap))
            if isinstance(job, InferenceJob) and not worker.standby:
                worker.origin_s = now - job.position_s
            start = StartJob(
                job=job,
                store=self._welcome.store if self._welcome else "",
                device=self.backend.worker_device,
                pace=self.backend.pace,
                origin_s=worker.origin_s,
                standby=worker.standby,
                cap=worker.share_cap,
            )
            self._roster.launched(worker.worker_id, self._supervisor.start(worker.worker_id, start, environment))
        except WorkerError as error:
            self._roster.left(worker.worker_id, str(error), now)

    def _as_started(self, job: Job, now: float, paced_share: float) -> Job:
        """The job as its worker gets it: a stream has gone on since the plan came."""
        if isinstance(job, InferenceJob):
            return msgspec.structs.replace(
                job, share=paced_share, position_s=job.position_s + max(0.0, now - self._fence.taken_s)
            )
        return msgspec.structs.replace(job, share=paced_share)

    # ------------------------------------------------------------ outgoing

    def _send(self, message: ToServer) -> bool:
        return self._client.send(message)

    def _send_due(self, now: float) -> None:
        if self._connected and now >= self._hello_due_s and not self._leaving:
            if not self._warm:
                # Before Hello: an executor that has joined can start a worker at once.
                self._supervisor.warm_up()
                self._warm = True
                self._turned_s = self._clock()
            self._send(self._hello())
            self._hello_sent_s = self._clock()
            self._hello_due_s = self._hello_sent_s + HELLO_INTERVAL_S
        if self._welcome is None:
            return
        if now >= self._heartbeat_due_s:
            sent = self._send(
                Heartbeat(
                    executor_id=self.executor_id,
                    incarnation=self.incarnation,
                    loop_count=self._loop_count,
                    held=self._fence.held,
                    workers=self._roster.statuses(),
                )
            )
            self._heartbeat_due_s = now + (self._welcome.heartbeat_s if sent else MAX_POLL_S)
        for event in self._outbox.due(now):
            if not self._send(event):
                break
            self._outbox.sent(event.event_id, now)

    def _hello(self) -> Hello:
        return Hello(
            protocol_version=PROTOCOL_VERSION,
            executor_id=self.executor_id,
            incarnation=self.incarnation,
            device=self.device.text,
            share_backend=self.backend.name,
            gpu=self._gpu,
            host=self._host,
            pid=os.getpid(),
            held=self._fence.held,
            workers=self._roster.statuses(),
            can_resize_live=self.backend.can_resize_live,
        )

    def _tell(self, event: TelemetryEvent) -> None:
        self._publisher.publish(event)

    def _publish(self) -> None:
        events, self._roster.events = self._roster.events, []
        for event in events:
            self._tell(event)


def default_id(host: str, device: Device) -> str:
    """Host name and device, in the letters that a name may have."""
    clean = "".join(letter if letter.isalnum() and letter.isascii() else "-" for letter in host).strip("-") or "host"
    return f"{clean[:50]}-{device.kind}{device.index}"


def _short(plan: ApplyPlan) -> str:
    return f"{plan.version.term}.{plan.version.window}.{plan.version.revision}"
