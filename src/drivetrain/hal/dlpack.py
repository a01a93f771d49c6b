"""The same memory for others and theirs for us, without copies: DLPack.

`from_dlpack` takes what has ``__dlpack__``: tensors of torch, arrays of numpy, buffers. Buffers
have it themselves (``torch.from_dlpack(buffer)``, ``numpy.from_dlpack(buffer)``).

Written from the DLPack specification (version 0.8, the unversioned ``dltensor`` capsule, and the
device types of ``dlpack.h``).
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

from drivetrain.errors import BadInput, HalError
from drivetrain.hal.bytes import native
from drivetrain.hal.kinds import Kind

if TYPE_CHECKING:
    from drivetrain.hal.memory import Buffer
    from drivetrain.hal.stream import Stream

CPU, CUDA, CUDA_HOST, OPENCL, ROCM, ROCM_HOST, CUDA_MANAGED, ONEAPI = 1, 2, 3, 4, 10, 11, 13, 14

_DEVICES = {"cuda": CUDA, "hip": ROCM, "opencl": OPENCL, "sycl": ONEAPI, "level_zero": ONEAPI}

DTYPES: dict[str, tuple[int, int]] = {
    **{f"int{n}": (0, n) for n in (8, 16, 32, 64)},
    **{f"uint{n}": (1, n) for n in (8, 16, 32, 64)},
    **{f"float{n}": (2, n) for n in (16, 32, 64)},
    "bfloat16": (4, 16),
    "bool": (6, 8),
}
"""dtype -> (DLPack's type code, bits)."""
_NAMES = {value: name for name, value in DTYPES.items()}


class _Device(ctypes.Structure):
    _fields_ = (("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32))


class _Type(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _Type),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    pass


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_Managed))
_Managed._fields_ = (
    ("tensor", _Tensor),
    ("manager", ctypes.c_void_p),
    ("deleter", _Deleter),
)

_exported: dict[int, tuple[Any, ...]] = {}
"""What each exported tensor keeps alive, until its consumer calls the deleter."""


def _delete(managed: Any) -> None:
    _exported.pop(ctypes.addressof(managed.contents), None)


_deleter = _Deleter(_delete)


_api = ctypes.pythonapi
_api.PyCapsule_New.restype = ctypes.py_object
_api.PyCapsule_New.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_api.PyCapsule_GetPointer.restype = ctypes.c_void_p
_api.PyCapsule_GetPointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
_api.PyCapsule_SetName.argtypes = (ctypes.py_object, ctypes.c_char_p)
_api.PyCapsule_IsValid.argtypes = (ctypes.c_void_p, ctypes.c_char_p)
_FRESH, _USED = b"dltensor", b"used_dltensor"
_Destructor = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def _unused(capsule: int) -> None:
    """Nobody took the tensor: let go of what it keeps. Where the consumer refused it, Python cannot
    run here without losing that error; so this is only for where there is no C."""
    if _api.PyCapsule_IsValid(capsule, _FRESH):
        raw = ctypes.cast(capsule, ctypes.py_object)
        _exported.pop(_api.PyCapsule_GetPointer(raw, _FRESH), None)


_destructor = _Destructor(_unused)


def _capsule(address: int) -> Any:
    if native is not None:
        return native.dltensor(address)
    return _api.PyCapsule_New(address, _FRESH, ctypes.cast(_destructor, ctypes.c_void_p))


def device_of(buffer: Buffer) -> tuple[int, int]:
    """DLPack's (device type, index) of a buffer. Raises BadInput for devices that it has no word
    for."""
    if buffer.device.driver == "cpu":
        return CPU, 0
    if buffer.kind is Kind.PINNED:
        return CPU, 0  # every consumer of host memory takes it
    if buffer.device.driver == "cuda" and buffer.kind is Kind.MANAGED:
        return CUDA_MANAGED, buffer.device.index
    found = _DEVICES.get(buffer.device.driver)
    if found is None:
        raise BadInput(f"DLPack has no word for a device of driver {buffer.device.driver}")
    return found, buffer.device.index


def export(
    buffer: Buffer,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: str,
    *,
    stream: Any = None,
    max_version: tuple[int, int] | None = None,
    dl_device: tuple[int, int] | None = None,
    copy: bool | None = None,
) -> Any:
    """A ``dltensor`` capsule over the buffer's memory; ``strides`` in elements.

    Work queued on the buffer's own stream is waited for, unless ``stream`` is -1 (the consumer
    synchronises by itself). Raises BadInput for what cannot be given without a copy.
    """
    buffer._alive("__dlpack__")
    here = device_of(buffer)
    if copy:
        raise BadInput("__dlpack__: a copy was asked for; copy the buffer with copy_to first")
    if dl_device is not None and tuple(dl_device) != here:
        raise BadInput(f"__dlpack__: the memory is on DLPack device {here}, not {dl_device}")
    if dtype not in DTYPES:
        raise BadInput(f"__dlpack__: DLPack has no word for {dtype}")
    if stream != -1:
        buffer._settle()
    managed = _Managed()
    extent = (ctypes.c_int64 * max(len(shape), 1))(*shape)
    steps = (ctypes.c_int64 * max(len(shape), 1))(*strides)
    code, bits = DTYPES[dtype]
    managed.tensor = _Tensor(
        buffer.ptr,
        _Device(*here),
        len(shape),
        _Type(code, bits, 1),
        ctypes.cast(extent, ctypes.POINTER(ctypes.c_int64)),
        ctypes.cast(steps, ctypes.POINTER(ctypes.c_int64)),
        0,
    )
    managed.deleter = _deleter
    address = ctypes.addressof(managed)
    _exported[address] = (managed, extent, steps, buffer)
    return _capsule(address)


class Imported:
    """Somebody else's tensor. Calls its deleter when it is forgotten."""

    def __init__(self, capsule: Any) -> None:
        try:
            address = _api.PyCapsule_GetPointer(capsule, _FRESH)
        except ValueError as error:
            raise BadInput("from_dlpack: this is no fresh dltensor capsule") from error
        self._managed = ctypes.cast(address, ctypes.POINTER(_Managed))
        tensor = self._managed.contents.tensor
        _api.PyCapsule_SetName(capsule, _USED)
        self.device = (int(tensor.device.device_type), int(tensor.device.device_id))
        self.ptr = int(tensor.data or 0) + int(tensor.byte_offset)
        self.shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
        dtype = _NAMES.get((tensor.dtype.code, tensor.dtype.bits))
        if dtype is None or tensor.dtype.lanes != 1:
            raise BadInput(
                f"from_dlpack: elements of code {tensor.dtype.code}, {tensor.dtype.bits} bits and "
                f"{tensor.dtype.lanes} lanes are not known"
            )
        self.dtype = dtype
        if tensor.strides:
            self.strides = tuple(tensor.strides[i] for i in range(tensor.ndim))
        else:
            steps, step = [], 1
            for extent in reversed(self.shape):
                steps.append(step)
                step *= extent
            self.strides = tuple(reversed(steps))

    def __del__(self) -> None:
        managed = getattr(self, "_managed", None)
        if managed and managed.contents.deleter:
            managed.contents.deleter(managed)


def driver_of(device_type: int) -> str:
    """The driver that speaks of DLPack's device type. Raises HalError."""
    if device_type in (CPU, CUDA_HOST, ROCM_HOST):
        return "cpu"
    for driver, number in (*_DEVICES.items(), ("cuda", CUDA_MANAGED)):
        if number == device_type:
            return driver
    raise HalError(f"DLPack device type {device_type} has no driver here", code="unsupported")


def imported(value: Any, *, stream: Any = None) -> Imported:
    """The tensor behind an object with ``__dlpack__`` and ``__dlpack_device__``. On a GPU, its
    owner makes ``stream`` (the handle of ours; None: all that comes) wait for its work."""
    try:
        device_type, _ = value.__dlpack_device__()
        give = value.__dlpack__
    except AttributeError as error:
        raise BadInput(
            f"from_dlpack: a {type(value).__name__} has no __dlpack__; give an array or a tensor"
        ) from error
    try:
        if device_type in (CPU, CUDA_HOST, ROCM_HOST):
            return Imported(give())
        return Imported(give(stream=stream))
    except BufferError as error:
        raise BadInput(f"from_dlpack: the owner does not give it: {error}") from error


def from_dlpack(value: Any, *, stream: Stream | None = None) -> Buffer:
    """The bytes of an array or a tensor of somebody else, as a buffer on its device that keeps it
    alive; nothing is copied. It must be C-contiguous.

    On a GPU the owner makes ``stream`` (None: its default one) wait for what it has queued. Raises
    BadInput for what is no such array, HalError when its device has no driver here.
    """
    from drivetrain.hal.registry import device

    tensor = imported(value, stream=None if stream is None else stream.handle)
    step = 1
    for extent, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if extent != 1 and stride != step and 0 not in tensor.shape:
            raise BadInput(
                f"from_dlpack: shape {tensor.shape} with strides {tensor.strides} is not "
                "C-contiguous; make it so first"
            )
        step *= extent
    nbytes = step * DTYPES[tensor.dtype][1] // 8
    device_type, index = tensor.device
    driver = driver_of(device_type)
    kind = Kind.MANAGED if device_type == CUDA_MANAGED else Kind.DEVICE
    found = device(f"{driver}:{0 if driver == 'cpu' else index}")
    return found.wrap(tensor.ptr if nbytes else 0, nbytes, owner=tensor, kind=kind)
