"""CUDA C for NVIDIA and AMD: NVRTC and hiprtc, each in a process of its own.

They preprocess and parse by themselves, so the text goes to them as it is and their lines are the
user's. A prelude before it brings what ``nvcc`` would have included.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from drivetrain.errors import CompileError, HalError, Unsupported
from drivetrain.hal.driver import Target
from drivetrain.hal.language.compilers import rtc_child
from drivetrain.hal.language.compilers.rtc_kernels import Written, entry_sizes, written_kernels
from drivetrain.hal.language.compilers.rtc_library import Library, library
from drivetrain.hal.language.facts import Compiled, KernelFacts
from drivetrain.hal.language.logs import explain, first_error
from drivetrain.hal.language.options import Options
from drivetrain.hal.language.process import private_folder, run
from drivetrain.hal.language.source import Source

__all__ = ["AMD_ARCHITECTURES", "build", "identity"]

AMD_ARCHITECTURES = frozenset(
    """gfx900 gfx906 gfx908 gfx90a gfx90c gfx940 gfx941 gfx942 gfx950 gfx1010 gfx1011 gfx1012
    gfx1013 gfx1030 gfx1031 gfx1032 gfx1033 gfx1034 gfx1035 gfx1036 gfx1100 gfx1101 gfx1102 gfx1103
    gfx1150 gfx1151 gfx1152 gfx1153 gfx1200 gfx1201""".split()  # noqa: SIM905
)
"""hiprtc is asked for these only: it aborts its process on one that it does not know."""

_PRELUDE = "drivetrain_prelude.h"
_EMPTY = frozenset(
    """assert.h cassert cfloat climits cmath cstddef cstdint cstdio cstdlib cstring cuda.h
    cuda_runtime.h cuda_runtime_api.h device_atomic_functions.h device_functions.h
    device_launch_parameters.h float.h limits.h math.h stdbool.h stddef.h stdint.h stdio.h stdlib.h
    string.h vector_functions.h vector_types.h hip/hip_runtime.h""".split()  # noqa: SIM905
)
"""Headers of which a kernel has everything already."""
_OPTIONAL = frozenset({"math_constants.h"})
"""Likewise, where the toolkit's own is not there."""
_INCLUDE = re.compile(r"^[ \t]*#[ \t]*include[ \t]*(?:[<\"]([^>\"\n]*)[>\"])?", re.MULTILINE)
_MISSING = re.compile(
    r"(?:could not|cannot) open source file \"([^\"]+)\"|'([^']+)' file not found"
)
_INVALID_OPTION = 5
_COMPILATION = 6


def identity(source: Source, target: Target) -> str:
    """The library, its version and its headers. Raises Unsupported where there is none."""
    return f"{library(target.kind, target.version).identity()}\n{_prelude()}"


def build(source: Source, target: Target, options: Options) -> Compiled:
    """A cubin, or PTX for an architecture that is newer than the library; a code object for HIP.

    Raises CompileError with the user's line, HalError when the library does not finish.
    """
    _check_includes(source)
    found = library(target.kind, target.version)
    job = _Job(source, target, options, found)
    kernels = written_kernels(source.text, job.defines())
    with private_folder() as folder:
        text = json.dumps(job.facts([kernel.expression for kernel in kernels]))
        (folder / "job.json").write_text(text, encoding="utf-8")
        # -I: nothing of the user's environment or folder is imported.
        ended = run([_interpreter(), "-I", "-B", rtc_child.__file__], folder)
        try:
            result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise job.unfinished(ended.reason or "it left no answer") from None
        job.check(result)
        form, code = job.code(folder, result)
        ptx = folder / "code.ptx"
        sizes = entry_sizes(ptx.read_text(errors="replace")) if ptx.exists() else {}
    log = explain(result["log"], source.name)
    return Compiled(form, code, _facts(kernels, result.get("symbols", {}), sizes), log)


