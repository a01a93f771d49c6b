"""One SYCL device, open in this process: an OpenCL device whole, another one without kernels."""

from __future__ import annotations

import ctypes

from drivetrain.errors import HalError
from drivetrain.hal.driver import Calls, DeviceInfo, Limits, Target
from drivetrain.hal.drivers.opencl_backend import GRID, features
from drivetrain.hal.drivers.sycl import GROUPS
from drivetrain.hal.drivers.sycl_api import NAME, Api, Aspect, load
from drivetrain.hal.drivers.sycl_context import Context
from drivetrain.hal.drivers.sycl_devices import Seen, seen
from drivetrain.hal.drivers.sycl_memory import ALIGNMENT, Memory
from drivetrain.hal.drivers.sycl_programs import Programs
from drivetrain.hal.drivers.sycl_streams import Streams

_CLOSE_WAIT_S = 5.0


class SyclBackend:
    """`drivetrain.hal.driver.Backend` over dpctl's library."""

    def __init__(self, info: DeviceInfo, api: Api | None = None) -> None:
        api = load() if api is None else api
        self.address = f"{NAME}:{info.index}"
        devices = seen(api)
        here = next((each for each in devices if each.uuid == info.uuid), None)
        for each in devices:
            if each is not here:
                each.delete()
        if here is None:
            names = ", ".join(each.name for each in devices) or "no device"
            raise HalError(
                f"SYCL does not show {info.uuid} in this process; it shows {names}. It reads "
                "ONEAPI_DEVICE_SELECTOR, OCL_ICD_VENDORS and the like once, when it is first used",
                code="not_visible",
                driver=NAME,
                op="open",
                device=self.address,
            )
        self.groups, self.limits = _groups(here), _limits(here)
        total = api.DPCTLDevice_GetGlobalMemSize(here.handle)
        self._context = context = Context(api, here.handle, self.address)
        self._streams = streams = Streams(context, timing="timing" in self.groups)
        try:
            if "timing" in self.groups and not streams.tells_time():
                self.groups -= {"timing"}
        except BaseException:
            streams.close()
            context.release()
            raise
        shares = bool(info.memory_domain)
        self._memory = memory = Memory(context, streams, total, shares_host=shares)
        self.alignment = ALIGNMENT
        self.target = Target(NAME, version=here.driver_version)
        self._programs = None
        if here.cl is not None:
            self._programs = programs = Programs(context, streams, here.cl)
            self.target = Target(
                kind="opencl",
                arch=here.cl.language,
                features=tuple(word for word in features(here.cl) if word != "binary_only"),
                version=f"sycl / {here.platform} / {here.driver_version}",
            )
            self.module_load = programs.load
            self.module_unload = programs.unload
            self.function = programs.function
            self.function_arguments = programs.arguments
            self.function_facts = programs.facts
            self.launch = programs.launch
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
        self.memory = memory.info
        self.alloc = memory.alloc
        self.free = memory.free
        self.copy = memory.copy
        self.fill = memory.fill

    def close(self) -> None:
        context = self._context
        if context.closed:
            return
        done = False
        try:
            # What is left when the work does not end is SYCL's, until the process ends.
            if self._streams.comes_to_rest(_CLOSE_WAIT_S):
                if self._programs is not None:
                    self._programs.close()
                self._memory.close()
                self._streams.close()
                done = True
        finally:
            context.release(keep=not done)

    def calls(self) -> Calls:
        return Calls()


def _groups(here: Seen) -> frozenset[str]:
    lacking = set()
    if here.cl is None or not here.cl.compiles:
        lacking.add("compute")
    if not here.has(Aspect.queue_profiling):
        lacking.add("timing")
    if not here.has(Aspect.usm_host_allocations):
        lacking.add("pinned")
    # Where the host may not touch it while the device works, it is not what ``managed`` means.
    if not here.has(Aspect.usm_atomic_shared_allocations):
        lacking.add("managed")
    return GROUPS - lacking


def _limits(here: Seen) -> Limits:
    api, handle = here.api, here.handle
    threads = max(1, api.DPCTLDevice_GetMaxWorkGroupSize(handle))
    sizes = api.DPCTLDevice_GetMaxWorkItemSizes3d(handle)
    block = [threads] * 3
    if sizes:
        # SYCL counts dimensions from the slowest.
        found = (ctypes.c_size_t * 3).from_address(sizes)
        block = [min(threads, size) for size in reversed(found)]
        api.DPCTLSize_t_Array_Delete(sizes)
    return Limits(
        grid=GRID,
        block=(block[0], block[1], block[2]),
        threads=threads,
        shared_bytes=api.DPCTLDevice_GetLocalMemSize(handle),
    )
