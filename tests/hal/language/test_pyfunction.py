"""A Python function as text that stands alone. A stand-in for Triton runs the texts."""

from __future__ import annotations

import importlib
import itertools
import linecache
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivetrain.errors import BadInput
from drivetrain.hal.language.pyfunction import function_text

STAND_IN = {
    "__init__.py": """
        from . import language
        from .runtime import JITFunction, Autotuner, jit, constexpr_function
    """,
    "runtime.py": """
        class JITFunction:
            def __init__(self, fn, noinline=False):
                self.fn, self.noinline = fn, noinline
            def __call__(self, *args, **named):
                return self.fn(*args, **named)
        class ConstexprFunction(JITFunction):
            pass
        class Autotuner:
            def __init__(self, fn):
                self.fn = fn
        def jit(fn=None, noinline=False):
            return JITFunction(fn, noinline) if fn else lambda fn: JITFunction(fn, noinline)
        def constexpr_function(fn):
            return ConstexprFunction(fn)
    """,
    "language/__init__.py": """
        from .core import constexpr, dtype, float32, load, twice
        from . import core
    """,
    "language/core.py": """
        from ..runtime import jit
        class constexpr:
            def __init__(self, value):
                self.value = value
            def __radd__(self, other):
                return other + self.value
        class dtype:
            def __init__(self, name):
                self.name = name
        float32 = dtype("fp32")
        def load(x):
            return ("loaded", x)
        @jit
        def twice(x):
            return 2 * x
    """,
}

_number = itertools.count()


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ModuleType]]:
    """Makes a module of a text; ``triton`` is the stand-in meanwhile."""
    before = {name: module for name, module in sys.modules.items() if _triton(name)}
    for name in before:
        del sys.modules[name]
    for name, text in STAND_IN.items():
        path = tmp_path / "triton" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text))
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()

    def make(text: str, name: str = "") -> ModuleType:
        name = name or f"users_{next(_number)}"
        (tmp_path / f"{name}.py").write_text(dedent(text))
        importlib.invalidate_caches()
        return importlib.import_module(name)

    yield make
    for name in [name for name in sys.modules if _triton(name)]:
        del sys.modules[name]
    sys.modules.update(before)


def _triton(name: str) -> bool:
    return name == "triton" or name.startswith("triton.")


def run(text: str, name: str) -> Any:
    scope: dict[str, Any] = {}
    exec(compile(text, "<alone>", "exec", dont_inherit=True), scope)
    return scope[name]


def test_a_text_stands_alone_and_does_the_same(modules: Callable[..., ModuleType]) -> None:
    helper = modules(
        """
        import triton, triton.language as tl
        from triton.language import load, twice as double
        STEP = 3
        @triton.jit
        def more(x):
            return double(x) + STEP
        """,
        "helper_one",
    )
    user = modules(
        """
        import triton
        import triton.language as tl
        from helper_one import more as plus
        STEP = tl.constexpr(100)
        WORD = "a {} b"
        HUGE = float("inf")
        KIND = tl.float32
        @triton.jit
        def inner(x):
            return x + STEP
        def kernel(x, flag: tl.constexpr = True):
            if flag:
                x = inner(x)
            return plus(x), WORD, HUGE, KIND, tl.load(x), min(x, 1)
        """
    )
    found = function_text(user.kernel)
    assert found.parameters == ("x", "flag")
    got = run(found.text, found.entry)(5)
    want = user.kernel(5)
    assert got[0] == want[0] == helper.more(105)
    assert (got[1].value, got[2].value, got[3].name) == (want[1], want[2], want[3].name)
    assert got[4:] == want[4:] == (("loaded", 105), 1)


def test_a_decorated_function_has_the_same_text(modules: Callable[..., ModuleType]) -> None:
    user = modules(
        """
        import triton
        @triton.jit
        def one(x):
            return two(x)
        @triton.jit(noinline=True)
        def two(x):
            return x + three()
        @triton.constexpr_function
        def three():
            return 3
        """
    )
    text = function_text(user.one)
    assert text == function_text(user.one.fn)
    assert run(text.text, "one")(4) == 7
    assert "jit(noinline=True)\ndef two" in text.text
    assert "constexpr_function\ndef three" in text.text


def test_each_line_knows_where_it_came_from(modules: Callable[..., ModuleType]) -> None:
    modules("def far(x):\n    return x\n", "helper_far")
    source = dedent(
        """
        from helper_far import far

        def near(x):
            return x  # 5

        if True:
            def kernel(x,
                       y):
                # 10
                return near(far(x)) + y  # 11
        """
    )
    user = modules(source)
    found = function_text(user.kernel)
    written, lines = source.split("\n"), found.text.rstrip("\n").split("\n")
    assert len(lines) == len(found.lines)
    told = {line: text for text, line in zip(lines, found.lines, strict=True) if line}
    assert set(told) == {4, 5, 8, 9, 10, 11}
    for line, text in told.items():
        assert text.strip() == written[line - 1].strip()
    at = lines.index("def far(x):")
    assert found.lines[at] == 0  # of another file


