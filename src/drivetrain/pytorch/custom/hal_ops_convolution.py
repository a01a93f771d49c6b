"""Convolution, plain and transposed, as matrix products over windows; forward and backward."""

from __future__ import annotations

from math import prod
from typing import Any

from torch import Tensor

from drivetrain.hal import product, strided
from drivetrain.hal.array import Array
from drivetrain.hal.kernels import unfold
from drivetrain.hal.kernels.unfold import Windows
from drivetrain.pytorch.custom.hal_ops_arrays import (
    Declined,
    array,
    floating,
    new,
    run,
    serves,
    shaped,
)
from drivetrain.pytorch.custom.hal_ops_elements import pointwise
from drivetrain.pytorch.custom.hal_ops_sums import reduced

MOST_BYTES = 256 << 20
"""Of the windows of a convolution that are laid out at once."""


def pair(value: Any) -> tuple[int, int]:
    """(down, across) of a number, or of one or two."""
    given = [value] if isinstance(value, int) else list(value)
    return (given[0], given[0]) if len(given) == 1 else (given[0], given[1])


class _Convolution:
    """``narrow`` (images, channels, places) times the weights gives, or comes from, ``wide``
    (images, channels, rows, columns): a convolution goes from wide to narrow, a transposed one, and
    a gradient, the other way."""

    def __init__(
        self, wide: Any, narrow: Any, weight: Tensor, form: tuple[Any, Any, Any], groups: int
    ) -> None:
        stride, padding, dilation = (pair(each) for each in form)
        self.weight, self.groups = weight.contiguous(), groups
        self.images, self.wide, self.narrow = wide[0], tuple(wide[1:]), tuple(narrow[1:])
        window = (weight.shape[2], weight.shape[3])
        self.form = (self.wide[1:], window, stride, padding, dilation)
        self.places = self.narrow[1] * self.narrow[2]
        self.rows = self.wide[0] // groups * window[0] * window[1]
        self.outs = self.narrow[0] // groups
        plain = stride == (1, 1) and padding == (0, 0) and window == (1, 1)
        self.direct = plain
        each = self.rows * groups * self.places * weight.element_size()
        each = max(each, self.weight.numel() * weight.element_size())
        self.step = max(1, MOST_BYTES // max(each, 1))

    def parts(self) -> list[tuple[int, int]]:
        """The images from and to that are done at once."""
        return [(at, min(at + self.step, self.images)) for at in range(0, self.images, self.step)]

    def _windows(self, count: int) -> Windows:
        found = Windows(count * self.wide[0], *self.form)
        assert found.places == self.narrow[1:], (found.places, self.narrow)
        return found

    def _weights(self) -> Array:
        return shaped(self.weight, self.groups, self.outs, self.rows)

    def narrows(self, x: Tensor, start: int, stop: int) -> Array:
        """Images of a narrow tensor as (images, groups, channels, places)."""
        shape = (x.shape[0], self.groups, self.outs, self.places)
        return shaped(x, *shape)[start:stop]

    def columns(self, x: Tensor, start: int, stop: int) -> tuple[Array, Tensor]:
        """Images of a wide tensor as (images, groups, rows, places), and what holds them."""
        count = stop - start
        if self.direct:
            shape = (x.shape[0], self.groups, self.rows, self.places)
            return shaped(x, *shape)[start:stop], x
        made = new(x, (count, self.groups, self.rows, self.places))
        windows = self._windows(count)
        packed = windows.packed(start * prod(self.wide))
        run("unfold", unfold.source, x, unfold.rule(made.numel()), made, x, packed)
        return array(made), made

    def to_narrow(self, wide: Tensor) -> Tensor:
        out = new(wide, (self.images, *self.narrow))
        for start, stop in self.parts():
            columns, _held = self.columns(wide, start, stop)
            product.multiply(self.narrows(out, start, stop), self._weights(), columns)
        return out

    def to_wide(self, narrow: Tensor) -> Tensor:
        out = new(narrow, (self.images, *self.wide))
        for start, stop in self.parts():
            count = stop - start
            if self.direct:
                columns = self.columns(out, start, stop)[0]
            else:
                made = new(narrow, (count, self.groups, self.rows, self.places))
                columns = array(made)
            product.multiply(columns, self._weights().mT, self.narrows(narrow, start, stop))
            if not self.direct:
                packed = self._windows(count).packed(start * prod(self.wide))
                rule = unfold.rule(count * prod(self.wide))
                run("fold", unfold.source, out, rule, out, made, packed)
        return out

    def weight_slope(self, narrow: Tensor, wide: Tensor) -> Tensor:
        out: Tensor | None = None
        for start, stop in self.parts():
            columns, _held = self.columns(wide, start, stop)
            each = new(narrow, (stop - start, *self.weight.shape))
            shape = (stop - start, self.groups, self.outs, self.rows)
            product.multiply(shaped(each, *shape), self.narrows(narrow, start, stop), columns.mT)
            total = reduced("sum", each, 0)
            out = total if out is None else pointwise("add", (out, total), out=out)
        assert out is not None
        return out


def _planar(*tensors: Tensor) -> list[Tensor]:
    """One-dimensional images as those of one row."""
    return [each.unsqueeze(2) if each.dim() == 3 else each for each in tensors]


def _forms(x: Tensor, *values: Any) -> list[tuple[int, int]]:
    found = []
    for each, rest in zip(values, (1, 0, 1, 0), strict=False):
        given = list(each)
        found.append((rest, given[0]) if x.dim() == 3 else pair(given))
    return found


@serves("convolution_overrideable")
def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Tensor:
    floating(x, weight, bias)
    if x.dim() not in (3, 4) or x.dtype != weight.dtype:
        raise Declined
    flat = x.dim() == 3
    stride, padding, dilation, extra = _forms(x, stride, padding, dilation, output_padding)
    x, weight = _planar(x, weight)
    x = x.contiguous()
    sizes = []
    for at in (0, 1):
        reach = dilation[at] * (weight.shape[2 + at] - 1) + 1
        if transposed:
            size = (x.shape[2 + at] - 1) * stride[at] - 2 * padding[at] + reach + extra[at]
        else:
            size = (x.shape[2 + at] + 2 * padding[at] - reach) // stride[at] + 1
        sizes.append(size)
    if min(*sizes, *x.shape[1:]) <= 0:
        raise Declined
    channels = weight.shape[1] * groups if transposed else weight.shape[0]
    shape = (x.shape[0], channels, *sizes)
    if not x.shape[0]:
        return new(x, shape)[:, :, 0] if flat else new(x, shape)
    wide, narrow = (shape, x.shape) if transposed else (x.shape, shape)
    layer = _Convolution(wide, narrow, weight, (stride, padding, dilation), groups)
    out = layer.to_wide(x) if transposed else layer.to_narrow(x)
    if bias is not None:
        _add_bias(out, bias)
    return out.squeeze(2) if flat else out


def _add_bias(out: Tensor, bias: Tensor) -> None:
    whole = array(out)
    each = shaped(bias.contiguous(), bias.shape[0], 1, 1)
    strided.elementwise("add", (whole, each), whole.dtype, whole.dtype, whole.stream, whole)


@serves("convolution_backward_overrideable")
def _convolution_backward(
    slope: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    mask: Any,
) -> tuple[Tensor | None, ...]:
    floating(slope, x, weight)
    if x.dim() not in (3, 4) or not x.numel() or not slope.numel():
        raise Declined
    flat = x.dim() == 3
    form = _forms(x, stride, padding, dilation)
    slope, x, weight = (each.contiguous() for each in _planar(slope, x, weight))
    wide, narrow = (slope, x) if transposed else (x, slope)
    layer = _Convolution(wide.shape, narrow.shape, weight, (form[0], form[1], form[2]), groups)
    found: list[Tensor | None] = [None, None, None]
    if mask[0]:
        found[0] = layer.to_narrow(slope) if transposed else layer.to_wide(slope)
    if mask[1]:
        found[1] = layer.weight_slope(narrow, wide)
    if mask[2]:
        found[2] = reduced("sum", slope, (0, 2, 3))
    if flat:
        found[:2] = [None if each is None else each.squeeze(2) for each in found[:2]]
    return tuple(found)
