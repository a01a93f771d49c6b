"""What a kernel is written in: CUDA C, Triton, OpenCL C, or code that exists already."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from drivetrain.errors import BadInput
from drivetrain.hal.driver import Target
from drivetrain.hal.language.facts import SCALARS, KernelFacts, Param

__all__ = ["FORMS", "LARGEST_SOURCE", "Source"]

LARGEST_SOURCE = 16 << 20
"""Bytes of a source or a binary."""

FORMS: Mapping[str, tuple[str, ...]] = {
    "cuda": ("ptx", "cubin"),
    "hip": ("hsaco",),
    "opencl": ("cl", "spirv", "clbin"),
    "level_zero": ("spirv",),
    "cpu": ("so",),
}
"""What each kind of target loads. ``clbin`` is an OpenCL platform's own binary (an FPGA's)."""

_LANGUAGES: Mapping[str, tuple[str, ...]] = {
    "cuda": ("cuda", "hip", "opencl", "cpu"),
    "triton": ("cuda", "hip"),
    "opencl": ("opencl",),
}
_MAGIC = {
    "cubin": (b"\x7fELF", b"\x50\xed\x55\xba"),
    "hsaco": (b"\x7fELF", b"__CLANG_OFFLOAD_BUNDLE__"),
    "so": (b"\x7fELF",),
    "spirv": (b"\x03\x02\x23\x07", b"\x07\x23\x02\x03"),
}
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_TRITON_TYPE = re.compile(
    r"\*{0,2}(?:i1|[iu](?:8|16|32|64)|fp(?:16|32|64)|bf16|fp8e(?:4nv|5|4b8|4b15|5b16))"
)


@dataclass(frozen=True)
class Source:
    """One source of kernels; compare and hash go by content.

    Made by `cuda`, `triton`, `opencl` and `binary`, which check what they are given and raise
    BadInput. ``Device.compile`` compiles it.
    """

    language: str
    """``cuda``, ``triton``, ``opencl`` or ``binary``."""
    name: str
    """What errors call it: a file name without a folder."""
    text: str = ""
    data: bytes = b""
    """Of a binary."""
    form: str = ""
    """Of a binary: one of the words in `FORMS`."""
    defines: tuple[tuple[str, str], ...] = ()
    kernels: tuple[tuple[str, KernelFacts], ...] = ()
    """Of a binary, where they were told."""
    signature: tuple[tuple[str, str], ...] = ()
    """Of a Triton function: each parameter's type, ``constexpr`` for constants."""
    constants: tuple[tuple[str, int | float | bool | str | None], ...] = ()
    num_warps: int = 0
    num_stages: int = 0
    lines: tuple[int, ...] = ()
    """Of a Triton function: the user's line of each line of ``text``; 0 for none."""

    @staticmethod
    def cuda(text: str, *, name: str = "kernel.cu", defines: Mapping[str, Any] = {}) -> Source:
        """Kernels in CUDA C.

        ``defines`` are macros: name -> value, written as ``str`` writes it; True is 1. ``name`` is
        what errors call the file.
        """
        return Source("cuda", _name(name), _text(text), defines=_defines(defines))

    @staticmethod
    def opencl(text: str, *, name: str = "kernel.cl", defines: Mapping[str, Any] = {}) -> Source:
        """Kernels in OpenCL C, for OpenCL devices only."""
        return Source("opencl", _name(name), _text(text), defines=_defines(defines))

    @staticmethod
    def triton(
        fn: Callable[..., Any],
        *,
        signature: Mapping[str, str],
        constants: Mapping[str, int | float | bool | str | None] = {},
        num_warps: int = 4,
        num_stages: int = 3,
        name: str = "",
    ) -> Source:
        """A Triton kernel, compiled without a device, for CUDA and HIP targets and for devices
        whose driver has the group ``triton``.

        ``fn`` is a function, decorated by ``triton.jit`` or not. Its source text is taken here,
        with that of the functions it calls, and compiled elsewhere in a namespace of its own. So
        both may name: ``triton`` and its modules under any name, Triton's own functions, other
        functions of which the source is known, and numbers, strings, booleans and ``tl.constexpr``
        of the module; nothing else, and nothing of an enclosing function.

        ``signature`` is each parameter's type: ``*fp32`` for a pointer, ``i32``, ``fp32``, ...;
        parameters in ``constants`` may be left out of it. Nothing is assumed of their values: where
        a pointer or a number is a multiple of 16, say so in the kernel (``tl.multiple_of``).
        ``name`` renames the kernel as errors and `Module.kernel` know it (the function's own name
        otherwise). Raises BadInput.
        """
        from drivetrain.hal.language.pyfunction import function_text

        found = function_text(fn)
        types, values = dict(signature), dict(constants)
        for key in found.parameters:
            if key in values and types.setdefault(key, "constexpr") != "constexpr":
                raise BadInput(f"{found.name}: {key!r} is a constant and has the type {types[key]}")
            kind = types.get(key)
            if kind is None:
                raise BadInput(
                    f"{found.name}: the parameter {key!r} is neither in signature nor in constants"
                )
            if kind == "constexpr" and key not in values:
                raise BadInput(f"{found.name}: the constexpr {key!r} has no value in constants")
            if kind != "constexpr" and not _TRITON_TYPE.fullmatch(kind):
                raise BadInput(
                    f"{found.name}: {kind!r} is no type of a parameter; write i32, fp32, bf16, "
                    "*fp16 (a pointer), ... or constexpr"
                )
        for key in (*types, *values):
            if key not in found.parameters:
                raise BadInput(f"{found.name} has no parameter {key!r}")
        for key, value in values.items():
            if value is not None and not isinstance(value, (int, float, bool, str)):
                raise BadInput(
                    f"{found.name}: the constant {key!r} is a {type(value).__name__}; give a "
                    "number, a string, a bool or None"
                )
        if num_warps not in (1, 2, 4, 8, 16, 32):
            raise BadInput(f"num_warps is {num_warps}; it must be a power of 2 from 1 to 32")
        if not 1 <= num_stages <= 16:
            raise BadInput(f"num_stages is {num_stages}; it must be from 1 to 16")
        return Source(
            "triton",
            _name(name or found.name),
            _text(found.text),
            form=found.entry,
            signature=tuple((key, types[key]) for key in found.parameters),
            constants=tuple((key, values[key]) for key in found.parameters if key in values),
            num_warps=num_warps,
            num_stages=num_stages,
            lines=found.lines,
        )

    @staticmethod
    def binary(
        data: bytes, format: str, kernels: Mapping[str, Sequence[Any]] = {}, *, name: str = ""
    ) -> Source:
        """Code that exists already. Nothing checks what it does: it runs as it is.

        ``format`` is ``ptx``, ``cubin``, ``hsaco``, ``spirv``, ``cl`` (OpenCL C), ``clbin`` (an
        OpenCL platform's own binary) or ``so`` (for ``cpu``: exports ``dt_cpu_NAME``). ``kernels``
        are the types of each kernel's arguments: ``hal.PTR``, ``hal.F32``, ... or their names.
        """
        known = [form for forms in FORMS.values() for form in forms]
        if format not in known:
            raise BadInput(f"the format {format!r} is not known; there are {', '.join(known)}")
        code = bytes(data)
        if format in ("ptx", "cl"):
            try:
                code = _text(code.rstrip(b"\0").decode()).encode()
            except UnicodeDecodeError as error:
                raise BadInput(f"{format} is text, and this is not UTF-8: {error}") from None
            if format == "ptx" and b".version" not in code:
                raise BadInput("this is no PTX: it has no .version")
        elif not code:
            raise BadInput("the binary is empty")
        elif len(code) > LARGEST_SOURCE:
            raise BadInput(f"the binary has {len(code)} bytes; at most {LARGEST_SOURCE} are taken")
        elif not code.startswith(_MAGIC.get(format, (b"",))):
            raise BadInput(f"this is no {format}: it starts with {code[:4].hex()}")
        facts = tuple((kernel, _told(kernel, types)) for kernel, types in kernels.items())
        return Source("binary", _name(name or f"binary.{format}"), "", code, format, (), facts)

    def misfit(self, target: Target) -> str:
        """Why ``target`` does not take this kind of source; empty when it does."""
        if self.language == "triton" and target.triton is not None:
            return ""
        if target.kind not in FORMS:
            return f"{target.kind!r} is no kind of target; there are {', '.join(FORMS)}"
        if self.language == "binary":
            if self.form in FORMS[target.kind]:
                return ""
            return f"{target.kind} loads {' or '.join(FORMS[target.kind])}, not {self.form}"
        if target.kind not in _LANGUAGES[self.language]:
            how = ", and its driver has no group triton" if self.language == "triton" else ""
            return f"{self.language} sources are not compiled for {target.kind}{how}"
        if "binary_only" in target.features:
            return "this device takes binaries only; make one with its own tools (Source.binary)"
        return ""


