"""Running an operation of the device on the CPU.

Views are torch's own: they touch no elements, so the CPU's kernel makes them of the device's
tensor. Everything else is run on the tensors' host form (an alias where the host sees the memory,
a copy elsewhere), and what came out becomes a tensor of the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from drivetrain.pytorch.custom.alias import label, on_host, plain_on_host, relabelled
from drivetrain.pytorch.custom.memory import CPU_KEYS, Shared, set_to
from drivetrain.pytorch.custom.runtime import Runtime
from drivetrain.pytorch.custom.schema import Plan, argument_at, plan_of

_CPU = torch.device("cpu")
_NUMBERS = frozenset((int, float, bool, complex))
"""What a tensor without dimensions is given as where it came from Python."""


def view_of(op: Any) -> Callable[..., Any]:
    """The CPU's kernel of a view, for tensors of the device: it moves no elements."""
    view: Callable[..., Any] = partial(op._handle.redispatch_boxed, CPU_KEYS)
    return view


def run_on_cpu(
    runtime: Runtime, op: Any, args: Any, kwargs: dict[str, Any], reason: str = "no kernel"
) -> Any:
    """The operation's result, as tensors of the device. Raises RuntimeError for tensors of several
    devices, Unsupported when the policy says so, and what the operation raises."""
    plan = plan_of(op)
    if plan.is_view and not plan.written:
        return op._handle.redispatch_boxed(CPU_KEYS, *args, **kwargs)
    return _Trip(runtime, plan, args, kwargs).run(reason)


def called(plan: Plan, args: Any, kwargs: dict[str, Any]) -> Any:
    """The overload on tensors of the CPU. Where a number stands for a tensor, which only some
    overloads take, another overload of the operation does."""
    numbers = [i for i, each in enumerate(args) if each.__class__ in _NUMBERS and plan.tensors[i]]
    if not numbers:
        return plan.op(*args, **kwargs)
    for run in (plan.op, plan.op.overloadpacket):
        try:
            return run(*args, **kwargs)
        except (RuntimeError, TypeError) as error:
            if "Expected a value of type" not in str(error):
                raise
    given = list(args)
    for position in numbers:
        value = given[position]
        kind = torch.get_default_dtype() if isinstance(value, float) else None
        given[position] = torch.tensor(value, dtype=kind, device=_CPU)
    return plan.op(*given, **kwargs)


