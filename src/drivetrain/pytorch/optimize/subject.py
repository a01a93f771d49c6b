"""What is optimised: the model, its inputs, what one measured call is, and the reference."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from drivetrain.errors import BadInput
from drivetrain.pytorch.optimize import flags, transforms
from drivetrain.pytorch.optimize.capabilities import Facts
from drivetrain.pytorch.optimize.wrapped import Tuned
from drivetrain.pytorch.place import place, place_batch

__all__ = ["Arguments", "Subject"]

NOISE = 1e-4
"""Two runs of one model may differ by this: sums on a GPU are added in no fixed order."""
GRADIENTS = 10.0
"""Gradients may be this many times the tolerance away: rounding adds up over the layers."""


@dataclass(frozen=True)
class Arguments:
    """The arguments of one call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @staticmethod
    def of(given: Any) -> Arguments:
        """A tensor is one argument, a tuple or list several, a mapping those with names."""
        if isinstance(given, Mapping):
            return Arguments((), dict(given))
        if isinstance(given, (tuple, list)):
            return Arguments(tuple(given), {})
        return Arguments((given,), {})

    def call(self, model: Callable[..., Any]) -> Any:
        return model(*self.args, **self.kwargs)

    def tensors(self) -> list[Tensor]:
        leaves = tree_leaves((self.args, self.kwargs))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def changed(self, change: Callable[[Tensor], Tensor]) -> Arguments:
        return Arguments(*tree_map_only(Tensor, change, (self.args, self.kwargs)))


@dataclass(frozen=True)
class Answer:
    """What a model answers: results as float32 or as they are, and gradients by parameter."""

    results: tuple[Tensor, ...]
    gradients: dict[str, Tensor]


