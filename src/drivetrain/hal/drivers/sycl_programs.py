"""Kernels of a SYCL device: OpenCL C and SPIR-V, compiled in a child process first.

The child is the OpenCL driver's: the device is one of OpenCL's, whose compiler SYCL calls too, and
there it tells what is wrong with a source, and what arguments its kernels have. SYCL takes no
binaries, so the code is compiled once more in this process: by then the compiler has shown that it
survives it. That takes its time, so what was unloaded last is kept for who loads the same again.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from drivetrain.errors import CompileError
from drivetrain.hal.driver import FunctionFacts
from drivetrain.hal.drivers import opencl_compile
from drivetrain.hal.drivers.opencl_api import Cl, name_of
from drivetrain.hal.drivers.opencl_platforms import Found
from drivetrain.hal.drivers.sycl_api import NAME, Dp, LocalAccessor
from drivetrain.hal.drivers.sycl_context import Context
from drivetrain.hal.drivers.sycl_streams import Streams
from drivetrain.hal.language import logs
from drivetrain.hal.language.cache import cache
from drivetrain.hal.language.facts import Compiled

_NUMBERS = {1: Dp.UINT8_T, 2: Dp.UINT16_T, 4: Dp.UINT32_T, 8: Dp.UINT64_T}
"""Types by size: only the bytes are copied, so a float goes as an integer."""
_LOCAL_BYTES = 16
"""Of a dynamic ``__local`` argument that a launch asks no size for."""
_MOST_IDLE = 32
"""Programs that are kept though no module is of them."""
_MOST_THREADS = 2**31 - 1
"""Of a whole launch: dpctl's library was compiled for indices that fit into an int."""


@dataclass
class Function:
    """A kernel, and how its arguments are written."""

    handle: int
    places: list[str]
    """Where each argument lies: ``global``, ``constant``, ``local``, ``private``, or ""."""
    facts: FunctionFacts
    lock: threading.Lock = field(default_factory=threading.Lock)
    sizes: tuple[int, ...] | None = None
    table: Any = None
    types: Any = None
    local: LocalAccessor = field(default_factory=lambda: LocalAccessor(1, Dp.UINT8_T, 0, 1, 1))

    @property
    def has_local(self) -> bool:
        """Whether the last argument is dynamic local memory."""
        return bool(self.places) and self.places[-1] == "local"

    def prepare(self, sizes: tuple[int, ...]) -> None:
        """Room for the arguments of a launch; negative sizes are pointers."""
        count = len(sizes) + self.has_local
        types = [
            Dp.VOID_PTR if size < 0 else _NUMBERS.get(size, Dp.RAW_KERNEL_ARG) for size in sizes
        ]
        types += [Dp.LOCAL_ACCESSOR] * self.has_local
        self.table = (ctypes.c_void_p * max(1, count))()
        self.types = (ctypes.c_int * max(1, count))(*types)
        if self.has_local:
            self.table[count - 1] = ctypes.addressof(self.local)
        self.sizes = sizes


@dataclass
class Program:
    """Code that was compiled here, for all modules that were loaded from it."""

    bundle: int
    told: dict[str, Any]
    """Facts of each kernel by its name, as the child told them."""
    kernels: dict[str, int] = field(default_factory=dict)
    users: int = 0


