"""One step of a training loop: what ``for step in run`` yields."""

from __future__ import annotations

import random
from types import TracebackType
from typing import Any

import numpy as np
import torch

from drivetrain.errors import Retry
from drivetrain.pytorch import on_chip
from drivetrain.training.generators import HostGenerators, HostStates

Number = float | int | bool | str


class Step:
    """A step of the loop; ``with step as batch:`` gives the loader's batch, tensors placed.

    ``index`` counts completed steps before this one, ``epoch`` epochs, ``attempt`` how often this
    step was tried before. ``updates`` is true where a group of ``accumulate`` steps ends (step the
    optimizer there); ``ends_epoch`` on an epoch's last step; ``dry`` in a warm-up step whose
    effects are thrown away. ``ok`` is false when the step failed and will be tried again.
    """

    def __init__(
        self,
        batch: Any,
        *,
        index: int,
        epoch: int,
        updates: bool,
        ends_epoch: bool,
        attempt: int = 0,
        dry: bool = False,
        guard: StepGuard | None = None,
    ) -> None:
        self.index = index
        self.epoch = epoch
        self.updates = updates
        self.ends_epoch = ends_epoch
        self.attempt = attempt
        self.dry = dry
        self.ok = True
        self.entered = False
        self.left = False
        self._batch = batch
        self._guard = guard
        self._logged: dict[str, Any] = {}

    def __enter__(self) -> Any:
        self.entered = True
        return self._batch

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if error is None:
            self.left = True
            return False
        if self._guard is not None and recoverable(error) and self._guard.put_back():
            self.ok = False
            self._logged = {}
            return True
        return False

    def log(self, **values: Any) -> None:
        """Record numbers of this step: number, bool, str or one-element tensor.

        A tensor is copied without waiting for the device and read when the step ends.
        """
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                if value.numel() != 1:
                    raise TypeError(
                        f"step.log({name}=...) got a tensor of {value.numel()} elements; log one "
                        "number, for example .mean()"
                    )
                value = value.detach().clone()
            elif not isinstance(value, (int, float, bool, str)):
                item = getattr(value, "item", None)
                if item is None:
                    raise TypeError(
                        f"step.log({name}=...) got {type(value).__name__}; it takes a number, "
                        "bool, str or one-element tensor"
                    )
                value = item()
            self._logged[name] = value

    def logged(self) -> dict[str, Number]:
        """What was logged, as plain values (waits for the device)."""
        if not self._logged:
            return {}
        return {
            name: value.item() if isinstance(value, torch.Tensor) else value
            for name, value in self._logged.items()
        }


def recoverable(error: BaseException) -> bool:
    """True for what may go away by itself: ``Retry`` and failed collectives."""
    if isinstance(error, Retry):
        return True
    backend = getattr(torch.distributed, "DistBackendError", None)
    return backend is not None and isinstance(error, backend)


class StepGuard:
    """Remembers what a step changes before the optimizer runs, so that the step can be retried.

    That is: the random generators, the models' buffers and, inside a group of accumulated steps,
    the gradients so far.
    """

    def __init__(self, models: list[torch.nn.Module], device: torch.device) -> None:
        self._buffers = _Buffers(models)
        self._parameters = [p for model in models for p in model.parameters()]
        self._gradients: list[torch.Tensor | None] | None = None
        self._device = device
        self._generators = HostGenerators()
        self._host: HostStates | None = None
        # Philox: a seed and an offset are the whole state, and reading them asks no device.
        self._cuda: tuple[int, int] | None = None
        self._cuda_generator = _cuda_generator(device)
        # A custom device's generator keeps its state on the host.
        self._chip = torch.get_device_module(device) if on_chip.is_custom(device) else None
        self._on_chip: torch.Tensor | None = None
        self.stepped = False

    def remember(self, *, gradients: bool) -> None:
        """Take the snapshot; with ``gradients`` also those of an unfinished group."""
        self.stepped = False
        self._host = self._generators.states()
        if self._cuda_generator is not None:
            generator = self._cuda_generator
            self._cuda = (generator.initial_seed(), generator.get_offset())
        if self._chip is not None:
            self._on_chip = self._chip.get_rng_state(self._device)
        self._buffers.remember()
        self._gradients = None
        if gradients:
            self._gradients = [
                None if p.grad is None else p.grad.detach().clone() for p in self._parameters
            ]

    def put_back(self) -> bool:
        """Undo the step so far; False when the optimizer has already stepped."""
        if self.stepped or self._host is None:
            return False
        random.setstate(self._host.python)
        torch.set_rng_state(self._host.torch)
        np.random.set_state(self._host.numpy)
        if self._cuda is not None and self._cuda_generator is not None:
            self._cuda_generator.manual_seed(self._cuda[0])
            self._cuda_generator.set_offset(self._cuda[1])
        if self._chip is not None:
            self._chip.set_rng_state(self._on_chip, self._device)
        self._buffers.put_back()
        for index, parameter in enumerate(self._parameters):
            parameter.grad = None if self._gradients is None else self._gradients[index]
        return True


class _Buffers:
    """The models' buffers, which a step may write, resize, assign anew or fill late."""

    def __init__(self, models: list[torch.nn.Module]) -> None:
        parts = {id(part): part for model in models for part in model.modules()}
        self._homes = [part._buffers for part in parts.values()]
        self._held: list[dict[str, torch.Tensor | None]] = [{} for _ in self._homes]
        self._count = 0
        self._filled: list[tuple[dict[str, torch.Tensor | None], dict[str, Any]]] = []
        self._groups: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []

    def remember(self) -> None:
        """Runs every step: most models have hundreds of modules and few buffers, if any."""
        if not self._count and not any(self._homes):
            return
        if not self._are_those_held():
            self._hold()
        if self._groups:
            with torch.no_grad():
                for live, saved in self._groups:
                    torch._foreach_copy_(saved, live)

    def _hold(self) -> None:
        self._held = [dict(home) for home in self._homes]
        self._count = sum(map(len, self._held))
        pairs = zip(self._homes, self._held, strict=True)
        self._filled = [(home, held) for home, held in pairs if held]
        buffers = {id(b): b for held in self._held for b in held.values() if b is not None}
        # One copy operation takes tensors of one type: grouped, they cost a launch or two.
        by_type: dict[torch.dtype, list[torch.Tensor]] = {}
        for buffer in buffers.values():
            by_type.setdefault(buffer.dtype, []).append(buffer)
        self._groups = [
            (live, [torch.empty_like(buffer) for buffer in live]) for live in by_type.values()
        ]

    @torch.no_grad()
    def put_back(self) -> None:
        for home, held in zip(self._homes, self._held, strict=True):
            home.clear()
            home.update(held)
        for live, saved in self._groups:
            for buffer, before in zip(live, saved, strict=True):
                if buffer.shape != before.shape:
                    buffer.resize_(before.shape)
            torch._foreach_copy_(live, saved)

    def _are_those_held(self) -> bool:
        # As many as before, and all that were there are: so no other one came.
        if sum(map(len, self._homes)) != self._count:
            return False
        for home, held in self._filled:
            for name, buffer in held.items():
                if home.get(name, _Buffers) is not buffer:
                    return False
        return all(
            buffer.shape == before.shape
            for live, saved in self._groups
            for buffer, before in zip(live, saved, strict=True)
        )


def _cuda_generator(device: torch.device) -> torch.Generator | None:
    if device.type != "cuda":
        return None
    torch.cuda.init()  # type: ignore[no-untyped-call]
    return torch.cuda.default_generators[device.index or 0]
