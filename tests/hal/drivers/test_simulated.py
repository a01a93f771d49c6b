"""The simulated device: there only by name, as configured, strict, and failing as asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivetrain import hal
from drivetrain.errors import BadInput, DeviceLost, HalError, OutOfMemory, Timeout
from drivetrain.hal import registry
from drivetrain.hal.drivers import simulated
from drivetrain.hal.drivers.simulated import Configuration, Fault, configuration
from drivetrain.hal.opened import opened


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Any:
    def set_(text: str) -> hal.Device:
        hal.close_all()
        monkeypatch.setenv("DRIVETRAIN_SIMULATED", text)
        registry.refresh()
        return hal.device("simulated:0")

    yield set_
    hal.close_all()


# -- only by name ----------------------------------------------------------------------------------


def test_without_the_variable_it_is_absent_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DRIVETRAIN_SIMULATED", raising=False)
    registry.refresh()
    assert hal.devices("simulated") == ()
    with pytest.raises(BadInput):
        hal.device("simulated:0")
    assert "DRIVETRAIN_SIMULATED is not set" in simulated.absent()


def test_with_it_the_device_is_listed_and_chosen_only_by_name(ask: Any) -> None:
    device = ask("count=3 vendor=acme name=chip")
    assert [d.address for d in hal.devices("simulated")] == [f"simulated:{n}" for n in range(3)]
    assert all(d.driver != "simulated" for d in hal.devices())
    assert hal.device().driver != "simulated"
    assert (device.vendor, device.name) == ("acme", "chip")
    code = "from drivetrain import hal; print(hal.device().driver, len(hal.devices('simulated')))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split()[0] != "simulated"
    assert done.stdout.split()[1] == "3"


# -- configuration ---------------------------------------------------------------------------------


def test_words_and_json_say_the_same() -> None:
    words = (
        "count=2, vendor=acme name=x memory=64M bandwidth_gbps=4 latency_us=5 groups=peer+pinned "
        "fault=alloc:3:out_of_memory fault=work:1:delay:0.5"
    )
    expected = Configuration(
        count=2,
        vendor="acme",
        name="x",
        memory_bytes=64 << 20,
        groups=frozenset({"peer", "pinned"}),
        bandwidth_gbps=4.0,
        latency_us=5.0,
        faults=(Fault("alloc", 3, "out_of_memory"), Fault("work", 1, "delay", 0.5)),
    )
    assert configuration(words) == expected
    text = json.dumps(
        {
            "count": 2,
            "vendor": "acme",
            "name": "x",
            "memory": "64M",
            "bandwidth_gbps": 4,
            "latency_us": 5,
            "groups": ["peer", "pinned"],
            "fault": ["alloc:3:out_of_memory", "work:1:delay:0.5"],
        }
    )
    assert configuration(text) == expected
    assert configuration("1") == configuration("on") == Configuration()
    assert configuration("groups=none") == Configuration(groups=frozenset())
    assert configuration("") is None


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("count=0", "count"),
        ("count=17", "count"),
        ("count=two", "count"),
        ("memory=5", "memory"),
        ("memory=1T", "memory"),
        ("memory=lots", "memory"),
        ("groups=wings", "groups"),
        ("bandwidth_gbps=-1", "bandwidth_gbps"),
        ("bandwidth_gbps=nan", "bandwidth_gbps"),
        ("latency_us=1e9", "latency_us"),
        ("colour=blue", "colour"),
        ("justaword", "justaword"),
        ("=5", "=5"),
        ("fault=alloc", "alloc"),
        ("fault=alloc:0:error", "alloc:0:error"),
        ("fault=alloc:x:error", "alloc:x:error"),
        ("fault=alloc:1:explode", "explode"),
        ("fault=a-b:1:error", "a-b"),
        ("fault=alloc:1:delay:-1", "delay"),
        ("{not json", "JSON"),
        ('{"count": 99}', "count"),
        ('{"faults": 1}', "faults"),
    ],
)
def test_what_cannot_be_meant_is_told(text: str, what: str) -> None:
    with pytest.raises(BadInput, match="DRIVETRAIN_SIMULATED") as caught:
        configuration(text)
    assert what in str(caught.value)


@given(st.text(max_size=40))
def test_any_text_is_a_configuration_or_bad_input(text: str) -> None:
    try:
        found = configuration(text)
    except BadInput:
        return
    assert found is None or 1 <= found.count <= 16


def test_an_unknown_defect_names_those_that_exist(ask: Any) -> None:
    device = ask("mutant=no_such_defect")
    with pytest.raises(BadInput, match="event_done_early"):
        device.stream()


# -- what it has -----------------------------------------------------------------------------------


def test_it_is_what_was_configured(ask: Any) -> None:
    device = ask("memory=8M groups=pinned+timing count=2")
    backend = opened(device).backend
    assert backend.groups == {"pinned", "timing"}
    assert backend.memory() == (8 << 20, 8 << 20)
    assert device.memory().total_bytes == 8 << 20
    stream = device.stream()
    with device.alloc(5 << 20, stream=stream, pool=hal.DriverMemory(device)):
        assert backend.memory()[0] <= 3 << 20
        assert device.memory().used_bytes >= 5 << 20
        with pytest.raises(OutOfMemory) as caught:
            device.alloc(4 << 20, stream=stream, pool=hal.DriverMemory(device))
        assert caught.value.total == 8 << 20
    stream.synchronize()
    assert backend.memory() == (8 << 20, 8 << 20)


def test_a_slow_device_takes_its_time(ask: Any) -> None:
    """Told by its own events: 1 MiB at 0.05 GB/s are 21 ms."""
    device = ask("bandwidth_gbps=0.05 latency_us=1000")
    stream = device.stream()
    buffer = device.alloc(1 << 20, stream=stream)
    start = stream.record()
    buffer.fill(b"\0", stream=stream)
    end = stream.record()
    stream.synchronize()
    assert end.seconds_since(start) > 0.02


def test_the_probe_works_and_fails_when_the_device_does(ask: Any) -> None:
    device = ask("1")
    simulated.probe(device.info)
    ask("fault=fill:1:error")
    with pytest.raises(HalError, match="injected"):
        simulated.probe(device.info)


# -- strict ----------------------------------------------------------------------------------------


def test_work_on_memory_that_was_given_back_is_an_error_at_the_next_wait(ask: Any) -> None:
    device = ask("1")
    stream = device.stream()
    memory = hal.DriverMemory(device)
    buffer = device.alloc(4096, stream=stream, pool=memory)
    stray = device.wrap(buffer.ptr, 4096, owner=None)
    stray.fill(b"\x01", stream=stream)
    stream.synchronize()
    buffer.close()
    stray.fill(b"\x02", stream=stream)
    with pytest.raises(HalError, match="in no allocation") as caught:
        stream.synchronize()
    assert caught.value.code == "bad_address"
    stream.synchronize()
    beyond = device.alloc(4096, stream=stream, pool=memory)
    outside = device.wrap(beyond.ptr + 4000, 4096, owner=None)
    outside.fill(b"\x02", stream=stream)
    with pytest.raises(HalError, match="in no allocation"):
        stream.synchronize()


# -- faults ----------------------------------------------------------------------------------------


def test_the_nth_call_fails_and_the_others_do_not(ask: Any) -> None:
    device = ask("fault=alloc:2:out_of_memory fault=event_record:1:error fault=copy:1:error")
    stream = device.stream()
    memory = hal.DriverMemory(device)
    device.alloc(64, stream=stream, pool=memory).close()
    with pytest.raises(OutOfMemory, match="call 2 of alloc"):
        device.alloc(64, stream=stream, pool=memory)
    buffer = device.alloc(64, stream=stream, pool=memory)
    with pytest.raises(HalError, match="injected") as caught:
        stream.record()
    assert caught.value.code == "injected"
    stream.record()
    with pytest.raises(HalError, match="injected"):
        buffer.copy_from(b"x", stream=stream)
    buffer.copy_from(b"x", stream=stream)
    stream.synchronize()


def test_queued_work_fails_when_its_turn_comes(ask: Any) -> None:
    device = ask("fault=work:2:error")
    stream = device.stream()
    buffer = device.alloc(64, stream=stream)
    for pattern in (b"\x01", b"\x02", b"\x03"):
        buffer.fill(pattern, stream=stream)
    with pytest.raises(HalError, match="injected"):
        stream.synchronize()
    back = bytearray(64)
    buffer.copy_to(back, stream=stream)
    stream.synchronize()
    assert back == b"\x03" * 64


@pytest.mark.parametrize("where", ["fill", "work", "stream_synchronize"])
def test_a_lost_device_stays_lost_until_it_is_opened_anew(ask: Any, where: str) -> None:
    device = ask(f"fault={where}:1:lost")
    stream = device.stream()
    buffer = device.alloc(64, stream=stream)
    with pytest.raises(DeviceLost):  # noqa: PT012  (at the call or at the wait)
        buffer.fill(b"\0", stream=stream)
        stream.synchronize()
    for use in (stream.synchronize, stream.record, lambda: device.alloc(1 << 22, stream=stream)):
        with pytest.raises(DeviceLost):
            use()
    buffer.close()
    stream.close()
    device = ask("1")
    device.stream().synchronize()


def test_a_late_device_is_late_and_one_that_hangs_is_a_timeout(ask: Any) -> None:
    device = ask("fault=work:1:delay:0.2")
    stream = device.stream()
    buffer = device.alloc(64, stream=stream)
    buffer.fill(b"\x01", stream=stream)
    with pytest.raises(Timeout):
        stream.synchronize(0.02)
    stream.synchronize()
    code = (
        "import os\n"
        "from drivetrain import hal\n"
        "from drivetrain.errors import Timeout\n"
        "device = hal.device('simulated:0')\n"
        "stream = device.stream()\n"
        "device.alloc(64, stream=stream).fill(b'a', stream=stream)\n"
        "try:\n"
        "    stream.synchronize(0.2)\n"
        "except Timeout:\n"
        "    print('timeout', flush=True)\n"
        "os._exit(0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "DRIVETRAIN_SIMULATED": "fault=work:1:hang"},
    )
    assert done.stdout == "timeout\n", done.stderr


def test_faults_can_be_put_in_while_it_runs(ask: Any) -> None:
    device = ask("1")
    stream = device.stream()
    backend: Any = opened(device).backend
    stream.record()
    backend.inject("event_record:2:error")
    stream.record()
    with pytest.raises(HalError, match="injected"):
        stream.record()
    stream.record()
    with pytest.raises(BadInput):
        backend.inject("nonsense")
    backend.inject("stream_done:1:delay:0.05")
    began = time.monotonic()
    assert stream.done
    assert time.monotonic() - began >= 0.05
