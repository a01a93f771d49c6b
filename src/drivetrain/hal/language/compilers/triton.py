"""Triton for NVIDIA, AMD and whatever a driver's group ``triton`` says, without a device: in a
process of its own, for a target by name.

What comes out is a cubin, a code object or what the driver's last stage makes, and the facts of its
launch: one block of a fixed size, dynamic shared memory, and pointers to scratch memory behind the
user's arguments.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from drivetrain.errors import BadInput, CompileError, HalError, Unsupported
from drivetrain.hal.driver import Target, TritonTarget
from drivetrain.hal.language.compilers import triton_child
from drivetrain.hal.language.compilers.rtc_kernels import entry_sizes
from drivetrain.hal.language.facts import SCALARS, Compiled, KernelFacts, Param
from drivetrain.hal.language.logs import GENERATED
from drivetrain.hal.language.options import Options
from drivetrain.hal.language.process import private_folder, run
from drivetrain.hal.language.source import Source

__all__ = ["AMD_WARPS", "NVIDIA", "build", "identity"]

NVIDIA = frozenset({75, 80, 86, 87, 89, 90, 100, 101, 103, 110, 120, 121})
AMD_WARPS = {
    **dict.fromkeys(("gfx908", "gfx90a", "gfx940", "gfx941", "gfx942", "gfx950"), 64),
    **dict.fromkeys(("gfx1030", "gfx1100", "gfx1101", "gfx1102", "gfx1103"), 32),
    **dict.fromkeys(("gfx1150", "gfx1151", "gfx1152", "gfx1153", "gfx1200", "gfx1201"), 32),
}
"""Threads of a warp. Others are not asked for: LLVM ends the process on a name it does not know."""
_OLDEST = (3, 4)
_HOUSE = Path(__file__).parents[4]
"""The folder that this package is imported from."""
_WORDS = {"i1": "u8", "fp16": "f16", "fp32": "f32", "fp64": "f64", "bf16": "bf16"}


def identity(source: Source, target: Target) -> str:
    """Triton's version and library. Raises Unsupported where it is not installed."""
    folder, version = _installed()
    words = [f"triton {version}"]
    words += sorted(f"{n}={v}" for n, v in os.environ.items() if re.match("TRITON_.*_PATH$", n))
    for library in sorted((folder / "_C").glob("libtriton*")):
        facts = library.stat()
        words.append(f"{library} {facts.st_size} {facts.st_mtime_ns}")
    if target.triton is not None and target.triton.stages:
        file, _ = _stages(target.triton)
        words.append(f"{target.triton.stages} {hashlib.sha256(file.read_bytes()).hexdigest()}")
    return "\n".join(words)


