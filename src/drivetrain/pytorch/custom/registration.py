"""`register_custom_device`: a chip becomes a torch device."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch

from drivetrain.errors import BadInput
from drivetrain.hal.device import Device
from drivetrain.pytorch.custom import (
    accelerator,
    autocast,
    distributed,
    dlpack_export,
    dynamo,
    lazy,
    sparse,
    storage,
    streams,
)
from drivetrain.pytorch.custom.backward import one_thread
from drivetrain.pytorch.custom.config import NOT_RENAMED, Config, name_of
from drivetrain.pytorch.custom.hal_backend import HalBackend
from drivetrain.pytorch.custom.namespace import Namespace
from drivetrain.pytorch.custom.operations import Registrar
from drivetrain.pytorch.custom.runtime import Runtime
from drivetrain.pytorch.custom.table import Fallbacks

_NEEDED = ("device_count", "synchronize")
_OWN_MEMORY = ("alloc", "free")
_OPAQUE = ("copy_in", "copy_out", "copy_within")
_MOST_DEVICES = 64
_PRIVATE = (
    "torch.utils.backend_registration._setup_privateuseone_for_python_backend",
    "torch._C._to_dlpack",
    "torch._C._from_dlpack",
    "torch._C._dispatch_get_all_op_names",
    "torch._C._ExcludeDispatchKeyGuard",
)
"""What is used of torch's private parts, looked for before anything is changed."""

_lock = threading.Lock()
_handle: Handle | None = None


class Handle:
    """A registered device type. There is one in a process, until it ends."""

    def __init__(self, runtime: Runtime, without_shim: str) -> None:
        self._runtime = runtime
        self.without_shim = without_shim
        """Why the C++ shim is not in use; empty when it is."""

    @property
    def name(self) -> str:
        """The device type in torch."""
        return self._runtime.name

    @property
    def device(self) -> torch.device:
        """The first device."""
        return torch.device(self.name, 0)

    @property
    def devices(self) -> tuple[torch.device, ...]:
        return tuple(torch.device(self.name, index) for index in range(self._runtime.count))

    @property
    def backends(self) -> tuple[Any, ...]:
        return self._runtime.backends

    @property
    def fallbacks(self) -> Fallbacks:
        """Which operations left the device, and how often."""
        return self._runtime.fallbacks

    @property
    def shim(self) -> bool:
        """Whether the C++ shim is in use."""
        return self._runtime.shim is not None

    def __repr__(self) -> str:
        how = "with the C++ shim" if self.shim else "pure Python"
        return f"<{self.name}: {self._runtime.count} device(s), {how}>"


def register_custom_device(backend: Any, config: Config | None = None) -> Handle:
    """Make ``backend`` a device type of torch's, for the rest of the process.

    ``backend`` is an object of `drivetrain.pytorch.custom.protocol`, a HAL device or its address
    (``"opencl:0"``), or a sequence of them: their devices get the indices 0, 1, ... in that order.

    The same call again gives the same handle. Raises BadInput, before torch is touched, for a name
    that torch cannot take, a backend that lacks methods or has kernels for unknown operations, and
    when the process has another such device already: torch has one place for them, and no way back.
    """
    global _handle
    config = Config() if config is None else config
    if not isinstance(config, Config):
        raise BadInput(f"config is a {type(config).__name__}; give a Config")
    with _lock:
        given = _given(backend)
        if _handle is not None:
            return _again(_handle, given, config)
        _check_torch()
        backends = _backends(given, config)
        runtime = Runtime(name_of(config, backends[0]), backends, config)
        registrar = Registrar(runtime)
        _check_free()
        _handle = _registered(runtime, registrar)
        _handle_given[:] = given
        return _handle


_handle_given: list[Any] = []


def registered() -> Handle | None:
    """The handle of this process's custom device; None while there is none."""
    return _handle


def _given(backend: Any) -> list[Any]:
    """What was given, one after another; addresses are the devices that they name."""
    from drivetrain import hal

    several = backend if isinstance(backend, (list, tuple)) else (backend,)
    return [hal.device(each) if isinstance(each, str) else each for each in several]


def _again(handle: Handle, given: Sequence[Any], config: Config) -> Handle:
    same = len(given) == len(_handle_given) and all(
        one is other or (isinstance(one, Device) and one == other)
        for one, other in zip(given, _handle_given, strict=True)
    )
    if same and config.name in (None, handle.name):
        return handle
    raise BadInput(
        f"this process has the custom device {handle.name!r} already; torch has one place for such "
        "devices and cannot free it. Register several backends at once: "
        "register_custom_device([first, second])"
    )


