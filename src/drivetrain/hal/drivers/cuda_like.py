"""What a device does alike whether it is open through CUDA's driver API or through HIP: the parts
that answer for themselves, modules, functions, launches, peers, the end."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from drivetrain.errors import CompileError, HalError
from drivetrain.hal.driver import Backend, FunctionFacts, Limits, Target
from drivetrain.hal.drivers.cuda_api import Api, Code, Cu
from drivetrain.hal.drivers.cuda_context import Context
from drivetrain.hal.drivers.cuda_graphs import Graphs
from drivetrain.hal.drivers.cuda_memory import Memory
from drivetrain.hal.drivers.cuda_streams import Streams
from drivetrain.hal.drivers.giving_back import GivingBack

__all__ = ["CudaLike", "address_of"]

_CLOSE_WAIT_S = 5.0


def address_of(function: Any) -> int:
    return int(ctypes.cast(function, ctypes.c_void_p).value or 0)


class CudaLike:
    """The common part of a `drivetrain.hal.driver.Backend`."""

    groups: frozenset[str]
    alignment: int
    limits: Limits
    target: Target
    _api: Api

    def __init__(self, context: Context) -> None:
        self.address = context.address
        self._context = context
        self._modules: dict[int, list[int]] = {}
        self._functions: set[int] = set()
        try:
            self._describe()
            self._streams = streams = Streams(context)
            self._memory = memory = self._memory_of(context)
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
        """Sets ``groups``, ``alignment``, ``limits`` and ``target``."""
        raise NotImplementedError

    def _memory_of(self, context: Context) -> Memory:
        raise NotImplementedError

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
        """Call a function of a library that works in the current context, or on the selected
        device, as the vendor's BLAS does."""
        return self._context.code(function, *arguments)

    # -- group compute ---------------------------------------------------------------------------

    def _not_taken(
        self, message: str, *, log: str = "", native: int = 0, native_name: str = ""
    ) -> CompileError:
        return CompileError(
            message,
            log=log or message,
            code="not_taken",
            driver=self._api.driver,
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
        self._prepare(function)
        self._modules.setdefault(module, []).append(function)
        self._functions.add(function)
        return function

    def _prepare(self, function: int) -> None:
        """What a function needs before its first launch."""

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

    # -- group peer ------------------------------------------------------------------------------

    def peer_enable(self, other: Backend) -> bool:
        if not isinstance(other, type(self)):
            return False
        if other is self:
            return True
        context, api, far = self._context, self._api, other._context
        able = ctypes.c_int()
        context.call(api.cuDeviceCanAccessPeer, ctypes.byref(able), context.device, far.device)
        if not able.value:
            return False
        enable, peer = self._peer_access(far)
        code = context.code(enable, peer, 0)
        if code in (Code.ERROR_PEER_ACCESS_UNSUPPORTED, Code.ERROR_TOO_MANY_PEERS):
            return False
        if code not in (Code.SUCCESS, Code.ERROR_PEER_ACCESS_ALREADY_ENABLED):
            raise context.failure(enable.__name__, code, what=other.address)
        other._memory.share_with(context.device)
        return True

    def _peer_access(self, far: Context) -> tuple[Any, int]:
        """The function that lets this device read another's memory, and what it names that by."""
        raise NotImplementedError

    def _foreign(self, other: Backend) -> HalError:
        return self._context.error("invalid", "copy_peer", f"{other!r} is no device of this driver")
