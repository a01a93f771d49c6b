"""OpenCL C, from CUDA C by translation or as it was written; the platform compiles it later.

The platform's compiler is the driver's to call: it knows the device. What it should be told comes
with the text, as a comment in the first line (`options_of` reads it).
"""

from __future__ import annotations

import hashlib
import re
from functools import cache
from importlib.resources import files

from drivetrain.errors import CompileError
from drivetrain.hal.driver import Target
from drivetrain.hal.language.facts import Compiled, Translated
from drivetrain.hal.language.logs import with_lines
from drivetrain.hal.language.options import Options
from drivetrain.hal.language.source import Source

__all__ = ["build", "identity", "options_of"]

_MARK = "// drivetrain: "
_TAKEN = frozenset(
    {
        *(f"-cl-std=CL{version}" for version in ("1.0", "1.1", "1.2", "2.0", "3.0")),
        "-cl-fast-relaxed-math",
        "-cl-mad-enable",
        "-cl-opt-disable",
    }
)
_NEWEST = "3.0"
"""Platforms of newer versions take it too."""
_TRANSLATED_FOR = "1.2"
"""The OpenCL C that translations are written in."""


def identity(source: Source, target: Target) -> str:
    """OpenCL C itself is compiled by the driver, whose version is in the target."""
    return "opencl c" if source.language == "opencl" else f"opencl translation {_translator()}"


@cache
def _translator() -> str:
    """A digest of what translates: its output may change with any of it."""
    digest = hashlib.sha256()
    for path in sorted(files("drivetrain.hal.language").iterdir(), key=lambda each: each.name):
        if path.name.endswith((".py", ".h")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def build(source: Source, target: Target, options: Options) -> Compiled:
    """OpenCL C with the user's lines. Raises CompileError, of a translation."""
    if source.language == "opencl":
        text = _defined(source, options)
        return Compiled("cl", _told(text, _flags(options, target.arch)).encode())
    made = _translation(source, target, options)
    text = with_lines(made.text, source.name, made.lines)
    return Compiled("cl", _told(text, _flags(options, _TRANSLATED_FOR)).encode(), made.kernels)


def _translation(source: Source, target: Target, options: Options) -> Translated:
    from drivetrain.hal.language.frontend import program
    from drivetrain.hal.language.opencl import translate

    fmad = bool(options.fmad) or options.fast_math
    try:
        return translate(program(source, options), target.features, fmad=fmad)
    except CompileError as error:
        text = re.sub(r"^line (\d+)", rf"{source.name}:\1", error.log)
        raise CompileError(
            f"{source.name} cannot be compiled for opencl: {text}",
            code="compile",
            driver="opencl",
            op="compile",
            log=text,
        ) from error


def _defined(source: Source, options: Options) -> str:
    """The user's text behind the macros, with its own lines."""
    macros = [f"#define {name} {value}" for name, value in options.defines.items()]
    macros += [f"#undef {name}" for name in options.undefines]
    if options.fmad is False:
        macros.append("#pragma OPENCL FP_CONTRACT OFF")
    return "\n".join([*macros, f'#line 1 "{source.name}"', source.text])


def _flags(options: Options, version: str) -> list[str]:
    flags = [f"-cl-std=CL{min(version, _NEWEST)}"]
    if options.fast_math:
        flags.append("-cl-fast-relaxed-math")
    elif options.fmad:
        flags.append("-cl-mad-enable")
    if options.level == 0:
        flags.append("-cl-opt-disable")
    return [flag for flag in flags if flag in _TAKEN]


def _told(text: str, flags: list[str]) -> str:
    return f"{_MARK}{' '.join(flags)}\n{text}"


def options_of(text: str) -> list[str]:
    """The options that a text asks for; no others than these are ever passed on."""
    first = text.partition("\n")[0]
    if not first.startswith(_MARK):
        return []
    return [flag for flag in first.removeprefix(_MARK).split() if flag in _TAKEN]