class _Trip:
    """One operation, to the CPU and back."""

    def __init__(self, runtime: Runtime, plan: Plan, args: Any, kwargs: dict[str, Any]) -> None:
        self.runtime, self.plan, self.args, self.kwargs = runtime, plan, args, kwargs
        self.ours: list[Tensor] = []
        self.device: torch.device | None = None
        self.generators: list[tuple[torch.Generator, torch.Generator]] = []
        self.foreign: Tensor | None = None
        self._collect((args, tuple(kwargs.values())))
        index = None if self.device is None else self.device.index
        self.memory = runtime.memories[runtime.current if index is None else runtime.checked(index)]

    def _collect(self, value: Any) -> None:
        """Note the tensors of the device, and one that is elsewhere."""
        if isinstance(value, Tensor):
            if not self.runtime.is_here(value):
                if value.dim() and not self.plan.mixes:
                    self.foreign = value
                return
            if self.ours and value.device != self.device:
                self.foreign = value
            self.device = value.device
            self.ours.append(value)
        elif isinstance(value, torch.device) and value.type == self.runtime.name:
            self.device = self.device or value
        elif isinstance(value, (list, tuple)):
            for each in value:
                self._collect(each)

    def run(self, reason: str) -> Any:
        if self.ours and self.foreign is not None:
            raise RuntimeError(
                f"{self.plan.name} was given tensors on {self.ours[0].device} and on "
                f"{self.foreign.device}: expected all tensors to be on the same device. Move one "
                "of them with .to()"
            )
        self.runtime.fallbacks.note(self.plan.name, reason)
        hosts = self.memory.on_host(self.ours)
        self.known = {id(ours): host for ours, host in zip(self.ours, hosts, strict=True)}
        args = [self._host(each) for each in self.args]
        kwargs = {name: self._host(value) for name, value in self.kwargs.items()}
        self._no_memory_yet(kwargs)
        with self._randomness(args, kwargs):
            out = self._call(args, kwargs)
        self._hand_back(args, kwargs)
        return self._result(out)

    def _host(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.known.get(id(value), value)
        if type(value) in (list, tuple):
            return type(value)(self._host(each) for each in value)
        if isinstance(value, torch.device) and value.type == self.runtime.name:
            return _CPU
        if isinstance(value, torch.Generator) and value.device.type == self.runtime.name:
            host = torch.Generator("cpu")
            host.set_state(value.get_state())
            self.generators.append((value, host))
            return host
        return value

    def _no_memory_yet(self, kwargs: dict[str, Any]) -> None:
        """An empty ``out`` has no memory to be written to: give a tensor that can grow."""
        for _, name in self.plan.written:
            out = kwargs.get(name)
            if isinstance(out, Tensor) and not out.numel():
                kwargs[name] = torch.empty(0, dtype=out.dtype, device=_CPU)

    @contextlib.contextmanager
    def _randomness(self, args: list[Any], kwargs: dict[str, Any]) -> Iterator[None]:
        """Numbers come from the device's own generator."""
        if not self.plan.random and not self.plan.generator:
            yield
            return
        own = self.runtime.generators[self.memory.index]
        with self.runtime.random:
            given = any(isinstance(each, torch.Generator) for each in (*args, *kwargs.values()))
            if given:
                yield
                for theirs, host in self.generators:
                    theirs.set_state(host.get_state())
            elif own.device.type == "cpu" and self.plan.generator:
                kwargs["generator"] = own
                yield
            else:
                before = torch.default_generator.get_state()
                torch.default_generator.set_state(own.get_state())
                try:
                    yield
                    own.set_state(torch.default_generator.get_state())
                finally:
                    torch.default_generator.set_state(before)

    def _call(self, args: list[Any], kwargs: dict[str, Any]) -> Any:
        try:
            return called(self.plan, args, kwargs)
        except RuntimeError as error:
            if "not resizable" not in str(error) or not self.plan.written:
                raise
        # An alias cannot grow. What ``out`` held is of no interest.
        for position, name in self.plan.written:
            held = argument_at((position, name), args, kwargs)
            if isinstance(held, Tensor):
                fresh = torch.empty(0, dtype=held.dtype, device=_CPU)
                if position < len(args):
                    args[position] = fresh
                else:
                    kwargs[name] = fresh
        return called(self.plan, args, kwargs)

    def _hand_back(self, args: list[Any], kwargs: dict[str, Any]) -> None:
        """What the CPU wrote, to the device; arguments that grew or moved there as well."""
        written: list[Tensor] = []
        hosts: list[Tensor] = []
        for place in self.plan.written:
            ours = argument_at(place, self.args, self.kwargs)
            host = argument_at(place, args, kwargs)
            several = isinstance(ours, (list, tuple))
            for one, its in zip(ours, host, strict=True) if several else ((ours, host),):
                if not isinstance(one, Tensor) or not self.runtime.is_here(one):
                    continue
                if one.shape == its.shape and self.known.get(id(one)) is not its:
                    self._copy_into(one, its)
                elif one.shape != its.shape or one.stride() != its.stride():
                    made = self.memory.from_host(its)
                    storage, offset = made.untyped_storage(), int(made.storage_offset())
                    set_to(one, storage, offset, made.shape, made.stride())
                else:
                    written.append(one)
                    hosts.append(its)
        if written:
            self.memory.written(written, hosts)

    def _copy_into(self, ours: Tensor, host: Tensor) -> None:
        (inside,) = self.memory.on_host([ours])
        inside.copy_(host)
        self.memory.written([ours], [inside])

    def _result(self, out: Any) -> Any:
        returns = self.plan.returns
        if not returns:
            return None
        if len(returns) == 1:
            (place,) = returns
            return self._device(out) if place is None else self._argument(place)
        return tuple(
            self._device(each) if place is None else self._argument(place)
            for place, each in zip(returns, out, strict=True)
        )

    def _argument(self, place: tuple[int, str]) -> Any:
        return argument_at(place, self.args, self.kwargs)

    def _device(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.memory.from_host(value) if value.device.type == "cpu" else value
        if isinstance(value, (list, tuple)):
            return type(value)(self._device(each) for each in value)
        return value


def kernel_on_cpu(runtime: Runtime, op: Any) -> Callable[..., Any]:
    """What is registered for an operation that the backend has no kernel for."""
    plan = plan_of(op)
    general = partial(run_on_cpu, runtime, op)
    simple = all(type(each) is Shared for each in runtime.memories)
    if not plan.plain or not simple:
        return lambda *args, **kwargs: general(args, kwargs)
    return _short_way(runtime, plan, general)


def boxed(runtime: Runtime) -> Callable[..., Any]:
    """The same for all operations that nothing is registered for: ``(op, *args)``."""
    known: dict[Any, Callable[..., Any]] = {}

    def run(op: Any, *args: Any, **kwargs: Any) -> Any:
        kernel = known.get(op)
        if kernel is None:
            kernel = known[op] = kernel_on_cpu(runtime, op)
        return kernel(*args, **kwargs)

    return run


def _short_way(
    runtime: Runtime, plan: Plan, general: Callable[[Any, dict[str, Any]], Any]
) -> Callable[..., Any]:
    """The same for tensors in and new tensors out, in memory of the host: no detours, since a small
    operation takes no longer than its way here."""
    call = partial(plan.op._handle.redispatch_boxed, CPU_KEYS)
    table = runtime.fallbacks
    counts, accepted, name = table.counts, table.accepted, plan.name
    native = runtime.shim
    if native is None:
        host_of = on_host if plan.bits else plain_on_host
        device_of, places = relabelled, [label(index) for index in range(runtime.count)]
    else:
        host_of, device_of, places = native.host, native.device, list(range(runtime.count))
    several = len(plan.returns) > 1
    tensors = plan.tensors

    def with_numbers(*args: Any, **kwargs: Any) -> Any:
        return called(plan, args, kwargs)

    def pair(first: Any, second: Any, *rest: Any, **kwargs: Any) -> Any:
        """The commonest case without a loop: two tensors of the device in, one out."""
        if (
            rest
            or kwargs
            or name not in accepted
            or first.__class__ is not Tensor
            or second.__class__ is not Tensor
        ):
            return kernel(first, second, *rest, **kwargs)
        index = first.get_device()
        if index < 0 or second.get_device() != index:
            return kernel(first, second)
        counts[name] += 1
        return device_of(call(host_of(first), host_of(second)), places[index])

    def kernel(*args: Any, **kwargs: Any) -> Any:
        hosts: list[Any] = []
        run: Callable[..., Any] = call
        index = -1
        for each in args:
            if isinstance(each, Tensor):
                its = each.get_device()
                if its < 0:  # of the CPU, or without data
                    if each.dim() or not each.is_cpu:
                        return general(args, kwargs)
                    hosts.append(each)
                else:
                    if its != index:
                        if index >= 0:
                            return general(args, kwargs)
                        index = its
                    hosts.append(host_of(each))
            else:
                hosts.append(each)
                if each.__class__ in _NUMBERS and tensors[len(hosts) - 1]:
                    run = with_numbers
        if index < 0 or any(isinstance(value, Tensor) for value in kwargs.values()):
            return general(args, kwargs)
        if name in accepted:
            counts[name] += 1
        else:
            table.note(name)
        out = run(*hosts, **kwargs)
        here = places[index]
        if several:
            return tuple(None if each is None else device_of(each, here) for each in out)
        return device_of(out, here)

    needed = [
        argument for argument in plan.op._schema.arguments if not argument.has_default_value()
    ]
    of_two = plan.tensors[:2] == (True, True) and len(needed) == 2 and not several
    return pair if of_two else kernel
