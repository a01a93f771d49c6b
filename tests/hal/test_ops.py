"""Operations give numpy's numbers, shapes and types, on every driver that executes here."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from drivetrain import hal
from drivetrain.errors import BadInput
from drivetrain.hal import ops
from drivetrain.hal.kernels.expressions import OPERATIONS

np = pytest.importorskip("numpy")
pytest.importorskip("tree_sitter_cuda")

ROUNDING = {"float16": 3e-3, "float32": 3e-6, "float64": 1e-12}
NUMPYS = {"bitwise_invert": np.invert}
CPU = {"device": "cpu:0"}


def devices() -> list[str]:
    return ["cpu:0", *(each.address for each in hal.devices("opencl")[:1])]


@pytest.fixture(params=["cpu", "opencl"])
def where(request: pytest.FixtureRequest) -> dict[str, str]:
    found = hal.devices(request.param)
    if not found:
        pytest.skip(f"there is no {request.param} device here")
    return {"device": found[0].address}


def numbers(dtype: str, shape: Any, seed: int = 0) -> Any:
    random = np.random.default_rng(seed)
    if dtype == "bool":
        return random.integers(0, 2, shape).astype(bool)
    if dtype.startswith("float"):
        return (random.standard_normal(shape) * 3).astype(dtype)
    kind = np.iinfo(dtype)
    return random.integers(max(kind.min, -20), 20, shape, endpoint=True).astype(dtype)


def agree(found: Any, wanted: Any, loose: float = 1.0) -> None:
    wanted = np.asarray(wanted)
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    rtol = ROUNDING.get(str(wanted.dtype), 0.0) * loose
    assert np.allclose(found.numpy(), wanted, rtol=rtol, atol=rtol * 3, equal_nan=True)


def of_kind(dtype: str) -> str:
    return {"b": "bool", "i": "int", "u": "uint", "f": "float"}[np.dtype(dtype).kind]


def operands(name: str, dtype: str) -> list[Any]:
    """Numbers that the operation takes, in three rows."""
    count = getattr(NUMPYS.get(name, getattr(np, name, None)), "nin", 1)
    found = [numbers(dtype, (3, 40), seed) for seed in range(count)]
    if name in ("sqrt", "log", "log2", "log10", "log1p") or (
        name == "pow" and of_kind(dtype) == "float"
    ):
        found[0] = abs(found[0])
    if name in ("pow", "bitwise_left_shift", "bitwise_right_shift") and of_kind(dtype) == "int":
        found[1] = abs(found[1]) % 9
    if "shift" in name:
        found[1] = found[1] % 9
    return found


WHOLE = ("floor_divide", "remainder", "pow", "abs", "sign", "bitwise_right_shift")


def swept(soak: bool) -> list[tuple[str, str]]:
    """Each operation in one type, and in the others for the long run."""
    found = []
    for name, operation in OPERATIONS.items():
        types = ("float32", "int32", "uint8", "bool")
        mine = [dtype for dtype in types if of_kind(dtype) in operation.kinds]
        short = mine[:1] + (["int32"] if name in WHOLE and mine[0] != "int32" else [])
        if name not in ("where", "astype"):
            found += [(name, t) for t in mine if (t in short) != soak]
    return found


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*swept(False), *(pytest.param(*each, marks=pytest.mark.soak) for each in swept(True))],
)
def test_every_operation_gives_numpys_numbers(name: str, dtype: str) -> None:
    arrays = operands(name, dtype)
    with np.errstate(all="ignore"):
        wanted = NUMPYS.get(name, getattr(np, name, None))(*arrays)
    if name in ("floor", "ceil", "trunc", "round") and of_kind(dtype) != "float":
        wanted = arrays[0]
    agree(getattr(ops, name)(*(ops.asarray(each, **CPU) for each in arrays)), wanted)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("add", "float16"), ("tanh", "float64"), ("remainder", "int64"), ("add", "uint64"),
        ("abs", "int8"),
    ],
)  # fmt: skip
def test_narrow_and_wide_types_too(name: str, dtype: str, where: dict[str, str]) -> None:
    arrays = operands(name, dtype)
    with np.errstate(all="ignore"):
        wanted = getattr(np, name)(*arrays)
    agree(getattr(ops, name)(*(ops.asarray(each, **where) for each in arrays)), wanted)


SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.5, 3.0, -7.5, np.inf, -np.inf, np.nan, 1e-40, 3e38]


@pytest.mark.parametrize(
    "name",
    [
        "maximum", "minimum", "floor_divide", "remainder", "sign", "isfinite", "isnan", "isinf",
        "round",
    ],
)  # fmt: skip
def test_zeros_infinities_and_nan_give_numpys_answers(name: str) -> None:
    a, b = (np.array(x, np.float32).reshape(-1) for x in np.meshgrid(SPECIAL, SPECIAL))
    count = getattr(getattr(np, name), "nin", 1)
    with np.errstate(all="ignore"):
        wanted = getattr(np, name)(*(a, b)[:count])
    found = getattr(ops, name)(*(ops.asarray(x, **CPU) for x in (a, b)[:count]))
    assert np.array_equal(found.numpy(), wanted, equal_nan=wanted.dtype.kind == "f")


SHAPES = hnp.mutually_broadcastable_shapes(num_shapes=2, max_dims=4, max_side=4, min_side=0)


@settings(max_examples=60)
@given(SHAPES, st.booleans(), st.booleans())
def test_shapes_are_broadcast_whatever_the_strides(shapes: Any, turned: bool, cut: bool) -> None:
    a, b = (numbers("float32", shape, i) for i, shape in enumerate(shapes.input_shapes))
    x, y = ops.asarray(a, **CPU), ops.asarray(b, **CPU)
    if turned:
        wide = np.repeat(a.T, 2, axis=0) if a.ndim else a
        x = ops.asarray(wide, **CPU)
        x = ops.permute_dims(x[::2] if a.ndim else x, tuple(reversed(range(a.ndim))))
    if cut and b.ndim:
        b, y = b[..., ::-1], y[..., ::-1]
    agree(x - y, a - b)


@pytest.mark.parametrize(
    ("left", "right"), [("int8", "uint8"), ("uint8", "int64"), ("float16", "float64")]
)
def test_types_are_promoted(left: str, right: str) -> None:
    a, b = numbers(left, (3, 1)), numbers(right, 5)
    agree(ops.asarray(a, **CPU) + ops.asarray(b, **CPU), a + b)


def test_python_numbers_take_the_arrays_type() -> None:
    small = ops.asarray(np.array([1, 2], np.int8), **CPU)
    half = ops.asarray(np.array([1, 2], np.float16), **CPU)
    truth = ops.asarray(np.array([True, False]), **CPU)
    agree(small + 3, np.array([4, 5], np.int8))
    agree(10 - small, np.array([9, 8], np.int8))
    agree(half * 0.1, np.array([1, 2], np.float16) * 0.1)
    agree(2 / half, 2 / np.array([1, 2], np.float16))
    agree(half + 1, np.array([2, 3], np.float16))
    agree(truth & True, np.array([True, False]))
    agree(7 // small, np.array([7, 3], np.int8))
    for call in (
        lambda: small + 1.5,
        lambda: small + 300,
        lambda: small + True,
        lambda: truth + truth,
        lambda: truth & 1,
        lambda: small / small,
        lambda: ops.exp(small),
        lambda: half & half,
        lambda: small + half,
        lambda: ops.add(1, 2),
    ):
        with pytest.raises(BadInput):
            call()


ALL = "bool int8 int64 uint32 float16 float32 float64".split()  # noqa: SIM905


@pytest.mark.parametrize(
    "to",
    [
        "float16",
        "int8",
        *(
            pytest.param(t, marks=pytest.mark.soak)
            for t in ("bool", "int64", "uint8", "float32", "float64")
        ),
    ],
)
def test_astype_converts_as_numpy_does(to: str) -> None:
    for start in ALL:
        wanted = numbers(start, 50)
        if to.startswith("u"):
            wanted = abs(wanted) if start != "bool" else wanted
        agree(ops.astype(ops.asarray(wanted, **CPU), to), wanted.astype(to), 0.0)


def test_a_double_is_rounded_to_half_once() -> None:
    close = 1 + 2.0**-11 + np.array([-1, 0, 1]) * 2.0**-40  # about the middle of two halves
    found = ops.astype(ops.asarray(close, **CPU), "float16")
    assert np.array_equal(found.numpy(), close.astype(np.float16))
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    assert np.array_equal(
        ops.astype(ops.asarray(every, **CPU), "float32").numpy(),
        every.astype(np.float32),
        equal_nan=True,
    )
    wide = np.random.default_rng(1).standard_normal(1 << 14).astype(np.float32) ** 5
    halves = ops.astype(ops.asarray(wide, **CPU), "float16").numpy()
    assert np.array_equal(halves, wide.astype(np.float16))


def test_bfloat16_keeps_the_upper_half_of_a_float() -> None:
    wide = numbers("float32", 1000)
    found = ops.astype(ops.asarray(wide, **CPU), "bfloat16")
    bits = wide.view(np.uint32).astype(np.uint64)
    kept = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).astype(np.uint32)
    assert np.array_equal(ops.astype(found, "float32").numpy(), kept.view(np.float32))
    assert ops.sum(found).dtype == "bfloat16"
    assert ops.matmul(found[:100], found[100:200]).dtype == "bfloat16"


def test_astype_copies_unless_told_not_to() -> None:
    found = ops.ones(3, **CPU)
    assert ops.astype(found, "float32", copy=False) is found
    assert ops.astype(found, "float32").memory is not found.memory


# -- over axes -------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    hnp.array_shapes(min_dims=1, max_dims=4, max_side=5),
    st.sampled_from(["sum", "max"]),
    st.booleans(),
    st.booleans(),
    st.data(),
)
def test_reductions_over_any_axes(
    shape: Any, name: str, keepdims: bool, turned: bool, data: st.DataObject
) -> None:
    array = numbers("int32" if name == "sum" else "float32", shape)
    count = len(shape)
    axis = data.draw(
        st.one_of(
            st.none(),
            st.integers(-count, count - 1),
            st.sets(st.integers(0, count - 1)).map(lambda s: tuple(sorted(s))),
        )
    )
    x = ops.asarray(array, **CPU)
    if turned:
        array, x = array.transpose(), ops.permute_dims(x, tuple(reversed(range(count))))
    with np.errstate(over="ignore"):
        wanted = getattr(np, name)(array, axis=axis, keepdims=keepdims)
    agree(getattr(ops, name)(x, axis=axis, keepdims=keepdims), wanted, 30.0)


@pytest.mark.parametrize("shape", [(3, 200_001), (70_000, 2, 3)])
def test_long_reductions_are_exact_enough(shape: Any, where: dict[str, str]) -> None:
    array = np.random.default_rng(5).random(shape, np.float32)
    x = ops.asarray(array, **where)
    for axis in (None, 0, -1):
        wanted = array.sum(axis=axis, dtype=np.float64)
        assert np.allclose(ops.sum(x, axis=axis).numpy(), wanted, rtol=2e-6)
        wanted = array.mean(axis=axis, dtype=np.float64)
        assert np.allclose(ops.mean(x, axis=axis).numpy(), wanted, rtol=2e-6)
        assert np.array_equal(ops.max(x, axis=axis).numpy(), array.max(axis=axis))


def test_the_types_of_sums_and_means_are_the_standards() -> None:
    for start, wanted in (
        ("int8", "int64"), ("uint8", "uint64"), ("int64", "int64"), ("float16", "float16"),
        ("float32", "float32"),
    ):  # fmt: skip
        x = ops.ones(5, dtype=start, **CPU)
        assert ops.sum(x).dtype == wanted
        assert ops.prod(x).dtype == wanted
    assert ops.sum(ops.ones(5, dtype="int32", **CPU), dtype="float32").dtype == "float32"
    assert ops.sum(ops.full(100, 127, dtype="int8", **CPU)).item() == 12700
    halves = ops.full(100_000, 1.0, dtype="float16", **CPU)
    assert ops.mean(halves).item() == 1.0  # the sum is beyond float16
    truth = ops.asarray([True, False], **CPU)
    for call in (
        lambda: ops.sum(truth),
        lambda: ops.max(truth),
        lambda: ops.mean(ops.ones(2, dtype="int32", **CPU)),
        lambda: ops.sum(halves, axis=1),
    ):
        with pytest.raises(BadInput):
            call()


def test_reductions_of_nothing() -> None:
    none = ops.zeros((0, 3), **CPU)
    assert ops.sum(none).item() == 0
    assert ops.sum(none, axis=0).tolist() == [0, 0, 0]
    assert ops.prod(none, axis=0).tolist() == [1, 1, 1]
    assert np.isnan(ops.mean(none).item())
    assert ops.all(none).item() is True
    assert ops.any(none).item() is False
    assert ops.sum(none, axis=1).shape == (0,)
    assert ops.max(none, axis=1).shape == (0,)
    for call in (lambda: ops.max(none), lambda: ops.argmax(none, axis=0)):
        with pytest.raises(BadInput, match="no elements"):
            call()


def test_any_all_and_where_the_extremes_lie() -> None:
    array = numbers("int32", (6, 7))
    x = ops.asarray(array, **CPU)
    for axis in (None, 0, 1):
        agree(ops.argmax(x, axis=axis), np.argmax(array, axis=axis))
        agree(ops.argmin(x, axis=axis), np.argmin(array, axis=axis))
        agree(ops.any(x > 18, axis=axis), np.any(array > 18, axis=axis))
        agree(ops.all(x, axis=axis), np.all(array, axis=axis))
    nan = np.array([1, np.nan, 5, np.nan], np.float32)
    assert ops.argmax(ops.asarray(nan, **CPU)).item() == 1
    assert np.isnan(ops.max(ops.asarray(nan, **CPU)).item())
    assert ops.argmax(x, axis=1, keepdims=True).shape == (6, 1)


@pytest.mark.parametrize("shape", [(5, 10), (3, 200), (2, 3, 65), (1, 1), (4, 0)])
def test_softmax_over_each_axis(shape: Any, where: dict[str, str]) -> None:
    array = numbers("float32", shape) * 10
    x = ops.asarray(array, **where)
    for axis in range(len(shape)):
        if not shape[axis]:
            continue
        wide = array.astype(np.float64)
        top = np.exp(wide - wide.max(axis=axis, keepdims=True))
        wanted = top / top.sum(axis=axis, keepdims=True)
        agree(ops.softmax(x, axis=axis), wanted.astype(np.float32), 10.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logs = np.log(wanted)
        found = ops.log_softmax(x, axis=axis).numpy()
        assert np.allclose(found[logs > -80], logs[logs > -80], rtol=1e-5, atol=1e-5)
    assert ops.softmax(ops.asarray([[1e4, -1e4]], **where)).tolist() == [[1, 0]]


# -- shapes ----------------------------------------------------------------------------------------


def test_shapes_change_as_numpys_do() -> None:
    array = numbers("float32", (2, 3, 4))
    x = ops.asarray(array, **CPU)
    agree(ops.reshape(x, (4, -1)), array.reshape(4, -1))
    agree(ops.reshape(x.mT, (2, 12)), array.swapaxes(1, 2).reshape(2, 12))
    agree(ops.permute_dims(x, (2, 0, 1)), array.transpose(2, 0, 1))
    agree(ops.matrix_transpose(x), array.swapaxes(1, 2))
    agree(ops.expand_dims(x, axis=-1), array[..., None])
    agree(ops.squeeze(x[:, :1], 1), array[:, 0])
    agree(ops.broadcast_to(x[:, :1], (5, 2, 3, 4)), np.broadcast_to(array[:, :1], (5, 2, 3, 4)))
    assert ops.reshape(x, (6, 4)).memory is x.memory
    assert ops.reshape(x, (6, 4), copy=True).memory is not x.memory
    for call in (
        lambda: ops.reshape(x.mT, (24,), copy=False),
        lambda: ops.reshape(x, (5, 5)),
        lambda: ops.permute_dims(x, (0, 1)),
        lambda: ops.permute_dims(x, (0, 1, 1)),
        lambda: ops.squeeze(x, 0),
        lambda: ops.broadcast_to(x, (3, 4)),
    ):
        with pytest.raises(BadInput):
            call()


def test_transposed_matrices_are_copied_and_multiplied_everywhere(where: dict[str, str]) -> None:
    a, b = numbers("float32", (70, 45)), numbers("float32", (70, 33), 1)
    x, y = ops.asarray(a, **where), ops.asarray(b, **where)
    agree(ops.reshape(x.T, (-1,)), a.T.reshape(-1))
    agree(ops.reshape(x[1:, 2:].T, (-1,)), a[1:, 2:].T.reshape(-1))
    agree(x.T @ y, a.T @ b, 30.0)
    agree(ops.reshape(x.T, (5, 9, 70)) @ y, a.T.reshape(5, 9, 70) @ b, 30.0)
    moved = ops.permute_dims(ops.reshape(x, (7, 10, 45)), (1, 0, 2))
    agree(ops.sum(moved, axis=1), a.reshape(7, 10, 45).sum(0), 30.0)


def test_take_where_and_clip() -> None:
    array = numbers("float32", (4, 5, 3))
    x = ops.asarray(array, **CPU)
    positions = np.array([3, 0, -1, 2, 2], np.int64)
    indices = ops.asarray(positions, **CPU)
    for axis in (0, 1, -1):
        at = np.clip(positions, -array.shape[axis], array.shape[axis] - 1)
        agree(ops.take(x, indices, axis=axis), np.take(array, at, axis=axis))
    agree(
        ops.take(x.mT[::2], indices, axis=0), np.take(array.swapaxes(1, 2)[::2], [1, 0, 1, 1, 1], 0)
    )
    mask = numbers("bool", (5, 1))
    agree(ops.where(ops.asarray(mask, **CPU), x, 0.0), np.where(mask, array, np.float32(0)))
    agree(ops.where(ops.asarray(mask, **CPU), 1.5, x), np.where(mask, np.float32(1.5), array))
    agree(ops.clip(x, -1.0, 2.0), np.clip(array, -1, 2))
    agree(ops.clip(x, max=x[0]), np.minimum(array, array[0]))
    for call in (
        lambda: ops.take(x, indices),
        lambda: ops.take(x, x[0, 0], axis=0),
        lambda: ops.where(x, x, x),
        lambda: ops.where(ops.asarray(mask, **CPU), 1.0, 2.0),
    ):
        with pytest.raises(BadInput):
            call()


def test_arrays_are_created_by_rule() -> None:
    agree(ops.arange(5, **CPU), np.arange(5))
    agree(ops.arange(1, 2, 0.25, **CPU), np.arange(1, 2, 0.25, dtype=np.float32))
    agree(ops.arange(10, 0, -3, **CPU), np.arange(10, 0, -3))
    agree(ops.arange(3, 1, **CPU), np.arange(3, 1))
    agree(ops.eye(3, 4, k=1, **CPU), np.eye(3, 4, k=1, dtype=np.float32))
    agree(ops.full((2, 2), 7, **CPU), np.full((2, 2), 7))
    agree(ops.full(2, -1.5, dtype="float16", **CPU), np.full(2, -1.5, np.float16))
    agree(ops.full(2, float("inf"), dtype="float16", **CPU), np.full(2, np.inf, np.float16))
    agree(ops.ones(3, dtype="bool", **CPU), np.ones(3, bool))
    x = ops.zeros((2, 3), dtype="int16", **CPU)
    for make in (ops.zeros_like, ops.ones_like, ops.empty_like):
        assert (make(x).shape, make(x).dtype) == ((2, 3), "int16")
    assert ops.full_like(x, 4).tolist() == [[4] * 3] * 2
    with pytest.raises(BadInput):
        ops.arange(1, 2, 0, **CPU)


def test_random_arrays_are_the_same_everywhere_and_each_time(where: dict[str, str]) -> None:
    for make in (ops.random.uniform, ops.random.normal, ops.random.bits):
        mine = make((33, 5), seed=3, **CPU)
        assert np.array_equal(mine.numpy(), make((33, 5), seed=3, **where).numpy())
        assert not np.array_equal(mine.numpy(), make((33, 5), seed=4, **CPU).numpy())
        assert not np.array_equal(mine.numpy(), make((33, 5), seed=3, sequence=1, **CPU).numpy())
    found = ops.random.uniform(10_000, seed=1, low=-2.0, high=3.0, **where).numpy()
    assert -2 <= found.min() < -1.99 < 2.99 < found.max() <= 3
    found = ops.random.normal(10_000, seed=1, mean=5.0, std=0.5, dtype="float64", **CPU).numpy()
    assert abs(found.mean() - 5) < 0.02
    assert abs(found.std() - 0.5) < 0.02
    for call in (
        lambda: ops.random.uniform(3, seed=-1, **CPU),
        lambda: ops.random.uniform(3, seed=1.5, **CPU),
        lambda: ops.random.normal(3, seed=1, dtype="int32", **CPU),
    ):
        with pytest.raises(BadInput):
            call()


CHAIN: list[Callable[[Any], Any]] = [
    lambda x: ops.softmax(ops.tanh(x) @ x.mT, axis=0),
    lambda x: ops.sum(ops.where(x > 0, x, ops.exp(x)), axis=1, keepdims=True) / 3.0,
    lambda x: ops.max(x[::2, ::-1], axis=0) - ops.mean(x),
    lambda x: ops.log(ops.maximum(ops.abs(x), 0.1)) ** 2.0,
]


@pytest.mark.parametrize(
    "at", [0, *(pytest.param(n, marks=pytest.mark.soak) for n in range(1, len(CHAIN)))]
)
def test_the_same_operations_give_the_same_numbers_on_each_device(at: int) -> None:
    start = ops.random.normal((40, 24), seed=8, **CPU)
    found = [CHAIN[at](start.to(address)).numpy() for address in devices()]
    for each in found[1:]:
        assert np.allclose(each, found[0], rtol=1e-5, atol=1e-6)
    assert np.isfinite(found[0]).all()
