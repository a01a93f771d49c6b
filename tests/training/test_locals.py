"""Numbers that live in the loop's own names are found, and only those."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Iterator
from textwrap import dedent, indent
from typing import Any

import pytest

from drivetrain.training.locals import Watcher, changing_numbers, loop_carried


def carried(body: str) -> set[str]:
    return set(loop_carried("for step in run:\n" + indent(dedent(body).strip(), "    ")))


@pytest.mark.parametrize(
    ("body", "names"),
    [
        ("total += 1", {"total"}),
        ("best = min(best, loss)", {"best"}),
        ("x = 1\ny = x + 1", set()),
        ("a, (b, *c) = f(a, c)", {"a", "c"}),
        ("if step.last:\n    best = 1\nprint(best)", {"best"}),
        ("if p:\n    v = 1\nelse:\n    v = 2\nprint(v)", set()),
        ("if p:\n    continue\nelse:\n    v = 2\nprint(v)", set()),
        ("if loss < best: best = loss", {"best"}),
        ("with step as (x, y):\n    loss = f(x, y)\nlog(loss)", set()),
        ("with step as batch:\n    count += len(batch)", {"count"}),
        ("for k in range(3):\n    s += k\nprint(s)", {"s"}),
        ("s = 0\nfor k in range(3):\n    s += k", set()),
        ("for k in xs:\n    v = k\nprint(v)", {"v"}),
        ("while n > 0:\n    n -= 1", {"n"}),
        ("z = [k for k in z]", {"z"}),
        ("z = [k for k in xs if k]\nk = 1", set()),
        ("z = {k: v for k, v in d.items()}", set()),
        ("total = sum(total + k for k in xs)", {"total"}),
        ("self.best = min(self.best, 1)\nd['n'] += 1", set()),
        ("losses.append(1)", set()),
        ("if (n := n + 1) > 3: pass", {"n"}),
        ("if (m := f()) and m > 1: print(m)", set()),
        ("f() and (q := 1)\nprint(q)", {"q"}),
        ("v = old if p else 1\nold = v", {"old"}),
        ("try:\n    v = f()\nexcept E:\n    v = 0\nprint(v)", set()),
        ("try:\n    v = f()\nexcept E:\n    pass\nprint(v)", {"v"}),
        ("try:\n    f()\nfinally:\n    v = 1\nprint(v)", set()),
        ("def closure():\n    loss = f(x)\n    return loss\nx = 1\nloss = closure()", {"x"}),
        ("def g():\n    nonlocal n\n    n += 1\ng()", {"n"}),
        ("h = lambda x: x + bias\nbias = 2", {"bias"}),
        ("import math\nprint(math)", set()),
        ("match step:\n    case [a, b]:\n        c = a\nprint(c)", {"c"}),
        ("v: float = 1.0\nprint(v)", set()),
        ("print(v)\ndel v\nv = 1", {"v"}),
        ("if step.done:\n    break\ni += 1", {"i"}),
    ],
)
def test_loop_carried_names(body: str, names: set[str]) -> None:
    assert carried(body) == names


def test_each_name_has_the_first_line_that_reads_it_and_the_right_loop_is_chosen() -> None:
    text = dedent(
        """\
        for k in range(3):
            other += k
        for step in run:
            pass
            x = 1

            best = max(best, x)
            best = max(best, 2)
            n += 1
        """
    )
    assert loop_carried(text, "step") == {"best": 7, "n": 9}
    assert loop_carried(text.splitlines(), line=3) == {"best": 7, "n": 9}
    assert loop_carried(text) == {"other": 2}
    assert loop_carried(text, "nobody") == {}
    assert loop_carried("for x in (") == {}


class Run:
    """Yields steps as TrainingJob does, with a watcher on the frame of the loop."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.told: list[list[tuple[str, int]]] = []

    def __iter__(self) -> Iterator[int]:
        watcher = Watcher(sys._getframe(1))
        return self._loop(watcher)

    def _loop(self, watcher: Watcher) -> Iterator[int]:
        for step in range(self.steps):
            yield step
            self.told.append(watcher.observe())
        watcher.close()


def test_a_watcher_tells_each_changing_number_once_with_its_line() -> None:
    run, best, steady, text, late, history = Run(4), 9.0, 5, "a", 0, [0]
    first = sys._getframe().f_lineno
    for step in run:
        best = min(best, 9.0 - step)
        steady = max(steady, 1)
        text += "b"
        if step >= 2:
            late += 1
        fresh = step * 2
        history[0] += fresh
    assert run.told == [[], [("best", first + 2)], [("late", first + 6)], []]


def test_a_watcher_works_in_a_module_and_with_globals(tmp_path: Any) -> None:
    script = dedent(
        """\
        count = 0
        for step in run:
            count += 1

        def main(run):
            global total
            for step in run:
                total += 2

        total = 0
        main(again)
        """
    )
    path = tmp_path / "script.py"
    path.write_text(script)
    linecache.clearcache()
    run, again = Run(3), Run(3)
    exec(compile(script, str(path), "exec"), {"run": run, "again": again})
    assert run.told == [[("count", 3)], [], []]
    assert again.told == [[("total", 8)], [], []]


def test_without_source_a_watcher_says_nothing() -> None:
    run = Run(3)
    exec("n = 0\nfor step in run:\n    n += 1", {"run": run})
    assert run.told == [[], [], []]


def test_changing_numbers_compares_values_and_types() -> None:
    frame = sys._getframe()
    a, b, c, d, nan = 1, 1.0, True, "x", float("nan")
    before: dict[str, Any] = {}
    assert changing_numbers(frame, before) == set()
    assert changing_numbers(frame, before) == set()
    a, b, c, d, new = 2, 1, False, "y", 3
    assert changing_numbers(frame, before) == {"a", "b", "c"}
    assert {"a", "new", "nan"} <= set(before)
    assert (d, nan != nan, new) == ("y", True, 3)
    assert (a, b, c) == (2, 1, False)
