"""NVIDIA's counters on a GPU that has them."""

from __future__ import annotations

import time

import pytest

from drivetrain import hal


@pytest.mark.gpu
def test_a_busy_hopper_tells_its_counters_and_its_errors() -> None:
    device = hal.device("cuda:0")
    if int((device.capabilities.compute or "0").split(".")[0]) < 9:
        pytest.skip("needs a Hopper GPU or newer")
    stream = device.stream()
    x = device.alloc(256 << 20, stream=stream)
    first = device.telemetry()
    assert first.ecc_uncorrected is not None
    assert first.power_limit_w
    until = time.monotonic() + 1.0
    while time.monotonic() < until:
        for _ in range(50):
            x.fill(b"\x01\x02\x03\x04", stream=stream)
        stream.synchronize(60)
    more = dict(device.telemetry().vendor_specific)
    assert more["sm_busy_ratio"] > 0.1, more
    assert more["dram_bandwidth_ratio"] > 0.05, more
    assert device.health().state in ("ok", "strained")