def _check_torch() -> None:
    for path in _PRIVATE:
        found: Any = torch
        for part in path.split(".")[1:]:
            found = getattr(found, part, None)
            if found is None:
                raise BadInput(
                    f"torch {torch.__version__} has no {path}, which custom devices need; use "
                    "torch 2.11 to 2.14"
                )


def _check_free() -> None:
    taken = torch._C._get_privateuse1_backend_name()
    if taken != NOT_RENAMED:
        raise BadInput(
            f"another package has made {taken!r} this process's custom device; torch has one place "
            f"for them. Use torch.device({taken!r}) as it is "
            "(drivetrain.pytorch.devices adopts it), or start without that package"
        )


def _backends(given: Sequence[Any], config: Config) -> tuple[Any, ...]:
    """Checked; HAL devices in a row make one backend."""
    from drivetrain import hal

    if not given:
        raise BadInput("register_custom_device was given no backend")
    found: list[Any] = []
    devices: list[hal.Device] = []
    for each in given:
        if isinstance(each, hal.Device):
            devices.append(each)
            continue
        found.append(each)
    if devices and found:
        raise BadInput("HAL devices and other backends do not go together as one device type")
    if devices:
        if len({each.driver for each in devices}) > 1:
            raise BadInput(f"{', '.join(map(str, devices))}: devices of one type are of one driver")
        found = [HalBackend(devices)]
    for each in found:
        _check(each)
    total = sum(each.device_count() for each in found)
    if total > _MOST_DEVICES:
        raise BadInput(f"{total} devices; at most {_MOST_DEVICES}")
    return tuple(found)


def _check(backend: Any) -> None:
    kind = type(backend).__name__
    if isinstance(backend, type):
        raise BadInput(f"{backend.__name__} is a class; give an object of it")
    visible = getattr(backend, "host_visible", None)
    if not isinstance(visible, bool):
        raise BadInput(
            f"a {kind} does not say host_visible = True or False: may the host touch its memory?"
        )
    needed = list(_NEEDED)
    if not visible or any(hasattr(backend, name) for name in _OWN_MEMORY):
        needed += _OWN_MEMORY
    if not visible:
        needed += _OPAQUE
    missing = [name for name in needed if not callable(getattr(backend, name, None))]
    if missing:
        raise BadInput(
            f"a {kind} lacks {', '.join(missing)}; a "
            f"{'host-visible' if visible else 'opaque'} backend has {', '.join(needed)} "
            "(drivetrain.pytorch.custom.protocol)"
        )
    count = backend.device_count()
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise BadInput(f"device_count() of a {kind} gives {count!r}; give a number of 1 or more")


def _registered(runtime: Runtime, registrar: Registrar) -> Handle:
    from drivetrain.pytorch.custom import shim  # also a program, by python -m

    private: Any = torch
    reason = shim.use(runtime)
    module = Namespace(runtime)
    if runtime.shim is None:
        setup = private.utils.backend_registration._setup_privateuseone_for_python_backend
        accelerator.remember()
        setup(runtime.name, backend_module=module)
        if runtime.count > 1:
            one_thread()
    else:
        accelerator.remember()
        private.utils.rename_privateuse1_backend(runtime.name)
        private._register_device_module(runtime.name, module)
        streams.register(runtime, module)
        private.utils.generate_methods_for_privateuse1_backend(for_storage=False)
    if not hasattr(torch.UntypedStorage, runtime.name):
        private.utils.generate_methods_for_privateuse1_backend(
            for_tensor=False, for_module=False, for_packed_sequence=False, for_storage=True
        )
    registrar.all()
    autocast.register(runtime)
    storage.register(runtime)
    accelerator.register(runtime, module)
    if runtime.config.keep_parameters:
        torch.__future__.set_swap_module_params_on_conversion(True)
    _optional(runtime)
    return Handle(runtime, reason)


def _optional(runtime: Runtime) -> None:
    """What torch is told last: an exporter, a compiler, collectives."""
    dlpack_export.register(runtime)
    lazy.register(runtime.name)
    sparse.register(runtime)
    dynamo.register(runtime)
    distributed.register(runtime)