def _text(text: str) -> str:
    if not isinstance(text, str):
        raise BadInput(f"the source is a {type(text).__name__}; give its text as str")
    if len(text) > LARGEST_SOURCE or len(text.encode(errors="replace")) > LARGEST_SOURCE:
        raise BadInput(f"the source has more than {LARGEST_SOURCE} bytes")
    if not text.strip():
        raise BadInput("the source is empty")
    at = text.find("\0")
    if at >= 0:
        raise BadInput(f"line {text.count(chr(10), 0, at) + 1} of the source has a NUL byte")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadInput(f"the source cannot be written as UTF-8: {error}") from None
    return text


def _name(name: str) -> str:
    if not re.fullmatch(r"[\w.+-][\w.+ -]{0,99}", name, re.ASCII):
        raise BadInput(
            f"the name {name!r} of a source: use up to 100 letters, digits, '.', '_', '+' and '-'"
        )
    return name


def _defines(defines: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((name, macro_value(name, value)) for name, value in defines.items()))


def macro_value(name: str, value: Any) -> str:
    """The text of a macro; raises BadInput where it cannot be one."""
    if not isinstance(name, str) or not _IDENTIFIER.fullmatch(name) or name == "defined":
        raise BadInput(f"{name!r} cannot be defined: a macro's name is a C identifier")
    if isinstance(value, bool):
        value = int(value)
    if not isinstance(value, (str, int, float)):
        raise BadInput(f"the macro {name} is a {type(value).__name__}; give a str or a number")
    text = str(value)
    if len(text) > 4096 or not text.isprintable():
        raise BadInput(f"the macro {name}: its value must be one printable line of at most 4096")
    return text


def _told(kernel: str, types: Sequence[Any]) -> KernelFacts:
    """Facts from the types that the caller names: words, or objects with a name and a size."""
    if not isinstance(kernel, str) or not kernel or "\0" in kernel:
        raise BadInput(f"{kernel!r} is no name of a kernel")
    sizes = {"ptr": 8, "bf16": 2, **SCALARS}
    params = []
    for index, kind in enumerate(types):
        word = kind if isinstance(kind, str) else getattr(kind, "name", None)
        nbytes = sizes.get(word) if isinstance(word, str) else None
        if word == "struct" and isinstance(getattr(kind, "nbytes", None), int):
            nbytes = kind.nbytes
        if not isinstance(word, str) or nbytes is None:
            raise BadInput(
                f"{kernel}, argument {index}: {kind!r} is no type; use hal.PTR, hal.F32, "
                "hal.struct_of(n), ..."
            )
        params.append(Param(word, nbytes, f"arg{index}"))
    return KernelFacts(kernel, tuple(params))
