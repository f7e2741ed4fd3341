"""What no job was promised of a GPU is lent to those that serve on it, until the next order takes it back. Pure.

A plan grants serving what it was measured to need; frames come unevenly, and scenes get busier before a plan is made
anew. Half of the frames that four cameras dropped were dropped while a tenth of their GPU and more belonged to nobody.
Plans, predictions and what retrainings get are as without lending: it is free, and it is promised to nobody.

Only where an executor says that a share can be changed while a worker runs (``Hello.can_resize_live``): under MPS it
would take another worker each time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from protocol.messages import InferenceJob, Job

# Left to what runs besides jobs; shares that change by less are not worth an order.
_KEPT = 0.05
_LEAST = 0.05
_STEPS = 100


def lent(jobs: Sequence[Job]) -> list[Job]:
    """The jobs of one executor, those that serve with their part of what is free, in proportion to their shares.

    Parts are whole hundredths, rounded down, so that shares never add up to more than 1 less what is kept.
    """
    serving = math.fsum(job.share for job in jobs if isinstance(job, InferenceJob))
    free = 1.0 - _KEPT - math.fsum(job.share for job in jobs)
    if free < _LEAST - 1e-9 or serving <= 0.0:
        return list(jobs)

    def with_part(job: InferenceJob) -> InferenceJob:
        part = math.floor(_STEPS * free * job.share / serving + 1e-9) / _STEPS
        return msgspec.structs.replace(job, share=job.share + part)

    return [with_part(job) if isinstance(job, InferenceJob) else job for job in jobs]
