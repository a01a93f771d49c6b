"""What the cpu device's C code and its twin answer, as errors of the one tree."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

from drivetrain.errors import CompileError, HalError, OutOfMemory


class Status(IntEnum):
    """``dt_cpu_status`` of ``drivetrain_hal.h``."""

    OK = 0
    LATE = 1
    FAILED = 2
    NO_MEMORY = 3
    INVALID = 4
    FORKED = 5
    CLOSED = 6
    ALLOWANCE = 7
    DAMAGED = 8
    REJECTED = 9


_CODES = {
    Status.FAILED: "kernel_failed",
    Status.NO_MEMORY: "out_of_memory",
    Status.FORKED: "forked",
    Status.CLOSED: "closed",
    Status.INVALID: "invalid",
}


def _message(device: str, op: str, status: Status, text: str) -> str:
    if status is Status.FAILED:
        return f"{op}: work that was queued on {device} failed: {text}"
    if status is Status.NO_MEMORY:
        return f"{op}: the host has no memory left on {device}" + (f": {text}" if text else "")
    if status is Status.FORKED:
        return (
            f"{op}: {device} was opened before this process was forked, and its threads are in the "
            "other one; start the process anew (the start method `spawn` of multiprocessing)"
        )
    if status is Status.CLOSED:
        return f"{op}: {device}, or what was handed in, is closed; open it and make it anew"
    if status is Status.REJECTED:
        return f"{op}: the loader does not take the code on {device}: {text}"
    if op == "free":
        return f"free: {device} has no allocation at this address, or it was freed before"
    return f"{op}: an argument cannot be meant on {device}" + (f": {text}" if text else "")


def error(device: str, op: str, status: int, native: int, text: str) -> HalError:
    """The error for a status. ``native`` is what a kernel returned, ``text`` says more."""
    status = Status(status)
    message = _message(device, op, status, text)
    facts: dict[str, Any] = {
        "driver": "cpu",
        "op": op,
        "device": device,
        "native_name": status.name,
    }
    if status is Status.REJECTED:
        return CompileError(message, log=text, code="compile", native=native, **facts)
    kind = OutOfMemory if status is Status.NO_MEMORY else HalError
    return kind(message, code=_CODES.get(status, "error"), native=native, **facts)
