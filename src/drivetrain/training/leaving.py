"""How a loop was left: on purpose, or by an exception that passes through."""

from __future__ import annotations

import dis
import inspect
from types import FrameType

# Instructions that drop a loop's iterator: the end of `for`, `break` or `return` in it, `del`.
_LETS_GO = ("POP_", "END_FOR", "FOR_ITER", "DELETE_", "STORE_", "RETURN_")
_AT_A_YIELD = ("YIELD_VALUE", "RESUME", "SEND")


def left_on_purpose(frame: FrameType | None) -> bool:
    """True when a loop was left by ``break`` or ``return``, not by an exception passing through.

    Its iterator is closed in both cases and not told why, so the instruction at which the loop's
    frame stands is looked at. A generator between the loop and us (tqdm's) is itself being closed.
    """
    while frame is not None:
        code = frame.f_code
        name = dis.opname[code.co_code[frame.f_lasti]] if frame.f_lasti >= 0 else ""
        if code.co_flags & inspect.CO_GENERATOR and name in _AT_A_YIELD:
            frame = frame.f_back
            continue
        return name.startswith(_LETS_GO)
    return True
