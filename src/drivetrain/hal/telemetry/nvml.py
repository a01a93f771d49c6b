"""NVIDIA's sensors through NVML, which opens no CUDA context."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from drivetrain.errors import DeviceLost, DriverMissing, HalError
from drivetrain.hal.telemetry import Telemetry, gpm
from drivetrain.hal.telemetry.health import uncorrected

_lock = threading.Lock()
_initialised_in: int | None = None


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # a thread of the parent may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

_THROTTLE = {
    0x002: "application_clocks",
    0x004: "power_cap",
    0x008: "hw_slowdown",
    0x010: "sync_boost",
    0x020: "sw_thermal",
    0x040: "hw_thermal",
    0x080: "hw_power_brake",
    0x100: "display_clocks",
}
"""Bits of nvmlDeviceGetCurrentClocksEventReasons; bit 0, idle, is no reason to worry."""


def library() -> Any:
    """pynvml, initialised in this process.

    Raises DriverMissing when NVML is not installed and HalError when it does not work.
    """
    global _initialised_in
    try:
        import pynvml
    except ImportError as error:
        raise DriverMissing(
            "the Python package nvidia-ml-py is not installed, so NVIDIA GPUs cannot be listed",
            code="driver_missing",
            driver="cuda",
        ) from error
    with _lock:
        if _initialised_in != os.getpid():
            try:
                pynvml.nvmlInit()
            except pynvml.NVMLError as error:
                raise translated(error, "nvmlInit") from error
            _initialised_in = os.getpid()
    return pynvml


def translated(error: Any, op: str, device: str = "") -> HalError:
    """Drivetrain's error for an NVMLError."""
    import pynvml

    text = f"{op} failed: {error}"
    kind: type[HalError] = HalError
    code = "error"
    if error.value == pynvml.NVML_ERROR_LIBRARY_NOT_FOUND:
        kind, code, text = DriverMissing, "driver_missing", "libnvidia-ml.so.1 cannot be loaded"
    elif error.value == pynvml.NVML_ERROR_DRIVER_NOT_LOADED:
        code, text = "no_kernel", f"the NVIDIA kernel driver is not loaded ({text})"
    elif error.value in (pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_RESET_REQUIRED):
        kind, code = DeviceLost, "device_lost"
        text = f"the GPU is lost until it is reset ({text})"
    return kind(text, code=code, driver="cuda", native=int(error.value), op=op, device=device)


def sensor(function: Callable[..., Any], *arguments: Any) -> Any:
    """What NVML answers, or ``None`` where the sensor does not exist or is not for us to read.

    Raises DeviceLost when the GPU is gone.
    """
    import pynvml

    try:
        return function(*arguments)
    except pynvml.NVMLError as error:
        found = translated(error, getattr(function, "__name__", "nvml"))
        if isinstance(found, DeviceLost):
            raise found from error
        return None


def telemetry(uuid: str) -> Telemetry:
    """The sensors of the GPU or MIG instance with this uuid."""
    try:
        nv = library()
        try:
            handle = nv.nvmlDeviceGetHandleByUUID(uuid)
        except nv.NVMLError as error:
            raise translated(error, "nvmlDeviceGetHandleByUUID", uuid) from error
        found = read(nv, handle)
        return replace(found, vendor_specific=(*found.vendor_specific, *gpm.read(nv, uuid, handle)))
    except DeviceLost as error:
        return Telemetry(health=f"lost: {error}", at=time.time())
    except HalError as error:
        return Telemetry(health=f"unknown: {error}", at=time.time())


