"""What the commands do: the parts of the system put together. With cli.py the only place that knows the profiler."""

from __future__ import annotations

import importlib.resources
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast, get_args

import msgspec
from rich.console import Console

from optimizer.config import SiteConfig, load_site, parse_site
from optimizer.local import local_devices, run_site
from optimizer.model_check import check_models
from optimizer.own_video import DEFAULT_WINDOWS, Wish, write_site
from optimizer.own_video import check as check_wish
from optimizer.policies.registry import get_policy
from optimizer.ports import ProfilerPort
from optimizer.recorder import RunFolder
from optimizer.report import build_report, final_table, read_events, write_report
from optimizer.report_comparison import build_comparison, comparison_table, write_comparison
from optimizer.service import Service, default_folder, install_stop_signals
from profiler.history import History
from profiler.microprofiler import EstimatorKnobs, ProfilingMethod
from profiler.service import SiteProfiler
from profiler.trials import TrialKnobs
from protocol import logs
from protocol.errors import EkyaError, InputError


def make_profiler(site: SiteConfig) -> Callable[[RunFolder], ProfilerPort]:
    """The micro-profiler of a site; its history lies in the run's store."""

    def make(folder: RunFolder) -> ProfilerPort:
        knobs = site.profiling
        return SiteProfiler(
            History(folder.store / "history.sqlite"),
            site.retrain,
            site.inference,
            num_streams=len(site.streams),
            budget_gpu_s=knobs.budget_gpu_s,
            window_s=site.window_s,
            trial_knobs=TrialKnobs(data_share=knobs.data_share, max_epochs=knobs.num_epochs),
            # With windows as short as the drift a difference between labels and live accuracy is mostly the drift.
            estimator_knobs=EstimatorKnobs(method=knobs.method, correct_live=False),
        )

    return make


def run_service(
    site_file: Path,
    *,
    windows: int | None,
    policy: str | None,
    out: Path | None,
    log_level: str,
    profiling: str | None = None,
) -> int:
    """`ekya-optimizer run`: serve until stopped; the exit code.

    Raises:
        InputError: the site file, the policy, the folder or an address is unusable.
    """
    site = _with_profiling(_with_policy(load_site(site_file), policy), profiling)
    check_models(site, site_file)
    logs.configure("ekya-optimizer", log_level)
    folder = RunFolder(out or default_folder(site))
    try:
        service = Service(site, folder, make_profiler(site)(folder), num_windows=windows)
        install_stop_signals(service)
        print(f"ekya-optimizer: {site.name} waits for executors at {service.control_address}", flush=True)
        print(f"ekya-optimizer: telemetry at {service.telemetry_address}, files in {folder.path}", flush=True)
        code = service.run()
        if code:
            print(f"ekya-optimizer: {service.finish_reason}", file=sys.stderr)
        return code
    finally:
        folder.close()
        _report(folder.path, quiet=True)


def run_video(
    wish: Wish, *, windows: int | None, policy: str | None, out: Path | None, num_executors: int, console: Console
) -> int:
    """`ekya-optimizer run --video`: label recordings, then run them with local executors; the exit code.

    Raises:
        InputError: an option, a video, a sample list or the golden model is unusable.
    """
    check_wish(wish)
    if policy is not None:
        get_policy(policy)
    out = out or Path("runs") / "own-video"
    _fresh(out)
    devices = local_devices(num_executors)
    site_file = write_site(wish, out, devices[0], console)
    site = _with_policy(load_site(site_file), policy)
    console.print(
        f"{len(site.streams)} streams of {', '.join(site.streams[0].classes)}; site file {site_file}",
        highlight=False,
        soft_wrap=True,
    )
    code = run_site(
        site,
        out,
        make_profiler(site),
        num_windows=windows or DEFAULT_WINDOWS,
        devices=devices,
        console=console,
        live=console.is_terminal,
    )
    if code == 0:
        _report(out, console=console)
    return code


def run_demo(*, windows: int, out: Path, policy: str, plain: bool, console: Console) -> int:
    """`ekya-optimizer demo`: the embedded city with two local executors, a table at the end; the exit code."""
    text = (importlib.resources.files("optimizer") / "demo.toml").read_text()
    site = _with_policy(parse_site(tomllib.loads(text), "demo.toml", Path()), policy)
    console.print(
        f"{len(site.streams)} cameras, {windows} windows of {site.window_s:.0f} s; each CPU core stands for a GPU. "
        "First every camera gets a model of its own; then the scenes begin to change.",
        highlight=False,
    )
    _fresh(out)
    devices = local_devices(2)
    site = _contended(site, devices, console)
    code = run_site(
        site,
        out,
        make_profiler(site),
        num_windows=windows,
        devices=devices,
        console=console,
        live=console.is_terminal and not plain,
    )
    if code == 0:
        _report(out, console=console)
    return code


