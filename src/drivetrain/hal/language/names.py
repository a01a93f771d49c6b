"""The names of kernels: instances of templates can be written in more than one way."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from drivetrain.errors import DrivetrainError
from drivetrain.hal.language.tokens import scan

__all__ = ["plain_name"]


def plain_name(name: str) -> str:
    """``scale<unsigned int,4>`` for ``scale< uint32_t, 2 * 2 >``, as a module calls it.

    A name without template arguments, or with types of the user's own, is only freed of blanks.
    """
    from drivetrain.hal.language.check import Unit
    from drivetrain.hal.language.expressions import Reader
    from drivetrain.hal.language.scope import Cursor
    from drivetrain.hal.language.types import shown

    base, angle, _ = name.partition("<")
    try:
        tokens = scan(name[len(base) :])
        if not angle:
            return "".join(base.split())
        empty: Any = SimpleNamespace(children=())
        unit = Unit(empty, lenient=True)
        cursor = Cursor(list(tokens), 1)
        values = Reader(cursor, unit.scope, unit).template_arguments()
        cursor.finish("the name")
        words = [str(v) if isinstance(v, int) else shown(v) for v in values]
    except (DrivetrainError, RecursionError):
        return "".join(name.split())
    return f"{''.join(base.split())}<{','.join(words)}>"
