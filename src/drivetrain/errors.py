"""One exception tree. Each message says what was asked, what happened and what to do."""

from __future__ import annotations

from typing import Any


class DrivetrainError(Exception):
    """Base of everything that Drivetrain raises on purpose."""


class BadInput(DrivetrainError, ValueError):
    """What the caller asked for cannot be meant; nothing was changed. The CLI exits 2."""


class HalError(DrivetrainError, RuntimeError):
    """A driver's call failed.

    ``code`` is Drivetrain's word for it, ``native`` and ``native_name`` the vendor's, ``op`` the
    operation and ``device`` its address.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str = "error",
        driver: str = "",
        native: int = 0,
        native_name: str = "",
        op: str = "",
        device: str = "",
    ) -> None:
        super().__init__(message)
        self.code = code
        self.driver = driver
        self.native = native
        self.native_name = native_name
        self.op = op
        self.device = device


class OutOfMemory(HalError, MemoryError):
    """The device (or the host) has not enough memory for the request.

    ``requested``, ``free`` and ``total`` are bytes, 0 where they are not known.
    """

    def __init__(
        self, message: str, *, requested: int = 0, free: int = 0, total: int = 0, **facts: Any
    ) -> None:
        super().__init__(message, **facts)
        self.requested = requested
        self.free = free
        self.total = total


class CompileError(HalError):
    """A kernel's source cannot be compiled for the target; ``log`` names the line."""

    def __init__(self, message: str, *, log: str = "", **facts: object) -> None:
        super().__init__(message, **facts)  # type: ignore[arg-type]
        self.log = log


class DeviceLost(HalError):
    """The device is gone for this process. Sticky: only another process may use it again."""


class Unsupported(HalError, NotImplementedError):
    """The driver does not have the capability that was asked for."""


class DriverMissing(HalError):
    """The vendor's library is not installed."""


class Timeout(HalError, TimeoutError):
    """A wait ended at its limit, not with its event."""


class StoreError(DrivetrainError):
    """A journal, checkpoint or state folder cannot be used."""


class DiskFull(StoreError):
    """A disk or quota is full. What was there before still counts; the CLI exits 2."""


class PlacementError(DrivetrainError):
    """No device fits the workload; the message names what ruled each one out."""


class JobError(DrivetrainError):
    """A job cannot do what was asked of it."""


class MigrationError(DrivetrainError):
    """A move did not happen; the source goes on as before."""


class IntegrityError(MigrationError):
    """Bytes that arrived are not the bytes that were sent, or a file is corrupted."""


class CannotCarry(DrivetrainError, TypeError):
    """A piece of state that cannot move to another process; ``path`` names it."""

    def __init__(self, message: str, *, path: str = "") -> None:
        super().__init__(message)
        self.path = path


class Retry(Exception):
    """Raise it in a step, before the optimizer stepped, to have the same step yielded again."""


class Moved(BaseException):
    """The job goes on in another process; this copy unwinds and ends.

    A ``BaseException``, so that ``except Exception`` in a script does not swallow it while
    ``with`` and ``finally`` still close what they hold.
    """
