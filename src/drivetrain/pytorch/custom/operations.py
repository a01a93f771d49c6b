"""What is registered with torch's dispatcher: memory, views, the backend's kernels, the CPU's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from drivetrain.errors import BadInput
from drivetrain.pytorch.custom import attention, recurrent
from drivetrain.pytorch.custom.copying import copier
from drivetrain.pytorch.custom.fallback import boxed, kernel_on_cpu, run_on_cpu, view_of
from drivetrain.pytorch.custom.memory import CPU_KEYS, contiguous_strides, set_to
from drivetrain.pytorch.custom.protocol import Kernel, kernels_of
from drivetrain.pytorch.custom.runtime import Runtime
from drivetrain.pytorch.custom.schema import argument_at, overload, plan_of, words

KEY = "PrivateUse1"
_VIEWS = words(
    """
    as_strided view _reshape_alias unfold view_as_real view_as_complex set_.source_Storage
    set_.source_Storage_storage_offset set_.source_Tensor
    """
)
_FUSED_CELLS: dict[str, Callable[..., Any]] = {
    "_thnn_fused_lstm_cell": recurrent.lstm_cell,
    "_thnn_fused_lstm_cell_backward_impl": recurrent.lstm_cell_backward,
    "_thnn_fused_gru_cell": recurrent.gru_cell,
    "_thnn_fused_gru_cell_backward": recurrent.gru_cell_backward,
}
_ONE_WAY = words(
    """
    native_layer_norm _native_batch_norm_legit native_batch_norm native_group_norm
    """
)
"""Functional operations that torch would make of several others."""

Library: Any = torch.library.Library
_libraries: list[Any] = []
"""Registrations go when their library does."""


class Registrar:
    """Fills the dispatcher's table for the device, the backend's kernels first. Making one checks
    those kernels (BadInput) and touches nothing."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.checked = _checked(_merged(runtime))
        self.library: Any = None
        self.others: dict[str, Any] = {}
        self.taken: set[str] = set()

    def put(self, name: str, function: Callable[..., Any], key: str = KEY) -> None:
        """``name`` without ``default``, as in ``add.Tensor`` and ``relu``, or with a namespace."""
        namespace, separator, rest = name.partition("::")
        if not separator:
            namespace, rest = "aten", name
        library = self.library
        if namespace != "aten":
            library = self.others.get(namespace)
            if library is None:
                library = self.others[namespace] = Library(namespace, "IMPL")
                _libraries.append(library)
        if key == KEY:
            self.taken.add(f"{namespace}::{rest}")
        library.impl(rest, function, key)

    # -- in order ----------------------------------------------------------------------------

    def all(self) -> None:
        self.library = Library("aten", "IMPL")
        _libraries.append(self.library)
        kernels = dict(self.checked)
        self.memory(kernels.pop(torch.ops.aten._copy_from.default, None))
        self.kernels(kernels)
        for name, function in _FUSED_CELLS.items():
            self.unless_taken(name, function)
        self.unless_taken("convolution_overrideable", partial(_convolution, self.runtime))
        self.unless_taken(
            "convolution_backward_overrideable", partial(_convolution_backward, self.runtime)
        )
        in_parts = "aten::bmm" in self.taken
        for name, function in attention.kernels(self.runtime, in_parts).items():
            self.unless_taken(name, function)
            if name == attention.WHOLE:  # torch takes it apart above autograd
                self.put(name, function, f"Autograd{KEY}")
        self.on_cpu()
        last = Library("_", "IMPL")
        last.fallback(boxed(self.runtime), KEY)
        _libraries.append(last)

    def unless_taken(self, name: str, function: Callable[..., Any]) -> None:
        if f"aten::{name}" not in self.taken:
            self.put(name, function)

    def memory(self, kernel: Kernel | None) -> None:
        runtime = self.runtime

        def empty(
            size: Any,
            *,
            dtype: Any = None,
            layout: Any = None,
            device: Any = None,
            pin_memory: Any = None,
            memory_format: Any = None,
        ) -> Tensor:
            kind = torch.get_default_dtype() if dtype is None else dtype
            return runtime.memory(device).empty(size, kind, memory_format)

        def empty_strided(
            size: Any,
            stride: Any,
            *,
            dtype: Any = None,
            layout: Any = None,
            device: Any = None,
            pin_memory: Any = None,
        ) -> Tensor:
            kind = torch.get_default_dtype() if dtype is None else dtype
            return runtime.memory(device).empty_strided(size, stride, kind)

        copy = copier(runtime, kernel)
        if runtime.shim is None:  # else they are C++
            self.put("empty.memory_format", empty)
            self.put("empty_strided", empty_strided)
            for name in _VIEWS:
                self.put(name, view_of(overload(f"aten::{name}")))
            self.put("set_", partial(_emptied, runtime))
        self.put("_copy_from", copy)
        for key in ("Conjugate", "Negative"):
            # Else a copy of such a view clones it, which copies it: the C stack ends.
            self.library.impl("_copy_from", torch.library.fallthrough_kernel, key)

        def copy_and_resize(source: Tensor, into: Tensor) -> Tensor:
            into.resize_(source.shape)
            return copy(source, into)

        self.put("_copy_from_and_resize", copy_and_resize)
        self.put("resize_", partial(_resize, runtime))
        self.put("_local_scalar_dense", partial(_number, runtime))
        self.put("record_stream", lambda tensor, stream: None)  # memory goes back in order anyway

    def kernels(self, found: Mapping[Any, Kernel]) -> None:
        for op, kernel in found.items():
            self.put(_short(op), _own(self.runtime, op, kernel))
        for op, kernel in found.items():
            for other in _siblings(op):
                if other not in found:
                    self.put(_short(other), _derived(self.runtime, op, other, kernel))

    def on_cpu(self) -> None:
        """Operations that torch would make of two (memory, then the ``out`` form): one way there
        and back is enough."""
        names = [f"aten::{name}" for name in _ONE_WAY]
        if "aten::mul.Tensor" not in self.taken:
            names.append("aten::addr")  # in parts it rounds otherwise than the CPU's own
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        for name in torch._C._dispatch_get_all_op_names():
            if (
                name.startswith("aten::")
                and has(name, "CPU")
                and has(name, "CompositeExplicitAutogradNonFunctional")
            ):
                names.append(name)
        for name in names:
            if name in self.taken or has(name, "CompositeImplicitAutograd"):
                continue
            op = overload(name)
            if op is not None and not plan_of(op).is_view:
                self.put(name, kernel_on_cpu(self.runtime, op))


