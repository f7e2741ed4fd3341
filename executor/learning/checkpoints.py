"""Checkpoints: a safetensors file and a manifest beside it, trusted only by SHA-256.

``checkpoints/STREAM/vNNNNNN-HASH.safetensors`` and the same name with ``.json``. The name holds the hash,
so a file is never replaced by another content, and a reference handed out stays good. The manifest is
written last: it commits the checkpoint.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import msgspec
import safetensors.torch
import torch
from safetensors import SafetensorError

from executor.learning.files import inside, write_atomically
from executor.learning.models import Student, build_student
from protocol.errors import CheckpointError, InputError
from protocol.schema import CheckpointRef, Fraction, Name, PositiveInt, Record, StudentSpec, Task


class Manifest(Record, frozen=True, kw_only=True):
    """What a checkpoint file holds. ``classes`` in the order of the logits, ``crop_px``: edge of training pictures."""

    format: Literal["ekya-checkpoint/1"] = "ekya-checkpoint/1"
    stream_id: Name
    version: PositiveInt
    sha256: str
    num_bytes: int
    architecture: str
    task: Task = "classification"
    head_width: int
    classes: tuple[str, ...]
    crop_px: int
    retrain_id: str = ""
    window: int = 0
    accuracy: Fraction = 0.0


def save(
    store: Path,
    student: Student,
    *,
    stream_id: str,
    version: int,
    classes: tuple[str, ...],
    crop_px: int,
    retrain_id: str = "",
    window: int = 0,
    accuracy: float = 0.0,
) -> CheckpointRef:
    """Write ``student`` below ``store``. Raises CheckpointError when it cannot be written or is not finite."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in student.state_dict().items()}
    if broken := [name for name, tensor in state.items() if not bool(torch.isfinite(tensor).all())]:
        raise CheckpointError(f"stream {stream_id} version {version}: weights are not finite: {broken[0]}")
    data = safetensors.torch.save(state)
    digest = hashlib.sha256(data).hexdigest()
    relative = f"checkpoints/{stream_id}/v{version:06d}-{digest[:12]}.safetensors"
    path = inside(store, relative)
    if path is None:
        raise CheckpointError(f'stream id "{stream_id}" leads out of the store {store}')
    manifest = Manifest(
        stream_id=stream_id,
        version=version,
        sha256=digest,
        num_bytes=len(data),
        architecture=student.architecture,
        task=student.task,
        head_width=student.head_width,
        classes=classes,
        crop_px=crop_px,
        retrain_id=retrain_id,
        window=window,
        accuracy=accuracy,
    )
    try:
        write_atomically(path, data)
        write_atomically(path.with_suffix(".json"), msgspec.json.format(msgspec.json.encode(manifest)))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error}") from error
    return CheckpointRef(
        path=relative,
        sha256=digest,
        stream_id=stream_id,
        version=version,
        retrain_id=retrain_id,
        num_bytes=len(data),
    )


def load(store: Path, ref: CheckpointRef) -> tuple[Student, Manifest]:
    """The student of ``ref``, on the CPU and in eval mode, and its manifest.

    Raises CheckpointError when the file leads out of the store, is missing, differs from the hash of
    ``ref`` or of its manifest, or does not fit the architecture it names.
    """
    path = inside(store, ref.path)
    if path is None:
        raise CheckpointError(f"checkpoint {ref.path}: leads out of the store {store}")
    try:
        # Read once: what is hashed is what is used, whatever happens to the file meanwhile.
        data = path.read_bytes()
        manifest = msgspec.json.decode(path.with_suffix(".json").read_bytes(), type=Manifest)
    except OSError as error:
        raise CheckpointError(f"checkpoint {path}: cannot be read: {error}") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CheckpointError(f"checkpoint {path.with_suffix('.json')}: manifest is damaged: {error}") from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != ref.sha256 or digest != manifest.sha256:
        raise CheckpointError(f"checkpoint {path}: damaged, its SHA-256 is {digest[:12]}..., not {ref.sha256[:12]}...")
    if (manifest.stream_id, manifest.version) != (ref.stream_id, ref.version):
        raise CheckpointError(
            f"checkpoint {path}: is version {manifest.version} of {manifest.stream_id}, "
            f"not version {ref.version} of {ref.stream_id}"
        )
    try:
        spec = msgspec.convert(
            {"architecture": manifest.architecture, "head_width": manifest.head_width}, type=StudentSpec
        )
        student = build_student(spec, len(manifest.classes))
        student.load_state_dict(safetensors.torch.load(data))
    except (msgspec.MsgspecError, SafetensorError, RuntimeError, InputError) as error:
        raise CheckpointError(f"checkpoint {path}: does not fit {manifest.architecture}: {error}") from error
    return student.eval(), manifest
