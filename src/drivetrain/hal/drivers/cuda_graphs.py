"""Work captured from a stream into a graph, launched again, with changeable kernels."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass

from drivetrain.errors import HalError
from drivetrain.hal.drivers.cuda_api import Code, Cu
from drivetrain.hal.drivers.cuda_context import STICKY, Context
from drivetrain.hal.drivers.giving_back import GivingBack


@dataclass(frozen=True)
class Captured:
    """A graph that can be launched. The template lives on: its nodes are named by it."""

    template: int
    kernels: tuple[int, ...]
    """Nodes of the kernels of this backend, in the order noted."""


def order(nodes: Sequence[int], edges: Iterable[tuple[int, int]]) -> list[int]:
    """The nodes so that each comes after all that it depends on, and among those that may come
    next, the one that stands first in ``nodes``. What one stream noted is a chain, which has one
    order only."""
    after: dict[int, list[int]] = {node: [] for node in nodes}
    missing = dict.fromkeys(nodes, 0)
    for one, other in edges:
        after[one].append(other)
        missing[other] += 1
    rank = {node: index for index, node in enumerate(nodes)}
    free = sorted((node for node in nodes if not missing[node]), key=lambda n: -rank[n])
    found: list[int] = []
    while free:
        node = free.pop()
        found.append(node)
        for other in after[node]:
            missing[other] -= 1
            if not missing[other]:
                free.append(other)
                free.sort(key=lambda n: -rank[n])
    return found


class Graphs:
    """The graphs of one backend.

    Capture is ``RELAXED``: any thread may end it, and what the finaliser of a forgotten buffer
    asks of the driver meanwhile does not break it.
    """

    def __init__(
        self,
        context: Context,
        functions: Container[int],
        ended: Callable[[], None],
    ) -> None:
        self._context = context
        self._api = context.api
        self._functions = functions
        self._ended = ended
        self._lock = threading.Lock()
        self._graphs: dict[int, Captured] = {}
        instantiate = context.api.symbols.get("cuGraphInstantiate", "")
        self._with_flags = instantiate.endswith("WithFlags")

    def begin(self, stream: int) -> None:
        context = self._context
        context.check_capture(stream, "graph_begin")
        context.call(self._api.cuStreamBeginCapture, stream, Cu.STREAM_CAPTURE_MODE_RELAXED)
        context.captures.add(stream)

    def end(self, stream: int) -> int:
        context, api = self._context, self._api
        if stream not in context.captures:
            raise context.error("not_capturing", "graph_end", "no capture was begun on the stream")
        box = ctypes.c_void_p()
        try:
            code = context.code(api.cuStreamEndCapture, stream, ctypes.byref(box))
            if code in STICKY:
                raise context.failure(api.cuStreamEndCapture.__name__, code)
            if code and not context.lost and context.capturing(stream):  # it ended nothing
                context.code(api.cuStreamEndCapture, stream, ctypes.byref(box))
        finally:
            context.captures.discard(stream)
            if not context.lost:
                self._ended()
        template = int(box.value or 0)
        if code or not template:
            if template:
                context.call(api.cuGraphDestroy, template)
            if code:
                raise context.failure(
                    api.cuStreamEndCapture.__name__, code, what="the stream is usable again"
                )
            raise context.error("capturing", "graph_end", "the driver made no graph of the capture")
        handle = 0
        try:
            handle = self._instantiate(template)
            graph = Captured(template, self._kernels(template))
        except HalError:
            if not context.lost:
                if handle:
                    context.call(api.cuGraphExecDestroy, handle)
                context.call(api.cuGraphDestroy, template)
            raise
        with self._lock:
            self._graphs[handle] = graph
        return handle

    def _instantiate(self, template: int) -> int:
        context, api = self._context, self._api
        box = ctypes.c_void_p()
        if self._with_flags:
            context.call(api.cuGraphInstantiate, ctypes.byref(box), template, 0)
            return int(box.value or 0)
        log, node = ctypes.create_string_buffer(4096), ctypes.c_void_p()
        code = context.code(
            api.cuGraphInstantiate, ctypes.byref(box), template, ctypes.byref(node), log, len(log)
        )
        if code:
            words = log.value.decode(errors="replace").strip()
            raise context.failure(api.cuGraphInstantiate.__name__, code, what=words)
        return int(box.value or 0)

    def _kernels(self, template: int) -> tuple[int, ...]:
        """Launches of kernels that this backend loaded. Others (a library's, on the same stream)
        are not counted: nobody here knows their arguments."""
        context, api = self._context, self._api
        found = []
        for node in order(self._nodes(template), self._edges(template)):
            kind = ctypes.c_int()
            context.call(api.cuGraphNodeGetType, node, ctypes.byref(kind))
            if kind.value != Cu.GRAPH_NODE_TYPE_KERNEL:
                continue
            facts = api.kernel_node()
            code = context.code(api.cuGraphKernelNodeGetParams, node, ctypes.byref(facts))
            if code == Code.ERROR_OUT_OF_MEMORY or code in STICKY:
                raise context.failure(api.cuGraphKernelNodeGetParams.__name__, code)
            if code == Code.SUCCESS and facts.func in self._functions:
                found.append(node)
        return tuple(found)

    def _nodes(self, template: int) -> list[int]:
        count = ctypes.c_size_t()
        call, function = self._context.call, self._api.cuGraphGetNodes
        call(function, template, None, ctypes.byref(count))
        nodes = (ctypes.c_void_p * count.value)()
        if count.value:
            call(function, template, nodes, ctypes.byref(count))
        return [int(node or 0) for node in nodes]

    def _edges(self, template: int) -> list[tuple[int, int]]:
        count = ctypes.c_size_t()
        function = self._api.cuGraphGetEdges
        code = self._context.code(function, template, None, None, ctypes.byref(count))
        if code == Code.ERROR_LOSSY_QUERY:  # edges of newer kinds, which only libraries make
            return []
        if code:
            raise self._context.failure(function.__name__, code)
        if not count.value:
            return []
        one, other = (ctypes.c_void_p * count.value)(), (ctypes.c_void_p * count.value)()
        code = self._context.code(function, template, one, other, ctypes.byref(count))
        if code == Code.ERROR_LOSSY_QUERY:
            return []
        if code:
            raise self._context.failure(function.__name__, code)
        return [(int(a or 0), int(b or 0)) for a, b in zip(one, other, strict=True)]

    def launch(self, graph: int, stream: int) -> None:
        self._context.call(self._api.cuGraphLaunch, graph, stream)

    def destroy(self, graph: int) -> None:
        with self._lock:
            captured = self._graphs.pop(graph, None)
        if captured is None:
            raise self._context.error("no_such_graph", "graph_destroy", f"no graph {graph:#x}")
        try:
            self._context.call(self._api.cuGraphExecDestroy, graph)
        finally:
            if not self._context.lost:
                self._context.call(self._api.cuGraphDestroy, captured.template)

    def set(
        self,
        graph: int,
        node: int,
        function: int,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared: int,
        arguments: int,
        sizes: Sequence[int],
    ) -> None:
        captured = self._graphs.get(graph)
        if captured is None or not 0 <= node < len(captured.kernels):
            count = len(captured.kernels) if captured is not None else 0
            raise self._context.error(
                "no_such_node", "graph_set", f"the graph has {count} kernel launches, no {node}"
            )
        facts = self._api.kernel_node(function, grid, block, shared, arguments)
        self._context.call(
            self._api.cuGraphExecKernelNodeSetParams,
            graph,
            captured.kernels[node],
            ctypes.byref(facts),
        )

    def give_up_captures(self) -> None:
        """End the captures that nobody ended: nothing can be waited for while one goes on."""
        for stream in list(self._context.captures):
            try:
                self.destroy(self.end(stream))
            except HalError:  # broken: its stream is usable again
                pass

    def close(self) -> None:
        give = GivingBack()
        for graph in list(self._graphs):
            give(self.destroy, graph)
        give.end()
