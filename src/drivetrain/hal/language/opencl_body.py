"""Functions as OpenCL C: what differs from the printing that both targets share.

Types are printed with their shapes (see `spaces`), so that every pointer has its address space.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from drivetrain.hal.language.convert import constant
from drivetrain.hal.language.inline import waits_for
from drivetrain.hal.language.printer import SPELLED, Printer
from drivetrain.hal.language.spaces import Places, Shape
from drivetrain.hal.language.tokens import wrong
from drivetrain.hal.language.tree import (
    AddressOf,
    Binary,
    Call,
    Cast,
    Construct,
    Decl,
    Expr,
    Function,
    Index3,
    Intrinsic,
    Lit,
    Ref,
    Switch,
    Sync,
    Var,
    root_var,
    walk,
)
from drivetrain.hal.language.types import (
    F64,
    I32,
    I64,
    U32,
    U64,
    Array,
    Pointer,
    Scalar,
    Struct,
    Type,
    is_scalar,
)
from drivetrain.hal.language.warps import LANES

if TYPE_CHECKING:
    from drivetrain.hal.language.opencl import Unit

__all__ = ["Body", "Hidden"]

_QUALIFIERS = {
    "private": "__private", "local": "__local", "global": "__global", "constant": "__constant",
}  # fmt: skip
_INDEX = {
    "threadIdx": "get_local_id", "blockIdx": "get_group_id", "blockDim": "get_local_size",
    "gridDim": "get_num_groups",
}  # fmt: skip
_MODULAR = ("+", "-", "*")
_DYNAMIC = "dt_dynamic"
_LANES = "dt_lanes"
_ANY = "dt_any"


def _index3(e: Expr) -> tuple[str, str] | None:
    """Which index it is, widened or not."""
    while isinstance(e, Cast) and e.type in (I32, U32, I64, U64):
        e = e.of
    return (e.name, e.axis) if isinstance(e, Index3) else None


def _global_index(e: Binary) -> int | None:
    """The axis of ``blockIdx * blockDim + threadIdx``, in any order. OpenCL has a function for it,
    which compilers know to count up by one from thread to thread; of the sum some do not see it."""
    if e.op != "+" or e.type not in (I32, U32, I64, U64):
        return None
    for product, rest in ((e.left, e.right), (e.right, e.left)):
        thread = _index3(rest)
        if thread is None or thread[0] != "threadIdx":
            continue
        while isinstance(product, Cast) and product.type == e.type:
            product = product.of
        if not isinstance(product, Binary) or product.op != "*":
            continue
        if product.type in (I32, U32) and e.type in (I64, U64):
            continue  # it wraps at 32 bits
        found = {_index3(product.left), _index3(product.right)}
        if found == {("blockIdx", thread[1]), ("blockDim", thread[1])}:
            return "xyz".index(thread[1])
    return None


@dataclass(frozen=True)
class Hidden:
    """What a function needs of its kernel: shared memory that OpenCL lets only kernels declare."""

    shared: tuple[Var, ...] = ()
    dynamic: bool = False


class Body(Printer):
    """Prints one function for one combination of spaces."""

    wraps = False

    def __init__(self, unit: Unit, places: Places | None, hidden: Hidden) -> None:
        super().__init__({})
        self.unit = unit
        self.places = places
        self.hidden = hidden
        self.in_kernel = False
        self.lane_bytes = 0

    # -- types

    def spelled(self, kind: Type, line: int) -> str:
        if kind == F64:
            self.unit.needs_fp64(line)
        if isinstance(kind, Scalar) and kind.kind == "bool":
            # OpenCL leaves open how large a bool is, and takes none as an argument.
            return "uchar"
        return super().spelled(kind, line)

    def typed(
        self,
        kind: Type,
        shape: Shape | None,
        name: str,
        line: int,
        *,
        storage: str = "",
        restrict: bool = False,
    ) -> str:
        """A declaration; ``storage`` is the space of what is declared."""
        qualifier = storage
        while isinstance(kind, Pointer | Array):
            if isinstance(kind, Array):
                name = f"{name}[{kind.count}]"
                kind = kind.of
                continue
            assert shape is not None
            assert shape.found().space is not None
            space = shape.found().space
            assert space is not None
            words = [word for word in (qualifier, "restrict" if restrict else "", name) if word]
            name, restrict = "*" + " ".join(words), False
            if isinstance(kind.to, Array):
                name = f"({name})"
            qualifier = _QUALIFIERS[space.name]
            shape, kind = shape.part("*"), kind.to
        word = (
            self.unit.struct(kind, shape) if isinstance(kind, Struct) else self.spelled(kind, line)
        )
        return " ".join(part for part in (qualifier, word, name) if part)

    def shape(self, e: Expr) -> Shape | None:
        assert self.places is not None
        return self.places.of(e)

    def declaration(self, var: Var) -> str:
        assert self.places is not None
        return self.typed(var.type, self.places.variable(var), self.name(var), var.line)

    def place(self, target: Expr) -> str:
        assert self.places is not None
        space = self.places.place(target).name
        return self.typed(
            target.type, self.shape(target), "*dt_place", target.line, storage=_QUALIFIERS[space]
        )

    # -- names

    def reference(self, e: Ref) -> str:
        var = e.var
        if var.role == "const":
            if is_scalar(var.type):
                assert var.init is not None
                return self.expr(var.init)
            return self.unit.constant(var)
        if var.role == "shared" and not self.in_kernel:
            return f"(*{self.name(var)})"
        return self.name(var)

    def index3(self, e: Index3) -> str:
        return f"((uint){_INDEX[e.name]}({'xyz'.index(e.axis)}))"

    # -- expressions

    def expr(self, e: Expr) -> str:
        if isinstance(e, AddressOf):
            var = root_var(e.operand)
            if var is not None and var.role == "const" and is_scalar(var.type):
                return f"(&{self.unit.constant(var)})"
        return super().expr(e)

    def binary(self, e: Binary) -> str:
        axis = _global_index(e)
        if axis is not None:
            return f"(({self.spelled(e.type, e.line)})get_global_id({axis}))"
        if e.op in _MODULAR and e.type in (I32, I64):
            return f"(({self.spelled(e.type, e.line)})({self.modular(e)}))"
        return super().binary(e)

    def modular(self, e: Expr) -> str:
        """A signed number as an unsigned one, in which sums wrap. Chains have few brackets, for
        compilers count them."""
        if isinstance(e, Binary) and e.op in _MODULAR and e.type in (I32, I64):
            left, right = self.modular(e.left), self.modular(e.right)
            if e.op == "*" and isinstance(e.left, Binary):
                left = f"({left})"
            if isinstance(e.right, Binary):
                right = f"({right})"
            return f"{left} {e.op} {right}"
        return f"(u{self.spelled(e.type, e.line)}){self.expr(e)}"

    def fixed(self, e: Expr) -> str:
        """The value of a constant of the file, as C takes it there."""
        if isinstance(e, Construct):
            return "{" + (", ".join(self.fixed(part) for part in e.parts) or "0") + "}"
        value = constant(e)
        assert value is not None
        if math.isfinite(value):
            return self.literal(Lit(e.type, e.line, value))
        # No function may be called here.
        word = "NAN" if math.isnan(value) else "INFINITY" if value > 0 else "-INFINITY"
        return f"(({self.spelled(e.type, e.line)}){word})"

    def pointer_cast(self, e: Cast, inner: str) -> str:
        if not isinstance(e.type, Pointer):
            return f"(({self.spelled(e.type, e.line)})(ulong){inner})"
        if e.type == e.of.type:
            return inner
        return f"(({self.typed(e.type, self.shape(e), '', e.line)}){inner})"

    def construct(self, e: Construct) -> str:
        return f"(({self.typed(e.type, self.shape(e), '', e.line)}){self.inside(e)})"

    def inside(self, e: Construct) -> str:
        return "{" + (", ".join(self.braces(part) for part in e.parts) or "0") + "}"

    def call(self, e: Call) -> str:
        assert self.places is not None
        if waits_for(e.function):
            raise wrong(
                e.line,
                f"{e.function.name} shuffles or votes and cannot become a part of the kernel: it "
                "returns from inside a loop, or is called in a condition",
            )
        name = self.unit.clone(e, self.places.calls[e])
        given = [self.expr(argument) for argument in e.arguments]
        inner = self.unit.hidden(e.function)
        for var in inner.shared:
            given.append(f"&{self.name(var)}" if self.in_kernel else self.name(var))
        if inner.dynamic:
            given.append(_DYNAMIC)
        return f"{name}({', '.join(given)})"

    def intrinsic(self, e: Intrinsic) -> str:
        name = e.name
        if name.startswith("atomic"):
            self.unit.needs_atomics(name.rsplit("_", 1)[1], e.line)
            shape = self.shape(e.arguments[0])
            assert shape is not None
            space = shape.found().space
            assert space is not None
            if space.name == "constant":
                raise wrong(e.line, f"{name.rsplit('_', 1)[0]} on __constant__ memory")
            name = f"{name}_{space.name}"
        elif name.startswith("lane"):
            return self.lane(e)
        elif "f64" in name or "double" in name:
            self.unit.needs_fp64(e.line)
        return f"dt_{name}({', '.join(self.expr(argument) for argument in e.arguments)})"

    # -- shuffles and votes, after `warps`

    def lane(self, e: Intrinsic) -> str:
        given = [self.expr(argument) for argument in e.arguments]
        word = e.name.removeprefix("lane_")
        if word == "put":
            return f"{_LANES}[dt_thread()] = {_bits(e.arguments[0].type, given[0])}"
        if word in ("any_clear", "any_set"):
            return f"{_ANY} = {int(word == 'any_set')}"
        if word == "any":
            return f"({_ANY} != 0)"
        if word == "first":
            return "(dt_thread() == 0)"
        if word.startswith("vote"):
            return f"dt_{word}_{self.lane_bytes}({_LANES}, {given[0]})"
        return _number(e.type, f"{_LANES}[dt_source_{word}({', '.join(given)})]")

    # -- statements

    def switch(self, s: Switch) -> None:
        kind = self.spelled(s.test.type, s.line)
        self.out.add(f"{{ DT_SELECTOR {kind} dt_selector = {self.expr(s.test)};", s.line)
        self.out.add("switch (dt_selector)", s.line)
        self.block(s.body)
        self.out.add("}")

    def decl(self, s: Decl) -> None:
        if s.var.role == "shared":
            return
        if s.var.role == "dynamic":
            # Each name for the dynamic shared memory is a pointer to its start.
            assert isinstance(s.var.type, Array)
            assert self.places is not None
            shape = self.places.variable(s.var)
            element = self.typed(s.var.type.of, shape, "*", s.line, storage="__local")
            named = self.typed(
                s.var.type.of, shape, f"*{self.name(s.var)}", s.line, storage="__local"
            )
            self.out.add(f"{named} = ({element}){_DYNAMIC};", s.line)
            return
        super().decl(s)

    def sync(self, s: Sync) -> None:
        self.out.add("barrier(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE);", s.line)

    def print_kernel(self, symbol: str, kernel: Function, warps: int) -> None:
        assert self.places is not None
        self.in_kernel, self.lane_bytes = True, warps
        params = []
        for param in kernel.params:
            shape = self.places.variable(param)
            params.append(
                self.typed(param.type, shape, self.name(param), param.line, restrict=param.restrict)
            )
        if self.hidden.dynamic:
            params.append(f"__local long16 *{_DYNAMIC}")
        self.out.add(f"__kernel void {symbol}({', '.join(params) or 'void'})", kernel.line)
        self.out.add("{")
        self.out.depth += 1
        for var in self.hidden.shared:
            shape = self.places.variable(var)
            named = self.typed(var.type, shape, self.name(var), var.line, storage="__local")
            self.out.add(f"{named};", var.line)
        if warps:
            count = min(kernel.launch_bounds or LANES, LANES)
            word = "ulong" if warps == 8 else "uint"
            self.out.add(f"__local {word} {_LANES}[{count}];")
            self.out.add(f"__local int {_ANY};")
        self.body(kernel)

    def print_function(self, symbol: str, function: Function) -> None:
        assert self.places is not None
        params = [
            self.typed(param.type, self.places.variable(param), self.name(param), param.line)
            for param in function.params
        ]
        for var in self.hidden.shared:
            shape = self.places.variable(var)
            params.append(
                self.typed(var.type, shape, f"(*{self.name(var)})", var.line, storage="__local")
            )
        if self.hidden.dynamic:
            params.append(f"__local long16 *{_DYNAMIC}")
        result = self.typed(function.result, self.places.scheme.result, "", function.line)
        kind = "DT_INLINED" if _asks_who(function) else "static"
        self.out.add(f"{kind} {result} {symbol}({', '.join(params) or 'void'})", function.line)
        self.out.add("{")
        self.out.depth += 1
        self.body(function)

    def body(self, function: Function) -> None:
        assert function.body is not None
        for stmt in function.body.body:
            self.stmt(stmt)
        self.out.depth -= 1
        self.out.add("}")


def _asks_who(function: Function) -> bool:
    """Whether it reads an index of its thread, or calls one that does."""
    assert function.body is not None
    return any(
        isinstance(node, Index3) or (isinstance(node, Call) and _asks_who(node.function))
        for node in walk(function.body)
    )


def _bits(kind: Type, text: str) -> str:
    if kind in (I64, U64):
        return f"(ulong){text}"
    if is_scalar(kind) and isinstance(kind, Scalar) and kind.kind == "float":
        return f"as_{'ulong' if kind.size == 8 else 'uint'}({text})"
    return f"(uint){text}"


def _number(kind: Type, text: str) -> str:
    assert isinstance(kind, Scalar)
    if kind.kind == "float":
        return f"as_double({text})" if kind.size == 8 else f"as_float((uint){text})"
    return f"(({SPELLED[kind.name]}){text})"
