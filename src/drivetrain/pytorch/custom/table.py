"""Which operations left the device, how often and why; and whether they may."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Mapping

from drivetrain.errors import Unsupported


class FallbackWarning(UserWarning):
    """An operation ran on the CPU instead of the device."""


class Fallbacks(Mapping[str, int]):
    """Operation (``aten::cumsum.out``) -> how often it ran on the CPU.

    Moving data, making tensors and views of them are no operations here: they are the device's
    memory at work. ``reasons`` tells ``no kernel`` or ``declined`` (the backend's kernel said
    NotImplemented). ``policy`` may be changed at any time.
    """

    def __init__(self, device: str, policy: str) -> None:
        self.device = device
        self.counts: dict[str, int] = {}
        self.reasons: dict[str, str] = {}
        self._policy = policy
        self._lock = threading.Lock()
        self.accepted: set[str] = set()
        """Operations about which everything is said: counting is all that is left to do."""

    @property
    def policy(self) -> str:
        return self._policy

    @policy.setter
    def policy(self, policy: str) -> None:
        from drivetrain.pytorch.custom.config import Config

        Config(fallback=policy)  # checks it
        with self._lock:
            self._policy = policy
            self.accepted.clear()

    def note(self, name: str, reason: str = "no kernel") -> None:
        """Count one. Warns the first time, or raises Unsupported, as the policy says."""
        if name not in self.accepted:
            if self._policy != "allow":
                self._object(name, reason)
            self.accepted.add(name)
        with self._lock:
            self.counts[name] = self.counts.get(name, 0) + 1
            self.reasons[name] = reason

    def _object(self, name: str, reason: str) -> None:
        said = (
            f"{name} has {reason} on {self.device}"
            if reason == "no kernel"
            else f"{name}: the kernel of {self.device} does not serve these arguments"
        )
        if self._policy == "error":
            raise Unsupported(
                f"{said}, and the policy is 'error'; give the backend a kernel for it, move the "
                "tensors to the CPU, or set fallbacks.policy = 'allow'",
                code="no_kernel",
                driver=self.device,
                op=name,
            )
        warnings.warn(f"{said}; it runs on the CPU", FallbackWarning, stacklevel=4)

    def clear(self) -> None:
        """Begin to count anew."""
        with self._lock:
            self.accepted.clear()
            self.counts.clear()
            self.reasons.clear()

    def __getitem__(self, name: str) -> int:
        return self.counts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.counts, key=lambda name: (-self.counts[name], name)))

    def __len__(self) -> int:
        return len(self.counts)

    def __str__(self) -> str:
        if not self.counts:
            return f"nothing left {self.device}"
        width = max(len(name) for name in self)
        lines = [f"{name:{width}}  {self[name]:8}  {self.reasons[name]}" for name in self]
        return "\n".join([f"{'left ' + self.device:{width}}  {'times':>8}  why", *lines])
