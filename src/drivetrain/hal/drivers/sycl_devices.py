"""What SYCL lists, and which device of OpenCL or Level Zero each of it is.

SYCL tells neither a uuid nor a place on the bus. Every device of it is one of another interface,
its *backend*, in that interface's order: there the rest is asked for.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from drivetrain.errors import HalError
from drivetrain.hal.drivers import level_zero_api, opencl_api, opencl_platforms
from drivetrain.hal.drivers import opencl_loader as loader
from drivetrain.hal.drivers.level_zero import on_the_bus
from drivetrain.hal.drivers.level_zero_api import Ze
from drivetrain.hal.drivers.level_zero_backend import Seen as ZeDevice
from drivetrain.hal.drivers.level_zero_backend import seen as level_zero_devices
from drivetrain.hal.drivers.opencl_api import Cl
from drivetrain.hal.drivers.opencl_platforms import Found
from drivetrain.hal.drivers.sycl_api import Api, Aspect, Dp


@dataclass(frozen=True)
class Seen:
    """A device as SYCL shows it."""

    api: Api
    handle: int
    backend: str
    """``opencl``, ``level_zero`` or another."""
    platform: str
    name: str
    driver_version: str
    is_processor: bool
    has_usm: bool
    ordinal: int
    """Among devices of the same name on the platform, from 0."""
    cl: Found | None = None
    """The same device as OpenCL shows it."""
    ze: ZeDevice | None = None
    """The same device as Level Zero shows it."""

    @property
    def uuid(self) -> str:
        """The backend's own, so that routes to one device are known as that."""
        if self.cl is not None:
            return self.cl.known_as
        if self.ze is not None:
            return self.ze.uuid
        slug = re.sub(r"[^a-z0-9]+", "-", f"{self.platform} {self.name}".lower()).strip("-")
        return f"SYCL-{slug}-{self.ordinal}"

    @property
    def pci(self) -> str:
        if self.cl is not None:
            return self.cl.pci
        return on_the_bus(self.ze.pci) if self.ze is not None else ""

    def delete(self) -> None:
        """Let go of SYCL's own handle."""
        self.api.DPCTLDevice_Delete(self.handle)

    @property
    def shares_host(self) -> bool:
        """Whether its memory is the host's."""
        if self.cl is not None:
            return self.is_processor or bool(self.cl.number(Cl.DEVICE_HOST_UNIFIED_MEMORY))
        integrated = Ze.DEVICE_PROPERTY_FLAG_INTEGRATED
        return self.is_processor or bool(self.ze and self.ze.facts.flags & integrated)

    def has(self, aspect: int) -> bool:
        return bool(self.api.DPCTLDevice_HasAspect(self.handle, aspect))


def seen(api: Api) -> list[Seen]:
    """Every device, in SYCL's order; a GPU that two backends show once, as OpenCL's, which takes
    kernels in OpenCL C. Loads the vendors' libraries, which may hang or crash."""
    # OpenCL first: SYCL then goes through the loader that is there, with all platforms registered.
    cl = _opencl()
    with loader.registered():
        listed = _listed(api)
    ze = _level_zero() if any(each.backend == "level_zero" for each in listed) else []
    found = [_joined(each, listed, cl, ze) for each in listed]
    places = {each.pci[-12:] for each in found if each.backend == "opencl" and each.pci}
    twice = [each for each in found if each.backend != "opencl" and each.pci[-12:] in places]
    for each in twice:
        each.delete()
    return [each for each in found if each not in twice]


def _opencl() -> list[Found]:
    try:
        return opencl_platforms.devices(opencl_api.load())
    except HalError:
        return []  # SYCL has a loader of its own; it shows devices that only it knows


def _level_zero() -> list[ZeDevice]:
    try:
        return level_zero_devices(level_zero_api.load())
    except HalError:
        return []


def _listed(api: Api) -> list[Seen]:
    vector = api.DPCTLDeviceMgr_GetDevices(Dp.ALL_BACKENDS | Dp.ALL)
    if not vector:
        return []
    found: list[Seen] = []
    backends = {Dp.OPENCL: "opencl", Dp.LEVEL_ZERO: "level_zero"}
    for at in range(api.DPCTLDeviceVector_Size(vector)):
        handle = api.DPCTLDeviceVector_GetAt(vector, at)
        if not handle:
            continue
        platform = api.DPCTLDevice_GetPlatform(handle)
        kind = api.DPCTLDevice_GetDeviceType(handle)
        each = Seen(
            api,
            int(handle),
            backends.get(api.DPCTLDevice_GetBackend(handle), "another"),
            api.text(api.DPCTLPlatform_GetName, platform),
            api.text(api.DPCTLDevice_GetName, handle),
            api.text(api.DPCTLDevice_GetDriverVersion, handle),
            is_processor=kind == Dp.CPU,
            has_usm=bool(api.DPCTLDevice_HasAspect(handle, Aspect.usm_device_allocations)),
            ordinal=0,
        )
        if platform:
            api.DPCTLPlatform_Delete(platform)
        same = [o for o in found if _alike(o, each)]
        found.append(replace(each, ordinal=len(same)))
    api.DPCTLDeviceVector_Delete(vector)
    return found


def _alike(one: Seen, other: Seen) -> bool:
    return (one.backend, one.platform, one.name) == (other.backend, other.platform, other.name)


def _joined(each: Seen, listed: list[Seen], cl: list[Found], ze: list[ZeDevice]) -> Seen:
    """The device with what its backend knows of it; as it is where the two lists do not fit."""
    count = sum(_alike(each, other) for other in listed)
    if each.backend == "opencl":
        fits = [
            other for other in cl if (other.platform.name, other.name) == (each.platform, each.name)
        ]
        if len(fits) == count:
            return replace(each, cl=fits[each.ordinal])
    if each.backend == "level_zero":
        named = [o for o in ze if o.facts.name.decode(errors="replace").strip() == each.name]
        if len(named) == count:
            return replace(each, ze=named[each.ordinal])
    return each
