"""Facts about a device: frozen, hashable, and the same words for every vendor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from drivetrain.errors import BadInput, Timeout
from drivetrain.hal.kinds import Kind as MemoryKind
from drivetrain.hal.kinds import MemoryInfo
from drivetrain.hal.telemetry import Telemetry

if TYPE_CHECKING:
    from drivetrain.hal.kernel import Module
    from drivetrain.hal.language.source import Source
    from drivetrain.hal.link import Link
    from drivetrain.hal.memory import Buffer
    from drivetrain.hal.resource import MemoryResource
    from drivetrain.hal.stream import Stream
    from drivetrain.hal.telemetry.health import Health


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
    by_name_only: bool = False
    """It is another way to use processors that have a driver of their own, or runs no kernels:
    never the default, and chosen by ``auto`` only when preferred by name."""
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

    def health(self) -> Health:
        """A verdict on the sensors now, with reasons: throttling, memory errors, little memory
        left, lost. As quick as `telemetry`."""
        from drivetrain.hal.telemetry.health import verdict

        return verdict(self.telemetry())

    def memory(self) -> MemoryInfo:
        """Bytes now: total, used, free. Where nothing can be read, ``used`` is 0."""
        now = self.telemetry()
        total = now.memory_total_bytes or self.info.memory_bytes
        used = min(total, now.memory_used_bytes or 0)
        return MemoryInfo(total_bytes=total, used_bytes=used, free_bytes=total - used)

    def isolation(self) -> Isolation:
        return self.info.isolation

    # -- work in this process: the first call opens the device ------------------------------

    def alloc(
        self,
        nbytes: int,
        *,
        stream: Stream,
        kind: MemoryKind = MemoryKind.DEVICE,
        pool: MemoryResource | None = None,
    ) -> Buffer:
        """``nbytes`` of memory, usable on ``stream`` from here on (elsewhere behind an event).

        From the device's caching pool, or from ``pool``. The contents are undefined. Raises
        BadInput, Unsupported (a kind that the device lacks) and OutOfMemory.
        """
        from drivetrain.hal.memory import alloc

        return alloc(self, nbytes, stream=stream, kind=kind, pool=pool)

    def pool(self, kind: MemoryKind = MemoryKind.DEVICE) -> MemoryResource:
        """The pool that `alloc` takes from when none is named: its ``stats()``, its ``trim()``."""
        from drivetrain.hal.opened import opened

        return opened(self).pool(kind)

    def use_pool(self, pool: MemoryResource) -> None:
        """From here on `alloc` takes memory of the pool's kind from ``pool``: one with a limit, or
        with adaptors around it. Raises BadInput when something came from another one already."""
        from drivetrain.hal.opened import opened

        opened(self).use_pool(pool)

    def wrap(
        self, ptr: int, nbytes: int, *, owner: object, kind: MemoryKind = MemoryKind.DEVICE
    ) -> Buffer:
        """Memory that somebody else allocated on this device, as a buffer that keeps ``owner``
        alive. Closing it frees nothing."""
        from drivetrain.hal.memory import Wrapped
        from drivetrain.hal.opened import opened

        right = isinstance(ptr, int) and isinstance(nbytes, int) and 0 <= nbytes < 1 << 48
        if not right or not (0 <= ptr < 1 << 64 and (ptr or not nbytes)):
            raise BadInput(f"wrap: {nbytes!r} bytes at {ptr!r}; give an address and a size")
        found = opened(self)
        # Nobody reads nothing, but a buffer at address 0 is a closed one.
        return Wrapped(found, ptr or found.backend.alignment, nbytes, kind, owner)

    def stream(self, *, priority: int = 0) -> Stream:
        """A new stream; a lower ``priority`` goes first where the device knows priorities."""
        from drivetrain.hal.opened import opened
        from drivetrain.hal.stream import Stream

        if not isinstance(priority, int) or not -(1 << 31) <= priority < 1 << 31:
            raise BadInput(f"stream: a priority of {priority!r}; give a small int, 0 for the usual")
        found = opened(self)
        found.end_streams()
        return Stream(found, found.backend.stream_create(priority))

    def wrap_stream(self, handle: int, *, owner: object) -> Stream:
        """Somebody else's stream of this device (``torch.cuda.Stream.cuda_stream``, a
        ``cudaStream_t``), which ``owner`` keeps alive. Closing it leaves theirs alone."""
        from drivetrain.hal.opened import opened
        from drivetrain.hal.stream import Stream

        if not isinstance(handle, int) or not 0 < handle < 1 << 64:
            raise BadInput(
                f"wrap_stream: a handle of {handle!r}; give a stream of its own (CUDA's default "
                "stream is 1)"
            )
        return Stream(opened(self), handle, owner=(owner,))

    def compile(self, source: Source, *, options: Sequence[str] = ()) -> Module:
        """Compile a kernel source for this device and load it. What was compiled is kept on disk.

        Raises CompileError (its ``log`` names the lines), Unsupported when the compiler is not
        installed or the device takes no kernels, BadInput for an option that is not allowed.
        """
        from drivetrain.hal.kernel import compiled
        from drivetrain.hal.opened import opened

        return compiled(opened(self), source, options)

    def link(self, peer: Device) -> Link:
        """How bytes go from this device to ``peer``, and how fast (measured once and kept)."""
        from drivetrain.hal.link import link

        return link(self, peer)

    def synchronize(self, timeout: float | None = None) -> None:
        """Wait until all that this process queued on the device is done. Raises Timeout after
        ``timeout`` seconds (None: the default of DRIVETRAIN_WAIT_LIMIT_S, 600)."""
        from drivetrain.hal import watch
        from drivetrain.hal.opened import opened
        from drivetrain.hal.stream import wait_limit

        limit, found = wait_limit(timeout), opened(self)
        work = watch.Work("wait", "device.synchronize", found)
        with watch.around(work) if watch.active else watch.NOBODY:
            finished = found.backend.synchronize(limit)
        if not finished:
            raise Timeout(
                f"the work queued on {self.address} was not done within {limit:g} s; it goes on. "
                "Wait again, or raise the limit",
                code="timeout",
                driver=self.driver,
                op="synchronize",
                device=self.address,
            )

    def __str__(self) -> str:
        return self.address

    def __reduce__(self) -> tuple[Any, ...]:
        return (Device, (self.address, self.info, self.uuid, self.routes))
