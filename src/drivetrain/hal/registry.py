"""Every driver and device of this machine, found passively, with the reason when unusable."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from drivetrain.errors import BadInput, DriverMissing, HalError
from drivetrain.hal import config, isolated, loading, wire
from drivetrain.hal.device import Device, DeviceInfo
from drivetrain.hal.telemetry import Telemetry

DISCOVERY_LIMIT_S = 2.0
TELEMETRY_LIMIT_S = 2.0
EXAMINE_LIMIT_S = 10.0
_LIMIT = "DRIVETRAIN_DISCOVERY_LIMIT_S"


@dataclass(frozen=True)
class DriverInfo:
    """One driver: ``state`` is ``usable`` (it listed its devices), ``absent``, ``broken`` or
    ``unchecked`` (switched off, or not trusted); ``reason`` says why when it is not usable."""

    name: str
    state: str
    reason: str = ""
    version: str = ""
    source: str = "drivetrain"
    """The distribution it comes from."""
    install: str = ""
    """What to do about an absent driver."""
    seconds: float = 0.0
    """How long its discovery took."""


@dataclass(frozen=True)
class _Found:
    drivers: Mapping[str, DriverInfo]
    routes: tuple[Device, ...]
    listed: tuple[Device, ...]


_lock = threading.Lock()
_found: tuple[object, _Found] | None = None
_stuck: dict[str, threading.Thread] = {}


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # another thread of the parent may have held it
    _stuck.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def discovery_limit_s() -> float:
    """Seconds a driver has to list its devices: 2, or ``DRIVETRAIN_DISCOVERY_LIMIT_S`` (to 8)."""
    text = os.environ.get(_LIMIT, "")
    if not text:
        return DISCOVERY_LIMIT_S
    try:
        limit = float(text)
    except ValueError:
        limit = 0.0
    if not 0 < limit <= 8:
        raise BadInput(f"{_LIMIT}={text!r} must be a number of seconds above 0 and up to 8")
    return limit


def _surroundings() -> object:
    """What discovery depends on and may change in a process."""
    names = (
        "CUDA_VISIBLE_DEVICES",
        "DRIVETRAIN_CPU_PARTITIONS",
        "DRIVETRAIN_CUDA_LIBRARY",
        "DRIVETRAIN_HIP_LIBRARY",
        "DRIVETRAIN_HOME",
        "DRIVETRAIN_LEVEL_ZERO_LIBRARY",
        "DRIVETRAIN_SIMULATED",
        "DRIVETRAIN_SYCL_LIBRARY",
        "HIP_VISIBLE_DEVICES",
        "OCL_ICD_FILENAMES",
        "OCL_ICD_VENDORS",
        "ONEAPI_DEVICE_SELECTOR",
        "ROCR_VISIBLE_DEVICES",
        "ZE_AFFINITY_MASK",
        _LIMIT,
    )
    affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    try:
        folder = os.getcwd()
    except OSError:
        folder = ""
    return tuple(os.environ.get(name) for name in names), frozenset(affinity), folder


def refresh() -> None:
    """Forgets what was found: the next question discovers anew."""
    global _found
    with _lock:
        _found = None


def _discovered() -> _Found:
    global _found
    with _lock:
        key = _surroundings()
        if _found is None or _found[0] != key:
            _found = (key, _discover())
        return _found[1]


def _discover() -> _Found:
    disabled = config.disabled_drivers()
    outside = loading.outside()
    trusted = config.trusted_drivers() if outside else {}
    states: dict[str, DriverInfo] = {}
    infos: dict[str, tuple[DeviceInfo, ...]] = {}
    requests: dict[str, isolated.Request] = {}
    names = [*loading.ACCELERATORS, *(n for n in outside if n not in loading.BUILT_IN), "cpu"]
    names += loading.BY_NAME
    for name in names:
        state = DriverInfo(name, "usable")
        if name in outside and name not in loading.BUILT_IN:
            offer = outside[name]
            state = replace(state, source=f"{offer.distribution} {offer.version}")
            if name not in disabled and trusted.get(name) != offer.identity:
                states[name] = replace(state, state="unchecked", reason="not trusted")
                continue
        if name in disabled:
            reason = f"switched off in {disabled[name]}"
            states[name] = replace(state, state="unchecked", reason=reason)
            continue
        if name in loading.BUILT_IN:
            driver = loading.built_in(name)
            state = replace(state, install=driver.install)
            reason = driver.absent()
            if reason:
                states[name] = replace(state, state="absent", reason=reason)
                continue
            if driver.in_process:
                started = time.monotonic()
                states[name], infos[name] = _here(state, driver.discover)
                states[name] = replace(states[name], seconds=time.monotonic() - started)
                continue
            kept = driver.known() if driver.known is not None else None
            if kept:
                states[name] = replace(state, version=kept[0].driver_version)
                infos[name] = kept
                continue
        states[name] = state
        requests[name] = isolated.Request("discover", name)
    if requests:
        for name, answer in isolated.run(requests, discovery_limit_s()).items():
            states[name], infos[name] = _answered(states[name], answer)
    ordered = {name: states[name] for name in names}
    routes = [info for name in names for info in infos.get(name, ())]
    return _arranged(ordered, routes)


def _here(
    state: DriverInfo, discover: Callable[[], tuple[DeviceInfo, ...]]
) -> tuple[DriverInfo, tuple[DeviceInfo, ...]]:
    """Discovery that only reads the system's files. BadInput (a setting) is the caller's."""
    try:
        found = discover()
    except DriverMissing as error:
        return replace(state, state="absent", reason=str(error)), ()
    except HalError as error:
        return replace(state, state="broken", reason=str(error)), ()
    return replace(state, version=found[0].driver_version if found else ""), found


def _answered(
    state: DriverInfo, answer: isolated.Answer
) -> tuple[DriverInfo, tuple[DeviceInfo, ...]]:
    state = replace(state, seconds=answer.seconds)
    if answer.kind == "missing":
        install = state.install or answer.value
        return replace(state, state="absent", reason=answer.reason, install=install), ()
    if answer.kind != "ok":
        return replace(state, state="broken", reason=answer.reason), ()
    try:
        if not isinstance(answer.value, list):
            raise ValueError("this is no list of devices")
        found = tuple(wire.info_from_json(value) for value in answer.value)
        if any(info.driver != state.name for info in found):
            raise ValueError("it lists another driver's devices")
        if len({info.index for info in found}) < len(found):
            raise ValueError("it lists two devices under one index")
    except ValueError as error:
        reason = f"its list of devices cannot be read: {error}"
        return replace(state, state="broken", reason=reason), ()
    if not found:
        return replace(state, state="absent", reason="it found no device"), ()
    return replace(state, version=found[0].driver_version), found


def _physical(info: DeviceInfo) -> str:
    """The same for two routes to one physical device."""
    if info.pci and not info.parent_uuid:
        return info.pci.lower()[-12:]  # NVML writes the domain with 8 digits, sysfs with 4
    return info.uuid


def _arranged(states: dict[str, DriverInfo], infos: list[DeviceInfo]) -> _Found:
    """``infos`` come by preference: a device is listed under the first driver that works for it."""
    ways: dict[str, list[DeviceInfo]] = {}
    for info in infos:
        ways.setdefault(_physical(info), []).append(info)
    routes, listed = [], []
    for info in infos:
        # Sorting is stable: among routes that work, the preferred driver stays first.
        ranked = sorted(ways[_physical(info)], key=lambda way: bool(way.fault))
        addresses = tuple(f"{way.driver}:{way.index}" for way in ranked)
        found = Device(f"{info.driver}:{info.index}", info, info.uuid, addresses)
        routes.append(found)
        if found.address == addresses[0] and found.driver not in loading.BY_NAME:
            listed.append(found)
    listed.sort(key=lambda device: device.info.by_name_only)  # stable: the rest keeps its order
    return _Found(MappingProxyType(states), tuple(routes), tuple(listed))


def drivers() -> Mapping[str, DriverInfo]:
    """Every driver by name, by preference, with its state. Initialises no vendor's runtime."""
    found = _discovered().drivers
    # A driver that is there only by name says nothing about the machine while nobody asks for it.
    unasked = [n for n in loading.BY_NAME if n in found and found[n].state == "absent"]
    return MappingProxyType({name: found[name] for name in found if name not in unasked})


