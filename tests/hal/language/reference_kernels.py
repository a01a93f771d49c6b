"""Kernels as a tree of their own, printed as CUDA C and run by a small interpreter.

A thread is a generator that yields where it waits for others; a block's threads are run one after
another from one place to wait to the next. Numbers are `reference_numbers`'.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from reference_numbers import (
    BOOL,
    F32,
    F64,
    I32,
    I64,
    INTRINSICS,
    RIGHT,
    U32,
    Kind,
    Record,
    Rules,
    calculated,
    common,
    converted,
    promoted,
    shifted,
    wrap,
)

# -- expressions: ``text()`` is CUDA C, ``value(thread)`` a number


class Expr:
    kind: Any

    def text(self) -> str:
        raise NotImplementedError

    def value(self, t: Thread) -> Any:
        raise NotImplementedError


@dataclass(eq=False)
class Lit(Expr):
    kind: Kind
    number: Any

    def text(self) -> str:
        kind, number = self.kind, self.number
        if kind is BOOL:
            return "true" if number else "false"
        if kind.real:
            body = f"{float(number)!r}{'f' if kind is F32 else ''}"
        elif kind is I32 and number == -(1 << 31):
            return "(-2147483647 - 1)"
        elif kind is I64 and number == -(1 << 63):
            return "(-9223372036854775807ll - 1)"
        else:
            body = f"{number}{ {'u32': 'u', 'i64': 'll', 'u64': 'ull'}.get(kind.name, '') }"
        if kind.bits < 32:
            return f"({kind.c})({body})"
        return f"({body})" if number < 0 or str(number)[0] == "-" else body

    def value(self, t: Thread) -> Any:
        return converted(self.number, F64 if self.kind.real else self.kind, self.kind, t.rules)


@dataclass(eq=False)
class Var(Expr):
    kind: Any
    name: str

    def text(self) -> str:
        return self.name

    def value(self, t: Thread) -> Any:
        return t.names[self.name]


@dataclass(eq=False)
class Index(Expr):
    """``threadIdx.x`` and its kin."""

    name: str
    kind: Kind = U32

    def text(self) -> str:
        return self.name

    def value(self, t: Thread) -> Any:
        return t.indices[self.name]


@dataclass(eq=False)
class Field(Expr):
    of: Expr
    name: str

    @property
    def kind(self) -> Any:  # type: ignore[override]
        return dict(self.of.kind.fields)[self.name]

    def text(self) -> str:
        return f"{self.of.text()}.{self.name}"

    def value(self, t: Thread) -> Any:
        return self.of.value(t)[self.name]


@dataclass(eq=False)
class Element(Expr):
    """``array[index % count]``; ``index`` may be any whole number."""

    array: str
    kind: Kind
    index: Expr
    count: int

    def where(self) -> str:
        return f"{self.array}[(unsigned int)({self.index.text()}) % {self.count}u]"

    def text(self) -> str:
        return self.where()

    def place(self, t: Thread) -> tuple[list[Any], int]:
        memory, start = t.names[self.array]
        return memory, start + self.index.value(t) % (1 << 32) % self.count

    def value(self, t: Thread) -> Any:
        memory, at = self.place(t)
        return memory[at]


@dataclass(eq=False)
class Un(Expr):
    op: str
    of: Expr

    def __post_init__(self) -> None:
        self.kind = BOOL if self.op == "!" else promoted(self.of.kind)

    def text(self) -> str:
        return f"({self.op}{self.of.text()})"

    def value(self, t: Thread) -> Any:
        value = self.of.value(t)
        if self.op == "!":
            return int(not value)
        value = converted(value, self.of.kind, self.kind, t.rules)
        if self.kind.real:
            return -value
        made = -value if self.op == "-" else ~value
        return wrap(made, self.kind) if t.rules.wraps else made


@dataclass(eq=False)
class Bin(Expr):
    op: str
    left: Expr
    right: Expr

    def __post_init__(self) -> None:
        if self.op in ("<", ">", "<=", ">=", "==", "!=", "&&", "||"):
            self.kind = BOOL
        elif self.op in ("<<", ">>"):
            self.kind = promoted(self.left.kind)
        else:
            self.kind = common(self.left.kind, self.right.kind)

    def text(self) -> str:
        return f"({self.left.text()} {self.op} {self.right.text()})"

    def value(self, t: Thread) -> Any:
        op, rules = self.op, t.rules
        a = self.left.value(t)
        if op in ("&&", "||"):
            if rules.short_circuits and bool(a) == (op == "||"):
                return int(bool(a))
            return int(bool(self.right.value(t)))
        b = self.right.value(t)
        if op in ("<<", ">>"):
            kind = promoted(self.left.kind, rules)
            a = converted(a, self.left.kind, kind, rules)
            return shifted(op, kind, a, b, self.right.kind, rules)
        kind = common(self.left.kind, self.right.kind, rules)
        a = converted(a, self.left.kind, kind, rules)
        b = converted(b, self.right.kind, kind, rules)
        if self.kind is BOOL:
            return int(
                {"<": a < b, ">": a > b, "<=": a <= b, ">=": a >= b, "==": a == b, "!=": a != b}[op]
            )
        return calculated(op, kind, a, b, rules)


@dataclass(eq=False)
class Pick(Expr):
    test: Expr
    yes: Expr
    no: Expr

    def __post_init__(self) -> None:
        same = self.yes.kind == self.no.kind
        self.kind = self.yes.kind if same else common(self.yes.kind, self.no.kind)

    def text(self) -> str:
        return f"({self.test.text()} ? {self.yes.text()} : {self.no.text()})"

    def value(self, t: Thread) -> Any:
        taken = self.yes if self.test.value(t) else self.no
        return converted(taken.value(t), taken.kind, self.kind, t.rules)


@dataclass(eq=False)
class Cast(Expr):
    kind: Kind
    of: Expr

    def text(self) -> str:
        return f"({self.kind.c})({self.of.text()})"

    def value(self, t: Thread) -> Any:
        return converted(self.of.value(t), self.of.kind, self.kind, t.rules)


@dataclass(eq=False)
class Macro(Expr):
    """A call of a macro: what it expands to counts."""

    name: str
    arguments: list[Expr]
    body: Expr

    @property
    def kind(self) -> Any:  # type: ignore[override]
        return self.body.kind

    def text(self) -> str:
        return f"{self.name}({', '.join(a.text() for a in self.arguments)})"

    def value(self, t: Thread) -> Any:
        return self.body.value(t)


@dataclass(eq=False)
class Intrinsic(Expr):
    name: str
    arguments: list[Expr]

    @property
    def kind(self) -> Any:  # type: ignore[override]
        return INTRINSICS[self.name][0]

    def text(self) -> str:
        return f"{self.name}({', '.join(a.text() for a in self.arguments)})"

    def value(self, t: Thread) -> Any:
        result, kinds, function = INTRINSICS[self.name]
        given = [
            converted(a.value(t), a.kind, kind, RIGHT)
            for a, kind in zip(self.arguments, kinds, strict=True)
        ]
        made = function(*given)
        return result.numpy.type(made) if result.real else int(made)


@dataclass(eq=False)
class Call(Expr):
    """Of a function that waits for nobody. An argument is an expression or an array's name."""

    function: Function
    arguments: list[Any]
    explicit: str = ""

    @property
    def kind(self) -> Any:  # type: ignore[override]
        return self.function.result

    def text(self) -> str:
        given = ", ".join(a if isinstance(a, str) else a.text() for a in self.arguments)
        return f"{self.function.name}{self.explicit}({given})"

    def value(self, t: Thread) -> Any:
        run = called(self.function, self.arguments, t)
        try:
            next(run)
        except StopIteration as end:
            return end.value
        raise AssertionError("it waits")


