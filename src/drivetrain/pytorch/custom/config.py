"""How a device is registered, and the names that torch lets a device have."""

from __future__ import annotations

import keyword
import re
from dataclasses import dataclass

import torch

from drivetrain.errors import BadInput

SHIMS = ("auto", "require", "off")
POLICIES = ("warn", "error", "allow")
NOT_RENAMED = "privateuseone"


@dataclass(frozen=True)
class Config:
    """What `register_custom_device` may be told beyond the backend."""

    name: str | None = None
    """The device's name in torch; None: the backend's. Lower-case letters and ``_``: torch takes no
    digits."""
    shim: str = "auto"
    """The C++ part: ``auto`` uses it where it was built before and compiles nothing, ``require``
    builds it where needed (once, about half a minute) and raises Unsupported where it cannot be
    had, ``off`` does without. The kernels are the same Python functions with it and without."""
    fallback: str = "warn"
    """What happens when an operation leaves the device for the CPU: ``warn`` (once an operation),
    ``error`` or ``allow``. It is counted always."""
    accelerator: bool | None = None
    """Whether ``torch.accelerator`` means this device. None: only where torch has no other."""
    keep_parameters: bool = True
    """``module.to`` keeps parameters the same objects: tied weights stay tied and an optimizer that
    was made before goes on working. Without it torch makes new parameters for such devices. It is
    torch's own switch for the whole process,
    ``torch.__future__.set_swap_module_params_on_conversion``."""
    amp_dtypes: tuple[str, ...] = ("bfloat16", "float16")
    """Types that autocast offers, the default first."""

    def __post_init__(self) -> None:
        if self.shim not in SHIMS:
            raise BadInput(f"shim={self.shim!r}; give one of {', '.join(SHIMS)}")
        if self.fallback not in POLICIES:
            raise BadInput(f"fallback={self.fallback!r}; give one of {', '.join(POLICIES)}")
        for name in self.amp_dtypes:
            if not isinstance(getattr(torch, str(name), None), torch.dtype):
                raise BadInput(f"amp_dtypes: {name!r} is no type of torch's; try 'bfloat16'")
        if not self.amp_dtypes:
            raise BadInput("amp_dtypes is empty; name at least one, such as 'bfloat16'")


def name_of(config: Config, backend: object) -> str:
    """The checked torch name: the configuration's, else the backend's own. In a driver's name what
    torch does not take (digits) becomes ``_``, and one that torch keeps for itself (``opencl``)
    gets ``hal_`` before it. Raises BadInput."""
    if config.name is not None:
        return checked_name(config.name)
    own = getattr(backend, "name", None)
    if not isinstance(own, str):
        raise BadInput(f"a {type(backend).__name__} has no name; set .name, or give config.name")
    from drivetrain.pytorch.custom.hal_backend import HalBackend

    if isinstance(backend, HalBackend) and own == backend.devices[0].driver:
        own = re.sub(r"[^a-z_]", "_", own.lower())
    if isinstance(backend, HalBackend) and why_not(own):
        own = f"hal_{own}"
    return checked_name(own)


def checked_name(name: object) -> str:
    """``name`` when torch can have a device of it. Raises BadInput, before torch is touched: torch
    itself finds out halfway through and cannot go back."""
    if not isinstance(name, str):
        raise BadInput(f"a device's name is a str, not {name!r}")
    reason = why_not(name)
    if reason:
        raise BadInput(f"torch can have no device named {name!r}: {reason}. Try 'npu' or 'my_chip'")
    return name


def why_not(name: str) -> str:
    """Why torch can have no device of this name; empty when it can."""
    if not re.fullmatch(r"[a-z_]+", name) or not name.strip("_"):
        return "it must consist of lower-case letters and '_' (no digits)"
    if len(name) > 64:
        return "it is longer than 64 characters"
    if keyword.iskeyword(name):
        return f"torch.{name} could not be written in Python"
    if name == NOT_RENAMED:
        return "that is the place for such devices, not one of them"
    if name == torch._C._get_privateuse1_backend_name():
        return ""
    if hasattr(torch, name):
        return f"torch.{name} is something else"
    for owner in (torch.Tensor, torch.nn.Module, torch.UntypedStorage):
        for attribute in (name, f"is_{name}"):
            if hasattr(owner, attribute):
                return f"{owner.__name__}.{attribute} is something else"
    try:
        torch.device(name)
    except RuntimeError:
        return ""
    return "torch has a device type of that name"
