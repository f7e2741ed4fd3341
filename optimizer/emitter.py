"""Where the parts of the coordinator put what is to be done, in order."""

from __future__ import annotations

from typing import Literal

from optimizer.ports import Output, Publish, Save, Send
from protocol import messages as m
from protocol.events import Notice, TelemetryEvent


class Emitter:
    """Collects the outputs of one call of ``Coordinator.handle``."""

    def __init__(self) -> None:
        self._out: list[Output] = []

    def take(self) -> list[Output]:
        """What was collected since the last call."""
        taken, self._out = self._out, []
        return taken

    def add(self, *outputs: Output) -> None:
        self._out.extend(outputs)

    def save(self) -> None:
        """The state has to be on disk before anybody hears of what follows from it."""
        if not any(isinstance(output, Save) for output in self._out):
            self._out.insert(0, Save())

    def send(self, executor_id: str, message: m.Down) -> None:
        self._out.append(Send(executor_id=executor_id, message=message))

    def publish(self, event: TelemetryEvent) -> None:
        self._out.append(Publish(event=event))

    def notice(self, level: Literal["info", "warning", "error"], text: str) -> None:
        self._out.append(Publish(event=Notice(level=level, text=text)))
