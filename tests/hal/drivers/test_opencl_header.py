"""What the opencl driver declares is what Khronos' headers say: signatures, the version that
brought each function, structures, enum values."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from drivetrain.hal.drivers.opencl_api import (
    CALLBACKS,
    FUNCTIONS,
    OLDEST,
    STRUCTURES,
    Cl,
    Code,
    Function,
    name_of,
)

HEADERS = Path("/usr/include/CL")
NESTED = {"cl_device_topology_amd": "pcie"}
"""Structures that lie in a union, and the union's member."""
COMPILER = shutil.which("gcc") or shutil.which("cc")

pytestmark = [
    pytest.mark.skipif(
        not (HEADERS / "cl_ext.h").is_file(), reason="there is no CL/cl.h (Debian: opencl-headers)"
    ),
    pytest.mark.skipif(COMPILER is None, reason="there is no C compiler"),
]


def values() -> dict[str, int]:
    return {
        f"CL_{name}": number
        for of in (Cl, Code)
        for name, number in vars(of).items()
        if name.isupper()
    }


def program(
    functions: Iterable[Function] = FUNCTIONS,
    structures: Mapping[str, type[ctypes.Structure]] = STRUCTURES,
    constants: Mapping[str, int] | None = None,
    version: int = 300,
) -> str:
    lines = [
        f"#define CL_TARGET_OPENCL_VERSION {version}",
        "#include <stddef.h>",
        "#include <CL/cl.h>",
        "#include <CL/cl_ext.h>",
        "#define SAME(a, b, text) _Static_assert(__builtin_types_compatible_p(a, b), text)",
        *(f"typedef {kind.format(name)};" for name, kind in CALLBACKS.items()),
    ]
    for index, row in enumerate(functions):
        lines += [
            f"typedef {row.result} (CL_API_CALL *row_{index})({row.types});",
            f'SAME(row_{index}, __typeof__(&{row.name}), "{row.name}: types");',
        ]
    for name, kind in structures.items():
        member = f"{NESTED[name]}." if name in NESTED else ""
        lines.append(f'_Static_assert(sizeof({name}) == {ctypes.sizeof(kind)}, "{name}: size");')
        for field, *_ in kind._fields_:
            here = getattr(kind, field)
            lines += [
                f"_Static_assert(offsetof({name}, {member}{field}) == {here.offset}, "
                f'"{name}.{field}");',
                f"_Static_assert(sizeof((({name} *)0)->{member}{field}) == {here.size}, "
                f'"{name}.{field}: size");',
            ]
    for name, number in (values() if constants is None else constants).items():
        lines.append(f'_Static_assert((long long)({name}) == {number}LL, "{name}");')
    return "\n".join([*lines, "int main(void) { return 0; }", ""])


def wrong(text: str) -> list[str]:
    """What the compiler says against the program."""
    assert COMPILER is not None
    command = [COMPILER, "-std=gnu11", "-fsyntax-only", "-w", "-xc", "-"]
    done = subprocess.run(
        command, input=text, capture_output=True, text=True, check=False, timeout=60
    )
    found = [line for line in done.stderr.splitlines() if "error:" in line]
    assert bool(found) == bool(done.returncode), done.stderr
    return found


def test_every_declared_function_structure_and_value_is_the_headers() -> None:
    assert wrong(program()) == []


@pytest.mark.parametrize("version", [120, 200, 210, 300])
def test_each_function_came_with_the_version_that_is_told(version: int) -> None:
    there = [row for row in FUNCTIONS if row.since <= version and not row.extension]
    later = [row for row in FUNCTIONS if row.since > version and not row.extension]
    assert wrong(program(there, {}, {}, version)) == []
    for row in later:
        assert wrong(program([row], {}, {}, version)), f"{row.name} was there in {version} already"


def test_each_needed_function_was_there_in_the_oldest_version_served() -> None:
    assert {row.since <= OLDEST for row in FUNCTIONS if not row.group} == {True}


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("clSVMAlloc", {"types": "cl_context, cl_svm_mem_flags, cl_uint, size_t"}),
        ("clSVMFree", {"result": "cl_int"}),
        ("clGetDeviceInfo", {"types": "cl_device_id, cl_device_info, size_t, size_t *, void *"}),
        ("clEnqueueMemFillINTEL", {"types": "cl_command_queue, void *, const void *, size_t"}),
        ("clCreateKernel", {"name": "clCreateKernels"}),
    ],
)
def test_a_wrong_signature_is_caught(name: str, what: dict[str, str]) -> None:
    rows = [replace(row, **what) if row.name == name else row for row in FUNCTIONS]
    assert rows != list(FUNCTIONS)
    assert any(what.get("name", name) in line for line in wrong(program(rows)))


def test_a_wrong_offset_size_or_value_is_caught() -> None:
    class Shifted(ctypes.Structure):
        _fields_ = (
            ("type", ctypes.c_uint),
            ("unused", ctypes.c_ubyte * 16),
            ("bus", ctypes.c_ubyte),
            ("device", ctypes.c_ubyte),
            ("function", ctypes.c_ubyte),
        )

    class Narrow(ctypes.Structure):
        _fields_ = (("version", ctypes.c_uint), ("name", ctypes.c_char * 32))

    found = wrong(program(structures={"cl_device_topology_amd": Shifted}))
    assert any("cl_device_topology_amd.bus" in line for line in found), found
    found = wrong(program(structures={"cl_name_version": Narrow}))
    assert any("cl_name_version: size" in line for line in found), found
    for name, number in (("CL_DEVICE_SVM_CAPABILITIES", 0x1052), ("CL_OUT_OF_RESOURCES", -6)):
        found = wrong(program(constants={name: number}))
        assert any(name in line for line in found), found


def test_every_result_of_the_headers_has_its_name() -> None:
    text = (HEADERS / "cl.h").read_text()
    text = text[text.index("/* Error Codes */") : text.index("/* cl_bool */")]
    told = {int(number): name for name, number in re.findall(r"#define (CL_\w+)\s+(-?\d+)", text)}
    assert len(told) > 60, "the header has another shape now"
    assert {number: name_of(number) for number in told} == told
    assert name_of(-4242) == "OpenCL error -4242"
