"""Intel's sensors through Level Zero's Sysman, which makes no compute context.

Structures as in ``zes_api.h``; tests compare each with the compiler's view of that header.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from ctypes import Structure, byref, c_double, c_int32, c_int64, c_uint32, c_uint64
from typing import Any

from drivetrain.hal.telemetry import Telemetry, sysfs
from drivetrain.hal.telemetry.health import uncorrected

LIBRARY = "libze_loader.so.1"
_MOST = 256
_DEVICE_LOST = 0x70000001
_THROTTLE = {
    0x01: "power_cap",
    0x02: "power_cap",
    0x04: "current_limit",
    0x08: "hw_thermal",
    0x10: "hw_power_brake",
    0x20: "application_clocks",
    0x40: "hw_slowdown",
}
"""ZES_FREQ_THROTTLE_REASON_FLAG_*"""
_SICK = {2: "degraded", 3: "critical", 4: "to be replaced"}
"""zes_mem_health_t"""


class PciAddress(Structure):
    _fields_ = [(name, c_uint32) for name in ("domain", "bus", "device", "function")]


class PciSpeed(Structure):
    _fields_ = [("gen", c_int32), ("width", c_int32), ("maxBandwidth", c_int64)]


_HEAD: list[Any] = [("stype", c_uint32), ("pNext", ctypes.c_void_p)]
_WHERE: list[Any] = [("onSubdevice", ctypes.c_uint8), ("subdeviceId", c_uint32)]


class PciProperties(Structure):
    _fields_ = [
        *_HEAD,
        ("address", PciAddress),
        ("maxSpeed", PciSpeed),
        ("haveBandwidthCounters", ctypes.c_uint8),
        ("havePacketCounters", ctypes.c_uint8),
        ("haveReplayCounters", ctypes.c_uint8),
    ]


class EnergyCounter(Structure):
    _fields_ = [("energy", c_uint64), ("timestamp", c_uint64)]  # microjoules, microseconds


class MemState(Structure):
    _fields_ = [*_HEAD, ("health", c_uint32), ("free", c_uint64), ("size", c_uint64)]


class MemBandwidth(Structure):
    _fields_ = [
        (name, c_uint64) for name in ("readCounter", "writeCounter", "maxBandwidth", "timestamp")
    ]


class FreqState(Structure):
    _fields_ = [
        *_HEAD,
        *((n, c_double) for n in ("currentVoltage", "request", "tdp", "efficient", "actual")),
        ("throttleReasons", c_uint32),
    ]


class FreqProperties(Structure):
    _fields_ = [
        *_HEAD,
        ("type", c_uint32),
        *_WHERE,
        ("canControl", ctypes.c_uint8),
        ("isThrottleEventSupported", ctypes.c_uint8),
        ("min", c_double),
        ("max", c_double),
    ]


class TempProperties(Structure):
    _fields_ = [
        *_HEAD,
        ("type", c_uint32),
        *_WHERE,
        ("maxTemperature", c_double),
        ("isCriticalTempSupported", ctypes.c_uint8),
        ("isThreshold1Supported", ctypes.c_uint8),
        ("isThreshold2Supported", ctypes.c_uint8),
    ]


class EngineProperties(Structure):
    _fields_ = [*_HEAD, ("type", c_uint32), *_WHERE]


class EngineStats(Structure):
    _fields_ = [("activeTime", c_uint64), ("timestamp", c_uint64)]  # microseconds


class RasProperties(Structure):
    _fields_ = [*_HEAD, ("type", c_uint32), *_WHERE]


class RasState(Structure):
    _fields_ = [*_HEAD, ("category", c_uint64 * 7)]


_STYPES = {
    PciProperties: 0x2,
    EngineProperties: 0x5,
    FreqProperties: 0x9,
    RasProperties: 0xF,
    TempProperties: 0x14,
    FreqState: 0x1B,
    MemState: 0x1E,
    RasState: 0x22,
}
_MEMORY_ERRORS = (4, 5)
"""Of the categories of RAS errors: non-compute (memory) and cache."""


class _Failed(Exception):
    """A call answered with an error: the sensor is absent, unless ``code`` says more."""

    def __init__(self, code: int) -> None:
        super().__init__(hex(code))
        self.code = code


class Sysman:
    """The loader, with Sysman initialised. Raises OSError without a library and _Failed without a
    driver."""

    def __init__(self, library: str = LIBRARY) -> None:
        self._library = ctypes.CDLL(library)
        self._rates = sysfs.Rates()
        self.call("zesInit", c_uint32(0))  # loaders before 1.9 lack it
        self.devices: dict[str, ctypes.c_void_p] = {}
        for driver in self.handles("zesDriverGet"):
            for device in self.handles("zesDeviceGet", driver):
                at = self.filled("zesDevicePciGetProperties", device, PciProperties()).address
                name = f"{at.domain:04x}:{at.bus:02x}:{at.device:02x}.{at.function:x}"
                self.devices[name] = device

    def call(self, name: str, *arguments: Any) -> None:
        try:
            function = getattr(self._library, name)
        except AttributeError:
            raise _Failed(0x78000003) from None  # ZE_RESULT_ERROR_UNSUPPORTED_FEATURE
        function.restype = c_uint32
        code = int(function(*arguments))
        if code:
            raise _Failed(code)

    def handles(self, name: str, *of: Any) -> list[ctypes.c_void_p]:
        """What an enumeration lists; nothing where it is not supported."""
        count = c_uint32(0)
        try:
            self.call(name, *of, byref(count), None)
            number = min(count.value, _MOST)
            found = (ctypes.c_void_p * number)()
            count.value = number
            self.call(name, *of, byref(count), found)
        except _Failed as failure:
            if failure.code == _DEVICE_LOST:
                raise
            return []
        return [ctypes.c_void_p(each) for each in found[: count.value]]

    def filled(self, name: str, handle: Any, into: Any, *more: Any) -> Any:
        if type(into) in _STYPES:
            into.stype = _STYPES[type(into)]
        self.call(name, handle, *more, byref(into))
        return into

    def maybe(self, name: str, handle: Any, into: Any, *more: Any) -> Any:
        """As `filled`, None where the sensor is absent. Raises _Failed when the device is lost."""
        try:
            return self.filled(name, handle, into, *more)
        except _Failed as failure:
            if failure.code == _DEVICE_LOST:
                raise
            return None

    # -- one reading ----------------------------------------------------------------------------

    def read(self, pci: str) -> Telemetry | None:
        """The device at this PCI address; None when Sysman does not list it."""
        device = self.devices.get(pci.lower()[-12:])
        if device is None:
            return None
        try:
            return self._read(pci, device)
        except _Failed:
            return Telemetry(health="lost: Level Zero says that the device is lost", at=time.time())

    def _read(self, pci: str, device: ctypes.c_void_p) -> Telemetry:
        rates = self._rates.over(lambda: self._counters(pci, device))
        used, total, sick = self._memory(device)
        clocks, throttle = self._clocks(device)
        heat = self._heat(device)
        right, wrong = self._errors(device)
        busy = sysfs.first(rates.get((pci, name)) for name in ("all", "compute"))
        health = f"degraded: {uncorrected(wrong)}" if wrong else f"degraded: {sick}" if sick else ""
        more = {"read_gbps": "read", "write_gbps": "write", "copy_busy_ratio": "copy"}
        return Telemetry(
            utilisation=None if busy is None else min(1.0, busy),
            memory_used_bytes=used,
            memory_total_bytes=total,
            power_w=rates.get((pci, "power")),
            temperature_c=sysfs.first((heat.get(1), heat.get(0))),
            memory_temperature_c=heat.get(2),
            clock_mhz=clocks.get(0),
            memory_clock_mhz=clocks.get(1),
            throttle=throttle,
            ecc_corrected=right,
            ecc_uncorrected=wrong,
            health=health or "ok",
            at=time.time(),
            vendor_specific=tuple(
                (name, rates[pci, key]) for name, key in more.items() if (pci, key) in rates
            ),
        )

    def _counters(self, pci: str, device: ctypes.c_void_p) -> sysfs.Counters:
        found: sysfs.Counters = {}
        domains = self.handles("zesDeviceEnumPowerDomains", device)
        # The first is the whole card's where a card has such a domain.
        for domain in domains[:1]:
            energy = self.maybe("zesPowerGetEnergyCounter", domain, EnergyCounter())
            if energy is not None:
                found[pci, "power"] = (energy.energy / 1e6, energy.timestamp / 1e6)
        for engine in self.handles("zesDeviceEnumEngineGroups", device):
            kind = self.maybe("zesEngineGetProperties", engine, EngineProperties())
            name = {0: "all", 1: "compute", 3: "copy"}.get(-1 if kind is None else kind.type)
            stats = (
                None if name is None else self.maybe("zesEngineGetActivity", engine, EngineStats())
            )
            if name is not None and stats is not None:
                found[pci, name] = (stats.activeTime / 1e6, stats.timestamp / 1e6)
        for module in self.handles("zesDeviceEnumMemoryModules", device)[:1]:
            width = self.maybe("zesMemoryGetBandwidth", module, MemBandwidth())
            if width is not None:
                found[pci, "read"] = (width.readCounter / 1e9, width.timestamp / 1e6)
                found[pci, "write"] = (width.writeCounter / 1e9, width.timestamp / 1e6)
        return found

    def _memory(self, device: ctypes.c_void_p) -> tuple[int | None, int | None, str]:
        used, total, sick = None, None, ""
        for module in self.handles("zesDeviceEnumMemoryModules", device):
            state = self.maybe("zesMemoryGetState", module, MemState())
            if state is None or not state.size:
                continue
            total = (total or 0) + int(state.size)
            used = (used or 0) + int(state.size - min(state.free, state.size))
            if state.health in _SICK:
                sick = f"its memory is {_SICK[state.health]}"
        return used, total, sick

    def _clocks(self, device: ctypes.c_void_p) -> tuple[dict[int, float], tuple[str, ...]]:
        found: dict[int, float] = {}
        held: list[str] = []
        for domain in self.handles("zesDeviceEnumFrequencyDomains", device):
            kind = self.maybe("zesFrequencyGetProperties", domain, FreqProperties())
            state = self.maybe("zesFrequencyGetState", domain, FreqState())
            if kind is None or state is None:
                continue
            if state.actual >= 0:  # negative: not told
                found[kind.type] = max(found.get(kind.type, 0.0), float(state.actual))
            bits = int(state.throttleReasons)
            held += [word for bit, word in _THROTTLE.items() if bits & bit and word not in held]
        return found, tuple(held)

    def _heat(self, device: ctypes.c_void_p) -> dict[int, float]:
        found: dict[int, float] = {}
        for sensor in self.handles("zesDeviceEnumTemperatureSensors", device):
            kind = self.maybe("zesTemperatureGetProperties", sensor, TempProperties())
            value = self.maybe("zesTemperatureGetState", sensor, c_double())
            if kind is not None and value is not None:
                found[kind.type] = max(found.get(kind.type, -300.0), float(value.value))
        return found

    def _errors(self, device: ctypes.c_void_p) -> tuple[int | None, int | None]:
        counts: dict[int, int] = {}
        for group in self.handles("zesDeviceEnumRasErrorSets", device):
            kind = self.maybe("zesRasGetProperties", group, RasProperties())
            state = self.maybe("zesRasGetState", group, RasState(), ctypes.c_uint8(0))
            if kind is not None and state is not None:
                errors = sum(int(state.category[at]) for at in _MEMORY_ERRORS)
                counts[kind.type] = counts.get(kind.type, 0) + errors
        return counts.get(0), counts.get(1)


_lock = threading.Lock()
_opened: tuple[int, str, Sysman | None] | None = None  # process, library


def opened(library: str = LIBRARY) -> Sysman | None:
    """Sysman in this process; None when its library or a driver for it is missing."""
    global _opened
    with _lock:
        if _opened is None or _opened[:2] != (os.getpid(), library):
            try:
                found = Sysman(library)
            except (OSError, _Failed):
                found = None
            _opened = (os.getpid(), library, found)
        return _opened[2]


def read(pci: str, library: str = LIBRARY) -> Telemetry | None:
    """One reading; None when Sysman is not there or does not list the device."""
    found = opened(library)
    return None if found is None else found.read(pci)


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # a thread of the parent may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
