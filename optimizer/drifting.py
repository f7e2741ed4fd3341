"""How much a stream has drifted, from signals that cost nothing: what its student thinks and what its frames look like.

Inference workers report about once a second how sure the student was, which classes it saw, and the colours of the
crops. Seconds are gathered to blocks, as neighbouring seconds show the same road users. The first blocks after the
serving model was made are the reference; later ones are compared with it, signal by signal:

- ``score``, 0 (as at the reference) to 1 (another scene): how far the last two blocks are from the reference.
- disagreement with golden labels: how far what the serving model got right on the last labels falls short of what it
  was expected to get right when it began to serve, in standard errors. It raises the score, as the signal "labels";
  labels come too seldom for the alarm, and the canary (optimizer/gate.py) watches a new model on them anyway.
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
# Accuracies of two stretches of one scene differ by so much beyond what counting a few road users explains.
_LABEL_SPREAD = 0.07


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
    """One stream. ``reset`` when a new model serves: what is normal is what it was made for.

    ``doubt``: 1 less the student's mean confidence in the last block, None before the first one.
    """

    def __init__(self) -> None:
        self._block = _Block()
        self._blocks: list[_Block] = []
        self._sums: dict[str, tuple[float, float]] = {}
        self._alarmed = False
        self._expected: float | None = None
        self._disagreement = 0.0
        self.doubt: float | None = None
        self.report = DriftReport(score=0.0, signal="", alarm=False)

    def reset(self, *, new_model: bool = True) -> None:
        """Begin a new reference; the score stays what it was until there is one. Not ``new_model``: what it got right
        on labels when it was new remains what is expected of it."""
        self._block, self._blocks, self._sums, self._alarmed = _Block(), [], {}, False
        if new_model:
            self._expected, self._disagreement = None, 0.0

    def labelled(self, accuracy: float, num_pieces: int, expected: float | None = None) -> DriftReport:
        """Golden labels say what the serving model got right, on ``num_pieces`` independent pieces of evidence.

        ``expected``: what was expected of it; counts the first time after a reset, when None what is measured then.
        """
        if num_pieces < 1:
            return self.report
        if self._expected is None:
            self._expected = accuracy if expected is None else expected
        middle = 0.5 * (accuracy + self._expected)
        spread = math.sqrt(_LABEL_SPREAD**2 + max(0.01, middle * (1.0 - middle)) / num_pieces)
        self._disagreement = (self._expected - accuracy) / spread
        score = _score(self._disagreement)
        if score > self.report.score or self.report.signal == "labels":
            self.report = DriftReport(score=score, signal="labels", alarm=False)
        return self.report

    def add(self, signals: StreamSignals, seconds: float) -> DriftReport | None:
        """Take a report of ``seconds`` of serving in; a new judgement when a block is full, else None."""
        self._block.add(signals, seconds)
        if self._block.seconds < BLOCK_S or self._block.num == 0:
            return None
        block, self._block = self._block, _Block()
        self._blocks.append(block)
        self.doubt = 1.0 - min(1.0, max(0.0, block.means()[0]))
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
        farthest = abs(distances[signal])
        if self._disagreement > farthest:
            signal, farthest = "labels", self._disagreement
        self.report = DriftReport(score=_score(farthest), signal=signal, alarm=alarm and not self._alarmed)
        self._alarmed = self._alarmed or alarm
        return self.report


def _score(distance: float) -> float:
    return 1.0 - math.exp(-max(0.0, distance - _ALLOWANCE) / _SCALE)


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
