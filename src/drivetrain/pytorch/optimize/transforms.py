"""What the built-in steps do to a candidate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from drivetrain.pytorch.optimize import flags
from drivetrain.pytorch.optimize.wrapped import Build

__all__ = [
    "autocast",
    "channels_last",
    "compiled",
    "conv_bn",
    "cuda_graph",
    "flex_attention",
    "foldable",
    "fused_optimizer",
    "quiet",
    "quantized",
    "routed",
    "sdpa",
    "tf32",
    "weights",
]

Change = Callable[[Build], None]

_PAIRS = {
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
}


def autocast(dtype: torch.dtype) -> Change:
    def change(build: Build) -> None:
        kind = _device_of(build).type
        build.contexts.append(lambda: torch.autocast(kind, dtype))

    return change


def weights(dtype: torch.dtype) -> Change:
    """Parameters, buffers and inputs in ``dtype``; results go back to what they were."""

    def change(build: Build) -> None:
        build.module = build.module.to(dtype)
        build.inputs.append(lambda t: t.to(dtype) if t.is_floating_point() else t)

    return change


def tf32(build: Build) -> None:
    build.contexts.append(lambda: flags.tf32(True))


def channels_last(build: Build) -> None:
    build.module = build.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    build.inputs.append(
        lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t
    )


def sdpa(backend: SDPBackend) -> Change:
    def change(build: Build) -> None:
        build.contexts.append(lambda: sdpa_kernel(backend))

    return change


class _Flex(TorchFunctionMode):
    """Direct calls of scaled_dot_product_attention become FlexAttention, where it can say them."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            found = _flex(*args, **kwargs)
            if found is not None:
                return found
        return func(*args, **kwargs)


def _causal(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return q >= kv


def _flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if attn_mask is not None or dropout_p or query.dim() != 4:
        return None
    mask = None
    if is_causal:
        mask = create_block_mask(
            _causal, None, None, query.shape[-2], key.shape[-2], device=str(query.device)
        )
    found: Any = flex_attention(
        query, key, value, block_mask=mask, scale=scale, enable_gqa=enable_gqa
    )
    return found  # type: ignore[no-any-return]


def flex_attention(build: Build) -> None:
    build.contexts.append(_Flex)


def compiled(mode: str) -> Change:
    def change(build: Build) -> None:
        build.compile = {"mode": mode}

    return change


def cuda_graph(build: Build) -> None:
    build.graphed = True


# -- convolution and batch norm ------------------------------------------------------------------


def conv_bn(pairs: tuple[tuple[str, str], ...]) -> Change:
    """Each batch norm of these pairs (see `foldable`) folded into the convolution before it."""

    def change(build: Build) -> None:
        from torch.nn.utils.fusion import fuse_conv_bn_eval

        for conv, norm in pairs:
            first: Any = build.module.get_submodule(conv)
            second: Any = build.module.get_submodule(norm)
            _put(build.module, conv, fuse_conv_bn_eval(first, second))
            _put(build.module, norm, nn.Identity())

    return change


def _put(root: nn.Module, name: str, part: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(root.get_submodule(parent) if parent else root, last, part)


_FACTS = {"__get__", "dim", "size", "numel", "stride", "is_contiguous", "is_floating_point"}
"""What is asked of a tensor without using its values."""


class _Uses(TorchFunctionMode):
    """Counts how often each watched tensor is an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.watched: dict[int, list[Any]] = {}
        """id of a tensor -> [the tensor (so that its id stays its own), name, uses]."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") not in _FACTS:
            for leaf in tree_leaves((args, kwargs)):
                entry = self.watched.get(id(leaf)) if isinstance(leaf, Tensor) else None
                if entry is not None:
                    entry[2] += 1
        return func(*args, **kwargs)


def foldable(module: nn.Module, call: Callable[[nn.Module], Any]) -> tuple[tuple[str, str], ...]:
    """(convolution, batch norm) by name, where the norm is all that uses the convolution's result
    and each runs once in a call; seen in one run of ``call(module)``."""
    names = {part: name for name, part in module.named_modules()}
    runs: dict[str, int] = {}
    followed: dict[str, str] = {}
    uses = _Uses()

    def after_conv(part: nn.Module, _: Any, out: Any) -> None:
        runs[names[part]] = runs.get(names[part], 0) + 1
        uses.watched[id(out)] = [out, names[part], 0]

    def before_norm(part: nn.Module, given: Any) -> None:
        runs[names[part]] = runs.get(names[part], 0) + 1
        entry = uses.watched.get(id(given[0])) if given else None
        if entry is not None:
            followed[entry[1]] = names[part]

    hooks = []
    for part in module.modules():
        if type(part) in _PAIRS:
            hooks.append(part.register_forward_hook(after_conv))
        elif type(part) in _PAIRS.values():
            hooks.append(part.register_forward_pre_hook(before_norm))
    try:
        with torch.no_grad(), uses:
            call(module)
    finally:
        for hook in hooks:
            hook.remove()
    single = {entry[1] for entry in uses.watched.values() if entry[2] == 1}
    found = []
    for conv, norm in followed.items():
        first, second = module.get_submodule(conv), module.get_submodule(norm)
        right = _PAIRS.get(type(first)) is type(second)  # type: ignore[arg-type]
        known = getattr(second, "running_mean", None) is not None
        if right and known and conv in single and runs[conv] == runs[norm] == 1:
            found.append((conv, norm))
    return tuple(found)


# -- quantisation, routing, optimizers -----------------------------------------------------------


def quantized(kind: str) -> Change:
    """torchao's ``quantize_``: ``int8-weights``, ``int8`` (dynamic activations too), ``fp8``."""

    def change(build: Build) -> None:
        from torchao import quantization as ao

        config = {
            "int8-weights": ao.Int8WeightOnlyConfig,
            "int8": ao.Int8DynamicActivationInt8WeightConfig,
            "fp8": ao.Float8DynamicActivationFloat8WeightConfig,
        }[kind]
        ao.quantize_(build.module, config())

    return change


def routed(how: str) -> Change:
    """Layers that offer several routings (``routings``, ``routing``) take this one."""

    def change(build: Build) -> None:
        for part in build.module.modules():
            if how in getattr(part, "routings", ()):
                part.routing = how  # type: ignore[assignment]

    return change


def fused_optimizer(build: Build) -> None:
    fuse(build.optimizer)


def fuse(optimizer: Optimizer | None) -> None:
    """Its groups become fused ones, its state stays."""
    assert optimizer is not None
    for group in (*optimizer.param_groups, optimizer.defaults):
        group["fused"], group["foreach"] = True, None
    optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]
    optimizer._need_device_dtype_check_for_fused = True  # type: ignore[attr-defined]
    optimizer.load_state_dict(optimizer.state_dict())  # counters go where fused kernels want them


@contextmanager
def quiet(module: nn.Module) -> Iterator[None]:
    """Dropout layers let everything through in the block."""
    before: list[tuple[Any, str, float]] = []
    for part in module.modules():
        if isinstance(part, nn.modules.dropout._DropoutNd):
            before.append((part, "p", part.p))
        elif isinstance(part, (nn.MultiheadAttention, nn.RNNBase)):
            before.append((part, "dropout", part.dropout))
    try:
        for part, name, _ in before:
            setattr(part, name, 0.0)
        yield
    finally:
        for part, name, value in before:
            setattr(part, name, value)


def _device_of(build: Build) -> torch.device:
    for tensor in (*build.module.parameters(), *build.module.buffers()):
        return tensor.device
    return torch.device("cpu")
