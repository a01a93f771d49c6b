"""Walking models and optimizers: their parts and parameters, by names that torch.compile and
sharing do not change."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.optim import Optimizer


def bare(module: nn.Module) -> nn.Module:
    """The module without torch.compile around it, so that names match a run without it."""
    inner = getattr(module, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else module


def parts(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Each module in it once, with its name."""
    return iter(
        (name.replace("_orig_mod.", "").removesuffix("_orig_mod").removesuffix("."), part)
        for name, part in module.named_modules(remove_duplicate=True)
        if not (isinstance(getattr(part, "_orig_mod", None), nn.Module))
    )


def named_parameters(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter with its name, tied ones under each of their names."""
    for prefix, part in parts(module):
        for key, parameter in part._parameters.items():
            if parameter is not None:
                yield join(prefix, key), parameter


def join(*words: str) -> str:
    """A dotted name of those words that are not empty."""
    return ".".join(word for word in words if word)


def parameters(optimizer: Optimizer) -> list[Tensor]:
    """All that the optimizer steps, in the order of its groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def loose_name(optimizer: str, index: int) -> str:
    """The name of a parameter that an optimizer steps and no module owns."""
    return f"optimizer.{optimizer}.{index}.(parameter)"
