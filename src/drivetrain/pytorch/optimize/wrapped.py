"""A model and what was chosen for it: contexts, casts, a compiled or a captured call."""

from __future__ import annotations

import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map_only

from drivetrain.errors import BadInput

__all__ = ["Build", "Tuned"]

GRAPHS = 8
"""Shapes for which a captured call is kept; the least recently used goes first."""

Context = Callable[[], AbstractContextManager[Any]]


@dataclass
class Build:
    """A candidate in the making; the steps of a plan change it one after the other."""

    module: nn.Module
    """A copy on the device, which a step may change or replace."""
    optimizer: Optimizer | None = None
    contexts: list[Context] = field(default_factory=list)
    """Entered around each forward."""
    inputs: list[Callable[[Tensor], Tensor]] = field(default_factory=list)
    """What each tensor that goes in passes."""
    output_dtype: torch.dtype | None = None
    """Floating results of another type are cast to it."""
    compile: dict[str, Any] | None = None
    """Arguments of ``torch.compile``."""
    graphed: bool = False

    def tuned(self) -> Tuned:
        return Tuned(self)


class Tuned(nn.Module):
    """The model that `optimize` returns. ``module`` is the model inside.

    A call takes and gives what the original's call did. What it needs of torch's global switches is
    set for the length of the call and put back. Results are the caller's own: no later call
    overwrites them.
    """

    def __init__(self, build: Build) -> None:
        super().__init__()
        self.module = build.module
        self.training = build.module.training
        self._for_training = build.module.training
        self._contexts = tuple(build.contexts)
        self._inputs = tuple(build.inputs)
        self._output_dtype = build.output_dtype
        self._call: Callable[..., Any] = self._whole
        overwritten = False
        if build.compile is not None:
            self._call = _compiled(self._whole, build.compile)
            overwritten = build.compile.get("mode") in ("reduce-overhead", "max-autotune")
        elif build.graphed:
            self._call = _Captured(self._whole)
        device = next((p.device.type for p in build.module.parameters()), "cpu")
        self._overwritten = overwritten and device != "cpu"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self._contexts:
            found = self._call(*args, **kwargs)
        else:
            with ExitStack() as stack:
                for make in self._contexts:
                    stack.enter_context(make())
                found = self._call(*args, **kwargs)
        if self._overwritten:  # a graph writes to the same memory each time
            return tree_map_only(Tensor, torch.clone, found)
        return found

    def _whole(self, *args: Any, **kwargs: Any) -> Any:
        for change in self._inputs:
            args, kwargs = tree_map_only(Tensor, change, (args, kwargs))
        found = self.module(*args, **kwargs)
        dtype = self._output_dtype
        if dtype is None:
            return found
        return tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, found)

    def train(self, mode: bool = True) -> Tuned:
        """Raises BadInput for training a model that was optimised for inference: its layers may
        have been folded into one another."""
        if mode and not self._for_training:
            raise BadInput(
                "this model was optimised for inference; train the one you gave to optimize, or "
                "optimise it after model.train()"
            )
        super().train(mode)
        return self


def _compiled(call: Callable[..., Any], arguments: dict[str, Any]) -> Callable[..., Any]:
    """``torch.compile`` of a function of its own, so that candidates share no recompile limit."""
    code = _frame.__code__.replace(co_name="tuned_forward")
    fresh = FunctionType(code, _frame.__globals__, "tuned_forward", None, _cells(call))
    more = {"isolate_recompiles": True} if _isolates() else {}
    compile_: Any = torch.compile
    made: Callable[..., Any] = compile_(fresh, **more, **arguments)
    return made


def _outer(call: Callable[..., Any]) -> Callable[..., Any]:
    def frame(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    return frame


_frame: Any = _outer(lambda: None)


def _cells(call: Callable[..., Any]) -> Any:
    made: Any = _outer(call)
    return made.__closure__


def _isolates() -> bool:
    return "isolate_recompiles" in inspect.signature(torch.compile).parameters


class _Captured:
    """Calls captured as CUDA graphs, one for each shape of the inputs; inference only.

    A call that cannot be replayed (gradients are wanted, arguments that are no tensors of this
    device) is made as usual.
    """

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call
        self._lock = threading.Lock()
        self._graphs: OrderedDict[Any, tuple[Any, list[Tensor], Any]] = OrderedDict()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        plain = all(isinstance(leaf, (Tensor, int, float, str, type(None))) for leaf in leaves)
        usual = torch.is_grad_enabled() or not plain or not tensors
        if usual or not all(t.is_cuda for t in tensors):
            return self._call(*args, **kwargs)
        key = tuple(
            (leaf.shape, leaf.stride(), leaf.dtype, leaf.device)
            if isinstance(leaf, Tensor)
            else (type(leaf), leaf)
            for leaf in leaves
        ) + tuple(kwargs)
        with self._lock:
            known = self._graphs.get(key)
            if known is None:
                known = self._graphs[key] = self._capture(args, kwargs)
                if len(self._graphs) > GRAPHS:
                    self._graphs.popitem(last=False)
            self._graphs.move_to_end(key)
            graph, static, out = known
            for place, given in zip(static, tensors, strict=True):
                place.copy_(given)
            graph.replay()
            return tree_map_only(Tensor, torch.clone, out)

    def _capture(self, args: Any, kwargs: Any) -> tuple[Any, list[Tensor], Any]:
        args, kwargs = tree_map_only(Tensor, torch.clone, (args, kwargs))
        static = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        aside: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):  # libraries choose their algorithms and workspaces here
                self._call(*args, **kwargs)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # What is cached across calls must live in the graph's own pool: weights cast by autocast
        # outside of it, or a workspace of cuBLAS, would be freed by others and used by its replays
        # (torch.compile's graphs clear the workspaces too, when they are recorded).
        _forget_caches()
        with torch.cuda.graph(graph):
            out = self._call(*args, **kwargs)
        _forget_caches()
        return graph, static, out


def _forget_caches() -> None:
    torch.clear_autocast_cache()
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if clear is not None:
        clear()
