"""The sycl driver: what is said of machines that lack a part of it, from files; and, on Intel's
runtime for processors, memory, streams, kernels, routes and the kit.

``DRIVETRAIN_TEST_SYCL`` names a folder where dpctl and the runtime were installed with pip's
``--prefix`` (``make test-vendors``). Each script runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from drivetrain.hal.drivers.sycl_api import FUNCTIONS, Aspect, Dp, Function, LocalAccessor
from drivetrain.hal.isolated import python_path

PREFIX = Path(os.environ.get("DRIVETRAIN_TEST_SYCL", "/nowhere"))
SITE = f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
DPCTL = f"{SITE}/dpctl/libDPCTLSyclInterface.so"
real = pytest.mark.skipif(
    not (PREFIX / DPCTL).is_file(), reason="dpctl and Intel's runtime are not installed"
)

START = """
import ctypes, hashlib, json, os, struct
from drivetrain import hal
from drivetrain.errors import *
from drivetrain.hal.opened import opened as open_of

def tell(**facts):
    print(json.dumps(facts))

def refused(call, kind):
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"{call} was accepted")

def read(buffer, stream, code="f"):
    out = bytearray(buffer.nbytes)
    buffer.copy_to(out, stream=stream)
    stream.synchronize(60)
    return list(memoryview(out).cast(code))
"""
LISTED = """
state = hal.drivers()["sycl"]
tell(state=state.state, reason=state.reason,
     devices=[[d.address, d.name, list(d.routes)] for d in hal.devices("sycl")],
     listed=[d.address for d in hal.devices()], default=hal.device().address)
"""


def environment(tmp_path: Path, more: dict[str, object]) -> dict[str, str]:
    named = ("DRIVETRAIN_SYCL_LIBRARY", "ONEAPI_DEVICE_SELECTOR", "OCL_ICD_VENDORS")
    inherited = {name: value for name, value in os.environ.items() if name not in named}
    return {
        **inherited,
        "PYTHONPATH": python_path(),
        "DRIVETRAIN_HOME": str(tmp_path / "home"),
        "DRIVETRAIN_CACHE": str(tmp_path / "cache"),
        **{name: str(value) for name, value in more.items()},
    }


Run = Callable[..., Any]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def go(script: str, **more: object) -> Any:
        done = subprocess.run(
            [sys.executable, "-P", "-c", START + dedent(script)],
            env=environment(tmp_path, more),
            capture_output=True,
            text=True,
            check=False,
            timeout=110,
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""  # neither SYCL nor a library under it says a word
        return json.loads(done.stdout)

    return go


@pytest.fixture
def sycl(run: Run) -> Run:
    """`run` on the runtime that is installed."""
    return lambda script, **more: run(script, **{"DRIVETRAIN_SYCL_LIBRARY": PREFIX / DPCTL, **more})


@pytest.fixture
def part(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder as ``--prefix`` makes it, with these of the libraries left out."""

    def go(*without: str) -> Path:
        there = tmp_path / "part"
        (there / DPCTL).parent.mkdir(parents=True)
        (there / DPCTL).symlink_to(PREFIX / DPCTL)
        for path in (PREFIX / "lib").iterdir():
            if path.is_file() and not path.name.startswith(without):
                (there / "lib" / path.name).symlink_to(path)
        return there

    return go


# -- machines that lack it, from files -------------------------------------------------------------


def test_without_dpctl_the_driver_is_absent_and_says_what_to_install(run: Run) -> None:
    found = run(LISTED)
    assert found["state"] == "absent"
    assert "no dpctl (libDPCTLSyclInterface.so) on Python's path" in found["reason"]
    assert run('tell(told=hal.drivers()["sycl"].install)')["told"].startswith("pip install dpctl")


def test_a_named_library_that_is_not_there_is_said_to_be_missing(run: Run, tmp_path: Path) -> None:
    found = run(LISTED, DRIVETRAIN_SYCL_LIBRARY=tmp_path / "none.so")
    assert found["state"] == "absent"
    assert f"DRIVETRAIN_SYCL_LIBRARY={tmp_path / 'none.so'} names no file" in found["reason"]


def test_a_named_library_that_is_none_is_broken_and_never_loaded_here(
    run: Run, tmp_path: Path
) -> None:
    (tmp_path / "text.so").write_text("this is no library")
    found = run(LISTED, DRIVETRAIN_SYCL_LIBRARY=tmp_path / "text.so")
    assert found["state"] == "broken"
    assert "cannot be loaded" in found["reason"]
    assert found["default"] == "cpu:0"


