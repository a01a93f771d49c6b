"""CUDA C to OpenCL C 1.2: every pointer has its address space, and there is no generic one.

What holds on every device:

* Integers agree bit for bit with the CPU: arithmetic wraps, shifts by too much and division by zero
  give what ``prelude_common.h`` says, float to integer saturates.
* ``+ - * /``, ``sqrt`` and ``fma`` of float round once, to nearest, where the platform divides
  correctly rounded; ``a*b+c`` is not contracted unless ``fmad`` is asked for. Other functions are
  within the ulps of the OpenCL specification, section "Relative Error as ULPs". Which bits a NaN
  has is left open; a device may turn denormals to 0 (``CL_FP_DENORM`` tells).
* Shared memory is a kernel's ``__local`` memory; dynamic shared memory is a ``__local`` pointer
  that comes last. A warp has 32 threads, in the order of the block; see `warps`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files

from drivetrain.hal.language.facts import KernelFacts, Translated
from drivetrain.hal.language.inline import inlined, waits_for
from drivetrain.hal.language.opencl_body import Body, Hidden
from drivetrain.hal.language.printer import Lines
from drivetrain.hal.language.signature import kernel_params, kernel_symbols
from drivetrain.hal.language.spaces import Places, Scheme, Shape, Spaces, signature
from drivetrain.hal.language.tokens import wrong
from drivetrain.hal.language.tree import (
    Call,
    Decl,
    Function,
    Program,
    Var,
    walk,
)
from drivetrain.hal.language.types import (
    HALF,
    Struct,
)
from drivetrain.hal.language.uniform import refuse_divergent, uniformity
from drivetrain.hal.language.warps import LANES, lowered, uses_warps

__all__ = ["translate"]


def translate(program: Program, features: Sequence[str], *, fmad: bool = False) -> Translated:
    """The program in OpenCL C. Raises CompileError with the user's line.

    ``features`` are those of the device: ``fp64``, ``int64_atomics``. ``fmad``: a*b+c may be
    rounded once.
    """
    unit = Unit(program, frozenset(features))
    symbols = kernel_symbols(program.kernels)
    facts = {}
    for name, kernel in program.kernels.items():
        try:
            facts[name] = unit.kernel(f"k_{symbols[name]}", kernel)
        except RecursionError:
            raise wrong(kernel.line, f"{kernel.name} is nested too deeply") from None
    text, lines = unit.assembled(fmad)
    return Translated(text, facts, lines)


@cache
def _prelude() -> str:
    here = files("drivetrain.hal.language")
    common = here.joinpath("prelude_common.h").read_text()
    return here.joinpath("prelude_opencl.h").read_text().replace("@COMMON@\n", common)


@dataclass
class Unit:
    """One translation: kernels, the functions cloned for them, structs and constants."""

    program: Program
    features: frozenset[str]
    spaces: Spaces = field(default_factory=Spaces)
    out: Lines = field(default_factory=Lines)
    structs: dict[tuple[Struct, tuple[str, ...]], str] = field(default_factory=dict)
    struct_lines: Lines = field(default_factory=Lines)
    names: set[str] = field(default_factory=set)
    clones: dict[tuple[Function, tuple[str, ...]], str] = field(default_factory=dict)
    constants: dict[Var, str] = field(default_factory=dict)
    constant_lines: Lines = field(default_factory=Lines)
    hidden_of: dict[Function, Hidden] = field(default_factory=dict)
    fp64: bool = False
    atomics: bool = False
    int64_atomics: bool = False

    def unique(self, plain: str) -> str:
        name, count = plain, 2
        while name in self.names:
            name, count = f"{plain}_{count}", count + 1
        self.names.add(name)
        return name

    def kernel(self, symbol: str, kernel: Function) -> KernelFacts:
        flat = inlined(kernel)
        assert flat.body is not None
        known = uniformity(flat)
        refuse_divergent(known)
        warps = uses_warps(flat)
        if warps:
            flat = lowered(flat, known)
        symbol = self.unique(symbol)
        places = Places(flat, self.spaces)
        hidden = self.hidden(flat)
        printer = Body(self, places, hidden)
        printer.print_kernel(symbol, flat, warps)
        self.out.rows += printer.out.rows
        # Shuffles keep a word for each thread.
        bounds = kernel.launch_bounds or (LANES if warps else 0)
        waits = bool(waits_for(kernel))
        return KernelFacts(symbol, kernel_params(kernel), hidden.dynamic, waits, bounds)

    def hidden(self, function: Function) -> Hidden:
        if function not in self.hidden_of:
            shared: dict[Var, None] = {}
            dynamic = False
            assert function.body is not None
            for node in walk(function.body):
                if isinstance(node, Decl) and node.var.role in ("shared", "dynamic"):
                    dynamic = dynamic or node.var.role == "dynamic"
                    if node.var.role == "shared":
                        shared[node.var] = None
                elif isinstance(node, Call):
                    inner = self.hidden(node.function)
                    shared.update(dict.fromkeys(inner.shared))
                    dynamic = dynamic or inner.dynamic
            self.hidden_of[function] = Hidden(tuple(shared), dynamic)
        return self.hidden_of[function]

    def clone(self, call: Call, scheme: Scheme) -> str:
        """The name of the function for these spaces; printed when it is first asked for."""
        function = call.function
        key = (function, signature([*scheme.params, scheme.result]))
        if key not in self.clones:
            self.clones[key] = self.unique(f"d_{function.name}")
            places = Places(function, self.spaces, scheme)
            printer = Body(self, places, self.hidden(function))
            printer.print_function(self.clones[key], function)
            self.out.rows += printer.out.rows
        return self.clones[key]

    def struct(self, kind: Struct, shape: Shape | None) -> str:
        if kind is HALF:
            return "dt_half"
        key = (kind, signature([shape]))
        if key not in self.structs:
            plain = f"dt_{kind.name}" if kind.vector else f"s_{kind.name or 'nameless'}"
            name = self.structs[key] = self.unique(plain)
            printer = Body(self, None, Hidden())
            rows = []
            for label, part in kind.fields:
                inner = shape.part(label) if shape is not None else None
                plain = label if kind.vector else f"m_{label}"
                rows.append(f"  {printer.typed(part, inner, plain, kind.line)};")
            align = f"__attribute__((aligned({kind.align}))) " if kind.align else ""
            out = self.struct_lines
            out.add(f"struct {align}{name} {{", kind.line)
            for row in rows:
                out.add(row, kind.line)
            out.add("};")
        return self.structs[key]

    def constant(self, var: Var) -> str:
        """The name of a constant of the file."""
        if var not in self.constants:
            name = self.constants[var] = self.unique(f"c_{var.name}")
            printer = Body(self, None, Hidden())
            assert var.init is not None
            declared = printer.typed(var.type, None, name, var.line, storage="__constant")
            self.constant_lines.add(f"{declared} = {printer.fixed(var.init)};", var.line)
        return self.constants[var]

    def assembled(self, fmad: bool) -> tuple[str, tuple[int, ...]]:
        out = Lines()
        for word, on in (
            ("DT_FP64", self.fp64), ("DT_FMAD", fmad), ("DT_ATOMICS", self.atomics),
            ("DT_INT64_ATOMICS", self.int64_atomics),
        ):  # fmt: skip
            out.add(f"#define {word} {int(on)}")
        out.add(_prelude().rstrip("\n"))
        for name in self.structs.values():
            out.add(f"typedef struct {name} {name};")
        out.rows += self.struct_lines.rows + self.constant_lines.rows + self.out.rows
        return out.text(), out.lines()

    def needs_fp64(self, line: int) -> None:
        if "fp64" not in self.features:
            raise wrong(
                line, "double is used here and the device has no fp64: use float (1.0f, sqrtf)"
            )
        self.fp64 = True

    def needs_atomics(self, word: str, line: int) -> None:
        self.atomics = True
        if word in ("i64", "u64", "f64"):
            if "int64_atomics" not in self.features:
                raise wrong(
                    line, "the device has no atomics of 64 bits (cl_khr_int64_base_atomics)"
                )
            self.int64_atomics = True
