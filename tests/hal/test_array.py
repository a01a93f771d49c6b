"""Arrays: views share, writes are ordered, elements come and go unharmed."""

from __future__ import annotations

import array as arrays
from math import prod
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drivetrain import hal
from drivetrain.errors import BadInput, Unsupported
from drivetrain.hal import ops

np = pytest.importorskip("numpy")
pytest.importorskip("tree_sitter_cuda")

TYPES = (
    "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64".split()  # noqa: SIM905
)
CPU = {"device": "cpu:0"}


def numbers(dtype: str, shape: Any, seed: int = 0) -> Any:
    random = np.random.default_rng(seed)
    if dtype == "bool":
        return random.integers(0, 2, shape).astype(bool)
    if dtype.startswith("float"):
        return random.standard_normal(shape).astype(dtype)
    kind = np.iinfo(dtype)
    return random.integers(kind.min, kind.max, shape, dtype=dtype, endpoint=True)


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> hal.Device:
    from drivetrain.hal import registry

    monkeypatch.setenv("DRIVETRAIN_SIMULATED", "count=1")
    registry.refresh()
    return hal.device("simulated:0")


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0, 3), (2, 1, 4)])
def test_numpys_arrays_come_back_as_they_went(dtype: str, shape: tuple[int, ...]) -> None:
    wanted = numbers(dtype, shape)
    found = ops.asarray(wanted, **CPU)
    assert (found.dtype, found.shape, found.nbytes) == (dtype, shape, wanted.nbytes)
    back = found.numpy()
    assert back.dtype == wanted.dtype
    assert np.array_equal(back, wanted)
    assert np.array_equal(np.asarray(found.tolist(), wanted.dtype).reshape(shape), wanted)


def test_memory_of_the_host_is_copied_whatever_its_strides() -> None:
    source = np.arange(24, dtype=np.int32).reshape(4, 6)
    found = ops.asarray(source[::2, ::-2].T, **CPU)
    source[:] = 0
    assert found.tolist() == [[5, 17], [3, 15], [1, 13]]
    assert ops.asarray(arrays.array("d", [1, 2]), **CPU).dtype == "float64"
    assert ops.asarray(b"\x01\x02", **CPU).dtype == "uint8"
    with pytest.raises(BadInput, match="format"):
        ops.asarray(np.zeros(2, ">f4"), **CPU)
    with pytest.raises(BadInput, match="from_dlpack shares"):
        ops.asarray(source, copy=False, **CPU)


def test_numbers_in_lists_make_arrays_of_the_default_types() -> None:
    assert ops.asarray([[1, 2], [3, 4]], **CPU).dtype == "int64"
    assert ops.asarray([1, 2.5], **CPU).dtype == "float32"
    assert ops.asarray([True, False], **CPU).dtype == "bool"
    assert ops.asarray([], **CPU).shape == (0,)
    assert ops.asarray(3, **CPU).shape == ()
    assert ops.asarray([300, -1], dtype="float16", **CPU).tolist() == [300, -1]
    assert ops.asarray([1e300], **CPU).tolist() == [float("inf")]
    for wrong in ([[1], [2, 3]], [[1], 2], ["a"], [True, 1], [object()]):
        with pytest.raises(BadInput):
            ops.asarray(wrong, **CPU)
    with pytest.raises(BadInput, match="does not lie in"):
        ops.asarray([300], dtype="int8", **CPU)


KEY = st.one_of(st.integers(0, 1), st.slices(4), st.none(), st.just(Ellipsis))


@settings(max_examples=60)
@given(st.lists(KEY, max_size=4).map(tuple), st.permutations(range(3)))
def test_views_are_views_of_the_same_memory(key: Any, order: list[int]) -> None:
    wanted = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    found = ops.asarray(wanted, **CPU)
    try:
        there = wanted.transpose(order)[key]
    except IndexError:
        with pytest.raises((IndexError, BadInput)):
            ops.permute_dims(found, order)[key]
        return
    view = ops.permute_dims(found, order)[key]
    assert view.memory is found.memory
    assert view.shape == there.shape
    assert np.array_equal(view.numpy(), there)


@pytest.mark.parametrize(
    "key", [0, (slice(None), 1), (slice(None, None, -2), slice(1, 3)), ..., (1, 2)]
)
def test_what_is_written_to_a_view_is_in_the_array(key: Any) -> None:
    wanted = np.arange(12, dtype=np.float32).reshape(3, 4)
    found = ops.asarray(wanted, **CPU)
    found[key] = 7
    wanted[key] = 7
    assert np.array_equal(found.numpy(), wanted)
    fresh = np.asarray(numbers("float32", wanted[key].shape))
    found[key] = ops.asarray(fresh, **CPU)
    wanted[key] = fresh
    assert np.array_equal(found.numpy(), wanted)


