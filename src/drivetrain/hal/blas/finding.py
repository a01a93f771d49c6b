"""Where the vendors' BLAS libraries lie: files only, nothing is loaded and no package imported."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ASKED = "DRIVETRAIN_BLAS"
"""``own`` for no library, or the path of the one to take."""


@dataclass(frozen=True)
class Library:
    """A file, and files of its own that must be loaded before it."""

    name: str
    """``openblas``, ``mkl``, ``cublas``, ``hipblas`` or ``clblast``."""
    path: str
    before: tuple[str, ...] = ()


def asked() -> str:
    """What the user asked for; empty for nothing."""
    return os.environ.get(ASKED, "").strip()


@cache
def _folders() -> tuple[Path, ...]:
    """Where installed packages lie."""
    return tuple(Path(each) for each in dict.fromkeys(sys.path) if each and Path(each).is_dir())


def _in_wheels(*patterns: str) -> Iterator[Path]:
    for folder in _folders():
        for pattern in patterns:
            yield from sorted(folder.glob(pattern))


def _first(*patterns: str) -> Iterator[Path]:
    for pattern in patterns:
        root, rest = Path(pattern).anchor, pattern.lstrip("/")
        try:
            yield from sorted(Path(root).glob(rest), reverse=True)
        except OSError:
            continue


def _own(path: Path) -> tuple[str, ...]:
    """What a wheel brings for its library, the Fortran runtime's parts in the order needed."""
    parts = [each for each in path.parent.glob("lib*.so*") if each != path]
    order = ("libquadmath", "libgfortran")
    found = [each for stem in order for each in sorted(parts) if each.name.startswith(stem)]
    return tuple(str(each) for each in found)


def host() -> Iterator[Library]:
    """For cpu devices: OpenBLAS of the system, oneMKL, the OpenBLAS that numpy and scipy bring."""
    seen: set[Path] = set()
    for name, paths in (
        (
            "openblas",
            _first(
                "/usr/lib/*/openblas-pthread/libopenblas.so.0",
                "/usr/lib/*/libopenblas.so.0",
                "/usr/lib64/libopenblasp.so.0",
                "/usr/lib64/libopenblas.so.0",
                "/usr/lib/libopenblas.so.0",
                f"{sys.prefix}/lib/libopenblas.so.0",
            ),
        ),
        (
            "mkl",
            _first(
                f"{sys.prefix}/lib/libmkl_rt.so*",
                "/opt/intel/oneapi/mkl/latest/lib/libmkl_rt.so*",
                "/usr/lib/*/libmkl_rt.so",
            ),
        ),
        (
            "openblas",
            _in_wheels(
                "scipy_openblas64/lib/libscipy_openblas*.so",
                "scipy_openblas32/lib/libscipy_openblas*.so",
                "numpy.libs/lib*openblas*.so*",
                "scipy.libs/lib*openblas*.so*",
            ),
        ),
    ):
        for path in paths:
            if path.resolve() not in seen:
                seen.add(path.resolve())
                wheel = "site-packages" in path.parts or ".libs" in path.parent.name
                yield Library(name, str(path), _own(path) if wheel else ())


def cuda() -> Iterator[Library]:
    """cuBLAS of a toolkit, of NVIDIA's wheels (torch depends on them), or of the loader's path."""
    roots = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")]
    toolkit = [f"{root}/lib64/libcublas.so.*" for root in roots if root.startswith("/")]
    wheels = ("nvidia/cublas/lib/libcublas.so.*", "nvidia/cu*/lib/libcublas.so.*")
    seen: set[str] = set()
    for path in (
        *_in_wheels(*wheels),
        *_first(*toolkit, "/usr/local/cuda/lib64/libcublas.so.*"),
        *_first("/usr/lib/*/libcublas.so.*", "/usr/local/cuda-*/lib64/libcublas.so.*"),
    ):
        major = path.name.removeprefix("libcublas.so.")
        if major.isdigit() and str(path) not in seen:
            seen.add(str(path))
            light = path.with_name(f"libcublasLt.so.{major}")
            yield Library("cublas", str(path), (str(light),) if light.exists() else ())
    for major in ("13", "12", "11"):
        yield Library("cublas", f"libcublas.so.{major}")


def hip() -> Iterator[Library]:
    """hipBLAS of ROCm or of the loader's path."""
    root = os.environ.get("ROCM_PATH", "/opt/rocm")
    if root.startswith("/"):
        for path in _first(f"{root}/lib/libhipblas.so*"):
            yield Library("hipblas", str(path))
    for path in _in_wheels("_rocm_sdk_libraries_*/lib/libhipblas.so*"):
        yield Library("hipblas", str(path))
    yield Library("hipblas", "libhipblas.so.2")


def opencl() -> Iterator[Library]:
    """CLBlast of the system."""
    for path in _first("/usr/lib/*/libclblast.so*", "/usr/lib64/libclblast.so*"):
        yield Library("clblast", str(path))
    yield Library("clblast", "libclblast.so.1")
