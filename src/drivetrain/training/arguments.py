"""What a script gives to ``TrainingJob``, made uniform, and what it is refused for."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from drivetrain.errors import BadInput, JobError
from drivetrain.runtime import agent as agents


def device_for_this_job() -> torch.device:
    """The torch device this process should use: the job's, else the first accelerator, else cpu.

    For code that makes tensors before ``TrainingJob`` exists.
    """
    agent = agents.current()
    if agent is not None:
        return torch.device(agent.torch_device)
    if torch.accelerator.is_available():
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is not None:
            return torch.device(accelerator.type, 0)
    return torch.device("cpu")


def named(value: Any, kind: str) -> dict[str, Any]:
    """One object or a dict of them, as a dict (the single one is called ``main``)."""
    if value is None:
        return {}
    if isinstance(value, (list, tuple)):
        raise BadInput(f"pass several {kind}s as a dict of names, not as a {type(value).__name__}")
    if not isinstance(value, Mapping):
        return {"main": value}
    for name in value:
        if not isinstance(name, str):
            raise BadInput(f"the {kind} dict has the key {name!r}; name them with text")
    return dict(value)


def once_key(fn: Callable[..., Any], args: tuple[Any, ...]) -> str:
    """What tells one thing to do once from another, the same in every copy of the script."""
    code = getattr(fn, "__code__", None)
    name = f"{getattr(fn, '__module__', '')}.{getattr(fn, '__qualname__', type(fn).__name__)}"
    if code is not None:
        name += f":{code.co_firstlineno}"
    if args:
        name += json.dumps(args, default=lambda value: type(value).__name__)
    return name


def refuse_ranks() -> None:
    """JobError in a process that is one rank of several."""
    distributed = torch.distributed
    several = int(os.environ.get("WORLD_SIZE", "1") or 1) > 1
    if distributed.is_available() and distributed.is_initialized():
        several = several or distributed.get_world_size() > 1
    if several:
        raise JobError(
            "this script runs with several ranks, which Drivetrain cannot move yet: "
            "start it as one process"
        )
