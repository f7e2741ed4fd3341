"""Numbers that a partial order says must not fall, made so with the least said against them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

T = TypeVar("T")


def rising(values: Mapping[T, float], no_more: Callable[[T, T], bool]) -> dict[T, float]:
    """``values`` made never to fall from a to b where ``no_more(a, b)``, a partial order.

    Halfway between the least rising numbers above and the greatest below; what rises already stays as it is.
    """
    return {
        key: 0.5
        * (
            max(value for other, value in values.items() if no_more(other, key))
            + min(value for other, value in values.items() if no_more(key, other))
        )
        for key in values
    }
