"""``ekya-executor``: one device joins a site. Wrong input ends with one line on stderr and exit code 2."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from protocol.packages import version_line

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def _version(wanted: bool) -> None:
    if wanted:
        print(version_line("ekya-executor"))
        raise typer.Exit


@app.command(help="Run the jobs of one device (a GPU, or a CPU core taken as one) for an Ekya optimizer.")
def run(
    device: Annotated[str, typer.Option(help="cpu:K (a core) or cuda:K (an NVIDIA GPU).")],
    connect: Annotated[str, typer.Option(help="The optimizer's control address, tcp://HOST:PORT.")],
    executor_id: Annotated[
        str | None, typer.Option("--id", help="Name at the site; by default host name and device.")
    ] = None,
    share: Annotated[
        Literal["auto", "pacing", "cgroup", "mps"] | None, typer.Option(help="Who holds the workers' GPU shares.")
    ] = None,
    wait: Annotated[
        float | None, typer.Option(min=0.0, help="Seconds to try to reach the optimizer at the start; 0 = for ever.")
    ] = None,
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"] | None, typer.Option(help="Least level of log lines.")
    ] = None,
    config: Annotated[str | None, typer.Option(help="TOML file with further settings (docs/executor.md).")] = None,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version and leave.")
    ] = False,
) -> None:
    flags: dict[str, object] = {
        "device": device,
        "connect": connect,
        "executor_id": executor_id,
        "share": share,
        "wait_s": wait,
        "log_level": log_level,
    }
    # Imported late: --help and a mistyped flag are answered without ZeroMQ and the rest.
    from executor.start import start

    raise typer.Exit(start(flags, config))


def main() -> None:
    """The console script ``ekya-executor``."""
    app()


if __name__ == "__main__":
    main()
