"""The fake libraries of `fakes`, and kernels as they load them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from fakes import built, with_table


@pytest.fixture(scope="session")
def fake_library(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``fake_library("fake_hip.c", without=[...], defines="-DX")``: its path."""
    folder = tmp_path_factory.mktemp("fakes")

    def make(source: str, *, without: Sequence[str] = (), defines: str = "") -> Path:
        return built(source, folder, without=without, defines=defines)

    return make


ARGUMENTS = {
    "nothing": [],
    "add": [8, 4],
    "times": [8, 4],
    "store": [8, 4],
    "spin": [8],
    "hold": [8],
    "each": [8],
    "fails": [],
}


@pytest.fixture(scope="session")
def fake_object(kernels_so: bytes) -> bytes:
    """A "code object" for the fakes: the kernels of the rig."""
    return with_table(kernels_so, ARGUMENTS)
