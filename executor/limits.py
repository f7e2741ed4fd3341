"""Time limits and restart rules of workers. This file holds structs only."""

from __future__ import annotations

from protocol.schema import Fraction, PositiveInt, PositiveSeconds, Record, Seconds


class Limits(Record, frozen=True, kw_only=True):
    """How long a worker may take for what.

    ready_timeout_s: from start to Ready. hang_s: without any report, once ready. stop_grace_s: to leave after
    StopJob. term_grace_s: to leave after SIGTERM. done_grace_s: to leave after its result.
    """

    ready_timeout_s: PositiveSeconds = 60.0
    hang_s: PositiveSeconds = 15.0
    stop_grace_s: Seconds = 3.0
    term_grace_s: Seconds = 2.0
    done_grace_s: Seconds = 5.0


class HandOvers(Record, frozen=True, kw_only=True):
    """When a changed share is worth another worker, where a running one cannot grow beyond what it was started with.

    min_growth: share beyond that below which the stream goes on with what its worker can have. pause_s: between
    two hand-overs of a stream. refit_below: share / share started with, below which a worker that is held down to it by
    pacing is replaced by one that fits, after ``refit_after_s`` without a change; 0 = never.
    """

    min_growth: Fraction = 0.05
    pause_s: Seconds = 5.0
    refit_below: Fraction = 0.5
    refit_after_s: Seconds = 10.0


class RestartPolicy(Record, frozen=True, kw_only=True):
    """When an inference worker that died is started again.

    limit: quick deaths in a row after which the failure is reported and the rhythm is slow.
    backoff_s: pause after the first death, doubled after each further one up to ``backoff_max_s``.
    slow_s: pause after the limit. stable_s: a worker that was ready for so long counts as good again.
    """

    limit: PositiveInt = 5
    backoff_s: PositiveSeconds = 0.2
    backoff_max_s: PositiveSeconds = 5.0
    slow_s: PositiveSeconds = 30.0
    stable_s: PositiveSeconds = 10.0
