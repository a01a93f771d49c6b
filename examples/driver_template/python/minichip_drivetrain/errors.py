"""This driver's errors: each names the call and the chip."""

from drivetrain.errors import HalError, OutOfMemory, Unsupported

FACTS = {"driver": "minichip"}


def unsupported(op: str) -> Unsupported:
    return Unsupported(f"{op}: minichip does not have this yet", code="unsupported", op=op, **FACTS)


def failed(op: str, why: str, code: str = "error") -> HalError:
    return HalError(f"{op}: {why}", code=code, op=op, **FACTS)


def full(nbytes: int, free: int, total: int) -> OutOfMemory:
    return OutOfMemory(
        f"alloc: {nbytes} bytes on a chip that has {free} of {total} free",
        code="out_of_memory", op="alloc", requested=nbytes, free=free, total=total, **FACTS,
    )  # fmt: skip
