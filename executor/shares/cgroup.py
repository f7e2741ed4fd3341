"""Shares of a CPU core by the kernel: every worker in a control group with a CPU quota.

A quota is held whatever the worker does, changes at once, and needs no help from the worker. It binds from Ready on:
what a worker does to start, to load another model beside its work, or to leave, is not charged to its share, as with
pacing. Both versions of control groups are supported; whether this process may use them is found out by doing it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

from executor.links import Ready
from executor.shares.devices import Device
from protocol.errors import DeviceError
from protocol.logs import line
from protocol.messages import Job

log = logging.getLogger(__name__)

PERIOD_US = 50_000
"""Short, so that a stream that has used its quota up waits tens of milliseconds; shares down to 1/50 are exact."""

LEAST_QUOTA_US = 1_000  # the kernel takes no less
UNLIMITED = -1
WEIGHT = 10
"""Of all workers together against other groups and sessions of the machine, which have 1 each."""


class Groups:
    """The control groups of one executor: a directory of its own below the one it runs in, one group per worker."""

    def __init__(self, parent: Path, version: int, owner: int | None = None) -> None:
        """``parent``: an existing group that this process may make groups in. Raises DeviceError."""
        self._version, self._parent = version, parent
        self._root = parent / f"ekya-{owner or os.getpid()}"
        self._moved = False
        remove_stale(parent)
        try:
            self._root.mkdir(exist_ok=True)
            if version == 2:
                self._delegate()
                (self._root / "cpu.weight").write_text(str(WEIGHT * 100))
            else:
                (self._root / "cpu.shares").write_text(str(WEIGHT * 1024))
        except OSError as error:
            self.close()
            raise DeviceError(f"control group {self._root}: {error.strerror or error}") from None

    def hold(self, pid: int, quota_us: int) -> None:
        """Give process ``pid`` this much of a core's time per period (UNLIMITED: all it can get). Raises OSError."""
        group = self._root / str(pid)
        new = not group.is_dir()
        if new:
            group.mkdir()
        if self._version == 2:
            text = "max" if quota_us == UNLIMITED else str(quota_us)
            (group / "cpu.max").write_text(f"{text} {PERIOD_US}")
        else:
            if new:
                (group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
            (group / "cpu.cfs_quota_us").write_text(str(quota_us))
        if new:
            (group / "cgroup.procs").write_text(str(pid))

    def holds(self, pid: int) -> bool:
        return (self._root / str(pid)).is_dir()

    def remove(self, pid: int) -> bool:
        """Remove the group of a process that has left; False while the kernel still sees something in it."""
        try:
            (self._root / str(pid)).rmdir()
        except FileNotFoundError:
            return True
        except OSError:
            return False
        return True

    def _delegate(self) -> None:
        """Version 2: enable the CPU controller for the groups below, which a group with processes in it may not.

        So this process moves aside where it is alone in its group, as in a systemd unit with Delegate=yes.
        """
        control = self._parent / "cgroup.subtree_control"
        if "cpu" not in _words(control):
            if _words(self._parent / "cgroup.procs") == [str(os.getpid())]:
                aside = self._root.with_name(f"{self._root.name}-main")
                aside.mkdir(exist_ok=True)
                (aside / "cgroup.procs").write_text(str(os.getpid()))
                self._moved = True
            control.write_text("+cpu")
        (self._root / "cgroup.subtree_control").write_text("+cpu")

    def close(self) -> None:
        """Remove all that is empty."""
        if self._moved:
            with contextlib.suppress(OSError):
                (self._parent / "cgroup.subtree_control").write_text("-cpu")
                (self._parent / "cgroup.procs").write_text(str(os.getpid()))
                self._root.with_name(f"{self._root.name}-main").rmdir()
            self._moved = False
        for group in self._root.glob("*/"):
            with contextlib.suppress(OSError):
                group.rmdir()
        with contextlib.suppress(OSError):
            self._root.rmdir()


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def remove_stale(parent: Path) -> None:
    """Remove the groups of executors that were killed."""
    for root in parent.glob("ekya-*"):
        owner = root.name.removeprefix("ekya-").removesuffix("-main")
        if not owner.isdecimal() or Path(f"/proc/{owner}").exists():
            continue
        for group in (*root.glob("*/"), root):
            with contextlib.suppress(OSError):
                group.rmdir()


def find_parent(own: str, mounts: str) -> tuple[Path, int]:
    """The group below which ours go, and the version, by the texts of /proc/self/cgroup and /proc/self/mounts.

    Raises:
        DeviceError: there is no CPU controller here.

    >>> find_parent("2:cpuacct,cpu:/a", "cgroup /sys/fs/cgroup/cpu cgroup rw,cpuacct,cpu 0 0")
    (PosixPath('/sys/fs/cgroup/cpu/a'), 1)
    >>> find_parent("0::/user/x", "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0")
    (PosixPath('/sys/fs/cgroup/user/x'), 2)
    """
    groups = {}
    for row in own.splitlines():
        _, controllers, path = row.split(":", 2)
        groups.update(dict.fromkeys(controllers.split(","), path))
    unified: Path | None = None
    for row in mounts.splitlines():
        _, where, kind, options = row.split()[:4]
        mount = Path(re.sub(r"\\(\d{3})", lambda found: chr(int(found[1], 8)), where))
        if kind == "cgroup" and "cpu" in options.split(",") and "cpu" in groups:
            return _below(mount, groups["cpu"]), 1
        if kind == "cgroup2" and unified is None:
            unified = mount
    if unified is None or "" not in groups:
        raise DeviceError("no control group with a CPU controller is mounted")
    return _below(unified, groups[""]), 2


def _below(mount: Path, path: str) -> Path:
    return mount / path.lstrip("/")


def open_groups() -> Groups:
    """Control groups that work: a quota is set and a process of ours put under it.

    Raises:
        DeviceError: what this process may not do.
    """
    try:
        parent, version = find_parent(Path("/proc/self/cgroup").read_text(), Path("/proc/self/mounts").read_text())
    except OSError as error:
        raise DeviceError(f"control groups: {error}") from None
    groups = Groups(parent, version)
    probe = subprocess.Popen(["sleep", "60"], stdin=subprocess.DEVNULL)
    try:
        groups.hold(probe.pid, PERIOD_US // 2)
        groups.hold(probe.pid, UNLIMITED)
        found = Path(f"/proc/{probe.pid}/cgroup").read_text()
        if f"ekya-{os.getpid()}/{probe.pid}" not in found:
            raise DeviceError("a process cannot be put into a control group here")
    except (OSError, DeviceError) as error:
        groups.close()
        raise DeviceError(f"no CPU quota can be set here: {error}") from None
    finally:
        probe.kill()
        probe.wait()
        groups.remove(probe.pid)
    return groups


class CgroupBackend:
    """Shares of a core by CPU quota."""

    name = "cgroup"
    pace = False
    can_resize_live = True
    holds_at_once = True
    waiting = ""
    remark = ""

    def __init__(self, device: Device, groups: Groups | None = None) -> None:
        """Raises DeviceError when this process may not use control groups."""
        self.worker_device = device.text
        self._groups = groups or open_groups()
        self._leaving: set[int] = set()

    def worker_environment(self, job: Job, share: float) -> Mapping[str, str]:
        return {}

    def paced_share(self, share: float, cap: float) -> float:
        return share

    def attached(self, ready: Ready, share: float) -> None:
        return None

    def hold(self, pid: int, share: float) -> None:
        self._set(pid, UNLIMITED if share >= 1.0 else max(LEAST_QUOTA_US, round(share * PERIOD_US)))

    def lift(self, pid: int) -> None:
        if self._groups.holds(pid):
            self._set(pid, UNLIMITED)

    def release(self, pid: int) -> None:
        if not self._groups.remove(pid):
            self._leaving.add(pid)

    def observe(self, duty: float | None, cap: float) -> float | None:
        return duty

    def evict(self, pid: int) -> None:
        self.lift(pid)  # a worker at a hundredth of a core would take minutes to die

    def fault(self, pid: int, reason: str, now: float) -> str:
        return ""

    def check(self, now: float) -> str:
        self._leaving = {pid for pid in self._leaving if not self._groups.remove(pid)}
        return ""

    def close(self) -> None:
        self._groups.close()

    def _set(self, pid: int, quota_us: int) -> None:
        try:
            self._groups.hold(pid, quota_us)
        except OSError as error:  # the worker has died meanwhile, or somebody has taken the group away
            log.warning("%s", line("cgroup_quota", worker_pid=pid, quota_us=quota_us, reason=error))
