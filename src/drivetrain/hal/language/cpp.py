"""C++ for the CPU: one translation unit that exports ``dt_cpu_NAME`` for each kernel.

A block's threads are loops inside one function (`cpp_block`), cut where they wait for one another
(`fission`); a kernel that cannot be cut gives each thread a small stack of its own (`cpp_fibers`).

Numbers: integers wrap, float arithmetic is rounded after each operation unless ``--fmad=true`` or
``--use_fast_math`` says otherwise, and the functions of ``math.h`` are the C library's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

from drivetrain.hal.language.facts import KernelFacts, Translated
from drivetrain.hal.language.fission import NotSplittable, Plan, split
from drivetrain.hal.language.inline import recursive
from drivetrain.hal.language.printer import (
    Lines,
    Printer,
    function_name,
    struct_names,
    structs_of,
)
from drivetrain.hal.language.signature import kernel_params, kernel_symbols
from drivetrain.hal.language.tokens import wrong
from drivetrain.hal.language.tree import (
    AddressOf,
    Call,
    Case,
    Construct,
    Decay,
    Decl,
    Expr,
    Function,
    Index3,
    Intrinsic,
    Program,
    Ref,
    Stmt,
    Subscript,
    Switch,
    Sync,
    Var,
    root_var,
    walk,
)
from drivetrain.hal.language.types import (
    HALF,
    Array,
    Pointer,
    Struct,
    Type,
    align_of,
    is_scalar,
    size_of,
)
from drivetrain.hal.language.uniform import with_waits

__all__ = ["CppPrinter", "Layout", "translate"]

SHARED_ALIGNMENT = 64
MOST_SHARED = 1 << 20
"""Bytes of static shared memory: as much as the device has."""
MOST_INLINED = 4000
"""Nodes of a function, with those that it calls, above which the compiler decides."""


def translate(program: Program) -> Translated:
    """The translation unit. Raises CompileError with the user's line."""
    unit = Unit(program)
    unit.print()
    return Translated(unit.out.text(), unit.kernels, unit.out.lines())


@cache
def _text(name: str) -> str:
    return (Path(__file__).parent / name).read_text()


class Unit:
    """One translation unit while it is written."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.out = Lines()
        self.kernels: dict[str, KernelFacts] = {}
        self.waiting = {name: with_waits(kernel) for name, kernel in program.kernels.items()}
        made = [kernel for kernel, _ in self.waiting.values()]
        self.functions = reached(made)
        everything = [*made, *self.functions]
        constants = [var for var in program.constants if _named(var, everything)]
        self.constants = constants
        structs = structs_of(everything, constants)
        self.structs: dict[Struct, str] = struct_names(structs)
        self.shared_of_functions = Layout()
        for function in self.functions:
            self.shared_of_functions.add(function)
        self.needs = {function: needs_thread(function) for function in self.functions}

    def print(self) -> None:
        from drivetrain.hal.language.cpp_block import print_split
        from drivetrain.hal.language.cpp_fibers import print_fibers

        plans: dict[str, Plan | None] = {}
        for name, (kernel, _) in self.waiting.items():
            try:
                plans[name] = split(kernel)
            except NotSplittable:
                plans[name] = None
        self._prelude(fibers=None in plans.values())
        self._types()
        for function in self.functions:
            self.out.add(f"{self._head(function, FunctionPrinter(self))};")
        for function in self.functions:
            self._function(function)
        symbols = kernel_symbols(plans)
        for name, plan in plans.items():
            kernel, facts = self.waiting[name]
            layout = self.layout(kernel)
            if plan is None:
                print_fibers(self, kernel, symbols[name], layout)
            else:
                print_split(self, kernel, symbols[name], plan, layout)
            self.kernels[name] = KernelFacts(
                symbols[name],
                kernel_params(kernel),
                dynamic_shared=layout.dynamic or self.shared_of_functions.dynamic,
                barriers=bool(facts.waits),
                launch_bounds=kernel.launch_bounds,
            )

    def layout(self, kernel: Function) -> Layout:
        """Where the kernel's shared memory lies, behind that of the functions it may call."""
        layout = Layout()
        if any(function in self.needs for function in reached([kernel])):
            layout.nbytes = self.shared_of_functions.nbytes
            layout.places = dict(self.shared_of_functions.places)
        layout.add(kernel)
        return layout

    def _prelude(self, *, fibers: bool) -> None:
        self.out.add(_text("prelude_cpu.h").replace("@COMMON@", _text("prelude_common.h")))
        if fibers:
            self.out.add(_text("prelude_fibers.h").replace("@UNIT@", "unit"))

    def _types(self) -> None:
        printer = FunctionPrinter(self)
        for name in self.structs.values():
            self.out.add(f"struct {name};")
        for struct, name in self.structs.items():
            if struct is HALF:
                continue
            self.out.add(f"struct alignas({align_of(struct)}) {name} {{", struct.line)
            for field, kind in struct.fields:
                text = printer.declared(kind, field if struct.vector else f"m_{field}", struct.line)
                self.out.add(f"  {text};", struct.line)
            if not struct.fields:
                self.out.add("  char nothing;")
            self.out.add("};")
            self.out.add(f'static_assert(sizeof({name}) == {size_of(struct)}, "size");')
        for var in self.constants:
            assert var.init is not None
            printer.names[var] = self.constant_name(var)
            self.out.add(
                f"static const {printer.declaration(var)} = {printer.braces(var.init)};", var.line
            )

    def constant_name(self, var: Var) -> str:
        return f"c_{var.name}_{self.constants.index(var)}"

    # -- functions of the user's

    def _head(self, function: Function, printer: FunctionPrinter) -> str:
        params = [
            printer.declared(
                var.type, printer.name(var), var.line, restrict=var.restrict and not var.reference
            )
            for var in function.params
        ]
        if self.needs[function]:
            params = [
                "const dt_block &dt_b, const uint dt_x, const uint dt_y, const uint dt_z",
                *params,
            ]
        result = printer.declared(function.result, "", function.line)
        how = "DT_INLINE" if self._small(function) else "static inline"
        return f"{how} {result} {function_name(function)}({', '.join(params)})"

    def _small(self, function: Function) -> bool:
        return not recursive(function) and expanded_size(function, {}) <= MOST_INLINED

    def _function(self, function: Function) -> None:
        assert function.body is not None
        printer = FunctionPrinter(self)
        printer.layout = self.shared_of_functions
        self.out.add(self._head(function, printer), function.line)
        printer.block(function.body)

    def call(self, e: Call, arguments: list[str]) -> str:
        hidden = ["dt_b, dt_x, dt_y, dt_z"] if self.needs[e.function] else []
        return f"{function_name(e.function)}({', '.join([*hidden, *arguments])})"


