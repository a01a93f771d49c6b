"""The options that compilers are given: read into facts first, then written anew for each one.

So no option reaches a compiler as the caller wrote it, and none can name a file or a program.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from drivetrain.errors import BadInput
from drivetrain.hal.language.source import macro_value

__all__ = ["ALLOWED", "Options", "read_options"]

ALLOWED = {
    "-DNAME[=VALUE]": "define a macro",
    "-UNAME": "do not define a macro",
    "-O0 ... -O3": "how much to optimise",
    "--use_fast_math": "faster, less exact mathematics; denormals may become 0",
    "--fmad=true|false": "whether a*b+c may be rounded once",
    "--std=c++11|c++14|c++17|c++20": "the version of C++",
    "--maxrregcount=N": "registers of a thread on CUDA, 16 to 255",
    "--lineinfo": "line numbers for profilers",
}

_MOST = 256
_STANDARDS = ("c++11", "c++14", "c++17", "c++20")


@dataclass(frozen=True)
class Options:
    """What was asked for; None where nothing was."""

    defines: dict[str, str] = field(default_factory=dict)
    undefines: tuple[str, ...] = ()
    level: int | None = None
    fast_math: bool = False
    fmad: bool | None = None
    std: str = ""
    registers: int = 0
    lineinfo: bool = False


def read_options(given: Iterable[str], defines: Iterable[tuple[str, str]] = ()) -> Options:
    """The options as facts, over a source's own ``defines``. Raises BadInput for any other."""
    options = [given] if isinstance(given, str) else list(given)
    if len(options) > _MOST:
        raise BadInput(f"{len(options)} compiler options were given; at most {_MOST} are taken")
    macros, undefines = dict(defines), dict[str, None]()
    level, fmad, std, registers = None, None, "", 0
    fast_math = lineinfo = False
    for option in options:
        if not isinstance(option, str):
            raise BadInput(f"a compiler option is a {type(option).__name__}; give str")
        word = (
            "--" + option.lstrip("-") if option.startswith(("--", "-use_fast", "-std")) else option
        )
        if match := re.fullmatch(r"-D\s?(\w+)(?:=(.*))?", word, re.DOTALL | re.ASCII):
            name, value = match[1], match[2]
            macros[name] = macro_value(name, "1" if value is None else value)
            undefines.pop(name, None)
        elif match := re.fullmatch(r"-U\s?([A-Za-z_]\w*)", word, re.ASCII):
            macros.pop(match[1], None)
            undefines[match[1]] = None
        elif match := re.fullmatch(r"-O([0-3])", word):
            level = int(match[1])
        elif word == "--use_fast_math":
            fast_math = True
        elif match := re.fullmatch(r"--fmad=(true|false)", word):
            fmad = match[1] == "true"
        elif word.startswith("--std=") and word[6:] in _STANDARDS:
            std = word[6:]
        elif (match := re.fullmatch(r"--maxrregcount=(\d{2,3})", word, re.ASCII)) and (
            16 <= int(match[1]) <= 255
        ):
            registers = int(match[1])
        elif word in ("--lineinfo", "--generate-line-info", "-lineinfo"):
            lineinfo = True
        else:
            raise BadInput(
                f"the compiler option {option!r} is not allowed; these are: {', '.join(ALLOWED)}"
            )
    return Options(macros, tuple(undefines), level, fast_math, fmad, std, registers, lineinfo)
