"""Named points at which a test can have the process killed.

``DRIVETRAIN_CRASH_AT="[role@]name:n"`` sends SIGKILL to the own process at its n-th pass of the
point ``name``; with a role only in the process whose ``DRIVETRAIN_ROLE`` it is. Several are
separated by commas. Each fires once per state folder: a marker file there keeps a restarted
process from dying again. ``DRIVETRAIN_CRASH_TRACE=FILE`` appends ``role@name`` at every pass.
"""

from __future__ import annotations

import ast
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from drivetrain.errors import BadInput


@dataclass(frozen=True)
class _Spec:
    text: str
    role: str
    name: str
    n: int


def _parse(text: str) -> _Spec | None:
    if not text:
        return None
    role, at, rest = text.rpartition("@")
    name, colon, count = rest.rpartition(":")
    if not name or not colon or not count.isdigit() or int(count) < 1 or (at and not role):
        raise BadInput(
            f"DRIVETRAIN_CRASH_AT={text!r} is not '[role@]name:n' with n >= 1; unset it or write "
            "for example target@journal.written:1"
        )
    return _Spec(text, role, name, int(count))


_SPECS = tuple(
    spec
    for text in os.environ.get("DRIVETRAIN_CRASH_AT", "").split(",")
    if (spec := _parse(text)) is not None
)
_TRACE = os.environ.get("DRIVETRAIN_CRASH_TRACE", "")
_ACTIVE = bool(_SPECS or _TRACE)
_lock = threading.Lock()
_passes: Counter[_Spec] = Counter()


def crash_point(name: str) -> None:
    """Die here if a test asked for it. ``name`` must be a string literal (see `listed`)."""
    if _ACTIVE:
        _pass(name)


def _pass(name: str) -> None:
    role = os.environ.get("DRIVETRAIN_ROLE", "")
    if _TRACE:
        fd = os.open(_TRACE, os.O_CREAT | os.O_APPEND | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        os.write(fd, f"{role}@{name}\n".encode())
        os.close(fd)
    for spec in _SPECS:
        if name == spec.name and spec.role in ("", role):
            _die_if_due(spec)


def _die_if_due(spec: _Spec) -> None:
    with _lock:
        _passes[spec] += 1
        due = _passes[spec] == spec.n
    if due and _first_time(spec):
        os.kill(os.getpid(), signal.SIGKILL)
        while True:  # the signal is on its way: nothing after the point may run
            time.sleep(1)


def _first_time(spec: _Spec) -> bool:
    explicit = os.environ.get("DRIVETRAIN_HOME")
    if explicit:
        root = Path(explicit).expanduser()
    else:
        from drivetrain.store.home import home

        root = home()
    folder = root / "crash-markers"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    safe = "".join(c if c.isalnum() or c in "._-@" else "_" for c in spec.text)
    try:
        os.close(os.open(folder / safe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return False
    return True


def _after_fork_in_child() -> None:
    global _lock
    _passes.clear()
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def _calls(tree: ast.AST) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = node.func
            called = function.attr if isinstance(function, ast.Attribute) else None
            if isinstance(function, ast.Name):
                called = function.id
            if called == "crash_point":
                yield node


def listed(package_dir: Path) -> tuple[str, ...]:
    """The names of all crash points in the Python files below ``package_dir``, sorted.

    Raises ValueError for a call whose name is not a string literal.
    """
    names: set[str] = set()
    for path in sorted(package_dir.rglob("*.py")):
        for call in _calls(ast.parse(path.read_text(encoding="utf-8"), str(path))):
            first = call.args[0] if call.args else None
            if not isinstance(first, ast.Constant) or not isinstance(first.value, str):
                raise ValueError(f"{path}:{call.lineno}: crash_point needs a string literal")
            names.add(first.value)
    return tuple(sorted(names))


def crash_points() -> tuple[str, ...]:
    """The names of all crash points in the installed package."""
    return listed(Path(__file__).parent.parent)
