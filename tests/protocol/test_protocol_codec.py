from __future__ import annotations

import math
import os
import random
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import msgpack
import msgspec.inspect as mi
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from executor import links
from protocol import codec
from protocol.errors import InputError, ProtocolError, VersionMismatchError
from protocol.events import Notice, TelemetryEvent
from protocol.messages import Ack, Goodbye, Heartbeat, Rejected, ToClient, ToServer
from protocol.plan import InferenceProfile, Plan, PlanVersion, Problem, StreamProfile
from protocol.schema import GpuSpec

TEXTS = st.text(st.characters(codec="utf-8"), max_size=20)


def records(kind: type[Any]) -> st.SearchStrategy[Any]:
    """Instances of a struct class with every field within its limits."""
    info = mi.type_info(kind)
    assert isinstance(info, mi.StructType)
    return st.fixed_dictionaries({field.name: _values(field.type) for field in info.fields}).map(
        lambda values: kind(**values)
    )


def _values(info: mi.Type) -> st.SearchStrategy[Any]:
    match info:
        case mi.Metadata():
            return _values(info.type)
        case mi.NoneType():
            return st.none()
        case mi.BoolType():
            return st.booleans()
        case mi.StrType(pattern=pattern, max_length=high) if pattern is not None:
            return st.from_regex(pattern, fullmatch=True).map(lambda text: text[:high])
        case mi.StrType(min_length=low, max_length=high):
            return st.text("0123456789abcdef", min_size=low or 0, max_size=high or 20) if low else TEXTS
        case mi.IntType():
            return st.integers(
                -(2**63) if info.ge is None else int(info.ge), 2**63 - 1 if info.le is None else int(info.le)
            )
        case mi.FloatType():
            least, most = info.gt if info.ge is None else info.ge, info.lt if info.le is None else info.le
            return st.floats(least, most, exclude_min=info.gt is not None, allow_nan=False, allow_infinity=False)
        case mi.LiteralType():
            return st.sampled_from(list(info.values))
        case mi.VarTupleType():
            return st.lists(_values(info.item_type), min_size=info.min_length or 0, max_size=2).map(tuple)
        case mi.TupleType():
            return st.tuples(*map(_values, info.item_types))
        case mi.DictType():
            return st.dictionaries(_values(info.key_type), _values(info.value_type), max_size=3)
        case mi.StructType():
            return records(info.cls)
        case mi.UnionType():
            return st.one_of(*map(_values, info.types))
    raise AssertionError(f"no strategy for {info}")


UNIONS: list[Any] = [ToServer, ToClient, TelemetryEvent, links.Command, links.Report]
KINDS = [(kind, union) for union in UNIONS for kind in get_args(union)]
FEW = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
MANY = settings(max_examples=150, deadline=None)


def a_problem() -> Problem:
    stream = StreamProfile(
        stream_id="cam-1",
        accuracy_now=0.5,
        inference=(InferenceProfile(inference_id="full", gpu_share_needed=0.25, relative_accuracy=1.0),),
    )
    return Problem(window_s=200.0, gpus=(GpuSpec(gpu_id="g0"),), streams=(stream,))


@pytest.mark.parametrize(("kind", "union"), KINDS, ids=[kind.__name__ for kind, _ in KINDS])
def test_every_message_comes_back_as_it_was(kind: type[Any], union: Any) -> None:
    @given(records(kind))
    @FEW
    def check(message: Any) -> None:
        data = codec.encode(message)
        assert codec.decode(data, union) == message
        assert codec.decode(data, kind) == message
        assert type(codec.decode(data, union)) is kind

    check()


@given(st.one_of([records(kind) for kind in (Heartbeat, Rejected, Goodbye)]))
@FEW
def test_control_frames_come_back_as_they_were(message: Any) -> None:
    frames = codec.frames_of(message)
    assert len(frames) == 2
    assert frames[0][0] == 1
    assert codec.message_of(frames, ToServer | ToClient) == message


@pytest.mark.parametrize("union", UNIONS, ids=["up", "down", "event", "command", "report"])
def test_random_bytes_raise_nothing_but_protocol_errors(union: Any) -> None:
    @given(st.binary(max_size=400))
    @example(b"")
    @example(b"\xc1")
    @example(b"\xdd\xff\xff\xff\xff")
    @example(b"\xdf\xff\xff\xff\xff")
    @example(b"\xdb\xff\xff\xff\xffabc")
    @example(b"\xc7\x0c\xff" + b"\xff" * 12)  # a timestamp out of range
    @example(b"\x81\xa4type\xc0")
    @example(b"\x81\x90\x01")  # an array as a key
    @example(b"\x91" * 5000 + b"\x01")
    @example(b"\x81\xa1a" * 5000 + b"\x01")
    @example(b"\x82\xa4type\xa3ack\xa8event_id\xcf" + b"\xff" * 8 + b"\x00")
    @MANY
    def check(data: bytes) -> None:
        with pytest.raises(ProtocolError) as caught:
            codec.decode(data, union)
        assert len(str(caught.value)) < 300
        assert str(caught.value).isprintable()

    check()


