"""The shell around the coordinator: sockets, clocks, files and one poll loop."""

from __future__ import annotations

import logging
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import zmq

from optimizer.config import SiteConfig
from optimizer.coordinator import Coordinator
from optimizer.planner import Planner
from optimizer.ports import (
    ExecutorGone,
    ExecutorJoined,
    Finish,
    HandedOver,
    Input,
    Measured,
    Output,
    ProfilerPort,
    Progressed,
    Publish,
    Received,
    Save,
    Send,
    Solve,
    Solved,
    Tick,
    Tidy,
)
from optimizer.recorder import RunFolder
from optimizer.state import SiteState, StreamState
from optimizer.zoo import in_new_run
from protocol import messages as m
from protocol.errors import PlanError, ProtocolError
from protocol.events import RetrainProgress, StreamAccuracy, TelemetryEvent, WorkerChanged
from protocol.liveness import Liveness
from protocol.logs import line
from protocol.plan import Plan
from protocol.sockets import ControlServer, parse_address
from protocol.telemetry import Hub

log = logging.getLogger(__name__)

_TICK_MS = 100


class Service:
    """Runs one site until its windows are done or it is told to stop. Single-threaded."""

    def __init__(
        self,
        site: SiteConfig,
        folder: RunFolder,
        profiler: ProfilerPort,
        *,
        num_windows: int | None = None,
        on_event: Callable[[TelemetryEvent], None] | None = None,
    ) -> None:
        """Binds the addresses of ``site``. ``on_event`` sees every telemetry event.

        Raises:
            InputError: an address or the policy is unusable.
        """
        self.site = site
        self._folder = folder
        self._on_event = on_event
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._stopping = ""
        state, resumed = _restore(folder.load_state(), site)
        self._clock_offset = state.clock_s - time.monotonic()
        if resumed:
            self._clock_offset += max(0.0, time.time() - state.clock_wall_s)
        folder.begin_events(fresh=not resumed)
        self._planner = Planner(site.policy, site.deadline_s)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            self._server = ControlServer(self._context, parse_address(site.control, "control", bind=True))
            host = self._server.address.rpartition(":")[0]
            self._hub = Hub(
                self._context,
                f"{host}:0",
                parse_address(site.telemetry, "telemetry", bind=True),
                on_event=self._recorded,
            )
        except BaseException:
            self._planner.close()
            self._context.destroy(linger=0)
            raise
        self._publisher = self._hub.publisher("optimizer", site_clock=self._site_s)
        self.coordinator = Coordinator(
            site,
            profiler,
            state,
            num_windows=num_windows,
            adopt_until_s=self._now() + 2 * site.silence_s if resumed else None,
        )
        self._liveness = Liveness(site.silence_s)
        self._peers: dict[str, bytes] = {}
        self._waiting: list[Input] = []
        self._token = 0
        self._solved_count = 0
        self._phase = ""
        self._exit: Finish | None = None

    @property
    def control_address(self) -> str:
        """Where executors and clients connect to, with the port that was bound."""
        return self._server.address

    @property
    def telemetry_address(self) -> str:
        """Where clients subscribe."""
        return self._hub.subscribe_address

    def stop(self, reason: str) -> bool:
        """End the loop soon; safe in a signal handler. Executors go on serving. False when it has ended already."""
        if self._wake_write < 0:
            return False
        self._stopping = reason
        os.write(self._wake_write, b"x")
        return True

    # ------------------------------------------------------------ the loop

    def run(self, each_pass: Callable[[], None] | None = None) -> int:
        """Serve until finished or stopped; the exit code. ``each_pass`` is called about ten times a second."""
        poller = zmq.Poller()
        poller.register(self._server.socket, zmq.POLLIN)
        for socket in self._hub.poll_sockets:
            poller.register(socket, zmq.POLLIN)
        poller.register(self._wake_read, zmq.POLLIN)
        planner_fd = -1
        log.info("%s", line("serving", site=self.site.name, control=self.control_address, term=self._term))
        try:
            while self._exit is None and not self._stopping:
                if self._planner.fileno() != planner_fd:
                    if planner_fd >= 0:
                        poller.unregister(planner_fd)
                    planner_fd = self._planner.fileno()
                    if planner_fd >= 0:
                        poller.register(planner_fd, zmq.POLLIN)
                patience_s = self._planner.patience_s(time.monotonic(), _TICK_MS / 1000.0)
                poller.poll(math.ceil(1000.0 * patience_s))
                self._pass()
                if each_pass is not None:
                    each_pass()
            if self._stopping:
                log.info("%s", line("stopping", reason=self._stopping))
                self._save()
                return 0
            assert self._exit is not None
            self._linger()
            return self._exit.exit_code
        finally:
            self._close()

    @property
    def finish_reason(self) -> str:
        """Why the run is over, "" while it is not."""
        return self._exit.reason if self._exit else ""

    def _pass(self) -> None:
        now = self._now()
        inputs: list[Input] = []
        for peer, message in self._server.recv():
            if not isinstance(message, ProtocolError):
                inputs.extend(self._hear(peer, message, now))
        self._hub.forward()
        inputs.extend(self._waiting)
        self._waiting.clear()
        inputs.extend(self._poll_planner())
        for executor_id in (*self._liveness.silent(now), *self._liveness.stuck(now)):
            self._liveness.forget(executor_id)
            self._peers.pop(executor_id, None)
            inputs.append(ExecutorGone(executor_id=executor_id, reason=f"silent for {self.site.silence_s:g} s"))
        for item in (*inputs, Tick()):
            self._carry_out(self.coordinator.handle(item, self._now()))
            if self._exit is not None:
                break
        self._folder.flush()

    # ------------------------------------------------------------ in

    def _hear(self, peer: bytes, message: m.Up | m.Client, now: float) -> list[Input]:
        if isinstance(message, m.SnapshotRequest):
            state = self.coordinator.state
            self._server.send(peer, self._hub.snapshot(self.site.name, state.term, state.window))
            return []
        executor_id = message.executor_id
        if isinstance(message, m.Hello):
            if message.protocol_version != m.PROTOCOL_VERSION:
                self._server.send(peer, m.Rejected(reason=f"the optimizer speaks protocol {m.PROTOCOL_VERSION} only"))
                return []
            self._peers[executor_id] = peer
            self._liveness.forget(executor_id)
            self._liveness.saw(executor_id, now)
            self._server.send(peer, self._welcome())
            return [ExecutorJoined(hello=message)]
        known = self.coordinator.executors.get(executor_id)
        incarnation = message.incarnation if isinstance(message, m.Heartbeat) else None
        if known is None or (incarnation is not None and incarnation != known.incarnation):
            # Somebody who knows an earlier life of this optimizer, or an executor whose id was taken over.
            newer = known is not None
            reason = f"another executor is called {executor_id}" if newer else "say hello first"
            self._server.send(peer, m.Rejected(reason=reason, retry=not newer))
            return []
        if incarnation is not None or self._peers.get(executor_id) == peer:
            self._peers[executor_id] = peer
            loops = message.loop_count if isinstance(message, m.Heartbeat) else None
            self._liveness.saw(executor_id, now, loops)
        if isinstance(message, m.Goodbye):
            self._liveness.forget(executor_id)
            self._peers.pop(executor_id, None)
            return [ExecutorGone(executor_id=executor_id, reason=message.reason, on_purpose=True)]
        return [Received(executor_id=executor_id, message=message)]

    def _welcome(self) -> m.Welcome:
        return m.Welcome(
            term=self._term,
            site=self.site.name,
            store=str(self._folder.store.resolve()),
            telemetry_address=self._hub.publish_address,
            heartbeat_s=self.site.heartbeat_s,
            silence_s=self.site.silence_s,
        )

    def _recorded(self, event: TelemetryEvent) -> None:
        self._folder.record(event)
        if isinstance(event, StreamAccuracy):
            self._waiting.append(Measured(event=event))
        elif isinstance(event, RetrainProgress):
            self._waiting.append(Progressed(event=event))
        elif isinstance(event, WorkerChanged) and event.change == "handed_over":
            self._waiting.append(HandedOver(event=event))
        if self._on_event is not None:
            self._on_event(event)

    def _poll_planner(self) -> list[Input]:
        try:
            plan: Plan | None = self._planner.poll(time.monotonic())
        except PlanError as error:
            return [Solved(token=self._token, plan=None, reason=str(error))]
        if plan is None:
            return []
        self._folder.save_plan(plan, self.coordinator.state.window, self._solved_count, self._phase)
        return [Solved(token=self._token, plan=plan)]

    # ------------------------------------------------------------ out

    def _carry_out(self, outputs: list[Output]) -> None:
        # The state is on disk before anybody hears of it: an acknowledged event is never forgotten.
        if any(isinstance(output, Save) for output in outputs):
            self._save()
        for output in outputs:
            match output:
                case Send(executor_id=executor_id, message=message):
                    self._send(executor_id, message)
                case Publish(event=event):
                    self._publisher.publish(event)
                case Solve(token=token, problem=problem, window=window, phase=phase):
                    self._token, self._phase = token, phase
                    self._solved_count += 1
                    self._planner.start(problem, self.coordinator.state.plan)
                    # The solver is at work while the file is written.
                    self._folder.save_problem(problem, window, self._solved_count, phase)
                case Tidy(in_use=in_use):
                    self._folder.tidy(in_use)
                case Finish():
                    self._exit = output
                case Save():
                    pass

    def _send(self, executor_id: str, message: m.Down) -> None:
        """Send if possible; what is lost here is sent again by the coordinator or asked for again by the executor."""
        peer, reason = self._peers.get(executor_id), "not connected"
        if peer is not None:
            try:
                if self._server.send(peer, message):
                    return
            except ProtocolError as error:
                reason = str(error)
        log.warning("%s", line("not_sent", to=executor_id, message=type(message).__name__, reason=reason))

    def _linger(self) -> None:
        """Let executors hear that they may leave, and take their last words."""
        end = time.monotonic() + 2.0
        while self.coordinator.executors and time.monotonic() < end and self._peers:
            self._server.socket.poll(50)
            for _, message in self._server.recv():
                if isinstance(message, m.Goodbye):
                    self._peers.pop(message.executor_id, None)
            self._hub.forward()

    def _save(self) -> None:
        state = self.coordinator.state
        state.clock_s, state.clock_wall_s = self._now(), time.time()
        self._folder.save_state(state)

    def _close(self) -> None:
        self._planner.close()
        self._server.close()
        self._hub.close()
        self._context.destroy(linger=0)
        wake_read, wake_write = self._wake_read, self._wake_write
        self._wake_read = self._wake_write = -1  # a signal may still come
        os.close(wake_read)
        os.close(wake_write)

    # ------------------------------------------------------------ clocks

    @property
    def _term(self) -> int:
        return self.coordinator.state.term

    def _now(self) -> float:
        return time.monotonic() + self._clock_offset

    def _site_s(self) -> float:
        origin = self.coordinator.state.origin_s
        return 0.0 if origin is None else self._now() - origin


