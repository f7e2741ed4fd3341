"""How much a stream has drifted, from signals that cost nothing: what its student thinks and what its frames look like.

Inference workers report about once a second how sure the student was, which classes it saw, and the colours of the
crops. Seconds are gathered to blocks, as neighbouring seconds show the same road users. The first blocks after the
serving model was made are the reference; later ones are compared with it, signal by signal:

- ``score``, 0 (as at the reference) to 1 (another scene): how far the last two blocks are from the reference.
- the *alarm*: a two-sided CUSUM (Page, Biometrika 1954) of every signal; it says that something has changed for good,
  and that the change was sudden enough to be seen within a window.

Pure, but for the sums that it owns; its own state is lost in a restart, which costs a reference period.
"""

from __future__ import annotations

import math

import msgspec

from protocol.schema import StreamSignals

# Seconds of serving in a block, and blocks in the reference.
BLOCK_S = 5.0
REFERENCE_BLOCKS = 4
# The least spread that a signal is taken to have from block to block, whatever a short reference says.
_LEAST_SPREAD = {"confidence": 0.05, "classes": 0.12, "look": 0.035}
# CUSUM: what is let pass per block, and what raises the alarm, in spreads.
_ALLOWANCE = 1.0
_ALARM = 8.0
_MOST = 5.0  # a single block counts for no more: one lorry before the lens is no drift
# A distance of so many spreads is a score of about two thirds.
_SCALE = 4.0


class _Block(msgspec.Struct):
    seconds: float = 0.0
    num: int = 0
    confidence: float = 0.0
    look: list[float] = []
    classes: list[float] = []

    def add(self, signals: StreamSignals, seconds: float) -> None:
        self.seconds += seconds
        self.num += signals.num_objects
        self.confidence += signals.confidence * signals.num_objects
        self.look = _added(self.look, signals.look, signals.num_objects)
        self.classes = _added(self.classes, signals.class_counts, 1)

    def means(self) -> tuple[float, list[float], list[float]]:
        n = max(1, self.num)
        return self.confidence / n, [x / n for x in self.look], [x / n for x in self.classes]


class DriftReport(msgspec.Struct, frozen=True, kw_only=True):
    """``score`` 0..1; ``signal`` that is farthest off; ``alarm``: it has just begun to drift suddenly."""

    score: float
    signal: str
    alarm: bool


class Detector:
    """One stream. ``reset`` when a new model serves: what is normal is what it was made for."""

    def __init__(self) -> None:
        self._block = _Block()
        self._blocks: list[_Block] = []
        self._sums: dict[str, tuple[float, float]] = {}
        self._alarmed = False
        self.report = DriftReport(score=0.0, signal="", alarm=False)

    def reset(self) -> None:
        """Begin a new reference; the score stays what it was until there is one."""
        self._block, self._blocks, self._sums, self._alarmed = _Block(), [], {}, False

    def add(self, signals: StreamSignals, seconds: float) -> DriftReport | None:
        """Take a report of ``seconds`` of serving in; a new judgement when a block is full, else None."""
        self._block.add(signals, seconds)
        if self._block.seconds < BLOCK_S or self._block.num == 0:
            return None
        block, self._block = self._block, _Block()
        self._blocks.append(block)
        if len(self._blocks) <= REFERENCE_BLOCKS:
            return None
        reference = self._blocks[:REFERENCE_BLOCKS]
        del self._blocks[REFERENCE_BLOCKS:-2]
        distances = _distances(reference, self._blocks[REFERENCE_BLOCKS:][-2:])
        now = _distances(reference, [block])
        alarm = False
        for name, distance in now.items():
            up, down = self._sums.get(name, (0.0, 0.0))
            z = min(_MOST, max(-_MOST, distance))
            up, down = max(0.0, up + z - _ALLOWANCE), max(0.0, down - z - _ALLOWANCE)
            alarm = alarm or up > _ALARM or down > _ALARM
            self._sums[name] = (up, down)
        signal = max(distances, key=lambda name: abs(distances[name]))
        farthest = max(0.0, abs(distances[signal]) - _ALLOWANCE)
        score = 1.0 - math.exp(-farthest / _SCALE)
        self.report = DriftReport(score=score, signal=signal, alarm=alarm and not self._alarmed)
        self._alarmed = self._alarmed or alarm
        return self.report


def _distances(reference: list[_Block], blocks: list[_Block]) -> dict[str, float]:
    """Signed distance of ``blocks`` (their mean) from the reference per signal, in spreads of one block."""
    base, last = _joined(reference).means(), _joined(blocks).means()
    each = [block.means() for block in reference]
    found = {"confidence": (last[0] - base[0]) / _spread([e[0] for e in each], base[0], "confidence")}
    for i, (x, mu) in enumerate(zip(last[1], base[1], strict=False)):
        found[f"look {i}"] = (x - mu) / _spread([e[1][i] for e in each if len(e[1]) > i], mu, "look")
    far = [_variation(e[2], base[2]) for e in each]
    usual = sum(far) / len(far)
    found["classes"] = (_variation(last[2], base[2]) - usual) / _LEAST_SPREAD["classes"]
    return found


def _spread(values: list[float], mean: float, kind: str) -> float:
    variance = sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1)
    # Four blocks say little about a spread: theirs is taken a good deal larger.
    return max(_LEAST_SPREAD[kind], 1.5 * math.sqrt(variance))


def _variation(a: list[float], b: list[float]) -> float:
    """Total variation of two class mixes, 0..1."""
    size = max(len(a), len(b))
    a, b = a + [0.0] * (size - len(a)), b + [0.0] * (size - len(b))
    return 0.5 * sum(abs(x - y) for x, y in zip(a, b, strict=True))


def _joined(blocks: list[_Block]) -> _Block:
    total = _Block()
    for block in blocks:
        total.num += block.num
        total.confidence += block.confidence
        total.look = _added(total.look, block.look, 1)
        total.classes = _added(total.classes, block.classes, 1)
    return total


def _added(sums: list[float], values: tuple[float, ...] | tuple[int, ...] | list[float], weight: float) -> list[float]:
    longer = max(len(sums), len(values))
    padded = [*sums, *[0.0] * (longer - len(sums))]
    return [s + weight * (values[i] if i < len(values) else 0.0) for i, s in enumerate(padded)]
