"""One AMD GPU, open in this process, through HIP. What is the same in CUDA is the cuda driver's:
memory, streams, graphs, waits and errors; see `hip_api` for why that fits."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from typing import Any

from drivetrain.errors import CompileError, DriverMissing, HalError, Unsupported
from drivetrain.hal.driver import (
    Backend,
    Calls,
    DeviceInfo,
    FunctionFacts,
    LaunchAbi,
    Limits,
    Target,
)
from drivetrain.hal.drivers.cuda_api import Api, Code, Cu
from drivetrain.hal.drivers.cuda_context import Context, Refused
from drivetrain.hal.drivers.cuda_graphs import Graphs
from drivetrain.hal.drivers.cuda_memory import Memory
from drivetrain.hal.drivers.cuda_streams import Streams
from drivetrain.hal.drivers.giving_back import GivingBack
from drivetrain.hal.drivers.hip import GROUPS
from drivetrain.hal.drivers.hip_api import NAME, Hip, HipApi, Uuid, load

ALIGNMENT = 256
"""Bytes; what every allocator of HIP keeps to."""

_CLOSE_WAIT_S = 5.0
_MOST_THREADS_OF_A_SIDE = (1 << 32) - 1
"""HIP counts a grid's side in threads, with 32 bits."""
_FORMS = (b"\x7fELF", b"__CLANG_OFFLOAD_BUNDLE__", b"CCOB")
_NOT_TAKEN = frozenset(
    {
        Code.ERROR_INVALID_VALUE,
        Code.ERROR_INVALID_IMAGE,
        Code.ERROR_NO_BINARY_FOR_GPU,
        Hip.ErrorInvalidKernelFile,
        Hip.ErrorSharedObjectInitFailed,
    }
)


# -- finding the device ----------------------------------------------------------------------------


def initialised(api: HipApi) -> HipApi:
    """The API after ``hipInit``. Raises DriverMissing when it sees no device."""
    code = api.cuInit(0)
    if code:
        raise _failed(api, "hipInit", code)
    return api


def seen(api: HipApi) -> list[tuple[str, str]]:
    """(uuid, PCI address) of each device that HIP shows to this process, by its number; both empty
    for one that cannot be asked. Raises HalError.

    A uuid is ``GPU-`` and 16 digits, as ``rocminfo`` and ``ROCR_VISIBLE_DEVICES`` have it; empty
    for cards that have none.
    """
    count = ctypes.c_int()
    code = api.cuDeviceGetCount(ctypes.byref(count))
    if code:
        raise _failed(api, "hipGetDeviceCount", code)
    found = []
    for device in range(count.value):
        raw, pci = Uuid(), ctypes.create_string_buffer(64)
        if api.cuDeviceGetPCIBusId(pci, len(pci), device):
            api.hipGetLastError()
        if api.cuDeviceGetUuid(ctypes.byref(raw), device):
            api.hipGetLastError()
        word = bytes(raw)[:16].rstrip(b"\0").decode(errors="replace")
        uuid = f"GPU-{word.lower()}" if word.strip("0") else ""
        found.append((uuid, pci.value.decode(errors="replace").lower()))
    return found


def _failed(api: HipApi, op: str, code: int) -> HalError:
    api.hipGetLastError()
    name, sentence = api.words(code)
    absent = code in (Code.ERROR_NO_DEVICE, Hip.ErrorInvalidDevice)
    kind = DriverMissing if absent else HalError
    return kind(
        f"{op} failed: {name} ({sentence})",
        code="no_device" if absent else "broken",
        driver=NAME,
        native=code,
        native_name=name,
        op=op,
    )


def device_of(api: HipApi, info: DeviceInfo) -> int:
    """HIP's number, in this process, of the device. Raises HalError when HIP does not see it."""
    devices = seen(api)
    for number, (uuid, pci) in enumerate(devices):
        if info.uuid in (uuid, f"PCI-{pci}"):
            return number
    names = ", ".join(uuid or pci for uuid, pci in devices) or "no device"
    raise HalError(
        f"HIP does not see {info.uuid} in this process; it sees {names}. It reads "
        "ROCR_VISIBLE_DEVICES and HIP_VISIBLE_DEVICES once, when it is first used",
        code="not_visible",
        driver=NAME,
        op="open",
        device=f"{NAME}:{info.index}",
    )


