"""Programs of an OpenCL device: compiled in a child process, kept on disk, loaded as binaries.

A platform's compiler may hang or crash, so it runs in a process of its own first, and what it made
is loaded here. Where a platform gives no binary, or does not take its own back, it compiles once
more in this process: by then it has shown that it survives it.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from drivetrain.errors import CompileError, HalError
from drivetrain.hal.driver import FunctionFacts
from drivetrain.hal.drivers import opencl_build, opencl_compile
from drivetrain.hal.drivers.opencl_api import NAME, Cl, Code, name_of
from drivetrain.hal.drivers.opencl_context import Context
from drivetrain.hal.drivers.opencl_heaps import Heap
from drivetrain.hal.drivers.opencl_platforms import answer, number_of
from drivetrain.hal.language import logs
from drivetrain.hal.language.cache import cache
from drivetrain.hal.language.facts import Compiled

_LOCAL_BYTES = 16
"""Of a dynamic ``__local`` argument that no launch has asked a size for."""


@dataclass
class Function:
    """A kernel, and a second one of the same for launches from Python: arguments lie in the kernel,
    and C sets those of the first without asking anybody."""

    handle: int
    twin: int
    arguments: int
    local: bool
    """Whether the last argument is dynamic local memory."""
    facts: FunctionFacts
    """As they were before any local memory was asked for, which OpenCL counts too."""
    lock: threading.Lock = field(default_factory=threading.Lock)


class Programs:
    """What one backend has loaded."""

    def __init__(self, context: Context, heap: Heap, *, binary_only: bool) -> None:
        self._context = context
        self._api = context.api
        self._heap = heap
        self._binary_only = binary_only
        self._lock = threading.RLock()
        self._modules: dict[int, dict[str, int]] = {}
        self._functions: dict[int, Function] = {}

    # -- modules ---------------------------------------------------------------------------------

    def load(self, code: bytes, form: str) -> int:
        if form not in ("cl", "spirv", "clbin"):
            raise self._context.unsupported(
                "module_load", f"an OpenCL device takes cl, spirv and clbin, not {form!r}"
            )
        self._context.check("module_load")
        if form == "clbin":
            program = self._from_binary(code)
        elif self._binary_only:
            raise self._context.unsupported(
                "module_load",
                "its platform has no compiler here and takes binaries only; make one with the "
                "vendor's tools (Source.binary(data, 'clbin'))",
            )
        else:
            if form == "spirv" and not self._context.found.text(Cl.DEVICE_IL_VERSION):
                raise self._context.unsupported("module_load", "its platform takes no SPIR-V")
            program = self._compiled(code, form)
        with self._lock:
            self._modules[program] = {}
        return program

    def _compiled(self, code: bytes, form: str) -> int:
        found_device = self._context.found
        options = opencl_compile.options(found_device, code) if form == "cl" else []
        key = opencl_compile.key(found_device, "opencl binary", code, form, options)
        found = cache().get(key)
        if found is None:
            found = self._in_child(code, form, options)
            cache().put(key, found)
        if found.code:
            try:
                return self._from_binary(found.code)
            except CompileError:
                pass  # it does not take back what it made itself
        return self._build(code, form, " ".join(options))

    def _in_child(self, code: bytes, form: str, options: list[str]) -> Compiled:
        made = opencl_compile.compiled(self._context.found, code, form, options)
        if made.hung:
            raise self._not_compiled(made.hung, code="compiler")
        if made.unusable:
            raise self._context.error("compiler", "module_load", made.unusable)
        if made.status:
            self._refuse(made.status, made.log, made.op)
        return Compiled("clbin", made.binary, {}, made.log)

    def _refuse(self, status: int, log: str, op: str) -> None:
        """Raises what a compiler's result stands for."""
        if status in (Code.BUILD_PROGRAM_FAILURE, Code.INVALID_PROGRAM, Code.INVALID_VALUE):
            first = logs.first_error(log) or f"{op} failed: {name_of(status)}"
            raise self._not_compiled(first, log=log, status=status)
        raise self._context.failure(op, status, what=logs.first_error(log))

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

    def _from_binary(self, code: bytes) -> int:
        try:
            return self._build(code, "clbin", "")
        except CompileError as error:
            raise self._not_compiled(
                f"{self._context.found.platform.name!r} does not take this binary for "
                f"{self._context.found.name}: {error}",
                log=error.log,
                status=error.native,
                code="not_taken",
            ) from error

    def _build(self, code: bytes, form: str, options: str) -> int:
        """A program that was built here. Raises CompileError."""
        context, api = self._context, self._api
        program, failed = opencl_build.create(api, context.found, context.handle, code, form)
        if failed or not program:
            status = failed or Code.INVALID_PROGRAM
            if status in (Code.INVALID_BINARY, Code.INVALID_VALUE, Code.INVALID_OPERATION):
                raise self._not_compiled(f"it was refused: {name_of(status)}", status=status)
            raise context.failure("clCreateProgram", status)
        failed, log = opencl_build.build(api, context.found, program, options)
        if failed:
            api.clReleaseProgram(program)
            log = opencl_compile.explained(log, code if form == "cl" else b"")
            if form == "clbin":
                words = logs.first_error(log) or name_of(failed)
                raise self._not_compiled(words, log=log, status=failed)
            self._refuse(failed, log, "clBuildProgram")
        return program

    def unload(self, module: int) -> None:
        with self._lock:
            kernels = self._modules.pop(module, {})
            functions = [self._functions.pop(handle) for handle in kernels.values()]
        for function in functions:
            for handle in (function.handle, function.twin):
                self._context.call(self._api.clReleaseKernel, handle)
        self._context.call(self._api.clReleaseProgram, module)

    # -- kernels ---------------------------------------------------------------------------------

    def function(self, module: int, symbol: str) -> int:
        with self._lock:
            known = self._modules[module].get(symbol)
            if known is not None:
                return known
            handle, twin = (self._kernel(module, symbol) for _ in range(2))
            facts = self._facts(handle)
            count = self._number(handle, Cl.KERNEL_NUM_ARGS)
            local = count > 0 and self._is_local(handle, count - 1)
            if local:
                self._context.call(self._api.clSetKernelArg, handle, count - 1, _LOCAL_BYTES, None)
            self._modules[module][symbol] = handle
            self._functions[handle] = Function(handle, twin, count, local, facts)
            return handle

    def _kernel(self, module: int, symbol: str) -> int:
        try:
            return self._context.made(self._api.clCreateKernel, module, symbol.encode())
        except HalError as error:
            if error.native != Code.INVALID_KERNEL_NAME:
                raise
            raise self._context.error(
                "no_such_kernel", "function", f"the program has no {symbol!r}"
            ) from error

    def _number(self, kernel: int, number: int) -> int:
        return number_of(answer(self._api.clGetKernelInfo, kernel, number))

    def _is_local(self, kernel: int, index: int) -> bool:
        box = ctypes.c_uint()
        code = self._context.code(
            self._api.clGetKernelArgInfo,
            *(kernel, index, Cl.KERNEL_ARG_ADDRESS_QUALIFIER),
            *(ctypes.sizeof(box), ctypes.addressof(box), None),
        )
        if code == Code.SUCCESS:
            return box.value == Cl.KERNEL_ARG_ADDRESS_LOCAL
        # A binary that does not tell: nothing but local memory has a size and no value.
        set_argument = self._api.clSetKernelArg
        return self._context.code(set_argument, kernel, index, _LOCAL_BYTES, None) == Code.SUCCESS

    def arguments(self, function: int, sizes: Sequence[int]) -> None:
        """Raises HalError when the kernel has other arguments."""
        known = self._functions[function]
        wanted = known.arguments - known.local
        if len(sizes) != wanted:
            raise self._context.error(
                "wrong_arguments",
                "function_arguments",
                f"{len(sizes)} arguments were given; the kernel has {wanted}"
                + (" and dynamic local memory" if known.local else ""),
            )
        nothing = ctypes.create_string_buffer(max([1, *map(abs, sizes)]))
        with known.lock:
            for index, size in enumerate(sizes):
                if size < 0:
                    code = self._heap.set_argument(known.twin, index, 0)
                else:
                    code = self._context.code(
                        self._api.clSetKernelArg,
                        *(known.twin, index, size, ctypes.addressof(nothing)),
                    )
                if code:
                    kind = "a pointer" if size < 0 else f"{size} bytes"
                    raise self._context.error(
                        "wrong_arguments",
                        "function_arguments",
                        f"argument {index} was given as {kind}; the kernel does not take that "
                        f"there: {name_of(code)}",
                    )

    def facts(self, function: int) -> FunctionFacts:
        return self._functions[function].facts

    def _facts(self, kernel: int) -> FunctionFacts:
        api, device = self._api, self._context.device

        def ask(handle: int, number: int, *rest: object) -> int:
            return int(api.clGetKernelWorkGroupInfo(handle, device, number, *rest))

        return FunctionFacts(
            threads=number_of(answer(ask, kernel, Cl.KERNEL_WORK_GROUP_SIZE)),
            shared_bytes=number_of(answer(ask, kernel, Cl.KERNEL_LOCAL_MEM_SIZE)),
            local_bytes=number_of(answer(ask, kernel, Cl.KERNEL_PRIVATE_MEM_SIZE)),
        )

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
        known, call, api = self._functions[function], self._context.call, self._api
        table = (ctypes.c_void_p * len(sizes)).from_address(arguments) if sizes else ()
        whole = (ctypes.c_size_t * 3)(*(g * b for g, b in zip(grid, block, strict=True)))
        local = (ctypes.c_size_t * 3)(*block)
        dims = max(1, *(axis + 1 for axis in range(3) if whole[axis] > 1 or axis == 0))
        with known.lock:
            for index, (size, where) in enumerate(zip(sizes, table, strict=True)):
                if size < 0:
                    ptr = ctypes.c_uint64.from_address(where or 0).value
                    code = self._heap.set_argument(known.twin, index, ptr)
                else:
                    code = self._context.code(api.clSetKernelArg, known.twin, index, size, where)
                if code:
                    raise self._context.failure("clSetKernelArg", code, what=f"argument {index}")
            if known.local:
                size = max(shared, _LOCAL_BYTES)
                call(api.clSetKernelArg, known.twin, known.arguments - 1, size, None)
            launch = api.clEnqueueNDRangeKernel
            call(launch, stream, known.twin, dims, None, whole, local, 0, None, None)

    # -- end -------------------------------------------------------------------------------------

    def close(self) -> None:
        for module in list(self._modules):
            self.unload(module)