def test_a_write_that_reads_its_own_memory_reads_it_first() -> None:
    wanted = np.arange(1000, dtype=np.int32)
    found = ops.asarray(wanted, **CPU)
    found[1:] = found[:-1]
    wanted[1:] = wanted[:-1].copy()
    assert np.array_equal(found.numpy(), wanted)
    found[:] = found[::-1]
    assert np.array_equal(found.numpy(), wanted[::-1])
    square = np.arange(16, dtype=np.float32).reshape(4, 4)
    matrix = ops.asarray(square, **CPU)
    matrix[...] = matrix.T
    assert np.array_equal(matrix.numpy(), square.T)
    matrix += matrix.T
    assert np.array_equal(matrix.numpy(), square.T + square)


def test_operators_in_place_write_in_place_and_keep_type_and_shape() -> None:
    found = ops.asarray(np.ones((2, 3), np.float32), **CPU)
    alias, row = found, found[0]
    found += 2
    found *= ops.asarray(np.array([1, 2, 3], np.float32), **CPU)
    assert found is alias
    assert row.tolist() == [3, 6, 9]
    with pytest.raises(BadInput, match="shape"):
        row += found
    with pytest.raises(BadInput, match="astype"):
        row += ops.ones(3, dtype="float64", **CPU)
    with pytest.raises(BadInput, match="repeats"):
        ops.broadcast_to(row, (2, 3))[...] = 1


def test_an_array_has_the_standards_attributes() -> None:
    found = ops.zeros((2, 3, 4), **CPU)
    assert (found.ndim, found.size, found.shape) == (3, 24, (2, 3, 4))
    assert found.mT.shape == (2, 4, 3)
    assert found[0].T.shape == (4, 3)
    assert found.device == hal.device("cpu:0")
    assert found.__array_namespace__() is ops
    assert found.__array_namespace__(api_version="2023.12") is ops
    for call in (
        lambda: found.T,
        lambda: found[0, 0].mT,
        lambda: found.__array_namespace__(api_version="1999"),
    ):
        with pytest.raises(BadInput):
            call()
    assert repr(ops.asarray([1, 2], **CPU)) == "Array([1, 2], dtype=int64, device='cpu:0')"
    assert "shape=(100, 100)" in repr(ops.zeros((100, 100), **CPU))
    with pytest.raises(TypeError):
        hash(found)


def test_arrays_of_no_dimensions_are_numbers() -> None:
    assert float(ops.asarray(2.5, **CPU)) == 2.5
    assert int(ops.asarray(7, **CPU)) == 7
    assert [10, 20, 30][ops.asarray(1, **CPU)] == 20
    assert bool(ops.asarray([0, 5], **CPU)[1])
    assert ops.asarray([[4]], **CPU).item() == 4
    for call in (
        lambda: bool(ops.zeros(2, **CPU)),
        lambda: float(ops.zeros((1,), **CPU)),
        lambda: range(ops.asarray(1.0, **CPU)),
        lambda: ops.zeros(2, **CPU).item(),
    ):
        with pytest.raises(BadInput):
            call()


def test_numpy_does_not_take_over_an_operator() -> None:
    found = ops.ones(2, **CPU)
    with pytest.raises(TypeError):
        np.ones(2) + found
    with pytest.raises(TypeError):
        found + np.ones(2)
    assert np.asarray(found).tolist() == [1, 1]
    assert (found == "x") is False


# -- others' memory --------------------------------------------------------------------------------


def test_numpy_and_arrays_share_memory_through_dlpack() -> None:
    source = np.arange(12, dtype=np.float32).reshape(3, 4)
    found = ops.from_dlpack(source[:, ::-1].T)
    assert found.shape == (4, 3)
    assert np.array_equal(found.numpy(), source[:, ::-1].T)
    source[0, 3] = 99
    assert found.tolist()[0][0] == 99
    found[...] = found * 2
    assert found.stream.synchronize() is None
    assert source[0, 3] == 198
    back = np.from_dlpack(found[1:, ::2])
    assert np.array_equal(back, found.numpy()[1:, ::2])
    del found
    assert back[0, 0] == source[0, 2]


def test_torch_and_arrays_share_memory_through_dlpack() -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    found = ops.from_dlpack(tensor)
    found += 1
    found.stream.synchronize()
    assert tensor.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert torch.from_dlpack(found.T).tolist() == tensor.T.tolist()
    halves = ops.asarray([1.5, -2.0], dtype="bfloat16", **CPU)
    assert torch.from_dlpack(halves).dtype == torch.bfloat16
    assert torch.from_dlpack(halves).tolist() == halves.tolist() == [1.5, -2.0]
    with pytest.raises(BadInput, match="numpy has no bfloat16"):
        halves.numpy()


def test_a_tensor_may_be_written_as_soon_as_it_was_copied() -> None:
    torch = pytest.importorskip("torch")
    busy = ops.random.normal((1 << 20,), seed=1, **CPU)
    for number in range(20):
        tensor = torch.full((2, 3), float(number))
        busy = busy + 1  # what keeps the stream from the copy
        copied = ops.asarray(tensor, **CPU)
        tensor.zero_()
        assert copied.tolist() == [[number] * 3] * 2


