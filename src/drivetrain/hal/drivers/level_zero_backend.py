"""One Intel device, open in this process, through Level Zero."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from drivetrain.errors import DriverMissing, HalError
from drivetrain.hal.driver import Calls, DeviceInfo, Limits, Target
from drivetrain.hal.drivers.giving_back import GivingBack
from drivetrain.hal.drivers.level_zero import GROUPS
from drivetrain.hal.drivers.level_zero_api import (
    NAME,
    Api,
    ComputeProperties,
    DeviceProperties,
    DriverProperties,
    MemoryAccessProperties,
    MemoryProperties,
    PciProperties,
    QueueGroupProperties,
    Ze,
    load,
    word,
)
from drivetrain.hal.drivers.level_zero_context import Context
from drivetrain.hal.drivers.level_zero_memory import ALIGNMENT, Memory
from drivetrain.hal.drivers.level_zero_modules import Modules
from drivetrain.hal.drivers.level_zero_streams import Streams

_CLOSE_WAIT_S = 5.0


# -- finding the device ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """A device as a driver shows it."""

    driver: int
    handle: int
    facts: DeviceProperties
    driver_version: int
    memory_bytes: int
    pci: str

    @property
    def uuid(self) -> str:
        return f"ZE-{bytes(self.facts.uuid).hex()}"


def _must(op: str, code: int) -> None:
    if not code:
        return
    absent = code in (
        Ze.RESULT_ERROR_UNINITIALIZED,
        Ze.RESULT_ERROR_DEPENDENCY_UNAVAILABLE,
        Ze.RESULT_ERROR_UNSUPPORTED_FEATURE,
    )
    kind = DriverMissing if absent and op == "zeInit" else HalError
    said = ": no driver stands behind the loader" if kind is DriverMissing else ""
    raise kind(
        f"{op} failed: {word(code)}{said}",
        code="no_device" if kind is DriverMissing else "broken",
        driver=NAME,
        native=code,
        native_name=word(code),
        op=op,
    )


def seen(api: Api) -> list[Seen]:
    """Every device of every driver, in the loader's order. Raises DriverMissing where there is no
    driver, HalError when one fails."""
    _must("zeInit", api.zeInit(0))
    count = ctypes.c_uint32()
    _must("zeDriverGet", api.zeDriverGet(ctypes.byref(count), None))
    drivers = (ctypes.c_void_p * max(1, count.value))()
    if count.value:
        _must("zeDriverGet", api.zeDriverGet(ctypes.byref(count), drivers))
    found = []
    for driver in drivers[: count.value]:
        about = DriverProperties(Ze.STRUCTURE_TYPE_DRIVER_PROPERTIES)
        code = api.zeDriverGetProperties(driver, ctypes.byref(about))
        version = 0 if code else about.driverVersion
        number = ctypes.c_uint32()
        _must("zeDeviceGet", api.zeDeviceGet(driver, ctypes.byref(number), None))
        devices = (ctypes.c_void_p * max(1, number.value))()
        if number.value:
            _must("zeDeviceGet", api.zeDeviceGet(driver, ctypes.byref(number), devices))
        for device in devices[: number.value]:
            facts = DeviceProperties(Ze.STRUCTURE_TYPE_DEVICE_PROPERTIES)
            code = api.zeDeviceGetProperties(device, ctypes.byref(facts))
            _must("zeDeviceGetProperties", code)
            handle = int(device or 0)
            memory, pci = _memory(api, handle), _pci(api, handle)
            found.append(Seen(int(driver or 0), handle, facts, version, memory, pci))
    return found


def _memory(api: Api, device: int) -> int:
    count = ctypes.c_uint32()
    if api.zeDeviceGetMemoryProperties(device, ctypes.byref(count), None) or not count.value:
        return 0
    facts = (MemoryProperties * count.value)()
    for each in facts:
        each.stype = Ze.STRUCTURE_TYPE_DEVICE_MEMORY_PROPERTIES
    code = api.zeDeviceGetMemoryProperties(device, ctypes.byref(count), facts)
    return 0 if code else sum(each.totalSize for each in facts)


def _pci(api: Api, device: int) -> str:
    if not api.has("zeDevicePciGetPropertiesExt"):
        return ""
    at = PciProperties(Ze.STRUCTURE_TYPE_PCI_EXT_PROPERTIES)
    if api.zeDevicePciGetPropertiesExt(device, ctypes.byref(at)):
        return ""
    return f"{at.domain:04x}:{at.bus:02x}:{at.device:02x}.{at.function:x}"


def reaches(api: Api, device: Seen, other: Seen) -> bool:
    """Whether the device may read and write the memory of another one."""
    if device.driver != other.driver or not api.has("zeDeviceCanAccessPeer"):
        return False
    able = ctypes.c_ubyte()
    code = api.zeDeviceCanAccessPeer(device.handle, other.handle, ctypes.byref(able))
    return not code and bool(able.value)


def groups_of(api: Api, device: Seen, devices: Sequence[Seen]) -> frozenset[str]:
    """What is declared of a device; ``devices`` are all that there are."""
    off = set(api.off)
    if not any(reaches(api, device, other) for other in devices if other is not device):
        off.add("peer")
    return GROUPS - off


# -- the backend -----------------------------------------------------------------------------------


class LevelZeroBackend:
    """`drivetrain.hal.driver.Backend` over the Level Zero loader."""

    def __init__(self, info: DeviceInfo, api: Api | None = None) -> None:
        api = load() if api is None else api
        self.address = f"{NAME}:{info.index}"
        devices = seen(api)
        here = next((each for each in devices if each.uuid == info.uuid), None)
        if here is None:
            names = ", ".join(each.uuid for each in devices) or "no device"
            raise HalError(
                f"Level Zero does not see {info.uuid} in this process; it sees {names}. It reads "
                "ZE_AFFINITY_MASK once, when it is first used",
                code="not_visible",
                driver=NAME,
                op="open",
                device=self.address,
            )
        self._context = context = Context(api, here.driver, here.handle, self.address)
        try:
            ordinal, pattern = self._queue_group()
            facts = here.facts
            self._streams = streams = Streams(
                context, ordinal, facts.timerResolution * 1e-9, facts.timestampValidBits or 64
            )
            self._memory = memory = Memory(context, streams, here.memory_bytes, pattern)
            self.groups = groups_of(api, here, devices) - self._lacking()
            self.limits = self._limits()
        except BaseException:
            context.release()
            raise
        self._modules = modules = Modules(context, streams, self.limits.threads)
        self.alignment = ALIGNMENT
        self.target = Target(
            NAME,
            arch=f"{facts.deviceId:04x}",
            features=("binary_only",),
            version=str(here.driver_version),
        )
        # The parts answer for themselves.
        self.synchronize = streams.synchronize
        self.stream_create = streams.stream_create
        self.stream_destroy = streams.stream_destroy
        self.stream_done = streams.stream_done
        self.stream_synchronize = streams.stream_synchronize
        self.stream_wait = streams.stream_wait
        self.event_create = streams.event_create
        self.event_destroy = streams.event_destroy
        self.event_record = streams.event_record
        self.event_done = streams.event_done
        self.event_synchronize = streams.event_synchronize
        self.event_seconds = streams.event_seconds
        self.alloc = memory.alloc
        self.free = memory.free
        self.copy = memory.copy
        self.fill = memory.fill
        self.module_load = modules.load
        self.module_unload = modules.unload
        self.function = modules.function
        self.function_arguments = modules.arguments
        self.function_facts = modules.facts
        self.launch = modules.launch

    def _queue_group(self) -> tuple[int, int]:
        """(number, bytes of the longest pattern that it fills with) of the first group of queues
        that computes: it copies and fills too."""
        context, api = self._context, self._context.api
        count = ctypes.c_uint32()
        ask = api.zeDeviceGetCommandQueueGroupProperties
        context.call(ask, context.device, ctypes.byref(count), None)
        groups = (QueueGroupProperties * max(1, count.value))()
        for each in groups:
            each.stype = Ze.STRUCTURE_TYPE_COMMAND_QUEUE_GROUP_PROPERTIES
        context.call(ask, context.device, ctypes.byref(count), groups)
        for number in range(count.value):
            if groups[number].flags & Ze.COMMAND_QUEUE_GROUP_PROPERTY_FLAG_COMPUTE:
                return number, groups[number].maxMemoryFillPatternSize
        raise context.error("broken", "open", "the device has no queues that compute")

    def _lacking(self) -> frozenset[str]:
        context, api = self._context, self._context.api
        able = MemoryAccessProperties(Ze.STRUCTURE_TYPE_DEVICE_MEMORY_ACCESS_PROPERTIES)
        context.call(api.zeDeviceGetMemoryAccessProperties, context.device, ctypes.byref(able))
        lacking = set()
        if not able.hostAllocCapabilities & Ze.MEMORY_ACCESS_CAP_FLAG_RW:
            lacking.add("pinned")
        # Where the host may not touch it while the device works, it is not what ``managed`` means.
        if not able.sharedSingleDeviceAllocCapabilities & Ze.MEMORY_ACCESS_CAP_FLAG_CONCURRENT:
            lacking.add("managed")
        return frozenset(lacking)

    def _limits(self) -> Limits:
        context, api = self._context, self._context.api
        if "compute" not in self.groups:
            return Limits((1, 1, 1), (1, 1, 1), 1, 0)
        told = ComputeProperties(Ze.STRUCTURE_TYPE_DEVICE_COMPUTE_PROPERTIES)
        context.call(api.zeDeviceGetComputeProperties, context.device, ctypes.byref(told))
        return Limits(
            (told.maxGroupCountX, told.maxGroupCountY, told.maxGroupCountZ),
            (told.maxGroupSizeX, told.maxGroupSizeY, told.maxGroupSizeZ),
            told.maxTotalGroupSize,
            told.maxSharedLocalMemory,
        )

    def close(self) -> None:
        context, give = self._context, GivingBack()
        if context.closed:
            return
        done: list[bool] = []
        try:
            for _ in range(2):  # once more, if it could not be asked
                if not done and not context.lost:
                    give(lambda: done.append(self.synchronize(_CLOSE_WAIT_S)))
            # What is left when the work does not end is the driver's, until the process ends.
            if done == [True]:
                give(self._modules.close)
                give(self._memory.close)
                give(self._streams.close)
        finally:
            give(partial(context.release, keep=done != [True]))
        give.end()

    def memory(self) -> tuple[int, int]:
        if self._context.lost:
            self._context.code(self._context.api.zeMemFree)
        return self._memory.info()

    def calls(self) -> Calls:
        return Calls()

    # -- group peer ------------------------------------------------------------------------------

    def peer_enable(self, other: object) -> bool:
        if other is self:
            return True
        if not isinstance(other, LevelZeroBackend):
            return False
        # Memory belongs to a context; devices of one driver share the process's, but for one that
        # was opened after something was lost in it.
        if other._context.handle != self._context.handle or "peer" not in self.groups:
            return False
        context, able = self._context, ctypes.c_ubyte()
        ask = context.api.zeDeviceCanAccessPeer
        context.call(ask, context.device, other._context.device, ctypes.byref(able))
        return bool(able.value)

    def copy_peer(self, dst: int, src: int, nbytes: int, other: object, stream: int) -> None:
        if not isinstance(other, LevelZeroBackend):
            raise self._context.error(
                "invalid", "copy_peer", f"{other!r} is no device of this driver"
            )
        if nbytes:
            self._streams.append(stream, "zeCommandListAppendMemoryCopy", dst, src, nbytes)