def test_a_dpctl_whose_libraries_pip_left_out_is_told_how_to_install_it(
    run: Run, tmp_path: Path
) -> None:
    (tmp_path / DPCTL).parent.mkdir(parents=True)
    (tmp_path / DPCTL).touch()
    path = os.pathsep.join([python_path(), str(tmp_path / SITE)])
    found = run(LISTED, PYTHONPATH=path)
    assert found["state"] == "absent"
    assert "there is no libsycl.so" in found["reason"]
    assert "--prefix" in found["reason"]


def test_intels_runtime_without_what_it_needs_is_told_what_that_is(
    run: Run, tmp_path: Path
) -> None:
    (tmp_path / DPCTL).parent.mkdir(parents=True)
    (tmp_path / DPCTL).write_text("this is no library")
    (tmp_path / "lib" / "libintelocl.so").touch()
    script = """
    from drivetrain.hal.drivers import opencl_loader
    tell(registered=list(opencl_loader.unregistered().values()))
    """
    selected = tmp_path / DPCTL
    assert run(script, DRIVETRAIN_SYCL_LIBRARY=selected)["registered"] == []
    (tmp_path / "lib" / "libimf.so").touch()
    registered = run(script, DRIVETRAIN_SYCL_LIBRARY=selected)["registered"]
    assert registered == [str(tmp_path / "lib" / "libintelocl.so")]


# -- Intel's runtime: discovery --------------------------------------------------------------------


@real
def test_the_processor_is_one_device_by_opencl_and_by_sycl(sycl: Run) -> None:
    found = sycl(LISTED)
    assert found["state"] == "usable"
    [[address, _, routes]] = found["devices"]
    assert address == "sycl:0"
    assert len(routes) == 2
    assert routes[0].startswith("opencl:")
    assert routes[1] == "sycl:0"
    assert "sycl:0" not in found["listed"]  # once, under the preferred route
    assert routes[0] in found["listed"]
    assert found["default"] == "cpu:0"  # another runtime of the processor is never the default


@real
def test_without_a_runtime_the_driver_is_absent_and_says_what_to_install(
    run: Run, part: Callable[..., Path]
) -> None:
    found = run(LISTED, DRIVETRAIN_SYCL_LIBRARY=part("libintelocl") / DPCTL)
    assert found["state"] == "absent"
    assert "SYCL works, but shows no device" in found["reason"]
    assert "pip install intel-opencl-rt intel-cmplr-lib-rt" in found["reason"]


@real
def test_a_runtime_without_its_library_is_told_which(run: Run, part: Callable[..., Path]) -> None:
    found = run(LISTED, DRIVETRAIN_SYCL_LIBRARY=part("libimf") / DPCTL)
    assert found["state"] == "absent"
    assert "lacks libimf.so" in found["reason"]
    assert "pip install intel-cmplr-lib-rt" in found["reason"]


