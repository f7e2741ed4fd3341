"""Executors started on this machine, for the demo and for experiments, and a site run with them."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

import msgspec
from rich.console import Console
from rich.live import Live

from optimizer.config import SiteConfig
from optimizer.ports import ProfilerPort
from optimizer.recorder import RunFolder
from optimizer.service import Service, install_stop_signals
from optimizer.watch import WatchState, render
from protocol.errors import EkyaError, InputError
from protocol.events import Notice, PlanSolved, TelemetryEvent, WindowClosed, WindowOpened

_STOP_GRACE_S = 10.0
_PR_SET_PDEATHSIG = 1
# Loaded before any fork: a child must not load libraries between fork and exec.
_LIBC = ctypes.CDLL(None)


def local_devices(count: int) -> tuple[str, ...]:
    """``count`` CPU devices of this machine, fewer when it has fewer cores."""
    cores = sorted(os.sched_getaffinity(0))
    return tuple(f"cpu:{core}" for core in cores[:count])


def parse_devices(text: str) -> tuple[str, ...]:
    """Names of devices, separated by commas. Raises InputError for anything else, and for one named twice."""
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if not re.fullmatch(r"(cpu|cuda):\d+", name):
            raise InputError(f"--devices: {name!r} is no device; write cuda:K or cpu:K, separated by commas")
        if names.count(name) > 1:
            raise InputError(f"--devices: {name} is named twice; a device has one executor")
    return names


def _end_with_parent() -> None:
    """An executor by itself outlives its optimizer; one of a demo must not, even if the demo is killed."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


class LocalExecutors:
    """`ekya-executor` processes of this machine; they end when this object is closed, whatever happens."""

    def __init__(self, devices: Sequence[str], address: str, log_folder: Path) -> None:
        self._processes: list[tuple[str, subprocess.Popen[bytes]]] = []
        self._logs: list[IO[bytes]] = []
        for device in devices:
            log_file = (log_folder / f"executor-{device.replace(':', '')}.log").open("ab")
            self._logs.append(log_file)
            # On a machine that is busy an optimizer may take its time; these end with it in any case.
            command = [sys.executable, "-m", "executor.cli", "--device", device, "--connect", address, "--wait", "0"]
            # A group of their own: Ctrl-C reaches the optimizer, which then stops them in order.
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_end_with_parent,  # noqa: PLW1509 - this process starts no threads of its own
            )
            self._processes.append((device, process))

    def check(self) -> None:
        """Raises EkyaError when an executor ended by itself."""
        for device, process in self._processes:
            if process.poll() is not None:
                raise EkyaError(f"the executor of {device} ended with exit code {process.returncode}; see its log")

    def close(self) -> None:
        """Stop what still runs: SIGTERM, and after a grace SIGKILL."""
        for _, process in self._processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        end = time.monotonic() + _STOP_GRACE_S
        for _, process in self._processes:
            try:
                process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for log_file in self._logs:
            log_file.close()


def run_site(
    site: SiteConfig,
    out: Path,
    profiler: Callable[[RunFolder], ProfilerPort],
    *,
    num_windows: int | None,
    devices: Sequence[str],
    console: Console,
    live: bool,
) -> int:
    """Run ``site`` with executors on ``devices`` of this machine; the exit code.

    ``live``: a screen that is redrawn, else one line per event that matters. The executors' logs and all
    files of the run lie in ``out``.

    Raises:
        InputError: the folder, an address or the policy is unusable.
        EkyaError: an executor ended by itself.
    """
    folder = RunFolder(out)
    state = WatchState(site.name)
    lines: list[TelemetryEvent] = []

    def seen(event: TelemetryEvent) -> None:
        state.apply(event)
        if not live:
            lines.append(event)

    local = msgspec.structs.replace(
        site, control="tcp://127.0.0.1:*", telemetry="tcp://127.0.0.1:*", min_executors=max(1, len(devices))
    )
    try:
        service = Service(local, folder, profiler(folder), num_windows=num_windows, on_event=seen)
        install_stop_signals(service)
        executors = LocalExecutors(devices, service.control_address, out)
        try:
            if not live:
                code = service.run(lambda: _each_line(executors, lines, console))
            else:
                with Live(console=console, refresh_per_second=4, transient=True, screen=False) as screen:
                    code = service.run(lambda: _each_screen(executors, screen, state))
        finally:
            executors.close()
        if code:
            raise EkyaError(service.finish_reason)
        return 0 if service.finish_reason else 130
    finally:
        folder.close()


def _each_screen(executors: LocalExecutors, screen: Live, state: WatchState) -> None:
    executors.check()
    screen.update(render(state))


def _each_line(executors: LocalExecutors, lines: list[TelemetryEvent], console: Console) -> None:
    executors.check()
    while lines:
        match lines.pop(0):
            case WindowOpened(window=window):
                console.print(f"window {window} opened")
            case PlanSolved() as plan if plan.phase == "plan":
                gap = f", gap {plan.gap:.2%}" if plan.gap is not None else ""
                console.print(
                    f"  plan by {plan.policy} in {plan.seconds:.2f} s: {plan.predicted:.3f} expected{gap}",
                    highlight=False,
                )
            case WindowClosed(realised=realised, predicted=predicted, window=window):
                expected = f", expected {predicted:.3f}" if predicted is not None else ""
                console.print(f"window {window} closed: accuracy {realised:.3f}{expected}", highlight=False)
            case Notice(level=level, text=text):
                console.print(f"  {level}: {text}", highlight=False, markup=False)
            case _:
                pass
