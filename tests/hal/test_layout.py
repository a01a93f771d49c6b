"""Shapes and strides, against numpy's own."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivetrain.errors import BadInput
from drivetrain.hal import layout

np = pytest.importorskip("numpy")

SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)


def steps(array: Any) -> tuple[int, ...]:
    return tuple(s // array.itemsize for s in array.strides)


@st.composite
def views(draw: st.DrawFn) -> Any:
    """An array of int64 that counts its elements, sliced, transposed and broadcast."""
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple))
    base = np.arange(prod(shape)).reshape(shape)
    key = tuple(
        slice(draw(st.integers(0, n - 1)), None, draw(st.sampled_from((1, 2, 3)))) for n in shape
    )
    view = base[key]
    if draw(st.booleans()):
        view = view[tuple(slice(None, None, draw(st.sampled_from((1, -1)))) for _ in shape)]
    view = view.transpose(draw(st.permutations(range(view.ndim))))
    if draw(st.booleans()):
        view = np.broadcast_to(view, (draw(st.integers(1, 3)), *view.shape))
    return base, view


def read(base: Any, offset: int, shape: Any, strides: Any) -> Any:
    """What a walk from an offset over the elements of ``base`` finds, one by one."""
    flat = base.reshape(-1)
    found = np.empty(shape, base.dtype)
    for index in np.ndindex(*shape):
        found[index] = flat[offset + sum(i * s for i, s in zip(index, strides, strict=True))]
    return found


def offset_of(base: Any, view: Any) -> int:
    start = view.__array_interface__["data"][0] - base.__array_interface__["data"][0]
    return int(start // base.itemsize)


@given(views())
def test_joined_dimensions_walk_the_same_way(pair: Any) -> None:
    base, view = pair
    extents, (strides,) = layout.joined(view.shape, steps(view))
    assert prod(extents) == view.size
    assert len(extents) <= view.ndim
    found = read(base, offset_of(base, view), extents, strides)
    assert np.array_equal(found.reshape(-1), view.reshape(-1))
    padded, (more,) = layout.padded(extents, [strides], layout.rank_class(len(extents), 1))
    assert prod(padded) == view.size
    assert len(more) == len(padded)


def test_an_array_without_gaps_is_one_dimension_and_a_transposed_one_is_two() -> None:
    assert layout.joined((2, 3, 4), (12, 4, 1)) == ((24,), [(1,)])
    assert layout.joined((2, 3), (1, 2)) == ((2, 3), [(1, 2)])
    assert layout.joined((2, 3), (3, 1), (0, 1)) == ((2, 3), [(3, 1), (0, 1)])
    assert layout.joined((1, 1), (7, 9)) == ((), [()])


@given(views(), st.data())
def test_a_reshape_without_a_copy_finds_the_same_elements(pair: Any, data: st.DataObject) -> None:
    base, view = pair
    factors = [f for f in (2, 3, 5) for _ in range(4) if view.size % f == 0]
    to, left = [], view.size
    for f in factors:
        if left % f == 0 and data.draw(st.booleans()):
            to.append(f)
            left //= f
    shape = tuple(data.draw(st.permutations([*to, left])))
    strides = layout.reshaped(view.shape, steps(view), shape)
    if strides is None:
        assert not view.flags.c_contiguous
    else:
        found = read(base, offset_of(base, view), shape, strides)
        assert np.array_equal(found, view.reshape(shape))


@given(st.lists(SHAPES, min_size=1, max_size=3))
def test_shapes_broadcast_as_numpys(shapes: list[tuple[int, ...]]) -> None:
    try:
        wanted: Any = np.broadcast_shapes(*shapes)
    except ValueError:
        with pytest.raises(BadInput, match="do not broadcast"):
            layout.broadcast(*shapes)
        return
    assert layout.broadcast(*shapes) == wanted
    for shape in shapes:
        array = np.zeros(shape)
        strides = layout.stretched(shape, layout.compact(shape), wanted)
        there = steps(np.broadcast_to(array, wanted))
        for extent, mine, theirs in zip(wanted, strides, there, strict=True):
            assert mine == theirs or extent < 2 or 0 in shape


KEYS = st.one_of(
    st.integers(-4, 3),
    st.slices(4),
    st.none(),
    st.just(Ellipsis),
)


@given(SHAPES, st.lists(KEYS, max_size=5).map(tuple))
def test_indices_pick_what_numpys_pick(shape: tuple[int, ...], key: Any) -> None:
    base = np.arange(prod(shape)).reshape(shape)
    try:
        wanted = base[key]
    except IndexError:
        with pytest.raises((IndexError, BadInput)):
            layout.indexed(shape, layout.compact(shape), key)
        return
    offset, extents, strides = layout.indexed(shape, layout.compact(shape), key)
    assert extents == wanted.shape
    assert np.array_equal(read(base, offset, extents, strides), wanted)


@pytest.mark.parametrize("key", [True, 1.0, "a", [0, 1], (0, [1])])
def test_other_indices_are_refused(key: Any) -> None:
    with pytest.raises(BadInput, match="take"):
        layout.indexed((3, 3), (3, 1), key)


def test_a_hole_in_a_shape_is_worked_out_or_refused() -> None:
    assert layout.reshape_to((2, 6), (3, -1)) == (3, 4)
    assert layout.reshape_to((0, 3), (-1, 3)) == (0, 3)
    for to in ((-1, -1), (5, -1), (7,), (-2, 6), (0, -1)):
        with pytest.raises(BadInput):
            layout.reshape_to((2, 6), to)


@given(views())
def test_the_span_is_what_the_elements_cover(pair: Any) -> None:
    base, view = pair
    low, high = layout.span(view.shape, steps(view))
    at = view.reshape(-1) - offset_of(base, view)
    assert (low, high) == (at.min(), at.max())
    assert layout.span((3, 0), (1, 1)) == (0, -1)


def test_axes_are_counted_from_the_end_and_named_once() -> None:
    assert layout.axes_of(None, 3, "sum") == (0, 1, 2)
    assert layout.axes_of((-1, 0), 3, "sum") == (0, 2)
    for axis in (3, -4, (0, 0), (0, -3), "x"):
        with pytest.raises(BadInput):
            layout.axes_of(axis, 3, "sum")
