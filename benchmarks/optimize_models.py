"""The models of `bench_optimize`, built from code: a residual convnet and a transformer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    name: str
    model: nn.Module
    inputs: Tensor
    attention: bool
    images: bool

    def unseen(self, seed: int) -> Tensor:
        """Inputs that were drawn like the others, and not shown to the search."""
        generator = torch.Generator().manual_seed(seed)
        if self.inputs.is_floating_point():
            return torch.randn(self.inputs.shape, generator=generator)
        most = int(self.inputs.max()) + 1
        return torch.randint(0, most, self.inputs.shape, generator=generator)


class Bottleneck(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.body = nn.Sequential(
            nn.Conv2d(width_in, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, out, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.around: nn.Module = nn.Identity()
        if stride != 1 or width_in != out:
            self.around = nn.Sequential(
                nn.Conv2d(width_in, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.around(x))


def convnet(blocks: tuple[int, ...], width: int) -> nn.Module:
    """ResNet-50's form: (3, 4, 6, 3) blocks from 64 channels are its size (25.6 million)."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, width, 7, 2, 3, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    channels = width
    for stage, count in enumerate(blocks):
        for index in range(count):
            own = width << stage
            layers.append(Bottleneck(channels, own, 2 if stage and not index else 1))
            channels = 4 * own
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000)]
    return nn.Sequential(*layers)


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.qkv(self.before(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.between(x))))


class Transformer(nn.Module):
    def __init__(self, layers: int, width: int, heads: int, words: int, length: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(length, width)
        self.layers = nn.ModuleList([Layer(width, heads) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens) + self.places.weight[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def cases(large: bool) -> tuple[Case, ...]:
    """ResNet-50-sized and 6 layers of 768, or what two cores measure in a while."""
    torch.manual_seed(0)
    if large:
        images, net = torch.randn(32, 3, 224, 224), convnet((3, 4, 6, 3), 64)
        tokens, shape = torch.randint(0, 8192, (8, 512)), (6, 768, 12, 8192, 512)
    else:
        images, net = torch.randn(2, 3, 64, 64), convnet((1, 1), 16)
        tokens, shape = torch.randint(0, 256, (2, 128)), (2, 128, 4, 256, 128)
    return (
        Case("convnet", net.eval(), images, False, True),
        Case("transformer", Transformer(*shape).eval(), tokens, True, False),
    )
