"""The optional C++ part: an allocator, a device guard, generators and views in C++.

``python -m drivetrain.pytorch.custom.shim`` builds it and says where it is; ``shim="require"`` does
so when a device is registered. With ``shim="auto"`` it is used where it was built before, and
nothing is ever compiled.
"""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from drivetrain.errors import Unsupported
from drivetrain.pytorch.custom.runtime import Runtime
from drivetrain.pytorch.custom.shim_build import MODULE, CannotBuild, built, check, ready

_HOW = "python -m drivetrain.pytorch.custom.shim"


def use(runtime: Runtime) -> str:
    """Load the shim as the configuration says, and give it the devices. Gives the reason why it is
    not in use, or nothing. Raises Unsupported where it is required and cannot be had."""
    wanted = runtime.config.shim
    if wanted == "off":
        return "switched off"
    try:
        path = built() if wanted == "require" else ready()
        if path is None:
            check()
            return f"it has not been built for this torch and this Python; build it with: {_HOW}"
        native = _loaded(path)
    except CannotBuild as error:
        if wanted == "auto":
            return str(error)
        raise Unsupported(
            f"shim='require': {error}. Or register with shim='auto'; docs/custom_devices.md tells "
            "what is not there without the shim",
            code="unsupported",
            driver=runtime.name,
            op="register_custom_device",
        ) from error
    _start(native, runtime)
    return ""


def _loaded(path: Path) -> Any:
    spec = spec_from_file_location(MODULE, path)
    assert spec is not None
    assert spec.loader is not None
    try:
        native = module_from_spec(spec)
        spec.loader.exec_module(native)
    except ImportError as error:
        raise CannotBuild(f"{path} cannot be loaded: {error}; delete it") from error
    return native


def _start(native: Any, runtime: Runtime) -> None:
    devices = tuple(memory.for_native() for memory in runtime.memories)
    native.start(devices, tuple(runtime.generators), runtime.synchronize, runtime.memory_info)
    runtime.shim = native
    for memory in runtime.memories:
        memory.native = native


def main() -> int:
    """Build it, or find it built."""
    try:
        print(built())
    except CannotBuild as error:
        print(f"drivetrain: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
