"""The cells of LSTM and GRU from elementary operations: torch's own are for single vendors.

On a device that is neither the CPU nor CUDA's, torch calls these fused cells and leaves them to the
device. Formulas: torch.nn.LSTM and torch.nn.GRU.
"""

from __future__ import annotations

import torch
from torch import Tensor


def lstm_cell(
    inputs: Tensor,
    hidden: Tensor,
    cx: Tensor,
    input_bias: Tensor | None = None,
    hidden_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``inputs`` and ``hidden`` are the gates' products, (batch, 4 * hidden size); the results are
    hy, cy and what backward needs."""
    gates = inputs + hidden
    if input_bias is not None:
        gates = gates + input_bias
    if hidden_bias is not None:
        gates = gates + hidden_bias
    i, f, g, o = gates.chunk(4, 1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    cy = f * cx + i * g
    return o * cy.tanh(), cy, torch.cat([i, f, g, o], 1)


def lstm_cell_backward(
    grad_hy: Tensor | None,
    grad_cy: Tensor | None,
    cx: Tensor,
    cy: Tensor,
    workspace: Tensor,
    has_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if grad_hy is None and grad_cy is None:
        return None, None, None
    i, f, g, o = workspace.chunk(4, 1)
    t = cy.tanh()
    grad_hy = torch.zeros_like(cy) if grad_hy is None else grad_hy
    through = grad_hy * o * (1 - t * t)
    if grad_cy is not None:
        through = through + grad_cy
    gates = torch.cat(
        [
            through * g * i * (1 - i),
            through * cx * f * (1 - f),
            through * i * (1 - g * g),
            grad_hy * t * o * (1 - o),
        ],
        1,
    )
    return gates, through * f, (gates.sum(0) if has_bias else None)


def gru_cell(
    inputs: Tensor,
    hidden: Tensor,
    hx: Tensor,
    input_bias: Tensor | None = None,
    hidden_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``inputs`` and ``hidden``: (batch, 3 * hidden size); the results are hy and what backward
    needs."""
    if input_bias is not None:
        inputs = inputs + input_bias
    if hidden_bias is not None:
        hidden = hidden + hidden_bias
    ir, iz, inew = inputs.chunk(3, 1)
    hr, hz, hnew = hidden.chunk(3, 1)
    r, z = (ir + hr).sigmoid(), (iz + hz).sigmoid()
    n = (inew + r * hnew).tanh()
    return n + z * (hx - n), torch.cat([r, z, n, hx, hnew], 1)


def gru_cell_backward(
    grad_hy: Tensor, workspace: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    r, z, n, hx, hnew = workspace.chunk(5, 1)
    grad_z = grad_hy * (hx - n) * z * (1 - z)
    grad_n = grad_hy * (1 - z) * (1 - n * n)
    grad_r = grad_n * hnew * r * (1 - r)
    inputs = torch.cat([grad_r, grad_z, grad_n], 1)
    hidden = torch.cat([grad_r, grad_z, grad_n * r], 1)
    if not has_bias:
        return inputs, hidden, grad_hy * z, None, None
    return inputs, hidden, grad_hy * z, inputs.sum(0), hidden.sum(0)
