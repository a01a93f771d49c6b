"""One NVIDIA GPU (or MIG instance), open in this process, through the CUDA driver API."""

from __future__ import annotations

import ctypes
import os
import uuid as uuids
from collections.abc import Sequence
from typing import Any

from drivetrain.errors import DriverMissing, HalError, Unsupported
from drivetrain.hal.driver import (
    Backend,
    Calls,
    DeviceInfo,
    LaunchAbi,
    Limits,
    MemoryCalls,
    Target,
)
from drivetrain.hal.drivers.cuda import GROUPS
from drivetrain.hal.drivers.cuda_api import NAME, Api, Code, Cu, Uuid, load
from drivetrain.hal.drivers.cuda_context import Context
from drivetrain.hal.drivers.cuda_like import CudaLike, address_of
from drivetrain.hal.drivers.cuda_memory import Memory

ALIGNMENT = 256
"""Bytes; what every allocator of the driver keeps to."""

_LOG_BYTES = 16 << 10
_SHARED_WITHOUT_ASKING = 48 << 10
_ELF, _FATBIN = b"\x7fELF", (0xBA55ED50).to_bytes(4, "little")
_NOT_TAKEN = frozenset(
    {
        Code.ERROR_INVALID_VALUE,
        Code.ERROR_INVALID_IMAGE,
        Code.ERROR_NO_BINARY_FOR_GPU,
        Code.ERROR_INVALID_PTX,
        Code.ERROR_UNSUPPORTED_PTX_VERSION,
        Code.ERROR_INVALID_SOURCE,
    }
)


# -- finding the device ----------------------------------------------------------------------------


def initialised(api: Api) -> Api:
    """The API after ``cuInit``. Raises DriverMissing when it sees no device."""
    code = api.cuInit(0)
    if code:
        raise failed(api, api.cuInit, code)
    return api


def failed(api: Api, function: Any, code: int, said: str = "") -> HalError:
    """What it means that the driver does not answer about its devices."""
    name, sentence = api.words(code)
    kind = DriverMissing if code == Code.ERROR_NO_DEVICE else HalError
    return kind(
        f"{said}{function.__name__} failed: {name} ({sentence})",
        code="no_device" if code == Code.ERROR_NO_DEVICE else "broken",
        driver=NAME,
        native=code,
        native_name=name,
        op=function.__name__,
    )


def seen(api: Api) -> tuple[dict[str, int], HalError | None]:
    """({uuid: CUDA's number in this process}, why the first of the others could not be asked).
    A uuid is written without ``GPU-``. Raises HalError when CUDA does not count its devices."""
    count = ctypes.c_int()
    code = api.cuDeviceGetCount(ctypes.byref(count))
    if code:
        raise failed(api, api.cuDeviceGetCount, code)
    found: dict[str, int] = {}
    problem: HalError | None = None
    for index in range(count.value):
        device, raw = ctypes.c_int(), Uuid()
        function = api.cuDeviceGet
        code = function(ctypes.byref(device), index)
        if not code:
            function = api.cuDeviceGetUuid
            code = function(ctypes.byref(raw), device.value)
        if code:
            problem = problem or failed(api, function, code, f"device {index} is not known: ")
            continue
        found[str(uuids.UUID(bytes=bytes(raw.bytes)))] = device.value
    return found, problem


def device_of(api: Api, info: DeviceInfo) -> int:
    """CUDA's number, in this process, of the device with this uuid. Raises HalError when CUDA does
    not see it."""
    found, problem = seen(api)
    wanted = info.uuid.partition("-")[2].lower()
    if wanted in found:
        return found[wanted]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    # Older drivers write the uuid of a MIG instance otherwise, or tell its GPU's.
    if info.uuid.startswith("MIG-") and visible == info.uuid and len(found) == 1:
        return next(iter(found.values()))
    if problem is not None:
        raise problem
    raise HalError(
        f"CUDA does not see {info.uuid} in this process; it sees "
        f"{', '.join(sorted(found)) or 'no device'}"
        + (f" under CUDA_VISIBLE_DEVICES={visible!r}" if visible is not None else "")
        + ". It reads that variable once, when it is first used",
        code="not_visible",
        driver=NAME,
        op="open",
        device=f"{NAME}:{info.index}",
    )


