"""Kernels compiled for an architecture by name, with or without such a device in the machine."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from drivetrain import hal
from drivetrain.errors import BadInput
from drivetrain.hal.driver import Target
from drivetrain.hal.kernel import Module
from drivetrain.hal.language import compiling
from drivetrain.hal.language.source import Source
from drivetrain.hal.opened import opened

__all__ = ["CompiledKernel", "compile_for", "target_named"]

_ADDRESS = re.compile(r"[a-z][a-z_]*:\d+")


@dataclass(frozen=True)
class CompiledKernel:
    """Device code of one source for one architecture."""

    target_arch: str
    form: str
    """``cubin``, ``ptx``, ``hsaco``, ``cl``, ``spirv`` or ``so``."""
    code: bytes = field(repr=False)
    names: tuple[str, ...]
    """Of the kernels in it."""
    log: str = field(repr=False)
    source: Source = field(repr=False)
    options: tuple[str, ...] = ()

    def load(self, device: hal.Device | str = "") -> Module:
        """The kernels on a device, ready to launch: ``load("cuda:0").kernel(name)``.

        Raises BadInput where the device takes other code than this.
        """
        here = hal.device(device) if isinstance(device, str) else device
        target = opened(here).backend.target
        if target.kind != target_named(self.target_arch).kind:
            raise BadInput(
                f"this kernel is compiled for {self.target_arch}; {here.address} takes code for "
                f"{target.kind}: compile it for {here.address}"
            )
        return here.compile(self.source, options=self.options)


def target_named(arch: str, source: Source | None = None) -> Target:
    """The target of an architecture: ``sm_90``, ``gfx942``, ``cpu``, or a device's address, such as
    ``opencl:0``; there a Triton ``source`` is compiled as the device's driver says. Raises BadInput
    for what is none of them."""
    if not isinstance(arch, str):
        raise BadInput(f"the architecture is a {type(arch).__name__}; give text such as 'sm_90'")
    word = arch.strip().lower()
    if re.fullmatch(r"sm_\d{2,3}[af]?", word):
        return Target("cuda", word)
    if re.fullmatch(r"gfx[0-9a-f]{3,4}", word):
        return Target("hip", word)
    if word in ("cpu", "native"):
        return opened(hal.device("cpu:0")).backend.target
    if _ADDRESS.fullmatch(word):
        return opened(hal.device(word)).target_of(source)
    raise BadInput(
        f"{arch!r} is no architecture that there is a compiler for: give sm_90 and the like "
        "(NVIDIA), gfx942 and the like (AMD), cpu, or the address of a device (opencl:0). A chip "
        "with a compiler of its own comes in as a driver: docs/write_a_driver.md"
    )


def compile_for(source: Source | str, arch: str, options: Sequence[str] = ()) -> CompiledKernel:
    """Compile a source (text is CUDA C) for an architecture; kept in the disk cache.

    Raises BadInput, CompileError with the user's line, Unsupported where no compiler is installed.
    """
    made = Source.cuda(source) if isinstance(source, str) else source
    target = target_named(arch, made)
    done = compiling.compile(made, target, options=tuple(options))
    kernels: Mapping[str, object] = done.kernels
    return CompiledKernel(
        arch, done.form, done.code, tuple(kernels), done.log, made, tuple(options)
    )
