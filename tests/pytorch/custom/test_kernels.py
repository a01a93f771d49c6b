"""A backend's own kernels, what they serve besides, and what happens where there is none."""

from __future__ import annotations

from collections.abc import Callable

import pytest

SCRIPT = """
from drivetrain.pytorch.custom import FallbackWarning
calls = []

def add(a, b, *, alpha=1):
    calls.append("add")
    if a.dtype is not torch.float32:
        return NotImplemented
    return torch.sub(a, b, alpha=-alpha)

h = register_custom_device(SharedChip("npu", kernels={"aten::add.Tensor": add}),
                           Config(fallback="warn", shim=SHIM))
D = "npu"
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    x = torch.ones(3, device=D)
    y = x + x
    assert y.tolist() == [2] * 3 and calls == ["add"] and "aten::add.Tensor" not in h.fallbacks
    y.add_(x)
    torch.add(x, x, out=y)
    torch.add(x, x, out=torch.empty(0, device=D))
    assert y.tolist() == [2] * 3 and calls == ["add"] * 4
    assert not any("add" in name for name in h.fallbacks), h.fallbacks
    i = torch.ones(3, dtype=torch.int64, device=D)
    assert (i + i).tolist() == [2] * 3
    assert h.fallbacks["aten::add.Tensor"] == 1
    assert h.fallbacks.reasons["aten::add.Tensor"] == "declined"
    raises(RuntimeError, "can't be cast", lambda: torch.add(x, x, out=i))
    assert raises(RuntimeError, "same device", lambda: x + torch.ones(3))
    for _ in range(3):
        x.exp()
    about = [str(w.message) for w in said if w.category is FallbackWarning]
    assert sum("aten::exp" in text for text in about) == 1, about
    assert h.fallbacks["aten::exp.default"] == 3

h.fallbacks.policy = "error"
raises(Unsupported, "aten::exp.default", lambda: x.exp())
h.fallbacks.policy = "allow"
h.fallbacks.clear()
assert str(h.fallbacks) == "nothing left npu" and len(h.fallbacks) == 0
x.exp()
assert dict(h.fallbacks) == {"aten::exp.default": 1}
raises(BadInput, "fallback", lambda: setattr(h.fallbacks, "policy", "perhaps"))
print("end")
"""


def test_kernels_serve_their_kin_and_the_rest_is_counted(run: Callable[..., str]) -> None:
    assert "end" in run(SCRIPT)


@pytest.mark.soak
def test_the_same_kernels_serve_with_the_shim(with_shim: Callable[..., str]) -> None:
    assert "end" in with_shim(SCRIPT)