def devices(
    driver: str | None = None, *, vendor: str | None = None, all_routes: bool = False
) -> tuple[Device, ...]:
    """The devices, preferred drivers first, then the cpu, then other runtimes on the processor.

    A device that two drivers reach is listed once, under the preferred one; ``all_routes`` lists
    each way, and so does naming a ``driver``. Simulated devices are listed only under their
    driver's name. Raises BadInput for an unknown driver.
    """
    found = _discovered()
    if driver is not None and driver not in found.drivers:
        raise BadInput(f"there is no driver {driver!r}; there are {', '.join(found.drivers)}")
    if driver is not None:
        chosen = found.routes
    elif all_routes:
        chosen = tuple(each for each in found.routes if each.driver not in loading.BY_NAME)
    else:
        chosen = found.listed
    return tuple(
        each
        for each in chosen
        if (driver is None or each.driver == driver)
        and (vendor is None or each.vendor.lower() == vendor.lower())
    )


def device(address: str = "") -> Device:
    """The device at ``driver:index`` or ``driver://uuid`` (or a unique beginning of the uuid).

    ``""`` is the default: the first listed that is not known to be unusable, other runtimes on the
    processor left out. Raises BadInput for an
    address that names nothing, telling which exist.
    """
    if not isinstance(address, str):
        raise BadInput(f"an address is a text, as in 'cuda:0', and not {address!r}")
    found = _discovered()
    if not address:
        from drivetrain.hal.probe import verdict

        for each in found.listed:
            if not each.info.by_name_only and verdict(each).usable is not False:
                return each
        raise BadInput("no device of this machine can be used; see `drivetrain doctor`")
    for each in found.routes:
        if each.address == address:
            return each
    name, separator, uuid = address.partition("://")
    if separator and uuid:
        matching = [e for e in found.routes if e.driver == name and e.uuid.startswith(uuid)]
        exact = [e for e in matching if e.uuid == uuid]
        if len(exact or matching) == 1:
            return (exact or matching)[0]
        if matching:
            uuids = ", ".join(e.uuid for e in matching)
            raise BadInput(f"{address!r} names several devices: {uuids}")
    raise BadInput(_unknown(address, found))


