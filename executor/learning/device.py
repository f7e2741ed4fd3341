"""Devices as workers see them: "cpu:K" is core K, pinned, as a GPU; "cuda:K" is a real one."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from protocol.errors import DeviceError

_DEVICE = re.compile(r"^(cpu|cuda):(\d{1,4})$")


@dataclass
class Device:
    """A device that this process has taken. ``num_units``: multiprocessors visible, 0 on CPU devices."""

    name: str
    torch_device: torch.device
    num_units: int = 0
    _idle_s: float = field(default=0.0, repr=False)
    _start: float = field(default_factory=time.monotonic, repr=False)

    @property
    def is_cuda(self) -> bool:
        return self.torch_device.type == "cuda"

    def busy_s(self) -> float:
        """Busy seconds so far: processor time on a core; on CUDA wall time less :meth:`rested`, after a synchronise."""
        if not self.is_cuda:
            return time.process_time()
        torch.cuda.synchronize(self.torch_device)
        return time.monotonic() - self._start - self._idle_s

    def rested(self, seconds: float) -> None:
        """Tell the CUDA clock that the process did nothing for ``seconds``."""
        self._idle_s += seconds

    def forget_peak(self) -> None:
        """Let :meth:`peak_memory_bytes` speak of what comes now; where the kernel forbids it, of all so far."""
        if self.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.torch_device)
            return
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def peak_memory_bytes(self) -> int:
        """Most memory this process has held since :meth:`forget_peak`, shared pages included.

        On CUDA what torch has taken from the device, without the context; resident host memory otherwise.
        """
        if self.is_cuda:
            return int(torch.cuda.max_memory_reserved(self.torch_device))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def take_device(name: str) -> Device:
    """Pin this process to the device ``name`` ("cpu:K" or "cuda:K") and give torch one host thread.

    Raises DeviceError when the name has another form or there is no such core or GPU.
    """
    match = _DEVICE.match(name)
    if match is None:
        raise DeviceError(f'device "{name}": write "cpu:K" (core K) or "cuda:K" (GPU K)')
    kind, index = match[1], int(match[2])
    torch.set_num_threads(1)
    if kind == "cpu":
        try:
            os.sched_setaffinity(0, {index})
        except OSError as error:
            cores = ", ".join(str(core) for core in sorted(os.sched_getaffinity(0)))
            raise DeviceError(f'device "{name}": this process may not run on core {index}; cores: {cores}') from error
        return Device(name, torch.device("cpu"))
    if not torch.cuda.is_available():
        raise DeviceError(f'device "{name}": torch {torch.__version__} finds no usable CUDA driver; use "cpu:K"')
    if index >= torch.cuda.device_count():
        raise DeviceError(f'device "{name}": this process sees {torch.cuda.device_count()} GPU(s), counted from 0')
    torch.cuda.set_device(index)
    units = torch.cuda.get_device_properties(index).multi_processor_count
    return Device(name, torch.device("cuda", index), num_units=int(units))


def step_back() -> int | None:
    """Let other processes of the core go first; what :func:`step_forward` takes, None where there is no way back."""
    before = os.getpriority(os.PRIO_PROCESS, 0)
    may_return = os.geteuid() == 0 or resource.getrlimit(resource.RLIMIT_NICE)[0] >= 20 - before
    if not may_return:
        return None
    os.setpriority(os.PRIO_PROCESS, 0, min(19, before + 15))
    return before


def step_forward(before: int | None) -> None:
    """End what :func:`step_back` began."""
    if before is not None:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, before)


_FAULTS = (
    "illegal memory access",
    "device-side assert",
    "illegal address",
    "misaligned address",
    "illegal instruction",
    "invalid program counter",
    "unspecified launch failure",
    "hardware stack error",
    "uncorrectable ecc",
    "mps client terminated",
    "mps server is not ready",
)


def is_gpu_fault(error: BaseException) -> bool:
    """True for CUDA errors after which this process has lost its context, and under MPS all clients have theirs."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and "cuda" in text and any(fault in text for fault in _FAULTS)


def is_out_of_memory(error: BaseException) -> bool:
    """True for host and device memory exhaustion, in whatever shape torch reports it."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text)
