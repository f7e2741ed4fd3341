"""Checks that harm a client on purpose: what it does to the others, and how service comes back."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import time
from collections.abc import Callable

from executor.gpu_check.bench import Bench, attempt, rounded
from executor.gpu_check.clients import Client, ClientError
from executor.gpu_check.transcript import Details
from protocol.errors import DeviceError, WorkerError


def terminated(bench: Bench, details: Details) -> None:
    """``terminate_client`` on a busy trainer, then SIGKILL: do the others notice?"""
    daemon = bench.need_daemon()

    def harm(victim: Client) -> None:
        server = daemon.server_of(victim.pid)
        details["terminate_client_succeeded"] = server is not None and daemon.terminate_client(server, victim.pid)
        details["victim_says"] = attempt(victim, 5.0)
        details["victim_left_by_itself"] = victim.wait_gone(0.5)
        victim.kill()

    incident(bench, details, harm)


def killed(bench: Bench, details: Details) -> None:
    """SIGKILL on a busy trainer, without asking the daemon: unsupported, so what does it do?"""
    incident(bench, details, lambda victim: victim.kill())


def stopped_by_sigterm(bench: Bench, details: Details) -> None:
    """SIGTERM on a busy trainer: the process ends as CUDA programs usually end."""

    def harm(victim: Client) -> None:
        os.kill(victim.pid, signal.SIGTERM)
        details["left"] = victim.wait_gone(5.0)

    incident(bench, details, harm)


def fault_address(bench: Bench, details: Details) -> None:
    """A client writes to an illegal address."""
    incident(bench, details, lambda victim: _fault(victim, "address", details))


def fault_assert(bench: Bench, details: Details) -> None:
    """A client's kernel fails an assertion (an index out of range)."""
    incident(bench, details, lambda victim: _fault(victim, "assert", details))


def _fault(victim: Client, kind: str, details: Details) -> None:
    victim.post("stop")
    details["victim_work"] = rounded(victim.answer(10.0))
    victim.ask("prepare_fault", 60.0, kind=kind)  # the kernel's compilation takes seconds the first time
    details["fault_at_s"] = time.monotonic()
    victim.post("fault", kind=kind)
    details["victim_says"] = attempt(victim, 20.0)


def server_killed(bench: Bench, details: Details) -> None:
    """The MPS server dies: what the clients see, and the way back to service."""
    daemon = bench.need_daemon()

    def harm(victim: Client) -> None:
        for pid in daemon.server_pids():
            os.kill(pid, signal.SIGKILL)

    incident(bench, details, harm)


def quits(bench: Bench, details: Details) -> None:
    """``quit`` ends daemon and server; nothing is left."""
    daemon = bench.need_daemon()
    servers = daemon.server_pids()
    start = time.monotonic()
    daemon.close()
    details["seconds"] = round(time.monotonic() - start, 3)
    details["servers_left"] = [pid for pid in servers if os.path.exists(f"/proc/{pid}")]
    details["logs"] = bench.logs()
    bench.daemon, bench.mps_trouble = None, "the daemon has been ended by the check mps_quit"


def incident(bench: Bench, details: Details, harm: Callable[[Client], None]) -> None:
    """A trainer is harmed while a stream is served; then service is brought back, step by step.

    First nothing is done but watching: is the stream hurt, what does the server say, is a new client admitted?
    Then everybody leaves, then the daemon is started again. ``time_to_service_s``: from the harm to a client at work.
    """
    bench.need_daemon()
    infer = bench.workloads()[f"{bench.nets[-1]}_infer_b16"]
    victim, serving = bench.clients.open_all([bench.under_mps(40, priority=1), bench.under_mps(40)])
    serving.post("serve", **infer)
    serving.good(30.0)
    victim.post("work", seconds=None, **bench.workloads()[f"{bench.nets[-1]}_train_b32"])
    serving.post("start", zero_s=time.monotonic(), fps=30.0, first=0)
    time.sleep(0.8)
    harmed = time.monotonic()
    harm(victim)
    harmed = details.pop("fault_at_s", harmed)
    details["harm_took_s"] = round(time.monotonic() - harmed, 3)
    states: list[tuple[float, str]] = []
    while time.monotonic() < harmed + bench.watch_s:
        state = bench.server_state()
        if not states or states[-1][1] != state:
            states.append((round(time.monotonic() - harmed, 2), state))
        time.sleep(0.1)
    details["server_states"] = states
    details["new_client_beside"] = _newcomer(bench, harmed)
    with contextlib.suppress(OSError):
        serving.post("stop")
    seen = attempt(serving, 5.0)
    results = seen.pop("results", [])
    done = [when for _, _, when in results]
    details["stream"] = {
        **seen,
        "hurt": not seen["ok"],
        "results_after_harm": sum(when > harmed for when in done),
        "last_result_s": round(done[-1] - harmed, 3) if done else None,
        "longest_interval_ms": round(max((b - a for a, b in itertools.pairwise(done)), default=0.0) * 1e3, 1),
    }
    details["logs"] = {name: text[-1200:] for name, text in bench.logs().items()}
    if details["new_client_beside"]["ok"]:
        details["time_to_service_s"] = details["new_client_beside"]["at_s"]
        details["brought_back_by"] = "nothing: new clients were admitted at once"
        return
    start = time.monotonic()
    details["had_to_be_killed"] = bench.clients.end_all(bench.evict)
    details["all_left_after_s"] = round(time.monotonic() - start, 3)
    for _ in range(4):
        details["after_all_left"] = _newcomer(bench, harmed) | {"server_state": bench.server_state()}
        if details["after_all_left"]["ok"]:
            details["time_to_service_s"] = details["after_all_left"]["at_s"]
            details["brought_back_by"] = "all clients leaving"
            return
        bench.tidy()
        time.sleep(0.5)
    try:
        details["daemon_restart_s"] = round(bench.restart_daemon(), 3)
    except DeviceError as error:
        details["logs_after_restart"] = bench.logs()
        bench.daemon, bench.mps_trouble = None, f"the daemon did not start again after an incident: {error}"
        raise
    details["after_restart"] = _newcomer(bench, harmed)
    if not details["after_restart"]["ok"]:
        raise WorkerError(f"no service after a restart of the daemon: {details['after_restart']['error']}")
    details["time_to_service_s"] = details["after_restart"]["at_s"]
    details["brought_back_by"] = "a restart of the daemon"


def _newcomer(bench: Bench, since: float) -> Details:
    """Whether a new client gets to work: attached, and a step done."""
    try:
        client = bench.clients.open(bench.under_mps(30), 15.0)
        bench.rate(client, bench.workloads()[f"{bench.nets[-1]}_infer_b16"], scale=0.1)
        attached = bench.need_daemon().server_of(client.pid) is not None
    except (ClientError, WorkerError) as error:
        return {"ok": False, "error": str(error), "at_s": round(time.monotonic() - since, 3)}
    units = client.opened["num_units"]
    text = "" if attached else "not in the client list"
    return {"ok": attached, "error": text, "num_units": units, "at_s": round(time.monotonic() - since, 3)}
