"""MessagePack bytes for typed records, and records back from bytes that nobody vouches for.

``msgpack`` makes and reads the bytes with its size limits set; ``msgspec`` converts strictly to one
struct of a hand-written tagged union. Whatever arrives, the only error that leaves is `ProtocolError`.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
import types
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn, TypeVar, Union, get_args, get_origin, overload

import msgpack
import msgspec

from protocol.errors import InputError, ProtocolError, VersionMismatchError
from protocol.messages import PROTOCOL_VERSION, Rejected
from protocol.schema import Record

T = TypeVar("T")

MAX_UP_BYTES = 1 << 20  # one frame towards the optimizer, control or telemetry
MAX_DOWN_BYTES = 8 << 20  # one frame towards an executor, a client or a worker
MAX_FILE_BYTES = 64 << 20
MAX_STRING_BYTES = 64 << 10
MAX_ITEMS = 64 << 10

# A float64 (0xcb) or float32 (0xca) whose exponent is all ones. Other values may hold such bytes too, so a
# hit only means that the decoded values have to be looked at.
_PERHAPS_NON_FINITE = re.compile(rb"\xcb[\x7f\xff][\xf0-\xff]|\xca[\x7f\xff][\x80-\xff]", re.DOTALL)
_MAX_REASON = 200


def encode(record: Record, *, max_bytes: int = MAX_DOWN_BYTES) -> bytes:
    """MessagePack bytes of a record, its tag under the key ``type``.

    Raises:
        ProtocolError: a float is NaN or infinite, an integer does not fit 64 bits, a string or an array is too
            long, or the result is larger than ``max_bytes``.
    """
    plain = msgspec.to_builtins(record)
    try:
        data: bytes = msgpack.packb(plain)
    except (ValueError, OverflowError, TypeError, RecursionError) as error:
        raise ProtocolError(f"cannot encode {type(record).__name__}: {_short(error)}") from None
    if len(data) > max_bytes:
        raise ProtocolError(f"{type(record).__name__} takes {len(data)} bytes, the limit is {max_bytes}")
    if len(data) > MAX_STRING_BYTES:  # smaller ones cannot hold anything that the receiver would find too long
        _unpack(data, max_bytes)
    elif _PERHAPS_NON_FINITE.search(data):
        _refuse_non_finite(plain)
    return data


@overload
def decode(data: bytes, kind: type[T], *, max_bytes: int = ...) -> T: ...
@overload
def decode(data: bytes, kind: Any, *, max_bytes: int = ...) -> Any: ...
def decode(data: bytes, kind: Any, *, max_bytes: int = MAX_DOWN_BYTES) -> Any:
    """The record in ``data``; ``kind`` is a struct class or a union of tagged struct classes.

    Types and ranges are checked strictly, unknown fields are refused.

    Raises:
        ProtocolError: for everything that can be wrong with ``data``, with a short reason.
    """
    plain = _unpack(data, max_bytes)
    members = _members(kind)
    if members:
        tag = plain.get("type") if isinstance(plain, dict) else None
        if not isinstance(tag, str) or tag not in members:
            raise ProtocolError(f"unknown message type {_short(tag)}")
        kind = members[tag]
    try:
        return msgspec.convert(plain, type=kind, strict=True)
    except (msgspec.MsgspecError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ProtocolError(_short(error)) from None


def frames_of(message: Record, *, max_bytes: int = MAX_DOWN_BYTES) -> list[bytes]:
    """The two frames of a control message: version byte and kind, payload."""
    return [_header(_tag_of(message)), encode(message, max_bytes=max_bytes)]


def message_of(frames: Sequence[bytes], union: Any, *, max_bytes: int = MAX_DOWN_BYTES) -> Any:
    """The control message in ``frames``, a member of ``union``.

    Raises:
        VersionMismatchError: the version byte is another than ours; nothing else was looked at, except the
            reason of a ``rejected`` message, which has the same form in every version.
        ProtocolError: anything else that is wrong.
    """
    if len(frames) != 2 or not frames[0]:
        raise ProtocolError(f"{len(frames)} frames where a header and a payload are due")
    header, payload = frames
    if len(header) > 1 + 64 or not header[1:].isascii():
        raise ProtocolError("malformed header frame")
    tag = header[1:].decode("ascii")
    if header[0] != PROTOCOL_VERSION:
        said = _rejection(payload) if tag == "rejected" else ""
        raise VersionMismatchError(
            f"the peer speaks protocol version {header[0]}, this program speaks version {PROTOCOL_VERSION}"
            f"{said}; install the same release of ekya on both sides"
        )
    members = _members(union)
    if tag not in members:
        raise ProtocolError(f"unknown message type {_short(tag)}")
    message = decode(payload, members[tag], max_bytes=max_bytes)
    return message


def save_json(record: Record, path: str | Path) -> None:
    """Write ``record`` as indented JSON; a reader sees the old file or the whole new one.

    Raises:
        InputError: the file cannot be written, or the record holds NaN or infinity.
    """
    path = Path(path)
    plain = msgspec.to_builtins(record)
    try:
        text = json.dumps(plain, indent=2, allow_nan=False, ensure_ascii=False)
    except ValueError as error:
        raise InputError(f"{path}: {type(record).__name__} cannot be saved: {error}") from None
    temporary = ""
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise InputError(f"{path}: cannot write: {error.strerror or error}") from None


def load_json(path: str | Path, kind: type[T]) -> T:
    """The record in a JSON file, checked strictly.

    Raises:
        InputError: names the file and, where a value is wrong, the field (``streams[2].weight``).
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InputError(f"{path}: larger than {MAX_FILE_BYTES >> 20} MiB")
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot read: {error.strerror or error}") from None
    try:
        return msgspec.json.decode(data, type=kind, strict=True)
    except msgspec.ValidationError as error:
        message, _, where = str(error).partition(" - at `")
        field = where.rstrip("`").removeprefix("$").lstrip(".")
        raise InputError(f"{path}: {f'field {field}: ' if field else ''}{message}") from None
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON: {_short(error)}") from None