INTEGERS = st.integers(-(2**63), 2**64 - 1)
SCALARS = st.none() | st.booleans() | INTEGERS | st.floats() | st.text(max_size=8) | st.binary(max_size=8)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8) | INTEGERS, inner, max_size=4),
    max_leaves=20,
)


@given(ANYTHING, st.sampled_from(UNIONS), st.data())
@MANY
def test_well_formed_messagepack_of_anything_raises_nothing_but_protocol_errors(
    body: Any, union: Any, data: st.DataObject
) -> None:
    kind = data.draw(st.sampled_from(get_args(union)))
    if isinstance(body, dict):
        body["type"] = kind.__struct_config__.tag
    try:
        decoded = codec.decode(msgpack.packb(body), union)
    except ProtocolError:
        return
    assert isinstance(decoded, kind)


@given(records(Heartbeat), st.data())
@MANY
def test_damaged_messages_raise_nothing_but_protocol_errors(message: Heartbeat, data: st.DataObject) -> None:
    header, payload = codec.frames_of(message)
    cut = data.draw(st.integers(0, len(payload) - 1))
    with pytest.raises(ProtocolError):
        codec.message_of([header, payload[:cut]], ToServer)
    flipped = bytearray(payload)
    flipped[cut] ^= 1 << data.draw(st.integers(0, 7))
    with suppress(ProtocolError):
        assert isinstance(codec.message_of([header, bytes(flipped)], ToServer), Heartbeat)


@given(st.lists(st.binary(max_size=40), max_size=5))
@MANY
def test_random_frames_raise_nothing_but_protocol_errors(frames: list[bytes]) -> None:
    with pytest.raises(ProtocolError):
        codec.message_of(frames, ToServer)


@pytest.mark.parametrize("seed", range(5))
def test_long_random_bytes_raise_nothing_but_protocol_errors(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(50):
        with pytest.raises(ProtocolError):
            codec.decode(rng.randbytes(rng.randrange(100_000)), ToServer)


@pytest.mark.parametrize("depth", [400, 900, 2000, 100_000])
def test_deep_nesting_is_refused_and_not_followed(depth: int) -> None:
    for nest in (b"\x91" * depth + b"\xc0", b"\x82\xa4type\xa7goodbye\xa6reason" + b"\x91" * depth + b"\xc0"):
        with pytest.raises(ProtocolError):
            codec.decode(nest, ToServer)


def test_a_payload_over_the_size_limit_is_refused_unread() -> None:
    with pytest.raises(ProtocolError, match="limit is 1048576"):
        codec.decode(b"\xc0" * (codec.MAX_UP_BYTES + 1), ToServer, max_bytes=codec.MAX_UP_BYTES)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_neither_leave_nor_enter(value: float) -> None:
    with pytest.raises(ProtocolError, match="not finite"):
        codec.encode(Notice(time_s=value, level="info", text=""))
    for single in (False, True):
        data = msgpack.packb({"type": "notice", "time_s": value, "level": "info", "text": ""}, use_single_float=single)
        with pytest.raises(ProtocolError, match="not finite"):
            codec.decode(data, TelemetryEvent)


def test_an_integer_that_looks_like_a_nan_on_the_wire_is_let_through() -> None:
    message = Ack(event_id=0xCB7FF800_00000000)
    assert codec.decode(codec.encode(message), ToClient) == message


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"type": "ack", "event_id": 1, "more": 2}, "unknown field `more`"),
        ({"type": "ack", "event_id": "1"}, "Expected `int`, got `str`"),
        ({"type": "ack", "event_id": 1.5}, "Expected `int`, got `float`"),
        ({"type": "ack", "event_id": True}, "Expected `int`, got `bool`"),
        ({"type": "ack"}, "required field `event_id`"),
        ({"event_id": 1}, "unknown message type None"),
        ({"type": "nack", "event_id": 1}, "unknown message type 'nack'"),
        ([1, 2], "unknown message type None"),
        (
            {
                "type": "welcome",
                "term": 1,
                "site": "s",
                "store": "",
                "telemetry_address": "",
                "heartbeat_s": -1,
                "silence_s": 1,
            },
            "heartbeat_s",
        ),
    ],
)
def test_the_reason_says_what_is_wrong(body: Any, reason: str) -> None:
    with pytest.raises(ProtocolError, match=reason):
        codec.decode(msgpack.packb(body), ToClient)


