"""Which share backend a device gets."""

from __future__ import annotations

import logging
import shutil
from typing import Literal

from executor.shares.backend import PacingBackend, ShareBackend
from executor.shares.cgroup import CgroupBackend
from executor.shares.devices import Device
from executor.shares.mps import MpsBackend
from executor.shares.mps_control import PROGRAM, MpsDaemon
from protocol.errors import DeviceError
from protocol.logs import line

ShareChoice = Literal["auto", "pacing", "cgroup", "mps"]

log = logging.getLogger(__name__)


def choose_backend(choice: ShareChoice, device: Device, mps_directory: str = "") -> ShareBackend:
    """The backend for ``device``. ``auto`` is MPS on a GPU where its daemon can be run, CPU quotas on a core where
    this process may set them, else pacing.

    Raises:
        DeviceError: what was asked for cannot be had.
    """
    if choice == "cgroup" and device.kind != "cpu":
        raise DeviceError(f"CPU quotas hold shares of cores, {device.text} is none; use --share mps or pacing")
    if device.kind == "cpu" and choice in ("auto", "cgroup"):
        try:
            return CgroupBackend(device)
        except DeviceError as error:
            if choice == "cgroup":
                raise DeviceError(f"{error}; use --share pacing") from None
            log.info("%s", line("cgroup_not_used", reason=str(error)))
            return PacingBackend(device)
    if choice == "mps" and device.kind != "cuda":
        raise DeviceError(f"MPS needs an NVIDIA GPU, {device.text} is none; use --share pacing")
    program = shutil.which(PROGRAM)
    if choice == "mps" and program is None:
        raise DeviceError(f"MPS needs the program {PROGRAM} of the NVIDIA driver; install it or use --share pacing")
    if choice == "pacing" or device.kind != "cuda":
        return PacingBackend(device, "as asked for")
    if program is None:
        return PacingBackend(device, f"the program {PROGRAM} of the NVIDIA driver is not on the PATH")
    daemon = MpsDaemon(device.uuid, mps_directory, program)
    try:
        return MpsBackend(device, daemon)
    except DeviceError as error:
        daemon.close()
        if choice == "mps":
            raise
        log.warning("%s", line("mps_not_used", reason=str(error)))
        return PacingBackend(device, str(error))