def run_experiment(
    site_file: Path,
    policies: Sequence[str],
    *,
    windows: int | None,
    out: Path | None,
    devices: Sequence[str],
    console: Console,
    profiling: str | None = None,
) -> int:
    """`ekya-optimizer experiment`: the same streams and first models under each policy in turn; the exit code."""
    site = _with_profiling(load_site(site_file), profiling)
    if not policies:
        raise InputError("--policies: name at least one policy, like timeline,milp,thief,none")
    for name in policies:
        get_policy(name)
    check_models(site, site_file)
    out = out or Path("runs") / f"experiment-{site.name}"
    _fresh(out)
    console.print(f"{site.name}: first models for {len(site.streams)} streams", highlight=False)
    first = out / "first-models"
    code = run_site(site, first, make_profiler(site), num_windows=0, devices=devices, console=console, live=False)
    reports = {}
    for name in policies:
        if code:
            return code
        console.rule(name)
        folder = out / name.replace(":", "-")
        _copy_first_models(first, folder)
        code = run_site(
            _with_policy(site, name),
            folder,
            make_profiler(site),
            num_windows=windows or 6,
            devices=devices,
            console=console,
            live=False,
        )
        _report(folder, quiet=True)
        reports[name] = build_report(read_events(folder / "events.jsonl"))
    comparison = build_comparison(reports)
    write_comparison(comparison, out)
    console.print(comparison_table(comparison))
    console.print(f"report: {out / 'comparison.html'}", highlight=False)
    return code


# The demo's cameras deliver as many frames as keep this part of the machine busy at the best configuration. Measured
# with cold caches: trials and serving find a frame up to a quarter cheaper, so that 60 to 80 % are really needed.
_DEMO_LOAD = 0.9
_DEMO_FPS = (5.0, 60.0)
_MEASURE_S = 240.0


def _contended(site: SiteConfig, devices: Sequence[str], console: Console) -> SiteConfig:
    """Set the cameras' frame rate by the speed of this machine, so that there is something to decide on any."""
    best = max(site.inference, key=lambda config: (config.resolution_px, -config.frame_interval))
    question = {"device": devices[0], "streams": site.streams, "config": best}
    with console.status("measuring this machine"):
        try:
            measured = subprocess.run(
                [sys.executable, "-m", "executor.learning.measure"],
                input=msgspec.json.encode(question),
                capture_output=True,
                check=False,
                timeout=_MEASURE_S,
            )
        except subprocess.TimeoutExpired:
            raise EkyaError(
                f"measuring this machine took longer than {_MEASURE_S:g} s; it is too busy for a demo"
            ) from None
    if measured.returncode:
        raise EkyaError(f"this machine cannot be measured: {measured.stderr.decode(errors='replace').strip()[-300:]}")
    busy_s = msgspec.json.decode(measured.stdout, type=dict[str, tuple[float, ...]])["busy_s_per_frame"]
    fps = min(max(_DEMO_LOAD * len(devices) / (1.1 * sum(busy_s)), _DEMO_FPS[0]), _DEMO_FPS[1])
    fps = round(fps * 2) / 2
    load = fps * sum(busy_s) / len(devices)
    console.print(
        f"A frame costs {1000 * sum(busy_s) / len(busy_s):.1f} ms at the best configuration: "
        f"at {fps:g} frames a second the cameras take {load:.0%} of the machine.",
        highlight=False,
    )
    streams = tuple(msgspec.structs.replace(stream, fps=fps) for stream in site.streams)
    return msgspec.structs.replace(site, streams=streams)


def _with_policy(site: SiteConfig, policy: str | None) -> SiteConfig:
    site = site if policy is None else msgspec.structs.replace(site, policy=policy)
    get_policy(site.policy)  # an unknown name is told before anything is started
    return site


def _with_profiling(site: SiteConfig, method: str | None) -> SiteConfig:
    if method is None:
        return site
    if method not in get_args(ProfilingMethod):
        raise InputError(f"--profiling {method!r}: choose one of {', '.join(get_args(ProfilingMethod))}")
    profiling = msgspec.structs.replace(site.profiling, method=cast(ProfilingMethod, method))
    return msgspec.structs.replace(site, profiling=profiling)


def _fresh(out: Path) -> None:
    """Empty the folder of an earlier demo or experiment; anything else in its place is left alone."""
    if not out.exists():
        return
    ours = {"store", "state.msgpack", "events.jsonl", "first-models", "comparison.json"}
    names = {entry.name for entry in out.iterdir()} if out.is_dir() else {"a file"}
    if names and not names & ours:
        raise InputError(f"--out {out}: holds something else; choose a folder that is empty or new")
    RunFolder(out).close()  # not while another optimizer is using it
    shutil.rmtree(out)


def _copy_first_models(first: Path, folder: Path) -> None:
    shutil.copytree(first / "store", folder / "store", ignore=shutil.ignore_patterns("history.sqlite*"))
    shutil.copy2(first / "state.msgpack", folder / "state.msgpack")


def _report(folder: Path, *, console: Console | None = None, quiet: bool = False) -> None:
    events = folder / "events.jsonl"
    if not events.exists():
        return
    try:
        recorded = read_events(events)
        report = build_report(recorded)
        write_report(report, recorded, folder)
    except EkyaError:
        if quiet:
            return
        raise
    if console is not None:
        console.print(f"report: {folder / 'report.html'}", highlight=False)
        console.print(final_table(report))