def build(source: Source, target: Target, options: Options) -> Compiled:
    """A cubin or a code object. Raises CompileError with the user's line."""
    folder, version = _installed()
    if options.defines or options.undefines:
        raise BadInput(
            f"{source.name}: Triton has no macros; give constants={{...}} to Source.triton"
        )
    job: dict[str, Any] = {
        "site": str(folder.parent),
        "function": source.form,
        "signature": source.signature,
        "constants": source.constants,
        "target": _target(source, target),
        "options": _options(source, target, options),
        "fusion": options.fmad is not False,
        "lineinfo": options.lineinfo,
    }
    own = target.triton
    if own is not None:
        job["form"] = own.form
        job["stages"] = own.stages
        # The child is isolated: what this process finds through its own paths, it finds there.
        job["paths"] = [str(_stages(own)[1]), str(_HOUSE)] if own.stages else []
    with private_folder() as place:
        (place / "kernel.py").write_text(source.text, encoding="utf-8")
        (place / "job.json").write_text(json.dumps(job), encoding="utf-8")
        ended = run([_interpreter(), "-I", "-B", triton_child.__file__], place)
        speech = _in_users_lines(ended.err, place, source)
        try:
            result = json.loads((place / "result.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise _error(
                source,
                f"Triton {version} did not finish for {target.arch}: "
                f"{ended.reason or 'it left no answer'}",
            ) from None
        if "unusable" in result:
            raise _error(
                source,
                f"Triton {version} in {folder} cannot be used: {result['unusable']}",
                Unsupported,
            )
        if "error" in result:
            if not _is_the_sources(result["error"]):
                raise _error(
                    source,
                    f"Triton {version} failed for {target.arch}: {result['error']['said']}",
                )
            raise _refused(source, target, version, result["error"], speech)
        if own is not None:
            code = (place / "code").read_bytes()
            facts = _facts(source, job["target"], result, own.hidden)
            return Compiled(own.form, code, {source.name: facts}, "")
        form, sizes = "cubin", place / "code.ptx"
        if target.kind == "hip":
            form, sizes = "hsaco", place / "code.amdgcn"
        code = (place / f"code.{form}").read_bytes()
        hidden = _hidden(source, job["target"], result, sizes.read_text(errors="replace"))
        facts = _facts(source, job["target"], result, hidden)
    return Compiled(form, code, {source.name: facts}, "")


def _stages(target: TritonTarget) -> tuple[Path, Path]:
    """The file of a driver's stages, and the folder that it is imported from."""
    module, colon, function = target.stages.partition(":")
    spec = find_spec(module) if colon and function else None
    if spec is None or not spec.origin or not Path(spec.origin).is_file():
        raise Unsupported(
            f"the driver's stages for Triton, {target.stages!r}, are no module:function that this "
            "Python finds; report this to the driver's authors",
            code="unsupported",
            op="compile",
        )
    file = Path(spec.origin)
    folder = file.parents[module.count(".")]
    return file, folder.parent if file.name == "__init__.py" else folder


def _installed() -> tuple[Path, str]:
    """Triton's folder and version; it is not imported."""
    spec = find_spec("triton")
    places = list(spec.submodule_search_locations or ()) if spec else []
    for place in places:
        try:
            text = (Path(place) / "__init__.py").read_text(encoding="utf-8")
        except OSError:
            continue
        match = re.search(r"__version__\s*=\s*['\"]((\d+)\.(\d+)[^'\"]*)", text)
        if match is None:
            continue
        if (int(match[2]), int(match[3])) < _OLDEST:
            raise Unsupported(
                f"Triton {match[1]} is too old; install drivetrain[triton] (3.4 or newer)",
                code="unsupported",
                op="compile",
            )
        return Path(place), match[1]
    raise Unsupported(
        "Triton kernels need Triton, which is not installed: install drivetrain[triton]",
        code="unsupported",
        op="compile",
    )


def _target(source: Source, target: Target) -> tuple[str, int | str, int]:
    """Triton's words for it: back end, architecture, threads of a warp."""
    if target.triton is not None:
        return target.triton.backend, target.triton.arch, target.triton.warp_size
    if target.kind == "cuda":
        match = re.fullmatch(r"sm_(\d+)[af]?", target.arch)
        if match and int(match[1]) in NVIDIA:
            return "cuda", int(match[1]), 32
        known = ", ".join(f"sm_{number}" for number in sorted(NVIDIA))
    else:
        arch = target.arch.partition(":")[0]
        if arch in AMD_WARPS:
            return "hip", arch, AMD_WARPS[arch]
        known = ", ".join(AMD_WARPS)
    raise _error(
        source,
        f"Triton is not asked for the architecture {target.arch!r}; known are {known}",
        Unsupported,
    )


def _options(source: Source, target: Target, options: Options) -> dict[str, Any]:
    out: dict[str, Any] = {"num_warps": source.num_warps, "num_stages": source.num_stages}
    out["enable_fp_fusion"] = options.fmad is not False
    if target.kind == "cuda" and options.registers:
        out["maxnreg"] = options.registers
    return {**out, **dict(target.triton.options if target.triton is not None else ())}


# -- what came of it -------------------------------------------------------------------------------


def _params(source: Source) -> list[Param]:
    params = []
    for name, kind in source.signature:
        if kind == "constexpr":
            continue
        word = "ptr" if kind.startswith("*") else _WORDS.get(kind, kind)
        if word not in SCALARS and word not in ("ptr", "bf16"):
            raise _error(source, f"{name} is a number of type {kind}; pass a pointer", Unsupported)
        params.append(Param(word, 8 if word == "ptr" else SCALARS.get(word, 2), name))
    return params


def _facts(
    source: Source, target: tuple[str, int | str, int], result: dict[str, Any], hidden: int
) -> KernelFacts:
    if result["scratch"]:
        raise _error(
            source,
            f"Triton wants {result['scratch']} bytes of scratch memory in each block of this "
            "kernel; Drivetrain's launches give none",
            Unsupported,
        )
    return KernelFacts(
        str(result["name"]),
        tuple(_params(source)),
        block=(int(result["num_warps"]) * target[2], 1, 1),
        shared_bytes=int(result["shared"]),
        hidden=hidden,
    )


def _hidden(
    source: Source, target: tuple[str, int | str, int], result: dict[str, Any], assembly: str
) -> int:
    """How many pointers Triton put behind the parameters, which must be as the source says."""
    symbol = str(result["name"])
    sizes = (
        entry_sizes(assembly).get(symbol)
        if target[0] == "cuda"
        else _code_object_sizes(assembly, symbol)
    )
    told = [param.nbytes for param in _params(source)]
    if sizes is None or sizes[: len(told)] != told or set(sizes[len(told) :]) - {8}:
        raise _error(
            source,
            f"Triton {result['version']} made a kernel whose parameters have {sizes} bytes where "
            f"{told} and pointers were expected; this version is not known here",
        )
    return len(sizes) - len(told)


def _code_object_sizes(assembly: str, symbol: str) -> list[int] | None:
    """The bytes of a kernel's explicit arguments, from the notes in AMD's assembly."""
    notes = assembly.partition("amdhsa.kernels:")[2]
    for kernel in re.split(r"^  - ", notes, flags=re.MULTILINE)[1:]:
        name = re.search(r"\.name:\s+'?([\w$.]+)'?\s*$", _without_arguments(kernel), re.MULTILINE)
        if name is None or name[1] != symbol:
            continue
        found = re.findall(r"\.size:\s+(\d+)\s+\.value_kind:\s+(\w+)", kernel)
        return [int(size) for size, kind in found if not kind.startswith("hidden_")]
    return None


def _without_arguments(kernel: str) -> str:
    """The notes of a kernel less those of its arguments, which have names too."""
    return re.sub(r"^      [ -].*\n?", "", kernel, flags=re.MULTILINE)


def _in_users_lines(said: str, place: Path, source: Source) -> str:
    """What was printed, with the lines of ``kernel.py`` as the user's."""

    def user(match: re.Match[str]) -> str:
        return _where(source, int(match[1]))

    plain = said.replace(f"{place}/", "").replace(f"{place.resolve()}/", "")
    plain = re.sub(r'(?:File "kernel\.py", line |"?kernel\.py"?:)(\d+)', user, plain)
    return plain.strip()


def _where(source: Source, line: int) -> str:
    mapped = source.lines[line - 1] if 0 < line <= len(source.lines) else 0
    return f"{source.name}:{mapped}" if mapped else f"{GENERATED}:{line}"


def _is_the_sources(error: dict[str, Any]) -> bool:
    """Whether the kernel is at fault, and not a tool that Triton does not find."""
    return bool(
        error["compilation"] or error["line"] or error["kind"] in ("RuntimeError", "PTXASError")
    )


def _refused(
    source: Source, target: Target, version: str, error: dict[str, Any], speech: str
) -> CompileError:
    line, said = int(error["line"]), str(error["said"]).strip()
    first = said.splitlines()[0] if said else str(error["kind"])
    where = _where(source, line) if line else source.name
    if where.startswith(GENERATED):
        where = f"{source.name}, in a function of another file"
    return CompileError(
        f"{source.name} cannot be compiled for {target.arch} by Triton {version}: {where}: "
        f"error: {first}",
        code="compile",
        driver=target.kind,
        op="compile",
        native_name=str(error["kind"]),
        log=f"{where}: error: {said}\n{speech}".strip(),
    )


def _error(source: Source, message: str, kind: type[HalError] = HalError) -> HalError:
    code = "unsupported" if kind is Unsupported else "compiler"
    return kind(f"{source.name}: {message}", code=code, op="compile")


def _interpreter() -> str:
    if not sys.executable:
        raise Unsupported(
            "kernels are compiled in a process of their own, and this program does not tell where "
            "its Python is (sys.executable is empty)",
            code="unsupported",
            op="compile",
        )
    return sys.executable
