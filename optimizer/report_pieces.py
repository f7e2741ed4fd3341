"""Small pieces of HTML that the sections of a report are made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def table(heads: Iterable[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table; ``kind`` is its class. Cells are HTML already."""
    head = "".join(f"<th>{escape(h)}</th>" for h in heads)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    wide = f'<div class="wide"><table class="{kind}">'
    return f"{wide}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def fold(content: str, summary: str) -> str:
    """Folded away until asked for."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def dot(stream: str, colours: dict[str, str]) -> str:
    """A stream's name with its colour."""
    return f'<span class="dot" style="background:{colours.get(stream, "gray")}"></span>{escape(stream)}'


def strong(text: str) -> str:
    """In bold; the text is escaped."""
    return f"<b>{escape(text)}</b>"


def count(number: int, noun: str) -> str:
    """A number and its noun."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def seconds(value: float | None) -> str:
    """A time for people."""
    if value is None:
        return "–"
    return f"{1000 * value:.0f} ms" if value < 1.0 else f"{value:.1f} s"
