"""The report from a run's events: what it counts, what it survives, and that its page stands alone."""

from __future__ import annotations

import io
import itertools
import json
import logging
import math
import re
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from optimizer.report import (
    build_comparison,
    build_report,
    comparison_table,
    final_table,
    read_events,
    write_comparison,
    write_report,
)
from optimizer.report_data import Comparison, Report
from optimizer.report_series import accuracy_series, condition_marks, share_blocks, with_gaps
from protocol.errors import InputError
from protocol.events import (
    JobShare,
    PlanSolved,
    ProfileEstimated,
    RetrainFinished,
    RetrainProgress,
    StreamAccuracy,
    TelemetryEvent,
    WindowClosed,
    WindowOpened,
    WorkerChanged,
)
from protocol.schema import EpochResult, RetrainConfig
from tests.optimizer.report_run import STREAMS, events_of_a_run


def save(events: tuple[TelemetryEvent, ...], path: Path) -> None:
    path.write_bytes(b"".join(msgspec.json.encode(event) + b"\n" for event in events))


def text(table: object) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


class Page(HTMLParser):
    """Collects what a browser would fetch and checks that elements nest."""

    VOID = frozenset({"meta", "br", "path", "use", "rect", "img", "link", "input", "hr"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("href", "src", "xlink:href", "data", "action", "srcset"):
                self.addresses.append(value or "")
            if name == "id":
                self.ids.append(value or "")
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.stack.pop() == tag


def check_page(page: str) -> Page:
    parsed = Page(page)
    assert parsed.stack == []
    assert all(address.startswith("#") for address in parsed.addresses)
    assert "script" not in parsed.tags
    assert "link" not in parsed.tags
    assert not re.search(r"https?:|@import|url\((?!#)", page)
    assert len(parsed.ids) == len(set(parsed.ids))
    wanted = {address[1:] for address in parsed.addresses} | set(re.findall(r"url\(#([^)]*)\)", page))
    assert wanted <= set(parsed.ids)
    assert not re.search(r"#0[147]0[258]0[369]", page), "a marker colour was left in the page"
    return parsed


# ---------------------------------------------------------------- reading


def test_events_survive_the_file_and_a_torn_last_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    events = events_of_a_run(1, num_windows=1)
    path = tmp_path / "events.jsonl"
    save(events, path)
    assert read_events(path) == events
    path.write_bytes(path.read_bytes()[:-20])
    with caplog.at_level(logging.WARNING):
        assert read_events(path) == events[:-1]
    assert any("events=skipped" in record.message for record in caplog.records)


def test_a_line_with_a_loss_that_is_not_a_number_is_skipped(tmp_path: Path) -> None:
    diverged = RetrainProgress(
        job_id="j",
        stream_id="market",
        window=0,
        config=RetrainConfig(config_id="c", epochs=1),
        epoch=EpochResult(epoch=1, accuracy=0.1, loss=float("nan"), busy_s=1.0),
    )
    events = events_of_a_run(2, num_windows=1)
    save((diverged, *events), tmp_path / "e.jsonl")
    assert read_events(tmp_path / "e.jsonl") == events


def test_a_missing_or_foreign_file_is_refused_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.jsonl: cannot be read"):
        read_events(tmp_path / "nowhere.jsonl")
    foreign = tmp_path / "foreign.txt"
    foreign.write_text("hello\nworld\n")
    with pytest.raises(InputError, match=r"none of its 2 lines"):
        read_events(foreign)
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    assert read_events(empty) == ()


# ---------------------------------------------------------------- summing up


@pytest.mark.parametrize("seed", range(3))
def test_the_report_counts_what_the_events_say(seed: int) -> None:
    events = events_of_a_run(seed)
    report = build_report(events, site="city")
    closed = [e for e in events if isinstance(e, WindowClosed)]
    pairs = [(row.realised, row.predicted) for e in closed for row in e.streams]
    errors = [abs(r - p) for r, p in pairs if r is not None and p is not None]
    assert report.streams == STREAMS
    assert report.gpus == ("cpu-0", "cpu-1")
    assert (report.site, report.policy, report.window_s) == ("city", "milp", 30.0)
    assert [w.window for w in report.windows] == [0, 1, 2, 3]
    assert [w.realised for w in report.windows] == [e.realised for e in closed]
    assert report.mean_abs_error == pytest.approx(sum(errors) / len(errors))
    assert report.mean_realised == pytest.approx(sum(r or 0.0 for r, _ in pairs) / len(pairs))
    assert len(report.retrainings) == sum(isinstance(e, RetrainFinished) for e in events)
    assert len(report.swaps) == sum(r.promoted for r in report.retrainings)
    assert len(report.solves) == sum(isinstance(e, PlanSolved) for e in events)
    assert (
        0.9
        < min(s.achieved / s.granted for s in report.shares)
        <= max(s.achieved / s.granted for s in report.shares)
        < 1.1
    )


def test_the_windows_plan_tells_the_choices_and_not_the_profiling_or_re_plans() -> None:
    events = events_of_a_run(3)
    report = build_report(events)
    plans = {e.window: e for e in events if isinstance(e, PlanSolved) and e.phase == "plan"}
    for window in report.windows:
        said = {row.stream_id: row for row in plans[window.window].streams}
        for row in window.streams:
            assert (row.inference_id, row.retrain_id) == (
                said[row.stream_id].inference_id,
                said[row.stream_id].retrain_id,
            )


def test_contention_is_the_best_configurations_share_of_all_gpus() -> None:
    contention = build_report(events_of_a_run(1)).contention
    assert contention.best_share_of_machine == pytest.approx(4 * 0.42 / 2)
    assert contention.cost_ratio == pytest.approx(14.5 / 0.4)
    assert contention.windows_with_different_plans == 4
    assert contention.streams_with_changing_plans == 4
    same = [
        msgspec.structs.replace(e, streams=tuple(msgspec.structs.replace(r, **FIXED) for r in e.streams))
        if isinstance(e, PlanSolved)
        else e
        for e in events_of_a_run(1)
    ]
    contention = build_report(same).contention
    assert (contention.windows_with_different_plans, contention.streams_with_changing_plans) == (0, 0)
    assert contention.num_distinct_plans == 1


FIXED = {"inference_id": "full", "retrain_id": "", "inference_id_after": ""}


def test_drift_is_marked_once_with_the_words_that_are_new() -> None:
    base = next(e for e in events_of_a_run(1) if isinstance(e, StreamAccuracy))

    def at(site_s: float, words: str) -> StreamAccuracy:
        return msgspec.structs.replace(base, site_s=site_s, conditions=words)

    events = [at(1, "day, clear"), at(2, "day, clear"), at(10, "dusk, clear"), at(13, "night, clear")]
    events += [at(60, "night, rain"), at(61, "night, rain")]
    report = build_report(events)
    assert [(c.site_s, c.after) for c in report.conditions] == [
        (10, "dusk, clear"),
        (13, "night, clear"),
        (60, "night, rain"),
    ]
    marks = condition_marks(report.conditions, base.stream_id)
    assert [(m.site_s, m.text) for m in marks] == [(10, "night"), (60, "rain")]


# ---------------------------------------------------------------- series


def test_share_blocks_hold_exactly_the_granted_share_of_every_job() -> None:
    events = events_of_a_run(4)
    blocks = share_blocks(events)
    for e in events:
        if isinstance(e, JobShare):
            middle = e.site_s - 0.5
            mine = [b for b in blocks if b.job_id == e.job_id and b.from_s <= middle < b.to_s]
            assert [(b.gpu_id, b.share) for b in mine] == [(e.gpu_id, e.share_granted)]
    assert len(blocks) < 0.2 * sum(isinstance(e, JobShare) for e in events)


def test_share_blocks_never_overlap_on_a_gpu_and_leave_no_hole_below() -> None:
    blocks = share_blocks(events_of_a_run(5))
    for time in range(5, 120, 3):
        for gpu in ("cpu-0", "cpu-1"):
            stack = sorted((b for b in blocks if b.gpu_id == gpu and b.from_s <= time < b.to_s), key=lambda b: b.bottom)
            level = 0.0
            for block in stack:
                assert block.bottom == pytest.approx(level)
                level += block.share


def test_a_job_that_stops_reporting_leaves_a_hole_and_a_finished_one_ends_on_time() -> None:
    def share(site_s: float, job: str = "a") -> JobShare:
        return JobShare(
            site_s=site_s,
            job_id=job,
            kind="inference",
            stream_id="market",
            gpu_id="g",
            share_granted=0.5,
            share_achieved=None,
            backend="pacing",
        )

    ended = WorkerChanged(
        site_s=31.4, job_id="a", stream_id="market", gpu_id="g", kind="inference", change="finished", reason=""
    )
    events: list[TelemetryEvent] = [
        *(share(float(t)) for t in range(1, 11)),
        *(share(float(t)) for t in range(21, 32)),
        ended,
    ]
    assert [(b.from_s, b.to_s) for b in share_blocks(events)] == [(0.0, 10.0), (20.0, 31.4)]


def test_a_share_ends_where_the_worker_was_resized_and_not_at_its_report() -> None:
    def share(site_s: float, granted: float) -> JobShare:
        return JobShare(
            site_s=site_s,
            job_id="a",
            kind="inference",
            stream_id="market",
            gpu_id="g",
            share_granted=granted,
            share_achieved=None,
            backend="pacing",
        )

    resized = WorkerChanged(
        site_s=3.7, job_id="a", stream_id="market", gpu_id="g", kind="inference", change="resized", reason="", share=0.8
    )
    events: list[TelemetryEvent] = [*(share(float(t), 0.3) for t in range(1, 4)), resized]
    events += [share(float(t), 0.8) for t in range(4, 7)]
    assert [(b.from_s, b.to_s, b.share) for b in share_blocks(events)] == [(0.0, 3.7, 0.3), (3.7, 6.0, 0.8)]


def test_reports_from_before_the_clock_runs_are_no_blocks_and_a_job_begins_when_its_worker_started() -> None:
    def share(site_s: float, job_id: str) -> JobShare:
        return JobShare(
            site_s=site_s,
            job_id=job_id,
            kind="retrain",
            stream_id="market",
            gpu_id="g",
            share_granted=1.0,
            share_achieved=None,
            backend="pacing",
        )

    started = WorkerChanged(
        site_s=4.7, job_id="b", stream_id="market", gpu_id="g", kind="retrain", change="started", reason=""
    )
    events: list[TelemetryEvent] = [share(0.0, "a"), share(0.0, "a"), started]
    events += [share(5.0, "b"), share(6.0, "b"), share(7.0, "b")]
    assert [(b.job_id, b.from_s, b.to_s) for b in share_blocks(events)] == [("b", 4.7, 7.0)]


def test_no_line_is_drawn_across_a_hole() -> None:
    base = next(e for e in events_of_a_run(1) if isinstance(e, StreamAccuracy))
    times = [*range(1, 20), *range(40, 60)]
    points = accuracy_series([msgspec.structs.replace(base, site_s=float(t)) for t in times])[base.stream_id]
    holes = [(p.site_s, q.site_s) for p, q in itertools.pairwise(with_gaps(points)) if math.isnan(p.smooth)]
    assert holes == [(19.0, 40.0)]


def test_a_long_run_is_thinned() -> None:
    base = next(e for e in events_of_a_run(1) if isinstance(e, StreamAccuracy))
    events = [msgspec.structs.replace(base, site_s=float(t), accuracy=0.5 + 0.4 * (t % 2)) for t in range(20_000)]
    points = accuracy_series(events)[base.stream_id]
    assert 300 <= len(points) <= 600
    assert all(0.5 <= p.smooth <= 0.9 for p in points)
    assert points[-1].smooth == pytest.approx(0.7, abs=0.02)


# ---------------------------------------------------------------- pages


def test_the_written_report_is_complete_and_stands_alone(tmp_path: Path) -> None:
    events = events_of_a_run(1)
    report = build_report(events, site="city")
    json_path, html_path = write_report(report, events, tmp_path / "out")
    assert msgspec.json.decode(json_path.read_bytes(), type=Report) == report
    page = html_path.read_text(encoding="utf-8")
    parsed = check_page(page)
    assert parsed.tags.count("svg") == 3
    assert len(page) < 600_000
    for stream in STREAMS:
        assert stream in page
    assert "&lt;b&gt;a notice &amp; its marks&lt;/b&gt;" in page
    assert "<b>a notice" not in page
    for word in ("promoted", "rain", "micro-profiling", "milp", "no retraining"):
        assert word in page


def _cut_short(events: tuple[TelemetryEvent, ...]) -> tuple[TelemetryEvent, ...]:
    return tuple(e for e in events if e.site_s < 50.0 and not isinstance(e, WindowClosed))


CASES: dict[str, Callable[[tuple[TelemetryEvent, ...]], tuple[TelemetryEvent, ...]]] = {
    "nothing": lambda events: (),
    "cut short": _cut_short,
    "only windows": lambda events: tuple(e for e in events if isinstance(e, WindowOpened | WindowClosed)),
    "only accuracy": lambda events: tuple(e for e in events if isinstance(e, StreamAccuracy)),
    "only one share report": lambda events: next((e,) for e in events if isinstance(e, JobShare)),
    "no profiles": lambda events: tuple(e for e in events if not isinstance(e, ProfileEstimated)),
    "no accuracy": lambda events: tuple(
        msgspec.structs.replace(e, accuracy=None) if isinstance(e, StreamAccuracy) else e for e in events
    ),
    "unknown results": lambda events: tuple(
        msgspec.structs.replace(
            e,
            predicted=None,
            streams=tuple(msgspec.structs.replace(r, realised=None, predicted=None) for r in e.streams),
        )
        if isinstance(e, WindowClosed)
        else e
        for e in events
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_missing_data_still_give_a_report_a_page_and_a_table(case: str, tmp_path: Path) -> None:
    events = CASES[case](events_of_a_run(2, num_windows=2))
    report = build_report(events)
    json_path, html_path = write_report(report, events, tmp_path)
    assert json.loads(json_path.read_bytes())["format"] == "ekya-report/1"
    check_page(html_path.read_text(encoding="utf-8"))
    assert "all streams" in text(final_table(report))


def test_a_folder_that_cannot_be_written_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    report = build_report(())
    with pytest.raises(InputError, match="cannot be written"):
        write_report(report, (), tmp_path / "file" / "out")
    with pytest.raises(InputError, match="cannot be written"):
        write_comparison(build_comparison({}), tmp_path / "file" / "out")


def test_the_final_table_shows_realised_and_predicted_of_every_stream_and_window() -> None:
    report = build_report(events_of_a_run(1))
    shown = text(final_table(report))
    for window in report.windows:
        for row in window.streams:
            assert f"{100 * (row.realised or 0):.1f} ({100 * (row.predicted or 0):.1f})" in shown


# ---------------------------------------------------------------- comparison


def test_policies_are_compared_best_first_over_all_their_runs(tmp_path: Path) -> None:
    runs = {seed: build_report(events_of_a_run(seed)) for seed in range(4)}
    given: dict[str, Report | Sequence[Report]] = {
        "milp": (runs[0], runs[1]),
        "thief": runs[2],
        "none": runs[3],
        "broken": build_report(()),
    }
    comparison = build_comparison(given)
    means = [row.mean_realised for row in comparison.policies]
    assert means[-1] is None
    assert comparison.policies[-1].policy == "broken"
    known = [mean for mean in means if mean is not None]
    assert known == sorted(known, reverse=True)
    milp = next(row for row in comparison.policies if row.policy == "milp")
    assert milp.num_runs == 2
    assert len(milp.windows) == 8
    assert milp.mean_realised == pytest.approx(((runs[0].mean_realised or 0.0) + (runs[1].mean_realised or 0.0)) / 2)
    json_path, html_path = write_comparison(comparison, tmp_path)
    assert msgspec.json.decode(json_path.read_bytes(), type=Comparison) == comparison
    page = html_path.read_text(encoding="utf-8")
    assert check_page(page).tags.count("svg") == 1
    shown = text(comparison_table(comparison))
    for policy in given:
        assert policy in page
        assert policy in shown
