"""`HardwarePluginManager`: what hardware there is, drivers' and plug-ins', and which part of a
computation goes where."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

from drivetrain.errors import BadInput
from kernel_pytorch._kept import kept
from kernel_pytorch.hardware_abstraction.hal_core import (
    DeviceSpec,
    HardwareCapabilities,
    devices,
)
from kernel_pytorch.hardware_abstraction.planning import ExecutionPlan, Work, plan, work_of

__all__ = ["ExecutionPlan", "HardwarePlugin", "HardwarePluginManager", "Work"]

_MOST_PLUGINS = 256


@runtime_checkable
class HardwarePlugin(Protocol):
    """What a plug-in has: a name, and devices. Every `VendorAdapter` with a ``name`` is one."""

    name: str

    def discover_devices(self) -> list[DeviceSpec]: ...


class HardwarePluginManager:
    """Kept for the guide. Now: drivers (docs/write_a_driver.md), found by `drivetrain.hal`.

    Drivetrain's drivers, those from outside included, need no registration here.
    """

    def __init__(self) -> None:
        kept("kernel_pytorch.HardwarePluginManager", "drivetrain.hal.drivers() and devices()")
        self.plugins: dict[str, Any] = {}

    def register_plugin(self, plugin: HardwarePlugin | Any) -> None:
        """Add hardware that no driver of Drivetrain finds: an object with ``discover_devices()``,
        called ``plugin.name``, else by its class. Raises BadInput for anything else, and for a
        name that another plug-in has."""
        if not callable(getattr(plugin, "discover_devices", None)):
            raise BadInput(
                f"a {type(plugin).__name__} is no plug-in: it has no discover_devices(). Subclass "
                "VendorAdapter, or write a driver (docs/write_a_driver.md)"
            )
        name = str(getattr(plugin, "name", "") or type(plugin).__name__)
        if self.plugins.get(name, plugin) is not plugin:
            raise BadInput(f"there is a plug-in {name!r} already; give this one another name")
        if len(self.plugins) >= _MOST_PLUGINS:
            raise BadInput(f"more than {_MOST_PLUGINS} plug-ins")
        self.plugins[name] = plugin

    def discover_capabilities(self) -> dict[str, HardwareCapabilities]:
        """Address -> what the device offers: of every driver's usable devices, then plug-ins'."""
        return {spec.address: spec.capabilities for spec in self._devices()}

    def create_execution_plan(self, computation_graph: Any) -> ExecutionPlan:
        """Which device each node of a computation runs on, so that it ends as early as it can.

        ``computation_graph`` is an ``nn.Module`` that torch.fx can trace, a ``GraphModule``, an
        ``ExportedProgram`` (its shapes give the work of each node), or an iterable of `Work`. See
        `planning.plan` for what is estimated. Raises BadInput for anything else.
        """
        return plan(work_of(computation_graph), list(self._devices()))

    def _devices(self) -> Iterator[DeviceSpec]:
        seen = set()
        for spec in devices():
            seen.add(spec.address)
            yield spec
        for plugin in self.plugins.values():
            for spec in plugin.discover_devices():
                if spec.address not in seen:
                    seen.add(spec.address)
                    yield spec
