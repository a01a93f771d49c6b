"""Fake vendor libraries: built once, with variants that lack symbols; see drivers/fake_core.h."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent / "drivers"
HANG = -1


def built(source: str, folder: Path, *, without: Sequence[str] = (), defines: str = "") -> Path:
    """The fake library of that source in ``folder``, without some symbols."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    words = hashlib.sha256(repr((sorted(without), defines)).encode()).hexdigest()[:12]
    path = folder / f"{Path(source).stem}-{words}.so"
    if path.exists():
        return path
    command = [
        compiler,
        "-std=gnu11",
        "-O1",
        "-g",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-shared",
        "-fPIC",
    ]
    command += ["-pthread", str(HERE / source), "-o", str(path), *defines.split()]
    command += [f'-DPYTHON="{sys.executable}"', f'-DCOMPILER="{HERE / "fake_compiler.py"}"']
    if without:
        hidden = folder / f"{words}.map"
        hidden.write_text(f"{{ local: {'; '.join(without)}; }};\n")
        command.append(f"-Wl,--version-script={hidden}")
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return path


class Fake:
    """A fake library in this process. ``refused`` are symbols that it is said not to have."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.library = ctypes.CDLL(str(path))
        self.refused: set[str] = set()
        self.library.fake_calls.restype = ctypes.c_char_p
        # Each copy has addresses of its own, of which a process has enough for some hundred.
        self._end = weakref.finalize(self, self.library.fake_end)
        self._end.atexit = False

    def __getitem__(self, symbol: str) -> Any:
        if symbol in self.refused:
            raise AttributeError(f"{symbol} is refused")
        function = self.library[symbol]
        function.fake = self  # who has a function has the library
        return function

    def fail(self, symbol: str, code: int, nth: int = 1) -> None:
        """The ``nth`` call of it from now on returns ``code``, or hangs; 0: each."""
        self.library.fake_fail(symbol.encode(), nth, code)

    def forgive(self) -> None:
        self.library.fake_forgive()

    def log(self) -> None:
        """Note the symbols that are called from now on."""
        self.library.fake_log(1)

    def calls(self) -> list[tuple[str, int, int]]:
        """(symbol, and two of its arguments where the fake notes them) of each call."""
        found = []
        for line in self.library.fake_calls().decode().splitlines():
            symbol, one, two = line.split()
            found.append((symbol, int(one, 16), int(two, 16)))
        return found

    def names(self) -> list[str]:
        return [name for name, _, _ in self.calls()]

    def live(self) -> int:
        """Allocations that were not given back."""
        return int(self.library.fake_live())

    def things(self) -> int:
        """Streams, events, modules and graphs that were not given back."""
        return int(self.library.fake_things())

    def end(self) -> None:
        """It is used no more: its memory and its threads go."""
        self._end()


class FakeCuda(Fake):
    """The fake ``libcuda``, which notes every call from its beginning."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.log()

    def older(self, version: int) -> FakeCuda:
        """Refuse every symbol that a newer driver brought."""
        from drivetrain.hal.drivers.cuda_api import FUNCTIONS

        self.refused |= {row.symbol for row in FUNCTIONS if row.since > version}
        self.library.fake_version(version)
        return self

    def forget(self) -> None:
        """Note from now on."""
        self.log()

    def release(self, on: bool = True) -> None:
        """Let kernels named ``hold`` end."""
        self.library.fake_release(int(on))

    def current(self) -> int:
        box = ctypes.c_void_p()
        self.library.cuCtxGetCurrent(ctypes.byref(box))
        return box.value or 0


def with_table(code: bytes, arguments: dict[str, Sequence[int]]) -> bytes:
    """A shared object of the cpu driver as the fakes load it, with the bytes of the arguments."""
    lines = "\n".join(" ".join([name, *map(str, sizes)]) for name, sizes in arguments.items())
    return code + b"DTFAKE" + lines.encode() + b"\0"
