"""What a family of kernels is: source, launch rule, reference; and code that is compiled once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from drivetrain.errors import Unsupported
from drivetrain.hal.opened import opened

if TYPE_CHECKING:
    from drivetrain.hal.device import Device
    from drivetrain.hal.kernel import ArgType, Kernel, Module
    from drivetrain.hal.language.source import Source
    from drivetrain.hal.memory import Buffer
    from drivetrain.hal.stream import Stream

Dims = tuple[int, ...]


@dataclass(frozen=True)
class Launch:
    """How many blocks of how many threads; ``shared`` is dynamic shared memory in bytes."""

    grid: Dims
    block: Dims
    shared: int = 0


@dataclass(frozen=True)
class Family:
    """Kernels of one kind. ``source``, ``rule`` and ``reference`` take what the family's own module
    says; ``check`` runs them on a device and raises AssertionError naming the first difference."""

    name: str
    proves: str
    source: Callable[..., Source]
    rule: Callable[..., Launch]
    reference: Callable[..., Any]
    """In numpy; the numbers that the kernels must give."""
    check: Callable[[Device, Stream, int], None]
    """Device, stream, size. Raises Unsupported without numpy or a compiler."""
    sizes: tuple[int, ...] = (33, 256, 1000)
    """Sizes that checks use: less than a block, whole blocks, and some left over."""


def blocks(count: int, each: int) -> int:
    """Blocks of ``each`` that cover ``count``; one at least."""
    return max(1, -(-count // each))


def kernel(
    device: Device,
    name: str,
    make: Callable[..., Source],
    *choices: Any,
    args: Sequence[ArgType] | None = None,
) -> Kernel:
    """The kernel ``name`` of ``make(*choices)``, compiled for the device once a process. ``args``:
    as `Module.kernel` takes them."""
    here = opened(device)
    key = (make, name, choices)
    found: Kernel | None = here.kernels.get(key)
    if found is not None:
        return found
    source = make(*choices)
    module: Module | None = here.kernels.get(source)
    if module is None:
        compiled = device.compile(source)
        module = here.kernels.setdefault(source, compiled)
    made: Kernel = here.kernels.setdefault(key, module.kernel(name, args))
    return made


def launch(found: Kernel, stream: Stream, rule: Launch, *arguments: Any) -> None:
    """Queue a kernel by its rule."""
    found(stream, rule.grid, rule.block, *arguments, shared=rule.shared)


# -- for checks: numpy arrays in and out ---------------------------------------------------------


def numpy() -> ModuleType:
    """numpy. Raises Unsupported where it is not installed."""
    try:
        import numpy as np
    except ModuleNotFoundError as error:
        if error.name != "numpy":
            raise
        raise Unsupported(
            "references need numpy; install it with: pip install 'drivetrain[kernels]'",
            code="not_installed",
            op="reference",
        ) from error
    return np


def put(device: Device, stream: Stream, array: Any) -> Buffer:
    """A buffer with the array's bytes."""
    buffer = device.alloc(max(array.nbytes, 1), stream=stream)
    if array.nbytes:
        buffer.copy_from(array, stream=stream)
    return buffer


def room(device: Device, stream: Stream, nbytes: int) -> Buffer:
    """A buffer whose bytes are not what any kernel writes there by accident."""
    buffer = device.alloc(max(nbytes, 1), stream=stream)
    buffer.fill(b"\xa5", stream=stream)
    return buffer


def get(buffer: Buffer, stream: Stream, shape: Any, dtype: Any) -> Any:
    """The buffer's first bytes as a numpy array."""
    np = numpy()
    found = np.empty(shape, dtype)
    if found.nbytes:
        buffer.view(0, found.nbytes).copy_to(found, stream=stream)
    stream.synchronize()
    return found


def agree(what: str, found: Any, wanted: Any, *, rtol: float = 0.0, atol: float = 0.0) -> None:
    """Raises Failed naming the first element that differs by more; NaN equals NaN."""
    from drivetrain.hal.conformance.check import Failed

    np = numpy()
    if found.shape != wanted.shape:
        raise Failed(f"{what}: the shape is {found.shape}, {wanted.shape} was expected")
    if not rtol and not atol:
        same = (found == wanted) | ((found != found) & (wanted != wanted))
    else:
        same = np.isclose(found, wanted, rtol=rtol, atol=atol, equal_nan=True)
    if same.all():
        return
    wrong = np.argwhere(~same)
    at = tuple(int(i) for i in wrong[0])
    raise Failed(
        f"{what}: element {at if len(at) != 1 else at[0]} of {found.shape} is {found[at]!r}, "
        f"{wanted[at]!r} was expected; {len(wrong)} of {found.size} differ"
    )


def generator(size: int) -> Any:
    """numpy's random numbers, the same for each size."""
    return numpy().random.default_rng(size)
