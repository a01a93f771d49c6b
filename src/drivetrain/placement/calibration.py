"""How fast devices are, measured once in a process of its own and kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from drivetrain.errors import HalError
from drivetrain.hal import config, isolated
from drivetrain.hal.device import Device
from drivetrain.hal.profile import Peaks

FILE = "calibration.json"
LIMIT_S = 180.0

Progress = Callable[[str, float], None]
"""Called with what is being measured and the share done, in [0, 1]."""


@dataclass(frozen=True)
class Calibration:
    """Measured peaks of a device."""

    uuid: str
    driver_version: str
    torch_version: str
    """Of the torch that measured what the HAL could not; empty where there was nothing of that."""
    measured_at: float
    """Unix time, seconds."""
    peak_flops: dict[str, float] = field(default_factory=dict)
    """dtype (``float32``, ``bfloat16``, ``tf32``, ...) -> operations/s of a matrix product."""
    copy_gbps: float = 0.0
    """GB/s (1e9 bytes) copied within the device's memory; each byte counts once."""
    launch_us: float = 0.0
    """Microseconds a small operation takes to issue, in a row of them."""
    links: dict[str, float] = field(default_factory=dict)
    """Where to or from -> GB/s: ``to host``, ``from host`` (pinned), or another device's uuid."""
    measured_with: dict[str, str] = field(default_factory=dict)
    """What was measured (a dtype, ``copy``, ``launch``) -> with what: a BLAS library, ``own`` for
    kernels of ours, or torch; or why it was not measured."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def _key(device: Device) -> str:
    return f"{device.uuid}|{device.info.driver_version}"


def _path(home: Path | None) -> Path:
    return (home or config.state_folder()) / FILE


def load(device: Device, *, home: Path | None = None) -> Calibration | None:
    """What was measured for this device under this driver version, or ``None``."""
    return _read(config.read_json(_path(home)).get(_key(device)))


def _read(entry: Any) -> Calibration | None:
    if not isinstance(entry, dict):
        return None
    try:
        return Calibration(
            uuid=str(entry["uuid"]),
            driver_version=str(entry["driver_version"]),
            torch_version=str(entry["torch_version"]),
            measured_at=float(entry["measured_at"]),
            peak_flops={str(k): float(v) for k, v in entry["peak_flops"].items()},
            copy_gbps=float(entry["copy_gbps"]),
            launch_us=float(entry["launch_us"]),
            links={str(k): float(v) for k, v in entry["links"].items()},
            measured_with={str(k): str(v) for k, v in entry.get("measured_with", {}).items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        return None  # written by another version: measure again


def peaks(device: Device, *, home: Path | None = None) -> Peaks | None:
    """The device's roofline for ``hal.profile(peaks=calibration.peaks)``; None: not measured.

    A kernel's bytes are read and written ones together, a copy's count once: hence twice its GB/s.
    """
    found = load(device, home=home)
    return None if found is None else Peaks(2 * found.copy_gbps, found.peak_flops)


def save(device: Device, calibration: Calibration, *, home: Path | None = None) -> None:
    """Keeps it for `load`; a state folder that cannot be written is a warning."""
    path = _path(home)
    try:
        config.change_json(path, lambda known: {**known, _key(device): calibration.as_json()})
    except OSError as error:
        text = f"what was measured of {device.address} is not kept: {path}: {error}"
        warnings.warn(text, RuntimeWarning, stacklevel=2)


def calibrate(
    device: Device,
    *,
    home: Path | None = None,
    progress: Progress | None = None,
    limit_s: float = LIMIT_S,
) -> Calibration:
    """Measures a device in a worker that sees only it, and keeps the result.

    The HAL's own kernels and the vendor's BLAS measure; types that neither does as the device can
    (bfloat16 on a CPU) are left to torch, where it is installed. Raises HalError with the reason
    when the worker cannot (a device error, no compiler, no end within ``limit_s``).
    """
    found = _measure(
        {"task": "device", "driver": device.driver, "uuid": device.uuid, **_place(device)},
        device.isolation().environment,
        device.address,
        _share(progress, 0.0, 0.9),
        limit_s,
    )
    left = found.get("left", [])
    if left:
        found = {**found, **_with_torch(device, found, left, progress, limit_s)}
    if progress is not None:
        progress("done", 1.0)
    calibration = _read(
        {
            "torch_version": "",
            **found,
            "uuid": device.uuid,
            "driver_version": device.info.driver_version,
            "measured_at": time.time(),
        }
    )
    if calibration is None:
        raise HalError(
            f"calibrating {device.address} gave no usable result",
            code="garbage",
            driver=device.driver,
            op="calibrate",
            device=device.address,
        )
    save(device, calibration, home=home)
    return calibration


def _place(device: Device) -> dict[str, Any]:
    isolation = device.isolation()
    return {
        "torch_device": isolation.torch_device,
        "cpus": isolation.cpus,
        "threads": isolation.threads,
    }


def _share(progress: Progress | None, start: float, end: float) -> Progress | None:
    """Progress of a part of the work."""
    if progress is None:
        return None
    return lambda what, share: (
        progress(what, start + (end - start) * share) if what != "done" else None
    )


def _with_torch(
    device: Device,
    found: dict[str, Any],
    left: list[str],
    progress: Progress | None,
    limit_s: float,
) -> dict[str, Any]:
    """The matrix products in the types that are ``left``, by torch; or why not."""
    request = {"task": "torch", "dtypes": left, **_place(device)}
    environment = device.isolation().environment
    peaks, told = dict(found["peak_flops"]), dict(found.get("measured_with", {}))
    version = ""
    try:
        more = _measure(request, environment, device.address, _share(progress, 0.9, 1.0), limit_s)
    except HalError as error:
        told.update(dict.fromkeys(left, f"not measured: {error}"))
    else:
        peaks.update(more["peak_flops"])
        version = str(more["torch_version"])
        for name in left:
            known = name in more["peak_flops"]
            told[name] = f"torch {version}" if known else "not measured: torch cannot"
    return {"peak_flops": peaks, "measured_with": told, "torch_version": version}


def calibrate_links(
    devices: Sequence[Device],
    *,
    home: Path | None = None,
    progress: Progress | None = None,
    limit_s: float = LIMIT_S,
) -> dict[tuple[str, str], float]:
    """GB/s from each device to each other, by (uuid, uuid), as ``Device.link`` measures it; kept
    with their calibrations.

    One worker sees all of them. MIG instances are left out: no process can use two.
    """
    group = [d for d in devices if not d.info.parent_uuid]
    if len(group) < 2:
        return {}
    environment = {}
    gpus = [device for device in group if device.driver == "cuda"]
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(device.uuid for device in gpus)
    request = {"task": "links", "devices": [[d.driver, d.uuid] for d in group]}
    found = _measure(request, environment, "links", progress, limit_s)
    links: dict[tuple[str, str], float] = {}
    for source, target, gbps in found.get("links", []):
        links[group[source].uuid, group[target].uuid] = float(gbps)
    for device in group:
        known = load(device, home=home)
        if known is not None:
            mine = {to: gbps for (start, to), gbps in links.items() if start == device.uuid}
            merged = Calibration(**{**known.as_json(), "links": {**known.links, **mine}})
            save(device, merged, home=home)
    return links


def _measure(
    request: dict[str, Any],
    environment: dict[str, str],
    what: str,
    progress: Progress | None,
    limit_s: float,
) -> dict[str, Any]:
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "drivetrain.placement.profile", json.dumps(request)],
            env={**os.environ, **environment, "PYTHONPATH": isolated.python_path()},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=complaints,
            start_new_session=True,
        )
        timer = threading.Timer(limit_s, process.kill)
        timer.start()
        result: dict[str, Any] | None = None
        error = ""
        try:
            assert process.stdout is not None
            for line in process.stdout:
                match _parsed(line):
                    case {"progress": str(text), "share": int() | float() as share}:
                        if progress is not None:
                            progress(text, float(share))
                    case {"result": dict(found)}:
                        result = found
                    case {"error": str(text)}:
                        error = text
            process.wait()
        finally:
            timed_out = timer.finished.is_set() and process.returncode not in (0, None)
            timer.cancel()
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
        if result is not None:
            return result
        if timed_out:
            error = f"it did not end within {limit_s:g} s"
        elif not error:
            complaints.seek(0)
            said = complaints.read().decode(errors="replace").strip().splitlines()
            error = said[-1][:300] if said else f"its process ended with {process.returncode}"
    raise HalError(f"calibrating {what} failed: {error}", code="error", op="calibrate", device=what)


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
