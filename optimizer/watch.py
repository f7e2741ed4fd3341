"""The live screen: what a site does at this moment, made from telemetry events alone.

`WatchState` takes events in, `render` makes the screen; neither reads a clock, a socket or a terminal, so the
demo shows the same screen from inside its own process. `watch` joins a running site, early or late.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice

import msgspec
from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from protocol.events import (
    ExecutorChanged,
    GateDecided,
    JobShare,
    LabelsCollected,
    Notice,
    PlanSolved,
    ProfileEstimated,
    RetrainFinished,
    RetrainProgress,
    StreamAccuracy,
    TelemetryEvent,
    WindowClosed,
    WindowOpened,
    WorkerChanged,
)
from protocol.logs import line
from protocol.sockets import parse_address
from protocol.subscriber import Subscriber

SPARK_S = 60.0
SPARK_COLUMNS = 30
RECENT_S = 5.0  # numbers are averages over this long
STALE_JOB_S = 15.0
MAX_ROWS = 512
_BLOCKS = "▁▂▃▄▅▆▇█"
_LEVELS = {"info": "cyan", "warning": "yellow", "error": "bold red"}
_KINDS = {"inference": "green", "retrain": "magenta", "trial": "yellow", "label": "blue", "canary": "cyan"}
_DOING = {"label": "labelling", "trial": "micro-profiling", "retrain": "retraining", "canary": "comparing models"}


@dataclass(slots=True)
class StreamRow:
    """One stream: its counts of the last minute and what is being done about it."""

    events: deque[StreamAccuracy] = field(default_factory=lambda: deque(maxlen=256))
    activity: str = ""
    activity_done: float | None = None  # 0..1, for a bar
    style: str = ""
    doing: str = ""  # kind of the job that the activity is, "" = something that has happened and stays true
    last: tuple[str, str] = ("", "")  # what has happened, and its style


class WatchState:
    """Everything the screen shows. Applying an event twice changes nothing; memory is bounded."""

    def __init__(self, site: str = "") -> None:
        self.site = site
        self.now_s = 0.0  # wall time of the newest event
        self.window: WindowOpened | None = None
        self.closed: WindowClosed | None = None
        self.plan: PlanSolved | None = None
        self.streams: dict[str, StreamRow] = {}
        self.jobs: dict[str, JobShare] = {}
        self.executors: dict[str, ExecutorChanged] = {}
        self.notices: deque[Notice] = deque(maxlen=6)

    def apply(self, event: TelemetryEvent) -> None:
        self.now_s = max(self.now_s, event.time_s)
        match event:
            case WindowOpened():
                # A snapshot or a slow publisher may bring an older event after a newer one.
                if self.window is None or (event.term, event.window) >= (self.window.term, self.window.window):
                    self.window = event
            case WindowClosed():
                self.closed = event
            case PlanSolved():
                self.plan = event
            case StreamAccuracy():
                row = self._row(event.stream_id)
                if not row.events or event.time_s > row.events[-1].time_s:
                    row.events.append(event)
            case JobShare():
                self.jobs[event.job_id] = event
                _bound(self.jobs)
            case WorkerChanged():
                self._worker(event)
            case RetrainProgress():
                done = min(1.0, event.epoch.epoch / max(1, event.config.epochs))
                text = (
                    f"{event.config.config_id} {event.epoch.epoch}/{event.config.epochs} acc {event.epoch.accuracy:.2f}"
                )
                self._activity(event.stream_id, text, "magenta", "retrain", done)
            case GateDecided() if event.decision in ("kept", "rolled_back", "on_trial") or (
                event.stage != "gate" and event.decision == "refused"
            ):
                word = event.decision.replace("_", " ")
                style = {"rolled_back": "red", "refused": "yellow"}.get(event.decision, "green")
                self._activity(event.stream_id, f"model {event.version} {word}", style)
            case RetrainFinished():
                text = f"{event.accuracy_before:.2f} → {event.accuracy_after:.2f}"
                if event.promoted:
                    self._activity(event.stream_id, f"{text} live", "green")
                else:
                    self._activity(event.stream_id, f"{text} kept old: {event.reason}", "yellow")
            case LabelsCollected():
                right = "" if event.agreement is None else f", model right on {event.agreement:.0%}"
                self._activity(event.stream_id, f"{event.num_train + event.num_validation} labels{right}", "blue")
            case ProfileEstimated():
                self._activity(event.stream_id, f"profiled {len(event.retrain)} configurations", "yellow")
            case ExecutorChanged():
                self.executors[event.executor_id] = event
                _bound(self.executors)
                if event.change in ("lost", "left"):
                    self.jobs = {key: job for key, job in self.jobs.items() if job.gpu_id != event.gpu_id}
            case Notice():
                self._notice(event)

    def _row(self, stream_id: str) -> StreamRow:
        row = self.streams.setdefault(stream_id, StreamRow())
        _bound(self.streams)
        return row

    def _activity(self, stream_id: str, text: str, style: str, doing: str = "", done: float | None = None) -> None:
        row = self._row(stream_id)
        row.activity, row.style, row.doing, row.activity_done = text, style, doing, done
        if not doing:
            row.last = (text, style)

    def _worker(self, event: WorkerChanged) -> None:
        if event.change in ("finished", "failed", "stopped"):
            self.jobs.pop(event.job_id, None)
            row = self._row(event.stream_id)
            if row.doing == event.kind:
                self._activity(event.stream_id, *row.last)
        if event.change == "failed":
            text = f"{event.kind} of {event.stream_id} failed: {event.reason}"
            self._notice(Notice(time_s=event.time_s, site_s=event.site_s, level="warning", text=text))
        elif event.change == "started" and event.kind != "inference":
            self._activity(event.stream_id, _DOING[event.kind], _KINDS[event.kind], event.kind)

    def _notice(self, event: Notice) -> None:
        if event not in self.notices:
            self.notices.append(event)


def _bound(table: dict[str, StreamRow] | dict[str, JobShare] | dict[str, ExecutorChanged]) -> None:
    while len(table) > MAX_ROWS:
        del table[next(iter(table))]


# ---------------------------------------------------------------- the screen


def render(state: WatchState, *, silence_s: float = 0.0, missed: int = 0) -> RenderableType:
    """The screen. ``silence_s``: since the last event; ``missed``: events lost on the way here."""
    parts: list[RenderableType] = [_header(state), _streams(state), _jobs(state)]
    if state.notices:
        parts.append(_notices(state))
    if silence_s > 5.0:
        parts.append(Text(f"nothing heard for {silence_s:.0f} s", style="bold red"))
    if missed:
        parts.append(Text(f"{missed} events lost on the way here", style="dim"))
    return Group(*parts)


def sparkline(
    points: list[tuple[float, float]], now_s: float, span_s: float = SPARK_S, columns: int = SPARK_COLUMNS
) -> str:
    """Mean value 0..1 per column of time as a block character, newest at the right; blank = nothing known."""
    sums, counts = [0.0] * columns, [0] * columns
    for at_s, value in points:
        column = columns - 1 - int((now_s - at_s) / span_s * columns)
        if 0 <= column < columns:
            sums[column] += value
            counts[column] += 1
    top = len(_BLOCKS) - 1
    means = ((total / n if n else None) for total, n in zip(sums, counts, strict=True))
    return "".join(" " if m is None else _BLOCKS[round(min(max(m, 0.0), 1.0) * top)] for m in means)


def bar(value: float, width: int = 10) -> str:
    """A fraction as a bar of ``width`` characters."""
    full = round(min(max(value, 0.0), 1.0) * width)
    return "█" * full + "░" * (width - full)


def _header(state: WatchState) -> RenderableType:
    text = Text()
    text.append(f"site {_clean(state.site) or '?'}", style="bold")
    if state.window is not None:
        left_s = state.window.window_s - (state.now_s - state.window.time_s)
        text.append(
            f"   window {state.window.window}   term {state.window.term}   policy {_clean(state.window.policy)}"
        )
        text.append(f"   {max(0.0, left_s):.0f} s of {state.window.window_s:.0f} s left")
    elif state.executors:
        text.append("   before the first window: first models are trained, then measured")
    else:
        text.append("   waiting for executors")
    if state.plan is not None:
        plan = state.plan
        text.append(f"\n{plan.phase} {plan.revision}: ", style="bold")
        text.append(f"{plan.predicted:.4f} predicted")
        text.append(f", bound {_number(plan.bound, 4)}, gap {'-' if plan.gap is None else f'{plan.gap:.3%}'}")
        text.append(f", {plan.seconds:.2f} s, {_clean(plan.policy)} {_clean(plan.status)} ({_clean(plan.reason)})")
    if state.closed is not None:
        closed = state.closed
        text.append(f"\nwindow {closed.window} closed: ", style="bold")
        text.append(f"{closed.realised:.3f} realised, {_number(closed.predicted)} predicted")
    if state.executors:
        text.append("\nexecutors: ", style="bold")
        for executor_id, change in state.executors.items():
            style = "green" if change.change in ("joined", "rejoined") else "red"
            text.append(f"{executor_id} {change.change} ({change.gpu_id})  ", style=style)
    return Panel(text, title="ekya", title_align="left", box=box.ROUNDED)


def _streams(state: WatchState) -> RenderableType:
    table = Table(box=box.SIMPLE_HEAD, expand=True, pad_edge=False)
    for title in (
        "stream",
        "accuracy",
        "last minute",
        "model",
        "inference",
        "fps",
        "dropped",
        "retraining",
        "conditions",
    ):
        right = title in ("accuracy", "model", "fps", "dropped")
        table.add_column(title, justify="right" if right else "left", no_wrap=title != "conditions")
    for stream_id, row in sorted(state.streams.items()):
        activity = Text(_clean(row.activity), style=row.style)
        if row.activity_done is not None:
            activity = Text(f"{bar(row.activity_done, 6)} {_clean(row.activity)}", style=row.style)
        if not row.events:
            table.add_row(stream_id, "-", "", "-", "-", "-", "-", activity, "")
            continue
        last = row.events[-1]
        recent = [event for event in row.events if last.time_s - event.time_s < RECENT_S]
        scored = sum(event.num_scored for event in recent)
        accuracy = sum(event.accuracy_sum for event in recent) / scored if scored else None
        points = [(event.time_s, event.accuracy) for event in row.events if event.accuracy is not None]
        table.add_row(
            stream_id,
            Text(_number(accuracy, 2), style=_accuracy_style(accuracy)),
            sparkline(points, state.now_s),
            f"v{last.model_version}",
            _clean(last.inference_id),
            f"{_analysed_fps(row):.1f}",
            str(sum(event.num_dropped for event in recent)),
            activity,
            _clean(last.conditions),
        )
    return table


def _analysed_fps(row: StreamRow) -> float:
    """Analysed frames per second of the last seconds; the oldest event only marks where its successor starts."""
    last = row.events[-1]
    recent = [event for event in row.events if last.time_s - event.time_s < RECENT_S]
    if len(recent) < 2:
        return last.fps * last.num_analysed / last.num_frames if last.num_frames else 0.0
    return sum(event.num_analysed for event in islice(recent, 1, None)) / (last.time_s - recent[0].time_s)


def _jobs(state: WatchState) -> RenderableType:
    table = Table(box=box.SIMPLE_HEAD, expand=True, pad_edge=False)
    for title in ("GPU", "job", "stream", "granted", "achieved", "backend"):
        table.add_column(title, no_wrap=True)
    jobs = [job for job in state.jobs.values() if state.now_s - job.time_s < STALE_JOB_S]
    jobs.sort(key=lambda job: (job.gpu_id, job.kind, job.stream_id))
    for number, job in enumerate(jobs):
        first = number == 0 or jobs[number - 1].gpu_id != job.gpu_id
        granted = sum(other.share_granted for other in jobs if other.gpu_id == job.gpu_id)
        achieved = job.share_achieved
        part = 1.0 if achieved is None else achieved / max(job.share_granted, 1e-9)
        off = part > 1.1 or (part < 0.9 and job.kind != "inference")  # serving uses what its frames need
        table.add_row(
            f"{job.gpu_id} ({granted:.0%})" if first else "",
            Text(job.kind, style=_KINDS[job.kind]),
            job.stream_id,
            f"{bar(job.share_granted)} {job.share_granted:.2f}",
            Text("-" if achieved is None else f"{bar(achieved)} {achieved:.2f}", style="yellow" if off else ""),
            _clean(job.backend),
            end_section=number + 1 == len(jobs) or jobs[number + 1].gpu_id != job.gpu_id,
        )
    return table


def _notices(state: WatchState) -> RenderableType:
    text = Text()
    for number, notice in enumerate(sorted(state.notices, key=lambda notice: notice.time_s)):
        when = time.strftime("%H:%M:%S", time.localtime(notice.time_s))
        text.append(f"{chr(10) if number else ''}{when} ", style="dim")
        text.append(_clean(notice.text), style=_LEVELS[notice.level])
    return text


def _accuracy_style(accuracy: float | None) -> str:
    if accuracy is None:
        return "dim"
    return "bold green" if accuracy >= 0.8 else "bold yellow" if accuracy >= 0.6 else "bold red"


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _clean(text: str, limit: int = 160) -> str:
    """Text off the wire must not steer the terminal."""
    text = "".join(letter if letter.isprintable() else " " for letter in text[: limit + 1])
    return text if len(text) <= limit else text[: limit - 1] + "…"


# ---------------------------------------------------------------- joining a site


def watch(
    control_address: str,
    *,
    telemetry_address: str = "",
    timeout_s: float = 5.0,
    console: Console | None = None,
    until: Callable[[WatchState], bool] = lambda state: False,
) -> WatchState:
    """Show a site until the user interrupts (or ``until`` says so); the last state.

    ``telemetry_address`` overrides the one the optimizer tells (for a tunnel). Where the output is no terminal,
    events are printed as lines instead.

    Raises:
        InputError: ``control_address`` is no address.
        UnreachableError: no optimizer answers at ``control_address`` within ``timeout_s``.
        VersionMismatchError: the optimizer speaks another protocol version.
    """
    console = console if console is not None else Console()
    control_address = parse_address(control_address, "ADDRESS")
    with Subscriber(control_address, telemetry_address=telemetry_address) as subscriber:
        state = WatchState(subscriber.start(timeout_s).site)
        try:
            if console.is_terminal:
                _show(subscriber, state, console, until)
            else:
                _print(subscriber, state, console, until)
        except KeyboardInterrupt:
            pass
        return state


def _show(subscriber: Subscriber, state: WatchState, console: Console, until: Callable[[WatchState], bool]) -> None:
    heard_s = time.monotonic()
    with Live(render(state), console=console, screen=True, auto_refresh=False) as live:
        while not until(state):
            redraw_s = time.monotonic() + 0.25
            while (left_s := redraw_s - time.monotonic()) > 0:
                received = subscriber.recv(int(left_s * 1000) + 1)
                if received is not None:
                    state.apply(received.event)
                    heard_s = time.monotonic()
            live.update(render(state, silence_s=time.monotonic() - heard_s, missed=subscriber.missed), refresh=True)


def _print(subscriber: Subscriber, state: WatchState, console: Console, until: Callable[[WatchState], bool]) -> None:
    while not until(state):
        received = subscriber.recv(250)
        if received is not None:
            state.apply(received.event)
            console.print(_line(received.event), markup=False, highlight=False, soft_wrap=True)


def _line(event: TelemetryEvent) -> str:
    fields = msgspec.to_builtins(event)
    kind = fields.pop("type")
    return line(kind, **{key: value for key, value in fields.items() if not isinstance(value, dict | list | tuple)})
