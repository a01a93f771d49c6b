"""The group ``triton`` of an outside driver: how Triton compiles for a device that is new to it.

The chip's compiler is forty lines: it takes what Triton's first stage makes of a kernel on vectors
and writes C. Its results are computed by the simulated device, which runs that code.
``DRIVETRAIN_TEST_TRITON`` names a folder that has Triton in it, where the interpreter has none.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

TRITON = os.environ.get("DRIVETRAIN_TEST_TRITON", "")
real = pytest.mark.skipif(
    find_spec("triton") is None and not TRITON, reason="triton is not installed"
)
compiler = pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no C compiler")

DRIVER = """
import os
from dataclasses import replace
from drivetrain.hal.driver import Driver, TritonTarget
from drivetrain.hal.drivers import simulated
from drivetrain.hal.drivers.simulated_backend import Simulated

GROUPS = frozenset(os.environ["FAKE_GROUPS"].split())

class Chip(Simulated):
    def triton_target(self):
        stages = os.environ.get("FAKE_STAGES", "tchip.vector:stages")
        return TritonTarget("cuda", 90, 32, "so", stages)

def discover():
    (info,) = simulated.discover()
    return (replace(info, driver="tchip", uuid="T-0"),)

def open_chip(info):
    chip = Chip(info, simulated.configuration())
    chip.groups = GROUPS
    return chip

DRIVER = Driver(
    name="tchip", vendor="fake", absent=lambda: "", discover=discover, open=open_chip,
    telemetry=simulated.telemetry, probe=lambda info: None, groups=GROUPS,
)
"""

STAGES = '''
"""From Triton's first stage to the shared object of a chip that runs one block at a time."""

import re
import subprocess
from drivetrain.errors import DrivetrainError  # the chip's own code may stand on Drivetrain

HEAD = """
#include <stdint.h>
typedef struct { uint32_t grid[3], block[3], shared, reserved; uint64_t first, count; } range;
"""
C = {"i1": "int8_t", "i32": "int32_t", "f32": "float"}
TWO = {"muli": "*", "addi": "+", "addf": "+", "mulf": "*"}

def stages(stages, options):
    """Triton's own first stage, then this chip's."""
    for name in list(stages)[1:]:
        del stages[name]
    stages["so"] = lambda module, metadata: compiled(str(module), metadata)

def kind(text):
    wide = re.fullmatch(r"tensor<(\\d+)x(.*)>", text)
    lanes, one = (int(wide[1]), wide[2]) if wide else (1, text)
    return lanes, (C["f32"] + " *" if one.startswith("!tt.ptr<f32>") else C[one])