def _unpack(data: bytes, max_bytes: int) -> Any:
    if len(data) > max_bytes:
        raise ProtocolError(f"{len(data)} bytes, the limit is {max_bytes}")
    try:
        plain = msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            max_str_len=MAX_STRING_BYTES,
            max_bin_len=0,
            max_array_len=MAX_ITEMS,
            max_map_len=MAX_ITEMS,
            max_ext_len=0,
            ext_hook=_refuse_extension,
        )
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        raise ProtocolError(f"not MessagePack: {_short(error)}") from None
    if _PERHAPS_NON_FINITE.search(data):
        _refuse_non_finite(plain)
    return plain


def _refuse_extension(code: int, data: bytes) -> NoReturn:
    raise ValueError(f"extension type {code}")


def _refuse_non_finite(plain: Any) -> None:
    """A loop, not a recursion: the nesting is the sender's choice."""
    rest = [plain]
    while rest:
        value = rest.pop()
        if isinstance(value, float):
            if not math.isfinite(value):
                raise ProtocolError("a number is not finite")
        elif isinstance(value, dict):
            rest.extend(value.values())
        elif isinstance(value, list | tuple):
            rest.extend(value)


@lru_cache(maxsize=64)
def _members(kind: Any) -> dict[str, type[Record]]:
    """Struct classes of a union by tag; empty for anything that is not a union of tagged structs.

    Converting to the member and not to the union saves msgspec from rebuilding the union at every call.
    """
    if get_origin(kind) not in (Union, types.UnionType):
        return {_tag(kind): kind} if isinstance(kind, type) and issubclass(kind, Record) and _tag(kind) else {}
    return {_tag(member): member for member in get_args(kind)}


def _tag(kind: type[Record]) -> str:
    tag = kind.__struct_config__.tag
    return tag if isinstance(tag, str) else ""


def _tag_of(message: Record) -> str:
    return _tag(type(message))


@lru_cache(maxsize=64)
def _header(tag: str) -> bytes:
    return bytes([PROTOCOL_VERSION]) + tag.encode("ascii")


def _rejection(payload: bytes) -> str:
    try:
        return f" (it says: {_short(decode(payload, Rejected).reason)})"
    except ProtocolError:
        return ""


def _short(cause: object) -> str:
    """One printable line; the text may hold whatever a peer sent."""
    text = str(cause) if isinstance(cause, BaseException) else repr(cause)
    text = "".join(letter if letter.isprintable() else "?" for letter in text[: _MAX_REASON + 1])
    return text if len(text) <= _MAX_REASON else text[:_MAX_REASON] + "..."
