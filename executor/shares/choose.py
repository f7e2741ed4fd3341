"""Which share backend a device gets."""

from __future__ import annotations

from typing import Literal

from executor.shares.backend import PacingBackend, ShareBackend
from executor.shares.devices import Device
from protocol.errors import DeviceError


def choose_backend(choice: Literal["auto", "pacing", "mps"], device: Device, mps_directory: str = "") -> ShareBackend:
    """The backend for ``device``; ``auto`` is MPS where its daemon can be run, else pacing.

    Raises:
        DeviceError: MPS was asked for and cannot be had.
    """
    if choice == "mps":
        raise DeviceError(f"MPS needs an NVIDIA GPU; {device.text} is none; use --share pacing")
    return PacingBackend(device)