def _short(op: Any) -> str:
    return str(op._schema.name) + (
        f".{op._schema.overload_name}" if op._schema.overload_name else ""
    )


def _merged(runtime: Runtime) -> dict[str, Kernel]:
    """Kernels of all backends by overload; where several have one, the tensor's device decides."""
    by_name: dict[str, dict[int, Kernel]] = {}
    for number, backend in enumerate(runtime.backends):
        for name, kernel in kernels_of(backend).items():
            by_name.setdefault(name, {})[number] = kernel
    if len(runtime.backends) == 1:
        return {name: found[0] for name, found in by_name.items()}
    numbers = [runtime.backends.index(backend) for backend, _ in runtime.places]
    return {name: _by_device(runtime, numbers, found) for name, found in by_name.items()}


def _checked(kernels: Mapping[str, Kernel]) -> dict[Any, Kernel]:
    """By operation. Raises BadInput for what is none, or one that torch takes apart before a
    device sees it."""
    found = {}
    for name, kernel in kernels.items():
        op = overload(name)
        if op is None or not hasattr(op, "_schema"):
            raise BadInput(
                f"the backend has a kernel for {name!r}, which this torch ({torch.__version__}) "
                "does not know; see torch.ops.aten"
            )
        if not callable(kernel):
            raise BadInput(f"the backend's kernel for {name!r} is {kernel!r}, no function")
        short = name.removesuffix(".default")
        if torch._C._dispatch_has_kernel_for_dispatch_key(short, "CompositeImplicitAutograd"):
            raise BadInput(
                f"the backend has a kernel for {name!r}, which torch takes apart into other "
                "operations before a device is asked; give kernels for those (run it once and look "
                "at handle.fallbacks)"
            )
        found[op] = kernel
    return found


def _by_device(runtime: Runtime, numbers: list[int], found: dict[int, Kernel]) -> Kernel:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        for each in _tensors((args, tuple(kwargs.values()))):
            if runtime.is_here(each):
                own = found.get(numbers[each.device.index])
                return NotImplemented if own is None else own(*args, **kwargs)
        return NotImplemented

    return kernel


def _tensors(value: Any) -> Any:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)


