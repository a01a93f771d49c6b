"""What the cuda driver declares is what the vendor's header says: signatures, symbols, the version
that brought each function, structures, enum values."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from drivetrain.hal.drivers import cuda_api, cuda_context
from drivetrain.hal.drivers.cuda_api import FUNCTIONS, OLDEST, STRUCTURES, Code, Cu, Function

NESTED = {"type": "location.type", "id": "location.id"}
"""Fields of CUmemAccessDesc that the header has one level deeper."""


def folders() -> Iterable[Path]:
    """Where a toolkit or the wheel ``nvidia-cuda-runtime`` puts cuda.h."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            yield Path(os.environ[name]) / "include"
    site = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    yield from sorted(site.glob("cu*/include"), reverse=True)
    yield Path("/usr/local/cuda/include")
    yield from sorted(Path("/usr/local").glob("cuda-*/include"), reverse=True)


@pytest.fixture(scope="module")
def headers() -> Path:
    for folder in folders():
        if (folder / "cuda.h").is_file() and (folder / "cudaTypedefs.h").is_file():
            return folder
    pytest.skip("there is no cuda.h (a CUDA toolkit, or the wheel nvidia-cuda-runtime)")


def values(of: type) -> dict[str, int]:
    prefix = {Cu: "CU_", Code: "CUDA_"}[of]
    return {prefix + name: n for name, n in vars(of).items() if name.isupper()}


def program(
    functions: Iterable[Function] = FUNCTIONS,
    structures: Mapping[str, type[ctypes.Structure]] = STRUCTURES,
    constants: Mapping[str, int] | None = None,
) -> str:
    lines = [
        # All versions of a function under their own symbols, and none under a macro.
        "#define __CUDA_API_VERSION_INTERNAL",
        "#include <stddef.h>",
        "#include <cuda.h>",
        "#include <cudaTypedefs.h>",
        "#define SAME(a, b, text) _Static_assert(__builtin_types_compatible_p(a, b), text)",
    ]
    for index, row in enumerate(functions):
        told = re.sub(r"_v\d+$", "", row.symbol)
        lines += [
            f"typedef CUresult (*row_{index})({row.types});",
            f'SAME(row_{index}, PFN_{told}_v{row.since}, "{row.symbol}: types or version");',
            f'SAME(row_{index}, __typeof__(&{row.symbol}), "{row.symbol}: symbol");',
        ]
    for name, kind in structures.items():
        lines.append(f'_Static_assert(sizeof({name}) == {ctypes.sizeof(kind)}, "{name}: size");')
        for field, *_ in kind._fields_:
            deep = NESTED.get(field, field) if name == "CUmemAccessDesc" else field
            here = getattr(kind, field)
            lines += [
                f'_Static_assert(offsetof({name}, {deep}) == {here.offset}, "{name}.{field}");',
                f"_Static_assert(sizeof((({name} *)0)->{deep}) == {here.size}, "
                f'"{name}.{field}: size");',
            ]
    if constants is None:
        constants = values(Cu) | values(Code)
    for name, number in constants.items():
        # The first handle is a macro with a cast.
        lines.append(f'_Static_assert((size_t){name} == {number}, "{name}");')
    return "\n".join([*lines, "int main(void) { return 0; }", ""])


def wrong(headers: Path, text: str) -> list[str]:
    """What the compiler says against the program."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    command = [compiler, "-std=gnu11", "-fsyntax-only", "-w", "-I", str(headers), "-xc", "-"]
    done = subprocess.run(
        command, input=text, capture_output=True, text=True, check=False, timeout=60
    )
    found = [line for line in done.stderr.splitlines() if "error:" in line]
    assert bool(found) == bool(done.returncode), done.stderr
    return found


def test_every_declared_function_structure_and_value_is_the_headers(headers: Path) -> None:
    assert wrong(headers, program()) == []


def changed(name: str, **what: object) -> list[Function]:
    rows = [replace(row, **what) if row.name == name else row for row in FUNCTIONS]  # type: ignore[arg-type]
    assert rows != list(FUNCTIONS)
    return rows


@pytest.mark.parametrize(
    ("name", "what", "expected"),
    [
        ("cuMemAllocAsync", {"types": "CUdeviceptr *, size_t"}, "cuMemAllocAsync: types"),
        ("cuMemsetD16Async", {"since": 11000}, "PFN_cuMemsetD16Async_v11000"),
        ("cuMemAlloc", {"symbol": "cuMemAlloc"}, "cuMemAlloc: symbol"),
        ("cuStreamDestroy", {"symbol": "cuStreamDestroy_v3"}, "cuStreamDestroy_v3"),
        ("cuInit", {"types": "int"}, "cuInit: types"),
    ],
)
def test_a_wrong_signature_version_or_symbol_is_caught(
    headers: Path, name: str, what: dict[str, object], expected: str
) -> None:
    found = wrong(headers, program(functions=changed(name, **what)))
    assert any(expected in line for line in found), found


def test_a_wrong_offset_size_or_value_is_caught(headers: Path) -> None:
    class Shifted(ctypes.Structure):
        _fields_ = (("func", ctypes.c_void_p), ("gridDimX", ctypes.c_uint64))

    class Swapped(ctypes.Structure):
        _fields_ = (
            *STRUCTURES["CUDA_KERNEL_NODE_PARAMS_v1"]._fields_,
            ("ctx", ctypes.c_void_p),
            ("kern", ctypes.c_void_p),
        )

    found = wrong(headers, program(structures={"CUDA_KERNEL_NODE_PARAMS_v1": Shifted}))
    assert any("v1: size" in line for line in found), found
    found = wrong(headers, program(structures={"CUDA_KERNEL_NODE_PARAMS_v2": Swapped}))
    assert any("v2.ctx" in line for line in found), found
    assert any("v2.kern" in line for line in found), found
    found = wrong(headers, program(constants={"CU_MEMPOOL_ATTR_RELEASE_THRESHOLD": 5}))
    assert any("RELEASE_THRESHOLD" in line for line in found), found


def test_every_error_that_the_header_calls_the_end_of_the_process_is_sticky(headers: Path) -> None:
    text = (headers / "cuda.h").read_text()
    results = text[text.index("typedef enum cudaError_enum") : text.index("} CUresult")]
    said = {
        int(number)
        for comment, number in re.findall(r"/\*\*(.*?)\*/\s*CUDA_\w+\s*=\s*(\d+)", results, re.S)
        if "inconsistent state" in comment
        or "must be destroyed" in comment
        or ("must" in comment and "terminated and relaunched" in comment)
    }
    assert len(said) > 5, "the header has other words now"
    assert said <= cuda_context.STICKY
    assert Code.ERROR_OUT_OF_MEMORY not in cuda_context.STICKY


def test_each_needed_function_was_there_in_the_oldest_driver_served() -> None:
    oldest = {row.name for row in FUNCTIONS if row.since <= OLDEST}
    needed = {row.name for row in FUNCTIONS if not row.group}
    assert needed <= oldest
    newer = {row.group for row in FUNCTIONS if row.name not in oldest}
    assert newer <= set(cuda_api.INNER_GROUPS), "an 11.0 driver has every group of the SPI"