class Selected:
    """The device selected for each call; what the thread had selected is found as it was.

    HIP keeps each failure as the thread's last error, which libraries look at after calls of their
    own: ours are taken back.
    """

    def __init__(self, api: Api, device: int) -> None:
        self._api, self._device = api, device
        self._local = threading.local()
        # A look at thread-local state: not worth giving up the interpreter's lock for.
        self._get = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(_address(api.cudaGetDevice))
        self.handle = 0
        """The device as a pointer, for C; 0 where the library has no such thing."""
        box = ctypes.c_void_p()
        if "contexts" in api.off:
            self.code(api.cuCtxSynchronize)
        elif not self.code(api.cuCtxGetCurrent, ctypes.byref(box)):
            self.handle = int(box.value or 0)

    def code(self, function: Any, *arguments: Any) -> int:
        try:
            box, where = self._local.box
        except AttributeError:
            box = ctypes.c_int()
            where = ctypes.addressof(box)
            self._local.box = box, where
        self._get(where)
        before = box.value
        if before != self._device:
            code = self._api.cudaSetDevice(self._device)
            if code:
                self._api.hipGetLastError()
                raise Refused("hipSetDevice", code)
        try:
            code = int(function(*arguments))
            if code:
                self._api.hipGetLastError()
            return code
        finally:
            if before != self._device:
                self._api.cudaSetDevice(before)

    def release(self) -> None:
        """HIP's primary context is nobody's to give back."""


def _address(function: Any) -> int:
    return int(ctypes.cast(function, ctypes.c_void_p).value or 0)


# -- the backend -----------------------------------------------------------------------------------


