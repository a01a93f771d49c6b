"""A mixture of experts that can route its tokens in several ways; `optimize` picks among them.

Any layer of yours is offered the same when it has ``routings`` (names) and ``routing`` (one of
them), and takes them to mean the same results.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drivetrain.errors import BadInput

__all__ = ["MixtureOfExperts"]


def _grouped_mm(tokens: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    multiply: Any = getattr(F, "grouped_mm", None) or torch._grouped_mm
    return multiply(tokens, weights, offs=ends)  # type: ignore[no-any-return]


class MixtureOfExperts(nn.Module):
    """(..., width) -> (..., width): each token passes its ``top`` experts, weighted by the router.

    ``routing`` is ``loop`` (one product an expert, over its tokens), ``grouped`` (tokens sorted by
    expert, one grouped GEMM a layer) or ``dense`` (every expert over every token: no shape depends
    on values, which suits few experts, compilers and graphs). Raises BadInput.
    """

    routings = ("loop", "grouped", "dense")

    def __init__(
        self, width: int, hidden: int, experts: int, top: int = 2, *, routing: str = "loop"
    ) -> None:
        super().__init__()
        if not 1 <= top <= experts:
            raise BadInput(f"top is {top}; it must be from 1 to the {experts} experts")
        if routing not in self.routings:
            raise BadInput(f"no routing {routing!r}; there are {', '.join(self.routings)}")
        self.experts, self.top, self.routing = experts, top, routing
        self.router = nn.Linear(width, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, width, hidden) * width**-0.5)
        self.down = nn.Parameter(torch.randn(experts, hidden, width) * hidden**-0.5)

    def extra_repr(self) -> str:
        return f"experts={self.experts}, top={self.top}, routing={self.routing}"

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        scores, chosen = self.router(tokens).softmax(-1).topk(self.top, -1)
        scores = scores / scores.sum(-1, keepdim=True)
        passed: Tensor = getattr(self, f"_{self.routing}")(tokens, scores, chosen)
        return passed.view(x.shape)

    def _loop(self, tokens: Tensor, scores: Tensor, chosen: Tensor) -> Tensor:
        found = torch.zeros_like(tokens)
        for expert in range(self.experts):
            rows, place = torch.where(chosen == expert)
            if rows.numel():
                made = F.gelu(tokens[rows] @ self.up[expert]) @ self.down[expert]
                found = found.index_add(0, rows, (made * scores[rows, place, None]).to(found.dtype))
        return found

    def _grouped(self, tokens: Tensor, scores: Tensor, chosen: Tensor) -> Tensor:
        order = chosen.flatten().argsort(stable=True)
        rows = order // self.top
        counts = torch.zeros(self.experts, dtype=torch.int32, device=tokens.device)
        counts = counts.index_add(0, chosen.flatten(), torch.ones_like(order, dtype=torch.int32))
        ends = counts.cumsum(0).to(torch.int32)
        made = F.gelu(_grouped_mm(tokens[rows], self.up.to(tokens.dtype), ends))
        made = _grouped_mm(made, self.down.to(made.dtype), ends)
        weighted = made * scores.flatten()[order, None]
        return torch.zeros_like(tokens).index_add(0, rows, weighted.to(tokens.dtype))

    def _dense(self, tokens: Tensor, scores: Tensor, chosen: Tensor) -> Tensor:
        made = F.gelu(torch.einsum("tw,ewh->teh", tokens, self.up))
        made = torch.einsum("teh,ehw->tew", made, self.down)
        share = torch.zeros(len(tokens), self.experts, dtype=scores.dtype, device=tokens.device)
        share = share.scatter(1, chosen, scores)
        return torch.einsum("tew,te->tw", made, share.to(made.dtype)).to(tokens.dtype)
