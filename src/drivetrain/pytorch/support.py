"""How a job's torch gets at a device, told without importing torch.

A torch build serves one vendor. A device that no build serves, or not the one at hand, becomes
torch's custom device in the worker (`drivetrain.pytorch.devices.use`), with Drivetrain's kernels.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from drivetrain.hal.device import Device

__all__ = ["Build", "Support", "build_of", "support"]

_ASK_S = 20.0
_QUESTION = "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s else '')"
_FIELD = re.compile(
    r"^(__version__|cuda|hip|xpu)\b[^=]*=\s*(?:None|'([^']*)'|\"([^\"]*)\")", re.MULTILINE
)
_SERVED = {"cuda": "cuda", "hip": "hip", "level_zero": "xpu", "sycl": "xpu"}
"""Driver -> what a torch build must have for it."""


@dataclass(frozen=True)
class Build:
    """What an environment's torch was built with."""

    version: str
    serves: frozenset[str]
    """Of ``cuda``, ``hip`` and ``xpu``."""


@dataclass(frozen=True)
class Support:
    """How a job on a device gets at it from torch.

    ``torch_device``: its name there; empty where it is registered when the worker starts
    (``custom``). ``reason``: why torch cannot use the device; empty where it can. ``missing``: why
    a device that some build of torch serves is registered all the same.
    """

    torch_device: str = ""
    custom: bool = False
    reason: str = ""
    missing: str = ""


def support(device: Device, python: str = sys.executable) -> Support:
    """How the torch of the environment of ``python`` gets at a device."""
    own = device.isolation().torch_device
    kind = own.partition(":")[0]
    if device.driver == "cpu":
        return Support(own)
    missing = ""
    if kind not in ("", "cpu"):
        needed = _SERVED.get(device.driver, "")
        build = build_of(python) if needed else None
        if build is None or needed in build.serves:
            return Support(own)
        missing = f"torch {build.version} is not built for {device.vendor}"
    groups, features = device.capabilities.groups, device.capabilities.features
    if groups and ("compute" not in groups or "binary_only" in features):
        why = missing or f"torch has no device for the driver {device.driver}"
        lacks = (
            "takes kernels as binaries only, and Drivetrain's are source"
            if "compute" in groups
            else "has no `compute` group for Drivetrain's kernels"
        )
        return Support(
            reason=f"{why}, and the driver {device.driver} {lacks}"
            + (f"; install torch's build for {device.vendor}" if missing else "")
        )
    return Support(custom=True, missing=missing)


@cache
def build_of(python: str) -> Build | None:
    """What the torch of an interpreter's environment says of itself; None where that cannot be
    read, and then nothing is ruled out by it."""
    try:
        if python == sys.executable:
            spec = find_spec("torch")
            origin = "" if spec is None else str(spec.origin or "")
        else:
            done = subprocess.run(
                [python, "-c", _QUESTION],
                capture_output=True,
                text=True,
                timeout=_ASK_S,
                check=True,
            )
            origin = done.stdout.strip()
        text = Path(origin).with_name("version.py").read_text(encoding="utf-8") if origin else ""
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    told = {name: one or other for name, one, other in _FIELD.findall(text)}
    if "__version__" not in told:
        return None
    return Build(told.pop("__version__"), frozenset(name for name in told if told[name]))
