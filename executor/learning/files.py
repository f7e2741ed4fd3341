"""Files below a store: names that cannot leave it, writes that are whole or absent."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


def inside(store: Path, relative: str) -> Path | None:
    """The path of ``relative`` in ``store``; None when it is absolute or leads out (``..``, a link)."""
    root = store.resolve()
    path = (root / relative).resolve()
    if Path(relative).is_absolute() or path == root or not path.is_relative_to(root):
        return None
    return path


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` so that after a crash there is the whole file or none of it.

    Raises OSError (full disk, no rights); nothing is left behind then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)  # the rename itself is durable only now
    finally:
        os.close(folder)