def _restore(state: SiteState | None, site: SiteConfig) -> tuple[SiteState, bool]:
    """The state to begin with, and whether a run is being resumed in the middle."""
    if state is None or state.site != site.name:
        return SiteState(site=site.name), False
    if state.phase == "finished":
        # A new run of the same site: models and labels are kept, everything else begins anew.
        streams = {
            key: StreamState(
                stream_id=key,
                checkpoint=s.checkpoint,
                next_version=s.next_version,
                dataset=s.dataset,
                stage="label",
                conditions={window - state.window - 1: seen for window, seen in s.conditions.items()},
                kept_sha256=s.kept_sha256,
            )
            for key, s in state.streams.items()
        }
        earlier = in_new_run(state.zoo, state.window + 1)
        return SiteState(site=site.name, term=state.term + 1, streams=streams, zoo=earlier), False
    return msgspec.structs.replace(state, term=state.term + 1), True


def install_stop_signals(service: Service) -> None:
    """SIGINT and SIGTERM end the loop in an orderly way; a second one, or one after it, ends the process at once."""

    def handler(number: int, _frame: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        if not service.stop(signal.Signals(number).name):
            os.kill(os.getpid(), number)

    signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGTERM, handler)


def default_folder(site: SiteConfig) -> Path:
    """Where a run is kept when no folder is given."""
    return Path("runs") / site.name
