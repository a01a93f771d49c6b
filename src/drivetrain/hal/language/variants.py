"""Several implementations of one kernel, and the rules that tell where each may run."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from threading import Lock
from typing import TYPE_CHECKING, Any

from drivetrain.errors import BadInput, Unsupported
from drivetrain.hal.driver import Limits, Target
from drivetrain.hal.language.source import FORMS, Source

if TYPE_CHECKING:
    from drivetrain.hal.device import Device
    from drivetrain.hal.kernel import ArgType, Kernel, Module
    from drivetrain.hal.opened import Opened

__all__ = ["Variant", "Variants"]

_AT_LEAST = re.compile(r"(\D*)(\d+(?:\.\d+)?)\+")
_NUMBERED = re.compile(r"(\D*)(\d+(?:\.\d+)?).*")


@dataclass(frozen=True)
class Variant:
    """One implementation: a kernel of a source, and where it applies.

    Every rule that is given must hold. A source also rules out the targets that its language is
    not compiled for.
    """

    source: Source
    kernel: str
    """Its name in the source."""
    name: str = ""
    """What errors and the tuner call it; the kernel's name when empty."""
    args: tuple[ArgType, ...] | None = None
    """As `Module.kernel` takes them."""
    options: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    """Of targets: ``cuda``, ``hip``, ``opencl``, ``cpu``; all when empty."""
    archs: tuple[str, ...] = ()
    """Of targets: ``sm_90`` (that one), ``sm_80+`` (that number or more), ``gfx94*``."""
    features: tuple[str, ...] = ()
    """Words that the target must have: ``fp64``, ``fp16``, ``subgroups``."""
    threads: int = 0
    """Threads of a block that the device must take."""
    shared_bytes: int = 0
    """Shared memory of a block that the device must have."""
    when: Callable[..., bool | str] | None = None
    """A rule about the call. It is given the facts that it names as parameters, and returns True,
    False, or why not: ``when=lambda n, dtype: n % 4 == 0 or "n is no multiple of 4"``."""
    launch: Callable[..., tuple[Any, Any, int]] | None = None
    """The launch rule: the facts that it names -> (grid, block, bytes of shared memory)."""
    priority: int = 0
    """The higher goes first; of equals, the one that was given first."""

    @property
    def called(self) -> str:
        return self.name or self.kernel

    def misfit(self, target: Target, limits: Limits | None, facts: Mapping[str, Any]) -> str:
        """Why it does not apply; empty when it does."""
        if self.kinds and target.kind not in self.kinds:
            return f"it is for {' and '.join(self.kinds)}, not {target.kind}"
        wrong = self.source.misfit(target)
        if wrong:
            return wrong
        if self.archs and not any(_fits(target.arch, pattern) for pattern in self.archs):
            return f"it is for {' or '.join(self.archs)}, not {target.arch or 'an unknown one'}"
        absent = [word for word in self.features if word not in target.features]
        if absent:
            return f"the device has no {', '.join(absent)}"
        if limits is not None and self.threads > limits.threads:
            return f"it wants blocks of {self.threads} threads; the device takes {limits.threads}"
        if limits is not None and self.shared_bytes > limits.shared_bytes:
            return (
                f"it wants {self.shared_bytes} bytes of shared memory; a block has "
                f"{limits.shared_bytes}"
            )
        if self.when is None:
            return ""
        answer = _said(self.when, facts, f"the rule of {self.called}")
        if isinstance(answer, str):
            return answer
        return "" if answer else "its rule says no"

    def dimensions(self, **facts: Any) -> tuple[Any, Any, int]:
        """(grid, block, bytes of shared memory) by its launch rule. Raises BadInput without one."""
        if self.launch is None:
            raise BadInput(f"{self.called} has no launch rule")
        grid, block, shared = _said(self.launch, facts, f"the launch rule of {self.called}")
        return grid, block, shared


def _said(rule: Callable[..., Any], facts: Mapping[str, Any], what: str) -> Any:
    """What a rule says to the facts that it names. Raises BadInput when it names one too many."""
    parameters = inspect.signature(rule).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return rule(**facts)
    absent = [p.name for p in parameters if p.default is p.empty and p.name not in facts]
    if absent:
        raise BadInput(f"{what} asks for {', '.join(absent)}; give {'=..., '.join(absent)}=...")
    return rule(**{p.name: facts[p.name] for p in parameters if p.name in facts})


