"""Kernels compiled for ``cpu:0`` and run on numpy arrays."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from drivetrain import hal


class Compiled:
    """The kernels of one source on one device."""

    def __init__(self, address: str, text: str, options: tuple[str, ...] = ()) -> None:
        self.device = hal.device(address)
        self.module = self.device.compile(hal.Source.cuda(text), options=options)

    def __call__(self, name: str, grid: Any, block: Any, *arguments: Any, shared: int = 0) -> None:
        """Launch and wait; numpy arrays are copied there and back."""
        import numpy as np

        kernel = self.module.kernel(name)
        with self.device.stream() as stream:
            given, arrays = [], []
            for argument in arguments:
                if isinstance(argument, np.ndarray):
                    buffer = self.device.alloc(max(argument.nbytes, 1), stream=stream)
                    buffer.copy_from(memoryview(argument).cast("B"), stream=stream)
                    arrays.append((argument, buffer))
                    argument = buffer
                given.append(argument)
            kernel(stream, grid, block, *given, shared=shared)
            for array, buffer in arrays:
                buffer.copy_to(memoryview(array).cast("B"), stream=stream)
            stream.synchronize()
            for _, buffer in arrays:
                buffer.close()


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """``kernels(text)`` compiles for ``cpu:0``; each source once for a file of tests."""
    made: dict[Any, Compiled] = {}

    def compiled(text: str, *options: str, address: str = "cpu:0") -> Compiled:
        key = (address, text, options)
        if key not in made:
            made[key] = Compiled(address, text, options)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DRIVETRAIN_CACHE", str(tmp_path_factory.mktemp("kernels")))
        yield compiled


@pytest.fixture
def opencl(kernels: Any) -> Any:
    """``opencl(text)`` compiles for ``opencl:0``; skips where there is no OpenCL platform."""
    if not hal.devices("opencl", all_routes=True):
        pytest.skip("no OpenCL platform on this machine")

    def compiled(text: str, *options: str) -> Compiled:
        return kernels(text, *options, address="opencl:0")

    return compiled