def test_one_name_for_two_things_is_two_names(modules: Callable[..., ModuleType]) -> None:
    modules("N = 10\ndef step(x):\n    return x + N\n", "helper_two")
    modules(
        "M = 10\nfrom helper_two import step as before\n"
        "def step(x, N=5):\n    return before(x) + N + M\n",
        "helper_three",
    )
    user = modules(
        """
        from helper_three import step
        N = 1
        max = 7
        def kernel(x):
            M = 2
            return step(x) + N + M + max
        """
    )
    found = function_text(user.kernel)
    assert found.name == "kernel"
    assert run(found.text, "kernel")(1000) == user.kernel(1000) == 1000 + 10 + 5 + 10 + 1 + 2 + 7


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(0, 3), st.sampled_from("abc")),
        min_size=2,
        max_size=6,
    )
)
def test_any_names_mean_what_they_meant(rows: list[tuple[str, int, str]]) -> None:
    """A chain of modules: each has a constant, a function, an import and a local, named at will."""
    folder = Path("chain")
    folder.mkdir(exist_ok=True)
    sys.path.insert(0, str(folder.resolve()))
    try:
        before, module = "", None
        for index, (function, value, local) in enumerate(rows):
            name = f"chain_{next(_number)}"
            constant = next(letter for letter in "abc" if letter not in (function, local))
            called = f"{before}(x)" if before else "x"
            lines = [f"from {module} import {before}"] if before else []
            if before in (constant, function):
                lines = [f"from {module} import {before} as d"]
                called = "d(x)"
            elif before == local:
                lines = [f"from {module} import {before} as e"]
                called = "e(x)"
            lines += [
                f"{constant} = {value}",
                f"def {function}(x):",
                f"    {local} = {index * 10}",
                f"    return ({called}) * 7 + {constant} + {local}",
            ]
            (folder / f"{name}.py").write_text("\n".join(lines) + "\n")
            importlib.invalidate_caches()
            module, before = name, function
        assert module is not None
        fn = getattr(importlib.import_module(module), before)
        found = function_text(fn)
        # No Triton here: a constant is itself, and the decorator does nothing.
        text = found.text.replace("import triton as _drivetrain_triton", "")
        text = text.replace("@_drivetrain_triton.jit", "")
        text = text.replace("_drivetrain_triton.language.constexpr", "")
        assert run(text, found.entry)(3) == fn(3)
    finally:
        sys.path.remove(str(folder.resolve()))


def test_the_text_is_the_same_each_time(modules: Callable[..., ModuleType]) -> None:
    user = modules(
        "A = 1\nB = 2\nC = 3\ndef f(x):\n    return x + C\ndef g(x):\n    return f(x) + A + B + C\n"
    )
    assert function_text(user.g) == function_text(user.g)


def test_a_kernel_may_be_called_as_a_builtin_is(modules: Callable[..., ModuleType]) -> None:
    user = modules("def max(x, y):\n    return min(x, y)\n")
    found = function_text(user.max)
    assert found.name == "max"
    assert found.entry != "max"
    assert run(found.text, found.entry)(1, 2) == 1


BAD = {
    "a lambda": ("kernel = lambda x: x", "lambda"),
    "*args": ("def kernel(*x):\n    pass", r"\*args"),
    "an object": ("import os\ndef kernel(x):\n    return os.sep", "'os', a module"),
    "a list": ("N = [1]\ndef kernel(x):\n    return N", "'N', a list"),
    "no such name": ("def kernel(x):\n    return absent", "'absent'"),
    "a class": ("class K:\n    pass\ndef kernel(x):\n    return K", "'K', a type"),
    "a function inside": ("def kernel(x):\n    return (lambda: x)()", "defines no functions"),
    "a closure": (
        "def make(n):\n    def k(x):\n        return x + n\n    return k\nkernel = make(1)",
        "uses n of the function around",
    ),
    "no function": ("kernel = 5", "a int is no kernel"),
    "a built-in": ("kernel = len", "no kernel"),
    "a tuned one": (
        "import triton\ndef k(x):\n    pass\nkernel = triton.Autotuner(triton.jit(k))",
        "Autotuner is no kernel",
    ),
    "no text": ("exec('def kernel(x): return x')", "source of kernel is not known"),
    "a bad callee": (
        "import os\ndef f(x):\n    return os\ndef kernel(x):\n    return f(x)",
        "f uses 'os'",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_what_it_cannot_hold_is_refused_by_name(
    what: str, modules: Callable[..., ModuleType]
) -> None:
    text, message = BAD[what]
    user = modules(text)
    with pytest.raises(BadInput, match=message):
        function_text(user.kernel)


def test_a_file_that_changed_since_is_noticed(modules: Callable[..., ModuleType]) -> None:
    user = modules("def kernel(x):\n    return x + 1\n")
    function_text(user.kernel)
    path = Path(user.__file__ or "")
    path.write_text("def kernel(x):\n    return x + 2\n")
    linecache.clearcache()
    with pytest.raises(BadInput, match="no longer holds kernel"):
        function_text(user.kernel)


def test_annotations_need_no_value(modules: Callable[..., ModuleType]) -> None:
    user = modules(
        """
        from __future__ import annotations
        import triton.language as tl
        def kernel(x: torch.Tensor, n: tl.constexpr) -> absent:
            return x + n
        """
    )
    found = function_text(user.kernel)
    assert run(found.text, "kernel")(1, 2) == 3