def _check_includes(source: Source) -> None:
    """Only headers that come with the compiler: another file is no part of the cache's key."""
    for match in _INCLUDE.finditer(source.text):
        name = match[1] or ""
        if name.startswith("/") or ".." in name.split("/"):
            line = source.text.count("\n", 0, match.start()) + 1
            text = (
                f"{source.name}:{line}: #include of {name!r}: a kernel includes the compiler's own "
                "headers; put other text into the source"
            )
            raise CompileError(text, code="compile", op="compile", log=text)


@dataclass(frozen=True)
class _Job:
    source: Source
    target: Target
    options: Options
    library: Library

    def defines(self) -> dict[str, str]:
        """For the scan of the source: what the compiler defines by itself, as far as it matters."""
        own = {"__DRIVETRAIN__": "1"}
        if self.target.kind == "cuda":
            number = re.sub(r"\D", "", self.target.arch) or "70"
            major = self.library.version[0] if self.library.version else 12
            own |= {"__CUDACC_RTC__": "1", "__CUDA_ARCH__": f"{number}0"}
            own |= {"__CUDACC_VER_MAJOR__": str(major)}
        else:
            own |= {"__HIPCC_RTC__": "1", "__HIP__": "1", "__HIP_DEVICE_COMPILE__": "1"}
        return {**own, **self.options.defines}

    def facts(self, names: Sequence[str]) -> dict[str, Any]:
        """What the child is told."""
        nvidia = self.target.kind == "cuda"
        included = {match[1] for match in _INCLUDE.finditer(self.source.text)}
        toolkit = bool(self.library.include)
        headers = {_PRELUDE: _prelude()}
        empty = _EMPTY if toolkit else _EMPTY | _OPTIONAL
        headers |= dict.fromkeys(sorted(empty & included), "\n")  # hiprtc takes no empty one
        others = bool(included - headers.keys())
        options = self._nvrtc_options() if nvidia else self._hiprtc_options()
        paths = [f"--include-path={folder}" for folder in self.library.include] if nvidia else []
        options += paths if others else []
        return {
            "library": str(self.library.path),
            "preload": [str(path) for path in self.library.preload],
            "prefix": self.library.name,
            "text": self.source.text,
            "name": self.source.name,
            "headers": headers,
            "bundled": nvidia,
            "halves": ["--pre-include=cuda_fp16.h", *([] if others else paths)] if nvidia else [],
            "names": list(names),
            "arch": self._architecture(),
            "options": options,
            "blobs": {"cubin": "CUBIN", "ptx": "PTX"} if nvidia else {"hsaco": "Code"},
        }

    def _architecture(self) -> str:
        arch = self.target.arch
        if self.target.kind == "cuda" and re.fullmatch(r"sm_\d{2,3}[af]?", arch):
            return arch
        amd = self.target.kind == "hip" and arch.partition(":")[0] in AMD_ARCHITECTURES
        if amd and re.fullmatch(r"gfx\w+(?::(?:sramecc|xnack)[+-]){0,2}", arch):
            return arch
        raise self._error(
            f"{self.library.title} is not asked for the architecture {arch!r}; known are "
            + ("sm_NN" if self.target.kind == "cuda" else ", ".join(sorted(AMD_ARCHITECTURES))),
            Unsupported,
            "unsupported",
        )

    def _nvrtc_options(self) -> list[str]:
        given = self.options
        out = [f"--std={given.std or 'c++17'}", f"--pre-include={_PRELUDE}"]
        out.append("--define-macro=__DRIVETRAIN__=1")
        out += [f"--define-macro={name}={value}" for name, value in given.defines.items()]
        out += [f"--undefine-macro={name}" for name in given.undefines]
        if given.level is not None and self.library.version >= (12,):
            out.append(f"--ptxas-options=-O{given.level}")
        if given.fast_math:
            out.append("--use_fast_math")
        if given.fmad is not None:
            out.append(f"--fmad={str(given.fmad).lower()}")
        if given.registers:
            out.append(f"--maxrregcount={given.registers}")
        if given.lineinfo:
            out.append("--generate-line-info")
        return out

    def _hiprtc_options(self) -> list[str]:
        given = self.options
        out = [f"-std={given.std or 'c++17'}", "-include", _PRELUDE, "-Wno-macro-redefined"]
        out += ["-D__DRIVETRAIN__=1", *(f"-D{n}={value}" for n, value in given.defines.items())]
        out += [f"-U{name}" for name in given.undefines]
        out.append(f"-O{3 if given.level is None else given.level}")
        if given.fast_math:
            out.append("-ffast-math")
        if given.fmad is not None:
            out.append(f"-ffp-contract={'fast' if given.fmad else 'off'}")
        if given.lineinfo:
            out.append("-gline-tables-only")
        return out

    # -- what came of it

    def _error(
        self, message: str, kind: type[HalError] = HalError, code: str = "compiler"
    ) -> HalError:
        return kind(
            f"{self.source.name}: {message}", code=code, driver=self.target.kind, op="compile"
        )

    def unfinished(self, reason: str) -> HalError:
        hint = ""
        if self.target.kind == "hip" and "crashed" in reason:
            hint = f"; it may be too old for {self.target.arch}"
        return self._error(
            f"{self.library.title} ({self.library.path}) did not finish: {reason}{hint}"
        )

    def check(self, result: Mapping[str, Any]) -> None:
        """Raise what the child's answer says."""
        if "unusable" in result:
            raise self._error(
                f"{self.library.path} cannot be used as {self.library.name}: {result['unusable']}",
                Unsupported,
                "unsupported",
            )
        status, arch = int(result["status"]), self.target.arch
        if status == 0:
            return
        log = explain(result["log"], self.source.name)
        if result["word"] == "architecture":
            known = ", ".join(f"sm_{number}" for number in result["known"])
            raise self._error(
                f"{self.library.title} no longer compiles for {arch}; it knows {known}. Install "
                "an older one",
                Unsupported,
                "unsupported",
            )
        if status == _INVALID_OPTION:
            raise self._error(
                f"{self.library.title} does not take these options: {first_error(log)}",
                Unsupported,
                "unsupported",
            )
        if status != _COMPILATION:
            raise self._error(
                f"{self.library.title} failed ({result['call']}: {result['word']}): "
                f"{first_error(log)}"
            )
        hint = ""
        if _MISSING.search(result["log"]) and self.target.kind == "cuda":
            hint = (
                "; CUDA's headers come with its toolkit (CUDA_HOME), with the wheel "
                "nvidia-cuda-runtime, or in NVRTC from 13.3"
            )
        raise CompileError(
            f"{self.source.name} cannot be compiled for {arch} by {self.library.title}: "
            f"{first_error(log)}{hint}",
            code="compile",
            driver=self.target.kind,
            op="compile",
            native=status,
            native_name=str(result["word"]),
            log=log,
        )

    def code(self, folder: Path, result: Mapping[str, Any]) -> tuple[str, bytes]:
        forms = ("cubin", "ptx") if self.target.kind == "cuda" else ("hsaco",)
        for form in forms:
            path = folder / f"code.{form}"
            if path.exists() and path.stat().st_size:
                return form, path.read_bytes()
        raise self.unfinished(f"it gave no code for {result['arch']}")


def _facts(
    kernels: Sequence[Written], symbols: Mapping[str, str], sizes: Mapping[str, Sequence[int]]
) -> dict[str, KernelFacts]:
    """By the name in the source. Parameters are told only where the compiler agrees."""
    out: dict[str, KernelFacts] = {}
    for kernel in kernels:
        symbol = symbols.get(kernel.expression)
        if not symbol:
            continue
        facts = replace(kernel.facts, symbol=symbol)
        told = [param.nbytes for param in facts.params or ()]
        if told != list(sizes.get(symbol, told)):
            facts = replace(facts, params=None)
        out[kernel.name] = facts
    for symbol in sizes if not out else ():
        out[symbol] = KernelFacts(symbol, None)
    return out


@lru_cache(maxsize=1)
def _prelude() -> str:
    return (Path(__file__).parents[1] / "prelude_rtc.h").read_text(encoding="utf-8")


def _interpreter() -> str:
    if not sys.executable:
        raise Unsupported(
            "kernels are compiled in a process of their own, and this program does not tell where "
            "its Python is (sys.executable is empty)",
            code="unsupported",
            op="compile",
        )
    return sys.executable
