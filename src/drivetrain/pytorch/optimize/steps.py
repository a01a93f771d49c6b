"""The steps that `optimize` may take: what each changes, and when it cannot apply."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.attention import SDPBackend

from drivetrain.errors import BadInput
from drivetrain.pytorch.optimize import transforms
from drivetrain.pytorch.optimize.wrapped import Build

if TYPE_CHECKING:
    from drivetrain.pytorch.optimize.subject import Subject

__all__ = ["GROUPS", "Step", "builtin"]

GROUPS = (
    "fold",
    "precision",
    "layout",
    "attention",
    "routing",
    "quantisation",
    "optimizer",
    "own",
    "execution",
)
"""In the order in which their changes are made. A plan has one step of each, but any of ``own``."""


MOST_CONVOLVED = 0.5
"""Of a call's floating-point operations: with more of them in convolutions no kernels are tuned on
a GPU, where that takes minutes; on a processor it takes seconds, and gains."""
HOLDS = "a captured graph holds the memory of its calls for good"


@dataclass(frozen=True)
class Step:
    """One thing to try. ``change`` is given the candidate in the making and changes it.

    For a step of your own, `Step.of` takes a function from model to model. Whatever a step does is
    measured and compared with the float32 reference before it is kept.
    """

    name: str
    change: Callable[[Build], None]
    group: str = "own"
    gate: Callable[[Subject], str] = lambda subject: ""
    """Why it cannot apply to this model on this device; empty when it may be tried."""
    compiles: bool = False
    """It takes seconds to minutes: tried last, and seldom."""

    def __post_init__(self) -> None:
        if not self.name or not self.name.isprintable() or len(self.name) > 60:
            raise BadInput(f"a step's name is up to 60 printable characters, not {self.name!r}")
        if self.group not in GROUPS:
            raise BadInput(
                f"step {self.name}: no group {self.group!r}; there are {', '.join(GROUPS)}"
            )

    @staticmethod
    def of(name: str, function: Callable[[nn.Module], nn.Module | None]) -> Step:
        """A step that changes the model alone: ``function`` is given a copy, on the device, and
        changes it or returns another module."""

        def change(build: Build) -> None:
            found = function(build.module)
            if found is not None and not isinstance(found, nn.Module):
                raise BadInput(f"step {name} returned a {type(found).__name__}, not a module")
            build.module = build.module if found is None else found

        return Step(name, change)

    @property
    def code(self) -> str:
        """Changes when the step's own code does: a part of the cache's key."""
        found = [repr(getattr(self.change, "__code__", None) and self.change.__code__.co_code)]
        closed = inspect.getclosurevars(self.change).nonlocals if self.group == "own" else {}
        for name, value in sorted(closed.items()):
            code = getattr(value, "__code__", None)
            found.append(f"{name}={(code.co_code, code.co_consts) if code else value!r}")
        return "|".join(found)


def _no(reason: str) -> Callable[[Subject], str]:
    return lambda subject: reason


def _inference(reason: str, then: Callable[[Subject], str]) -> Callable[[Subject], str]:
    return lambda subject: reason if subject.training else then(subject)


def builtin(subject: Subject) -> tuple[Step, ...]:
    """Every step there is, each with its gate, in the order in which they are tried."""
    return (
        Step("cuda-graph", transforms.cuda_graph, "execution", _graph_gate),
        Step(
            "fold-conv-bn",
            transforms.conv_bn(subject.foldable),
            "fold",
            _inference(
                "batch norm is trained",
                lambda s: "" if s.foldable else "no convolution is followed by a batch norm alone",
            ),
        ),
        *_precision(),
        Step("channels-last", transforms.channels_last, "layout", _layout_gate),
        *_attention(),
        *(
            Step(f"routing-{how}", transforms.routed(how), "routing", _no(""))
            for how in subject.routings
        ),
        *_quantisation(),
        Step("fused-optimizer", transforms.fused_optimizer, "optimizer", _fused_gate),
        *_compiling(),
    )


def _precision() -> tuple[Step, ...]:
    scaler = "training in float16 needs a loss scaler; bfloat16 does not"
    master = "an optimizer needs float32 weights: autocast keeps them"
    return (
        Step(
            "tf32",
            transforms.tf32,
            "precision",
            _inference("the switch is set in the forward, and backward runs outside it", _tf32),
        ),
        Step(
            "bf16-weights",
            transforms.weights(torch.bfloat16),
            "precision",
            _inference(master, lambda s: _floats(s) or _smaller(s, s.facts.bf16)),
        ),
        Step(
            "fp16-weights",
            transforms.weights(torch.float16),
            "precision",
            _inference(scaler, lambda s: _floats(s) or _smaller(s, s.facts.fp16)),
        ),
        Step(
            "bf16-autocast",
            transforms.autocast(torch.bfloat16),
            "precision",
            lambda s: _floats(s) or s.facts.bf16,
        ),
        Step(
            "fp16-autocast",
            transforms.autocast(torch.float16),
            "precision",
            _inference(scaler, lambda s: _floats(s) or s.facts.fp16),
        ),
    )


def _tf32(subject: Subject) -> str:
    return _floats(subject) or subject.facts.tf32


def _smaller(subject: Subject, slow: str) -> str:
    """What the hardware only emulates is slow, and half the size all the same."""
    return "" if subject.objective == "memory" else slow


def _floats(subject: Subject) -> str:
    return "" if subject.float32 else "the model is not float32: its type is the caller's choice"


def _layout_gate(subject: Subject) -> str:
    if not subject.convolutions:
        return "the model has no 2-D convolution"
    return ""


def _attention() -> tuple[Step, ...]:
    return (
        *(
            Step(f"sdpa-{name}", transforms.sdpa(backend), "attention", _sdpa_gate(backend))
            for name, backend in (
                ("flash", SDPBackend.FLASH_ATTENTION),
                ("efficient", SDPBackend.EFFICIENT_ATTENTION),
                ("cudnn", SDPBackend.CUDNN_ATTENTION),
                ("math", SDPBackend.MATH),
            )
        ),
        Step("flex-attention", transforms.flex_attention, "attention", _flex_gate, compiles=True),
    )


def _sdpa_gate(backend: SDPBackend) -> Callable[[Subject], str]:
    def gate(subject: Subject) -> str:
        if not subject.attention:
            return "the model calls no scaled_dot_product_attention"
        if subject.device.type == "cpu" and backend is SDPBackend.FLASH_ATTENTION:
            return "on processors it is taken by itself, wherever it can be"
        if subject.device.type == "cpu" and backend is not SDPBackend.MATH:
            return "processors have only the flash and math back ends"
        if subject.device.type not in ("cpu", "cuda", "xpu") and backend is not SDPBackend.MATH:
            return f"{subject.device.type} has no such back end"
        return ""

    return gate


def _flex_gate(subject: Subject) -> str:
    if not subject.direct_attention:
        return "the model has no direct call of scaled_dot_product_attention"
    if subject.facts.compiler:
        return f"FlexAttention is fast only when compiled: {subject.facts.compiler}"
    if subject.device.type == "cpu":
        return "on processors the kernels of scaled_dot_product_attention are the faster ones"
    return ""


def _quantisation() -> tuple[Step, ...]:
    def gate(fact: str) -> Callable[[Subject], str]:
        def ask(subject: Subject) -> str:
            if not subject.linears:
                return "the model has no linear layer"
            return subject.facts.torchao or str(getattr(subject.facts, fact))

        return _inference("quantised weights are not trained", ask)

    return (
        Step(
            "int8-weights",
            transforms.quantized("int8-weights"),
            "quantisation",
            gate("int8"),
            compiles=True,
        ),
        Step("int8", transforms.quantized("int8"), "quantisation", gate("int8"), compiles=True),
        Step("fp8", transforms.quantized("fp8"), "quantisation", gate("fp8"), compiles=True),
    )


def _fused_gate(subject: Subject) -> str:
    optimizer = subject.optimizer
    if optimizer is None:
        return "no optimizer was passed"
    if "fused" not in inspect.signature(type(optimizer)).parameters:
        return f"{type(optimizer).__name__} has no fused form"
    if subject.device.type not in subject.facts.fused:
        return f"torch has no fused optimizers on {subject.device.type}"
    if any(group.get("fused") for group in optimizer.param_groups):
        return "it is fused already"
    if any(group.get("differentiable") for group in optimizer.param_groups):
        return "a differentiable optimizer cannot be fused"
    return ""


def _graph_gate(subject: Subject) -> str:
    if subject.training:
        return "in training, compile-reduce-overhead captures the graphs"
    if subject.objective == "memory":
        return HOLDS
    return subject.facts.graphs


def _compiling() -> tuple[Step, ...]:
    def gate(mode: str) -> Callable[[Subject], str]:
        def ask(subject: Subject) -> str:
            if subject.facts.compiler:
                return subject.facts.compiler
            tuned = mode.startswith("max-autotune")
            on_gpu = subject.device.type != "cpu"
            if tuned and on_gpu and subject.convolved > MOST_CONVOLVED:
                return (
                    f"{subject.convolved:.0%} of the arithmetic is convolutions: tuning them takes "
                    "minutes, where the vendor's library is tuned already"
                )
            graphs = mode in ("reduce-overhead", "max-autotune")
            if graphs and subject.objective == "memory":
                return HOLDS
            if graphs and subject.facts.graphs:
                same = "default" if mode == "reduce-overhead" else "max-autotune-no-cudagraphs"
                return f"{subject.facts.graphs}; without them it is the same as {same}"
            return ""

        return ask

    return tuple(
        Step(f"compile-{mode}", transforms.compiled(mode), "execution", gate(mode), compiles=True)
        for mode in ("reduce-overhead", "default", "max-autotune", "max-autotune-no-cudagraphs")
    )
