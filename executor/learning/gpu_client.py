"""A process that uses a GPU as it is told: the client side of ``make gpu-check``.

One JSON object per message, one answer to each command: ``{"ok": true, ...}`` or ``{"ok": false, "error": ...}``.
Long commands (``work``, ``serve``) end after their seconds, or when the next command comes, which is used up by
that. Times are of the machine's monotonic clock, so those of two clients can be compared.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from executor.child import die_with_parent
from executor.learning import checkpoints
from executor.learning.datasets import CropSet
from executor.learning.device import Device, take_device
from executor.learning.inference import CropClassifier
from executor.learning.models import build_student
from executor.learning.training import CropTrainer
from executor.shares.pacing import Pacer
from protocol.schema import RetrainConfig, StudentSpec

Answer = dict[str, Any]
NUM_CLASSES = 6
NUM_CROPS = 512

_ILLEGAL_ADDRESS = r"""
extern "C" __global__ void reach_out(float* at) { at[1LL << 40] = 1.0f; }
"""


def main(connection: Connection) -> None:
    """Answer commands until ``exit`` or the end of the pipe."""
    Client(connection).run()


class Client:
    """The state of one client: its device and what it has built on it."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._started = time.monotonic()
        self._device: Device | None = None
        self._leaving = False
        self._reach_out: Callable[..., object] = lambda *arguments: None
        self._steps: dict[tuple[object, ...], Callable[[], int]] = {}

    def run(self) -> None:
        """Answer until told to leave; an error is an answer, and the process stays."""
        die_with_parent()
        while True:
            try:
                command = json.loads(self._connection.recv_bytes())
            except (EOFError, OSError):
                return
            if command["do"] == "exit":
                self._send({"ok": True, "at_s": time.monotonic()})
                return
            self._send(self._answer(command))
            if self._leaving:
                return

    def _interrupted(self) -> dict[str, Any]:
        """The command that has come in the middle of another one; it is used up, except that ``exit`` is obeyed."""
        command: dict[str, Any] = json.loads(self._connection.recv_bytes())
        self._leaving = command["do"] == "exit"
        return command

    def _send(self, answer: Answer) -> None:
        self._connection.send_bytes(json.dumps(answer).encode())

    def _answer(self, command: dict[str, Any]) -> Answer:
        began = time.monotonic()
        try:
            answer: Answer = getattr(self, f"_do_{command['do']}")(command)
        except Exception as error:
            text = " | ".join(str(error).splitlines())[:600]
            return {
                "ok": False,
                "error": f"{type(error).__name__}: {text}",
                "began_s": began,
                "at_s": time.monotonic(),
            }
        return {"ok": True, "began_s": began, "at_s": time.monotonic(), **answer}

    @property
    def _taken(self) -> Device:
        if self._device is None:
            raise RuntimeError("the device has not been opened")
        return self._device

    # ------------------------------------------------------------ commands

    def _do_open(self, command: dict[str, Any]) -> Answer:
        """Take the device, run one kernel; how long each took."""
        marks = {"fork_to_open_s": time.monotonic() - self._started}
        start = time.monotonic()
        self._device = device = take_device(command["device"])
        marks["take_device_s"] = time.monotonic() - start
        start = time.monotonic()
        (torch.ones(8, device=device.torch_device) + 1).sum().item()
        marks["first_kernel_s"] = time.monotonic() - start
        answer: Answer = {"pid": os.getpid(), "num_units": device.num_units, "timings": marks}
        if device.is_cuda:
            free, total = torch.cuda.mem_get_info(device.torch_device)
            answer |= {"memory_free_bytes": free, "memory_total_bytes": total}
            answer["name"] = torch.cuda.get_device_properties(device.torch_device).name
        answer["mps_environment"] = {name: value for name, value in os.environ.items() if name.startswith("CUDA_")}
        return answer

    def _do_work(self, command: dict[str, Any]) -> Answer:
        """Repeat a step for ``seconds`` (None = until the next command) at a duty cycle of ``share``."""
        device = self._taken
        step = self._step_of(command)
        for _ in range(3):
            step()
        device.busy_s()  # waits for what the warm-up has left in the queue
        pacer = Pacer(command.get("share", 1.0), time.monotonic, device.busy_s, self._rest, burst_s=0.02)
        seconds = command.get("seconds")
        start, busy = time.monotonic(), device.busy_s()
        items, times = 0, list[float]()
        while seconds is None or time.monotonic() - start < seconds:
            before = time.monotonic()
            items += step()
            device.busy_s()
            times.append(time.monotonic() - before)
            if seconds is None and self._connection.poll(0):
                self._interrupted()
                break
            pacer.pace()
        wall, busy = time.monotonic() - start, device.busy_s() - busy
        return {
            "items": items,
            "wall_s": wall,
            "busy_share": busy / wall,
            "per_s": items / wall,
            "step_ms_p50": float(np.percentile(times, 50)) * 1e3,
            "step_ms_p99": float(np.percentile(times, 99)) * 1e3,
        }

    def _do_serve(self, command: dict[str, Any]) -> Answer:
        """Analyse frame i at ``zero_s + i / fps`` from frame ``first`` on.

        A command ``until`` ends it before that frame, any other at once. ``results``: [frame, due, done].
        """
        step = self._step_of(command)
        for _ in range(3):
            step()
        self._send({"ok": True, "warm": True, "at_s": time.monotonic()})
        told = self._interrupted()
        if self._leaving:
            return {"results": []}
        zero, fps, index = float(told["zero_s"]), float(told["fps"]), int(told["first"])
        last: int | None = None
        results: list[tuple[int, float, float]] = []
        while last is None or index < last:
            due = zero + index / fps
            if self._connection.poll(max(0.0, due - time.monotonic())):
                said = self._interrupted()
                if said["do"] != "until":
                    break
                last = int(said["index"])
                continue
            step()
            self._taken.busy_s()
            results.append((index, due, time.monotonic()))
            index += 1
        return {"results": results}

    def _do_allocate(self, command: dict[str, Any]) -> Answer:
        """Take and fill device memory; gives it back."""
        block = torch.empty(int(command["bytes"]), dtype=torch.uint8, device=self._taken.torch_device)
        block.fill_(1)
        self._taken.busy_s()
        del block
        if self._taken.is_cuda:
            torch.cuda.empty_cache()
        return {}

    def _do_memory(self, command: dict[str, Any]) -> Answer:
        return {"peak_bytes": self._taken.peak_memory_bytes()}

    def _do_prepare_fault(self, command: dict[str, Any]) -> Answer:
        """Everything that takes time before the fault."""
        if command["kind"] == "address":
            self._reach_out = torch.cuda._compile_kernel(_ILLEGAL_ADDRESS, "reach_out")
        return {}

    def _do_checkpoint(self, command: dict[str, Any]) -> Answer:
        """Save a new student of a stream below ``store``, so that a worker can serve with it."""
        student = build_student(StudentSpec(architecture=command["net"]), len(command["classes"]))
        ref = checkpoints.save(
            Path(command["store"]),
            student,
            stream_id=command["stream_id"],
            version=1,
            classes=tuple(command["classes"]),
            crop_px=32,
        )
        return {"checkpoint": msgspec.to_builtins(ref)}

    def _do_fault(self, command: dict[str, Any]) -> Answer:
        """Provoke a fatal GPU fault: an illegal address, or a device-side assertion. Never ends well on a GPU."""
        device = self._taken.torch_device
        if command["kind"] == "address":
            self._reach_out((1, 1, 1), (1, 1, 1), (torch.zeros(1, device=device),))
        else:
            torch.zeros(4, device=device)[torch.tensor([1 << 20], device=device)]
        torch.cuda.synchronize(device)
        return {"note": "no fault was reported"}

    # ------------------------------------------------------------ work

    def _rest(self, seconds: float) -> None:
        before = time.monotonic()
        time.sleep(seconds)
        self._taken.rested(time.monotonic() - before)

    def _step_of(self, command: dict[str, Any]) -> Callable[[], int]:
        """One step of a kind of work, built once; returns the items (crops, products) that it has done."""
        key = (command["kind"], command.get("net"), command.get("batch", 32), command.get("px", 64))
        if key not in self._steps:
            self._steps[key] = self._build(*key)
        return self._steps[key]

    def _build(self, kind: str, net: Any, batch: int, px: int) -> Callable[[], int]:
        device = self._taken
        if kind == "matmul":
            left = torch.randn(batch, batch, device=device.torch_device)

            def multiply() -> int:
                torch.mm(left, left)
                return 1

            return multiply
        draw = np.random.default_rng(1)
        crops: NDArray[np.uint8] = draw.integers(0, 256, (max(batch, NUM_CROPS), px, px, 3), np.uint8)
        spec = StudentSpec(architecture=net)
        if kind == "infer":
            classifier = CropClassifier(build_student(spec, NUM_CLASSES), device, 0)

            def infer() -> int:
                classifier.classify(crops[:batch])
                return batch

            return infer
        count = len(crops)
        labels = draw.integers(0, NUM_CLASSES, count)
        nothing = np.zeros(count, np.bool_)
        data = CropSet(crops, labels, np.arange(count), nothing, nothing)
        student = build_student(spec, NUM_CLASSES).to(device.torch_device)
        # A rate that cannot diverge: random labels teach nothing, only the work counts.
        config = RetrainConfig(config_id="check", epochs=1, batch_size=batch, learning_rate=1e-6)
        trainer = CropTrainer(student.train(), None, config, data, device, 0)

        def train() -> int:
            trainer.batch(torch.from_numpy(draw.integers(0, count, batch)))
            return batch

        return train
