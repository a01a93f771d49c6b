"""Kernels as those who launch them see them: symbols and parameters."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

from drivetrain.hal.language.facts import Param
from drivetrain.hal.language.tree import Function
from drivetrain.hal.language.types import HALF, WORDS, Pointer, Scalar, Type, size_of

__all__ = ["kernel_params", "kernel_symbols"]

LONGEST_SYMBOL = 100


def kernel_params(kernel: Function) -> tuple[Param, ...]:
    """The parameters of a kernel, with the sizes that CUDA gives them."""
    return tuple(Param(_word(var.type), size_of(var.type), var.name) for var in kernel.params)


def _word(kind: Type) -> str:
    if isinstance(kind, Pointer):
        return "ptr"
    if kind is HALF:
        return "f16"
    return WORDS[kind] if isinstance(kind, Scalar) else "struct"


def kernel_symbols(names: Iterable[str]) -> dict[str, str]:
    """A symbol for each kernel: ``scale<float>`` is ``scale_float``, and no two are the same."""
    wanted = list(names)
    plain_names = {name for name in wanted if name.isidentifier()}
    out: dict[str, str] = {}
    for name in wanted:
        stem = name if name.isidentifier() else re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_")
        if len(stem) > LONGEST_SYMBOL:
            stem = f"{stem[:80]}_{hashlib.sha256(name.encode()).hexdigest()[:16]}"
        symbol, count = stem, 2
        while symbol in out.values() or (symbol in plain_names and symbol != name):
            symbol, count = f"{stem}_{count}", count + 1
        out[name] = symbol
    return out
