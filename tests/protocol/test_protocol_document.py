"""docs/protocol.md is complete: every struct, field, type and default that travels is on the page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import msgspec
import msgspec.inspect as mi
import pytest

from protocol import codec, messages
from protocol.events import TelemetryEvent
from protocol.messages import ToClient, ToServer
from protocol.plan import Plan, Problem
from protocol.schema import Record

PAGE = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text(encoding="utf-8")
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
ROOTS: tuple[type[Record], ...] = (*get_args(ToServer), *get_args(ToClient), *get_args(TelemetryEvent), Problem, Plan)


def type_text(info: mi.Type) -> str:
    """A field's type as the page writes it."""
    match info:
        case mi.Metadata():
            return type_text(info.type)
        case mi.NoneType():
            return "nil"
        case mi.BoolType():
            return "bool"
        case mi.StrType(pattern=p) if p == NAME_PATTERN:
            return "name"
        case mi.StrType(min_length=n, max_length=m) if n is not None and n == m:
            return f"str of {n}"
        case mi.StrType():
            return "str"
        case mi.IntType() | mi.FloatType():
            return _number_text("int" if isinstance(info, mi.IntType) else "float", info)
        case mi.LiteralType():
            return " / ".join(f'"{value}"' for value in info.values)
        case mi.VarTupleType():
            least = f", at least {info.min_length}" if info.min_length else ""
            return f"array of {type_text(info.item_type)}{least}"
        case mi.TupleType():
            return "[" + ", ".join(type_text(item) for item in info.item_types) + "]"
        case mi.DictType():
            return f"map of {type_text(info.key_type)} to {type_text(info.value_type)}"
        case mi.StructType():
            return info.cls.__name__
        case mi.UnionType():
            return " or ".join(type_text(item) for item in info.types)
    raise AssertionError(f"the page has no words for {info}")


def _number_text(word: str, info: Any) -> str:
    if info.ge is not None and info.le is not None:
        return f"{word} {info.ge:g}..{info.le:g}"
    if info.gt is not None and info.le is not None:
        return f"{word} >{info.gt:g}..{info.le:g}"
    if info.ge is not None:
        return f"{word} >= {info.ge:g}"
    return word if info.gt is None else f"{word} > {info.gt:g}"


def default_text(field: mi.Field) -> str:
    if field.required:
        return ""
    if field.default is msgspec.NODEFAULT:
        return "empty"
    value = field.default
    if isinstance(value, Record):
        return f"{type(value).__name__} defaults"
    if value in ((), ""):
        return "empty"
    return "nil" if value is None else str(value).lower() if isinstance(value, bool) else f"{value}"


def structs(roots: tuple[type[Record], ...]) -> list[type[Record]]:
    """All structs that can travel, in order of first mention."""
    found: list[type[Record]] = []

    def visit(info: mi.Type) -> None:
        match info:
            case mi.StructType():
                assert issubclass(info.cls, Record)
                if info.cls not in found:
                    found.append(info.cls)
                    for field in info.fields:
                        visit(field.type)
            case mi.Metadata():
                visit(info.type)
            case mi.VarTupleType():
                visit(info.item_type)
            case mi.UnionType():
                for item in info.types:
                    visit(item)
            case mi.TupleType():
                for item in info.item_types:
                    visit(item)

    for root in roots:
        visit(mi.type_info(root))
    return found


def fields(struct: type[Record]) -> tuple[mi.Field, ...]:
    info = mi.type_info(struct)
    assert isinstance(info, mi.StructType)
    return info.fields


def heading(struct: type[Record]) -> str:
    tag = struct.__struct_config__.tag
    return f"### {struct.__name__}" + (f" `{tag}`" if tag else "")


def section(struct: type[Record]) -> str:
    _, found, rest = PAGE.partition(heading(struct) + "\n")
    assert found, f"docs/protocol.md has no heading {heading(struct)!r}"
    return re.split(r"^##", rest, maxsplit=1, flags=re.MULTILINE)[0]


@pytest.mark.parametrize("struct", structs(ROOTS), ids=lambda struct: struct.__name__)
def test_the_page_lists_every_field_with_type_and_default(struct: type[Record]) -> None:
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in section(struct).splitlines()
        if line[:3] == "| `"
    ]
    assert [row[0].strip("`") for row in rows] == [field.encode_name for field in fields(struct)]
    for row, field in zip(rows, fields(struct), strict=True):
        assert row[1:3] == [type_text(field.type), default_text(field)], field.name
        assert len(row[3]) > 3, f"{field.name} has no meaning"


def test_the_page_names_no_struct_that_does_not_exist() -> None:
    named = set(re.findall(r"^### ([A-Z]\w+)(?: `\w+`)?$", PAGE, flags=re.MULTILINE))
    assert named == {struct.__name__ for struct in structs(ROOTS)}


def test_the_page_states_the_version_and_the_limits_of_the_code() -> None:
    assert f"protocol version {messages.PROTOCOL_VERSION}" in PAGE.lower()
    assert f"{codec.MAX_UP_BYTES >> 20} MiB" in PAGE
    assert f"{codec.MAX_DOWN_BYTES >> 20} MiB" in PAGE
    assert f"{codec.MAX_ITEMS} items" in PAGE
    assert f"{codec.MAX_STRING_BYTES >> 10} KiB" in PAGE
