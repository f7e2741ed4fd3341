"""The four top-level packages as one program: they come from one directory and have one version."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from protocol import __version__
from protocol.errors import InputError
from protocol.messages import PROTOCOL_VERSION

_PACKAGES = ("protocol", "optimizer", "executor", "profiler")


def check_packages() -> None:
    """Raises InputError, naming the places, when the packages of this program do not come from one directory.

    They have plain names: another distribution's could stand before ours on the path.
    """
    places: dict[str, Path | None] = {}
    for name in _PACKAGES:
        spec = importlib.util.find_spec(name)
        places[name] = Path(spec.origin).resolve().parent.parent if spec and spec.origin else None
    home = places["protocol"]
    astray = [f"{name} from {place or 'nowhere'}" for name, place in places.items() if place != home]
    if astray:
        raise InputError(
            f"the packages of Ekya belong together in {home}, but Python finds {', '.join(astray)}; "
            "install Ekya into a virtual environment of its own"
        )


def version_line(program: str) -> str:
    """What ``program --version`` prints: its version and, as that decides who can talk to whom, the protocol's."""
    return f"{program} {__version__} (protocol {PROTOCOL_VERSION})"
