"""A kernel whose threads are loops: each region of `fission`'s plan becomes one over the block."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drivetrain.hal.language.cpp import CppPrinter, needs_thread
from drivetrain.hal.language.fission import Once, Plan, Region, Repeat, Way
from drivetrain.hal.language.tree import (
    Block,
    Construct,
    Continue,
    Decl,
    Function,
    Index3,
    Intrinsic,
    Loop,
    Ref,
    Return,
    Stmt,
    Var,
    walk,
)
from drivetrain.hal.language.types import Array, Pointer, Struct, Type, size_of

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
    out.add(f"static DT_NOINLINE void k_{symbol}({', '.join([*hidden, *params])})", kernel.line)
    out.add("{")
    out.depth += 1
    printer.start(kernel)
    for item in plan.items:
        printer.item(item)
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
    out.add(f"  k_{symbol}({call});")
    out.add("  return 0;")
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
        out.add(f"std::memcpy(&dt_a{position}, dt_arguments[{position}], sizeof dt_a{position});")
    out.depth -= 1


def _by_value_or_reference(
    printer: CppPrinter, kind: Type, name: str, line: int, restrict: bool
) -> str:
    if isinstance(kind, Struct):
        return f"const {printer.spelled(kind, line)} &{name}"
    return printer.declared(kind, name, line, restrict=restrict)


class SplitPrinter(CppPrinter):
    def __init__(self, unit: Unit, plan: Plan) -> None:
        super().__init__(unit)
        self.plan = plan
        self.expanded = set(plan.expanded)
        self.scratch_each = self.scratch_arrays = 0
        self.in_thread = False
        self.loops = 0
        """Around the statement that is printed, inside its region."""
        self.labels = 0
        self.label_used = False

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

    # -- names

    def all_name(self, var: Var) -> str:
        return f"{self.name(var)}_all"

    def reference(self, e: Ref) -> str:
        if e.var in self.expanded:
            return f"{self.all_name(e.var)}[{'dt_t' if self.in_thread else '0'}]"
        return super().reference(e)

    def index3(self, e: Index3) -> str:
        if e.name == "threadIdx":
            return f"dt_{e.axis}"
        if e.name == "blockDim":
            return f"dt_n{e.axis}"
        return f"dt_given.{'index' if e.name == 'blockIdx' else 'grid'}[{'xyz'.index(e.axis)}]"

    def intrinsic(self, e: Intrinsic) -> str:
        if e.name.startswith("read_"):
            place, *rest = e.arguments
            assert isinstance(place, Ref)
            arguments = ", ".join(self.expr(argument) for argument in rest)
            return f"dt_{e.name}({self.all_name(place.var)}, dt_t, dt_given.threads, {arguments})"
        return super().intrinsic(e)

    # -- the plan

    def item(self, item: Region | Once | Way | Repeat) -> None:
        if isinstance(item, Region):
            self.region(item)
        elif isinstance(item, Once):
            if isinstance(item.stmt, Return):
                self.out.add("return;", item.stmt.line)
            else:
                self.stmt(item.stmt)
        elif isinstance(item, Way):
            self.out.add(f"if ({self.expr(item.test)})", item.line)
            self.items(item.yes)
            if item.no:
                self.out.add("else")
                self.items(item.no)
        else:
            self.repeat(item)

    def items(self, items: list[Region | Once | Way | Repeat]) -> None:
        self.out.add("{")
        self.out.depth += 1
        for item in items:
            self.item(item)
        self.out.depth -= 1
        self.out.add("}")

    def repeat(self, item: Repeat) -> None:
        loop = item.loop
        test = self.expr(loop.test) if loop.test is not None else ""
        if loop.post:
            self.out.add("do", loop.line)
            self.items(item.body)
            self.out.add(f"while ({test});", loop.line)
            return
        step = "" if loop.step is None else self.discarded(loop.step)
        self.out.add(f"for (; {test}; {step})", loop.line)
        self.items(item.body)

    def region(self, region: Region) -> None:
        body = [stmt for stmt in region.body if not self.empty(stmt)]
        if not body:
            return
        out = self.out
        out.add("for (uint dt_z = 0; dt_z < dt_nz; dt_z++)")
        out.add("for (uint dt_y = 0; dt_y < dt_ny; dt_y++) {")
        out.depth += 1
        out.add("const long dt_row = ((long)dt_z * dt_ny + dt_y) * dt_nx;")
        out.add("for (long dt_i = 0; dt_i < (long)dt_nx; dt_i++) {")
        out.depth += 1
        out.add("const uint dt_x = (uint)dt_i;")
        out.add("const long dt_t = dt_row + dt_i;")
        self.thread(region, body)
        out.depth -= 1
        out.add("}")
        out.depth -= 1
        out.add("}")

    def thread(self, region: Region, body: list[Stmt]) -> None:
        """What one thread does in a region."""
        self.in_thread, self.label_used = True, False
        self.labels += 1
        self.out.add("{")
        self.out.depth += 1
        for decl in region.again:
            self.decl(decl)
        for stmt in body:
            self.stmt(stmt)
        self.out.depth -= 1
        self.out.add("}")
        if self.label_used:
            self.out.add(f"dt_next_{self.labels}: ;")
        self.in_thread = False

    def empty(self, stmt: Stmt) -> bool:
        """A declaration that needs no code here."""
        if isinstance(stmt, Block):
            return all(self.empty(inner) for inner in stmt.body)
        if not isinstance(stmt, Decl):
            return False
        return stmt.var.role in ("shared", "dynamic") or (
            stmt.var in self.expanded and stmt.init is None
        )

    # -- statements of a thread

    def stmt(self, s: Stmt) -> None:
        if self.in_thread and (
            isinstance(s, Return) or (isinstance(s, Continue) and self.loops == 0)
        ):
            # The thread is done with this region.
            self.label_used = True
            self.out.add(f"goto dt_next_{self.labels};", s.line)
            return
        super().stmt(s)

    def loop(self, s: Loop) -> None:
        self.loops += 1
        super().loop(s)
        self.loops -= 1

    def decl(self, s: Decl) -> None:
        if s.var.role in ("shared", "dynamic"):
            return
        if s.var not in self.expanded:
            super().decl(s)
            return
        if s.init is None:
            return
        place = f"{self.all_name(s.var)}[dt_t]"
        if isinstance(s.init, Construct) and isinstance(s.var.type, Array):
            made = self.declared(s.var.type, "dt_value", s.line)
            self.out.add(
                f"{{ {made} = {self.braces(s.init)}; "
                f"std::memcpy(&{place}, &dt_value, sizeof dt_value); }}",
                s.line,
            )
            return
        self.out.add(f"{place} = {self.expr(s.init)};", s.line)
