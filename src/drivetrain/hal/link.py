"""How two devices reach each other's memory, and how fast."""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import Enum
from statistics import median
from typing import TYPE_CHECKING

from drivetrain.errors import HalError
from drivetrain.hal import config, copies
from drivetrain.hal.kinds import Kind
from drivetrain.hal.memory import Buffer

if TYPE_CHECKING:
    from drivetrain.hal.device import Device

FILE = "links.json"
_SAMPLE_BYTES = 64 << 20
_ROUNDS = 5


class LinkKind(Enum):
    """How a copy goes from one device to another."""

    SAME = "same"
    PEER = "peer"
    """One reads the other's memory."""
    IPC = "ipc"
    """The same, between processes that do not see each other's device."""
    STAGED = "staged"
    """Through pinned host memory, in overlapping chunks."""
    NONE = "none"
    """Not at all in this process."""


@dataclass(frozen=True)
class Link:
    """The way from one device to another."""

    kind: LinkKind
    bandwidth_gbps: float | None = None
    """GB/s (1e9 bytes), the median of a few copies of 64 MiB; None where nothing was measured."""
    reason: str = ""
    """Why there is no way."""


def link(source: Device, target: Device) -> Link:
    """How bytes go from ``source`` to ``target``; measured once and kept per pair of devices and
    driver versions."""
    from drivetrain.hal.opened import opened

    try:
        src, dst = opened(source), opened(target)
    except HalError as error:
        return Link(LinkKind.NONE, None, str(error))
    if src is dst:
        kind = LinkKind.SAME
    elif copies.direct(src, dst):
        kind = LinkKind.PEER
    elif "pinned" in src.backend.groups or "pinned" in dst.backend.groups:
        kind = LinkKind.STAGED
    else:
        return Link(LinkKind.NONE, None, "neither device has pinned host memory to stage through")
    path = config.state_folder() / FILE
    key = "|".join(
        (
            source.uuid,
            target.uuid,
            source.info.driver_version,
            target.info.driver_version,
            kind.value,
        )
    )
    known = config.read_json(path).get(key)
    if isinstance(known, (int, float)) and known > 0:
        return Link(kind, float(known))
    try:
        measured = _measured(source, target)
    except HalError as error:
        return Link(kind, None, f"not measured: {error}")
    try:
        config.change_json(path, lambda known: {**known, key: measured})
    except OSError:
        pass  # the next one measures again
    return Link(kind, measured)


def _measured(source: Device, target: Device) -> float:
    from drivetrain.hal.opened import opened

    src, dst = opened(source), opened(target)
    near, far = src.inner_stream("copy"), dst.inner_stream("copy")
    seconds = []
    with (
        Buffer.of(src, _SAMPLE_BYTES, Kind.DEVICE, near) as a,
        Buffer.of(dst, _SAMPLE_BYTES, Kind.DEVICE, far) as b,
    ):
        a.fill(b"\x5a", stream=near)
        near.synchronize()
        for _ in range(_ROUNDS + 1):
            began = time.perf_counter()
            b.copy_from(a, stream=far)
            far.synchronize()
            seconds.append(time.perf_counter() - began)
    return round(_SAMPLE_BYTES / median(seconds[1:]) / 1e9, 3)
