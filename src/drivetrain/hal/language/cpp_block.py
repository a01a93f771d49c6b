"""A kernel whose threads are loops: each region of `fission`'s plan becomes one over the block."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drivetrain.hal.language.cpp import CppPrinter, needs_thread
from drivetrain.hal.language.cpp_rows import Item, RowPrinter
from drivetrain.hal.language.fission import Agreement, Once, Plan, Region, Repeat, Way
from drivetrain.hal.language.tree import (
    Decl,
    Function,
    Return,
    Var,
    walk,
)
from drivetrain.hal.language.types import (
    Array,
    Pointer,
    Struct,
    Type,
    size_of,
)

if TYPE_CHECKING:
    from drivetrain.hal.language.cpp import Layout, Unit

__all__ = ["entry", "print_split"]

MOST_THREADS = 1024
MOST_ON_STACK = 256 << 10
"""Bytes of variables with an element for each thread that lie on the stack; others are malloc's."""


def print_split(unit: Unit, kernel: Function, symbol: str, plan: Plan, layout: Layout) -> None:
    """The function that runs one block, and the entry that runs a range of them."""
    printer = SplitPrinter(unit, plan)
    printer.layout = layout
    out = unit.out
    params = [
        _by_value_or_reference(printer, var.type, printer.name(var), var.line, var.restrict)
        for var in kernel.params
    ]
    hidden = [
        "const dt_block &dt_given", "char *__restrict dt_shared", "char *__restrict dt_dynamic",
        "char *__restrict dt_scratch",
    ]  # fmt: skip
    out.add(f"static DT_NOINLINE int k_{symbol}({', '.join([*hidden, *params])})", kernel.line)
    out.add("{")
    out.depth += 1
    printer.start(kernel)
    for item in plan.items:
        printer.item(item)
    out.add("return 0;")
    out.depth -= 1
    out.add("}")
    call = ", ".join(
        ["dt_b", "dt_b.shared", "dt_b.dynamic", "dt_b.scratch"]
        + [f"dt_a{position}" for position in range(len(kernel.params))]
    )
    entry(unit, kernel, symbol)
    out.depth += 1
    sizes = f"{layout.nbytes}, {printer.scratch_each}, {printer.scratch_arrays}"
    out.add(f"return dt_run(dt_range, {sizes}, [&](dt_block &dt_b) {{")
    out.add(f"  return k_{symbol}({call});")
    out.add("});")
    out.depth -= 1
    out.add("}")


def entry(unit: Unit, kernel: Function, symbol: str) -> None:
    """The exported function up to its arguments, which are ``dt_a0``, ``dt_a1``, ..."""
    out, printer = unit.out, CppPrinter(unit)
    out.add(f"DT_EXPORT int dt_cpu_{symbol}(const dt_cpu_range *dt_range, void **dt_arguments)")
    out.add("{")
    out.depth += 1
    for position, var in enumerate(kernel.params):
        out.add(f"{printer.declared(var.type, f'dt_a{position}', var.line)};")
        out.add(f"memcpy(&dt_a{position}, dt_arguments[{position}], sizeof dt_a{position});")
    out.depth -= 1


def _by_value_or_reference(
    printer: CppPrinter, kind: Type, name: str, line: int, restrict: bool
) -> str:
    if isinstance(kind, Struct):
        return f"const {printer.spelled(kind, line)} &{name}"
    return printer.declared(kind, name, line, restrict=restrict)


