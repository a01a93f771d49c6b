"""Verdicts about devices, found in children, and what is kept of them; facts over the wire."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivetrain import hal
from drivetrain.hal import config, probe, registry, wire


@pytest.fixture
def alpha(outside: Path) -> hal.Device:
    registry.trust("alpha")
    return hal.device("alpha:1")


def test_a_device_is_unchecked_then_usable_and_the_verdict_is_kept(alpha: hal.Device) -> None:
    assert probe.verdict(alpha) == probe.Verdict(None, None, "")
    before = time.time()
    found = probe.probe([alpha, hal.device("cpu:0")])
    assert [verdict.usable for verdict in found.values()] == [True, True]
    assert probe.verdict(alpha) == found[alpha]
    assert before <= (found[alpha].checked_at or 0) <= time.time()
    assert probe.verdicts([alpha])[alpha] == found[alpha]


@pytest.mark.parametrize(
    ("how", "reason"),
    [("abort", "SIGABRT"), ("broken", "the chip smokes"), ("hang", "did not answer within 1 s")],
)
def test_a_device_that_fails_its_probe_is_unusable_with_the_reason(
    alpha: hal.Device, monkeypatch: pytest.MonkeyPatch, how: str, reason: str
) -> None:
    monkeypatch.setenv("ACME_PROBE", how)
    started = time.monotonic()
    found = probe.probe([alpha], limit_s=1 if how == "hang" else 10)[alpha]
    assert found.usable is False
    assert reason in found.reason
    assert time.monotonic() - started < 5
    assert probe.verdict(alpha) == found
    assert hal.device().address != alpha.address


def test_a_failure_that_may_pass_is_told_and_not_kept(
    alpha: hal.Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACME_PROBE", "full")
    assert probe.probe([alpha])[alpha].usable is False
    assert probe.verdict(alpha).usable is None


def test_a_verdict_holds_for_one_driver_version_and_boot(
    alpha: hal.Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe.probe([alpha])
    updated = replace(alpha, info=replace(alpha.info, driver_version="8"))
    assert probe.verdict(updated).usable is None
    monkeypatch.setattr(config, "boot_id", lambda: "another boot")
    assert probe.verdict(alpha).usable is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"x": 1}', "\x00"])
def test_a_spoilt_file_of_verdicts_is_no_verdict(alpha: hal.Device, text: str) -> None:
    path = config.state_folder() / probe.FILE
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    assert probe.verdict(alpha).usable is None
    probe.probe([alpha])
    assert probe.verdict(alpha).usable is True


def test_a_state_folder_that_cannot_be_written_costs_the_verdicts_keeping_only(
    alpha: hal.Device, tmp_path: Path
) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    assert probe.probe([alpha], home=in_the_way / "home")[alpha].usable is True


def test_a_device_that_its_driver_calls_lost_is_not_probed(alpha: hal.Device) -> None:
    lost = replace(alpha, info=replace(alpha.info, fault="fell off the bus"))
    assert probe.probe([lost])[lost].reason == "fell off the bus"
    assert probe.verdict(lost).usable is False


def test_facts_survive_the_way_between_processes(alpha: hal.Device) -> None:
    for device in (alpha, hal.device("cpu:0")):
        sent = json.loads(json.dumps(wire.info_to_json(device.info)))
        assert wire.info_from_json(sent) == device.info
        assert wire.info_from_json(sent).telemetry == device.info.telemetry


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


def _paths(value: Any, at: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = [at] if at else []
    if isinstance(value, dict):
        for name, inner in value.items():
            found += _paths(inner, (*at, name))
    return found


@given(st.data())
def test_facts_from_a_driver_gone_wrong_are_a_value_error_or_of_the_right_types(
    draw: st.DataObject,
) -> None:
    value = wire.info_to_json(hal.devices("cpu")[0].info)
    value = json.loads(json.dumps(value))
    path = draw.draw(st.sampled_from(_paths(value)))
    spoilt = draw.draw(_json)
    inner = value
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = spoilt
    try:
        info = wire.info_from_json(value)
    except ValueError:
        return
    assert wire.info_from_json(json.loads(json.dumps(wire.info_to_json(info)))) == info


@given(_json)
def test_anything_else_is_a_value_error(value: Any) -> None:
    with pytest.raises(ValueError, match=r".+"):
        wire.info_from_json(value)
