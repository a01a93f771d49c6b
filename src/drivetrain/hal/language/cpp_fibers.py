"""A kernel whose threads have stacks of their own, for waits that cannot be split."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drivetrain.hal.language.cpp import FunctionPrinter, reached
from drivetrain.hal.language.cpp_block import entry
from drivetrain.hal.language.inline import recursive
from drivetrain.hal.language.tree import Decl, Function, walk
from drivetrain.hal.language.types import size_of

if TYPE_CHECKING:
    from drivetrain.hal.language.cpp import Layout, Unit

__all__ = ["print_fibers"]

STACK = 64 << 10
RECURSIVE_STACK = 256 << 10


def print_fibers(unit: Unit, kernel: Function, symbol: str, layout: Layout) -> None:
    assert kernel.body is not None
    out, printer = unit.out, FunctionPrinter(unit)
    printer.layout = layout
    out.add(
        f"static void k_{symbol}(const dt_block *dt_given, uint dt_x, uint dt_y, uint dt_z, "
        "void **dt_arguments)",
        kernel.line,
    )
    out.add("{")
    out.depth += 1
    out.add("const dt_block &dt_b = *dt_given;")
    for position, var in enumerate(kernel.params):
        name = printer.name(var)
        made = printer.declared(var.type, name, var.line, restrict=var.restrict)
        out.add(f"{made};", var.line)
        out.add(f"memcpy((void *)&{name}, dt_arguments[{position}], sizeof {name});")
    printer.block(kernel.body)
    out.depth -= 1
    out.add("}")
    entry(unit, kernel, symbol)
    out.depth += 1
    out.add(f"dt_stacks dt_all(dt_range, {stack_bytes(kernel)});")
    out.add("if (!dt_all.ok()) return 1;")
    out.add(f"return dt_run(dt_range, {layout.nbytes}, 0, 0, [&](dt_block &dt_b) {{")
    out.add("  dt_b.fibers = &dt_all.fibers;")
    out.add(f"  return dt_run_fibers(&dt_all.fibers, k_{symbol}, &dt_b, dt_arguments);")
    out.add("});")
    out.depth -= 1
    out.add("}")


def stack_bytes(kernel: Function) -> int:
    """Enough for all variables twice, and for what the C library's functions need."""
    total, base = 0, STACK
    for function in [kernel, *reached([kernel])]:
        assert function.body is not None
        if recursive(function):
            base = RECURSIVE_STACK
        for node in walk(function.body):
            if isinstance(node, Decl) and node.var.role == "local":
                total += size_of(node.var.type)
        total += sum(size_of(var.type) for var in function.params)
    return base + -(-2 * total // 4096) * 4096