def compiled(text, metadata):
    text = re.sub(r" loc\\(.*?\\)+$|^#loc.*$", "", text, flags=re.MULTILINE)
    name, arguments = re.search(r"tt.func public @(\\w+)\\((.*?)\\) attributes", text).groups()
    body, where = [], {}

    def made(result, lanes, ctype, lane):
        where[result] = lanes
        body.append(f"{ctype} {v(result)}[{lanes}]; "
                    f"for (int i = 0; i < {lanes}; i++) {v(result)}[i] = {lane};")

    def v(value):
        return value.replace("%", "v_").replace("-", "_")

    def at(value):
        return f"{v(value)}[{'i' if where[value] > 1 else 0}]"

    for n, (value, type_) in enumerate(re.findall(r"(%\\w+): (!tt.ptr<\\w+>|\\w+)", arguments)):
        made(value, 1, kind(type_)[1], f"*({kind(type_)[1]} *)a[{n}]")
    for line in text.partition("attributes")[2].splitlines()[1:]:
        line = re.sub(r" \\{[^}]*\\} :", " :", line.strip())
        op = re.match(r"(?:(%[\\w-]+) = )?(?:tt|arith)\\.(\\w+)", line)
        if op is None or op[2] == "return":
            continue
        used = re.findall(r"%[\\w-]+", line.partition("=")[2] if op[1] else line)
        last = kind(re.split(r" : | -> ", line)[-1])
        if op[2] == "get_program_id":
            made(op[1], 1, "int32_t", "(int32_t)block")
        elif op[2] == "constant":
            number = re.search(r"(?:dense<)?(-?[\\d.e+-]+)>? :", line)[1]
            made(op[1], *last, number)
        elif op[2] == "make_range":
            made(op[1], *last, "i")
        elif op[2] == "splat":
            made(op[1], *last, at(used[0]))
        elif op[2] in TWO:
            made(op[1], *last, f"{at(used[0])} {TWO[op[2]]} {at(used[1])}")
        elif op[2] == "cmpi":
            made(op[1], last[0], "int8_t", f"{at(used[0])} < {at(used[1])}")
        elif op[2] == "addptr":
            pointer = re.search(r" : (\\S+), ", line)[1]
            made(op[1], *kind(pointer), f"{at(used[0])} + {at(used[1])}")
        elif op[2] == "load":
            lanes = kind(re.split(" : ", line)[-1])[0]
            made(op[1], lanes, "float", f"{at(used[1])} ? *{at(used[0])} : 0")
        elif op[2] == "store":
            body.append(f"for (int i = 0; i < {where[used[0]]}; i++) "
                        f"if ({at(used[2])}) *{at(used[0])} = {at(used[1])};")
        else:
            raise RuntimeError(f"this chip has no {op[2]}")
    metadata["name"], metadata["shared"] = name, 0
    with open("chip.c", "w") as file:
        file.write(HEAD + f"int dt_cpu_{name}(const range *r, void **a) {{\\n"
                   "for (uint64_t block = r->first; block < r->first + r->count; block++) {\\n"
                   + "\\n".join(body) + "\\n}\\nreturn 0; }\\n")
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "chip.c", "-o", "chip.so"], check=True)
    with open("chip.so", "rb") as file:
        return file.read()
'''

BEGIN = """
import json, sys
sys.path.append(sys.argv[1]) if sys.argv[1] else None
from drivetrain import hal
from drivetrain.errors import *
from drivetrain.hal import registry
registry.trust("tchip")
device = hal.device("tchip:0")

def plain():
    import plain
    return hal.Source.triton(plain.plain, signature={"x": "*fp32"})

def add(name="add"):
    import kernels
    types = {"x": "*fp32", "y": "*fp32", "out": "*fp32", "n": "i32", "by": "fp32"}
    return hal.Source.triton(getattr(kernels, name), signature=types, constants={"BLOCK": 64})

def refused(kind, source):
    try:
        device.compile(source)
    except kind as error:
        return str(error)
    raise AssertionError("it was compiled")
"""

KERNELS = """
import triton
import triton.language as tl

def add(x, y, out, n, by, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = i < n
    tl.store(out + i, tl.load(x + i, mask=m) + by * tl.load(y + i, mask=m), mask=m)

def divide(x, y, out, n, by, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = i < n
    tl.store(out + i, tl.load(x + i, mask=m) / tl.load(y + i, mask=m) + by, mask=m)
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    site = tmp_path / "site"
    metadata, package = site / "tchip-1.0.dist-info", site / "tchip"
    metadata.mkdir(parents=True)
    package.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: tchip\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[drivetrain.drivers]\ntchip = tchip:DRIVER\n")
    (package / "__init__.py").write_text(DRIVER)
    (package / "vector.py").write_text(STAGES)
    (site / "kernels.py").write_text(KERNELS)
    (site / "plain.py").write_text("def plain(x):\n    return\n")
    return site


def run(site: Path, script: str, *, triton: str = "", **environment: str) -> str:
    before = os.environ.get("PYTHONPATH", "")
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + script, triton],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(site), before])),
            "PYTHONDONTWRITEBYTECODE": "1",
            "DRIVETRAIN_SIMULATED": "count=1",
            "DRIVETRAIN_CACHE": str(site / "cache"),
            "FAKE_GROUPS": "compute timing triton",
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


# -- without Triton --------------------------------------------------------------------------------


def test_the_group_is_listed_and_without_triton_the_extra_is_named(site: Path) -> None:
    script = """
import drivetrain.hal.language.compilers.triton as compiler
compiler.find_spec = lambda name: None  # whatever this interpreter has
assert "triton" in device.capabilities.groups
assert "install drivetrain[triton]" in refused(Unsupported, plain())
print("end")
"""
    assert run(site, script) == "end\n"


def test_a_driver_without_the_group_is_not_asked(site: Path) -> None:
    """The control: its backend has the method all the same."""
    script = """
assert "triton" not in device.capabilities.groups
said = refused(BadInput, plain())
assert "triton sources are not compiled for cpu, and its driver has no group triton" in said, said
print("end")
"""
    assert run(site, script, FAKE_GROUPS="compute timing") == "end\n"


# -- with Triton -----------------------------------------------------------------------------------


@real
@compiler
def test_a_kernel_is_compiled_by_the_drivers_stages_and_computes(site: Path) -> None:
    script = '''