@real
def test_the_wheels_own_registration_leads_nowhere_and_doctor_says_so(
    tmp_path: Path,
) -> None:
    vendors = PREFIX / "etc/OpenCL/vendors"
    done = subprocess.run(
        [sys.executable, "-m", "drivetrain.cli.main", "doctor", "--json"],
        env=environment(
            tmp_path, {"DRIVETRAIN_SYCL_LIBRARY": PREFIX / DPCTL, "OCL_ICD_VENDORS": vendors}
        ),
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert done.stderr == ""
    [found] = [each for each in json.loads(done.stdout)["drivers"] if each["name"] == "sycl"]
    assert found["state"] == "absent"
    assert "which is not there" in found["reason"]
    assert "take OCL_ICD_VENDORS" in found["reason"]
    assert "pip install" in found["advice"]


# -- Intel's runtime: work -------------------------------------------------------------------------


@real
def test_kernels_take_structures_local_memory_and_three_dimensions(sycl: Run) -> None:
    found = sycl(
        """
        device = hal.device("sycl:0")
        stream = device.stream()
        module = device.compile(hal.Source.cuda('''
        struct P { int a; float b; int c; };
        extern "C" __global__ void mixed(float *x, P p, short h, int n) {
            extern __shared__ float t[];
            int i = blockIdx.x * blockDim.x + threadIdx.x;
            t[threadIdx.x] = i;
            __syncthreads();
            if (i < n) x[i] = t[blockDim.x - 1 - threadIdx.x] * p.b + p.a * p.c + h;
        }
        extern "C" __global__ void place(int *x) {
            int wide = gridDim.x * blockDim.x, high = gridDim.y * blockDim.y;
            int i = blockIdx.x * blockDim.x + threadIdx.x;
            int j = blockIdx.y * blockDim.y + threadIdx.y;
            int k = blockIdx.z * blockDim.z + threadIdx.z;
            x[(k * high + j) * wide + i] = i + 100 * j + 10000 * k;
        }
        '''))
        x = device.alloc(4 * 64, stream=stream)
        mixed = module.kernel("mixed")
        mixed(stream, 4, 16, x, struct.pack("ifi", 2, 0.5, 7), -3, 64, shared=64)
        y = device.alloc(4 * 4 * 6 * 10, stream=stream)
        module.kernel("place")(stream, (2, 3, 5), (2, 2, 2), y)
        tell(mixed=read(x, stream), place=read(y, stream, "i"), alignment=x.ptr % 256)
        """
    )
    assert found["mixed"] == [
        (block * 16 + 15 - at) * 0.5 + 11 for block in range(4) for at in range(16)
    ]
    assert found["place"] == [
        i + 100 * j + 10000 * k for k in range(10) for j in range(6) for i in range(4)
    ]
    assert found["alignment"] == 0


@real
def test_what_the_compiler_refuses_is_told_with_the_users_line(sycl: Run) -> None:
    found = sycl(
        """
        device = hal.device("sycl:0")
        text = "kernel void k(global int *p, int n) {\\n    p[0] = nonsense;\\n}"
        source = hal.Source.opencl(text, name="mine.cl")
        error = refused(lambda: device.compile(source), CompileError)
        good = device.compile(hal.Source.opencl(text.replace("nonsense", "n")))
        wrong = []
        for arguments in ([hal.PTR], [hal.PTR, hal.PTR], [hal.U64, hal.I32]):
            wrong.append(refused(lambda: good.kernel("k", arguments), HalError).code)
        good.kernel("k", [hal.PTR, hal.I32])  # the right ones are taken
        tell(log=error.log, driver=error.driver, wrong=wrong,
             missing=str(refused(lambda: good.kernel("none", [hal.PTR]), BadInput)))
        """
    )
    assert "mine.cl:2: error: use of undeclared identifier 'nonsense'" in found["log"]
    assert found["driver"] == "sycl"
    assert found["wrong"] == ["wrong_arguments"] * 3
    assert "there is no kernel 'none'" in found["missing"]


SPIRV = [
    (17, 4), (17, 6), (14, 2, 2),  # addresses, kernels; 64 bits, OpenCL's memory
    (15, 6, 1, int.from_bytes(b"k", "little")),
    (19, 2), (21, 3, 32, 0), (32, 4, 5, 3), (33, 5, 2, 4),  # void, int, int *, void (int *)
    (43, 3, 6, 7), (54, 2, 1, 0, 5), (55, 4, 7), (248, 8), (62, 7, 6, 2, 4), (253,), (56,),
]  # fmt: skip
"""A kernel ``k`` that writes 7 to where its only argument points, as (operation, words)."""


@real
def test_a_kernel_in_spir_v_is_taken(sycl: Run) -> None:
    words = [0x07230203, 0x10000, 0, 9, 0]
    for operation, *rest in SPIRV:
        words += [(len(rest) + 1) << 16 | operation, *rest]
    found = sycl(
        f"""
        code = struct.pack("{len(words)}I", *{words})
        device = hal.device("sycl:0")
        stream = device.stream()
        module = device.compile(hal.Source.binary(code, "spirv"))
        box = device.alloc(4, stream=stream)
        module.kernel("k", [hal.PTR])(stream, 1, 1, box)
        broken = refused(lambda: device.compile(hal.Source.binary(code[:4] * 9, "spirv")), HalError)
        tell(value=read(box, stream, "i"), broken=broken.driver)
        """
    )
    assert found == {"value": [7], "broken": "sycl"}


@real
def test_a_program_is_compiled_once_for_all_modules_of_it(sycl: Run) -> None:
    """SYCL keeps nothing of its own: the second module of a source asks nobody."""
    found = sycl(
        """
        device = hal.device("sycl:0")
        backend = open_of(device).backend
        text = b"kernel void k(global int *p) { p[0] = 7; }"
        first, second = backend.module_load(text, "cl"), backend.module_load(text, "cl")
        kernels = backend.function(first, "k"), backend.function(second, "k")
        backend.module_unload(first)
        stream = device.stream()
        box = device.alloc(4, stream=stream)
        where = ctypes.c_uint64(box.ptr)
        table = (ctypes.c_void_p * 1)(ctypes.addressof(where))
        backend.function_arguments(kernels[1], [-8])
        backend.launch(kernels[1], (1, 1, 1), (1, 1, 1), 0, stream.handle,
                       ctypes.addressof(table), [-8])
        tell(different=first != second, same=kernels[0] == kernels[1],
             value=read(box, stream, "i"))
        """
    )
    assert found == {"different": True, "same": True, "value": [7]}


@real
def test_more_than_there_is_of_memory_and_threads_is_refused_and_work_goes_on(sycl: Run) -> None:
    found = sycl(
        """
        device = hal.device("sycl:0")
        stream = device.stream()
        full = refused(lambda: device.alloc(1 << 46, stream=stream), OutOfMemory)
        module = device.compile(hal.Source.opencl("kernel void k(global int *p) { p[0] = 7; }"))
        kernel = module.kernel("k", [hal.PTR])
        box = device.alloc(4, stream=stream)
        wide = refused(lambda: kernel(stream, (1 << 20, 1 << 15, 1), 1, box), HalError)
        kernel(stream, 1, 1, box)
        tell(requested=full.requested, total=full.total, code=wide.code,
             value=read(box, stream, "i"))
        """
    )
    assert found["requested"] == 1 << 46
    assert 0 < found["total"] < 1 << 46
    assert found["code"] == "launch_resources"
    assert found["value"] == [7]


RING = """
stations = [hal.device(a) for a in addresses]
data = hashlib.shake_128(b"ring").digest((1 << 20) + 4)
streams = [device.stream() for device in stations]
buffers = [d.alloc(len(data), stream=s) for d, s in zip(stations, streams)]
buffers[0].copy_from(data, stream=streams[0])
around = list(range(1, len(stations))) + [0]
before = 0
for at in around:
    streams[at].wait(streams[before])
    buffers[at].copy_from(buffers[before], stream=streams[at])
    before = at
    if at == corrupted:
        buffers[at].view(7, 1).fill(b"!", stream=streams[at])
back = bytearray(len(data))
buffers[0].copy_to(back, stream=streams[0])
streams[0].synchronize(60)
same = hashlib.sha256(back).digest() == hashlib.sha256(data).digest()
"""
THREE = """
names = {d.name: d.address for d in hal.devices("opencl")}
pocl = [d.address for d in hal.devices("opencl") if "sycl:0" not in d.routes]
addresses = [*pocl[:1], "sycl:0", "cpu:0"]
"""


@real
@pytest.mark.parametrize("corrupted", [-1, 1, 2])
def test_data_goes_round_opencl_sycl_and_the_cpu_in_one_process(sycl: Run, corrupted: int) -> None:
    found = sycl(THREE + f"corrupted = {corrupted}\n" + RING + "tell(same=same, at=addresses)")
    if len(found["at"]) < 3:
        pytest.skip("there is no second OpenCL platform")
    assert found["same"] is (corrupted == -1)


@real
def test_a_plan_takes_a_value_round_the_three_and_back(sycl: Run) -> None:
    found = sycl(
        THREE
        + dedent(
            """
            from drivetrain.placement.execution import copy, kernel, plan
            data = hashlib.shake_128(b"plan").digest(4 * 4096)
            stations = [*addresses, addresses[0]]
            devices = [hal.device(a) for a in addresses]
            chain = [copy(f"to {i}", f"v{i}", f"v{i + 1}", len(data), on=a)
                     for i, a in enumerate(stations)]
            made = plan(chain, devices, inputs={"v0": len(data)})
            last = f"v{len(stations)}"
            back = made.run({"v0": data}, [last])[last]
            other = made.run({"v0": bytes([data[0] ^ 1]) + data[1:]}, [last])[last]
            text = '''extern "C" __global__ void twice(const int *x, int *y, int n) {
                int i = blockIdx.x * blockDim.x + threadIdx.x;
                if (i < n) y[i] = 2 * x[i] + 1;
            }'''
            steps = [kernel(f"k{i}", hal.Source.cuda(text), "twice", [hal.PTR, hal.PTR, hal.I32],
                            [f"w{i}", f"w{i + 1}", 4096], grid=64, block=64,
                            writes={f"w{i + 1}": 4 * 4096}, dtype="int32", flops=8192.0, on=a)
                     for i, a in enumerate(addresses)]
            x = struct.pack("4096i", *range(4096))
            computed = plan(steps, devices, inputs={"w0": len(x)})
            end = f"w{len(steps)}"
            y = memoryview(bytes(computed.run({"w0": x}, [end])[end])).cast("i")
            n = 2 ** len(steps)
            tell(order=[s.address for s in made.steps] == stations, same=back == data,
                 other=other != data, at=addresses,
                 right=list(y) == [n * v + n - 1 for v in range(4096)])
            """
        )
    )
    assert "sycl:0" in found["at"]
    assert {found[word] for word in ("order", "same", "other", "right")} == {True}


@real
@pytest.mark.timeout(900)
def test_the_kit_passes_on_intels_runtime_and_is_called_emulated(tmp_path: Path) -> None:
    report = tmp_path / "sycl.json"
    done = subprocess.run(
        [sys.executable, "-m", "drivetrain.cli.main", "conformance", "sycl", "--report", report],
        env=environment(tmp_path, {"DRIVETRAIN_SYCL_LIBRARY": PREFIX / DPCTL}),
        capture_output=True,
        text=True,
        check=False,
        timeout=850,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    assert found["evidence"] == "emulated"


@real
def test_a_machine_without_an_opencl_loader_takes_the_wheels(sycl: Run, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        dedent(
            """
            from drivetrain.hal.drivers import opencl_api, opencl_loader
            opencl_api.LIBRARY = "libOpenCL-of-no-machine.so.1"
            opencl_loader.library = lambda name, root=opencl_loader.ROOT: ""
            """
        )
    )
    found = sycl(
        """
        device = hal.device("sycl:0")
        stream = device.stream()
        module = device.compile(hal.Source.opencl("kernel void k(global int *p) { p[0] = 7; }"))
        box = device.alloc(4, stream=stream)
        module.kernel("k", [hal.PTR])(stream, 1, 1, box)
        libraries = {line.split()[-1] for line in open("/proc/self/maps") if "libOpenCL" in line}
        tell(value=read(box, stream, "i"), routes=list(device.routes), libraries=list(libraries))
        """,
        PYTHONPATH=os.pathsep.join([str(tmp_path / "site"), python_path()]),
    )
    assert found["value"] == [7]
    assert len(found["routes"]) == 2
    [loaded] = found["libraries"]
    assert loaded.startswith(str((PREFIX / "lib").resolve()))


# -- dpctl's own headers ---------------------------------------------------------------------------


def program(rows: tuple[Function, ...] = FUNCTIONS, shift: int = 0) -> str:
    headers = sorted(
        f"syclinterface/{path.name}"
        for path in (PREFIX / SITE / "dpctl/include/syclinterface").glob("*.h")
    )
    lines = [f'#include "{header}"' for header in headers]
    lines.append(
        "#define SAME(a, b, text) _Static_assert(__builtin_types_compatible_p(a, b), text)"
    )
    for index, row in enumerate(rows):
        lines += [
            f"typedef {row.result} (*row_{index})({row.types});",
            f'SAME(row_{index}, __typeof__(&{row.name}), "{row.name}: types");',
        ]
    values = {f"DPCTL_{name}": n for name, n in vars(Dp).items() if name.isupper()}
    values |= {name: n for name, n in vars(Aspect).items() if not name.startswith("_")}
    lines += [f'_Static_assert({n} == {v + shift}, "{n}");' for n, v in values.items()]
    for field, *_ in LocalAccessor._fields_:
        here = getattr(LocalAccessor, field)
        lines.append(
            f'_Static_assert(offsetof(MDLocalAccessor, {field}) == {here.offset}, "{field}");'
        )
    return "\n".join([*lines, "int main(void) { return 0; }", ""])


def wrong(text: str) -> list[str]:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    include = PREFIX / SITE / "dpctl/include"
    done = subprocess.run(
        [compiler, "-std=gnu11", "-fsyntax-only", "-w", f"-I{include}",
         f"-I{include}/syclinterface", "-include", "stddef.h", "-xc", "-"],
        input=text, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    found = [line for line in done.stderr.splitlines() if "error:" in line]
    assert bool(found) == bool(done.returncode), done.stderr
    return found


@real
def test_every_declared_function_structure_and_value_is_the_headers() -> None:
    assert wrong(program()) == []


@real
def test_a_wrong_signature_or_value_is_caught() -> None:
    row = next(row for row in FUNCTIONS if row.name == "DPCTLQueue_Memcpy")
    bad = Function(row.name, row.result, row.types.replace("size_t", "int"))
    assert any("DPCTLQueue_Memcpy" in line for line in wrong(program((bad,))))
    assert any("COMPLETE" in line for line in wrong(program((), shift=1)))
