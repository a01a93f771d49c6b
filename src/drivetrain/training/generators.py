"""The states of the host's random generators before each step, read only when they have changed.

All three are the Mersenne Twister: 624 words, which change all together, and a position among them,
which moves with every number drawn. So the position, the first words and what was kept from the
draw before tell whether the state is another one, and only then is it read in full, which is slow.
Where these bytes lie is each library's own affair: they are looked for, and a generator whose bytes
are not found is read in full every time.
"""

from __future__ import annotations

import ctypes
import random
import struct
import sys
from typing import Any, NamedTuple

import numpy as np
import torch

_WORDS = 624
_FIRST = 32  # bytes: eight of the words


class HostStates(NamedTuple):
    """What ``random.setstate``, ``torch.set_rng_state`` and ``np.random.set_state`` take."""

    python: Any
    torch: torch.Tensor
    numpy: Any


class HostGenerators:
    """``random``'s, torch's and numpy's global generators."""

    def __init__(self) -> None:
        self._python: Any = getattr(random, "_inst", None)
        self._torch: Any = torch.default_generator
        self._bit_generator = np.random.mtrand.get_bit_generator
        self._numpy: Any = None  # kept, and so its memory too
        self._address = 0
        self._parts: tuple[tuple[memoryview, ...], ...] = ((), (), ())
        self._watched: tuple[memoryview, ...] = ()
        self._was = b""
        self._bits: tuple[bytes, ...] = (b"", b"", b"")
        self._gauss: Any = None
        self._known: HostStates | None = None

    def states(self) -> HostStates:
        """The states now; nobody writes to what is returned. Runs every step."""
        known = self._known
        if (
            known is not None
            and self._was
            and b"".join(self._watched) == self._was
            and self._python.gauss_next is self._gauss
            and self._bit_generator() is self._numpy
            and self._torch._cdata == self._address
        ):
            return known
        return self._read()

    def _read(self) -> HostStates:
        """Each again of which it is not certain that it is as it was."""
        if self._bit_generator() is not self._numpy or self._torch._cdata != self._address:
            self._look()
        bits = tuple(b"".join(part) for part in self._parts)
        gauss = getattr(self._python, "gauss_next", None)
        known: tuple[Any, Any, Any] = self._known or (None, None, None)
        python, host, legacy = known
        same = [bool(now) and now == was for now, was in zip(bits, self._bits, strict=True)]
        if not same[0] or gauss is not self._gauss:
            python = random.getstate()
        if not same[1]:
            host = self._torch.get_state()
        if not same[2] or legacy[3]:  # a normal number that numpy keeps is taken unseen
            legacy = np.random.get_state()
        self._bits, self._gauss = bits, gauss
        self._was = b"".join(bits) if all(bits) and not legacy[3] else b""
        self._known = HostStates(python, host, legacy)
        return self._known

    def _look(self) -> None:
        self._numpy = self._bit_generator()
        self._address = self._torch._cdata
        self._parts = (_python(self._python), _torch(self._torch), _numpy(self._numpy))
        self._watched = tuple(view for part in self._parts for view in part)
        self._bits = (b"", b"", b"")


def _memory(address: int, nbytes: int) -> memoryview:
    """A view of memory that somebody else keeps."""
    return memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")


def _python(source: Any) -> tuple[memoryview, ...]:
    """Position and first words: they lie behind the object's header. A normal number that is kept
    is an attribute of its own."""
    nbytes = 4 + 4 * _WORDS
    there = sys.implementation.name == "cpython" and source is not None
    if not there or type(source).__basicsize__ < 16 + nbytes:
        return ()
    bits = _memory(id(source) + object.__basicsize__, nbytes)
    position, *words = struct.unpack(f"{1 + _WORDS}I", bits)
    return (bits[: 4 + _FIRST],) if (*words, position) == source.getstate()[1] else ()


def _numpy(generator: Any) -> tuple[memoryview, ...]:
    """First words and position. Where a normal number that is kept lies, nobody says."""
    if type(generator).__name__ != "MT19937":
        return ()
    bits = _memory(generator.ctypes.state_address, 4 * _WORDS + 4)
    return bits[:_FIRST], bits[-4:]


_BEFORE, _BEHIND = 20, 28
_SEARCHED = 256


def _torch(generator: Any) -> tuple[memoryview, ...]:
    """Seed, position and first words, and the normal numbers that are kept, which lie behind the
    words. Where they lie, and that every draw shows there, is tried on a generator of its own."""
    trial: Any = torch.Generator("cpu")
    offset = _words_of(trial)
    if not offset or not _shows_every_draw(trial, _around(trial, offset)):
        return ()
    return _around(generator, offset)


def _around(generator: Any, offset: int) -> tuple[memoryview, ...]:
    first = generator._cdata + offset
    return _memory(first - _BEFORE, _BEFORE + _FIRST), _memory(first + 4 * _WORDS, _BEHIND)


def _words_of(generator: Any) -> int:
    """How far from the object's start the words lie; 0 where they are not found."""
    generator.manual_seed(5489)
    # In get_state's form of them, 24 bytes go before and each takes eight bytes.
    told = generator.get_state().numpy().tobytes()
    words = b"".join(told[24 + 8 * i : 28 + 8 * i] for i in range(_WORDS))
    address = generator._cdata
    for offset in range(_BEFORE, _SEARCHED, 4):
        if _memory(address + offset, 16).tobytes() == words[:16]:
            whole = _memory(address + offset, len(words)).tobytes()
            return offset if whole == words else 0
    return 0


def _shows_every_draw(trial: Any, parts: tuple[memoryview, ...]) -> bool:
    # Whatever the caller's default device is.
    single = torch.empty(1, dtype=torch.float32, device="cpu")
    double = torch.empty(1, dtype=torch.float64, device="cpu")
    state = trial.get_state()
    for draw in (
        lambda: single.uniform_(generator=trial),
        lambda: double.uniform_(generator=trial),
        lambda: single.normal_(generator=trial),
        lambda: single.normal_(generator=trial),  # the one that was kept
        lambda: double.normal_(generator=trial),
        lambda: double.normal_(generator=trial),
        lambda: single.random_(generator=trial),
        lambda: torch.randperm(700, generator=trial, device="cpu"),
        lambda: trial.manual_seed(1),
        lambda: trial.set_state(state),
    ):
        before = b"".join(parts)
        draw()
        if b"".join(parts) == before:
            return False
    return True