class Layout:
    """Where shared variables lie in the block's shared memory."""

    def __init__(self) -> None:
        self.places: dict[Var, int] = {}
        self.nbytes = 0
        self.dynamic = False

    def add(self, function: Function) -> None:
        assert function.body is not None
        for node in walk(function.body):
            if not isinstance(node, Decl):
                continue
            if node.var.role == "dynamic":
                self.dynamic = True
            elif node.var.role == "shared" and node.var not in self.places:
                start = -(-self.nbytes // SHARED_ALIGNMENT) * SHARED_ALIGNMENT
                self.places[node.var] = start
                self.nbytes = start + size_of(node.var.type)
                if self.nbytes > MOST_SHARED:
                    raise wrong(
                        node.line,
                        f"{self.nbytes} bytes of shared memory with {node.var.name}; a block has "
                        f"{MOST_SHARED}",
                    )


class CppPrinter(Printer):
    """What C++ says differently, wherever the code stands."""

    nothing = ""

    def __init__(self, unit: Unit) -> None:
        super().__init__(unit.structs)
        self.unit = unit
        self.out = unit.out
        self.layout = Layout()

    def reference(self, e: Ref) -> str:
        if e.var.role == "const":
            if is_scalar(e.var.type):
                assert e.var.init is not None
                return self.expr(e.var.init)
            return self.unit.constant_name(e.var)
        return self.name(e.var)

    def expr(self, e: Expr) -> str:
        # The user's own constants are const in C++ too; pointers never are here.
        if isinstance(e, Decay | AddressOf):
            var = root_var(e.of if isinstance(e, Decay) else e.operand)
            if var is not None and var.role in ("const", "param"):
                return f"(({self.declared(e.type, '', e.line)}){super().expr(e)})"
        if isinstance(e, Subscript) and isinstance(e.of, Decay):
            return f"{self.expr(e.of.of)}[{self.expr(e.index)}]"
        return super().expr(e)

    def stmt(self, s: Stmt) -> None:
        if not isinstance(s, Switch):
            super().stmt(s)
            return
        self.out.add(f"switch ({self.expr(s.test)}) {{", s.line)
        self.out.depth += 1
        # What stands behind a label has a block of its own: C++ lets no jump pass a declaration.
        opened = False
        for inner in s.body.body:
            label = isinstance(inner, Case)
            if opened and label:
                self.out.add("}")
                opened = False
            elif not opened and not label:
                self.out.add("{")
                opened = True
            self.stmt(inner)
        if opened:
            self.out.add("}")
        self.out.depth -= 1
        self.out.add("}")

    def call(self, e: Call) -> str:
        return self.unit.call(e, [self.expr(argument) for argument in e.arguments])

    def construct(self, e: Construct) -> str:
        parts = ", ".join(self.braces(part) for part in e.parts)
        if isinstance(e.type, Array):
            raise wrong(e.line, "an array in braces can only be the first value of a variable")
        return f"{self.spelled(e.type, e.line)}{{{parts}}}"

    def declared(
        self, kind: Type, name: str, line: int, *, space: str = "", restrict: bool = False
    ) -> str:
        if isinstance(kind, Array) and kind.count < 0:
            return self.declared(Pointer(kind.of), name, line)
        return super().declared(kind, name, line, space=space, restrict=restrict)

    def shared_place(self, var: Var, shared: str, dynamic: str) -> str:
        """The declaration that makes ``var`` a name for its place in shared memory."""
        name = self.name(var)
        if var.role == "dynamic":
            assert isinstance(var.type, Array)
            pointer = Pointer(var.type.of)
            made = self.declared(pointer, f"const {name}", var.line)
            return f"{made} = ({self.declared(pointer, '', var.line)}){dynamic};"
        place = f"{shared} + {self.layout.places[var]}"
        reference = self.declared(var.type, f"(&{name})", var.line)
        pointer_type = self.declared(var.type, "(*)", var.line)
        return f"{reference} = *({pointer_type})({place});"


class FunctionPrinter(CppPrinter):
    """Inside a function: the block and the thread are arguments."""

    def index3(self, e: Index3) -> str:
        if e.name == "threadIdx":
            return f"dt_{e.axis}"
        where = {"blockIdx": "index", "blockDim": "block", "gridDim": "grid"}[e.name]
        return f"dt_b.{where}[{'xyz'.index(e.axis)}]"

    def decl(self, s: Decl) -> None:
        if s.var.role in ("shared", "dynamic"):
            self.out.add(self.shared_place(s.var, "dt_b.shared", "dt_b.dynamic"), s.line)
            return
        super().decl(s)

    def intrinsic(self, e: Intrinsic) -> str:
        if e.name.startswith(("shfl", "vote")):
            arguments = ", ".join(self.expr(argument) for argument in e.arguments)
            return f"dt_{e.name}(dt_b, {arguments})"
        return super().intrinsic(e)

    def sync(self, s: Sync) -> None:
        if s.scope == "block":
            self.out.add(f"dt_sync_block(dt_b, {s.line}u);", s.line)
        else:
            mask = "~0u" if s.mask is None else self.expr(s.mask)
            self.out.add(f"dt_sync_lanes(dt_b, {mask});", s.line)


def reached(kernels: Iterable[Function]) -> list[Function]:
    """The functions that kernels call, directly or not, callees first."""
    out: dict[Function, None] = {}
    entered: set[Function] = set()

    def enter(function: Function) -> None:
        assert function.body is not None
        for node in walk(function.body):
            if isinstance(node, Call) and node.function not in entered:
                entered.add(node.function)
                enter(node.function)
                out[node.function] = None

    for kernel in kernels:
        enter(kernel)
    return list(out)


def _named(var: Var, functions: list[Function]) -> bool:
    return any(
        isinstance(node, Ref) and node.var is var
        for function in functions
        if function.body is not None
        for node in walk(function.body)
    )


def needs_thread(function: Function) -> bool:
    """Whether it, or one that it calls, asks which thread or block it runs for."""
    for each in [function, *reached([function])]:
        assert each.body is not None
        for node in walk(each.body):
            if isinstance(node, Index3 | Sync):
                return True
            if isinstance(node, Decl) and node.var.role in ("shared", "dynamic"):
                return True
            if isinstance(node, Intrinsic) and node.name.startswith(("shfl", "vote")):
                return True
    return False


def expanded_size(function: Function, known: Mapping[Function, int]) -> int:
    """Nodes of the function with every call written out; counting stops at a million."""
    sizes = dict(known)

    def size(each: Function) -> int:
        if each not in sizes:
            sizes[each] = 0
            assert each.body is not None
            total = 0
            for node in walk(each.body):
                total += 1
                if isinstance(node, Call):
                    total += size(node.function)
            sizes[each] = min(total, 1_000_000)
        return sizes[each]

    return size(function)