@dataclass(eq=False)
class Make(Expr):
    """A record from its fields."""

    kind: Record
    parts: list[Expr]

    def text(self) -> str:
        inside = ", ".join(part.text() for part in self.parts)
        if self.kind.vector:
            return f"make_{self.kind.name}({inside})"
        casts = ", ".join(
            f"({kind.c})({part.text()})"
            for part, (_, kind) in zip(self.parts, self.kind.fields, strict=True)
        )
        return f"{self.kind.name}{{{casts}}}"

    def value(self, t: Thread) -> Any:
        return {
            name: converted(part.value(t), part.kind, kind, t.rules)
            for part, (name, kind) in zip(self.parts, self.kind.fields, strict=True)
        }


# -- statements: ``lines()`` are CUDA C, ``run(thread)`` is a generator


class Break_(Exception):
    pass


class Continue_(Exception):
    pass


class Return_(Exception):
    def __init__(self, value: Any = None) -> None:
        self.result = value


class Stmt:
    def lines(self) -> list[str]:
        raise NotImplementedError

    def run(self, t: Thread) -> Iterator[Any]:
        raise NotImplementedError


def indented(body: list[Stmt]) -> list[str]:
    return ["  " + line for stmt in body for line in stmt.lines()]


def run_all(body: list[Stmt], t: Thread) -> Iterator[Any]:
    for stmt in body:
        yield from stmt.run(t)


