"""One memory under two labels: a tensor of the CPU as one of the device, and back, without a copy.

A DLPack capsule of device type ``kDLExtDev`` is imported by torch as a plain tensor of the custom
device, with a real storage that owns the capsule. So a tensor changes its label by having its
capsule's device rewritten. `owned` makes such tensors from memory that torch knows nothing of.

Layouts are those of the DLPack specification (version 0.8, ``dltensor``).
"""

from __future__ import annotations

import atexit
import ctypes
from collections.abc import Callable
from typing import Any

import torch

EXTENSION = 12
_HOST = 1
_LABEL = 8  # offsetof(DLTensor, device): the type, then the index, 32 bits each

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
    return relabelled(tensor, _HOST)


def plain_on_host(tensor: torch.Tensor) -> torch.Tensor:
    """`on_host` for a tensor that is known to have no bits."""
    return relabelled(tensor, _HOST)


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


_Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_Managed._fields_ = (
    ("tensor", _Tensor),
    ("extent", ctypes.c_int64),  # DLPack's manager context, which is its producer's to use
    ("deleter", ctypes.c_void_p),
    ("step", ctypes.c_int64),  # behind what DLPack knows
)
_EXTENT = _Managed.extent.offset
_STEP = _Managed.step.offset

_owned: dict[int, tuple[_Managed, Callable[[], None]]] = {}
"""By the address of the managed tensor: what it is, and what gives its memory back."""


def _delete(address: int) -> None:
    found = _owned.pop(address, None)
    if found is not None:
        found[1]()


_deleter = _Deleter(_delete)
_delete_address = ctypes.cast(_deleter, ctypes.c_void_p).value


def owned(address: int, nbytes: int, index: int, free: Callable[[], None]) -> torch.Tensor:
    """``nbytes`` at ``address`` as a one-dimensional uint8 tensor of device ``index``. ``free`` is
    called when the last tensor over them is gone, on whatever thread that happens."""
    managed = _Managed()
    here = ctypes.addressof(managed)
    pointer = ctypes.POINTER(ctypes.c_int64)
    managed.extent, managed.step, managed.deleter = nbytes, 1, _delete_address
    managed.tensor = _Tensor(
        address,
        EXTENSION,
        index,
        1,
        1,
        8,
        1,
        ctypes.cast(here + _EXTENT, pointer),
        ctypes.cast(here + _STEP, pointer),
        0,
    )
    _owned[here] = (managed, free)
    found: torch.Tensor = _from(_new(here, _NAME, None))
    return found


@atexit.register
def _keep() -> None:
    """Tensors that outlive the interpreter call no Python when they go: their deleter is taken
    out, and what describes them is never freed."""
    for managed, free in list(_owned.values()):
        managed.deleter = None
        for each in (managed, free):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(each))
