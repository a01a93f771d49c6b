"""Kernels of a Level Zero device: SPIR-V that somebody made, loaded and launched.

The driver compiles it when it is loaded. Level Zero itself reads no source: Intel's compilers make
SPIR-V of one (``clang -target spirv64``, ``ocloc``, DPC++, Triton for XPU).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field

from drivetrain.errors import CompileError, Unsupported
from drivetrain.hal.driver import FunctionFacts
from drivetrain.hal.drivers.giving_back import GivingBack
from drivetrain.hal.drivers.level_zero_api import (
    NAME,
    GroupCount,
    KernelDesc,
    KernelProperties,
    ModuleDesc,
    Ze,
    word,
)
from drivetrain.hal.drivers.level_zero_context import Context
from drivetrain.hal.drivers.level_zero_streams import Signal, Streams

_SPIRV = (b"\x03\x02\x23\x07", b"\x07\x23\x02\x03")
_NOT_TAKEN = frozenset(
    {
        Ze.RESULT_ERROR_INVALID_NATIVE_BINARY,
        Ze.RESULT_ERROR_MODULE_BUILD_FAILURE,
        Ze.RESULT_ERROR_MODULE_LINK_FAILURE,
    }
)


@dataclass
class Kernel:
    """A kernel; its arguments are a part of it until it is launched."""

    handle: int
    arguments: int
    facts: FunctionFacts


@dataclass
class Module:
    """Code that was loaded, and its kernels."""

    handle: int
    kernels: list[int] = field(default_factory=list)


class Modules:
    """What one backend has loaded. A module goes when the work queued before its end is done: one
    in use must not be destroyed."""

    def __init__(self, context: Context, streams: Streams, threads: int) -> None:
        self._context, self._api, self._streams = context, context.api, streams
        self._threads = threads
        self._modules: dict[int, Module] = {}
        self._kernels: dict[int, Kernel] = {}
        self._ending: list[tuple[list[Signal], Module]] = []

    # -- modules -----------------------------------------------------------------------------------

    def load(self, code: bytes, form: str) -> int:
        """Raises CompileError with the driver's build log."""
        context, api = self._context, self._api
        if form != "spirv":
            raise Unsupported(
                f"a Level Zero device takes spirv, not {form!r}",
                code="unsupported",
                driver=NAME,
                op="module_load",
                device=context.address,
            )
        if not code.startswith(_SPIRV):
            raise self._not_taken("this is no SPIR-V: it does not begin with its magic number")
        with context.lock:
            self._collect()
        # Without the lock: compiling takes its time, and other work of the device goes on.
        box, log = ctypes.c_void_p(), ctypes.c_void_p()
        desc = ModuleDesc(
            Ze.STRUCTURE_TYPE_MODULE_DESC, None, Ze.MODULE_FORMAT_IL_SPIRV, len(code), code, b""
        )
        result = context.code(
            api.zeModuleCreate,
            context.handle,
            context.device,
            ctypes.byref(desc),
            ctypes.byref(box),
            ctypes.byref(log),
        )
        said = self._told(int(log.value or 0))
        if result in _NOT_TAKEN:
            raise self._not_taken(
                f"the driver does not take this SPIR-V: {word(result)}"
                + (f"\n{said}" if said else ""),
                log=said,
                native=result,
            )
        if result:
            raise context.failure(api.zeModuleCreate.__name__, result)
        module = int(box.value or 0)
        self._modules[module] = Module(module)
        return module

    def _told(self, log: int) -> str:
        """What a build log says, and the log given back; "" for none, or one that fails."""
        if not log:
            return ""
        api = self._api
        size = ctypes.c_size_t()
        text = ctypes.create_string_buffer(0)
        if not api.zeModuleBuildLogGetString(log, ctypes.byref(size), None) and size.value:
            text = ctypes.create_string_buffer(size.value)
            api.zeModuleBuildLogGetString(log, ctypes.byref(size), text)
        api.zeModuleBuildLogDestroy(log)
        return text.raw.partition(b"\0")[0].decode(errors="replace").strip()

    def _not_taken(self, message: str, *, log: str = "", native: int = 0) -> CompileError:
        return CompileError(
            message,
            log=log or message,
            code="not_taken",
            driver=NAME,
            native=native,
            native_name=word(native) if native else "",
            op=self._api.zeModuleCreate.__name__ if native else "module_load",
            device=self._context.address,
        )

    def unload(self, module: int) -> None:
        with self._context.lock:
            signals = self._streams.fences()
            self._ending.append((signals, self._modules.pop(module)))
            self._collect()

    def _collect(self) -> None:
        """Destroy the modules that were unloaded and that no work uses any more."""
        signals = self._streams.signals
        for entry in list(self._ending):
            if all(signals.is_set(signal) for signal in entry[0]):
                self._destroy(entry[1])
                self._ending.remove(entry)
                for signal in entry[0]:
                    signals.let(signal)

    def _destroy(self, module: Module) -> None:
        context, api = self._context, self._api
        while module.kernels:
            kernel = module.kernels[-1]
            context.call(api.zeKernelDestroy, kernel)
            self._kernels.pop(module.kernels.pop(), None)
        context.call(api.zeModuleDestroy, module.handle)

    def close(self) -> None:
        """Let go of all that is left; nothing is running on the device any more."""
        give, signals = GivingBack(), self._streams.signals
        ending, self._ending = self._ending, []
        for held, module in ending:
            for signal in held:
                give(signals.let, signal)
            give(self._destroy, module)
        for module in list(self._modules.values()):
            give(self._destroy, module)
        self._modules = {}
        give.end()

    # -- kernels -----------------------------------------------------------------------------------

    def function(self, module: int, symbol: str) -> int:
        context, api = self._context, self._api
        box = ctypes.c_void_p()
        desc = KernelDesc(Ze.STRUCTURE_TYPE_KERNEL_DESC, None, 0, symbol.encode())
        code = context.code(api.zeKernelCreate, module, ctypes.byref(desc), ctypes.byref(box))
        if code == Ze.RESULT_ERROR_INVALID_KERNEL_NAME:
            raise context.error("no_such_kernel", "function", f"the module has no {symbol!r}")
        if code:
            raise context.failure(api.zeKernelCreate.__name__, code)
        kernel = int(box.value or 0)
        told = KernelProperties(Ze.STRUCTURE_TYPE_KERNEL_PROPERTIES)
        self._modules[module].kernels.append(kernel)
        context.call(api.zeKernelGetProperties, kernel, ctypes.byref(told))
        facts = FunctionFacts(
            threads=told.requiredGroupSizeX * told.requiredGroupSizeY * told.requiredGroupSizeZ
            or self._threads,
            shared_bytes=told.localMemSize,
            local_bytes=told.privateMemSize,
        )
        self._kernels[kernel] = Kernel(kernel, told.numKernelArgs, facts)
        return kernel

    def arguments(self, function: int, sizes: Sequence[int]) -> None:
        """Raises HalError when the kernel has another number of arguments. One more than was given
        is its dynamic local memory."""
        has = self._kernels[function].arguments
        if has not in (len(sizes), len(sizes) + 1):
            raise self._context.error(
                "wrong_arguments",
                "function_arguments",
                f"{len(sizes)} arguments were given; the kernel has {has}",
            )

    def facts(self, function: int) -> FunctionFacts:
        return self._kernels[function].facts

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
        context, api = self._context, self._api
        table = (ctypes.c_void_p * len(sizes)).from_address(arguments) if sizes else ()
        is_local = self._kernels[function].arguments == len(sizes) + 1
        if shared and not is_local:
            raise context.error(
                "invalid",
                "launch",
                f"{shared} bytes of dynamic shared memory were asked for, and the kernel's last "
                "argument is no pointer to local memory",
            )
        with context.lock:
            context.call(api.zeKernelSetGroupSize, function, *block)
            for index, (at, size) in enumerate(zip(table, sizes, strict=True)):
                context.call(api.zeKernelSetArgumentValue, function, index, abs(size), at)
            if is_local:
                local = max(shared, 1)
                context.call(api.zeKernelSetArgumentValue, function, len(sizes), local, None)
            count = GroupCount(*grid)
            self._streams.append(
                stream, "zeCommandListAppendLaunchKernel", function, ctypes.byref(count)
            )