def test_what_is_exported_is_done() -> None:
    found = ops.random.normal((1000, 100), seed=1, **CPU)
    for _ in range(5):
        found = found + 1
    assert np.array_equal(np.from_dlpack(found), found.numpy())
    copied = np.from_dlpack(found, copy=True)
    found += 1
    found.stream.synchronize()
    assert not np.array_equal(copied, found.numpy())


# -- streams and devices ---------------------------------------------------------------------------


def test_results_have_the_stream_that_was_named_else_the_first_operands(
    simulated: hal.Device,
) -> None:
    device = hal.device("cpu:0")
    one, two = device.stream(), device.stream()
    a, b = ops.ones(4, stream=one), ops.ones(4, stream=two)
    assert (a + b).stream is one
    assert (b + a).stream is two
    assert ops.add(a, b, stream=two).stream is two
    assert ops.sum(a, stream=two).stream is two
    assert ops.zeros(3, **CPU).stream is ops.default_stream("cpu:0")
    with pytest.raises(BadInput, match="asked was"):
        ops.zeros(3, device="cpu:0", stream=simulated.stream())


def test_work_on_another_stream_comes_after_what_it_reads_and_before_what_overwrites_it() -> None:
    device = hal.device("cpu:0")
    one, two = device.stream(), device.stream()
    big = ops.full(1 << 20, 1.0, stream=one)
    for round in range(10):
        there = ops.add(big, 0.0, stream=two)  # reads what one wrote
        big += 1.0  # on one, while two may still read
        assert there.numpy().min() == there.numpy().max() == round + 1
    ops.add(big, big, stream=two)
    big.assign(0.0, stream=two)
    assert ops.max(big, stream=one).item() == 0


def test_an_array_outlives_its_stream() -> None:
    stream = hal.device("cpu:0").stream()
    found = ops.arange(5, stream=stream)
    stream.close()
    assert found.tolist() == [0, 1, 2, 3, 4]
    assert (found + 1).tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("dtype", TYPES)
def test_arrays_move_between_devices(simulated: hal.Device, dtype: str) -> None:
    wanted = numbers(dtype, (7, 9))
    found = ops.asarray(wanted, **CPU)
    there = found[::2, ::-1].to(simulated)
    assert there.device == simulated
    assert np.array_equal(there.numpy(), wanted[::2, ::-1])
    back = there.to("cpu:0")
    assert back.device == found.device
    assert np.array_equal(back.numpy(), wanted[::2, ::-1])


def test_a_stream_of_either_device_orders_a_move(simulated: hal.Device) -> None:
    ours, theirs = hal.device("cpu:0").stream(), simulated.stream()
    found = ops.arange(1000, stream=ours)
    assert found.to(simulated, stream=theirs).stream is theirs
    moved = (found + 1).to(simulated, stream=ours)
    assert moved.device == simulated
    assert moved.tolist()[-1] == 1000
    assert found.to("cpu:0") is found
    assert found.to_device("cpu:0", stream=ours) is found
    with pytest.raises(BadInput, match="the stream is on"):
        found.to("cpu:0", stream=theirs)


def test_arrays_of_two_devices_do_not_mix(simulated: hal.Device) -> None:
    a, b = ops.ones(2, **CPU), ops.ones(2, device=simulated)
    for call in (
        lambda: a + b,
        lambda: ops.matmul(a, b),
        lambda: ops.add(a, 1, stream=b.stream),
        lambda: a.assign(b),
    ):
        with pytest.raises(BadInput, match="to\\(device\\)"):
            call()


def test_bad_shapes_and_closed_devices_are_told() -> None:
    for shape in (-1, (2, -3), "ab", 1.5):
        with pytest.raises(BadInput):
            ops.zeros(shape, **CPU)
    with pytest.raises(MemoryError):
        ops.empty(1 << 45, **CPU)
    assert prod(ops.empty((3, 0, 2), **CPU).shape) == 0


def test_operations_leave_nothing_behind() -> None:
    from drivetrain.hal.opened import opened

    device = hal.device("cpu:0")
    other = device.stream()
    x = ops.random.normal((16, 16), seed=1, **CPU)
    pool = opened(device).pool(hal.MemoryKind.DEVICE)
    assert isinstance(pool, hal.Pool)

    def cycle() -> None:
        y = ops.softmax(x @ x.T + 1.0)
        y += ops.sum(y, axis=0, stream=other)
        y[::2].numpy()

    cycle()
    live = pool.stats().live
    for _ in range(50):
        cycle()
    assert pool.stats().live == live


def test_without_numpy_arrays_have_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "numpy", None)
    found = ops.asarray([[1.0, 2.0]], **CPU) + 1
    assert found.tolist() == [[2.0, 3.0]]
    with pytest.raises(Unsupported, match="pip install"):
        found.numpy()
