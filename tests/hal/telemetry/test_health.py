"""The verdict on a device's health, and NVML's part in it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivetrain.hal.telemetry import Telemetry, gpm, nvml
from drivetrain.hal.telemetry.health import KINDS, STATES, verdict

FINE = Telemetry(
    utilisation=1.0, memory_used_bytes=10, memory_total_bytes=100, ecc_uncorrected=0, health="ok"
)


def kinds(now: Telemetry) -> tuple[str, list[str]]:
    found = verdict(now)
    return found.state, [reason.kind for reason in found.reasons]


@pytest.mark.parametrize(
    ("change", "state", "reasons"),
    [
        ({}, "ok", []),
        ({"throttle": ("hw_thermal",)}, "strained", ["throttling"]),
        ({"throttle": ("application_clocks",)}, "ok", []),
        ({"memory_used_bytes": 95}, "strained", ["memory_pressure"]),
        ({"memory_used_bytes": 94}, "ok", []),
        ({"memory_total_bytes": 0}, "ok", []),
        ({"ecc_uncorrected": 1}, "degraded", ["ecc"]),
        ({"ecc_corrected": 1000}, "ok", []),
        ({"health": "degraded: memory rows"}, "degraded", ["service"]),
        (
            {"ecc_uncorrected": 2, "throttle": ("prochot",), "memory_used_bytes": 100},
            "degraded",
            ["ecc", "throttling", "memory_pressure"],
        ),
        ({"health": "lost: it is gone", "ecc_uncorrected": 3}, "lost", ["lost"]),
        ({"health": "unknown"}, "unknown", []),
        ({"health": "unknown: NVML does not answer"}, "unknown", ["unreadable"]),
        ({"health": "unknown", "throttle": ("prochot",)}, "strained", ["throttling"]),
    ],
)
def test_a_verdict_follows_from_the_sensors(
    change: dict[str, Any], state: str, reasons: list[str]
) -> None:
    assert kinds(replace(FINE, **change)) == (state, reasons)


def test_the_same_fault_is_told_once() -> None:
    told = verdict(replace(FINE, ecc_uncorrected=3, health="degraded: 3 uncorrected memory errors "
                                                        "since the last reset"))  # fmt: skip
    assert str(told) == "degraded: 3 uncorrected memory errors since the last reset"


@given(
    st.builds(
        Telemetry,
        memory_used_bytes=st.none() | st.integers(0, 200),
        memory_total_bytes=st.none() | st.integers(0, 100),
        throttle=st.lists(st.text(max_size=5), max_size=3).map(tuple),
        ecc_uncorrected=st.none() | st.integers(0, 3),
        health=st.sampled_from(["ok", "unknown", "degraded", "lost", "odd"]) | st.text(max_size=20),
    )
)
def test_every_reading_has_a_verdict_and_only_ok_and_unknown_come_without_reasons(
    now: Telemetry,
) -> None:
    found = verdict(now)
    assert found.state in STATES
    assert {reason.kind for reason in found.reasons} <= set(KINDS)
    assert bool(found.reasons) or found.state in ("ok", "unknown")


# --- NVML ----------------------------------------------------------------------------------------


class NvmlError(Exception):
    value = 3  # NVML_ERROR_NOT_SUPPORTED


class Nvml:
    """A GPU whose sensors are the attributes given; the rest are not supported."""

    NVMLError = NvmlError
    NVML_TEMPERATURE_GPU = NVML_CLOCK_SM = NVML_CLOCK_MEM = NVML_VOLATILE_ECC = 0
    NVML_MEMORY_ERROR_TYPE_CORRECTED = 0
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED = 1
    NVML_FI_DEV_MEMORY_TEMP = 82

    def __init__(self, **answers: Any) -> None:
        self.answers = answers

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("nvml"):
            raise AttributeError(name)

        def call(*arguments: Any) -> Any:
            try:
                answer = self.answers[name]
            except KeyError:
                raise NvmlError from None
            return answer(*arguments) if callable(answer) else answer

        return call


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    def sensor(function: Any, *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except NvmlError:
            return None

    monkeypatch.setattr(nvml, "sensor", sensor)


@pytest.mark.usefixtures("quiet")
def test_nvml_tells_errors_limits_and_why_the_clock_is_held() -> None:
    field = SimpleNamespace(nvmlReturn=0, valueType=1, value=SimpleNamespace(uiVal=85))
    gpu = Nvml(
        nvmlDeviceGetTotalEccErrors=lambda _, which, __: (12, 1)[which],
        nvmlDeviceGetEnforcedPowerLimit=700_000,
        nvmlDeviceGetCurrentClocksEventReasons=0x40 | 0x1,
        nvmlDeviceGetFieldValues=[field],
        nvmlDeviceGetTotalEnergyConsumption=5000,
    )
    now = nvml.read(gpu, "h")
    assert (now.ecc_corrected, now.ecc_uncorrected) == (12, 1)
    assert (now.power_limit_w, now.memory_temperature_c) == (700.0, 85.0)
    assert dict(now.vendor_specific) == {"energy_j": 5.0}
    assert kinds(now) == ("degraded", ["ecc", "throttling"])
    older = Nvml(nvmlDeviceGetCurrentClocksThrottleReasons=0x4)
    assert nvml.read(older, "h").throttle == ("power_cap",), "by the older name of the call"


@pytest.mark.usefixtures("quiet")
def test_a_gpu_without_sensors_is_fine_as_far_as_one_can_tell() -> None:
    now = nvml.read(Nvml(), "h")
    assert replace(now, at=None, health="unknown") == Telemetry()
    assert kinds(now) == ("ok", [])


@pytest.mark.usefixtures("quiet")
def test_memory_that_waits_for_a_reset_needs_service() -> None:
    for answers in (
        {"nvmlDeviceGetRetiredPagesPendingStatus": 1},
        {"nvmlDeviceGetRemappedRows": (0, 1, 1, 0)},
        {"nvmlDeviceGetRemappedRows": (0, 1, 0, 1)},
    ):
        assert kinds(nvml.read(Nvml(**answers), "h")) == ("degraded", ["service"])
    fine = Nvml(nvmlDeviceGetRemappedRows=(3, 1, 0, 0))
    assert kinds(nvml.read(fine, "h")) == ("ok", []), "rows that were remapped before are no fault"


class Gpm(Nvml):
    """As ``Nvml``, with counters: half the SMs busy, a metric that fails, one that is NaN."""

    NVML_GPM_METRICS_GET_VERSION = 1
    NVML_GPM_METRIC_SM_UTIL = 2
    NVML_GPM_METRIC_FP16_UTIL = 13
    NVML_GPM_METRIC_DRAM_BW_UTIL = 10

    def __init__(self, supported: bool = True) -> None:
        super().__init__(
            nvmlGpmQueryDeviceSupport=SimpleNamespace(isSupportedDevice=supported),
            nvmlGpmSampleAlloc=self._alloc,
            nvmlGpmSampleGet=lambda *_: None,
            nvmlGpmSampleFree=self._free,
            nvmlGpmMetricsGet=self._metrics,
        )
        self.living = 0

    def _alloc(self) -> object:
        self.living += 1
        return object()

    def _free(self, _: object) -> None:
        self.living -= 1

    def c_nvmlGpmMetricsGet_t(self) -> Any:
        slots = [SimpleNamespace(metricId=0, nvmlReturn=0, value=0.0) for _ in range(8)]
        return SimpleNamespace(metrics=slots)

    def _metrics(self, question: Any) -> Any:
        answers = {2: (0, 50.0), 13: (0, float("nan")), 10: (3, 77.0)}
        assert question.numMetrics == 3
        for slot in question.metrics[: question.numMetrics]:
            slot.nvmlReturn, slot.value = answers[slot.metricId]
        return question


def test_counters_tell_of_the_time_between_two_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [10.0]
    monkeypatch.setattr(gpm.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(gpm, "_process", 0)
    gpu = Gpm()
    assert gpm.read(gpu, "GPU-1", "h") == ()
    clock[0] += 0.05
    assert gpm.read(gpu, "GPU-1", "h") == (), "too little time for a look"
    clock[0] += 1
    assert gpm.read(gpu, "GPU-1", "h") == (("sm_busy_ratio", 0.5),)
    clock[0] += 0.01
    assert gpm.read(gpu, "GPU-1", "h") == (("sm_busy_ratio", 0.5),), "the last look still holds"
    for number in range(200):
        clock[0] += 1
        gpm.read(gpu, f"GPU-{number}", "h")
    assert gpu.living <= 64, "samples of GPUs are given back"


def test_a_gpu_without_counters_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpm, "_process", 0)
    gpu = Gpm(supported=False)
    assert gpm.read(gpu, "GPU-old", "h") == ()
    gpu.answers.clear()  # a second question would raise
    assert gpm.read(gpu, "GPU-old", "h") == ()
    assert gpu.living == 0
    monkeypatch.setattr(gpm, "_process", 0)
    assert gpm.read(Nvml(), "GPU-older", "h") == (), "an NVML without these calls"