def _unknown(address: str, found: _Found) -> str:
    there_are = ", ".join(each.address for each in found.routes) or "none"
    message = f"there is no device {address!r}; there are {there_are}"
    name = address.partition(":")[0]
    if "/" in name:
        return f"{message}. Devices of other nodes cannot be addressed yet"
    state = found.drivers.get(name)
    if state is not None and state.state != "usable":
        return f"{message}. Driver {name} is {state.state}: {state.reason}"
    return message


def telemetry(device: Device) -> Telemetry:
    """The device's sensors now; what cannot be read within 2 s is told as health ``unknown``."""
    if not loading.is_here(device.driver):
        request = isolated.Request("telemetry", device.driver, _facts(device.info))
        answer = isolated.run({"": request}, TELEMETRY_LIMIT_S)[""]
        try:
            if answer.kind == "ok":
                return wire.telemetry_from_json(answer.value)
            reason = answer.reason
        except ValueError as error:
            reason = str(error)
        return Telemetry(health=f"unknown: {reason}", at=time.time())
    driver = loading.load(device.driver)
    if driver.in_process:
        return driver.telemetry(device.info)
    return _within_limit(device, lambda: driver.telemetry(device.info))


def _facts(info: DeviceInfo) -> str:
    import json

    return json.dumps(wire.info_to_json(info))


def _within_limit(device: Device, read: Callable[[], Telemetry]) -> Telemetry:
    """Reads in a thread: a driver that answered in its child before may hang now."""
    late = Telemetry(
        health=f"unknown: driver {device.driver} did not answer within {TELEMETRY_LIMIT_S:g} s",
        at=time.time(),
    )
    earlier = _stuck.get(device.driver)
    if earlier is not None and earlier.is_alive():
        return late
    answers: list[Telemetry] = []
    thread = threading.Thread(
        target=lambda: answers.append(read()), name=f"telemetry {device.address}", daemon=True
    )
    thread.start()
    thread.join(TELEMETRY_LIMIT_S)
    if not answers:
        _stuck[device.driver] = thread
        return late
    return answers[0]


def examine() -> dict[str, list[str]]:
    """What is installed and does not work although its driver does, by the driver's name: each a
    sentence that says what to do. Loads vendors' libraries, in children."""
    asked = [
        state.name
        for state in _discovered().drivers.values()
        if state.state == "usable"
        and not (state.name in loading.BUILT_IN and loading.built_in(state.name).examine is None)
    ]
    requests = {name: isolated.Request("examine", name) for name in asked}
    found: dict[str, list[str]] = {}
    for name, answer in isolated.run(requests, EXAMINE_LIMIT_S).items():
        if answer.kind == "ok" and isinstance(answer.value, list):
            found[name] = [str(each) for each in answer.value]
        else:
            found[name] = [f"a look at what is installed failed: {answer.reason}"]
    return {name: said for name, said in found.items() if said}


def trust(name: str) -> str:
    """Trusts the outside driver of this name from now on; its source. Raises BadInput."""
    outside = loading.outside()
    if name in loading.BUILT_IN:
        raise BadInput(f"driver {name} is Drivetrain's own and needs no trust")
    if name not in outside:
        there_are = ", ".join(outside) or "none"
        raise BadInput(f"no installed package offers a driver {name!r}; offered: {there_are}")
    config.write_trust(name, outside[name].identity)
    refresh()
    return f"{outside[name].distribution} {outside[name].version}"


def untrust(name: str) -> None:
    """Forgets the trust in an outside driver. Raises BadInput when there was none."""
    if name not in config.trusted_drivers():
        raise BadInput(f"driver {name!r} is not trusted; nothing was changed")
    config.write_trust(name, None)
    refresh()


def state_folder() -> Path:
    """``DRIVETRAIN_HOME``, else the platform's state folder."""
    return config.state_folder()
