"""What a library that cannot be loaded lacks, by the system loader's words, and what to do."""

from __future__ import annotations

import re
from pathlib import PurePath

from drivetrain.errors import DriverMissing, HalError

_SAID = re.compile(r"([^\s:;()]+): cannot open shared object file")
_PACKAGES = {
    "libimf": "pip install intel-cmplr-lib-rt",
    "libintlc": "pip install intel-cmplr-lib-rt",
    "libirng": "pip install intel-cmplr-lib-rt",
    "libsvml": "pip install intel-cmplr-lib-rt",
    "libhsakmt": "reinstall ROCm (Debian: apt install libhsakmt1)",
    "libhsa-runtime64": "reinstall ROCm (Debian: apt install libhsa-runtime64-1)",
    "libamd_comgr": "reinstall ROCm (Debian: apt install libamd-comgr2)",
}
"""Libraries that packages need without saying so, or that were seen to be left out."""


def unloadable(name: str, error: OSError, *, driver: str, op: str = "") -> HalError:
    """Why ``name``, a library's path or name, could not be loaded: `DriverMissing` where it is not
    there, else `HalError`, as it is there and does not work."""
    there = not str(error).startswith(f"{name}: cannot open shared object file")
    kind, code = (HalError, "broken") if there else (DriverMissing, "driver_missing")
    return kind(f"{name} cannot be loaded: {error}", code=code, driver=driver, op=op)


def libraries(reason: str) -> list[str]:
    """Those that the reason says cannot be found, each once."""
    return list(dict.fromkeys(_SAID.findall(reason)))


def remedy(reason: str) -> str:
    """What brings the libraries that the reason names; empty where it names none."""
    said = []
    for name in libraries(reason):
        package = _PACKAGES.get(PurePath(name).name.partition(".")[0])
        said.append(f"{name} is missing: {package or 'install the package that has it'}")
    return "; ".join(dict.fromkeys(said))
