"""Autocast on the device: which operations run in the low type, which in float32, which in the
widest type of their arguments.

The lists are torch's own for CUDA (aten/src/ATen/autocast_mode.h), without what is CUDA's alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from drivetrain.pytorch.custom.runtime import Runtime
from drivetrain.pytorch.custom.schema import overload, words

KEY = "AutocastPrivateUse1"
LOW = words(
    """
    _convolution conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d.input
    conv_transpose3d.input convolution prelu addmm addmv addr matmul einsum mm mv linalg_vecdot
    linear addbmm baddbmm bmm chain_matmul linalg_multi_dot _thnn_fused_lstm_cell
    _thnn_fused_gru_cell lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell
    scaled_dot_product_attention
    """
)
FULL = words(
    """
    acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan
    pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar softplus layer_norm native_layer_norm
    group_norm frobenius_norm.dim nuclear_norm nuclear_norm.dim cosine_similarity poisson_nll_loss
    cosine_embedding_loss nll_loss nll_loss2d hinge_embedding_loss kl_div l1_loss smooth_l1_loss
    huber_loss mse_loss margin_ranking_loss multilabel_margin_loss soft_margin_loss
    triplet_margin_loss multi_margin_loss binary_cross_entropy_with_logits cross_entropy_loss dist
    pdist cdist renorm logsumexp prod prod.dim_int softmax.int log_softmax.int cumprod cumsum
    linalg_vector_norm linalg_matrix_norm sum sum.dim_IntList norm.Scalar norm.ScalarOpt_dim
    norm.names_ScalarOpt_dim
    """
)
WIDEST = words(
    """
    addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler index_put tensordot scatter_add cat
    stack
    """
)
BANNED = "binary_cross_entropy"

_libraries: list[Any] = []
Library: Any = torch.library.Library


def register(runtime: Runtime) -> None:
    """From here on ``torch.autocast(NAME)`` works."""
    library = Library("aten", "IMPL")
    name = runtime.name
    rules: tuple[tuple[list[str], Callable[[list[Tensor]], torch.dtype]], ...] = (
        (LOW, lambda _: torch.get_autocast_dtype(name)),
        (FULL, lambda _: torch.float32),
        (WIDEST, _widest),
    )
    for names, rule in rules:
        for each in names:
            op = overload(f"aten::{each}")
            if op is not None:
                library.impl(each, _cast(runtime, op, rule), KEY)
    library.impl(BANNED, _refuse, KEY)
    everything = Library("_", "IMPL")
    everything.fallback(torch.library.fallthrough_kernel, KEY)
    _libraries.extend((library, everything))


def _widest(tensors: list[Tensor]) -> torch.dtype:
    wide = any(each.dtype == torch.float32 for each in tensors)
    return torch.float32 if wide or not tensors else tensors[0].dtype


def _refuse(*_: Any, **__: Any) -> Any:
    raise RuntimeError(
        "binary_cross_entropy is unsafe to autocast: its input may be rounded to 0 or 1. Use "
        "binary_cross_entropy_with_logits, or switch autocast off around it"
    )


def _cast(
    runtime: Runtime, op: Any, rule: Callable[[list[Tensor]], torch.dtype]
) -> Callable[..., Any]:
    without = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, KEY))

    def meant(value: Any) -> bool:
        return (
            isinstance(value, Tensor)
            and value.is_floating_point()
            and value.dtype != torch.float64
            and runtime.is_here(value)
        )

    def found(value: Any) -> list[Tensor]:
        if isinstance(value, (list, tuple)):
            return [each for part in value for each in found(part)]
        return [value] if meant(value) else []

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(without):
            dtype = rule(found((args, tuple(kwargs.values()))))

            def cast(value: Any) -> Any:
                if meant(value):
                    return value.to(dtype)
                if type(value) in (list, tuple):
                    return type(value)(map(cast, value))
                return value

            return op(*map(cast, args), **{name: cast(value) for name, value in kwargs.items()})

    return run
