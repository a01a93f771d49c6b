"""What a device and this installation offer to a model, and why not where they do not."""

from __future__ import annotations

import importlib.util
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from drivetrain import hal
from drivetrain.errors import BadInput, DrivetrainError

__all__ = ["Facts", "facts_of", "lost", "synchronize"]


@dataclass(frozen=True)
class Facts:
    """A torch device as the gates of the steps see it. Reasons are empty where nothing is in the
    way."""

    device: torch.device
    name: str
    """Of the hardware: a part of the cache's key."""
    bf16: str = ""
    """Why bfloat16 is not computed by the hardware."""
    fp16: str = ""
    tf32: str = ""
    int8: str = ""
    fp8: str = ""
    graphs: str = ""
    """Why calls cannot be captured as a CUDA graph."""
    torchao: str = ""
    """Why torchao cannot be used."""
    fused: frozenset[str] = field(default_factory=frozenset)
    """Device types on which torch has fused optimizers."""

    @property
    def compiler(self) -> str:
        """Why ``torch.compile`` has no code generator for the device. Asking loads the compiler,
        which takes seconds the first time."""
        if self.device.type == "cpu":
            return _cxx()
        if self.device.type in ("cuda", "xpu"):
            return _triton()
        return f"torch's compiler makes no code for {self.device.type}"


def synchronize(device: torch.device) -> None:
    """Waits for what this process queued on the device."""
    if device.type == "cpu":
        return
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return
    wait = getattr(getattr(torch, device.type, None), "synchronize", None)
    if wait is not None:
        wait(device.index or 0)


def lost(device: torch.device) -> str:
    """Why the device can no longer be used by this process; empty while it can."""
    try:
        synchronize(device)
        torch.empty(1, device=device).fill_(1.0).item()
    except RuntimeError as error:
        return _first(error)
    return ""


def facts_of(device: torch.device) -> Facts:
    """What can be known of the device without running anything on it but a tiny allocation.

    Raises BadInput where this torch cannot use the device.
    """
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        what = str(error).splitlines()[0]
        raise BadInput(
            f"this torch ({torch.__version__}) cannot use {device}: {what}. "
            "See `drivetrain devices`, and install the torch of that vendor"
        ) from error
    common: dict[str, Any] = {"device": device, "torchao": _torchao(), "fused": _fused()}
    if device.type == "cpu":
        return Facts(name=_processor(), **{**common, **_cpu()})
    if device.type == "cuda":
        return Facts(name=torch.cuda.get_device_name(device), **{**common, **_cuda(device)})
    only_cuda = f"CUDA graphs are for CUDA, not {device.type}"
    unknown = f"whether {device.type} computes it in hardware is not told"
    if device.type == "xpu":
        return Facts(name="xpu", **common, graphs=only_cuda, tf32=unknown, fp8=unknown)
    bf16 = "" if _amp(device, torch.bfloat16) else f"{device.type} has no autocast to bfloat16"
    fp16 = "" if _amp(device, torch.float16) else f"{device.type} has no autocast to float16"
    return Facts(
        name=device.type,
        **common,
        bf16=bf16,
        fp16=fp16,
        tf32=f"TF32 is NVIDIA's, not {device.type}'s",
        int8=unknown,
        fp8=unknown,
        graphs=only_cuda,
    )


def _cpu() -> dict[str, str]:
    bf16, fp16 = (
        "" if _asks(ask) else f"this processor has no {name} instructions: {kind} is emulated"
        for ask, name, kind in (
            ("_is_mkldnn_bf16_supported", "AVX512 or AMX bf16", "bfloat16"),
            ("_is_mkldnn_fp16_supported", "AVX512 or AMX fp16", "float16"),
        )
    )
    return {
        "bf16": bf16,
        "fp16": fp16,
        "tf32": "TF32 is a mode of NVIDIA's tensor cores",
        "fp8": "processors have no fp8 instructions",
        "graphs": "CUDA graphs are for CUDA, not cpu",
    }


def _asks(name: str) -> bool:
    ask = getattr(torch.ops.mkldnn, name, None)
    try:
        return bool(ask is not None and ask())
    except RuntimeError:
        return False


def _cuda(device: torch.device) -> dict[str, str]:
    major, minor = torch.cuda.get_device_capability(device)
    have = f"compute capability {major}.{minor}"
    rocm = torch.version.hip is not None
    return {
        "bf16": "" if rocm or major >= 8 else f"{have}; bfloat16 starts at 8.0",
        "fp16": "" if rocm or major >= 7 else f"{have}; fast float16 starts at 7.0",
        "tf32": "" if major >= 8 and not rocm else f"{have}; TF32 starts at NVIDIA's 8.0",
        "int8": "" if rocm or major >= 8 else f"{have}; int8 matrix products start at 8.0",
        "fp8": "" if (major, minor) >= (8, 9) else f"{have}; fp8 starts at 8.9",
    }


def _cxx() -> str:
    """Why Inductor cannot compile C++; empty when a compiler is there."""
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        compiler = get_cpp_compiler()
    except Exception as error:  # torch raises its own and the loader's errors alike
        return f"torch.compile found no C++ compiler ({_first(error)}); apt install g++"
    if shutil.which(compiler) is None:
        return f"the C++ compiler {compiler!r} is not installed; apt install g++"
    return ""


def _triton() -> str:
    try:
        from torch.utils._triton import has_triton

        found = has_triton()
    except Exception as error:
        return f"Triton cannot be used: {_first(error)}"
    if not found:
        return "Triton is not installed, or knows no GPU here; pip install triton"
    return _cxx()


def _torchao() -> str:
    if importlib.util.find_spec("torchao") is None:
        return "torchao is not installed; pip install torchao"
    return ""


def _fused() -> frozenset[str]:
    try:
        from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

        return frozenset(_get_fused_kernels_supported_devices())
    except ImportError:  # a private name: another torch may call it otherwise
        return frozenset({"cuda", "cpu"})


def _amp(device: torch.device, dtype: torch.dtype) -> bool:
    ask: Callable[[], Any] | None = getattr(
        getattr(torch, device.type, None), "get_amp_supported_dtype", None
    )
    return ask is not None and dtype in ask()


def _processor() -> str:
    try:
        return next(iter(hal.devices("cpu"))).name
    except (DrivetrainError, StopIteration):
        return platform.processor() or platform.machine()


def _first(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
