"""An executor from its settings: device, share backend, service."""

from __future__ import annotations

import sys

from executor.config import make_config
from executor.service import Service
from executor.shares.choose import choose_backend
from executor.shares.devices import find_device
from executor.signals import SignalWakeup
from protocol import logs
from protocol.errors import EkyaError
from protocol.packages import check_packages
from protocol.sockets import parse_address


def start(flags: dict[str, object], config_path: str | None = None) -> int:
    """Run an executor until it leaves; returns the exit code. Errors of the user go to stderr, one line each."""
    signals = SignalWakeup()
    try:
        check_packages()
        config = make_config(flags, config_path)
        logs.configure("executor", config.log_level)
        parse_address(config.connect, "--connect")
        device = find_device(config.device)
        signals.install()
        backend = choose_backend(config.share, device, config.mps_directory)
        return Service(config, device, backend, signals).run()
    except EkyaError as error:
        print(f"ekya-executor: {error}", file=sys.stderr)
        return 2
