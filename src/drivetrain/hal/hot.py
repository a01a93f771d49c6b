"""The hot part of the core's objects: in C (``_hot``), or its twin in Python (``_hot_twin``).

``DRIVETRAIN_NATIVE=0`` forces the twin. ``BACKEND`` says which it is: ``native`` or ``python``.
"""

from __future__ import annotations

import os
from types import ModuleType
from typing import TYPE_CHECKING


def _native() -> ModuleType | None:
    if os.environ.get("DRIVETRAIN_NATIVE", "1") == "0":
        return None
    try:
        from drivetrain.hal import _hot
    except ImportError:
        return None
    return _hot


if TYPE_CHECKING:
    from drivetrain.hal._hot_twin import (
        BufferCore,
        EventCore,
        FreeLists,
        GraphCore,
        KernelCore,
        PlanCore,
        StreamCore,
        alloc_method,
        bind,
        bind_event,
        launch_all,
        watch,
    )

    BACKEND = "python"
else:
    _module = _native()
    BACKEND = "python" if _module is None else "native"
    if _module is None:
        from drivetrain.hal import _hot_twin as _module
    FreeLists, StreamCore, BufferCore = _module.FreeLists, _module.StreamCore, _module.BufferCore
    KernelCore, PlanCore = _module.KernelCore, _module.PlanCore
    EventCore, GraphCore = _module.EventCore, _module.GraphCore
    alloc_method, bind, watch = _module.alloc_method, _module.bind, _module.watch
    bind_event, launch_all = _module.bind_event, _module.launch_all

__all__ = [
    "BACKEND",
    "BufferCore",
    "EventCore",
    "FreeLists",
    "GraphCore",
    "KernelCore",
    "PlanCore",
    "StreamCore",
    "alloc_method",
    "bind",
    "bind_event",
    "launch_all",
    "watch",
]