def _copied(value: Any, t: Thread) -> Any:
    return dict(value) if isinstance(value, dict) and t.rules.structs_are_copied else value


@dataclass(eq=False)
class Declare(Stmt):
    name: str
    kind: Any
    init: Expr
    word: str = ""

    def lines(self) -> list[str]:
        return [f"{self.word or self.kind.c} {self.name} = {self.init.text()};"]

    def run(self, t: Thread) -> Iterator[Any]:
        value = self.init.value(t)
        if isinstance(self.kind, Kind):
            value = converted(value, self.init.kind, self.kind, t.rules)
        t.names[self.name] = _copied(value, t)
        return
        yield


@dataclass(eq=False)
class Array(Stmt):
    """A thread's own array."""

    name: str
    kind: Kind
    parts: list[Expr]
    count: int

    def lines(self) -> list[str]:
        inside = ", ".join(f"({self.kind.c})({part.text()})" for part in self.parts)
        return [f"{self.kind.c} {self.name}[{self.count}] = {{{inside}}};"]

    def run(self, t: Thread) -> Iterator[Any]:
        values = [converted(part.value(t), part.kind, self.kind, t.rules) for part in self.parts]
        zero = converted(0, I32, self.kind)
        t.names[self.name] = (values + [zero] * (self.count - len(values)), 0)
        return
        yield


@dataclass(eq=False)
class Store(Stmt):
    """``place op= value``; the op may be empty, or ``++`` and ``--`` without a value."""

    place: Any
    op: str
    of: Expr | None

    def lines(self) -> list[str]:
        where = self.place.text()
        if self.of is None:
            return [f"{where}{self.op};"]
        return [f"{where} {self.op}= {self.of.text()};"]

    def run(self, t: Thread) -> Iterator[Any]:
        place, rules = self.place, t.rules
        if self.of is None:
            made: Any = Bin(self.op[0], place, Lit(I32, 1))
        elif self.op:
            made = Bin(self.op, place, self.of)
        else:
            made = self.of
        value = made.value(t)
        if isinstance(place.kind, Kind):
            # A wrong rule may have changed the type that was calculated in.
            have = made.kind
            if isinstance(value, (float, np.floating)) != have.real:
                have = F64
            value = converted(value, have, place.kind, rules)
        value = _copied(value, t)
        if isinstance(place, Var):
            t.names[place.name] = value
        elif isinstance(place, Field):
            place.of.value(t)[place.name] = value
        else:
            memory, at = place.place(t)
            memory[at] = value
        return
        yield


@dataclass(eq=False)
class Do(Stmt):
    call: Call

    def lines(self) -> list[str]:
        return [f"{self.call.text()};"]

    def run(self, t: Thread) -> Iterator[Any]:
        yield from called(self.call.function, self.call.arguments, t)


@dataclass(eq=False)
class If(Stmt):
    test: Expr
    yes: list[Stmt]
    no: list[Stmt]

    def lines(self) -> list[str]:
        out = [f"if ({self.test.text()}) {{", *indented(self.yes)]
        if self.no:
            out += ["} else {", *indented(self.no)]
        return [*out, "}"]

    def run(self, t: Thread) -> Iterator[Any]:
        yield from run_all(self.yes if self.test.value(t) else self.no, t)


@dataclass(eq=False)
class For(Stmt):
    """``for (int name = 0; name < count; name += step)``."""

    name: str
    count: Expr
    step: int
    body: list[Stmt]

    def lines(self) -> list[str]:
        n = self.name
        step = f"{n}++" if self.step == 1 else f"{n} += {self.step}"
        head = f"for (int {n} = 0; {n} < (int)({self.count.text()}); {step}) {{"
        return [head, *indented(self.body), "}"]

    def run(self, t: Thread) -> Iterator[Any]:
        at = 0
        while at < converted(self.count.value(t), self.count.kind, I32):
            t.names[self.name] = at
            try:
                yield from run_all(self.body, t)
            except Break_:
                break
            except Continue_:
                if not t.rules.continue_steps:
                    at += self.step
            at += self.step


