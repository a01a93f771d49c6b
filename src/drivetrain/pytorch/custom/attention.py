"""Scaled dot product attention by the CPU's fused kernel, where the CPU would take it.

torch asks a device which of its ways it wants through a table of C++ functions, so the question is
taken over here whole; the way meant for other devices is called ``overrideable``. A backend that
multiplies matrices itself gets attention in parts instead, so that it stays on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from drivetrain.pytorch.custom.fallback import run_on_cpu
from drivetrain.pytorch.custom.runtime import Runtime

_aten: Any = torch.ops.aten
_overrideable: Any = _aten._scaled_dot_product_fused_attention_overrideable.default
_FLASH = 1  # at::SDPBackend
WHOLE = "scaled_dot_product_attention"
NAME = "_scaled_dot_product_fused_attention_overrideable"


def kernels(runtime: Runtime, in_parts: bool) -> dict[str, Callable[..., Any]]:
    """What is registered; ``in_parts`` when the backend has products of its own."""

    def shape_of(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
        return like.requires_grad_(tensor.requires_grad)

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        more = {"scale": scale, "enable_gqa": enable_gqa}
        if not in_parts:
            shapes = map(shape_of, (query, key, value, attn_mask))
            way = _aten._fused_sdp_choice.default(*shapes, dropout_p, is_causal, **more)
            if way == _FLASH:
                bias = attn_mask
                if bias is not None and bias.dtype == torch.bool:
                    zeros = torch.zeros(bias.shape, dtype=query.dtype, device=query.device)
                    bias = zeros.masked_fill(~bias, -math.inf)
                given = (query, key, value, bias, dropout_p, is_causal, False)
                return _overrideable(*given, scale=scale)[0]
        parts = (query, key, value, attn_mask, dropout_p, is_causal, None)
        return _aten._scaled_dot_product_attention_math.default(*parts, **more)[0]

    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_bias: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        return_debug_mask: bool = False,
        *,
        scale: float | None = None,
    ) -> Any:
        out, sums = run_on_cpu(
            runtime,
            _aten._scaled_dot_product_flash_attention_for_cpu.default,
            (query, key, value, dropout_p, is_causal),
            {"attn_mask": attn_bias, "scale": scale},
        )
        none = torch.empty(0, dtype=torch.int64, device=query.device)
        longest = query.shape[2], key.shape[2]
        return out, sums, none, none, *longest, none, none, none

    def backward(
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_bias: Tensor | None,
        mask: Any,
        out: Tensor,
        sums: Tensor,
        cum_q: Tensor,
        cum_k: Tensor,
        max_q: int,
        max_k: int,
        dropout_p: float,
        is_causal: bool,
        seed: Tensor,
        offset: Tensor,
        *,
        scale: float | None = None,
    ) -> Any:
        found = run_on_cpu(
            runtime,
            _aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
            (grad, query, key, value, out, sums, dropout_p, is_causal),
            {"attn_mask": attn_bias, "scale": scale},
        )
        return (*found, None)

    return {WHOLE: attention, NAME: forward, f"{NAME}_backward": backward}
