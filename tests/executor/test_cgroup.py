"""CPU quotas by control groups: the real ones where this process may use them, the files' texts everywhere."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from executor.shares import choose
from executor.shares.cgroup import LEAST_QUOTA_US, PERIOD_US, CgroupBackend, Groups, find_parent, open_groups
from executor.shares.choose import choose_backend
from executor.shares.devices import Device
from protocol.errors import DeviceError
from tests.executor.a_core import CORE

CPU = Device(kind="cpu", index=int(CORE.removeprefix("cpu:")), memory_bytes=1)
GPU = Device(kind="cuda", index=0, memory_bytes=1, uuid="GPU-1")
BURN = "import time\nwhile True: pass"


def may_set_quotas() -> str:
    try:
        open_groups().close()
    except DeviceError as error:
        return str(error)
    return ""


needs_quotas = pytest.mark.skipif(bool(may_set_quotas()), reason=may_set_quotas() or "quotas can be set")


@pytest.fixture
def burner() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", BURN])
    yield process
    process.kill()
    process.wait()


def processor_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@needs_quotas
@pytest.mark.process
def test_a_process_gets_its_quota_and_not_more_and_a_new_one_at_once(burner: subprocess.Popen[bytes]) -> None:
    backend = CgroupBackend(CPU)
    try:
        for share in (0.2, 0.6):
            backend.hold(burner.pid, share)
            time.sleep(0.1)
            start, before = time.monotonic(), processor_s(burner.pid)
            time.sleep(1.5)
            used = (processor_s(burner.pid) - before) / (time.monotonic() - start)
            # A busy machine may give less; a quota that is not held gives all of a core.
            assert used < share * 1.05 + 0.03
        backend.lift(burner.pid)
    finally:
        burner.kill()
        burner.wait()
        backend.release(burner.pid)
        backend.close()
    assert not list(Path("/sys/fs/cgroup").rglob(f"ekya-{os.getpid()}"))


@needs_quotas
def test_the_groups_of_a_killed_executor_are_removed_by_the_next_one() -> None:
    parent, version = find_parent(Path("/proc/self/cgroup").read_text(), Path("/proc/self/mounts").read_text())
    ended = subprocess.Popen(["true"])
    ended.wait()
    left = parent / f"ekya-{ended.pid}"
    (left / "17").mkdir(parents=True)
    Groups(parent, version, owner=os.getpid()).close()
    assert not left.exists()


@pytest.mark.parametrize("version", [1, 2])
def test_a_quota_is_written_as_the_kernel_reads_it(tmp_path: Path, version: int) -> None:
    backend = CgroupBackend(CPU, Groups(tmp_path, version, owner=os.getpid()))
    group = tmp_path / f"ekya-{os.getpid()}" / "123"
    texts = []
    for share in (0.3, 1.0, 0.0001):
        backend.hold(123, share)
        name = "cpu.max" if version == 2 else "cpu.cfs_quota_us"
        texts.append((group / name).read_text())
    quotas = [round(0.3 * PERIOD_US), LEAST_QUOTA_US]
    if version == 2:
        assert texts == [f"{quotas[0]} {PERIOD_US}", f"max {PERIOD_US}", f"{quotas[1]} {PERIOD_US}"]
        assert (tmp_path / "cgroup.subtree_control").read_text() == "+cpu"
    else:
        assert texts == [str(quotas[0]), "-1", str(quotas[1])]
        assert (group / "cpu.cfs_period_us").read_text() == str(PERIOD_US)
    assert (group / "cgroup.procs").read_text() == "123"


def test_in_version_2_a_process_alone_in_its_group_moves_aside_and_back(tmp_path: Path) -> None:
    (tmp_path / "cgroup.procs").write_text(f"{os.getpid()}\n")
    groups = Groups(tmp_path, 2, owner=os.getpid())
    aside = tmp_path / f"ekya-{os.getpid()}-main" / "cgroup.procs"
    assert aside.read_text() == str(os.getpid())
    aside.unlink()  # the files of a real group vanish with it
    groups.close()
    assert (tmp_path / "cgroup.subtree_control").read_text() == "-cpu"
    assert not aside.parent.exists()


def test_a_worker_that_has_died_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = Groups(tmp_path, 1, owner=os.getpid())

    def refuse(pid: int, quota_us: int) -> None:
        raise ProcessLookupError(3, "No such process")

    monkeypatch.setattr(groups, "hold", refuse)
    backend = CgroupBackend(CPU, groups)
    backend.hold(1, 0.5)
    backend.evict(1)
    backend.release(1)
    assert backend.check(0.0) == ""
    backend.close()


def test_auto_takes_quotas_where_it_may_and_pacing_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: Device) -> CgroupBackend:
        raise DeviceError("no CPU quota can be set here: Read-only file system")

    monkeypatch.setattr(choose, "CgroupBackend", refuse)
    assert choose_backend("auto", CPU).name == "pacing"
    with pytest.raises(DeviceError, match="--share pacing"):
        choose_backend("cgroup", CPU)
    with pytest.raises(DeviceError, match="cuda:0"):
        choose_backend("cgroup", GPU)


def test_no_controller_is_an_error_that_says_so() -> None:
    with pytest.raises(DeviceError, match="no control group"):
        find_parent("", "proc /proc proc rw 0 0")
