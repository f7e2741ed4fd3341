"""How a granted share is held: one interface, whatever does it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from executor.links import Ready
from executor.shares.devices import Device
from protocol.messages import Job


class ShareBackend(Protocol):
    """Holds the shares of one device's workers.

    ``name``: as shown in telemetry. ``pace``: workers hold their share by duty cycle. ``can_resize_live``: a
    running worker's share can grow beyond the one it was started with. ``holds_at_once``: a smaller share binds from
    the order on, whatever the worker is doing; else it binds when the worker has read the order. ``worker_device``: the
    device as the worker has to call it ("cuda:0" where its environment shows it one GPU only). ``waiting``: why no
    worker can be started at the moment, empty as a rule. ``remark``: what users are told once of how shares are held.
    """

    name: str
    pace: bool
    can_resize_live: bool
    holds_at_once: bool
    worker_device: str
    waiting: str
    remark: str

    def worker_environment(self, job: Job, share: float) -> Mapping[str, str]:
        """What the worker of ``job`` needs in its environment to be held to ``share``; an empty value unsets one.

        Raises WorkerError.
        """
        ...

    def paced_share(self, share: float, cap: float) -> float:
        """The duty cycle that makes ``share`` of the device out of a worker started with ``cap``."""
        ...

    def attached(self, ready: Ready, share: float) -> None:
        """Check that a worker that has become ready is really held to ``share``. Raises WorkerError."""
        ...

    def hold(self, pid: int, share: float) -> None:
        """A ready worker has ``share`` from now on; where its own pacing does that, nothing is left to do."""
        ...

    def lift(self, pid: int) -> None:
        """Do not slow the worker down for a while: it loads a model beside its work, or leaves. Until ``hold``."""
        ...

    def release(self, pid: int) -> None:
        """The worker's process has ended."""
        ...

    def observe(self, duty: float | None, cap: float) -> float | None:
        """The achieved share of a worker started with ``cap`` that measured ``duty`` of its own time busy."""
        ...

    def evict(self, pid: int) -> None:
        """Take a worker out before it is signalled."""
        ...

    def fault(self, pid: int, reason: str, now: float) -> str:
        """A worker has lost its device's context; a text when all workers have with it, else empty."""
        ...

    def check(self, now: float) -> str:
        """Look after what the backend depends on; a text when it has failed and all workers are lost, else empty."""
        ...

    def close(self) -> None:
        """Give everything back. Safe to call twice."""
        ...


class PacingBackend:
    """Shares by duty cycle inside the workers: works on every device, resizes at once."""

    name = "pacing"
    pace = True
    can_resize_live = True
    holds_at_once = False
    waiting = ""

    def __init__(self, device: Device, reason: str = "") -> None:
        """``reason``: why nothing better holds the shares of this GPU."""
        self.remark = (
            f"shares of {device.text} are held by pacing and not by MPS{': ' if reason else ''}{reason}"
            if device.kind == "cuda"
            else ""
        )
        # NVML counts GPUs in PCI order, CUDA by speed unless told otherwise: the UUID is the same in both.
        self._environment = {"CUDA_VISIBLE_DEVICES": device.uuid} if device.kind == "cuda" else {}
        self.worker_device = "cuda:0" if device.kind == "cuda" else device.text

    def worker_environment(self, job: Job, share: float) -> Mapping[str, str]:
        return self._environment

    def paced_share(self, share: float, cap: float) -> float:
        return share

    def attached(self, ready: Ready, share: float) -> None:
        return None

    def hold(self, pid: int, share: float) -> None:
        return None

    def lift(self, pid: int) -> None:
        return None

    def release(self, pid: int) -> None:
        return None

    def observe(self, duty: float | None, cap: float) -> float | None:
        return duty

    def evict(self, pid: int) -> None:
        return None

    def fault(self, pid: int, reason: str, now: float) -> str:
        return ""  # without MPS a fault stays in the process that made it

    def check(self, now: float) -> str:
        return ""

    def close(self) -> None:
        return None
