"""What the level_zero driver declares is what the vendor's header says (Debian's libze-dev):
signatures, structures, enum values."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from drivetrain.hal.drivers.level_zero_api import FUNCTIONS, STRUCTURES, Function, Ze

NESTED = {
    "ze_pci_ext_properties_t": {
        **{name: f"address.{name}" for name in ("domain", "bus", "device", "function")},
        **{name: f"maxSpeed.{name}" for name in ("genVersion", "width", "maxBandwidth")},
    }
}
"""Fields that the header has one level deeper."""
CONSTANTS = {f"ZE_{name}": n for name, n in vars(Ze).items() if name.isupper()}


def program(
    rows: Iterable[Function] = FUNCTIONS,
    structures: Mapping[str, type[ctypes.Structure]] = STRUCTURES,
    constants: Mapping[str, int] = CONSTANTS,
) -> str:
    lines = [
        "#include <stddef.h>",
        "#include <level_zero/ze_api.h>",
        "#define SAME(a, b, text) _Static_assert(__builtin_types_compatible_p(a, b), text)",
    ]
    for index, row in enumerate(rows):
        lines += [
            f"typedef ze_result_t (*row_{index})({row.types});",
            f'SAME(row_{index}, __typeof__(&{row.name}), "{row.name}: types");',
        ]
    for name, kind in structures.items():
        lines.append(f'_Static_assert(sizeof({name}) == {ctypes.sizeof(kind)}, "{name}: size");')
        for field, *_ in kind._fields_:
            deep = NESTED.get(name, {}).get(field, field)
            here = getattr(kind, field)
            lines += [
                f'_Static_assert(offsetof({name}, {deep}) == {here.offset}, "{name}.{field}");',
                f"_Static_assert(sizeof((({name} *)0)->{deep}) == {here.size}, "
                f'"{name}.{field}: size");',
            ]
    lines += [f'_Static_assert({n} == {number}, "{n}");' for n, number in constants.items()]
    return "\n".join([*lines, "int main(void) { return 0; }", ""])


def wrong(text: str) -> list[str]:
    """What the compiler says against the program."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    if not Path("/usr/include/level_zero/ze_api.h").is_file():
        pytest.skip("there is no ze_api.h (Debian's package libze-dev)")
    done = subprocess.run(
        [compiler, "-std=gnu11", "-fsyntax-only", "-w", "-xc", "-"],
        input=text,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    found = [line for line in done.stderr.splitlines() if "error:" in line]
    assert bool(found) == bool(done.returncode), done.stderr
    return found


def test_every_declared_function_structure_and_value_is_the_headers() -> None:
    assert wrong(program()) == []


def test_a_wrong_signature_offset_or_value_is_caught() -> None:
    rows = [
        replace(r, types="ze_context_handle_t, size_t") if r.name == "zeMemFree" else r
        for r in FUNCTIONS
    ]
    assert any("zeMemFree" in line for line in wrong(program(rows, {}, {})))

    class Shifted(ctypes.Structure):
        _fields_ = (("stype", ctypes.c_int), ("index", ctypes.c_uint32))

    found = wrong(program([], {"ze_event_desc_t": Shifted}, {}))
    assert any("ze_event_desc_t.index" in line for line in found), found
    found = wrong(program([], {}, {"ZE_RESULT_NOT_READY": 2}))
    assert any("NOT_READY" in line for line in found), found
