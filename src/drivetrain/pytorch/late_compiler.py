"""torch's compiler, loaded when something is compiled and not when an optimizer is made.

Optimizers import ``torch._dynamo`` to tell it to leave them alone, which takes nearly as long as
torch itself: time that a job waits for whenever a worker starts in place of another. Until
something else is asked of it, nothing is being traced, so that its `disable` and `graph_break` have
nothing to do; a stand-in answers these two and becomes the real module for anything else.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
import types
from typing import Any

_NAME = "torch._dynamo"
_KEPT = "__dynamo_disable"
"""Where torch keeps what `disable` gave it for a function."""


class _Late(types.ModuleType):
    _lock: threading.RLock
    _left: list[types.FunctionType]

    def __init__(self, file: str | None) -> None:
        super().__init__(_NAME, "Stands for the module until it is needed.")
        own: dict[str, Any] = {"_lock": threading.RLock(), "_left": []}
        own["__file__"] = file  # what looks through all modules for a file must not load it
        self.__dict__.update(own)

    def graph_break(self, msg: str = "") -> None:
        if sys.modules.get(_NAME) is not self:
            self._real().graph_break(msg)

    def disable(self, fn: Any = None, recursive: bool = True, **more: Any) -> Any:
        if sys.modules.get(_NAME) is not self or not isinstance(fn, types.FunctionType):
            return self._real().disable(fn, recursive, **more)
        self._left.append(fn)
        return fn

    def _real(self) -> Any:
        import torch

        with self._lock:
            if sys.modules.get(_NAME) is self:
                del sys.modules[_NAME]
                torch.__dict__.pop("_dynamo", None)
                importlib.import_module(_NAME)
                for fn in self._left:  # torch asks again, and gets what tracing leaves alone
                    fn.__dict__.pop(_KEPT, None)
                self._left.clear()
        return importlib.import_module(_NAME)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in ("__path__", "__all__"):
            raise AttributeError(name)
        return getattr(self._real(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("__"):
            self.__dict__[name] = value
        else:
            setattr(self._real(), name, value)


def load_compiler_late() -> None:
    """From now on this process loads torch's compiler when it is used. Nothing is done where it is
    loaded already, or where torch is not installed."""
    try:
        import torch
    except ImportError:
        return
    if _NAME in sys.modules:
        return
    spec = importlib.util.find_spec(_NAME)
    late = _Late(None if spec is None else spec.origin)
    sys.modules[_NAME] = late
    module: Any = torch
    module._dynamo = late