def _alike(runtime: Runtime, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether all tensors with dimensions are on one device, which is ours."""
    found = None
    for each in _tensors((args, tuple(kwargs.values()))):
        if each.is_cpu and not each.dim():
            continue
        if found is None:
            found = each.device
        elif each.device != found:
            return False
    return found is None or found.type == runtime.name


def _own(runtime: Runtime, op: Any, kernel: Kernel) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if _alike(runtime, args, kwargs):
            out = kernel(*args, **kwargs)
            if out is not NotImplemented:
                return out
        return run_on_cpu(runtime, op, args, kwargs, "declined")

    return run


def _siblings(op: Any) -> list[Any]:
    """The in-place and the ``out`` overload of a functional one."""
    schema = op._schema
    if any(each.alias_info is not None for each in (*schema.arguments, *schema.returns)):
        return []
    wanted = [(a.name, str(a.type)) for a in schema.arguments]
    found = []
    namespace, _, name = str(schema.name).partition("::")
    inplace = getattr(getattr(torch.ops, namespace), f"{name}_", None)
    packets = [getattr(getattr(torch.ops, namespace), name), inplace]
    for packet in packets:
        for which in packet.overloads() if packet is not None else ():
            other = getattr(packet, which)
            written = [a for a in other._schema.arguments if a.alias_info is not None]
            if not written or not all(a.alias_info.is_write for a in written):
                continue
            rest = [
                (a.name, str(a.type))
                for a in other._schema.arguments
                if packet is inplace or a.alias_info is None
            ]
            if rest == wanted and len(schema.returns) == len(written):
                found.append(other)
    return found


def _derived(runtime: Runtime, op: Any, other: Any, kernel: Kernel) -> Callable[..., Any]:
    """An in-place or ``out`` overload by way of the functional one."""
    plan = plan_of(other)
    places = [place for place in plan.returns if place is not None]
    outs = {name for _, name in places}
    inplace = str(other._schema.name) != str(op._schema.name)

    def run(*args: Any, **kwargs: Any) -> Any:
        given = kwargs if inplace else {k: v for k, v in kwargs.items() if k not in outs}
        if not _alike(runtime, args, kwargs):
            return run_on_cpu(runtime, other, args, kwargs, "declined")
        found = kernel(*args, **given)
        if found is NotImplemented:
            return run_on_cpu(runtime, other, args, kwargs, "declined")
        results = found if isinstance(found, tuple) else (found,)
        into = [argument_at(place, args, kwargs) for place in places]
        for target, result in zip(into, results, strict=True):
            if target.shape != result.shape:
                if inplace:
                    raise RuntimeError(
                        f"{plan.name}: a result of shape {tuple(result.shape)} does not fit the "
                        f"tensor of shape {tuple(target.shape)} that it should replace"
                    )
                target.resize_(result.shape)
            if not torch.can_cast(result.dtype, target.dtype):
                raise RuntimeError(
                    f"result type {result.dtype} can't be cast to the desired output type "
                    f"{target.dtype}"
                )
            target.copy_(result)
        return into[0] if len(into) == 1 else tuple(into)

    return run


# -- what is neither a view nor a computation ------------------------------------------------------


def _number(runtime: Runtime, tensor: Tensor) -> Any:
    """``item()``: one element to the host."""
    memory = runtime.memories[tensor.device.index]
    (host,) = memory.on_host([tensor])
    if memory.visible:
        runtime.synchronize(tensor.device.index)
    return host.item()


def _emptied(runtime: Runtime, tensor: Tensor) -> Tensor:
    """``set_()``: no elements and no memory, on the same device."""
    nothing = runtime.memories[tensor.device.index].empty((0,), tensor.dtype)
    return set_to(tensor, nothing.untyped_storage(), 0, (0,), (1,))


def _resize(runtime: Runtime, tensor: Tensor, size: Any, *, memory_format: Any = None) -> Tensor:
    """Grow into new memory where the old is too short; what was there is kept."""
    count = 1
    for each in size:
        count *= each
    needed = (int(tensor.storage_offset()) + count) * tensor.element_size()
    storage = tensor.untyped_storage()
    if needed > storage.nbytes() and runtime.shim is not None:
        storage.resize_(needed)  # as torch does: what shares it sees it
    if needed <= storage.nbytes():
        resize = torch.ops.aten.resize_.default._handle.redispatch_boxed
        resize(CPU_KEYS, tensor, size, memory_format=memory_format)
        return tensor
    memory = runtime.memories[tensor.device.index]
    grown = memory.empty((needed // tensor.element_size(),), tensor.dtype)
    if storage.nbytes():
        kept = storage.nbytes() // tensor.element_size()
        old = set_to(memory.empty((0,), tensor.dtype), storage, 0, (kept,), (1,))
        grown[:kept].copy_(old)
    stride = contiguous_strides(size)
    if memory_format not in (None, torch.contiguous_format, torch.preserve_format):
        stride = torch.empty(size, device="meta", memory_format=memory_format).stride()
    return set_to(tensor, grown.untyped_storage(), int(tensor.storage_offset()), size, stride)


def _convolution(runtime: Runtime, *args: Any) -> Any:
    return run_on_cpu(runtime, torch.ops.aten.convolution.default, args, {})


def _convolution_backward(
    runtime: Runtime,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    mask: Any,
) -> Any:
    bias = [weight.shape[1] * groups if transposed else weight.shape[0]]
    rest = (stride, padding, dilation, transposed, output_padding, groups, list(mask))
    op = torch.ops.aten.convolution_backward.default
    return run_on_cpu(runtime, op, (grad, x, weight, bias, *rest), {})
