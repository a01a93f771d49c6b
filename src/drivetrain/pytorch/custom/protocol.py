"""What a chip's driver offers so that torch sees a device: plain integers in and out, no torch.

A backend is any object with these methods; nothing has to be inherited. `Backend` is what every
one needs, `OpaqueBackend` what memory needs that the host cannot touch; the rest of this page are
optional methods, asked for by name:

``kernels() -> Mapping[str, Kernel]``
    Implementations of torch's operations by overload, as in ``"aten::add.Tensor"`` or
    ``"aten::relu.default"`` (``"aten::relu"`` means the same). A kernel is called with the
    operation's own arguments: tensors of this device, Python numbers, lists, None. It returns what
    the operation returns, in new tensors made with ``torch.empty(..., device=x.device)``, or in the
    argument itself for an in-place or ``out`` overload; or ``NotImplemented`` for arguments that it
    does not serve: the operation then runs on the CPU, and is counted.

    - A kernel of the functional overload serves the in-place and ``out`` overloads too, unless they
      have one of their own: what it returns is copied into the argument.
    - ``x.data_ptr()`` is the address of the first element as ``alloc`` gave it (plus an offset in
      bytes), ``x.shape`` and ``x.stride()`` count elements, ``x.dtype`` is torch's. Tensors come
      with any strides; ``x.contiguous()`` copies where needed.
    - A tensor on the CPU comes only with no dimensions (a number); wrapped numbers come as Python
      numbers even where the operation says Tensor.
    - Kernels run below autograd: the ``..._backward`` operations are operations like any other.
      They are called from several threads (backward has its own).
    - For a backend over a HAL device, `drivetrain.pytorch.custom.hal_backend` has ``buffer_of(x)``
      (a `drivetrain.hal.Buffer` from the first element to the storage's end), ``stream_of(x)`` and
      ``device_of(x)``. Work queued on that stream needs no synchronisation.

``compile_graph(gm, example_inputs) -> callable``
    A ``torch.compile`` backend for whole graphs; ``torch.compile(model, backend=handle.name)``.
``memory_info(index) -> (free, total)``
    Bytes.
``properties(index) -> Mapping``
    At least ``name``; what ``torch.NAME.get_device_properties`` tells.
``capabilities() -> Mapping``
    ``dtypes``: torch's names of the types that the device computes in (``"float32"``).
``copy_across(dst, dst_index, src, src_index, nbytes)``
    Between two devices of this backend; without it bytes go through the host.
``collectives(store, rank, world_size, timeout_s) -> object``
    See `drivetrain.pytorch.custom.distributed`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias, runtime_checkable

Kernel: TypeAlias = Callable[..., Any]
"""An implementation of one overload; may return ``NotImplemented``."""


@runtime_checkable
class Backend(Protocol):
    """What every backend has.

    ``host_visible`` says whether the host may read and write the device's memory at the address
    that ``alloc`` gives (a simulator, unified memory). A host-visible backend without ``alloc`` and
    ``free`` gets its memory from Drivetrain.
    """

    name: str
    """The device's name in torch unless the configuration has another: lower-case letters, ``_``"""
    host_visible: bool

    def device_count(self) -> int:
        """How many devices there are, at least 1; the same for the life of the process."""

    def synchronize(self, index: int) -> None:
        """Wait until all that was queued on device ``index`` is done."""


@runtime_checkable
class Allocating(Protocol):
    """Memory of one's own. Called from any thread; ``free`` also from finalisers."""

    def alloc(self, nbytes: int, index: int) -> int:
        """The address of ``nbytes`` (at least 1) on device ``index``: any number but 0 below 2**63
        for which ``address + offset`` names the byte ``offset``. It must be aligned for every type
        (64 bytes). Raises what it likes when there is none; 0 and None mean out of memory."""

    def free(self, address: int, nbytes: int, index: int) -> None:
        """Give back what ``alloc`` gave, in the order of the device's queued work."""


@runtime_checkable
class OpaqueBackend(Backend, Allocating, Protocol):
    """Memory that the host cannot touch. Addresses of the host are real; each copy is done, and
    all work queued on the device before it, when the call returns."""

    def copy_in(self, address: int, host: int, nbytes: int, index: int) -> None:
        """Host to device ``index``."""

    def copy_out(self, host: int, address: int, nbytes: int, index: int) -> None:
        """Device ``index`` to host."""

    def copy_within(self, dst: int, src: int, nbytes: int, index: int) -> None:
        """Within device ``index``; the ranges may not overlap."""


def kernels_of(backend: object) -> Mapping[str, Kernel]:
    """The backend's kernels by full overload name (``aten::relu.default``)."""
    give = getattr(backend, "kernels", None)
    found: Mapping[str, Kernel] = give() if give is not None else {}
    return {full_name(name): kernel for name, kernel in found.items()}


def full_name(name: str) -> str:
    """``aten::relu.default`` for ``relu``, ``aten::relu`` and ``aten.relu.default``."""
    namespace, separator, rest = name.partition("::")
    if not separator:
        namespace, rest = "aten", name.removeprefix("aten.")
    return f"{namespace}::{rest}" if "." in rest else f"{namespace}::{rest}.default"
