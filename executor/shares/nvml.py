"""What NVML says about the NVIDIA GPUs of this machine. The only module that talks to NVML; it never sets anything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pynvml

from protocol.errors import DeviceError
from protocol.schema import Bytes, Record


class NvidiaGpu(Record, frozen=True, kw_only=True):
    """One GPU. ``index`` counts as NVML does (PCI order); ``uuid`` names it in every process alike.

    ``num_units``: streaming multiprocessors, 0 when the driver does not tell.
    """

    index: int
    uuid: str
    name: str
    memory_bytes: Bytes
    driver: str
    num_units: int = 0


def find_gpu(index: int) -> NvidiaGpu:
    """The GPU ``cuda:index``.

    Raises:
        DeviceError: there is no NVIDIA driver, or no such GPU; the message names the valid ones.
    """
    with _nvml() as nvml:
        count = int(nvml.nvmlDeviceGetCount())
        if not 0 <= index < count:
            known = ", ".join(f"cuda:{i}" for i in range(count)) or "none"
            raise DeviceError(f"device cuda:{index} does not exist; this machine has: {known}")
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        return NvidiaGpu(
            index=index,
            uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
            name=_text(nvml.nvmlDeviceGetName(handle)),
            memory_bytes=int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
            driver=_text(nvml.nvmlSystemGetDriverVersion()),
            num_units=_num_units(nvml, handle),
        )


def used_memory_bytes(index: int) -> int:
    """Memory of the GPU ``cuda:index`` that is taken, by whomever. Raises DeviceError."""
    with _nvml() as nvml:
        return int(nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByIndex(index)).used)


@contextmanager
def _nvml() -> Iterator[Any]:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise DeviceError(
            f"no NVIDIA GPU can be used here: {error}; install the driver, or use a device like cpu:0"
        ) from None
    try:
        yield pynvml
    except pynvml.NVMLError as error:
        raise DeviceError(f"NVML fails: {error}") from None
    finally:
        pynvml.nvmlShutdown()


def _num_units(nvml: Any, handle: Any) -> int:
    """Multiprocessors of a GPU: its cores by the cores of one; 0 for an unknown architecture or an old driver."""
    try:
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
        cores = int(nvml.nvmlDeviceGetNumGpuCores(handle))
    except nvml.NVMLError:
        return 0
    each = 64 if (major, minor) in {(7, 0), (7, 2), (7, 5), (8, 0)} else 128 if major >= 8 else 0
    return cores // each if each else 0


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
