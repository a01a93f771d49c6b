"""Kernels drawn by hypothesis from the grammar of the subset, each with a meaning of its own.

What C++ or CUDA leaves undefined is never drawn: indices stay inside, threads write places of
their own or what atomics make of them, shared memory is read only behind a barrier, and barriers
and shuffles are reached by all that must come along. What this project defines (wrapping, shifts by
too much, division by zero, float to integer) is drawn on purpose.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from hypothesis import strategies as st
from reference_kernels import (
    Array,
    Atomic,
    Bin,
    Call,
    Cast,
    Declare,
    Do,
    Element,
    Expr,
    Field,
    For,
    Function,
    If,
    Index,
    Intrinsic,
    Kernel,
    Leave,
    Lit,
    Macro,
    Make,
    Pick,
    Return,
    Shared,
    Shuffle,
    Stmt,
    Store,
    Switch,
    Sync,
    Un,
    Var,
    Vote,
    While,
)
from reference_numbers import (
    BOOL,
    F32,
    F64,
    I8,
    I16,
    I32,
    I64,
    INTRINSICS,
    NUMBERS,
    U8,
    U16,
    U32,
    U64,
    VECTORS,
    WHOLE,
    Kind,
    Record,
)

__all__ = ["MACROS", "Novelty", "kernel"]

MACROS = """#define SQUARE(x) ((x) * (x))
#define MIX(a, b) \\
  ((a) ^ ((b) + 3))
