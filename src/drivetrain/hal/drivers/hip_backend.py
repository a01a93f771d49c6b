"""One AMD GPU, open in this process, through HIP. What is the same in CUDA is the cuda driver's:
memory, streams, graphs, waits and errors; see `hip_api` for why that fits."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from typing import Any

from drivetrain.errors import DriverMissing, HalError, Unsupported
from drivetrain.hal.driver import Backend, Calls, DeviceInfo, LaunchAbi, Limits, Target
from drivetrain.hal.drivers.cuda_api import Api, Code
from drivetrain.hal.drivers.cuda_context import Context, Refused
from drivetrain.hal.drivers.cuda_like import CudaLike, address_of
from drivetrain.hal.drivers.cuda_memory import Memory
from drivetrain.hal.drivers.hip import GROUPS
from drivetrain.hal.drivers.hip_api import NAME, Hip, HipApi, Uuid, load

ALIGNMENT = 256
"""Bytes; what every allocator of HIP keeps to."""

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
        self._get = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(address_of(api.cudaGetDevice))
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


# -- the backend -----------------------------------------------------------------------------------


class HipBackend(CudaLike):
    """`drivetrain.hal.driver.Backend` over ``libamdhip64``."""

    _api: HipApi

    def __init__(self, info: DeviceInfo, api: HipApi | None = None) -> None:
        self._api = api = initialised(load() if api is None else api)
        super().__init__(Context(api, device_of(api, info), f"{NAME}:{info.index}", Selected))

    def _memory_of(self, context: Context) -> Memory:
        pools = context.attribute(Hip.DeviceAttributeMemoryPoolsSupported)
        # HIP does not promise that pageable memory is copied aside before a copy returns.
        return Memory(context, pool=bool(pools) and "pool" not in self._api.off, stages=False)

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

    def function_arguments(self, function: int, sizes: Sequence[int]) -> None:
        """HIP does not tell a kernel's arguments."""

    def calls(self) -> Calls:
        api, context = self._api, self._context
        if not context.handle or "compute" not in self.groups:
            return Calls()
        return Calls(
            LaunchAbi.CUDA,
            launch=address_of(api.cuLaunchKernel),
            record=address_of(api.cuEventRecord),
            context=context.handle,
            get_context=address_of(api.cuCtxGetCurrent),
            set_context=address_of(api.cuCtxSetCurrent),
            graph_launch=address_of(api.cuGraphLaunch) if "graphs" in self.groups else 0,
        )

    # -- group peer ------------------------------------------------------------------------------

    def _peer_access(self, far: Context) -> tuple[Any, int]:
        return self._api.cudaDeviceEnablePeerAccess, far.device

    def copy_peer(self, dst: int, src: int, nbytes: int, other: Backend, stream: int) -> None:
        if not isinstance(other, HipBackend):
            raise self._foreign(other)
        self._context.call(
            self._api.cudaMemcpyPeerAsync,
            dst,
            self._context.device,
            src,
            other._context.device,
            nbytes,
            stream,
        )