def read(nv: Any, handle: Any) -> Telemetry:
    """One reading by handle. Raises DeviceLost."""
    memory = sensor(nv.nvmlDeviceGetMemoryInfo, handle)
    busy = sensor(nv.nvmlDeviceGetUtilizationRates, handle)
    power_mw = sensor(nv.nvmlDeviceGetPowerUsage, handle)
    limit_mw = sensor(nv.nvmlDeviceGetEnforcedPowerLimit, handle)
    bits = _throttle(nv, handle)
    right, wrong = (_errors(nv, handle, kind) for kind in ("CORRECTED", "UNCORRECTED"))
    return Telemetry(
        utilisation=None if busy is None else min(1.0, busy.gpu / 100),
        # What the driver reserves is not free either.
        memory_used_bytes=None if memory is None else int(memory.total - memory.free),
        memory_total_bytes=None if memory is None else int(memory.total),
        power_w=None if power_mw is None else power_mw / 1000,
        power_limit_w=None if limit_mw is None else limit_mw / 1000,
        temperature_c=sensor(nv.nvmlDeviceGetTemperature, handle, nv.NVML_TEMPERATURE_GPU),
        memory_temperature_c=_field(nv, handle, "NVML_FI_DEV_MEMORY_TEMP"),
        clock_mhz=sensor(nv.nvmlDeviceGetClockInfo, handle, nv.NVML_CLOCK_SM),
        memory_clock_mhz=sensor(nv.nvmlDeviceGetClockInfo, handle, nv.NVML_CLOCK_MEM),
        throttle=tuple(word for bit, word in _THROTTLE.items() if bits & bit),
        ecc_corrected=right,
        ecc_uncorrected=wrong,
        health=_health(nv, handle, wrong),
        at=time.time(),
        vendor_specific=_more(nv, handle, busy),
    )


def _throttle(nv: Any, handle: Any) -> int:
    """Bits of why the clock is held down, by the name that this driver's NVML has for them."""
    for name in ("EventReasons", "ThrottleReasons"):
        function = getattr(nv, f"nvmlDeviceGetCurrentClocks{name}", None)
        bits = None if function is None else sensor(function, handle)
        if bits is not None:
            return int(bits)
    return 0


def _errors(nv: Any, handle: Any, kind: str) -> int | None:
    """ECC errors since the last reset; None without ECC."""
    which = getattr(nv, f"NVML_MEMORY_ERROR_TYPE_{kind}", None)
    if which is None:
        return None
    count = sensor(nv.nvmlDeviceGetTotalEccErrors, handle, which, nv.NVML_VOLATILE_ECC)
    return None if count is None else int(count)


def _field(nv: Any, handle: Any, name: str) -> float | None:
    """The number in one of NVML's fields; None where there is none."""
    field = getattr(nv, name, None)
    values = None if field is None else sensor(nv.nvmlDeviceGetFieldValues, handle, [field])
    if not values or values[0].nvmlReturn:
        return None
    kind, value = values[0].valueType, values[0].value
    names = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal")
    if not 0 <= kind < len(names):
        return None
    return float(getattr(value, names[kind]))


def _more(nv: Any, handle: Any, busy: Any) -> tuple[tuple[str, float], ...]:
    energy = sensor(nv.nvmlDeviceGetTotalEnergyConsumption, handle)
    found: dict[str, float | None] = {
        "memory_busy_ratio": None if busy is None else min(1.0, busy.memory / 100),
        "energy_j": None if energy is None else energy / 1000,
        "fan_ratio": _over_hundred(sensor(nv.nvmlDeviceGetFanSpeed, handle)),
        "pcie_replays": sensor(nv.nvmlDeviceGetPcieReplayCounter, handle),
        "nvlink_errors": _field(nv, handle, "NVML_FI_DEV_NVLINK_CRC_FLIT_ERROR_COUNT_TOTAL"),
    }
    return tuple((name, float(value)) for name, value in found.items() if value is not None)


def _over_hundred(percent: Any) -> float | None:
    return None if percent is None else float(percent) / 100


def _health(nv: Any, handle: Any, wrong: int | None) -> str:
    rows = sensor(nv.nvmlDeviceGetRemappedRows, handle)
    if rows is not None and rows[3]:
        return "degraded: memory rows could not be remapped; the GPU needs service"
    if rows is not None and rows[2]:
        return "degraded: memory rows are remapped at the next reset"
    if rows is None and sensor(nv.nvmlDeviceGetRetiredPagesPendingStatus, handle):
        return "degraded: memory pages are retired at the next reset"
    return f"degraded: {uncorrected(wrong)}" if wrong else "ok"
