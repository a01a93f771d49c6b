"""One custom operation of torch with several implementations; the right one runs on each device.

::

    @drivetrain.kernel("demo::saxpy")
    def saxpy(a: float, x: Tensor, y: Tensor) -> Tensor:
        return a * x + y                          # what it means; runs where nothing else does

    @saxpy.cuda(SOURCE, "saxpy")                  # CUDA C, on every device that the HAL drives
    def _(launch, a, x, y):
        out = torch.empty_like(x)
        launch((x.numel() + 255) // 256, 256, a, x, y, out, x.numel())
        return out

    @saxpy.triton()
    def _(a, x, y): ...
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import re
import threading
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from drivetrain.errors import BadInput, Unsupported
from drivetrain.hal import Source
from drivetrain.hal.kernel import ArgType, Kernel
from drivetrain.pytorch.devices import hal_device
from drivetrain.pytorch.launching import Launcher

__all__ = ["Implementation", "Op", "kernel"]

_NAME = re.compile(r"[A-Za-z_]\w*::[A-Za-z_]\w*", re.ASCII)
FLOATS = (torch.float32,)


@dataclass(frozen=True)
class Implementation:
    """One way to compute the operation, and where it applies."""

    name: str
    kind: str
    """``cuda`` (CUDA C), ``triton`` or ``torch``."""
    function: Callable[..., Any]
    devices: tuple[str, ...] = ()
    """Torch device types; all when empty."""
    dtypes: tuple[torch.dtype, ...] = ()
    """Floating arguments must be of one of these; any when empty."""
    when: Callable[..., bool | str] | None = None
    """A rule about the call: True, False, or why not; it is given the arguments."""
    source: Source | None = None
    entry: str = ""
    args: tuple[ArgType, ...] | None = None
    options: tuple[str, ...] = ()
    _kernels: dict[torch.device, Kernel | str] = field(default_factory=dict, compare=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, compare=False)

    def misfit(self, arguments: Sequence[Any], device: torch.device) -> str:
        """Why it cannot take this call; empty when it can."""
        if self.devices and device.type not in self.devices:
            return f"it is for {' and '.join(self.devices)}, not {device.type}"
        if self.kind == "triton" and importlib.util.find_spec("triton") is None:
            return "Triton is not installed; pip install triton"
        if self.dtypes:
            for tensor in _tensors(arguments):
                if tensor.is_floating_point() and tensor.dtype not in self.dtypes:
                    names = " and ".join(str(t).removeprefix("torch.") for t in self.dtypes)
                    return f"it is for {names}, not {str(tensor.dtype).removeprefix('torch.')}"
        if self.when is not None:
            said = self.when(*arguments)
            if said is not True:
                return said if isinstance(said, str) and said else "its rule says no"
        if self.kind == "cuda":
            made = self.compiled(device)
            return made if isinstance(made, str) else ""
        return ""

    def compiled(self, device: torch.device) -> Kernel | str:
        """The kernel on this device, compiled once, or why the device has no compiler for it.

        Raises CompileError: a source that is wrong is never passed over.
        """
        with self._lock:
            found = self._kernels.get(device)
            if found is None:
                assert self.source is not None
                found = self._made(device, self.source)
                self._kernels[device] = found
            return found

    def _made(self, device: torch.device, source: Source) -> Kernel | str:
        try:
            home = hal_device(device)
        except BadInput as error:
            return str(error)
        try:
            module = home.compile(source, options=self.options)
            return module.kernel(self.entry, self.args)
        except Unsupported as error:
            return str(error)

    def run(self, arguments: Sequence[Any], device: torch.device) -> Any:
        if self.kind != "cuda":
            return self.function(*arguments)
        made = self.compiled(device)
        if isinstance(made, str):
            raise Unsupported(made, code="unsupported", op=self.name, device=str(device))
        return self.function(Launcher(made, device), *arguments)


class Op:
    """The operation: call it. Made by `kernel`; more implementations are added by `cuda`, `triton`
    and `torch`, those first that were added first, the decorated function last."""

    def __init__(self, name: str, function: Callable[..., Any], mutates: Sequence[str]) -> None:
        functools.update_wrapper(self, function)
        self.name = name
        self._function = function
        self._mutates = tuple(mutates)
        self._signature = _signature(name, function)
        self._own: list[Implementation] = []
        self._last = Implementation("torch", "torch", function)
        try:
            schema = torch.library.infer_schema(
                _typed(self._run, self._signature), mutates_args=self._mutates
            )
            self.op: Any = torch.library.custom_op(
                name, self._run, mutates_args=self._mutates, schema=schema
            )
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise BadInput(f"kernel {name}: {str(error).splitlines()[0]}") from error
        self.op.register_fake(function)
        if not self._mutates:
            self.op.register_autograd(self._backward, setup_context=self._save)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.op(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<kernel {self.name}: {', '.join(i.name for i in self.implementations)}>"

    # -- which one runs -------------------------------------------------------------------------

    @property
    def implementations(self) -> tuple[Implementation, ...]:
        """In the order in which they are asked."""
        return (*self._own, self._last)

    def choose(self, *args: Any, **kwargs: Any) -> Implementation:
        """The implementation that this call runs."""
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return self._chosen(bound.args, self._device(bound.args))

    def misfits(self, *args: Any, **kwargs: Any) -> dict[str, str]:
        """Each implementation and why it does not take this call; empty for those that do."""
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        device = self._device(bound.args)
        return {each.name: each.misfit(bound.args, device) for each in self.implementations}

    def _chosen(self, arguments: Sequence[Any], device: torch.device) -> Implementation:
        for each in self._own:
            if not each.misfit(arguments, device):
                return each
        return self._last

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        device = self._device(bound.args)
        return self._chosen(bound.args, device).run(bound.args, device)

    def _device(self, arguments: Sequence[Any]) -> torch.device:
        """Of the first tensor that is more than a number. Raises BadInput for several devices."""
        tensors = _tensors(arguments)
        placed = {t.device for t in tensors if t.dim() or t.device.type != "cpu"}
        if len(placed) > 1:
            where = ", ".join(sorted(map(str, placed)))
            raise BadInput(f"{self.name}: its tensors are on {where}; move them to one device")
        if placed:
            return placed.pop()
        return tensors[0].device if tensors else torch.device("cpu")

    # -- adding implementations -----------------------------------------------------------------

    def cuda(
        self,
        source: Source | str,
        entry: str,
        *,
        args: Sequence[ArgType] | None = None,
        name: str = "",
        devices: Sequence[str] = (),
        dtypes: Sequence[torch.dtype] = FLOATS,
        when: Callable[..., bool | str] | None = None,
        options: Sequence[str] = (),
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Adds CUDA C (or a `hal.Source`), compiled by the HAL for the device at hand: NVIDIA's,
        and translated for the processor and for OpenCL devices that torch was given.

        The decorated function is called with a `Launcher` and the arguments, and returns the
        results, which it allocates. ``args`` are the kernel's argument types, where the source does
        not tell; ``dtypes`` those of the floating tensors that it can take.
        """
        found = Source.cuda(source, name=f"{entry}.cu") if isinstance(source, str) else source
        if not isinstance(found, Source):
            raise BadInput(f"{self.name}: a {type(source).__name__} is no source; give CUDA C")

        def add(function: Callable[..., Any]) -> Callable[..., Any]:
            self._add(
                Implementation(
                    name or entry,
                    "cuda",
                    function,
                    tuple(devices),
                    tuple(dtypes),
                    when,
                    found,
                    entry,
                    None if args is None else tuple(args),
                    tuple(options),
                )
            )
            return function

        return add

    def triton(
        self,
        *,
        name: str = "triton",
        devices: Sequence[str] = ("cuda", "xpu"),
        dtypes: Sequence[torch.dtype] = (),
        when: Callable[..., bool | str] | None = None,
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Adds a function that launches a Triton kernel; passed over where Triton is absent."""

        def add(function: Callable[..., Any]) -> Callable[..., Any]:
            made = Implementation(name, "triton", function, tuple(devices), tuple(dtypes), when)
            self._add(made)
            return function

        return add

    def torch(
        self,
        *,
        name: str,
        devices: Sequence[str] = (),
        dtypes: Sequence[torch.dtype] = (),
        when: Callable[..., bool | str] | None = None,
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Adds another function of torch's operations, for some devices or calls."""

        def add(function: Callable[..., Any]) -> Callable[..., Any]:
            made = Implementation(name, "torch", function, tuple(devices), tuple(dtypes), when)
            self._add(made)
            return function

        return add

    def _add(self, made: Implementation) -> None:
        if any(made.name == each.name for each in self.implementations):
            raise BadInput(f"{self.name} has an implementation {made.name!r} already; name yours")
        self._own.append(made)

    # -- what torch must know beside -------------------------------------------------------------

    def fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The shapes and types of the results, without computing; used instead of the decorated
        function where that reads values."""
        self.op.register_fake(function)
        return function

    def autograd(
        self, backward: Callable[..., Any], *, setup_context: Callable[..., Any] | None = None
    ) -> Callable[..., Any]:
        """The gradients, as ``torch.library.register_autograd`` takes them. Without it they are
        those of the decorated function, which backward then runs again."""
        if self._mutates:
            raise BadInput(f"{self.name} changes {', '.join(self._mutates)}: it has no gradients")
        self.op.register_autograd(backward, setup_context=setup_context)
        return backward

    def _save(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*(each for each in inputs if isinstance(each, Tensor)))
        ctx.rest = tuple(None if isinstance(each, Tensor) else each for each in inputs)
        ctx.places = tuple(i for i, each in enumerate(inputs) if isinstance(each, Tensor))

    def _backward(self, ctx: Any, *gradients: Any) -> Any:
        inputs = list(ctx.rest)
        wanted: list[int] = []
        for place, tensor in zip(ctx.places, ctx.saved_tensors, strict=True):
            inputs[place] = tensor
            if ctx.needs_input_grad[place]:
                wanted.append(place)

        def of(*values: Tensor) -> Any:
            given = list(inputs)
            for place, value in zip(wanted, values, strict=True):
                given[place] = value
            return self._function(*given)

        pull = torch.func.vjp(of, *(inputs[place] for place in wanted))[1]
        slopes = pull(gradients[0] if len(gradients) == 1 else gradients)
        found: list[Tensor | None] = [None] * len(inputs)
        for place, slope in zip(wanted, slopes, strict=True):
            found[place] = slope
        return tuple(found)


def kernel(name: str, *, mutates: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Op]:
    """Makes the decorated function of torch operations the custom operation ``library::name``.

    Parameters are typed as ``torch.library`` wants them (Tensor, int, float, bool, str, lists and
    optionals of them); ``mutates`` names those that are changed. The function gives the meaning:
    shapes for tracing and gradients are taken from it unless you say otherwise (`Op.fake`,
    `Op.autograd`), and it runs where no other implementation does. Raises BadInput.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise BadInput(f"{name!r} is no name of an operation; write library::name, two identifiers")
    library, _, own = name.partition("::")
    if hasattr(getattr(torch.ops, library), own):
        raise BadInput(f"the operation {name} exists already in this process; choose another name")

    def make(function: Callable[..., Any]) -> Op:
        return Op(name, function, mutates)

    return make


def _signature(name: str, function: Callable[..., Any]) -> inspect.Signature:
    """With annotations as types, whatever form they were written in."""
    if not callable(function):
        raise BadInput(f"kernel {name} decorates a function, not a {type(function).__name__}")
    signature = inspect.signature(function)
    try:
        hints = typing.get_type_hints(function)
    except NameError as error:
        raise BadInput(f"kernel {name}: an annotation cannot be read ({error})") from error
    parameters = []
    for parameter in signature.parameters.values():
        if parameter.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
            raise BadInput(f"kernel {name}: {parameter} must be a plain parameter")
        if parameter.name not in hints:
            raise BadInput(f"kernel {name}: {parameter.name} has no type; write Tensor, float, ...")
        parameters.append(parameter.replace(annotation=hints[parameter.name]))
    if "return" not in hints:
        raise BadInput(f"kernel {name} does not say what it returns; write -> Tensor")
    gives = None if hints["return"] is type(None) else hints["return"]
    return signature.replace(parameters=parameters, return_annotation=gives)


def _typed(function: Callable[..., Any], signature: inspect.Signature) -> Callable[..., Any]:
    def prototype(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    prototype.__signature__ = signature  # type: ignore[attr-defined]
    prototype.__annotations__ = {
        **{name: each.annotation for name, each in signature.parameters.items()},
        "return": signature.return_annotation,
    }
    return prototype


def _tensors(arguments: Sequence[Any]) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(list(arguments)) if isinstance(leaf, Tensor)]