def _fits(arch: str, pattern: str) -> bool:
    least, number = _AT_LEAST.fullmatch(pattern), _NUMBERED.fullmatch(arch)
    if least is None:
        return fnmatchcase(arch, pattern)
    return (
        number is not None and number[1] == least[1] and _version(number[2]) >= _version(least[2])
    )


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


class Variants:
    """The implementations of one kernel; they take the same arguments and give the same results.

    ::

        scale = hal.Variants("scale", [
            Variant(wide, "scale4", archs=("sm_80+",), when=lambda n: n % 4 == 0),
            Variant(plain, "scale"),
        ])
        kernel = scale.kernel(device, n=n)

    A tuner takes `applicable` and measures; everybody else takes `kernel`.
    """

    def __init__(self, name: str, variants: Sequence[Variant]) -> None:
        if not variants:
            raise BadInput(f"{name}: there is no variant")
        for variant in variants:
            if not isinstance(variant, Variant):
                raise BadInput(f"{name}: a {type(variant).__name__} is no Variant")
        names = [variant.called for variant in variants]
        for variant in variants:
            if names.count(variant.called) > 1:
                raise BadInput(f"{name}: two variants are called {variant.called!r}; name them")
            for kind in variant.kinds:
                if kind not in FORMS:
                    raise BadInput(
                        f"{name}: {variant.called} is for {kind!r}; there are {', '.join(FORMS)}"
                    )
        self.name = name
        self.variants = tuple(sorted(variants, key=lambda variant: -variant.priority))
        """The preferred first."""
        self._lock = Lock()
        self._modules: dict[Opened, dict[tuple[Source, tuple[str, ...]], Module]] = {}
        self._kernels: dict[Opened, dict[str, Kernel]] = {}

    def __getitem__(self, name: str) -> Variant:
        for variant in self.variants:
            if variant.called == name:
                return variant
        raise BadInput(
            f"{self.name} has no variant {name!r}; there are "
            f"{', '.join(variant.called for variant in self.variants)}"
        )

    def misfits(self, device: Device, **facts: Any) -> dict[str, str]:
        """Each variant's name and why it does not apply there; empty for those that do."""
        from drivetrain.hal.opened import opened

        backend = opened(device).backend
        opened(device).require("compute", self.name)
        return {
            variant.called: variant.misfit(backend.target, backend.limits, facts)
            for variant in self.variants
        }

    def applicable(self, device: Device, **facts: Any) -> tuple[Variant, ...]:
        """The variants that may run there, the preferred first; ``facts`` is what rules ask for."""
        found = self.misfits(device, **facts)
        return tuple(variant for variant in self.variants if not found[variant.called])

    def compiled(self, device: Device, variant: Variant | str) -> Kernel:
        """One variant's kernel, compiled and loaded once for each device."""
        from drivetrain.hal.kernel import compiled
        from drivetrain.hal.opened import opened

        chosen = self[variant] if isinstance(variant, str) else variant
        here = opened(device)
        code = (chosen.source, chosen.options)
        with self._lock:
            for closed in [each for each in self._modules if each.closed]:
                del self._modules[closed], self._kernels[closed]
            modules = self._modules.setdefault(here, {})
            kernels = self._kernels.setdefault(here, {})
            module, kernel = modules.get(code), kernels.get(chosen.called)
        if kernel is not None:
            return kernel
        if module is None:
            module = compiled(here, chosen.source, chosen.options)
        kernel = module.kernel(chosen.kernel, chosen.args)
        with self._lock:
            modules.setdefault(code, module)
            return kernels.setdefault(chosen.called, kernel)

    def kernel(self, device: Device, **facts: Any) -> Kernel:
        """The kernel of the preferred variant that applies and whose compiler is installed.

        Raises Unsupported when there is none, with each variant's reason; CompileError when the
        preferred one does not compile.
        """
        return self.choose(device, **facts)[1]

    def choose(self, device: Device, **facts: Any) -> tuple[Variant, Kernel]:
        """The same, with the variant that was chosen."""
        reasons = self.misfits(device, **facts)
        for variant in self.variants:
            if reasons[variant.called]:
                continue
            try:
                return variant, self.compiled(device, variant)
            except Unsupported as error:
                reasons[variant.called] = str(error)
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise Unsupported(
            f"no variant of {self.name} runs on {device.address}: {why}",
            code="no_variant",
            driver=device.driver,
            op=self.name,
            device=device.address,
        )

    def __repr__(self) -> str:
        return f"<Variants {self.name}: {', '.join(v.called for v in self.variants)}>"