import struct
kernel = device.compile(add()).kernel("add")
assert kernel.arguments == (hal.PTR, hal.PTR, hal.PTR, hal.I32, hal.F32)
n = 150                                                     # not a multiple of a block
x, y = ([k * step for k in range(n)] for step in (1.0, 0.5))
stream = device.stream()
on = [device.alloc(4 * 192, stream=stream) for _ in range(3)]
for buffer, values in zip(on, (x, y, [-1.0] * 192)):
    buffer.copy_from(struct.pack(f"{len(values)}f", *values), stream=stream)
kernel(stream, 3, None, *on, n, 2.0)
back = bytearray(4 * 192)
on[2].copy_to(back, stream=stream)
stream.synchronize()
assert list(struct.unpack("192f", back)) == [2.0 * k for k in range(n)] + [-1.0] * (192 - n)

from kernel_pytorch.hardware_abstraction import ProprietaryTritonBackend
text = """
@triton.jit
def copy(x, out, n: "i32", BLOCK: tl.constexpr = 32):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n), mask=i < n)
"""
made = ProprietaryTritonBackend("tchip:0").compile_triton_kernel(
    text, signature={"x": "*fp32", "out": "*fp32"})
assert (made.form, made.names) == ("so", ("copy",)), made
assert made.load("tchip:0").kernel("copy").arguments == (hal.PTR, hal.PTR, hal.I32)
print("end")
'''
    assert run(site, script, triton=TRITON, PYTHONWARNINGS="ignore") == "end\n"
    # The stages' file is a part of the cache's key: other stages are asked, and these break.
    (site / "tchip" / "vector.py").write_text("def stages(stages, options):\n    1 / 0\n")
    script = """
said = refused(HalError, add())
assert "division by zero" in said, said
print("end")
"""
    assert run(site, script, triton=TRITON) == "end\n"


@real
@compiler
def test_what_the_stages_refuse_or_lack_is_said(site: Path) -> None:
    script = """
said = refused(CompileError, add("divide"))
assert "this chip has no divf" in said, said
print("end")
"""
    assert run(site, script, triton=TRITON) == "end\n"
    script = """
said = refused(Unsupported, add())
assert "tchip.nowhere:stages" in said and "report this to the driver's authors" in said, said
print("end")
"""
    assert run(site, script, triton=TRITON, FAKE_STAGES="tchip.nowhere:stages") == "end\n"
    script = """
said = refused(HalError, add())
assert "the stages end with ['cubin'], not with 'so'" in said, said
print("end")
"""
    assert run(site, script, triton=TRITON, FAKE_STAGES="") == "end\n"
