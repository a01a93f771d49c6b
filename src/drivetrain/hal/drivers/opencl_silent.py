"""Platforms that OpenCL's loader leaves out without a word: their file is there, and the library
that it names, or one which that needs, is not."""

from __future__ import annotations

import ctypes

from drivetrain.hal import missing
from drivetrain.hal.drivers import opencl_loader as loader


def silent() -> list[str]:
    """Each such file with what the system's loader says and what to do. Loads the libraries,
    which may hang or crash: in a child."""
    found = []
    for path in loader.icd_files():
        name = loader.text(path)
        try:
            ctypes.CDLL(name)
        except OSError as error:
            what = missing.remedy(str(error)) or "reinstall the platform"
            if missing.libraries(str(error)) == [name]:
                what = f"install the platform again, or delete {path}"
            found.append(f"{path.name} registers a platform that does not load ({error}): {what}")
    return found
