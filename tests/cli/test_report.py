"""The demo's page: whole without a network, true to its JSON, and safe with any text in it."""

from __future__ import annotations

import copy
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivetrain.cli.demo.charts import (
    Bar,
    Mark,
    by_step,
    downtime_bars,
    linear_ticks,
    log_ticks,
    loss_curve,
    smooth,
)
from drivetrain.cli.demo.report import page, value, write_html

MOVE = {
    "strategy": "immediate",
    "from": "cpu:0",
    "to": "cpu:1",
    "downtime_ms": 41.2,
    "predicted_downtime_ms": 48.5,
    "state_bytes": 3 << 20,
    "hash_source": "ab" * 16,
    "hash_target": "ab" * 16,
    "steps_lost": 0,
    "steps_repeated": 0,
    "ok": True,
    "step": 30,
}
REPORT = {
    "devices": [
        {"address": "cpu:0", "name": "part 0", "vendor": "amd", "driver": "cpu", "usable": True}
    ],
    "placement": {
        "device": "cpu:0",
        "reason": "cpu:0 has the highest score.",
        "alternatives": [{"device": "cpu:1", "score": 0.7}],
    },
    "migrations": [MOVE, {**MOVE, "strategy": "checkpointed", "downtime_ms": 133.0, "step": 60}],
    "failover": {
        "detected_ms": 6.0,
        "resumed_ms": 2210.0,
        "steps_repeated": 1,
        "samples_lost": 0,
        "samples_doubled": 0,
        "step": 80,
    },
    "final": {
        "accuracy": 0.9861,
        "loss": 0.05,
        "state_hash": "ef" * 16,
        "unmoved_state_hash": "ef" * 16,
        "bit_identical": True,
    },
    "overhead": {"step_ms_plain": 39.5, "step_ms_job": 39.7, "ratio": 1.005},
}
LOSSES = [(step, 2.3 * math.exp(-step / 20) + 0.01) for step in range(1, 101)]


class Checker(HTMLParser):
    """Collects what a browser would fetch or run, and whether every element is closed."""

    VOID = ("meta", "br", "hr", "img", "link")

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self.fetched += [v or "" for k, v in attrs if k in {"src", "href", "xlink:href", "data"}]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def checked(text: str) -> Checker:
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert checker.open == []
    return checker


def changed(**parts: dict) -> dict:
    report = copy.deepcopy(REPORT)
    for name, values in parts.items():
        report[name].update(values)
    return report


def test_the_page_is_one_file_that_asks_for_nothing_and_runs_nothing(tmp_path: Path):
    path = tmp_path / "demo-report.html"
    write_html(REPORT, LOSSES, path)
    text = path.read_text(encoding="utf-8")
    checker = checked(text)
    assert checker.fetched == []
    assert not {"script", "link", "iframe", "img"} & set(checker.tags)
    assert "url(" not in text
    assert "@import" not in text
    assert [p.name for p in tmp_path.iterdir()] == ["demo-report.html"]


def test_every_number_of_the_report_is_on_the_page():
    text = page(REPORT, LOSSES)
    for shown in ("98.61%", "41.2 ms", "48.5 ms", "133 ms", "2210 ms", "1.005 ×", "3 MiB"):
        assert shown in text
    for shown in ("ab" * 16, "ef" * 16, "checkpointed", "cpu:0 has the highest score.", "part 0"):
        assert shown in text


def test_the_moves_and_the_kill_are_marked_at_their_steps():
    text = page(REPORT, LOSSES)
    assert re.findall(r'<g class="(\w+)"><title>step (\d+): ([\w ]+)<', text) == [
        ("move", "30", "1 immediate"),
        ("move", "60", "2 checkpointed"),
        ("kill", "80", "killed"),
    ]


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({}, "bit for bit."),
        ({"final": {"bit_identical": None}}, "unlike types"),
        ({"final": {"bit_identical": False}}, "differs from the unmoved one"),
        ({"final": {"unmoved_state_hash": "00"}}, "differs from the unmoved one"),
        ({"failover": {"samples_lost": 3}}, "3 samples were lost, 0 came twice."),
        ({"failover": {"samples_doubled": 2}}, "0 samples were lost, 2 came twice."),
    ],
)
def test_the_verdict_says_what_the_numbers_say(parts: dict, said: str):
    text = page(changed(**parts), LOSSES)
    verdict = re.search(r'<p class="verdict">(.*?)</p>', text)
    assert verdict
    assert said in verdict[1]
    if parts:
        assert "The moved model is the unmoved one" not in verdict[1] or "samples" in verdict[1]