# -- the backend -----------------------------------------------------------------------------------


class CudaBackend(CudaLike):
    """`drivetrain.hal.driver.Backend` over ``libcuda``."""

    peer_pushes = True
    """NVLink writes faster than it reads."""

    def __init__(self, info: DeviceInfo, api: Api | None = None) -> None:
        self._api = api = initialised(load() if api is None else api)
        super().__init__(Context(api, device_of(api, info), f"{NAME}:{info.index}"))

    def _memory_of(self, context: Context) -> Memory:
        get = context.attribute
        return Memory(
            context,
            pool="pool" not in self._api.off
            and bool(get(Cu.DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED)),
            # Coherent machines (Grace) read pageable memory in place, when they come to it.
            stages=not get(Cu.DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES),
        )

    def _describe(self) -> None:
        api, get = self._api, self._context.attribute
        off = set(api.off)
        # Where the host may not touch it while the device works, it is not what ``managed`` means.
        if not (
            get(Cu.DEVICE_ATTRIBUTE_MANAGED_MEMORY)
            and get(Cu.DEVICE_ATTRIBUTE_CONCURRENT_MANAGED_ACCESS)
        ):
            off.add("managed")
        self.groups = GROUPS - off
        self.alignment = ALIGNMENT
        self.limits = Limits(
            grid=(
                get(Cu.DEVICE_ATTRIBUTE_MAX_GRID_DIM_X),
                get(Cu.DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y),
                get(Cu.DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z),
            ),
            block=(
                get(Cu.DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X),
                get(Cu.DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y),
                get(Cu.DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z),
            ),
            threads=get(Cu.DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK),
            shared_bytes=max(
                get(Cu.DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN),
                get(Cu.DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK),
            ),
        )
        major = get(Cu.DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)
        minor = get(Cu.DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)
        version = api.version()
        features = ["fp64", "fp16", "subgroups"]
        if major >= 8:
            features.append("bf16")
        self.target = Target(
            kind="cuda",
            arch=f"sm_{major}{minor}",
            features=tuple(features),
            version=f"{version // 1000}.{version % 1000 // 10}",
        )

    # -- group compute ---------------------------------------------------------------------------

    def module_load(self, code: bytes, form: str) -> int:
        context, api = self._context, self._api
        self._check_code(code, form)
        image = code if code.endswith(b"\0") else code + b"\0"
        info, errors = (ctypes.create_string_buffer(_LOG_BYTES) for _ in range(2))
        options = (ctypes.c_int * 4)(
            Cu.JIT_INFO_LOG_BUFFER,
            Cu.JIT_INFO_LOG_BUFFER_SIZE_BYTES,
            Cu.JIT_ERROR_LOG_BUFFER,
            Cu.JIT_ERROR_LOG_BUFFER_SIZE_BYTES,
        )
        values = (ctypes.c_void_p * 4)(
            ctypes.addressof(info), _LOG_BYTES, ctypes.addressof(errors), _LOG_BYTES
        )
        box = ctypes.c_void_p()
        result = context.code(
            api.cuModuleLoadDataEx, ctypes.byref(box), image, len(options), options, values
        )
        if result in _NOT_TAKEN:
            name, sentence = api.words(result)
            log = "\n".join(
                part.value.decode(errors="replace").strip() for part in (errors, info)
            ).strip()
            raise self._not_taken(
                f"the driver (CUDA {self.target.version}) does not take this {form} for "
                f"{self.target.arch}: {name} ({sentence}){chr(10) if log else ''}{log}",
                log=log,
                native=result,
                native_name=name,
            )
        if result:
            raise context.failure(api.cuModuleLoadDataEx.__name__, result)
        module = int(box.value or 0)
        self._modules[module] = []
        return module

    def _check_code(self, code: bytes, form: str) -> None:
        if form == "ptx":
            text = code.rstrip(b"\0")
            if b"\0" in text or b".version" not in text or b".target" not in text:
                raise self._not_taken("this is no PTX: it has no .version or .target line")
        elif form == "cubin":
            if not code.startswith((_ELF, _FATBIN)):
                raise self._not_taken(
                    "this is no cubin: it is neither an ELF file nor a fat binary"
                )
        else:
            raise Unsupported(
                f"a CUDA device takes ptx and cubin, not {form!r}",
                code="unsupported",
                driver=NAME,
                op="module_load",
                device=self.address,
            )

    def _prepare(self, function: int) -> None:
        context, api = self._context, self._api
        # A kernel that is loaded at its first launch would wait for what is running, and break a
        # capture.
        if "eager" not in api.off:
            context.call(api.cuFuncLoad, function)
        # Allowed once for all launches, also those that do not come through `launch`.
        most = self.limits.shared_bytes
        if most > _SHARED_WITHOUT_ASKING:
            context.call(
                api.cuFuncSetAttribute,
                function,
                Cu.FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                most - self._fact(function, Cu.FUNC_ATTRIBUTE_SHARED_SIZE_BYTES),
            )

    def function_arguments(self, function: int, sizes: Sequence[int]) -> None:
        """Raises HalError when the kernel has other arguments, where the driver tells them."""
        if "parameters" in self._api.off:
            return
        told: list[int] = []
        offset, size = ctypes.c_size_t(), ctypes.c_size_t()
        while len(told) <= len(sizes):
            code = self._context.code(
                self._api.cuFuncGetParamInfo,
                function,
                len(told),
                ctypes.byref(offset),
                ctypes.byref(size),
            )
            if code == Code.ERROR_INVALID_VALUE:  # there are no more
                break
            if code:
                return
            told.append(size.value)
        given = [abs(size) for size in sizes]
        if told != given:
            raise self._context.error(
                "wrong_arguments",
                "function_arguments",
                f"arguments of {given} bytes were given; the kernel begins with {told}",
            )

    def calls(self) -> Calls:
        api = self._api
        return Calls(
            LaunchAbi.CUDA,
            launch=address_of(api.cuLaunchKernel),
            record=address_of(api.cuEventRecord),
            context=self._context.handle,
            get_context=address_of(api.cuCtxGetCurrent),
            set_context=address_of(api.cuCtxSetCurrent),
            graph_launch=address_of(api.cuGraphLaunch),
        )

    def memory_calls(self) -> MemoryCalls:
        """For a pool in C. It takes memory with cuMemAlloc: what the driver's own pool gives cannot
        be opened by another process."""
        api = self._api
        return MemoryCalls(
            context=self._context.handle,
            push=address_of(api.cuCtxPushCurrent),
            pop=address_of(api.cuCtxPopCurrent),
            alloc=address_of(api.cuMemAlloc),
            free=address_of(api.cuMemFree),
            event_create=address_of(api.cuEventCreate),
            event_destroy=address_of(api.cuEventDestroy),
            event_record=address_of(api.cuEventRecord),
            event_query=address_of(api.cuEventQuery),
            stream_wait=address_of(api.cuStreamWaitEvent),
            is_capturing=address_of(api.cuStreamIsCapturing),
            ordinal=self._context.device,
        )

    # -- group peer ------------------------------------------------------------------------------

    def _peer_access(self, far: Context) -> tuple[Any, int]:
        return self._api.cuCtxEnablePeerAccess, far.handle

    def copy_peer(self, dst: int, src: int, nbytes: int, other: Backend, stream: int) -> None:
        if not isinstance(other, CudaBackend):
            raise self._foreign(other)
        pushing = stream in other._context.streams
        (other if pushing else self)._context.call(
            self._api.cuMemcpyPeerAsync,
            dst,
            self._context.handle,
            src,
            other._context.handle,
            nbytes,
            stream,
        )
