"""The way back from a fatal GPU fault under MPS. Pure.

A fault in one client reaches every client of the GPU, and the server takes no new ones (CUDA error 807) until all of
them have left. So all workers are stopped; when the server has nobody left and is ACTIVE or gone, workers are started
again, inference first; when that does not come about in time, the daemon is started again.
"""

from __future__ import annotations

from typing import Literal

from protocol.schema import PositiveSeconds, Record

Step = Literal["wait", "go_on", "restart"]


class ServerView(Record, frozen=True, kw_only=True):
    """One server of the daemon: its state as it prints it, and how many clients it has."""

    state: str
    num_clients: int


class Drain(Record, frozen=True, kw_only=True):
    """How long is waited for the clients of a faulted server to leave before the daemon is started again."""

    wait_s: PositiveSeconds = 5.0


def next_step(waited_s: float, servers: tuple[ServerView, ...] | None, drain: Drain) -> Step:
    """What to do ``waited_s`` after the fault. ``servers`` None: the daemon does not answer."""
    if servers is not None and all(s.num_clients == 0 and s.state == "ACTIVE" for s in servers):
        return "go_on"
    return "restart" if waited_s >= drain.wait_s else "wait"