@dataclass(eq=False)
class While(Stmt):
    """At most ``most`` rounds; ``post`` tests at the end."""

    name: str
    test: Expr
    most: int
    body: list[Stmt]
    post: bool

    def lines(self) -> list[str]:
        count = f"int {self.name} = {self.most};"
        test = f"{self.name}-- > 0 && {self.test.text()}"
        if self.post:
            return [count, "do {", *indented(self.body), f"}} while ({test});"]
        return [count, f"while ({test}) {{", *indented(self.body), "}"]

    def run(self, t: Thread) -> Iterator[Any]:
        t.names[self.name] = self.most
        first = self.post
        while True:
            if not first:
                t.names[self.name] -= 1
                if t.names[self.name] < 0 or not self.test.value(t):
                    break
            first = False
            try:
                yield from run_all(self.body, t)
            except Break_:
                break
            except Continue_:
                pass


@dataclass(eq=False)
class Switch(Stmt):
    test: Expr
    cases: list[tuple[int | None, list[Stmt], bool]]
    """Value or default, statements, and whether a break ends them."""

    def lines(self) -> list[str]:
        out = [f"switch ((int)({self.test.text()}) & 3) {{"]
        for value, body, ends in self.cases:
            out.append("  default: {" if value is None else f"  case {value}: {{")
            out += ["  " + line for line in indented(body)]
            out.append("  } break;" if ends else "  }")
        return [*out, "}"]

    def run(self, t: Thread) -> Iterator[Any]:
        value = converted(self.test.value(t), self.test.kind, I32) & 3
        at = next((n for n, case in enumerate(self.cases) if case[0] == value), None)
        if at is None:
            at = next((n for n, case in enumerate(self.cases) if case[0] is None), None)
        if at is None:
            return
        for _, body, ends in self.cases[at:]:
            yield from run_all(body, t)
            if ends or not t.rules.case_falls_through:
                break


@dataclass(eq=False)
class Leave(Stmt):
    """``break`` or ``continue`` under a condition."""

    word: str
    test: Expr

    def lines(self) -> list[str]:
        return [f"if ({self.test.text()}) {self.word};"]

    def run(self, t: Thread) -> Iterator[Any]:
        if self.test.value(t):
            raise Break_ if self.word == "break" else Continue_
        return
        yield


@dataclass(eq=False)
class Return(Stmt):
    of: Expr | None = None
    test: Expr | None = None

    def lines(self) -> list[str]:
        value = f" {self.of.text()}" if self.of is not None else ""
        before = f"if ({self.test.text()}) " if self.test is not None else ""
        return [f"{before}return{value};"]

    def run(self, t: Thread) -> Iterator[Any]:
        if self.test is None or self.test.value(t):
            raise Return_(None if self.of is None else (self.of.value(t), self.of.kind))
        return
        yield


@dataclass(eq=False)
class Sync(Stmt):
    def lines(self) -> list[str]:
        return ["__syncthreads();"]

    def run(self, t: Thread) -> Iterator[Any]:
        if t.rules.barrier_waits:
            yield ("sync",)


@dataclass(eq=False)
class Shared(Stmt):
    """An array for the block, static or the dynamic one; it is there before the threads start."""

    name: str
    kind: Kind
    count: int
    dynamic: bool = False

    def lines(self) -> list[str]:
        if self.dynamic:
            return [f"extern __shared__ {self.kind.c} {self.name}[];"]
        return [f"__shared__ {self.kind.c} {self.name}[{self.count}];"]

    def run(self, t: Thread) -> Iterator[Any]:
        zero = converted(0, I32, self.kind)
        memory = t.shared.setdefault(self.name, [zero] * self.count)
        t.names[self.name] = (memory, 0)
        return
        yield


@dataclass(eq=False)
class Atomic(Stmt):
    """Whose order does not matter; what it returns is dropped."""

    name: str
    place: Element
    of: Expr

    def lines(self) -> list[str]:
        value = f"({self.place.kind.c})({self.of.text()})"
        return [f"{self.name}(&{self.place.where()}, {value});"]

    def run(self, t: Thread) -> Iterator[Any]:
        memory, at = self.place.place(t)
        value = converted(self.of.value(t), self.of.kind, self.place.kind, t.rules)
        old = memory[at]
        if t.rules.atomics_count or t.number % 2:
            memory[at] = {
                "atomicAdd": lambda: calculated("+", self.place.kind, old, value, RIGHT),
                "atomicSub": lambda: calculated("-", self.place.kind, old, value, RIGHT),
                "atomicMin": lambda: min(old, value),
                "atomicMax": lambda: max(old, value),
                "atomicAnd": lambda: old & value,
                "atomicOr": lambda: old | value,
                "atomicXor": lambda: old ^ value,
            }[self.name]()
        return
        yield