def test_another_version_is_told_apart_from_garbage() -> None:
    header, payload = codec.frames_of(Ack(event_id=1))
    with pytest.raises(VersionMismatchError, match="peer speaks protocol version 2, this program speaks version 1"):
        codec.message_of([b"\x02" + header[1:], b"of a form we do not know"], ToClient)
    header, payload = codec.frames_of(Rejected(reason="upgrade first"))
    with pytest.raises(VersionMismatchError, match="upgrade first"):
        codec.message_of([b"\x02" + header[1:], payload], ToClient)


def test_the_header_must_name_the_kind_of_its_payload() -> None:
    header, _ = codec.frames_of(Ack(event_id=1))
    _, payload = codec.frames_of(Rejected(reason=""))
    with pytest.raises(ProtocolError):
        codec.message_of([header, payload], ToClient)


def test_a_message_that_is_too_large_is_not_sent() -> None:
    with pytest.raises(ProtocolError, match="the limit is 1048576"):
        codec.frames_of(Goodbye(executor_id="a", reason="x" * (1 << 20)), max_bytes=codec.MAX_UP_BYTES)
    with pytest.raises(ProtocolError, match="cannot encode Ack"):
        codec.encode(Ack(event_id=2**64))
    with pytest.raises(ProtocolError, match="max_str_len"):
        codec.encode(Goodbye(executor_id="a", reason="x" * (codec.MAX_STRING_BYTES + 1)))
    longest = Goodbye(executor_id="a", reason="x" * codec.MAX_STRING_BYTES)
    assert codec.decode(codec.encode(longest), ToServer) == longest


def test_a_problem_saved_is_a_problem_loaded(tmp_path: Path) -> None:
    path = tmp_path / "problem.json"
    codec.save_json(a_problem(), path)
    assert codec.load_json(path, Problem) == a_problem()
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o644
    assert os.listdir(tmp_path) == ["problem.json"]


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "problem.json"
    codec.save_json(a_problem(), path)
    with pytest.raises(InputError, match="cannot be saved"):
        codec.save_json(Notice(time_s=math.nan, level="info", text=""), path)
    assert codec.load_json(path, Problem) == a_problem()
    with pytest.raises(InputError, match="cannot write"):
        codec.save_json(a_problem(), tmp_path / "no" / "folder.json")
    with pytest.raises(InputError, match="cannot write"):
        codec.save_json(a_problem(), tmp_path)
    assert os.listdir(tmp_path) == ["problem.json"]
    assert not [name for name in os.listdir(tmp_path.parent) if name.startswith(f".{tmp_path.name}.")]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (
            '"accuracy_now": 0.5',
            '"accuracy_now": "half"',
            r"field streams\[0\]\.accuracy_now: Expected `float`, got `str`",
        ),
        ('"accuracy_now": 0.5', '"accuracy_now": 1.5', r"field streams\[0\]\.accuracy_now: "),
        ('"window_s": 200.0', '"window_s": 1e999', "out of range|not valid"),
        ('"window_s": 200.0', '"window_s": NaN', "not valid JSON"),
        ('"window_s": 200.0', '"windows": 200.0', "unknown field `windows`"),
        ('"ekya-problem/1"', '"ekya-problem/2"', "field format: Invalid enum value"),
        ("{", "{{", "not valid JSON"),
    ],
)
def test_a_wrong_file_is_an_error_that_names_file_and_field(tmp_path: Path, old: str, new: str, says: str) -> None:
    path = tmp_path / "problem.json"
    codec.save_json(a_problem(), path)
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(InputError, match=f"problem.json: .*({says})"):
        codec.load_json(path, Problem)


@pytest.mark.parametrize("data", [b"", b"\xff\xfe", b'{"format": "\xff"}', b"[" * 100_000, b"\0" * 10])
def test_a_file_of_anything_else_is_an_error_that_names_the_file(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"plan\.json"):
        codec.load_json(path, Plan)
    with pytest.raises(InputError, match=r"nowhere\.json: cannot read: No such file"):
        codec.load_json(tmp_path / "nowhere.json", Plan)
    with pytest.raises(InputError, match="cannot read"):
        codec.load_json(tmp_path, Plan)


def test_plan_versions_compare_by_term_then_window_then_revision() -> None:
    versions = [PlanVersion(term=t, window=w, revision=r) for t in (1, 2) for w in (-1, 0, 1) for r in (0, 1)]
    shuffled = versions[:]
    random.Random(3).shuffle(shuffled)
    assert sorted(shuffled) == versions