#define NOT_ZERO(x) (!!(x))
"""

RESULTS = 12
REALS = (0.0, 0.1, -0.0, 0.5, -1.0, 1.5, 2.0, -2.5, 3.0, 100.0, -7.25, 1e6, 3e9, -5e9, 1e19)


@cache
def _integers(low: int, high: int) -> st.SearchStrategy[int]:
    return st.integers(low, high)


@dataclass
class Space:
    """What can be named where an expression is drawn."""

    values: list[Expr] = field(default_factory=list)
    arrays: list[tuple[str, Kind, int]] = field(default_factory=list)
    functions: list[Function] = field(default_factory=list)
    records: list[tuple[str, Record]] = field(default_factory=list)

    def inner(self) -> Space:
        return Space(list(self.values), list(self.arrays), list(self.functions), list(self.records))


class Drawing:
    """One kernel in the making."""

    def __init__(self, draw: Callable[[Any], Any], name: str) -> None:
        self.draw, self.name = draw, name
        self.count = 0
        self.functions: list[Function] = []
        self.totals: dict[tuple[Kind, int], Function] = {}
        self.structs: tuple[Record, ...] = ()
        self.changes: dict[Record, Function] = {}
        self.shared: list[Shared] = []

    def pick(self, options: Any) -> Any:
        return options[self.number(0, len(options) - 1)]

    def number(self, low: int, high: int) -> int:
        return self.draw(_integers(low, high))

    def fresh(self, stem: str) -> str:
        self.count += 1
        return f"{stem}{self.count}"

    # -- expressions

    def literal(self) -> Lit:
        kind = self.pick((*NUMBERS, I32, I32, U32))
        if kind.real:
            return Lit(kind, self.pick(REALS))
        low = -(1 << (kind.bits - 1)) if kind.signed else 0
        high = (1 << (kind.bits - kind.signed)) - 1
        value = self.pick((0, 1, 2, 3, 5, 7, 31, 33, 100, high, high - 1, low, low + 1))
        return Lit(kind, min(max(value, low), high))

    def leaf(self, space: Space) -> Expr:
        ways = ["literal"] + ["value"] * 3 * bool(space.values) + ["array"] * bool(space.arrays)
        way = self.pick(ways + ["field"] * bool(space.records))
        if way == "literal":
            return self.literal()
        if way == "value":
            return self.pick(space.values)
        if way == "field":
            return self.field(space)
        array, kind, count = self.pick(space.arrays)
        index = self.pick([v for v in space.values if not v.kind.real] or [Lit(I32, 1)])
        return Element(array, kind, index, count)

    def field(self, space: Space) -> Field:
        name, record = self.pick(space.records)
        return Field(Var(record, name), self.pick([key for key, _ in record.fields]))

    def expr(self, space: Space, depth: int = 3) -> Expr:
        if depth == 0 or self.number(0, 5) == 0:
            return self.leaf(space)
        way = self.pick(
            ("arithmetic", "arithmetic", "bits", "shift", "divide", "compare", "logic", "unary",
             "cast", "pick", "intrinsic", "call", "macro")
        )  # fmt: skip

        def inner() -> Expr:
            return self.expr(space, depth - 1)

        if way == "arithmetic" and self.number(0, 2) == 0:
            # Narrow numbers, whose result is wide.
            kind = self.pick(WHOLE[:4])
            return Bin(self.pick("+-*"), Cast(kind, inner()), Cast(kind, Un("-", inner())))
        if way == "arithmetic":
            return Bin(self.pick("+-*"), inner(), inner())
        if way == "bits":
            return Bin(self.pick("&|^"), self.whole(space, depth - 1), self.whole(space, depth - 1))
        if way == "shift":
            count = self.whole(space, depth - 1)
            if self.number(0, 2):
                count = Bin("&", count, Lit(I32, self.pick((7, 15, 31, 63))))
            left = self.whole(space, depth - 1)
            if self.number(0, 1):
                left = Un("-", left)
            return Bin(self.pick(("<<", ">>")), left, count)
        if way == "divide":
            left = self.whole(space, depth - 1)
            if self.number(0, 1):
                left = Un("-", left)
            return Bin(self.pick("/%"), left, self.whole(space, depth - 1))
        if way == "compare":
            return Bin(self.pick(("<", ">", "<=", ">=", "==", "!=")), inner(), inner())
        if way == "logic":
            return Bin(self.pick(("&&", "||")), self.truth(space, depth - 1),
                       self.truth(space, depth - 1))  # fmt: skip
        if way == "unary":
            op = self.pick("-~!")
            return Un(op, inner() if op == "-" else self.whole(space, depth - 1))
        if way == "cast":
            return Cast(self.pick((*NUMBERS, BOOL)), inner())
        if way == "pick":
            return Pick(self.truth(space, depth - 1), inner(), inner())
        if way == "macro":
            return self.macro(space, depth - 1)
        if way == "call" and space.functions:
            return self.called(space, depth - 1)
        name = self.pick(sorted(INTRINSICS))
        kinds = INTRINSICS[name][1]
        return Intrinsic(name, [Cast(kind, inner()) for kind in kinds])

    def whole(self, space: Space, depth: int) -> Expr:
        """A whole number."""
        made = self.expr(space, depth)
        return Cast(self.pick((I32, U32, I64, U64)), made) if made.kind.real else made

    def truth(self, space: Space, depth: int) -> Expr:
        made = self.expr(space, depth)
        return made if made.kind is BOOL else Bin("!=", made, Lit(I32, 0))

    def macro(self, space: Space, depth: int) -> Expr:
        name = self.pick(("SQUARE", "MIX", "NOT_ZERO"))
        a = self.whole(space, min(depth, 1))
        if name == "SQUARE":
            return Macro(name, [a], Bin("*", a, a))
        if name == "NOT_ZERO":
            return Macro(name, [a], Un("!", Un("!", a)))
        b = self.whole(space, min(depth, 1))
        return Macro(name, [a, b], Bin("^", a, Bin("+", b, Lit(I32, 3))))

    def called(self, space: Space, depth: int) -> Expr:
        function = self.pick(space.functions)
        given: list[Any] = []
        for _, kind in function.params:
            if isinstance(kind, Kind):
                given.append(self.expr(space, min(depth, 1)))
            else:
                fits = [a for a, k, n in space.arrays if kind == f"const {k.c} *" and n >= 4]
                if not fits:
                    return self.leaf(space)
                given.append(self.pick(fits))
        return Call(function, given)

    def total(self, space: Space) -> Expr | None:
        """A call of a template: the sum over an array in any memory."""
        fits = [(a, k, n) for a, k, n in space.arrays if not k.real]
        if not fits:
            return None
        array, kind, count = self.pick(fits)
        size = min(count, self.pick((2, 4)))
        function = self.totals.get((kind, size))
        if function is None:
            function = Total(f"{self.name}_total", [("p", f"const {kind.c} *")], kind, [], "", size)
            at, s = Element("p", kind, Var(I32, "i"), size), Var(kind, "s")
            function.body = [
                Declare("s", kind, Lit(kind, 0)),
                For("i", Lit(I32, size), 1, [Store(s, "", Bin("-", Bin("*", s, Lit(I32, 3)), at))]),
                Return(s),
            ]
            self.totals[kind, size] = function
        return Call(function, [array], f"<{kind.c}, {size}>")

    # -- statements

    def body(self, space: Space, depth: int, *, loop: bool = False, most: int = 4) -> list[Stmt]:
        """Statements of one thread, in a block of their own."""
        space = space.inner()
        out: list[Stmt] = []
        for _ in range(self.number(1, most)):
            out += self.simple(space, depth, loop=loop)
        return out

    def variables(self, space: Space) -> list[Any]:
        """What may be written."""
        own: list[Any] = [v for v in space.values if isinstance(v, Var) and v.name[0] == "v"]
        if space.records:
            own.append(self.field(space))
        for array, kind, count in space.arrays:
            if array[0] == "a":
                own.append(Element(array, kind, self.whole(space, 1), count))
        return own

    def simple(self, space: Space, depth: int, *, loop: bool = False) -> list[Stmt]:
        ways = ["declare", "declare", "store", "store", "array", "record", "step", "put"]
        if depth:
            ways += ["if", "for", "for", "while", "switch", "switch"]
        if loop:
            ways += ["leave", "leave"]
        way = self.pick(ways)
        if way in ("store", "step", "put") and not self.variables(space):
            way = "declare"
        if way == "declare":
            kind, name = self.pick((*NUMBERS, BOOL)), self.fresh("v")
            init = (self.total(space) if self.number(0, 4) == 0 else None) or self.expr(space)
            word = "auto" if init.kind is kind and self.number(0, 2) == 0 else ""
            space.values.append(Var(kind, name))
            return [Declare(name, kind, init, word)]
        if way == "store":
            place = self.pick(self.variables(space))
            ops = ["", "+", "-", "*"]
            value = self.expr(space)
            if place.kind is BOOL:
                ops = ["", "&", "|"]
                value = self.truth(space, 1)
            elif not place.kind.real and not value.kind.real:
                ops += ["&", "|", "^", "<<", ">>", "/", "%"]
            return [Store(place, self.pick(ops), value)]
        if way == "step":
            places = [p for p in self.variables(space) if p.kind is not BOOL]
            if not places:
                return []
            return [Store(self.pick(places), self.pick(("++", "--")), None)]
        if way == "array":
            kind, name, count = self.pick(NUMBERS), self.fresh("a"), self.pick((4, 5, 8))
            parts = [self.expr(space, 1) for _ in range(self.number(1, 4))]
            space.arrays.append((name, kind, count))
            return [Array(name, kind, parts, count)]
        if way == "record":
            out = self.record(space)
            return [*out, *self.record(space, copy=True)] if self.number(0, 2) else out
        if way == "put":
            return self.put(space)
        if way == "if":
            no = self.body(space, depth - 1, loop=loop) if self.number(0, 1) else []
            return [If(self.truth(space, 2), self.body(space, depth - 1, loop=loop), no)]
        if way == "for":
            name = self.fresh("i")
            below = space.inner()
            below.values.append(Var(I32, name))
            count: Expr = Lit(I32, self.pick((4, 3, 6, 5)))
            if self.number(0, 1):
                count = Bin("%", Cast(U32, self.whole(space, 1)), Lit(I32, self.number(1, 6)))
            body = self.body(below, depth - 1, loop=True, most=3)
            if self.number(0, 3):
                test = Bin("==", Bin("%", Var(I32, name), Lit(I32, 3)), Lit(I32, self.number(0, 1)))
                word = self.pick(("continue", "continue", "break"))
                body.insert(self.number(0, 1), Leave(word, test))
            sums = [p for p in self.variables(space) if p.kind is not BOOL]
            if sums:
                body.append(Store(self.pick(sums), "+", Var(I32, name)))
            return [For(name, count, self.pick((1, 1, 2)), body)]
        if way == "while":
            body = self.body(space, depth - 1, loop=True, most=3)
            most, post = self.number(1, 5), self.number(0, 1) == 1
            return [While(self.fresh("w"), self.truth(space, 2), most, body, post)]
        if way == "switch":
            values = [0, 1, 2, 3, None]
            values = (values * 2)[self.number(0, 4) :][: self.number(2, 4)]
            cases = [
                (value, self.body(space, 0, most=2), self.number(0, 2) == 0) for value in values
            ]
            return [Switch(self.whole(space, 2), cases)]
        turns = [v for v in space.values if isinstance(v, Var) and v.name[0] == "i"]
        test = self.truth(space, 1)
        if turns and self.number(0, 1):
            test = Bin("==", Bin("&", turns[-1], Lit(I32, 1)), Lit(I32, self.number(0, 1)))
        return [Leave(self.pick(("break", "continue")), test)]

    def record(self, space: Space, *, copy: bool = False) -> list[Stmt]:
        """A struct or a vector; a copy, and then a change of what it was made from."""
        record, name = self.pick((*VECTORS, *self.structs)), self.fresh("r")
        if not copy:
            parts = [self.expr(space, 1) for _ in record.fields]
            space.records.append((name, record))
            return [Declare(name, record, Make(record, parts))]
        known, record = space.records[-1] if self.number(0, 1) else self.pick(space.records)
        init: Expr = Var(record, known)
        if record in self.structs and self.number(0, 1):
            init = Call(self.changes[record], [init])
        out: list[Stmt] = [Declare(name, record, init)]
        place = Field(Var(record, known), record.fields[0][0])
        if place.kind is not BOOL:
            out.append(Store(place, "+", Bin("+", self.expr(space, 1), Lit(I32, 3))))
        space.records.append((name, record))
        return out

    def put(self, space: Space) -> list[Stmt]:
        """A call that writes through a pointer, to an array of the thread's own."""
        arrays = [(a, k, n) for a, k, n in space.arrays if a[0] == "a"]
        if not arrays:
            return []
        array, kind, _ = self.pick(arrays)
        function = self.putter(kind)
        return [Do(Call(function, [array, self.whole(space, 1), self.expr(space, 1)]))]

    def putter(self, kind: Kind) -> Function:
        name = f"{self.name}_put_{kind.name}"
        for function in self.functions:
            if function.name == name:
                return function
        at = Element("p", kind, Var(U32, "at"), 4)
        params = [("p", f"{kind.c} *"), ("at", U32), ("x", kind)]
        body: list[Stmt] = [Store(at, self.pick(("", "+", "-")), Var(kind, "x"))]
        made = Function(name, params, None, body)
        self.functions.append(made)
        return made

    # -- what a block does together

    def together(self, space: Space, block: int) -> list[Stmt]:
        way = self.pick(("exchange", "loop", "rotate", "shuffle", "shuffle", "shuffle", "vote",
                         "warp", "atomic", "counter"))  # fmt: skip
        if way == "exchange":
            return self.exchange(space, self.pick(self.shared))
        if way == "loop":
            name, shared = self.fresh("i"), self.pick(self.shared)
            below = space.inner()
            below.values.append(Var(I32, name))
            count: Expr = self.pick((Lit(I32, 2), Lit(I32, 3), Var(I32, "turns")))
            return [For(name, count, 1, self.exchange(below, shared))]
        if way == "rotate":
            shared = self.pick(self.shared)
            mine = Element(shared.name, shared.kind, Var(I32, "tid"), shared.count)
            function = self.rotation(shared.kind, block)
            name, value = self.fresh("v"), self.expr(space)
            space.values.append(Var(shared.kind, name))
            return [
                Store(mine, "", value), Sync(),
                Do(Call(function, [shared.name, self.pick((Lit(I32, 1), Var(I32, "turns")))])),
                Declare(name, shared.kind, mine), Sync(),
            ]  # fmt: skip
        if way == "shuffle":
            name, kind = self.fresh("v"), self.pick((I32, U32, F32, I64, F64, U64))
            how = self.pick(("idx", "up", "down", "xor"))
            by = Lit(I32, self.number(0, 17)) if how != "idx" else self.whole(space, 1)
            value = Bin(self.pick("+-*"), Var(I32, "tid"), self.expr(space, 2))
            made = Shuffle(name, how, kind, value, by, self.pick((32, 16, 8, 4)))
            space.values.append(Var(kind, name))
            return [made]
        if way == "vote":
            name = self.fresh("v")
            how = self.pick(("ballot", "any", "all"))
            made = Vote(name, how, self.truth(space, 2))
            space.values.append(Var(U32, name))
            return [made]
        if way == "warp":
            # One warp on its own.
            below, place = space.inner(), self.fresh("v")
            body: list[Stmt] = [*self.body(below, 1, most=2)]
            name, kind = self.fresh("v"), self.pick((I32, F32, U64))
            body.append(
                Shuffle(name, "xor", kind, self.expr(below, 1), Lit(I32, self.number(1, 16)), 32)
            )
            body.append(Store(Var(I64, place), "+", Cast(I64, Var(kind, name))))
            test = Bin("==", Bin("/", Var(I32, "tid"), Lit(I32, 32)), Lit(I32, self.number(0, 1)))
            init = self.expr(space, 1)
            space.values.append(Var(I64, place))
            return [Declare(place, I64, init), If(test, body, [])]
        if way == "atomic":
            name, kind = self.pick((("counts", I32), ("ucounts", U32), ("fcounts", F32)))
            place = Element(name, kind, self.whole(space, 1), 4)
            if kind is F32:
                value: Expr = Cast(I8, self.whole(space, 2))
                return [Atomic("atomicAdd", place, value)]
            # One kind of update for each place, or their order would count.
            names = ("atomicAdd", "atomicMin", "atomicMax", "atomicXor")
            which = self.number(0, 3)
            return [Atomic(names[which], Element(name, kind, Lit(I32, which), 4), self.expr(space))]
        return self.counter(space)

    def exchange(self, space: Space, shared: Shared) -> list[Stmt]:
        """Each thread writes its own place, all wait, and read each other's."""
        mine = Element(shared.name, shared.kind, Var(I32, "tid"), shared.count)
        name = self.fresh("v")
        below = space.inner()
        below.arrays.append((shared.name, shared.kind, shared.count))
        kind = self.pick(NUMBERS)
        made: Expr | None = self.total(below) if self.number(0, 2) == 0 else None
        if made is None:
            index = Bin("+", Var(I32, "tid"), self.whole(space, 1))
            read = Element(shared.name, shared.kind, index, shared.count)
            made = Bin(self.pick("+-*"), read, self.expr(below, 1))
        out: list[Stmt] = [Store(mine, "", self.expr(space)), Sync(), Declare(name, kind, made)]
        space.values.append(Var(kind, name))
        return [*out, Sync()]

    def rotation(self, kind: Kind, block: int) -> Function:
        name = f"{self.name}_rotate_{kind.name}"
        for function in self.functions:
            if function.name == name:
                return function
        by = Bin("+", Var(I32, "by"), Index("threadIdx.x"))
        body: list[Stmt] = [
            Declare("x", kind, Element("s", kind, by, block)), Sync(),
            Store(Element("s", kind, Bin("+", Index("threadIdx.x"), Bin("*", Index("threadIdx.y"),
                  Index("blockDim.x"))), block), self.pick(("", "+")), Var(kind, "x")),
            Sync(),
        ]  # fmt: skip
        made = Function(name, [("s", f"{kind.c} *"), ("by", I32)], None, body)
        self.functions.append(made)
        return made

    def counter(self, space: Space) -> list[Stmt]:
        """A counter that the block shares."""
        array, name, by = self.fresh("c"), self.fresh("v"), self.whole(space, 2)
        place = Element(array, U32, Lit(I32, 0), 1)
        space.values.append(Var(U32, name))
        return [
            Shared(array, U32, 1),
            If(Bin("==", Var(I32, "tid"), Lit(I32, 0)), [Store(place, "", Lit(U32, 5))], []),
            Sync(), Atomic("atomicAdd", place, by), Sync(),
            Declare(name, U32, place), Sync(),
        ]  # fmt: skip

    # -- functions and the kernel

    def function(self, space: Space) -> Function:
        """Of numbers, and perhaps an array in some memory."""
        params: list[tuple[str, Any]] = [
            (f"v_{i}", self.pick(NUMBERS)) for i in range(self.number(1, 3))
        ]
        inside = Space([Var(kind, name) for name, kind in params], [], list(space.functions))
        if self.number(0, 1):
            kind = self.pick((I32, F32, U8, I64))
            params.append(("p", f"const {kind.c} *"))
            inside.arrays.append(("p", kind, 4))
        body = self.body(inside, 1, most=2)
        result = self.pick(NUMBERS)
        if self.number(0, 1):
            body.append(If(self.truth(inside, 1), [Return(self.expr(inside, 1))], []))
        body.append(Return(self.expr(inside, 2)))
        return Function(self.fresh(f"{self.name}_f"), params, result, body)

    def change(self, record: Record) -> Function:
        """Takes a struct by value, changes its copy and gives it back."""
        inside = Space(records=[("s", record)])
        body: list[Stmt] = []
        for _ in range(self.number(1, 2)):
            place = self.field(inside)
            if place.kind is not BOOL:
                body.append(Store(place, self.pick(("", "+", "*")), self.expr(inside, 1)))
        body.append(Return(Var(record, "s")))
        return Function(self.fresh(f"{self.name}_change"), [("s", record)], record, body)

    def kernel(self) -> Kernel:
        block = self.pick(((12,), (33,), (8, 5), (1,), (32,), (40,), (4, 3), (64,)))
        threads = block[0] * (block[1] if len(block) > 1 else 1)
        grid = self.number(1, 2)
        self.structs = tuple(
            Record(f"{self.name}_S{i}", tuple(
                (f"m{j}", self.pick((*NUMBERS, BOOL))) for j in range(self.number(1, 4))))
            for i in range(self.number(0, 1))
        )  # fmt: skip
        self.changes = {record: self.change(record) for record in self.structs}
        table_kind = self.pick((I32, F32, U8, I64))
        table = (f"{self.name}_table", table_kind, self.values(table_kind, 4))
        given_kind = self.pick((I32, F32, U8, I64))
        scalar = self.pick((*NUMBERS, BOOL))
        space = Space(arrays=[(table[0], table_kind, 4), ("given", given_kind, 8)])
        plain = Space()
        for _ in range(self.number(0, 2)):
            made = self.function(plain)
            self.functions.append(made)
            plain.functions.append(made)
        space.functions = list(plain.functions)
        tid = Bin("+", Index("threadIdx.x"), Bin("*", Index("threadIdx.y"), Index("blockDim.x")))
        gid = Bin("+", Var(I32, "tid"), Bin("*", Index("blockIdx.x"), Lit(I32, threads)))
        body: list[Stmt] = [Declare("tid", I32, tid), Declare("gid", I32, gid)]
        space.values += [Var(I32, "tid"), Var(I32, "gid"), Var(scalar, "scalar"),
                         Bin("-", Var(I32, "tid"), Lit(I32, 20)), Un("-", Var(I32, "gid")),
                         Index(self.pick(("threadIdx.x", "blockIdx.x", "blockDim.y")))]  # fmt: skip
        body.append(Declare("v", I32, self.pick(space.values[:4])))
        space.values.append(Var(I32, "v"))
        dynamic = self.pick((I32, F64, U8, F32, U16))
        self.shared = [
            Shared(f"{self.name}_dynamic", dynamic, threads, dynamic=True),
            Shared("tile", self.pick((I32, F32, I16, U64)), threads),
        ][self.number(0, 1) :]
        body += self.shared
        for _ in range(self.number(4, 8)):
            if self.number(0, 2):
                body += self.simple(space, 2)
            else:
                body += self.together(space, threads)
        body += self.results(space, grid * threads)
        params: list[tuple[str, Any]] = [("wholes", "long long *"), ("reals", "double *")]
        arguments: list[Any] = [
            (I64, [0] * grid * threads), (F64, [0] * grid * threads * RESULTS),
        ]  # fmt: skip
        params += [("given", f"const {given_kind.c} *"), ("counts", "int *"),
                   ("ucounts", "unsigned int *"), ("fcounts", "float *"), ("scalar", scalar),
                   ("turns", I32)]  # fmt: skip
        arguments += [(given_kind, self.values(given_kind, 8)), (I32, [1, 2, 3, 4]),
                      (U32, [1, 2, 3, 4]), (F32, [0] * 4)]  # fmt: skip
        arguments += [self.values(scalar, 1)[0] if scalar is not BOOL else 1, self.number(0, 3)]
        has_dynamic = self.shared[0].dynamic
        return Kernel(
            self.name, params, body,
            [*self.totals.values(), *self.changes.values(), *self.functions],
            list(self.structs), [table], grid, block, arguments,
            threads * dynamic.bits // 8 if has_dynamic else 0,
        )  # fmt: skip

    def results(self, space: Space, threads: int) -> list[Stmt]:
        """All that is known at the end: floats one by one, whole numbers as one sum."""
        values: list[Expr] = [v for v in space.values if isinstance(v, Var) and v.name[0] == "v"]
        values += [Field(Var(r, n), key) for n, r in space.records for key, _ in r.fields]
        for array, kind, count in space.arrays:
            if array[0] == "a":
                values += [Element(array, kind, Lit(I32, at), count) for at in range(count)]
        total = Var(I64, "sum")
        out: list[Stmt] = [Declare("sum", I64, Lit(I64, 7))]
        if self.number(0, 5) == 0:
            test = Bin("==", Bin("%", Var(I32, "gid"), Lit(I32, 3)), Cast(U8, self.whole(space, 1)))
            out.append(Return(test=test))
        size, reals = threads * RESULTS, 0
        for value in values:
            if not value.kind.real:
                more = Bin("+", Bin("*", total, Lit(I32, 31)), Cast(I64, value))
                out.append(Store(total, "", more))
            elif reals < RESULTS:
                at = Bin("+", Bin("*", Var(I32, "gid"), Lit(I32, RESULTS)), Lit(I32, reals))
                out.append(Store(Element("reals", F64, at, size), "", Cast(F64, value)))
                reals += 1
        return [*out, Store(Element("wholes", I64, Var(I32, "gid"), threads), "", total)]

    def values(self, kind: Kind, count: int) -> list[Any]:
        if kind.real:
            return [self.pick(REALS) for _ in range(count)]
        low = -(1 << (kind.bits - 1)) if kind.signed else 0
        high = (1 << (kind.bits - kind.signed)) - 1
        edges = (0, 1, 2, 3, 7, 100, low, high)
        return [min(max(self.pick(edges), low), high) for _ in range(count)]


@dataclass(eq=False)
class Total(Function):
    """An instance of a template; all instances print as the one template."""

    size: int = 0

    def lines(self) -> list[str]:
        return [
            f"template <typename T, int N> __device__ T {self.name}(const T *p) {{",
            "  T s = 0;",
            "  for (int i = 0; i < N; i++) s = s * 3 - p[i];",
            "  return s;",
            "}",
        ]


@st.composite
def kernel(draw: Callable[[Any], Any], name: str) -> Kernel:
    """One kernel; all that it declares has names of its own."""
    return Drawing(draw, name).kernel()


class Novelty:
    """Hypothesis likes to repeat itself with one change; a kernel counts when half of it is new."""

    def __init__(self) -> None:
        self.seen: list[set[str]] = []

    def __call__(self, made: Kernel) -> bool:
        lines = {line.strip().replace(made.name, "k") for line in made.text().splitlines()}
        if any(2 * len(lines & other) > len(lines) for other in self.seen):
            return False
        self.seen.append(lines)
        return True