class Programs:
    """What one backend has loaded."""

    def __init__(self, context: Context, streams: Streams, found: Found) -> None:
        self._context, self._api, self._streams = context, context.api, streams
        self._found = found
        self._lock = threading.RLock()
        self._programs: dict[str, Program] = {}
        """By what was compiled, the first first."""
        self._modules: dict[int, Program] = {}
        self._numbers = itertools.count(1)
        self._functions: dict[int, Function] = {}

    # -- modules ---------------------------------------------------------------------------------

    def load(self, code: bytes, form: str) -> int:
        self._context.check("module_load")
        if form not in ("cl", "spirv"):
            raise self._context.unsupported(
                "module_load", f"a SYCL device takes cl and spirv, not {form!r}"
            )
        if form == "spirv" and not self._found.text(Cl.DEVICE_IL_VERSION):
            raise self._context.unsupported("module_load", "its platform takes no SPIR-V")
        options = opencl_compile.options(self._found, code) if form == "cl" else []
        key = opencl_compile.key(self._found, "sycl arguments", code, form, options)
        with self._lock:
            program = self._programs.get(key)
        if program is None:
            program = self._program(key, code, form, options)
        with self._lock:
            program = self._programs.setdefault(key, program)
            program.users += 1
            module = next(self._numbers)
            self._modules[module] = program
        return module

    def _program(self, key: str, code: bytes, form: str, options: list[str]) -> Program:
        known = cache().get(key)
        if known is None:
            known = self._in_child(code, form, options)
            cache().put(key, known)
        bundle = self._built(code, form, " ".join(options))
        return Program(bundle, json.loads(known.code))

    def _in_child(self, code: bytes, form: str, options: list[str]) -> Compiled:
        made = opencl_compile.compiled(self._found, code, form, options, kernels=True)
        if made.hung:
            raise self._not_compiled(made.hung, code="compiler")
        if made.unusable:
            raise self._context.error("compiler", "module_load", made.unusable)
        if made.status:
            words = logs.first_error(made.log) or f"{made.op} failed: {name_of(made.status)}"
            raise self._not_compiled(words, log=made.log, status=made.status)
        return Compiled("json", json.dumps(made.kernels).encode(), {}, made.log)

    def _built(self, code: bytes, form: str, options: str) -> int:
        api, context = self._api, self._context
        if form == "cl":
            module = api.DPCTLKernelBundle_CreateFromOCLSource(
                context.handle, context.device, code, options.encode()
            )
        else:
            module = api.DPCTLKernelBundle_CreateFromSpirv(
                context.handle, context.device, code, len(code), options.encode()
            )
        if not module:
            raise self._not_compiled(
                "OpenCL's compiler took it, SYCL's call of the same did not and tells no reason",
                code="compiler",
            )
        return int(module)

    def _not_compiled(
        self, message: str, *, log: str = "", status: int = 0, code: str = "compile"
    ) -> CompileError:
        return CompileError(
            message,
            log=log or message,
            code=code,
            driver=NAME,
            native=status,
            native_name=name_of(status) if status else "",
            op="module_load",
            device=self._context.address,
        )

    def unload(self, module: int) -> None:
        with self._lock:
            self._modules.pop(module).users -= 1
            idle = [key for key, program in self._programs.items() if not program.users]
            for key in idle[:-_MOST_IDLE]:
                self._delete(self._programs.pop(key))

    def _delete(self, program: Program) -> None:
        for handle in program.kernels.values():
            del self._functions[handle]
            self._api.DPCTLKernel_Delete(handle)
        self._api.DPCTLKernelBundle_Delete(program.bundle)

    # -- kernels ---------------------------------------------------------------------------------

    def function(self, module: int, symbol: str) -> int:
        with self._lock:
            program = self._modules[module]
            known = program.kernels.get(symbol)
            if known is not None:
                return known
            told = program.told.get(symbol)
            handle = 0
            if told is not None:
                handle = self._api.DPCTLKernelBundle_GetKernel(program.bundle, symbol.encode())
            if told is None or not handle:
                raise self._context.error(
                    "no_such_kernel", "function", f"the program has no {symbol!r}"
                )
            facts = FunctionFacts(
                threads=self._api.DPCTLKernel_GetWorkGroupSize(handle),
                shared_bytes=told["shared_bytes"],
                local_bytes=self._api.DPCTLKernel_GetPrivateMemSize(handle),
            )
            self._functions[handle] = Function(handle, told["arguments"], facts)
            program.kernels[symbol] = handle
            return int(handle)

    def arguments(self, function: int, sizes: Sequence[int]) -> None:
        """Raises HalError when the kernel has other arguments."""
        known = self._functions[function]
        wanted = len(known.places) - known.has_local
        if len(sizes) != wanted:
            raise self._wrong(
                f"{len(sizes)} arguments were given; the kernel has {wanted}"
                + (" and dynamic local memory" if known.has_local else "")
            )
        for index, (size, place) in enumerate(zip(sizes, known.places, strict=False)):
            if place and (size < 0) != (place in ("global", "constant")):
                kind = "a pointer" if size < 0 else f"{size} bytes"
                raise self._wrong(
                    f"argument {index} was given as {kind}; the kernel takes {place} memory there"
                    if place != "private"
                    else f"argument {index} was given as {kind}; the kernel takes a value there"
                )
            if size >= 0 and size not in _NUMBERS and not self._api.takes_structures:
                raise self._context.unsupported(
                    "function_arguments",
                    f"argument {index} is a structure, which this dpctl does not take: install a "
                    "newer one",
                )
        with known.lock:
            known.prepare(tuple(sizes))

    def _wrong(self, message: str) -> Exception:
        return self._context.error("wrong_arguments", "function_arguments", message)

    def facts(self, function: int) -> FunctionFacts:
        return self._functions[function].facts

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
        known, api = self._functions[function], self._api
        given = (ctypes.c_void_p * len(sizes)).from_address(arguments) if sizes else ()
        whole = [g * b for g, b in zip(grid, block, strict=True)]
        if whole[0] * whole[1] * whole[2] > _MOST_THREADS:
            raise self._context.error(
                "launch_resources",
                "launch",
                f"{whole} threads are more than the {_MOST_THREADS} of a launch: take fewer blocks",
            )
        dims = max(axis + 1 for axis in range(3) if whole[axis] > 1 or axis == 0)
        # SYCL counts dimensions from the slowest.
        range_ = (ctypes.c_size_t * 3)(*reversed(whole[:dims]))
        local = (ctypes.c_size_t * 3)(*reversed(block[:dims]))
        with known.lock:
            if known.sizes != tuple(sizes):
                known.prepare(tuple(sizes))
            raw = []
            try:
                for index, (size, where) in enumerate(zip(sizes, given, strict=True)):
                    if size < 0:
                        known.table[index] = ctypes.c_uint64.from_address(where or 0).value or None
                    elif size in _NUMBERS:
                        known.table[index] = where
                    else:
                        known.table[index] = api.DPCTLRawKernelArg_Create(where, size)
                        raw.append(known.table[index])
                known.local.dim0 = max(shared, _LOCAL_BYTES)
                self._streams.launch(
                    *(stream, known.handle, known.table, known.types),
                    *(len(sizes) + known.has_local, range_, local, dims, None, 0),
                    what="SYCL tells no reason; look at the sizes of the arguments, the threads "
                    "and the shared memory of a block",
                )
            finally:
                for argument in raw:
                    api.DPCTLRawKernelArg_Delete(argument)

    # -- end -------------------------------------------------------------------------------------

    def close(self) -> None:
        for program in self._programs.values():
            self._delete(program)
        self._programs, self._modules = {}, {}