def test_a_failed_move_is_said_at_the_top():
    report = copy.deepcopy(REPORT)
    report["migrations"][1].update(ok=False, downtime_ms=None, hash_target=None)
    text = page(report, LOSSES)
    assert "1 of the moves failed." in text
    assert "real: unknown" in text


def test_text_from_devices_and_scripts_is_escaped():
    report = changed(placement={"reason": "<script>alert(1)</script>"})
    report["devices"][0]["name"] = '"><img src=x>'
    report["migrations"][0]["strategy"] = "<b>&"
    checker = checked(page(report, LOSSES))
    assert "script" not in checker.tags
    assert "img" not in checker.tags
    assert checker.fetched == []


@pytest.mark.parametrize("report", [{}, {"migrations": [], "final": None, "failover": {}}])
def test_an_empty_report_is_a_page_that_claims_nothing(report: dict):
    text = page(report, [])
    checked(text)
    assert "No losses were recorded." in text
    assert "No moves were made." in text
    assert "No sample was lost" not in text
    assert "The moved model" not in text


def test_both_themes_define_the_same_colours():
    blocks = re.findall(r":root \{(.*?)\}", page({}, []), re.DOTALL)
    light, dark = (set(re.findall(r"--(\w+):", block)) for block in blocks)
    assert light == dark
    assert set(re.findall(r"var\(--(\w+)\)", page({}, []))) <= light


def test_a_repeated_step_counts_as_it_was_at_last_and_nan_is_left_out():
    given_losses = [(3, 0.5), (1, 2.0), (2, math.nan), (3, 0.7), (4, math.inf), (5, 0.0)]
    assert by_step(given_losses) == [(1, 2.0), (3, 0.7)]


@given(
    st.lists(
        st.tuples(st.integers(1, 10**6), st.floats(allow_nan=True, allow_infinity=True)),
        max_size=60,
    ),
    st.lists(st.tuples(st.integers(0, 10**6), st.text(max_size=20)), max_size=6),
)
def test_any_losses_and_marks_make_a_well_formed_picture(losses, marks):
    text = loss_curve(losses, [Mark(step, label, "move") for step, label in marks])
    clean = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f￾￿]", "", text)
    numbers = re.findall(
        r' (?:x1|y1|x2|y2|x|y)="([^"]*)"',
        ET.tostring(ET.fromstring(clean), encoding="unicode"),
    )
    assert all(math.isfinite(float(number)) for number in numbers)


def test_a_longer_downtime_has_a_longer_bar():
    text = downtime_bars([Bar("a", 10.0, 20.0), Bar("b", None, 40.0)])
    widths = [float(w) for w in re.findall(r'<rect[^>]* width="([\d.]+)"', text)]
    assert widths[1] == pytest.approx(2 * widths[0], abs=0.2)
    assert widths[2] == pytest.approx(4 * widths[0], abs=0.2)
    assert "predicted: unknown" in text


@given(st.floats(1e-9, 1e12))
def test_linear_ticks_are_few_and_within(high: float):
    ticks = linear_ticks(high)
    assert ticks[0] == 0
    assert 2 <= len(ticks) <= 7
    assert ticks[-1] <= high * (1 + 1e-6)


@given(st.floats(1e-9, 1e3), st.floats(1.3, 1e6))
def test_log_ticks_are_within(low: float, factor: float):
    assert all(low <= tick <= low * factor for tick in log_ticks(low, low * factor))


def test_smoothing_is_the_running_median():
    assert smooth([1.0, 9.0, 2.0, 3.0, 2.5], 1) == [9.0, 2.0, 3.0, 2.5, 3.0]


@pytest.mark.parametrize(
    ("name", "given_value", "shown"),
    [
        ("state_bytes", 1536, "1.5 KiB"),
        ("downtime_ms", 41.239, "41.24 ms"),
        ("resumed_ms", 12_345.0, "12.35 s"),
        ("step_ms_plain", 39.5, "39.5 ms"),
        ("ok", True, "yes"),
        ("usable", None, "–"),
        ("steps", 1150, "1,150"),
        ("terms", {"free": 1}, '{"free": 1}'),
    ],
)
def test_values_read_with_their_unit(name: str, given_value: object, shown: str):
    assert value(name, given_value) == shown