class SplitPrinter(RowPrinter):
    """Prints the parts of a plan around its regions."""

    def __init__(self, unit: Unit, plan: Plan) -> None:
        super().__init__(unit, plan)
        self.scratch_each = self.scratch_arrays = 0
        self.agreements = 0

    def start(self, kernel: Function) -> None:
        """What the whole block knows."""
        out = self.out
        assert kernel.body is not None
        for axis in range(3):
            out.add(f"const uint dt_n{'xyz'[axis]} = dt_given.block[{axis}];")
        if needs_thread(kernel) or self.calls_with_block(kernel):
            out.add("dt_block dt_b = dt_given;")
            out.add("dt_b.shared = dt_shared;")
            out.add("dt_b.dynamic = dt_dynamic;")
        seen: set[Var] = set()
        for node in walk(kernel.body):
            if not isinstance(node, Decl) or node.var in seen:
                continue
            if node.var.role in ("shared", "dynamic"):
                seen.add(node.var)
                out.add(self.shared_place(node.var, "dt_shared", "dt_dynamic"), node.line)
        on_stack = 0
        for var in self.plan.expanded:
            name, nbytes = self.all_name(var), size_of(var.type)
            if on_stack + nbytes * MOST_THREADS <= MOST_ON_STACK:
                on_stack += nbytes * MOST_THREADS
                made = self.declared(Array(var.type, MOST_THREADS), name, var.line)
                out.add(f"alignas(64) {made};", var.line)
                continue
            pointer = self.declared(Pointer(var.type), f"const {name}", var.line)
            place = f"dt_scratch + {self.scratch_each}UL * dt_given.threads"
            cast = self.declared(Pointer(var.type), "", var.line)
            out.add(
                f"{pointer} = ({cast})dt_aligned({place} + {128 * self.scratch_arrays});", var.line
            )
            self.scratch_each += nbytes
            self.scratch_arrays += 1

    def calls_with_block(self, kernel: Function) -> bool:
        return any(self.unit.needs.values())

    def item(self, item: Item) -> None:
        if isinstance(item, Region):
            self.region(item)
        elif isinstance(item, Once):
            if isinstance(item.stmt, Return):
                self.out.add("return 0;", item.stmt.line)
            else:
                self.stmt(item.stmt)
        elif isinstance(item, Way):
            if isinstance(item.test, Agreement):
                name = self.agreement(item.test)
                self.out.add(f"const int {name}_now = {name}();", item.line)
                self.out.add(f"if ({name}_now > 1) return 3;")
                self.out.add(f"if ({name}_now)", item.line)
            else:
                self.out.add(f"if ({self.expr(item.test)})", item.line)
            self.items(item.yes)
            if item.no:
                self.out.add("else")
                self.items(item.no)
        else:
            self.repeat(item)

    def items(self, items: list[Item]) -> None:
        self.out.add("{")
        self.out.depth += 1
        for item in items:
            self.item(item)
        self.out.depth -= 1
        self.out.add("}")

    def repeat(self, item: Repeat) -> None:
        loop = item.loop
        if isinstance(item.test, Agreement):
            name = self.agreement(item.test)
            self.out.add(f"int {name}_now = 1;", loop.line)
            test = f"({name}_now = {name}()) == 1"
        else:
            test = self.expr(item.test) if item.test is not None else ""
        self.loop_over_items(item, test)
        if isinstance(item.test, Agreement):
            self.out.add(f"if ({name}_now > 1) return 3;")

    def loop_over_items(self, item: Repeat, test: str) -> None:
        loop = item.loop
        if loop.post:
            self.out.add("do", loop.line)
            self.items(item.body)
            self.out.add(f"while ({test});", loop.line)
            return
        step = "" if loop.step is None else self.discarded(loop.step)
        self.out.add(f"for (; {test}; {step})", loop.line)
        self.items(item.body)

    def agreement(self, agreement: Agreement) -> str:
        """A function of what all threads find: 0, 1, or 2 when they do not agree."""
        self.agreements += 1
        name, out = f"dt_agree_{self.agreements}", self.out
        out.add(f"auto {name} = [&]() -> int {{", agreement.test.line)
        out.depth += 1
        out.add("int dt_found = 0;")
        out.add("for (uint dt_z = 0; dt_z < dt_nz; dt_z++)")
        out.add("for (uint dt_y = 0; dt_y < dt_ny; dt_y++)")
        out.add("for (uint dt_x = 0; dt_x < dt_nx; dt_x++) {")
        out.depth += 1
        out.add("const long dt_t = ((long)dt_z * dt_ny + dt_y) * dt_nx + dt_x;")
        self.in_thread = True
        for decl in agreement.again:
            CppPrinter.decl(self, decl)
        out.add(f"dt_found |= {self.expr(agreement.test)} ? 1 : 2;", agreement.test.line)
        self.in_thread = False
        out.depth -= 1
        out.add("}")
        both = "1" if agreement.any else "2"
        out.add(f"return dt_found == 3 ? {both} : dt_found & 1;")
        out.depth -= 1
        out.add("};")
        return name
