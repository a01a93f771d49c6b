"""Drivetrain: one program, any accelerator."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "TrainingJob": "drivetrain.training",
    "device_for_this_job": "drivetrain.training",
    "Runtime": "drivetrain.runtime",
    "Moved": "drivetrain.errors",
    "Retry": "drivetrain.errors",
    "hal": "drivetrain.hal",
    "kernel": "drivetrain.pytorch.kernel",
}

__all__ = ["Moved", "Retry", "Runtime", "TrainingJob", "device_for_this_job", "hal", "kernel"]

if TYPE_CHECKING:
    from drivetrain import hal as hal
    from drivetrain.errors import Moved as Moved
    from drivetrain.errors import Retry as Retry
    from drivetrain.pytorch.kernel import kernel as kernel
    from drivetrain.runtime import Runtime as Runtime
    from drivetrain.training import TrainingJob as TrainingJob
    from drivetrain.training import device_for_this_job as device_for_this_job


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'drivetrain' has no attribute {name!r}")
    module = import_module(home)
    value = module if home == f"drivetrain.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
