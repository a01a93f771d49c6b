"""OpenCL C compiled in a process of its own, because a platform's compiler may hang or crash.

Both drivers that take OpenCL C ask here: OpenCL's, and SYCL's for the same devices.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from dataclasses import dataclass, field
from typing import Any

from drivetrain import __version__
from drivetrain.hal.drivers import opencl_build, opencl_loader
from drivetrain.hal.drivers.opencl_api import Cl
from drivetrain.hal.drivers.opencl_platforms import Found
from drivetrain.hal.isolated import python_path
from drivetrain.hal.language import logs, process
from drivetrain.hal.language.compilers.opencl import options_of

_NAMED = re.compile(r'^#line \d+ "([^"<>]+)"', re.MULTILINE)
_SAID = re.compile(r"^(error|warning): (\S+:\d+:\d+): ", re.MULTILINE)
"""PoCL's way to write a place."""


@dataclass(frozen=True)
class Made:
    """What the process told."""

    hung: str = ""
    """Why it gave no answer."""
    unusable: str = ""
    """Why the compiler could not be asked."""
    status: int = 0
    """OpenCL's code, of ``op``."""
    op: str = ""
    log: str = ""
    """In the user's lines."""
    binary: bytes = b""
    kernels: dict[str, Any] = field(default_factory=dict)
    """Facts of each kernel by its name, as `opencl_build.kernels` writes them."""


def options(found: Found, code: bytes) -> list[str]:
    """What the compiler is told for a source."""
    told = options_of(code.decode(errors="replace"))
    fast = "-cl-fast-relaxed-math" in told
    exact = found.number(Cl.DEVICE_SINGLE_FP_CONFIG)
    if exact & Cl.FP_CORRECTLY_ROUNDED_DIVIDE_SQRT and not fast:
        told.append("-cl-fp32-correctly-rounded-divide-sqrt")
    return [*told, opencl_build.KERNEL_ARG_INFO]


def key(found: Found, what: str, code: bytes, form: str, options: list[str]) -> str:
    """Under which ``what`` was made of this code is kept."""
    facts = [
        *(__version__, what, form, options, hashlib.sha256(code).hexdigest()),
        *(found.platform.name, found.platform.version_text, found.name),
        *(found.text(Cl.DEVICE_VERSION), found.text(Cl.DRIVER_VERSION)),
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def compiled(
    found: Found, code: bytes, form: str, options: list[str], *, kernels: bool = False
) -> Made:
    """Compile ``cl`` or ``spirv`` for a device, in a child with a time limit; ``kernels``: tell
    facts of each kernel too."""
    job = {
        "uuid": found.known_as,
        "form": form,
        "options": " ".join(options),
        "kernels": kernels,
    }
    with process.private_folder() as folder:
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        (folder / "code").write_bytes(code)
        command = [sys.executable, "-P", "-m", opencl_build.__name__]
        environment = {"PYTHONPATH": python_path(), **opencl_loader.environment()}
        ended = process.run(command, folder, environment=environment, memory=0)
        try:
            result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            result = None
        if not isinstance(result, dict):
            return Made(
                hung=f"the compiler of {found.platform.name!r} gave no answer: "
                f"{ended.reason or 'it wrote none'}; nothing else was harmed. Simplify the "
                "kernel, or try a newer version of the platform"
            )
        if "unusable" in result:
            return Made(unusable=str(result["unusable"]))
        try:
            binary = (folder / "binary").read_bytes()
        except OSError:
            binary = b""
    return Made(
        status=int(result["status"]),
        op=str(result["op"]),
        log=explained(str(result["log"]), code),
        binary=binary,
        kernels=dict(result.get("kernels", {})),
    )


def explained(log: str, code: bytes) -> str:
    """A compiler's words in the user's lines, as ``logs.explain`` writes them."""
    name = _NAMED.search(code.decode(errors="replace"))
    return logs.explain(_SAID.sub(r"\2: \1: ", log), name[1] if name else "kernel.cl")
