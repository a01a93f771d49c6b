"""Backward on the second device and beyond, without the C++ shim.

torch's autograd starts a thread a device, and Python's device guard says that there is one device:
backward on another one ends in an internal assertion of torch's. On the calling thread it works.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch


def one_thread() -> None:
    """From here on backward runs on the thread that asks for it."""
    engine: Any = torch.autograd.graph._engine_run_backward

    @wraps(engine)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.autograd.set_multithreading_enabled(False):
            return engine(*args, **kwargs)

    torch.autograd.graph._engine_run_backward = run
    torch.autograd._engine_run_backward = run  # type: ignore[attr-defined]
