from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator

import pytest

from protocol import logs
from protocol.errors import InputError


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield root
    root.handlers[:] = handlers
    root.setLevel(level)


def test_a_line_holds_time_level_process_and_the_fields(root: logging.Logger) -> None:
    out = io.StringIO()
    logs.configure("executor-a", "info", out)
    logging.getLogger("x").info(
        "%s", logs.line("worker_exit", job_id="i-1", reason='killed: "signal 9"', code=-9, share=0.25)
    )
    logging.getLogger("x").debug("not shown")
    assert re.fullmatch(
        r"time=\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z level=info process=executor-a pid=\d+ "
        r'event=worker_exit job_id=i-1 reason="killed: \\"signal 9\\"" code=-9 share=0\.25\n',
        out.getvalue(),
    )


def test_configuring_again_replaces_the_former_setting(root: logging.Logger) -> None:
    first, second = io.StringIO(), io.StringIO()
    logs.configure("a", "info", first)
    logs.configure("b", "error", second)
    logging.getLogger("x").error("boom")
    assert first.getvalue() == ""
    assert second.getvalue().endswith("event=log logger=x text=boom\n")


def test_a_traceback_follows_its_line(root: logging.Logger) -> None:
    out = io.StringIO()
    logs.configure("a", "info", out)
    try:
        raise ValueError("why")
    except ValueError:
        logging.getLogger("x").exception("%s", logs.line("bug"))
    assert "event=bug\nTraceback" in out.getvalue()
    assert out.getvalue().endswith("ValueError: why\n")


def test_values_cannot_break_a_line() -> None:
    text = logs.line("e", reason="a\nb\x1b[31m", empty="", none=None, quote='"', space="a b", back="\\")
    assert text == r'event=e reason="a\nb\x1b[31m" empty="" quote="\"" space="a b" back="\\"'


def test_an_unknown_level_is_an_input_error(root: logging.Logger) -> None:
    with pytest.raises(InputError, match="log level 'loud' is unknown; use one of debug, info"):
        logs.configure("a", "loud")


def test_the_limiter_lets_one_through_per_interval_and_counts_the_rest() -> None:
    limiter = logs.RateLimiter(5.0)
    assert limiter.admit("a", 0.0) == 0
    assert limiter.admit("a", 1.0) is None
    assert limiter.admit("b", 1.0) == 0
    assert limiter.admit("a", 4.9) is None
    assert limiter.admit("a", 5.0) == 2
    assert limiter.admit("a", 10.0) == 0


def test_the_limiter_does_not_grow_with_the_number_of_keys() -> None:
    limiter = logs.RateLimiter(5.0, max_keys=10)
    for number in range(1000):
        limiter.admit(str(number), 0.0)
    assert len(limiter._last) == 10
    assert limiter.admit("999", 1.0) is None
