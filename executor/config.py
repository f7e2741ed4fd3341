"""Configuration of one executor: flags for what differs from start to start, a TOML file for the rest."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from executor.limits import HandOvers, Limits, RestartPolicy
from executor.shares.choose import ShareChoice
from protocol.errors import ConfigError
from protocol.schema import Fraction, Record, Seconds


class ExecutorConfig(Record, frozen=True, kw_only=True):
    """One executor. Fields marked * are flags of ``ekya-executor``; the file of ``--config`` sets the others.

    device*: ``cpu:K`` or ``cuda:K``. connect*: the optimizer's control address. executor_id*: unique at the site;
    empty = made of host name and device. share*: who holds shares; ``auto`` takes ``mps`` on a GPU where an MPS
    daemon can be run, ``cgroup`` (CPU quota) on a core where this process may set quotas, else ``pacing``.
    wait_s*: seconds to try to reach the optimizer at the start, 0 = for ever. log_level*: debug, info, warning
    or error.

    speed: of this device relative to the one that costs are stated for. reserved_share: of the device, kept free
    for other programs. mps_directory: for the daemon's pipes and logs; short, since socket paths are limited to
    107 bytes; empty = a new one below the system's temporary directory. worker: ``module:function`` that runs one
    job in a process of its own. preload: module that the forkserver imports before workers are made.
    """

    device: str
    connect: str
    executor_id: Annotated[str, msgspec.Meta(max_length=64, pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]*)?$")] = ""
    share: ShareChoice = "auto"
    wait_s: Seconds = 30.0
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    speed: Annotated[float, msgspec.Meta(gt=0.0)] = 1.0
    reserved_share: Fraction = 0.0
    mps_directory: str = ""
    worker: Annotated[str, msgspec.Meta(pattern=r"^[\w.]+:\w+$")] = "executor.worker:main"
    preload: str = "executor.preload"
    limits: Limits = Limits()
    restarts: RestartPolicy = RestartPolicy()
    hand_overs: HandOvers = HandOvers()


def make_config(flags: dict[str, object], path: str | None = None) -> ExecutorConfig:
    """The configuration of ``flags`` (field name to value, None = not given) over the TOML file at ``path``.

    Raises:
        ConfigError: names the file, the key and what is allowed.
    """
    settings = _read(path) if path else {}
    settings.update({name: value for name, value in flags.items() if value is not None})
    where = path or "command line"
    try:
        return msgspec.convert(settings, ExecutorConfig, strict=True)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {_explain(str(error))}") from None


def _read(path: str) -> dict[str, object]:
    try:
        settings: dict[str, object] = msgspec.toml.decode(Path(path).read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: cannot read: {error.strerror or error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    return settings


def _explain(message: str) -> str:
    """msgspec's message with the key in front; for an unknown key, with the keys that are known."""
    text, _, where = message.partition(" - at `$")
    key = where.rstrip("`").lstrip(".")
    unknown = re.search(r"unknown field `(\w+)`", text)
    if unknown is None:
        return f"key {key}: {text}" if key else text
    section: dict[str, type[Record]] = {
        "": ExecutorConfig,
        "limits": Limits,
        "restarts": RestartPolicy,
        "hand_overs": HandOvers,
    }
    allowed = ", ".join(section.get(key, ExecutorConfig).__struct_fields__)
    name = f"{key}.{unknown[1]}" if key else unknown[1]
    return f"key {name} is unknown; allowed are: {allowed}"
