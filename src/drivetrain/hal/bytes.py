"""Copying and hashing of bytes that are named by their address.

The functions come from ``_native`` (C) or, without it, from a twin with the same results
(numpy if importable, else plain Python). ``DRIVETRAIN_NATIVE=0`` forces the twin. ``BACKEND`` says
which it is: ``"native"``, ``"numpy"`` or ``"python"``.

* ``checksum(ptr, nbytes, first_word=0) -> int``: the chunk hash of ``nbytes`` at ``ptr``, whose
  first 32-bit word has index ``first_word`` in its chunk.
* ``copy(dst_ptr, src_ptr, nbytes)``: copies; the ranges may overlap.
* ``copy_checksum(dst_ptr, src_ptr, nbytes, first_word=0) -> int``: both, reading each byte once
  (native). The ranges must not overlap.

Arguments are positional. A piece must lie in one chunk of ``CHUNK_BYTES`` (else ``BadInput``);
that the addresses are valid is the caller's promise. The GIL is released while bytes move.

The chunk hash is ``sum of w_i * a_i mod 2^64`` over the chunk's little-endian 32-bit words, with
``a_i = (((i + 1) * 0x9E3779B97F4A7C15) mod 2^64) | 1``; a missing tail counts as zero bytes. It is
additive: parts hashed alone sum, mod 2^64, to the whole. It tells damage, not malice: words can be
chosen so that two changes cancel.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import ModuleType

CHUNK_BYTES = 4 << 20
CHUNK_WORDS = CHUNK_BYTES // 4

Checksum = Callable[..., int]
Copy = Callable[[int, int, int], None]


def _native() -> ModuleType | None:
    """The C module, where it is built and not forbidden."""
    if os.environ.get("DRIVETRAIN_NATIVE", "1") == "0":
        return None
    try:
        from drivetrain.hal import _native
    except ImportError:
        return None
    return _native


checksum: Checksum
copy: Copy
copy_checksum: Checksum

native = _native()
if native is not None:
    BACKEND = "native"
    checksum, copy, copy_checksum = native.checksum, native.copy, native.copy_checksum
else:
    from drivetrain.hal import _twin

    BACKEND = _twin.BACKEND
    checksum, copy, copy_checksum = _twin.checksum, _twin.copy, _twin.copy_checksum
