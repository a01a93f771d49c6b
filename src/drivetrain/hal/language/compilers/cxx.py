"""CUDA C for the CPU: translated to C++, compiled by the machine's own compiler."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from functools import lru_cache

from drivetrain.errors import CompileError, HalError, Unsupported
from drivetrain.hal.driver import Target
from drivetrain.hal.language.cpp import translate
from drivetrain.hal.language.facts import Compiled, Translated
from drivetrain.hal.language.frontend import program
from drivetrain.hal.language.logs import explain, first_error, with_lines
from drivetrain.hal.language.options import Options
from drivetrain.hal.language.process import private_folder, run
from drivetrain.hal.language.source import Source

__all__ = ["build", "compiler", "identity"]

_NAMES = ("g++", "clang++", "c++")
_FLAGS = (
    "-std=c++17", "-shared", "-fPIC", "-w", "-fvisibility=hidden", "-fwrapv",
    "-fno-strict-aliasing", "-fno-math-errno", "-fno-trapping-math", "-fno-exceptions",
    "-fno-rtti", "-fno-finite-loops", "-fsigned-char",
)  # fmt: skip
_FAST = (
    "-fno-signed-zeros", "-fassociative-math", "-freciprocal-math", "-ffp-contract=fast",
)  # fmt: skip
"""Not -ffast-math: linked with it, code changes how the whole process treats denormals."""
_VERSION_LIMIT_S = 20.0


def compiler() -> str:
    """The path of the C++ compiler: ``$CXX``, g++, clang++ or c++. Raises Unsupported."""
    asked = os.environ.get("CXX", "")
    names = (asked, *_NAMES) if re.fullmatch(r"[\w./+-]+", asked) else _NAMES
    for name in names:
        path = shutil.which(name)
        if path:
            return path
    raise Unsupported(
        "kernels for the cpu are compiled by a C++ compiler, and there is none on this machine: "
        "install one (Debian's package g++)",
        code="unsupported",
        driver="cpu",
        op="compile",
    )


@lru_cache(maxsize=8)
def _version(path: str, changed_ns: int) -> str:
    try:
        said = subprocess.run(
            [path, "--version"], capture_output=True, timeout=_VERSION_LIMIT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unsupported(
            f"the C++ compiler {path} does not answer: {error}",
            code="unsupported",
            driver="cpu",
            op="compile",
        ) from error
    first = said.stdout.decode(errors="replace").splitlines()
    return first[0].strip() if first else ""


@lru_cache(maxsize=1)
def _processor() -> str:
    """What ``-march=native`` depends on."""
    try:
        with open("/proc/cpuinfo") as file:
            facts = {
                line.split(":")[0].strip(): line.split(":")[1].strip()
                for line in file.read().split("\n\n")[0].splitlines()
                if ":" in line
            }
    except OSError:
        facts = {}
    words = ("vendor_id", "cpu family", "model", "stepping", "flags", "Features")
    return " ".join([platform.machine(), *(facts.get(word, "") for word in words)])


def identity(source: Source, target: Target) -> str:
    """The compiler, its version and the processor. Raises Unsupported where there is none."""
    path = compiler()
    version = _version(path, os.stat(path).st_mtime_ns)
    return "\n".join([path, version, _processor(), *_FLAGS, *_FAST])


def _flags(options: Options) -> list[str]:
    level = 3 if options.level is None else options.level
    flags = [*_FLAGS, f"-O{level}", "-mcpu=native" if _arm() else "-march=native"]
    if options.fast_math:
        flags += _FAST
    flags.append("-ffp-contract=" + ("fast" if _contracts(options) else "off"))
    if options.lineinfo:
        flags.append("-g1")
    return flags


def _contracts(options: Options) -> bool:
    return options.fast_math if options.fmad is None else options.fmad


def _arm() -> bool:
    return platform.machine() in ("aarch64", "arm64")


def build(source: Source, target: Target, options: Options) -> Compiled:
    """A shared object for the cpu device. Raises CompileError with the user's line."""
    path = compiler()
    translated = translation(source, options)
    with private_folder() as folder:
        text = with_lines(translated.text, source.name, translated.lines)
        (folder / "kernels.cc").write_text(text)
        command = [path, *_flags(options), "-o", "kernels.so", "kernels.cc", "-lm"]
        ended = run(command, folder)
        log = explain(ended.err, source.name)
        if ended.reason:
            raise _refused(source, path, ended.status, ended.reason, log)
        code = (folder / "kernels.so").read_bytes()
    return Compiled("so", code, translated.kernels, log)


def translation(source: Source, options: Options) -> Translated:
    """The C++ of a source, without a compiler. Raises CompileError with the user's line."""
    try:
        return translate(program(source, options))
    except CompileError as error:
        text = re.sub(r"^line (\d+)", rf"{source.name}:\1", error.log)
        raise CompileError(
            f"{source.name} cannot be compiled for the cpu: {text}",
            code="compile",
            driver="cpu",
            op="compile",
            log=text,
        ) from error
    except RecursionError:
        raise CompileError(
            f"{source.name} cannot be compiled for the cpu: it is nested too deeply",
            code="compile",
            driver="cpu",
            op="compile",
            log=f"{source.name}: nested too deeply",
        ) from None


def _refused(source: Source, path: str, status: int | None, reason: str, log: str) -> HalError:
    if status is None or status < 0:
        return HalError(
            f"{source.name}: the C++ compiler {path} did not finish: {reason}",
            code="compiler",
            driver="cpu",
            op="compile",
        )
    return CompileError(
        f"{source.name} was translated to C++ that {path} does not take: {first_error(log)}",
        code="compile",
        driver="cpu",
        op="compile",
        log=log,
    )
