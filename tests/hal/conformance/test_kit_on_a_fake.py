"""The kit's checks that need no kernel, on the cuda driver over a fake ``libcuda`` that is strict
about who calls what when. They show the order of calls; results of a GPU they do not show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from drivetrain import hal
from drivetrain.hal.conformance.check import checks
from drivetrain.hal.conformance.child import outcome
from drivetrain.hal.conformance.running import SIMULATED

TOPICS = ("copies", "ordering", "events", "peer", "graphs", "errors", "threads", "leaks")
SLOW = ("memory", "timing", "limits")
ELSEWHERE = {
    "copies.link": "it measures",
    "peer.link": "it measures",
    **dict.fromkeys(
        ["leaks.allocations", "leaks.buffers", "leaks.events", "leaks.graphs", "leaks.streams"],
        "the fake keeps a list of every call, which grows",
    ),
}


@pytest.fixture
def device(rig_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> tuple[hal.Device, Any]:
    monkeypatch.setenv("DRIVETRAIN_SIMULATED", SIMULATED)
    rig = rig_of("cuda")
    right = hal.devices

    def devices(driver: str | None = None, **options: Any) -> tuple[hal.Device, ...]:
        return (rig.device, rig.other) if driver == "cuda" else right(driver, **options)

    monkeypatch.setattr(hal, "devices", devices)
    return rig.device, rig.fake


@pytest.mark.parametrize(
    "topic", [*TOPICS, *(pytest.param(topic, marks=pytest.mark.soak) for topic in SLOW)]
)
def test_the_cuda_driver_keeps_the_order_of_calls(
    topic: str, device: tuple[hal.Device, Any]
) -> None:
    cuda, fake = device
    todo = [
        check
        for check in checks()
        if check.topic == topic
        and not check.long
        and "compute" not in check.needs
        and check.name not in ELSEWHERE
    ]
    outcomes = {check.name: outcome(check, cuda) for check in todo}
    bad = [f"{n}: {o}" for n, o in outcomes.items() if o[0] in ("failed", "skipped", "not here")]
    assert bad == []
    assert "passed" in {state for state, _ in outcomes.values()}
    hal.close_all()
    assert fake.live() == 0
