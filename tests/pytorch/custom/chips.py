"""Chips that are made up, one for each sort of memory. Imported by scripts of the tests."""

from __future__ import annotations

import ctypes
from typing import Any

FAR = 1 << 52
"""Added to the addresses that an opaque chip gives: touched by the host, they end the process."""


class SharedChip:
    """Its memory is Drivetrain's."""

    host_visible = True

    def __init__(self, name: str = "npu", count: int = 1, kernels: Any = None) -> None:
        self.name, self.count, self.own = name, count, kernels or {}

    def device_count(self) -> int:
        return self.count

    def synchronize(self, index: int) -> None:
        pass

    def kernels(self) -> dict[str, Any]:
        return dict(self.own)


class VisibleChip(SharedChip):
    """Its memory is its own, at addresses of the host."""

    limit = 1 << 40

    def __init__(self, name: str = "npu", count: int = 1, kernels: Any = None) -> None:
        super().__init__(name, count, kernels)
        self.live: dict[int, Any] = {}
        self.allocated = 0

    def _at(self, address: int) -> int:
        return address

    def alloc(self, nbytes: int, index: int) -> int:
        if sum(len(each) for each in self.live.values()) + nbytes > self.limit:
            raise MemoryError(f"the chip has {self.limit} bytes")
        raw = ctypes.create_string_buffer(nbytes + 64)
        address = ctypes.addressof(raw) + 63 & ~63
        given = address - self._at(0)
        self.live[given] = raw
        self.allocated += 1
        return given

    def free(self, address: int, nbytes: int, index: int) -> None:
        del self.live[address]


class OpaqueChip(VisibleChip):
    """Its memory is its own, and the host cannot touch it."""

    host_visible = False

    def _at(self, address: int) -> int:
        return address - FAR

    def copy_in(self, address: int, host: int, nbytes: int, index: int) -> None:
        self._check(address, nbytes)
        ctypes.memmove(self._at(address), host, nbytes)

    def copy_out(self, host: int, address: int, nbytes: int, index: int) -> None:
        self._check(address, nbytes)
        ctypes.memmove(host, self._at(address), nbytes)

    def copy_within(self, dst: int, src: int, nbytes: int, index: int) -> None:
        self._check(dst, nbytes)
        self._check(src, nbytes)
        ctypes.memmove(self._at(dst), self._at(src), nbytes)

    def _check(self, address: int, nbytes: int) -> None:
        """No copy leaves an allocation."""
        for start, raw in list(self.live.items()):
            if start <= address and address + nbytes <= start + len(raw) - 64:
                return
        raise AssertionError(f"{nbytes} bytes at {address:#x} are in no allocation")


class WrongChip(SharedChip):
    """It adds wrongly."""

    def kernels(self) -> dict[str, Any]:
        def add(a: Any, b: Any, *, alpha: float = 1) -> Any:
            if not (hasattr(a, "shape") and a.dim() and a.is_floating_point()):
                return NotImplemented
            return a.sub(b, alpha=-alpha).mul(1.01)

        return {"aten::add.Tensor": add}


CHIPS = {"shared": SharedChip, "visible": VisibleChip, "opaque": OpaqueChip, "wrong": WrongChip}
