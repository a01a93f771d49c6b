"""Facts about a device: frozen, hashable, and the same words for every vendor."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from drivetrain.hal.memory import MemoryInfo
from drivetrain.hal.telemetry import Telemetry


@dataclass(frozen=True)
class Capabilities:
    """What a device can do, as far as it can be known without a compute context.

    ``None`` and empty mean "not told", never "none".
    """

    compute: str = ""
    """The vendor's word for the instruction set: ``9.0`` (CUDA), ``x86-64-v4``, ``armv8``."""
    cores: int | None = None
    """CPU: logical cores that may be used. GPU: scalar cores."""
    physical_cores: int | None = None
    multiprocessors: int | None = None
    features: tuple[str, ...] = ()
    """SIMD and matrix features of a CPU (``avx512_bf16``, ``amx_tile``, ``neon``), and ``mig``."""
    caches: tuple[tuple[str, int], ...] = ()
    """(name, bytes): ``l1d`` and ``l2`` of one core, ``l3`` of the whole device."""
    clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    nvlinks: int | None = None
    """Active NVLinks."""
    peers: tuple[str, ...] = ()
    """PCI addresses of what the NVLinks lead to (a switch counts once)."""
    peer_uuids: tuple[str, ...] = ()
    """Devices whose memory this one can read over NVLink."""
    groups: tuple[str, ...] = ()
    """The driver's optional groups (see ``drivetrain.hal.driver.GROUPS``)."""

    def as_json(self) -> dict[str, Any]:
        facts = {name: getattr(self, name) for name in self.__dataclass_fields__}
        facts["caches"] = dict(self.caches)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in facts.items()}


@dataclass(frozen=True)
class Isolation:
    """What a worker process needs so that it sees only this device."""

    environment: dict[str, str] = field(default_factory=dict, hash=False)
    """Set these over the inherited environment."""
    cpus: tuple[int, ...] | None = None
    """Restrict the process to these cores; ``None`` leaves its affinity alone."""
    threads: int = 1
    torch_device: str = "cpu"
    """The device's name in that worker's torch."""


@dataclass(frozen=True)
class DeviceInfo:
    """What a driver found. ``uuid`` is unique on the machine and stable over reboots."""

    driver: str
    index: int
    name: str
    vendor: str
    uuid: str
    pci: str = ""
    """``00000000:18:00.0`` or empty."""
    memory_bytes: int = 0
    memory_domain: str = ""
    """Devices of one domain share one memory: their leases share one pool. Empty: its own."""
    driver_version: str = ""
    numa_node: int | None = None
    parent_uuid: str = ""
    """The GPU that a MIG instance is a part of."""
    fault: str = ""
    """Why the driver itself calls the device unusable; empty when it does not."""
    capabilities: Capabilities = field(default_factory=Capabilities)
    isolation: Isolation = field(default_factory=Isolation)
    telemetry: Telemetry = field(default_factory=Telemetry, hash=False, compare=False)
    """As read at discovery."""


@dataclass(frozen=True)
class Device:
    """One route to a device. Made by ``drivetrain.hal.device`` and ``devices`` only."""

    address: str
    info: DeviceInfo = field(hash=False, compare=False, repr=False)
    uuid: str
    routes: tuple[str, ...] = field(default=(), hash=False, compare=False)
    """Addresses of every route to this physical device, the preferred one first."""

    @property
    def driver(self) -> str:
        return self.info.driver

    @property
    def index(self) -> int:
        return self.info.index

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def vendor(self) -> str:
        return self.info.vendor

    @property
    def capabilities(self) -> Capabilities:
        return self.info.capabilities

    @property
    def memory_domain(self) -> str:
        """Devices with the same answer share one memory."""
        return self.info.memory_domain or self.uuid

    def telemetry(self) -> Telemetry:
        """Sensors now. Never raises for a sensor that is absent, never takes more than 2 s."""
        from drivetrain.hal import registry

        return registry.telemetry(self)

    def memory(self) -> MemoryInfo:
        """Bytes now: total, used, free. Where nothing can be read, ``used`` is 0."""
        now = self.telemetry()
        total = now.memory_total_bytes or self.info.memory_bytes
        used = min(total, now.memory_used_bytes or 0)
        return MemoryInfo(total_bytes=total, used_bytes=used, free_bytes=total - used)

    def isolation(self) -> Isolation:
        return self.info.isolation

    def __str__(self) -> str:
        return self.address

    def __reduce__(self) -> tuple[Any, ...]:
        return (Device, (self.address, self.info, self.uuid, self.routes))
