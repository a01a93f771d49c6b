"""What the threads of a region do, as loops along ``threadIdx.x``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from drivetrain.hal.language.cpp import CppPrinter
from drivetrain.hal.language.cpp_lanes import Guard, Lanes, unsteady
from drivetrain.hal.language.cpp_together import STRIP, Together, together
from drivetrain.hal.language.fission import Once, Plan, Region, Repeat, Way
from drivetrain.hal.language.printer import Lines
from drivetrain.hal.language.tree import (
    Binary,
    Block,
    Cast,
    Compound,
    Construct,
    Continue,
    Decay,
    Decl,
    Do,
    Expr,
    Index3,
    Intrinsic,
    Lit,
    Loop,
    PointerAdd,
    Ref,
    Return,
    Stmt,
    Subscript,
    Var,
    walk,
)
from drivetrain.hal.language.types import (
    I32,
    I64,
    U32,
    U64,
    VOID,
    Array,
    is_float,
    is_scalar,
)

if TYPE_CHECKING:
    from drivetrain.hal.language.cpp import Unit

__all__ = ["Item", "RowPrinter", "regions"]

Item = Region | Once | Way | Repeat


class Strip:
    """Lanes that go around loops together, while they are printed."""

    def __init__(self, lanes: Lanes, together: Together) -> None:
        self.lanes, self.together = lanes, together
        self.expanded = set(together.plan.expanded)


class RowPrinter(CppPrinter):
    """Prints regions; `item` is what prints the other parts of a plan."""

    def __init__(self, unit: Unit, plan: Plan) -> None:
        super().__init__(unit)
        self.plan = plan
        self.expanded = set(plan.expanded)
        self.in_thread = False
        self.lanes: Lanes | None = None
        self.lane = ""
        """What stands for the lane before its loop."""
        self.bases: dict[tuple[str, str, int], str] = {}
        self.inner_bases: dict[tuple[str, str, int], str] = {}
        self.strip: Strip | None = None
        self.shadows: dict[Var, str] = {}
        """64-bit names of variables of the thread."""
        self.unsteady = set[Var]()
        for region in regions(plan.items):
            self.unsteady |= unsteady(Block(0, region.body))
        self.loops = 0
        """Around the statement that is printed, inside its region."""
        self.labels = 0
        self.label_used = False

    def item(self, item: Item) -> None:
        raise NotImplementedError

    def all_name(self, var: Var) -> str:
        return f"{self.name(var)}_all"

    def reference(self, e: Ref) -> str:
        if self.lane and self.lanes is not None and e.var in self.lanes.linear:
            init = self.lanes.linear[e.var].init
            assert init is not None
            return self.expr(init)
        return self.element(e.var) or super().reference(e)

    def element(self, var: Var) -> str:
        """A variable that has an element for each thread, or for each lane of a strip."""
        if var in self.expanded:
            return f"{self.all_name(var)}[{'dt_t' if self.in_thread else '0'}]"
        if self.strip is not None and var in self.strip.expanded:
            return f"{self.lane_name(var)}[{'dt_l' if self.in_thread else '0'}]"
        return ""

    def lane_name(self, var: Var) -> str:
        return f"{self.name(var)}_lane"

    def index3(self, e: Index3) -> str:
        if e.name == "threadIdx":
            return self.lane if self.lane and e.axis == "x" else f"dt_{e.axis}"
        if e.name == "blockDim":
            return f"dt_n{e.axis}"
        return f"dt_given.{'index' if e.name == 'blockIdx' else 'grid'}[{'xyz'.index(e.axis)}]"

    def expr(self, e: Expr) -> str:
        if isinstance(e, Subscript) and self.in_thread:
            of = self.expr(e.of.of if isinstance(e.of, Decay) else e.of)
            return f"{of}[{self.index(e.index)}]"
        if isinstance(e, PointerAdd) and self.in_thread:
            return f"({self.expr(e.pointer)} {e.op} {self.index(e.index)})"
        return super().expr(e)

    def intrinsic(self, e: Intrinsic) -> str:
        if e.name.startswith("read_"):
            place, *rest = e.arguments
            assert isinstance(place, Ref)
            arguments = ", ".join(self.expr(argument) for argument in rest)
            return f"dt_{e.name}({self.all_name(place.var)}, dt_t, dt_given.threads, {arguments})"
        return super().intrinsic(e)

    def region(self, region: Region) -> None:
        body = [stmt for stmt in region.body if not self.empty(stmt)]
        if not body:
            return
        if self.strip is not None:
            self.region_of_strip(region, body)
            return
        lanes = Lanes(self.is_fixed, self.unsteady, self.expanded)
        lanes.read(region.again, body)
        out = self.out
        out.add("for (uint dt_z = 0; dt_z < dt_nz; dt_z++)")
        out.add("for (uint dt_y = 0; dt_y < dt_ny; dt_y++) {")
        out.depth += 1
        out.add("const long dt_row = ((long)dt_z * dt_ny + dt_y) * dt_nx;")
        self.lanes = lanes
        for decl in lanes.row.values():
            super().decl(decl)
        if lanes.tests:
            out.add(f"if ({' && '.join(map(self.expr, lanes.tests))})", lanes.tests[0].line)
        self.row(lanes)
        self.lanes = None
        out.depth -= 1
        out.add("}")

    def row(self, lanes: Lanes) -> None:
        """The lanes along ``threadIdx.x``, in pieces where no index wraps."""
        out = self.out
        self.bases, self.shadows = {}, {}
        bounds = [self.bound(guard) for guard in lanes.guards]
        strip = together(lanes, self.expanded, self.plan.block)
        self.out = Lines()
        self.out.depth = out.depth + 1
        if strip is None:
            self.each_lane(lanes)
        else:
            self.strips(Strip(lanes, strip))
        inner, self.out = self.out, out
        out.add("for (int dt_lo = 0, dt_hi = (int)dt_nx; dt_lo < (int)dt_nx; dt_lo = dt_hi) {")
        out.depth += 1
        out.add("dt_hi = (int)dt_nx;")
        self.piece(self.bases, bounds)
        out.rows += inner.rows
        out.depth -= 1
        out.add("}")

    def piece(self, bases: dict[tuple[str, str, int], str], bounds: list[str]) -> None:
        for (text, kind, step), name in bases.items():
            self.out.add(f"const long {name} = dt_linear<{kind}>({text}, {step}, dt_lo, dt_hi);")
        self.out.add("int dt_from = dt_lo, dt_to = dt_hi;")
        for text in bounds:
            self.out.add(text)

    def each_lane(self, lanes: Lanes) -> None:
        out = self.out
        out.add("for (int dt_l = dt_from; dt_l < dt_to; dt_l++) {")
        out.depth += 1
        out.add("const long dt_i = dt_l, dt_t = dt_row + dt_i;")
        out.add("const uint dt_x = (uint)dt_l;")
        self.thread(lanes.body)
        out.depth -= 1
        out.add("}")

    def strips(self, strip: Strip) -> None:
        """Strips of so many lanes that what they keep stays in registers."""
        out, lanes = self.out, self.lanes
        self.strip = strip
        out.add("const auto dt_strip = [&](const int dt_s, const int dt_m) DT_ALWAYS -> int {")
        out.depth += 1
        for var in strip.together.plan.expanded:
            made = self.declared(Array(var.type, STRIP), self.lane_name(var), var.line)
            out.add(f"alignas(64) {made};", var.line)
        for item in strip.together.plan.items:
            self.item(item)
        out.add("return 0;")
        out.depth -= 1
        out.add("};")
        if strip.together.plan.expanded:
            out.add(f"for (; dt_to - dt_from >= {STRIP}; dt_from += {STRIP})")
            out.add(f"  dt_strip(dt_from, {STRIP});")
            out.add(f"if (dt_to - dt_from == {STRIP // 2}) dt_strip(dt_from, {STRIP // 2});")
            out.add("else if (dt_from < dt_to) dt_strip(dt_from, dt_to - dt_from);")
        else:
            out.add("if (dt_from < dt_to) dt_strip(dt_from, dt_to - dt_from);")
        self.strip, self.lanes = None, lanes

    def region_of_strip(self, region: Region, body: list[Stmt]) -> None:
        strip, out = self.strip, self.out
        assert strip is not None
        lanes = Lanes(
            self.is_fixed, strip.together.unsteady, self.expanded | strip.expanded,
            dict(strip.lanes.row), dict(strip.lanes.linear),
        )  # fmt: skip
        lanes.read(region.again, body)
        self.lanes, self.shadows, self.inner_bases = lanes, {}, {}
        out.add("{")
        out.depth += 1
        for var, decl in lanes.row.items():
            if var not in strip.lanes.row:
                super().decl(decl)
        if lanes.tests:
            out.add(f"if ({' && '.join(map(self.expr, lanes.tests))})", lanes.tests[0].line)
        bounds = [self.bound(guard) for guard in lanes.guards]
        self.out = Lines()
        self.out.depth = out.depth + 2
        self.thread(lanes.body)
        inner, self.out = self.out, out
        if self.inner_bases or bounds:
            out.add("for (int dt_lo = dt_s, dt_hi; dt_lo < dt_s + dt_m; dt_lo = dt_hi) {")
            out.depth += 1
            out.add("dt_hi = dt_s + dt_m;")
            self.piece(self.inner_bases, bounds)
            out.add("for (int dt_l = dt_from - dt_s; dt_l < dt_to - dt_s; dt_l++) {")
        else:
            out.add("{")
            out.depth += 1
            out.add("for (int dt_l = 0; dt_l < dt_m; dt_l++) {")
        out.depth += 1
        out.add("const long dt_i = (long)dt_s + dt_l, dt_t = dt_row + dt_i;")
        out.add("const uint dt_x = (uint)dt_s + (uint)dt_l;")
        out.rows += inner.rows
        for _ in range(3):
            out.depth -= 1
            out.add("}")

    def bound(self, guard: Guard) -> str:
        """The statement that leaves out the lanes for which a guard does not hold."""
        base, step = self.base(guard.linear)
        bound = f"dt_bound({self.at_start(guard.bound)})"
        if guard.op == "<":
            return f"dt_below({base}, {step}, {bound}, dt_from, dt_to);"
        if guard.op == "<=":
            return f"dt_below({base}, {step}, {bound} + 1, dt_from, dt_to);"
        above = f"dt_below(-{base}, {-step}, -{bound}, dt_from, dt_to);"
        if guard.op == ">":
            return above
        at_least = above.replace(f"-{bound}", f"1 - {bound}")
        if guard.op == ">=":
            return at_least
        return f"dt_below({base}, {step}, {bound} + 1, dt_from, dt_to); {at_least}"

    def base(self, e: Expr) -> tuple[str, int]:
        """A linear value as the name of what it is at lane 0, and its step."""
        assert self.lanes is not None
        if self.lanes.is_lane(e):
            return "0L", 1
        step = self.lanes.step(e)
        assert step
        key = (self.at_start(e), self.spelled(e.type, e.line), step)
        if self.strip is None or self.strip.lanes.step(e):
            return self.bases.setdefault(key, f"dt_w{len(self.bases)}"), step
        return self.inner_bases.setdefault(key, f"dt_u{len(self.inner_bases)}"), step

    def at_start(self, e: Expr) -> str:
        """The value at the first lane of the piece, from what is known before its loop."""
        thread, self.in_thread, self.lane = self.in_thread, False, "((uint)dt_lo)"
        text = self.expr(e)
        self.in_thread, self.lane = thread, ""
        return text

    def is_fixed(self, var: Var) -> bool:
        return (
            var.role == "param"
            or var in self.plan.block
            or (self.strip is not None and var in self.strip.together.plan.block)
            or (var.role == "const" and is_scalar(var.type))
        )

    def index(self, e: Expr) -> str:
        """An index as an exact 64-bit number, linear in the lane where that can be seen."""
        if not self.in_thread or self.lanes is None:
            return self.expr(e)
        return self.wide(e)[0]

    def wide(self, e: Expr) -> tuple[str, bool]:
        """The text, and whether it says more than the plain expression."""
        lanes = self.lanes
        assert lanes is not None
        if isinstance(e, Ref) and e.var in self.shadows:
            return self.shadows[e.var], True
        if isinstance(e, Cast) and e.type in (I64, U64) and e.of.type in (I32, U32):
            text, more = self.wide(e.of)
            return f"(({self.spelled(e.type, e.line)}){text})", more
        if isinstance(e, Binary) and e.op in ("+", "-", "*") and e.type in (I32, I64, U64):
            left, right = self.wide(e.left), self.wide(e.right)
            kind = "ulong" if e.type == U64 else "long"
            text = f"(({kind}){left[0]} {e.op} ({kind}){right[0]})"
            return text, left[1] or right[1] or e.type == I32
        if e.type in (I32, U32) and lanes.step(e):
            base, step = self.base(e)
            factor = "" if step == 1 else f"{step}L * "
            return f"({base} + {factor}dt_i)", True
        return self.expr(e), False

    def thread(self, body: list[Stmt]) -> None:
        """What one thread does in a region."""
        self.in_thread, self.label_used = True, False
        self.labels += 1
        self.out.add("{")
        self.out.depth += 1
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
            bool(self.element(stmt.var)) and stmt.init is None
        )

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
        if self.in_thread and _reads_here_and_there(s):
            # In order, vectors of scattered values are slower than one value after another.
            serial = Do(s.line, Intrinsic(VOID, s.line, "serial", []))
            body = Block(s.body.line, [serial, *s.body.body])
            s = Loop(s.line, s.test, s.step, body, s.post, s.unroll)
        super().loop(s)
        self.loops -= 1

    def decl(self, s: Decl) -> None:
        if s.var.role in ("shared", "dynamic"):
            return
        place = self.element(s.var)
        if not place:
            super().decl(s)
            self.shadow(s)
            return
        if s.init is None:
            return
        if isinstance(s.init, Construct) and isinstance(s.var.type, Array):
            made = self.declared(s.var.type, "dt_value", s.line)
            self.out.add(
                f"{{ {made} = {self.braces(s.init)}; "
                f"memcpy(&{place}, &dt_value, sizeof dt_value); }}",
                s.line,
            )
            return
        self.out.add(f"{place} = {self.expr(s.init)};", s.line)

    def shadow(self, s: Decl) -> None:
        """A variable that indices are made of has a 64-bit name too."""
        changed = self.unsteady if self.strip is None else self.strip.together.unsteady
        if not self.in_thread or s.init is None or s.var.type != I32 or s.var in changed:
            return
        assert self.lanes is not None
        if s.var in self.lanes.linear:
            return
        text, more = self.wide(s.init)
        if more:
            self.shadows[s.var] = f"{self.name(s.var)}_wide"
            self.out.add(f"const long {self.shadows[s.var]} = {text};", s.line)


def regions(items: list[Item]) -> Iterator[Region]:
    """All regions of a plan."""
    for item in items:
        if isinstance(item, Region):
            yield item
        elif isinstance(item, Way):
            yield from regions(item.yes)
            yield from regions(item.no)
        elif isinstance(item, Repeat):
            yield from regions(item.body)


def _reads_here_and_there(loop: Loop) -> bool:
    """A loop of unknown length that adds up what lies where other memory says."""
    if isinstance(loop.test, Binary) and isinstance(loop.test.right, Lit):
        return False
    nodes = list(walk(loop.body))
    return (
        not any(isinstance(node, Loop) for node in nodes)
        and any(isinstance(node, Compound) and is_float(node.type) for node in nodes)
        and any(
            isinstance(node, Subscript) and any(isinstance(n, Subscript) for n in walk(node.index))
            for node in nodes
        )
    )
