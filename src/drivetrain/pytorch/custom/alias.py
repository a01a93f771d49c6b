"""One memory under two labels: a tensor of the CPU as one of the device, and back, without a copy.

A DLPack capsule of device type ``kDLExtDev`` is imported by torch as a plain tensor of the custom
device, with a real storage that owns the capsule. So a tensor changes its label by having its
capsule's device rewritten. `owned` makes such tensors from memory that torch knows nothing of.

Layouts are those of the DLPack specification (version 0.8, ``dltensor``).
"""

from __future__ import annotations

import atexit
import ctypes
import weakref
from collections.abc import Callable
from typing import Any

import torch

EXTENSION = 12
_HOST = 1
_LABEL = 8  # offsetof(DLTensor, device): the type, then the index, 32 bits each
_KIND = 0xFFFFFFFF

_pointer: Any = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
_new: Any = ctypes.pythonapi.PyCapsule_New
_new.restype = ctypes.py_object
_new.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_NAME = b"dltensor"
_label: Any = ctypes.c_int64.from_address
_to: Any = torch._C._to_dlpack
_from: Any = torch._C._from_dlpack


def label(index: int) -> int:
    """What `relabelled` takes for device ``index``."""
    return EXTENSION | index << 32


def relabelled(tensor: torch.Tensor, to: int) -> torch.Tensor:
    """The same memory as a tensor of another device. It has no gradient, and conj and neg bits are
    lost: take care of them before."""
    capsule = _to(tensor)
    _label(_pointer(capsule, _NAME) + _LABEL).value = to
    found: torch.Tensor = _from(capsule)
    return found


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor of host-visible memory as one of the CPU; bits are carried over."""
    if tensor.is_conj():
        return torch._conj(on_host(torch._conj(tensor)))
    if tensor.is_neg():
        return torch._neg_view(on_host(torch._neg_view(tensor)))
    if tensor._is_zerotensor():  # autograd's zeros have no memory at all
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")
    return plain_on_host(tensor)


def plain_on_host(tensor: torch.Tensor) -> torch.Tensor:
    """`on_host` for a tensor that is known to have no bits. Raises RuntimeError for one of another
    device (a GPU), whose memory the host may not touch."""
    capsule = _to(tensor)
    place = _label(_pointer(capsule, _NAME) + _LABEL)
    if place.value & _KIND != EXTENSION:
        raise RuntimeError(
            f"expected all tensors to be on the same device, but one is on {tensor.device}; move "
            "it with .to()"
        )
    place.value = _HOST
    found: torch.Tensor = _from(capsule)
    return found


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_index", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    pass


_Managed._fields_ = (
    ("tensor", _Tensor),
    ("extent", ctypes.c_int64),  # DLPack's manager context, which is its producer's to use
    ("deleter", ctypes.c_void_p),
    ("step", ctypes.c_int64),  # behind what DLPack knows
)
_idle: list[_Managed] = []
"""Described memory that is gone. They are kept: torch may look at one once more, to see that there
is no deleter."""
_owners: dict[weakref.ref[Any], tuple[_Managed, Callable[[], None]]] = {}
"""What each storage owns, until it is gone."""


def owned(address: int, nbytes: int, index: int, free: Callable[[], None]) -> torch.Tensor:
    """``nbytes`` at ``address`` as a one-dimensional uint8 tensor of device ``index``. ``free`` is
    called when the last tensor over them is gone, on whatever thread that happens.

    The end is told by a weak reference to the storage, which torch keeps alive in Python for as
    long as it is in C++. A DLPack deleter would be called in the middle of C code with an exception
    set, which Python code must not be.
    """
    managed = _idle.pop() if _idle else _new_managed()
    tensor = managed.tensor
    tensor.data, tensor.device_index, managed.extent = address, index, nbytes
    found: torch.Tensor = _from(_new(ctypes.addressof(managed), _NAME, None))
    _owners[weakref.ref(found.untyped_storage(), _gone)] = managed, free
    return found


def _new_managed() -> _Managed:
    managed = _Managed()
    here, pointer = ctypes.addressof(managed), ctypes.POINTER(ctypes.c_int64)
    extent = ctypes.cast(here + _Managed.extent.offset, pointer)
    step = ctypes.cast(here + _Managed.step.offset, pointer)
    managed.step = 1
    managed.tensor = _Tensor(0, EXTENSION, 0, 1, 1, 8, 1, extent, step, 0)
    _forever.append(managed)
    return managed


_forever: list[_Managed] = []


def _gone(storage: weakref.ref[Any]) -> None:
    managed, free = _owners.pop(storage)
    _idle.append(managed)
    free()


@atexit.register
def _keep() -> None:
    """Tensors may outlive the interpreter, and torch then looks at what described their memory."""
    for managed in _forever:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(managed))
