"""A fake libcuda, built once; each test gets a copy of its own, as if in a process of its own."""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from drivetrain.hal.device import DeviceInfo

SOURCE = Path(__file__).with_name("fake_cuda.c")
KERNELS = {
    "nothing": "",
    "spin": ".param .u64 ns",
    "hold": ".param .u64 unused",
    "stray": ".param .u64 unused",
    "claim": ".param .u64 unused",
    "add": ".param .u64 p, .param .u32 v",
    "times": ".param .u64 p, .param .u32 v",
    "store": ".param .u64 p, .param .u32 v",
}
PTX = ".version 6.4\n.target sm_50\n" + "".join(
    f".visible .entry {name}({parameters}) {{}}\n" for name, parameters in KERNELS.items()
)


class FakeCuda:
    """The fake library. ``since`` refuses every symbol that a newer driver brought, ``refused``
    single ones."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.library = ctypes.CDLL(str(path))
        self.refused: set[str] = set()
        self.library.fake_calls.restype = ctypes.c_char_p

    def __getitem__(self, symbol: str) -> Any:
        if symbol in self.refused:
            raise AttributeError(f"{symbol} is refused")
        return self.library[symbol]

    def older(self, version: int) -> FakeCuda:
        from drivetrain.hal.drivers.cuda_api import FUNCTIONS

        self.refused |= {row.symbol for row in FUNCTIONS if row.since > version}
        self.library.fake_version(version)
        return self

    def fail(self, symbol: str, code: int, nth: int = 1) -> None:
        """The ``nth`` call of it from now on returns ``code``; 0: each."""
        self.library.fake_fail(symbol.encode(), nth, code)

    def calls(self) -> list[tuple[str, int, int]]:
        """(symbol, first argument, second argument) of each call since `forget`."""
        found = []
        for line in self.library.fake_calls().decode().splitlines():
            symbol, one, two = line.split()
            found.append((symbol, int(one, 16), int(two, 16)))
        return found

    def names(self) -> list[str]:
        return [name for name, _, _ in self.calls()]

    def forget(self) -> None:
        self.library.fake_calls_clear()

    def live(self) -> int:
        """Allocations of every kind that were not given back."""
        return sum(self.library.fake_live(kind) for kind in range(4))

    def release(self, on: bool = True) -> None:
        """Let kernels named ``hold`` end."""
        self.library.fake_release(int(on))

    def current(self) -> int:
        box = ctypes.c_void_p()
        self.library.cuCtxGetCurrent(ctypes.byref(box))
        return box.value or 0


@pytest.fixture(scope="session")
def fake_cuda_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    path = tmp_path_factory.mktemp("fake_cuda") / "libcuda.so.1"
    command = [compiler, "-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    command += ["-pthread", str(SOURCE), "-o", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return path


_number = itertools.count()


@pytest.fixture
def new_fake(fake_cuda_path: Path, tmp_path: Path) -> Callable[[], FakeCuda]:
    def make() -> FakeCuda:
        copy = tmp_path / f"libcuda-{next(_number)}.so"
        shutil.copy(fake_cuda_path, copy)
        return FakeCuda(copy)

    return make


@pytest.fixture
def fake(new_fake: Callable[[], FakeCuda], monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return new_fake()


@pytest.fixture
def cuda_info() -> Callable[[int], DeviceInfo]:
    def info(index: int = 0) -> DeviceInfo:
        uuid = f"GPU-00112233-4455-6677-8899-aabbccddee0{index}"
        return DeviceInfo(driver="cuda", index=index, name="fake", vendor="nvidia", uuid=uuid)

    return info