@dataclass(eq=False)
class Shuffle(Stmt):
    """``kind name = __shfl_..._sync(...)``; all lanes of the warp come along."""

    name: str
    how: str
    kind: Kind
    of: Expr
    by: Expr
    width: int

    def lines(self) -> list[str]:
        suffix = "" if self.how == "idx" else f"_{self.how}"
        value = f"({self.kind.c})({self.of.text()})"
        given = f"0xffffffffu, {value}, (int)({self.by.text()}) & 31, {self.width}"
        return [f"{self.kind.c} {self.name} = __shfl{suffix}_sync({given});"]

    def run(self, t: Thread) -> Iterator[Any]:
        value = converted(self.of.value(t), self.of.kind, self.kind, t.rules)
        by = converted(self.by.value(t), self.by.kind, I32) & 31
        lane, width = t.number & 31, self.width
        first = lane & -width if t.rules.shuffle_stays_in_group else 0
        last = first + width - 1 if t.rules.shuffle_stays_in_group else 31
        other = {
            "idx": first | (by & (width - 1)),
            "up": lane - by if lane - by >= first else lane,
            "down": lane + by if lane + by <= last else lane,
            "xor": lane ^ by if lane ^ by <= last else lane,
        }[self.how]
        t.names[self.name] = yield ("shuffle", value, other)


@dataclass(eq=False)
class Vote(Stmt):
    name: str
    how: str
    of: Expr

    def lines(self) -> list[str]:
        return [f"unsigned int {self.name} = __{self.how}_sync(0xffffffffu, {self.of.text()});"]

    def run(self, t: Thread) -> Iterator[Any]:
        t.names[self.name] = yield (self.how, int(bool(self.of.value(t))), 0)


# -- functions, kernels, and how they run


@dataclass(eq=False)
class Function:
    name: str
    params: list[tuple[str, Any]]
    """A kind, or a string: the C type of a pointer, ``const int *``."""
    result: Any
    body: list[Stmt]
    template: str = ""

    def lines(self) -> list[str]:
        params = ", ".join(
            f"{kind}{name}" if isinstance(kind, str) else f"{kind.c} {name}"
            for name, kind in self.params
        )
        result = self.result.c if self.result is not None else "void"
        head = f"__device__ {result} {self.name}({params}) {{"
        return [*([self.template] if self.template else []), head, *indented(self.body), "}"]


def called(function: Function, arguments: list[Any], t: Thread) -> Iterator[Any]:
    """A call: the arguments are taken, a frame of names is put up, and the result converted."""
    frame: dict[str, Any] = {}
    for (name, kind), argument in zip(function.params, arguments, strict=True):
        if isinstance(kind, str):
            if not isinstance(argument, str):
                frame[name] = argument.place(t)
            elif argument.startswith("&"):
                frame[name] = t.address(argument)
            else:
                frame[name] = t.names[argument]
        elif isinstance(kind, Kind):
            frame[name] = converted(argument.value(t), argument.kind, kind, t.rules)
        else:
            frame[name] = _copied(argument.value(t), t)
    outside, t.names = t.names, {**t.constants, **frame}
    result = None
    try:
        yield from run_all(function.body, t)
    except Return_ as left:
        if left.result is not None:
            value, kind = left.result
            if isinstance(function.result, Kind):
                value = converted(value, kind, function.result, t.rules)
            result = _copied(value, t)
    finally:
        t.names = outside
    return result


@dataclass(eq=False)
class Kernel:
    name: str
    params: list[tuple[str, Any]]
    body: list[Stmt]
    functions: list[Function] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    constants: list[tuple[str, Kind, list[Any]]] = field(default_factory=list)
    grid: int = 1
    block: tuple[int, ...] = (1,)
    arguments: list[Any] = field(default_factory=list)
    """Numbers, or (kind, values) for arrays."""
    dynamic_bytes: int = 0

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """For hypothesis, which would print the tree."""
        printer.text(f"<kernel {self.name}>")

    def text(self) -> str:
        out: list[str] = []
        for record in self.records:
            fields = " ".join(f"{kind.c} {name};" for name, kind in record.fields)
            out.append(f"struct {record.name} {{ {fields} }};")
        for name, kind, values in self.constants:
            inside = ", ".join(Lit(kind, value).text() for value in values)
            out.append(f"__constant__ {kind.c} {name}[{len(values)}] = {{{inside}}};")
        texts = ["\n".join(function.lines()) for function in self.functions]
        out += dict.fromkeys(texts)
        params = ", ".join(
            f"{kind}{name}" if isinstance(kind, str) else f"{kind.c} {name}"
            for name, kind in self.params
        )
        out += [f"__global__ void {self.name}({params}) {{", *indented(self.body), "}"]
        return "\n".join(out)

    @property
    def threads(self) -> int:
        return int(np.prod(self.block))

    def arrays(self) -> list[np.ndarray | int | float]:
        """The arguments as a launch takes them."""
        return [np.array(a[1], a[0].numpy) if isinstance(a, tuple) else a for a in self.arguments]