class HipBackend:
    """`drivetrain.hal.driver.Backend` over ``libamdhip64``."""

    def __init__(self, info: DeviceInfo, api: HipApi | None = None) -> None:
        api = initialised(load() if api is None else api)
        self.address = f"{NAME}:{info.index}"
        self._api = api
        self._context = context = Context(api, device_of(api, info), self.address, Selected)
        self._modules: dict[int, list[int]] = {}
        self._functions: set[int] = set()
        try:
            self._describe()
            self._streams = streams = Streams(context)
            pools = context.attribute(Hip.DeviceAttributeMemoryPoolsSupported)
            # HIP does not promise that pageable memory is copied aside before a copy returns.
            self._memory = memory = Memory(
                context, pool=bool(pools) and "pool" not in api.off, stages=False
            )
        except BaseException:
            context.release()
            raise
        self._graphs = graphs = Graphs(context, self._functions, memory.capture_ended)
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
        self.register = memory.register
        self.unregister = memory.unregister
        self.graph_begin = graphs.begin
        self.graph_end = graphs.end
        self.graph_launch = graphs.launch
        self.graph_destroy = graphs.destroy
        self.graph_set = graphs.set

    def _describe(self) -> None:
        api, get = self._api, self._context.attribute
        off = set(api.off)
        # Where the host may not touch it while the device works, it is not what ``managed`` means.
        if not (
            get(Hip.DeviceAttributeManagedMemory)
            and get(Hip.DeviceAttributeConcurrentManagedAccess)
        ):
            off.add("managed")
        self.groups = GROUPS - off
        self.alignment = ALIGNMENT
        threads = get(Hip.DeviceAttributeMaxThreadsPerBlock)
        sides = (
            get(Hip.DeviceAttributeMaxGridDimX),
            get(Hip.DeviceAttributeMaxGridDimY),
            get(Hip.DeviceAttributeMaxGridDimZ),
        )
        most = _MOST_THREADS_OF_A_SIDE // max(threads, 1)
        self.limits = Limits(
            grid=(min(sides[0], most), min(sides[1], most), min(sides[2], most)),
            block=(
                get(Hip.DeviceAttributeMaxBlockDimX),
                get(Hip.DeviceAttributeMaxBlockDimY),
                get(Hip.DeviceAttributeMaxBlockDimZ),
            ),
            threads=threads,
            shared_bytes=get(Hip.DeviceAttributeMaxSharedMemoryPerBlock),
        )
        self.target = Target(
            kind="hip",
            arch=api.architecture(self._context.device),
            features=("fp64", "fp16", "subgroups", f"wave{get(Hip.DeviceAttributeWarpSize)}"),
            version=api.version_text(),
        )

    # -- life ------------------------------------------------------------------------------------

    def close(self) -> None:
        context, give = self._context, GivingBack()
        if context.closed:
            return
        try:
            if not context.lost:
                give(self._graphs.give_up_captures)
            # What is left when the work does not end is the driver's, until the process ends.
            if not context.lost and self._streams.are_done(_CLOSE_WAIT_S, give):
                give(self._graphs.close)
                for module in list(self._modules):
                    give(self.module_unload, module)
                give(self._memory.close)
                give(self._streams.close)
        finally:
            give(context.release)
        give.end()

    def in_context(self, function: Any, *arguments: Any) -> int:
        """Call a function of a library that works on the selected device, as hipBLAS does."""
        return self._context.code(function, *arguments)

    # -- group compute ---------------------------------------------------------------------------

    def module_load(self, code: bytes, form: str) -> int:
        context, api = self._context, self._api
        if form != "hsaco":
            raise Unsupported(
                f"a HIP device takes hsaco, not {form!r}",
                code="unsupported",
                driver=NAME,
                op="module_load",
                device=self.address,
            )
        if not code.startswith(_FORMS):
            raise self._not_taken("this is no code object: it is neither an ELF file nor a bundle")
        box = ctypes.c_void_p()
        image = code + b"\0"
        result = context.code(api.cuModuleLoadData, ctypes.byref(box), image)
        if result in _NOT_TAKEN:
            name, sentence = api.words(result)
            raise self._not_taken(
                f"HIP {self.target.version} does not take this code object for "
                f"{self.target.arch}: {name} ({sentence}). Code objects are for one architecture",
                native=result,
                native_name=name,
            )
        if result:
            raise context.failure(api.cuModuleLoadData.__name__, result)
        module = int(box.value or 0)
        self._modules[module] = []
        return module

    def _not_taken(self, message: str, *, native: int = 0, native_name: str = "") -> CompileError:
        return CompileError(
            message,
            log=message,
            code="not_taken",
            driver=NAME,
            native=native,
            native_name=native_name,
            op="module_load",
            device=self.address,
        )

    def module_unload(self, module: int) -> None:
        functions = self._modules.pop(module, [])
        try:
            self._context.call(self._api.cuModuleUnload, module)
        except HalError:
            self._modules[module] = functions
            raise
        self._functions.difference_update(functions)

    def function(self, module: int, symbol: str) -> int:
        context, api = self._context, self._api
        box = ctypes.c_void_p()
        code = context.code(
            api.cuModuleGetFunction, ctypes.byref(box), module, symbol.encode() + b"\0"
        )
        if code == Code.ERROR_NOT_FOUND:
            raise context.error("no_such_kernel", "function", f"the module has no {symbol!r}")
        if code:
            raise context.failure(api.cuModuleGetFunction.__name__, code, what=symbol)
        function = int(box.value or 0)
        self._modules.setdefault(module, []).append(function)
        self._functions.add(function)
        return function

    def function_arguments(self, function: int, sizes: Sequence[int]) -> None:
        """HIP does not tell a kernel's arguments."""

    def function_facts(self, function: int) -> FunctionFacts:
        return FunctionFacts(
            threads=self._fact(function, Cu.FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK),
            registers=self._fact(function, Cu.FUNC_ATTRIBUTE_NUM_REGS),
            shared_bytes=self._fact(function, Cu.FUNC_ATTRIBUTE_SHARED_SIZE_BYTES),
            local_bytes=self._fact(function, Cu.FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES),
        )

    def _fact(self, function: int, number: int) -> int:
        box = ctypes.c_int()
        self._context.call(self._api.cuFuncGetAttribute, ctypes.byref(box), number, function)
        return box.value

    def launch(
        self,
        function: int,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared: int,
        stream: int,
        arguments: int,
        sizes: Sequence[int],
    ) -> None:
        self._context.call(
            self._api.cuLaunchKernel, function, *grid, *block, shared, stream, arguments, None
        )

    def calls(self) -> Calls:
        api, context = self._api, self._context
        if not context.handle or "compute" not in self.groups:
            return Calls()
        return Calls(
            LaunchAbi.CUDA,
            launch=_address(api.cuLaunchKernel),
            record=_address(api.cuEventRecord),
            context=context.handle,
            get_context=_address(api.cuCtxGetCurrent),
            set_context=_address(api.cuCtxSetCurrent),
            graph_launch=_address(api.cuGraphLaunch) if "graphs" in self.groups else 0,
        )

    # -- group peer ------------------------------------------------------------------------------

    def peer_enable(self, other: Backend) -> bool:
        if other is self:
            return True
        if not isinstance(other, HipBackend):
            return False
        context, api, far = self._context, self._api, other._context
        able = ctypes.c_int()
        context.call(api.cuDeviceCanAccessPeer, ctypes.byref(able), context.device, far.device)
        if not able.value:
            return False
        code = context.code(api.cudaDeviceEnablePeerAccess, far.device, 0)
        if code in (Code.ERROR_PEER_ACCESS_UNSUPPORTED, Code.ERROR_TOO_MANY_PEERS):
            return False
        if code not in (Code.SUCCESS, Code.ERROR_PEER_ACCESS_ALREADY_ENABLED):
            name = api.cudaDeviceEnablePeerAccess.__name__
            raise context.failure(name, code, what=other.address)
        other._memory.share_with(context.device)
        return True

    def copy_peer(self, dst: int, src: int, nbytes: int, other: Backend, stream: int) -> None:
        if not isinstance(other, HipBackend):
            raise self._context.error(
                "invalid", "copy_peer", f"{other!r} is no device of this driver"
            )
        self._context.call(
            self._api.cudaMemcpyPeerAsync,
            dst,
            self._context.device,
            src,
            other._context.device,
            nbytes,
            stream,
        )
