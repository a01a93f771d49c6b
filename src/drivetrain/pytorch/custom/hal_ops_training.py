"""Random numbers and the fused steps of optimizers."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from drivetrain.hal.kernels import optimizers, philox
from drivetrain.pytorch.custom.hal_ops_arrays import (
    Declined,
    floating,
    kind_of,
    new,
    pointer,
    run,
    serves,
    stream,
)
from drivetrain.pytorch.custom.hal_ops_elements import copied, pointwise

_drawing = threading.Lock()


def _seed(like: Tensor, generator: torch.Generator | None) -> int:
    """Of the next numbers, drawn from the generator: the caller's, else the device's."""
    from drivetrain.pytorch.custom.registration import registered  # which makes this table

    handle = registered()
    if generator is not None:
        drawn_from = generator
    elif handle is not None:
        drawn_from = handle._runtime.generators[like.device.index]
    else:
        drawn_from = torch.default_generator
    with _drawing:
        host = drawn_from
        if drawn_from.device.type != "cpu":  # with the C++ shim: its state is one of the CPU's
            host = torch.Generator("cpu")
            host.set_state(drawn_from.get_state())
        drawn = torch.empty((), dtype=torch.int64, device="cpu").random_(generator=host)
        if host is not drawn_from:
            drawn_from.set_state(host.get_state())
    return int(drawn.item())


def _drawn(x: Tensor, normal: bool, generator: torch.Generator | None) -> Tensor:
    """Numbers in [0, 1), or normal ones, of the tensor's shape and floating type."""
    floating(x)
    out = x if x.is_contiguous() else new(x, x.shape)
    if out.numel():
        word = philox.kind_of(kind_of(x.dtype), normal)
        philox.run(stream(x), pointer(out, out), word, out.numel(), _seed(x, generator))
    return out


def _stretched(x: Tensor, made: Tensor, low: float, by: float) -> Tensor:
    if (low, by) != (0.0, 1.0):
        return pointwise("add_scaled", (low, made, by), x.dtype, out=x)
    return x if made is x else copied(made, x)


@serves("uniform_")
def _uniform(x: Tensor, low: float = 0.0, high: float = 1.0, *, generator: Any = None) -> Tensor:
    return _stretched(x, _drawn(x, False, generator), low, high - low)


@serves("normal_")
def _normal(x: Tensor, mean: float = 0.0, std: float = 1.0, *, generator: Any = None) -> Tensor:
    if std < 0:
        raise RuntimeError(f"normal expects std >= 0.0, but found std {std}")
    return _stretched(x, _drawn(x, True, generator), mean, std)


def _coins(x: Tensor, chance: Any, generator: Any) -> Tensor:
    """Where uniform numbers lie below the chance, in ``x``."""
    numbers = new(x, x.shape, torch.float32)
    if not x.numel():
        return x
    _drawn(numbers, False, generator)
    return pointwise("less", (numbers, chance), torch.float32, out=x)


@serves("bernoulli_.float")
def _bernoulli(x: Tensor, p: float = 0.5, *, generator: Any = None) -> Tensor:
    if not 0 <= p <= 1:
        raise RuntimeError(f"bernoulli_ expects p to be in [0, 1], but got p={p}")
    return _coins(x, p, generator)


@serves("bernoulli_.Tensor")
def _bernoulli_each(x: Tensor, p: Tensor, *, generator: Any = None) -> Tensor:
    return _coins(x, p.expand(x.shape), generator)


@serves("bernoulli")
def _bernoulli_of(p: Tensor, *, generator: Any = None) -> Tensor:
    floating(p)
    return _coins(new(p, p.shape), p, generator)


@serves("native_dropout")
def _dropout(x: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    floating(x)
    kept = new(x, x.shape, torch.bool)
    if train is False or p == 0:
        return x.clone(), kept.fill_(True)
    _coins(kept, 1 - p, None)
    return _dropped(x, kept, 0.0 if p == 1 else 1 / (1 - p)), kept


@serves("native_dropout_backward")
def _dropped(x: Tensor, kept: Tensor, scale: float) -> Tensor:
    return pointwise("addcmul", (0.0, x, kept, scale), x.dtype)


# -- optimizers ------------------------------------------------------------------------------------


def _alone(*scales: Any) -> None:
    """Raises Declined where a scaler's factors come along: torch's own kernels take them."""
    if any(each is not None for each in scales):
        raise Declined


def _lined(*lists: Sequence[Tensor]) -> None:
    """Raises Declined for tensors with gaps or of several types."""
    for group in zip(*(each for each in lists if each), strict=True):
        floating(*group)
        if not all(each.is_contiguous() and each.dtype == group[0].dtype for each in group):
            raise Declined


@serves("_fused_sgd_")
def _sgd(
    weights: Any,
    slopes: Any,
    momenta: Any,
    *,
    weight_decay: float,
    momentum: float,
    lr: float,
    dampening: float,
    nesterov: bool,
    maximize: bool,
    is_first_step: bool,
    grad_scale: Any = None,
    found_inf: Any = None,
) -> None:
    _alone(grad_scale, found_inf)
    _lined(weights, slopes, momenta)
    flags = nesterov * optimizers.NESTEROV + is_first_step * optimizers.FIRST
    flags += maximize * optimizers.MAXIMIZE
    for at, weight in enumerate(weights):
        if not weight.numel():
            continue
        kind, rule = kind_of(weight.dtype), optimizers.rule(weight.numel())
        factors = optimizers.sgd_factors(kind, lr, momentum, dampening, weight_decay)
        held = momenta[at] if momenta else weight
        values = (weight, slopes[at], held, flags, factors, weight.numel())
        run("sgd", optimizers.source, weight, rule, *values)


def _adam(flags: int) -> Any:
    def step(
        weights: Any,
        slopes: Any,
        firsts: Any,
        seconds: Any,
        largest: Any,
        steps: Any,
        *,
        lr: float,
        beta1: float,
        beta2: float,
        weight_decay: float,
        eps: float,
        amsgrad: bool,
        maximize: bool,
        grad_scale: Any = None,
        found_inf: Any = None,
    ) -> None:
        _alone(grad_scale, found_inf)
        _lined(weights, slopes, firsts, seconds, largest)
        now = flags + maximize * optimizers.MAXIMIZE + amsgrad * optimizers.LARGEST
        for at, weight in enumerate(weights):
            if not weight.numel():
                continue
            kind, rule = kind_of(weight.dtype), optimizers.rule(weight.numel())
            factors = optimizers.adam_factors(
                kind, lr, (beta1, beta2), weight_decay, eps, float(steps[at].item())
            )
            most = largest[at] if amsgrad else weight
            run(
                "adam", optimizers.source, weight, rule,
                weight, slopes[at], firsts[at], seconds[at], most, now, factors, weight.numel(),
            )  # fmt: skip

    return step


serves("_fused_adam_")(_adam(0))
serves("_fused_adamw_")(_adam(optimizers.DECOUPLED))
