"""The device that an executor owns: ``cpu:K``, a CPU core taken as a GPU, or ``cuda:K``, an NVIDIA GPU."""

from __future__ import annotations

import os
import re
from typing import Literal

from executor.shares import nvml
from protocol.errors import DeviceError
from protocol.schema import Bytes, GpuSpec, Record


class Device(Record, frozen=True, kw_only=True):
    """A device that exists. ``uuid`` and ``name`` are empty and ``num_units`` (multiprocessors) is 0 for CPU cores."""

    kind: Literal["cpu", "cuda"]
    index: int
    memory_bytes: Bytes
    uuid: str = ""
    name: str = ""
    num_units: int = 0

    @property
    def text(self) -> str:
        """As the user writes it."""
        return f"{self.kind}:{self.index}"


def find_device(text: str) -> Device:
    """The device that ``text`` names.

    A core's memory is half of the machine's divided by its cores: the other half is for the system, the
    optimizer and the page cache.

    Raises:
        DeviceError: not of the form ``cpu:K`` or ``cuda:K``, or it does not exist; names the valid ones.
    """
    match = re.fullmatch(r"(cpu|cuda):(\d{1,4})", text.strip())
    if match is None:
        raise DeviceError(f"device {text!r} is not known; write cpu:K (a CPU core) or cuda:K (an NVIDIA GPU)")
    index = int(match[2])
    if match[1] == "cuda":
        gpu = nvml.find_gpu(index)
        return Device(
            kind="cuda",
            index=index,
            memory_bytes=gpu.memory_bytes,
            uuid=gpu.uuid,
            name=gpu.name,
            num_units=gpu.num_units,
        )
    cores = sorted(os.sched_getaffinity(0))
    if index not in cores:
        known = ", ".join(f"cpu:{core}" for core in cores)
        raise DeviceError(f"device cpu:{index} does not exist for this process; it may use: {known}")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device(kind="cpu", index=index, memory_bytes=memory // 2 // max(1, os.cpu_count() or 1))


def gpu_spec(device: Device, gpu_id: str, speed: float = 1.0) -> GpuSpec:
    """The device as the planner sees it. ``speed`` is relative to the device that costs are stated for."""
    return GpuSpec(gpu_id=gpu_id, speed=speed, memory_bytes=device.memory_bytes)
