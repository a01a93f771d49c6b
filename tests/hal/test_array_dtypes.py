"""Types mix by the standard's rules, which numpy follows where they say something."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from drivetrain.errors import BadInput
from drivetrain.hal import ops
from drivetrain.hal.dtype import DTYPES, dtype_of, promoted

np = pytest.importorskip("numpy")

NAMES = [name for name in DTYPES if name != "bfloat16"]


def defined(a: str, b: str) -> bool:
    """Whether the standard's lattice joins the two types."""
    kinds = {np.dtype(a).kind, np.dtype(b).kind}
    if kinds == {"i", "u"}:
        return "uint64" not in (a, b)
    return len(kinds) == 1


@pytest.mark.parametrize(("a", "b"), list(product(NAMES, NAMES)))
def test_two_types_give_numpys_or_are_refused(a: str, b: str) -> None:
    if defined(a, b):
        assert promoted(DTYPES[a], DTYPES[b]).name == np.result_type(a, b).name
        assert ops.result_type(a, b) == np.result_type(a, b)
        assert ops.can_cast(a, b) == (np.result_type(a, b) == np.dtype(b))
    else:
        with pytest.raises(BadInput, match="do not mix"):
            promoted(DTYPES[a], DTYPES[b])
        assert not ops.can_cast(a, b)


def test_bfloat16_mixes_with_wider_floats_only() -> None:
    half = DTYPES["bfloat16"]
    assert promoted(half, DTYPES["float32"]) == "float32"
    assert promoted(half, half) == "bfloat16"
    with pytest.raises(BadInput):
        promoted(half, DTYPES["float16"])


@pytest.mark.parametrize(
    "value", ["float32", np.float32, np.dtype("float32"), ops.float32, DTYPES["float32"], float]
)
def test_a_type_has_many_names(value: Any) -> None:
    assert dtype_of(value) is ops.float32


@pytest.mark.parametrize("value", ["float", "complex64", object(), 3, None, str])
def test_other_names_are_refused(value: Any) -> None:
    with pytest.raises(BadInput, match="no type of elements"):
        dtype_of(value)


def test_the_namespaces_types_are_numpys_by_name() -> None:
    for name in NAMES:
        found = getattr(ops, name)
        assert found == np.dtype(name)
        assert str(found) == name
        assert hash(found) == hash(name)
    assert ops.float32 != ops.float64
    assert ops.isdtype(ops.float32, "real floating")
    assert ops.isdtype(ops.uint8, ("bool", "unsigned integer"))
    assert not ops.isdtype(ops.bool, "numeric")
