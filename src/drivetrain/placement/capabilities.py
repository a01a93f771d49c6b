"""What each device can do, as one table: device x groups and features x types x limits.

A row comes from a device that is *open* in this process, so it says what the open driver says, not
what a product page does. A device that cannot be opened keeps its row, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from drivetrain import hal
from drivetrain.errors import BadInput, HalError
from drivetrain.hal.driver import Limits
from drivetrain.hal.opened import opened
from drivetrain.placement import calibration

__all__ = ["DTYPES", "CapabilityMatrix", "Row"]

DTYPES = (
    "float64", "float32", "float16", "bfloat16",
    "int64", "int32", "int16", "int8", "uint8", "bool",
)  # fmt: skip
_BY_FEATURE = {"float64": "fp64", "float16": "fp16", "bfloat16": "bf16"}
_BY_CONVERSION = ("float16", "bfloat16")


@dataclass(frozen=True)
class Row:
    """One device. ``reason`` says why it is not open; the rest is then what discovery told."""

    device: hal.Device
    memory_bytes: int
    free_bytes: int
    groups: tuple[str, ...] = ()
    """Optional groups of the open device; see ``drivetrain.hal.driver.GROUPS``."""
    features: tuple[str, ...] = ()
    """Words of its target: ``fp64``, ``subgroups``, ``binary_only``, ..."""
    target: str = ""
    """What kernels are compiled for: ``cuda sm_90``, ``opencl 3.0``."""
    dtypes: tuple[tuple[str, str], ...] = ()
    """(type, ``native`` or ``converted``): converted ones are stored so and computed in float32.
    A type that is not here cannot be computed in."""
    limits: Limits | None = None
    flops: tuple[tuple[str, float], ...] = ()
    """(type, operations/s) as ``drivetrain calibrate`` measured; empty where it did not."""
    copy_gbps: float | None = None
    launch_us: float | None = None
    links: tuple[tuple[str, float], ...] = ()
    """(another device's uuid or ``to host``/``from host``, measured GB/s)."""
    reason: str = ""

    @property
    def address(self) -> str:
        return self.device.address

    @property
    def memory_domain(self) -> str:
        """Devices with the same answer share one memory."""
        return self.device.memory_domain

    def lacks(
        self, *, needs: Sequence[str] = (), dtype: str = "", threads: int = 0, shared: int = 0
    ) -> str:
        """Why work with these needs cannot run here; empty when it can. ``needs`` are groups and
        features, ``threads`` those of one block, ``shared`` bytes of one block."""
        if self.reason:
            return self.reason
        absent = [each for each in needs if each not in (*self.groups, *self.features)]
        if absent:
            return f"it has no {', '.join(absent)}"
        if dtype and "compute" in needs and dtype not in dict(self.dtypes):
            return f"it does not compute in {dtype}"
        if self.limits is not None and threads > self.limits.threads:
            return f"a block has at most {self.limits.threads} threads there, not {threads}"
        if self.limits is not None and shared > self.limits.shared_bytes:
            return f"a block has at most {self.limits.shared_bytes} shared bytes there"
        return ""


@dataclass(frozen=True)
class CapabilityMatrix:
    """Rows in the order of the devices."""

    rows: tuple[Row, ...]

    @classmethod
    def of(cls, devices: Sequence[hal.Device | str] | None = None) -> CapabilityMatrix:
        """Opens the devices (None: all that are listed) in this process. Raises BadInput for an
        address that names nothing and for a device given twice."""
        given = hal.devices() if devices is None else devices
        found = [hal.device(each) if isinstance(each, str) else each for each in given]
        if len(set(found)) < len(found):
            raise BadInput(f"a device is named twice in {', '.join(map(str, found))}")
        return cls(tuple(_row(each) for each in found))

    def __getitem__(self, address: str) -> Row:
        for row in self.rows:
            if row.address == address:
                return row
        raise KeyError(address)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def as_json(self) -> dict[str, Any]:
        return {"devices": [_json(row) for row in self.rows]}


def _json(row: Row) -> dict[str, Any]:
    found = {each.name: getattr(row, each.name) for each in fields(row) if each.name != "device"}
    for name in ("dtypes", "flops", "links"):
        found[name] = dict(found[name])
    found["limits"] = asdict(row.limits) if row.limits else None
    device = row.device
    return {"address": device.address, "name": device.name, "vendor": device.vendor, **found}


def _row(device: hal.Device) -> Row:
    memory, info = device.memory(), device.info
    try:
        backend = opened(device).backend
    except HalError as error:
        return Row(
            device, memory.total_bytes, memory.free_bytes, info.capabilities.groups,
            reason=f"it cannot be opened: {error}",
        )  # fmt: skip
    known = calibration.load(device)
    target = backend.target
    free, total = backend.memory()
    return Row(
        device,
        total,
        free,
        groups=tuple(sorted(backend.groups)),
        features=target.features,
        target=f"{target.kind} {target.arch}".strip(),
        dtypes=_dtypes(target.features) if "compute" in backend.groups else (),
        limits=backend.limits if "compute" in backend.groups else None,
        flops=tuple(known.peak_flops.items()) if known else (),
        copy_gbps=known.copy_gbps or None if known else None,
        launch_us=known.launch_us or None if known else None,
        links=tuple(known.links.items()) if known else (),
    )


def _dtypes(features: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """A type that is optional in the target's language is native by its feature's word."""
    found = []
    for dtype in DTYPES:
        if dtype not in _BY_FEATURE or _BY_FEATURE[dtype] in features:
            found.append((dtype, "native"))
        elif dtype in _BY_CONVERSION:
            found.append((dtype, "converted"))
    return tuple(found)
