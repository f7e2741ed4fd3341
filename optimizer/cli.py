"""`ekya-optimizer`: the composition root. Parses, wires the parts together, and turns errors into exit codes."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from protocol.errors import EkyaError, InputError, UnreachableError
from protocol.packages import check_packages, version_line

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Windows = Annotated[int | None, typer.Option(min=1, help="Stop after this many windows (default: never).")]
Policy = Annotated[str | None, typer.Option(help="Planning policy instead of the site's, e.g. timeline, milp, thief.")]
Policies = Annotated[str, typer.Option(help="Policies, separated by commas.")]
Plain = Annotated[bool, typer.Option("--plain", help="Print lines instead of a live screen.")]
TraceFile = Annotated[Path, typer.Argument(metavar="TRACE.csv", help="Measured retrainings, one per row.")]
InferenceFile = Annotated[
    Path | None, typer.Option(metavar="TABLE.csv", help="Inference table (default: a built-in one of similar shape).")
]
ReuseFile = Annotated[
    Path | None, typer.Option(metavar="TABLE.csv", help="Accuracy of old models, for the policies reuse, reuse:...")
]
Predicted = Annotated[
    bool, typer.Option("--predicted/--true", help="Tell the planner the trace's predictions, or its measurements.")
]
WindowSeconds = Annotated[float, typer.Option(help="Length of a window, seconds.")]
FullShare = Annotated[float, typer.Option(help="GPU share that analysing every frame of a stream takes.")]
Quantum = Annotated[float, typer.Option(help="Smallest GPU share handed out.")]
Quantile = Annotated[float, typer.Option(help="Plan on this quantile of uncertain gains; 0.5 = what is expected.")]
Profiling = Annotated[
    str | None, typer.Option(help="calibrated, or paper: the micro-profiler of the paper (default: the site's).")
]
Budget = Annotated[float, typer.Option(help="Seconds of wall time that a policy may take for a decision.")]
LogLevel = Annotated[str, typer.Option(help="debug, info, warning or error.")]


def _version(wanted: bool) -> None:
    if wanted:
        print(version_line("ekya-optimizer"))
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version and leave.")
    ] = False,
) -> None:
    """Plan retraining windows of video analytics streams and drive the executors that carry the plans out."""


@app.command()
def run(
    site_file: Annotated[Path | None, typer.Argument(metavar="[SITE.toml]", help="The site file.")] = None,
    windows: Windows = None,
    policy: Policy = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run (default: runs/NAME).")] = None,
    log_level: LogLevel = "info",
    video: Annotated[
        list[Path] | None, typer.Option(help="Your own recording instead of a site file; may be given several times.")
    ] = None,
    golden: Annotated[str | None, typer.Option(help="With --video: torchvision detector that labels it.")] = None,
    golden_weights: Annotated[Path | None, typer.Option(help="Its weights, a local file (.pt, .safetensors).")] = None,
    golden_classes: Annotated[int, typer.Option(help="Outputs of the model in it, 0 = as published.")] = 0,
    samples: Annotated[
        list[Path] | None, typer.Option(help="Sample list of each --video instead of a golden model.")
    ] = None,
    classes: Annotated[str, typer.Option(help="Classes, separated by commas (default: those of a street).")] = "",
    class_map: Annotated[str, typer.Option(help="Ids or names of the golden model to classes: 3=car,8=car.")] = "",
    task: Annotated[str, typer.Option(help="What the students do: classification or detection.")] = "classification",
    fps: Annotated[float, typer.Option(help="Frames a second that are used of a video, at most.")] = 10.0,
    window_seconds: Annotated[float, typer.Option(help="With --video: length of a window.")] = 30.0,
    min_score: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Boxes of the golden model below are dropped.")
    ] = 0.5,
    executors: Annotated[int, typer.Option(min=1, help="With --video: local executors, one CPU core each.")] = 2,
    profiling: Profiling = None,
) -> None:
    """Serve a site: wait for executors, plan every window, record what happens.

    Started again with the same folder after a crash it adopts what runs and goes on in the same window. With --video
    everything is done on this machine: recordings are labelled, students trained and retrained, a report is written.
    """
    from optimizer.commands import run_service, run_video
    from optimizer.own_video import GOLDEN, Wish

    if video:
        if site_file is not None:
            raise InputError(f"{site_file} and --video: give a site file or videos, not both")
        wish = Wish(
            videos=tuple(video),
            samples=tuple(samples or ()),
            golden=golden or GOLDEN,
            weights=golden_weights,
            weights_classes=golden_classes,
            classes=tuple(name.strip() for name in classes.split(",") if name.strip()),
            class_map=tuple(pair.strip() for pair in class_map.split(",") if pair.strip()),
            task=task,
            fps=fps,
            window_s=window_seconds,
            min_score=min_score,
        )
        raise typer.Exit(
            run_video(wish, windows=windows, policy=policy, out=out, num_executors=executors, console=_console())
        )
    if site_file is None:
        raise InputError("give a site file, or --video FILE for a recording of your own")
    if samples or golden or golden_weights:
        raise InputError("--samples, --golden and --golden-weights belong to --video; a site file names its own")
    raise typer.Exit(
        run_service(site_file, windows=windows, policy=policy, out=out, log_level=log_level, profiling=profiling)
    )


@app.command()
def ingest(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Sample list, COCO annotation file or YOLO folder.")],
    images: Annotated[str, typer.Option(help="Folder of the pictures, or the video of a sample list.")] = "",
    form: Annotated[str, typer.Option("--format", help="auto, samples, coco or yolo.")] = "auto",
    split: Annotated[str, typer.Option(help="Only this split of a YOLO data set, like train.")] = "",
    windows: Annotated[int, typer.Option(help="Stretches of time to compare.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for summary.json and a plot of the drift.")] = None,
) -> None:
    """Check a labelled data set and say what is in it: frames, classes per stretch of time, drift, problems."""
    from optimizer.ingest import ingest as ingest_dataset

    code = ingest_dataset(
        path,
        images=images,
        form=form,
        split=split,
        windows=windows,
        as_json=as_json,
        out=out,
        console=_console(),
    )
    raise typer.Exit(code)


@app.command()
def demo(
    windows: Annotated[int, typer.Option(min=1, help="Number of windows.")] = 4,
    out: Annotated[Path, typer.Option(help="Folder of the run and its report.")] = Path("runs/demo"),
    policy: Annotated[str, typer.Option(help="Planning policy.")] = "timeline",
    plain: Plain = False,
) -> None:
    """Show the whole loop on this machine: a procedural city, two local executors, a report at the end."""
    from optimizer.commands import run_demo

    raise typer.Exit(run_demo(windows=windows, out=out, policy=policy, plain=plain, console=_console()))


@app.command()
def experiment(
    site_file: Annotated[Path, typer.Argument(metavar="SITE.toml", help="The site file.")],
    policies: Policies = "timeline,milp,thief,uniform,none",
    windows: Annotated[int | None, typer.Option(min=1, help="Windows per policy (default: the site's).")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the runs (default: runs/experiment-NAME).")] = None,
    executors: Annotated[int, typer.Option(min=1, help="Local executors, one CPU core each.")] = 2,
    devices: Annotated[
        str, typer.Option(help="One local executor for each of these instead, like cuda:0,cuda:1.")
    ] = "",
    profiling: Profiling = None,
) -> None:
    """Run the same streams under each policy in turn, for real, and compare the accuracy."""
    from optimizer.commands import run_experiment
    from optimizer.local import local_devices, parse_devices

    names = [name for name in policies.split(",") if name]
    chosen = parse_devices(devices) if devices else local_devices(executors)
    raise typer.Exit(
        run_experiment(
            site_file,
            names,
            windows=windows,
            out=out,
            devices=chosen,
            console=_console(),
            profiling=profiling,
        )
    )


@app.command()
def compare(
    problems: Annotated[list[Path] | None, typer.Argument(metavar="PROBLEM.json...", help="Saved problems.")] = None,
    random: Annotated[str | None, typer.Option(help="Make a problem instead: STREAMSxGPUSxCONFIGURATIONS.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of --random.")] = 0,
    save: Annotated[Path | None, typer.Option(help="Keep the random problem as this file.")] = None,
    limits: Annotated[
        bool,
        typer.Option(help="Give --random latency limits, own windows, few labels, unsure gains and a link to a cloud."),
    ] = False,
    planning_quantile: Annotated[
        float | None,
        typer.Option(help="Plan on this quantile of uncertain gains, not the problem's."),
    ] = None,
    policies: Policies = "timeline,milp,thief,uniform,none",
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list instead of a table.")] = False,
    budget: Annotated[float, typer.Option(min=0.01, help="Seconds that a policy may take for a problem.")] = 10.0,
    plan_out: Annotated[Path | None, typer.Option(help="Folder to keep the plans in.")] = None,
) -> None:
    """Solve saved or random problems with several policies and compare value, bound, gap and time."""
    from optimizer.compare import compare as compare_policies

    names = [name for name in policies.split(",") if name]
    compare_policies(
        problems or [],
        random=random,
        seed=seed,
        save=save,
        limits=limits,
        planning_quantile=planning_quantile,
        policies=names,
        as_json=as_json,
        budget_s=budget,
        plan_out=plan_out,
        console=_console(),
    )


@app.command()
def simulate(
    trace: TraceFile,
    streams: Annotated[str, typer.Option(help="Number of streams; several separated by commas.")] = "10",
    gpus: Annotated[str, typer.Option(help="Number of GPUs; several separated by commas.")] = "8",
    windows: Annotated[int, typer.Option(min=1, help="Windows to simulate.")] = 3,
    policies: Policies = "timeline,milp,thief,uniform,none",
    seed: Annotated[str, typer.Option(help="Seed that draws the streams; several separated by commas.")] = "0",
    inference: InferenceFile = None,
    reuse: ReuseFile = None,
    predicted: Predicted = False,
    window_s: WindowSeconds = 200.0,
    full_share: FullShare = 0.25,
    share_quantum: Quantum = 0.1,
    min_accuracy: Annotated[float, typer.Option(help="Floor on the instantaneous accuracy of every stream.")] = 0.0,
    profiling: Annotated[
        bool, typer.Option("--profiling/--free-profiling", help="Micro-profiling takes its measured time, or none.")
    ] = False,
    gate: Annotated[bool, typer.Option(help="Refuse retrained models that are no better.")] = True,
    link: Annotated[
        str, typer.Option(help="Streams may also be retrained in the cloud over cellular, satellite or two-cellular.")
    ] = "",
    planning_quantile: Quantile = 0.5,
    budget: Budget = 0.5,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list instead of tables.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for JSON and plots.")] = None,
) -> None:
    """Study policies on measured retrainings: the real coordinator and real policies in virtual time.

    Policies are those of `compare`, cloud:cellular, cloud:satellite, cloud:two-cellular (retraining in the cloud), and
    reuse, reuse:latest, reuse:NAME (old models instead of retraining; they need --reuse).
    """
    from optimizer.simulate import simulate as simulate_policies
    from optimizer.trace_study import make_study
    from optimizer.trace_world import StudyKnobs

    knobs = StudyKnobs(
        num_windows=windows,
        window_s=window_s,
        predicted=predicted,
        full_share=full_share,
        share_quantum=share_quantum,
        profiling=profiling,
        gate=gate,
        min_accuracy=min_accuracy,
        link=f"cloud:{link}" if link else "",
        planning_quantile=planning_quantile,
    )
    simulate_policies(
        make_study(trace, inference, knobs, budget, reuse),
        policies=[name for name in policies.split(",") if name],
        streams=streams,
        gpus=gpus,
        seeds=seed,
        as_json=as_json,
        out=out,
        console=_console(),
    )


@app.command()
def capacity(
    trace: TraceFile,
    target: Annotated[float, typer.Option(help="Accuracy that has to be kept.")] = 0.75,
    gpus: Annotated[str, typer.Option(help="Numbers of GPUs, separated by commas.")] = "1,2,4,8",
    streams: Annotated[
        int | None, typer.Option(help="Also: the GPUs that the other policies need to be as accurate as the first.")
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows to simulate.")] = 3,
    policies: Policies = "timeline,milp,thief,uniform,none",
    seed: Annotated[str, typer.Option(help="Seed that draws the streams; several separated by commas.")] = "0",
    inference: InferenceFile = None,
    reuse: ReuseFile = None,
    predicted: Predicted = False,
    window_s: WindowSeconds = 200.0,
    full_share: FullShare = 0.25,
    share_quantum: Quantum = 0.1,
    budget: Budget = 0.5,
    max_streams: Annotated[int, typer.Option(help="Search no further than to so many streams.")] = 64,
    max_gpus: Annotated[int, typer.Option(help="Search no further than to so many GPUs.")] = 32,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for JSON and a plot.")] = None,
) -> None:
    """The most streams that each policy keeps at an accuracy, and the GPUs that it needs; by simulation."""
    from optimizer.capacity import capacity as measure
    from optimizer.trace_study import make_study
    from optimizer.trace_world import StudyKnobs

    knobs = StudyKnobs(
        num_windows=windows,
        window_s=window_s,
        predicted=predicted,
        full_share=full_share,
        share_quantum=share_quantum,
    )
    measure(
        make_study(trace, inference, knobs, budget, reuse),
        policies=[name for name in policies.split(",") if name],
        gpus=gpus,
        target=target,
        seeds=seed,
        max_streams=max_streams,
        num_streams=streams,
        max_gpus=max_gpus,
        as_json=as_json,
        out=out,
        console=_console(),
    )


@app.command()
def explain(
    plan: Annotated[Path, typer.Argument(metavar="PLAN.json", help="A saved plan.")],
    problem: Annotated[
        Path | None, typer.Option(help="Its problem (default: the same name in ../problems, as runs keep it).")
    ] = None,
    stream: Annotated[str | None, typer.Option(help="Explain this stream (default: an overview of all).")] = None,
    out: Annotated[Path | None, typer.Option(help="Draw plan and prices into this file, like plan.svg.")] = None,
) -> None:
    """Why a stream is (not) retrained, what else it could do, and what a GPU is worth in each slot."""
    from optimizer.explain import explain as explain_plan

    explain_plan(plan, problem_path=problem, stream_id=stream, out=out, console=_console())


@app.command()
def watch(
    address: Annotated[str, typer.Argument(help="The optimizer's control address, tcp://HOST:PORT.")],
) -> None:
    """Show a running site live."""
    from optimizer.watch import watch as watch_site

    watch_site(address)


def _console() -> Console:
    """A terminal as wide as it is; elsewhere wide enough for the tables."""
    return Console() if sys.stdout.isatty() else Console(width=120)


def main() -> None:
    """Console script. Exit code 2: unusable input; 1: something went wrong here; no traceback for either."""
    # The matrices of an estimate are small, and threads that wait for each other spin on cores that executors serve on.
    # The library reads it when numpy is first imported, which no command has done yet.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        check_packages()
        app(standalone_mode=True)
    except (InputError, UnreachableError) as error:
        print(f"ekya-optimizer: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except EkyaError as error:
        print(f"ekya-optimizer: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except BrokenPipeError:
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