class Subject:
    """The model on the device, never changed, and everything a step's gate may ask.

    Raises BadInput where the model does not run, or gives no tensors.
    """

    def __init__(
        self,
        model: nn.Module,
        facts: Facts,
        inputs: Arguments,
        optimizer: Optimizer | None,
        loss: Callable[[Any], Tensor] | None,
        objective: str = "latency",
    ) -> None:
        self.facts = facts
        self.device = facts.device
        self.training = model.training
        self.objective = objective
        self._source = model, optimizer
        self.loss = loss or _mean_square
        self.model, self.optimizer = self.copy()
        self._source = self.model, self.optimizer  # copied on the device from here on
        floating = {t.dtype for t in _tensors(self.model) if t.is_floating_point()}
        self.float32 = floating <= {torch.float32}
        self.output_dtype = torch.float32 if self.float32 else None
        args, kwargs = place_batch((inputs.args, inputs.kwargs), self.device)
        self.inputs = Arguments(args, kwargs)
        if not self.inputs.tensors():
            raise BadInput("example_inputs has no tensor; give the arguments of one call")
        self.checks = (self.inputs, *_perturbed(self.inputs))
        self._look()
        self.references = self._references()
        self.own_error = self.error(self.model)
        """Of the model as it is; not 0 where it is no float32 model, or TF32 is on."""

    def copy(self) -> tuple[nn.Module, Optimizer | None]:
        """A copy of the model on the device, and of the optimizer that steps it."""
        try:
            model, optimizer = copy.deepcopy(self._source)
        except Exception as error:
            raise BadInput(
                f"the model cannot be copied ({type(error).__name__}: {error}); optimise it before "
                "it is compiled or wrapped"
            ) from error
        place(model, self.device)
        if optimizer is not None:
            place(optimizer, self.device)
        return model, optimizer

    # -- what the gates ask ---------------------------------------------------------------------

    def _look(self) -> None:
        """One call of the model, watched."""
        parts = list(self.model.modules())
        self.convolutions = any(isinstance(part, (nn.Conv2d, nn.ConvTranspose2d)) for part in parts)
        self.linears = any(isinstance(part, nn.Linear) for part in parts)
        offered = [tuple(getattr(part, "routings", ())) for part in parts]
        now = {getattr(part, "routing", None) for part in parts}
        self.routings = tuple(dict.fromkeys(h for o in offered for h in o if {h} != now - {None}))
        operators, direct = _Operators(), _Direct()
        with _rehearsed(self.model), torch.no_grad():
            try:
                with operators:
                    found = self.inputs.call(self.model)
            except Exception as error:
                raise BadInput(
                    f"the model does not run on {self.device} with example_inputs: "
                    f"{type(error).__name__}: {str(error)[:400]}"
                ) from error
            if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(found)):
                raise BadInput(f"the model returned no tensor but a {type(found).__name__}")
            self.attention = operators.attention
            self.convolved = operators.convolved
            """The share of a call's floating-point operations that are convolutions' (0 to 1)."""
            if self.attention:
                with direct:
                    self.inputs.call(self.model)
            self.direct_attention = direct.seen
            self.foldable = (
                ()
                if self.training
                else transforms.foldable(self.model, lambda module: self.inputs.call(module))
            )

    # -- one measured call ----------------------------------------------------------------------

    def workload(self, model: nn.Module, optimizer: Optimizer | None) -> Callable[[], None]:
        """What is measured: a call, or in training a whole step."""
        call = self.inputs.call
        if not self.training:

            def forward() -> None:
                with torch.no_grad():
                    call(model)

            return forward

        def step() -> None:
            backward(self.loss(call(model)))
            if optimizer is None:
                for parameter in model.parameters():
                    parameter.grad = None
            else:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

        return step

    # -- correctness ----------------------------------------------------------------------------

    def _references(self) -> tuple[Answer, ...]:
        reference = copy.deepcopy(self.model).float()
        down = [c.changed(lambda t: t.float() if t.is_floating_point() else t) for c in self.checks]
        with flags.tf32(False):
            self.stochastic = False
            if self.training:
                first, second = (self._answer(reference, down[0], seed) for seed in (0, 1))
                self.stochastic = _distance(first, second) > NOISE
            if self.stochastic:
                first, second = (self._quiet_answer(reference, down[0], s) for s in (0, 1))
                if _distance(first, second) > NOISE:
                    raise BadInput(
                        "the model draws random numbers outside dropout layers while it trains, so "
                        "nothing can be compared; optimise it in eval mode, or without them"
                    )
            return tuple(self.answer(reference, each) for each in down)

    def answer(self, model: nn.Module, inputs: Arguments) -> Answer:
        return (self._quiet_answer if self.stochastic else self._answer)(model, inputs, 0)

    def _quiet_answer(self, model: nn.Module, inputs: Arguments, seed: int) -> Answer:
        with transforms.quiet(model):
            return self._answer(model, inputs, seed)

    def _answer(self, model: nn.Module, inputs: Arguments, seed: int) -> Answer:
        torch.manual_seed(seed)
        if not self.training:
            with torch.no_grad():
                return Answer(_results(inputs.call(model)), {})
        with _rehearsed(model):
            found = inputs.call(model)
            backward(self.loss(found))
            inner = model.module if isinstance(model, Tuned) else model
            named = {n: p.grad for n, p in inner.named_parameters() if p.grad is not None}
            gradients = {n: g.detach().float().clone() for n, g in named.items()}
            return Answer(_results(found), gradients)

    def error(self, model: nn.Module, checks: tuple[Arguments, ...] | None = None) -> float:
        """The largest relative error (of the 2-norm) over results and inputs; gradients count
        1 / `GRADIENTS`. Infinite where shapes differ or something is not finite only here."""
        pairs = zip(checks or self.checks, self.references, strict=True)
        return max(_distance(reference, self.answer(model, each)) for each, reference in pairs)


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.attention = False
        self._flops = {True: 0.0, False: 0.0}

    @property
    def convolved(self) -> float:
        """The share of the counted floating-point operations that are convolutions'."""
        return self._flops[True] / max(1.0, sum(self._flops.values()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if "scaled_dot_product" in name or "transformer_encoder_layer_fwd" in name:
            self.attention = True
        found = func(*args, **(kwargs or {}))
        count = flop_registry.get(getattr(func, "overloadpacket", None))
        if count is not None:
            self._flops["conv" in name] += count(*args, **(kwargs or {}), out_val=found)
        return found


class _Direct(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.seen = True
        return func(*args, **(kwargs or {}))


class _rehearsed:
    """The block's calls leave no trace in the model: buffers (running statistics) and gradients
    are as before."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __enter__(self) -> None:
        self._buffers = [(b, b.detach().clone()) for b in self._model.buffers()]
        self._grads = [(p, p.grad) for p in self._model.parameters()]
        for parameter, _ in self._grads:
            parameter.grad = None

    def __exit__(self, *_: object) -> None:
        with torch.no_grad():
            for buffer, value in self._buffers:
                buffer.copy_(value)
        for parameter, grad in self._grads:
            parameter.grad = grad


def backward(loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _mean_square(found: Any) -> Tensor:
    """The default loss: the mean square of every floating result, added up."""
    leaves = [t for t in tree_leaves(found) if isinstance(t, Tensor) and t.requires_grad]
    if not leaves:
        raise BadInput("the model's results need no gradient; pass loss=, or call model.eval()")
    return torch.stack([leaf.float().square().mean() for leaf in leaves]).sum()


def _results(found: Any) -> tuple[Tensor, ...]:
    leaves = [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
    return tuple(
        leaf.detach().float() if leaf.is_floating_point() else leaf.detach() for leaf in leaves
    )


def _perturbed(inputs: Arguments) -> tuple[Arguments, ...]:
    """Other inputs of the same shapes and of like values; integers and booleans are shuffled, so
    that no value (a token, a class) is new."""
    generator = torch.Generator().manual_seed(20)

    def noise(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=generator).to(t.device)

    def shuffled(t: Tensor) -> Tensor:
        if t.numel() < 2:
            return t
        order = torch.randperm(t.numel(), generator=generator).to(t.device)
        return t.flatten()[order].view(t.shape)

    def near(t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return shuffled(t)
        spread = t.float().std(correction=0) if t.numel() else torch.zeros((), device=t.device)
        return (t.float() + 0.1 * spread * noise(t)).to(t.dtype)

    def anew(t: Tensor) -> Tensor:
        if not t.is_floating_point() or t.numel() == 0:
            return shuffled(t)
        wide = t.float()
        return (wide.mean() + wide.std(correction=0) * noise(t)).to(t.dtype)

    return tuple(inputs.changed(change) for change in (near, shuffled, anew))


def _distance(reference: Answer, found: Answer) -> float:
    if len(reference.results) != len(found.results):
        return math.inf
    worst = max(
        (_relative(a, b) for a, b in zip(reference.results, found.results, strict=True)),
        default=0.0,
    )
    if reference.gradients:
        if reference.gradients.keys() - found.gradients.keys():
            return math.inf
        apart = size = 0.0
        for name, gradient in reference.gradients.items():
            apart += float((found.gradients[name] - gradient).float().square().sum())
            size += float(gradient.float().square().sum())
        if not math.isfinite(apart):
            return math.inf
        if size:
            worst = max(worst, math.sqrt(apart / size) / GRADIENTS)
    return worst


def _relative(reference: Tensor, found: Tensor) -> float:
    if reference.shape != found.shape:
        return math.inf
    if not reference.numel():
        return 0.0
    if not reference.is_floating_point() and not reference.is_complex():
        return float((reference != found).float().mean())
    finite = torch.isfinite(reference)
    if not torch.equal(finite, torch.isfinite(found)):
        return math.inf
    where = torch.where(finite, reference, 0.0)
    apart = float((torch.where(finite, found, 0.0) - where).float().norm())
    size = float(where.float().norm())
    return apart / size if size else (0.0 if apart == 0 else math.inf)