class Thread:
    def __init__(self, kernel: Kernel, block: int, number: int, names: dict[str, Any],
                 shared: dict[str, list[Any]], rules: Rules) -> None:  # fmt: skip
        self.names, self.shared, self.rules, self.number = names, shared, rules, number
        self.constants = {
            name: ([converted(v, F64 if kind.real else kind, kind) for v in values], 0)
            for name, kind, values in kernel.constants
        }
        self.names.update(self.constants)
        x, y = (*kernel.block, 1)[:2]
        self.indices = {
            "threadIdx.x": number % x, "threadIdx.y": number // x, "blockIdx.x": block,
            "blockDim.x": x, "blockDim.y": y, "gridDim.x": kernel.grid,
        }  # fmt: skip

    def address(self, text: str) -> tuple[list[Any], int]:
        """``&array[tid]``."""
        name = text[1:].split("[")[0]
        memory, start = self.names[name]
        return memory, start + self.names["tid"]


def _resolve(asked: dict[int, Any]) -> dict[int, Any]:
    """What a warp's lanes get that all wait at one place."""
    what = next(iter(asked.values()))[0]
    if what == "shuffle":
        return {n: asked.get((n & ~31) | a[2], a)[1] for n, a in asked.items()}
    word = sum(a[1] << (n & 31) for n, a in asked.items())
    if what == "ballot":
        return dict.fromkeys(asked, word)
    held = word != 0 if what == "any" else all(a[1] for a in asked.values())
    return dict.fromkeys(asked, int(held))


def _run_block(kernel: Kernel, block: int, names: dict[str, Any], rules: Rules) -> None:
    shared: dict[str, list[Any]] = {}
    running: dict[int, Iterator[Any]] = {}

    def body(thread: Thread) -> Iterator[Any]:
        try:
            yield from run_all(kernel.body, thread)
        except Return_:
            pass

    for number in range(kernel.threads):
        running[number] = body(Thread(kernel, block, number, dict(names), shared, rules))
    asked: dict[int, Any] = {}
    replies: dict[int, Any] = dict.fromkeys(running)
    while running:
        for number in sorted(replies):
            try:
                asked[number] = running[number].send(replies[number])  # type: ignore[attr-defined]
            except StopIteration:
                del running[number]
        replies = {}
        for warp in range(0, kernel.threads, 32):
            here = {n: a for n, a in asked.items() if warp <= n < warp + 32}
            alive = [n for n in running if warp <= n < warp + 32]
            if here and len(here) == len(alive) and all(a[0] != "sync" for a in here.values()):
                replies.update(_resolve(here))
        if not replies and running:
            assert len(asked) == len(running), "threads wait for threads that are gone"
            assert all(a[0] == "sync" for a in asked.values()), "threads wait in different places"
            replies = dict.fromkeys(asked)
        for number in replies:
            del asked[number]


def interpreted(kernel: Kernel, rules: Rules = RIGHT) -> list[np.ndarray]:
    """The kernel's arrays after it ran, one thread after another."""
    names: dict[str, Any] = {}
    memories: list[tuple[Kind, list[Any]]] = []
    for (name, kind), argument in zip(kernel.params, kernel.arguments, strict=True):
        if isinstance(argument, tuple):
            have = F64 if argument[0].real else argument[0]
            memory = [converted(value, have, argument[0]) for value in argument[1]]
            memories.append((argument[0], memory))
            names[name] = (memory, 0)
        else:
            names[name] = converted(argument, F64 if kind.real else kind, kind)
    with np.errstate(all="ignore"):
        for block in range(kernel.grid):
            _run_block(kernel, block, names, rules)
    out = []
    for kind, memory in memories:
        if not kind.real and kind is not BOOL:
            memory = [wrap(int(value), kind) for value in memory]
        out.append(np.array(memory).astype(kind.numpy))
    return out
