"""The opencl driver on a platform of this machine (PoCL where there is nothing else), each script
in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from textwrap import dedent
from typing import Any

import pytest

from drivetrain import hal
from drivetrain.errors import BadInput
from drivetrain.hal.driver import Target
from drivetrain.hal.drivers import opencl_loader as loader
from drivetrain.hal.isolated import python_path
from drivetrain.hal.language.compilers import opencl as compiler
from drivetrain.hal.language.options import read_options

REASON = loader.absent()
platform = pytest.mark.skipif(bool(REASON), reason=REASON or "there is a platform")

START = """
import ctypes, json, os, random, struct, sys, threading
from drivetrain import hal
from drivetrain.errors import *
from drivetrain.hal.opened import opened as open_of
device = hal.devices("opencl")[0]
stream = device.stream()
backend = open_of(device).backend

def tell(**facts):
    print(json.dumps(facts))

def refused(call, kind):
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"{call} was accepted")

def holding(values, code="f"):
    data = struct.pack(f"{len(values)}{code}", *values)
    buffer = device.alloc(len(data), stream=stream)
    buffer.copy_from(data, stream=stream)
    return buffer

def read(buffer, code="f"):
    out = bytearray(buffer.nbytes)
    buffer.copy_to(out, stream=stream)
    stream.synchronize(60)
    return list(memoryview(out).cast(code))

SAXPY_CL = '''
__kernel void saxpy(__global float *y, __global const float *x, float a, int n) {
    int i = get_global_id(0);
    if (i < n) y[i] = a * x[i] + y[i];
}
'''
SAXPY_CUDA = '''
extern "C" __global__ void saxpy(float *y, const float *x, float a, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = a * x[i] + y[i];
}
'''
"""

Run = Callable[..., Any]


@pytest.fixture
def run() -> Run:
    def go(script: str, **environment: object) -> Any:
        variables = {
            **os.environ,
            "PYTHONPATH": python_path(),
            "DRIVETRAIN_DISCOVERY_LIMIT_S": "8",
            **{name: str(value) for name, value in environment.items()},
        }
        done = subprocess.run(
            [sys.executable, "-P", "-c", START + dedent(script)],
            env=variables,
            capture_output=True,
            text=True,
            check=False,
            timeout=110,
        )
        assert done.returncode == 0, f"{done.returncode}\n{done.stdout}\n{done.stderr[-3000:]}"
        lines = done.stdout.strip().splitlines()
        return json.loads(lines[-1]) if lines else None

    return go


@platform
def test_a_runtime_on_the_processor_is_a_device_of_its_own_chosen_by_name(run: Run) -> None:
    found = run(
        """
        own = [d.address for d in hal.devices() if d.info.by_name_only]
        same = all(d.memory_domain == "host" for d in hal.devices() if d.info.by_name_only)
        tell(all=[d.address for d in hal.devices()], own=own, same=same,
             default=hal.device().address, groups=device.capabilities.groups,
             vendors=[d.vendor for d in hal.devices("opencl")])
        """
    )
    if not found["own"]:
        pytest.skip("every OpenCL device here is an accelerator")
    assert found["all"][-len(found["own"]) :] == found["own"]
    assert found["default"] not in found["own"]
    assert found["same"]
    assert "compute" in found["groups"]
    assert "unknown" not in found["vendors"]


@platform
def test_a_job_goes_to_an_opencl_device_only_when_it_is_named(run: Run) -> None:
    """No job was shown yet on a GPU by OpenCL, so that ``auto`` passes over each of them."""
    found = run(
        """
        from pathlib import Path
        from drivetrain.placement.policy import Workload, place
        from drivetrain.runtime.placing import Placer
        from drivetrain.store.database import Database
        Path("job.py").write_text("pass")

        def chosen(**spec):
            placer = Placer(Database(Path("store.db")), {"script": "job.py", **spec})
            pairs = placer.candidates()
            workload = placer._workload(spec.get("on", "auto"), ())
            return place(workload, [candidate for candidate, _ in pairs]).address

        tell(auto=chosen(), preferred=chosen(prefer=("opencl",)), asked=chosen(on=device.address),
             address=device.address)
        """
    )
    assert not found["auto"].startswith("opencl:")
    assert found["preferred"].startswith("opencl:")
    assert found["asked"] == found["address"]


@platform
@pytest.mark.parametrize(("memory", "native"), [("svm", "1"), ("buffers", "1"), ("svm", "0")])
def test_the_same_kernel_in_opencl_c_and_cuda_c_gives_the_same(
    run: Run, memory: str, native: str
) -> None:
    run(
        """
        numbers = random.Random(3)
        for n in (1, 33, 1000, 4099):
            x = [numbers.uniform(-5, 5) for _ in range(n)]
            x = list(struct.unpack(f"{n}f", struct.pack(f"{n}f", *x)))
            y = [float(i % 7) for i in range(n)]
            results = []
            for source in (hal.Source.opencl(SAXPY_CL), hal.Source.cuda(SAXPY_CUDA)):
                kernel = device.compile(source).kernel(
                    "saxpy", [hal.PTR, hal.PTR, hal.F32, hal.I32]
                )
                a, b = holding(y), holding(x)
                kernel(stream, -(-n // 64), 64, a, b, 2.0, n)
                kernel.plan(stream, -(-n // 64), 64, a, b, 0.0, n)()
                results.append(read(a))
            wanted = [2 * u + v for u, v in zip(x, y)]
            assert results[0] == results[1]
            assert all(abs(u - v) <= 1e-6 * abs(v) + 1e-6 for u, v in zip(results[0], wanted))
        """,
        DRIVETRAIN_OPENCL_MEMORY=memory,
        DRIVETRAIN_NATIVE=native,
    )


@platform
@pytest.mark.parametrize("how", ["kernel", "command"])
def test_each_way_to_fill_writes_the_pattern_and_nothing_beside_it(run: Run, how: str) -> None:
    run(
        """
        by_kernel = os.environ["DRIVETRAIN_OPENCL_FILL"] == "kernel"
        assert (backend._heap.filler is not None) == by_kernel
        for width in (1, 2, 4, 8, 16):
            pattern = bytes(range(1, width + 1))
            for offset, count in ((0, 1), (0, 1000), (16, 3), (width, 77), (3 * width, 5000)):
                whole = device.alloc(1 << 17, stream=stream)
                whole.fill(b"\\xee", stream=stream)
                whole.view(offset, count * width).fill(pattern, stream=stream)
                got = bytearray(1 << 17)
                whole.copy_to(memoryview(got), stream=stream)
                stream.synchronize(60)
                wanted = b"\\xee" * offset + pattern * count
                assert got == wanted.ljust(1 << 17, b"\\xee"), (width, offset, count)
        """,
        DRIVETRAIN_OPENCL_FILL=how,
    )


@platform
def test_streams_that_come_and_go_share_a_queue_once_it_is_empty(run: Run) -> None:
    run(
        """
        target = holding([0.0] * 64)
        for _ in range(50):
            with device.stream() as passing:
                target.fill(bytes(4), stream=passing)
            device.synchronize(60)
        queues = backend._queues
        held = len(queues._queues) + sum(map(len, queues._spare.values())) + len(queues._left)
        assert held <= 4, held
        """
    )


@platform
def test_errors_of_the_platforms_compiler_are_in_the_users_lines(run: Run) -> None:
    run(
        """
        text = "#ifdef WIDE\\n\\n__kernel void k(__global int *x) {\\n    x[0] = y;\\n}\\n#endif\\n"
        source = hal.Source.opencl(text, name="mine.cl", defines={"WIDE": True})
        error = refused(lambda: device.compile(source), CompileError)
        assert "mine.cl:4: error:" in error.log, error.log
        assert "'y'" in str(error) and str(error).startswith("mine.cl:4"), error
        device.compile(hal.Source.opencl(text.replace("= y", "= 7")), options=["-DWIDE", "-O0"])
        refused(lambda: device.compile(source, options=["-I/etc"]), BadInput)
        """
    )


@platform
def test_a_device_that_takes_binaries_only_runs_its_platforms_own(run: Run) -> None:
    """The binary is made by the platform's compiler here; the device then has none."""
    made = run(
        """
        from pathlib import Path
        from drivetrain.hal.drivers import opencl_build
        from drivetrain.hal.drivers.opencl_api import load
        api, found = load(), opencl_build.find(load(), device.uuid)
        context = backend._context.handle
        program, failed = opencl_build.create(api, found, context, SAXPY_CL.encode(), "cl")
        assert not failed
        failed, log = opencl_build.build(api, found, program, "")
        assert not failed, log
        Path("saxpy.bin").write_bytes(opencl_build.binary(api, program))
        tell(size=Path("saxpy.bin").stat().st_size)
        """
    )
    assert made["size"] > 100
    run(
        """
        from pathlib import Path
        assert "binary_only" in backend.target.features
        types = [hal.PTR, hal.PTR, hal.F32, hal.I32]
        binary = hal.Source.binary(Path("saxpy.bin").read_bytes(), "clbin", {"saxpy": types})
        a, b = holding([1.0] * 100), holding([2.0] * 100)
        device.compile(binary).kernel("saxpy")(stream, 2, 64, a, b, 3.0, 100)
        assert read(a) == [7.0] * 100
        error = refused(lambda: device.compile(hal.Source.opencl(SAXPY_CL)), BadInput)
        assert "takes binaries only" in str(error)
        damaged = hal.Source.binary(Path("saxpy.bin").read_bytes()[::-1], "clbin")
        error = refused(lambda: device.compile(damaged), CompileError)
        assert error.code == "not_taken"
        """,
        DRIVETRAIN_OPENCL_BINARY_ONLY="1",
    )


@platform
def test_settings_are_checked_and_switch_groups_off(run: Run) -> None:
    run(
        """
        assert "timing" in backend.groups
        first, last = stream.record(), stream.record()
        last.synchronize(60)
        assert last.seconds_since(first) >= 0
        assert backend.target.kind == "opencl" and backend.target.arch[0] in "123"
        assert backend.target.version.count(" / ") == 3
        free, total = backend.memory()
        assert 0 < free <= total
        """
    )
    run(
        """
        assert "timing" not in backend.groups
        first, last = stream.record(), stream.record()
        last.synchronize(60)
        refused(lambda: last.seconds_since(first), Unsupported)
        """,
        DRIVETRAIN_OPENCL_PROFILING="0",
    )
    with pytest.raises(AssertionError, match="must be one of svm, usm, buffers"):
        run("", DRIVETRAIN_OPENCL_MEMORY="fast")


@platform
def test_threads_that_launch_one_kernel_do_not_mix_their_arguments(run: Run) -> None:
    """From C, and from Python as a captured launch goes."""
    run(
        """
        text = "__kernel void tell(__global int *out, int value) { out[get_global_id(0)] = value; }"
        kernel = device.compile(hal.Source.opencl(text)).kernel("tell", [hal.PTR, hal.I32])
        wrong, start = [], threading.Barrier(6)

        def work(number):
            mine = device.stream()
            buffer = device.alloc(256, stream=mine)
            with mine.capture() as graph:
                kernel(mine, 1, 64, buffer, 1000 + number)
            start.wait(60)
            for round in range(60):
                if round % 2:
                    graph.launch(mine)
                    wanted = 1000 + number
                else:
                    wanted = 100 * number + round
                    kernel(mine, 1, 64, buffer, wanted)
                out = bytearray(256)
                buffer.copy_to(out, stream=mine)
                mine.synchronize(60)
                if set(memoryview(out).cast("i")) != {wanted}:
                    wrong.append((number, round))

        threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert not wrong, wrong
        """
    )


@platform
def test_dynamic_local_memory_has_the_size_that_a_launch_asks_for(run: Run) -> None:
    run(
        """
        text = '''__kernel void turn(__global int *data, int n, __local int *room) {
            for (int i = get_local_id(0); i < n; i += get_local_size(0)) room[i] = data[i];
            barrier(CLK_LOCAL_MEM_FENCE);
            for (int i = get_local_id(0); i < n; i += get_local_size(0)) data[i] = room[n - 1 - i];
        }'''
        kernel = device.compile(hal.Source.opencl(text)).kernel("turn", [hal.PTR, hal.I32])
        for n in (1, 4, 64, 1000, 5000):
            buffer = holding(list(range(n)), "i")
            kernel(stream, 1, 32, buffer, n, shared=4 * n)
            assert read(buffer, "i") == list(range(n))[::-1], n
            with stream.capture() as graph:  # launched from Python
                kernel(stream, 1, 32, buffer, n, shared=4 * n)
            graph.launch(stream)
            assert read(buffer, "i") == list(range(n)), n
        """
    )


@platform
def test_products_of_each_type_any_strides_and_ragged_sizes_are_numpys(run: Run) -> None:
    """And the control: another product is not taken for them."""
    run(
        """
        import numpy as np
        from drivetrain.hal import ops
        rng = np.random.default_rng(0)
        def product(name, m, n, k, turn_a, turn_b, batch=()):
            kind = np.dtype(name)
            def made(rows, columns):
                if kind.kind == "f":
                    return rng.standard_normal((*batch, rows, columns)).astype(kind)
                least, most = np.iinfo(kind).min, np.iinfo(kind).max
                return rng.integers(least, most, (*batch, rows, columns), kind, endpoint=True)
            a, b = made(*((k, m) if turn_a else (m, k))), made(*((n, k) if turn_b else (k, n)))
            x, y = (ops.asarray(each, device=device) for each in (a, b))
            x, y = x.mT if turn_a else x, y.mT if turn_b else y
            a, b = a.swapaxes(-1, -2) if turn_a else a, b.swapaxes(-1, -2) if turn_b else b
            found = np.from_dlpack(ops.matmul(x, y).to("cpu:0"))
            if kind.kind != "f":
                wanted = np.matmul(a, b)
                assert (found == wanted).all(), (name, m, n, k)
                return found, wanted
            wanted = np.matmul(a.astype("d"), b.astype("d"))
            near = {2: 1e-3, 4: 1e-5, 8: 1e-13}[kind.itemsize]
            assert np.allclose(found, wanted, near, near * k ** 0.5), (name, m, n, k)
            return found, wanted
        for sizes in ((1, 1, 1), (7, 1, 300), (9, 33, 17), (130, 131, 259)):
            for turns in ((0, 0), (1, 0), (0, 1), (1, 1)):
                found, wanted = product("float32", *sizes, *turns)
        assert not np.allclose(found, wanted.T[::-1].T, 1e-3, 1e-3)
        product("float32", 1100, 1030, 8, 0, 1)  # large tiles
        product("float32", 5, 6, 7, 1, 1, (2, 3))
        for name in ("float16", "int8", "uint64"):
            product(name, 9, 33, 300, 0, 1)
        """
    )


@platform
def test_the_kits_checks_of_memory_hold_without_shared_addresses(run: Run) -> None:
    """All but those that give a kernel a part of a buffer from an odd address."""
    found = run(
        """
        from drivetrain.hal.conformance import check, running
        topics = ("memory", "copies", "events", "graphs")
        names = [c.name for c in check.checks() if c.topic in topics and not c.long]
        report = running.run(device, only=names)
        tell(failed=[(r.name, r.reason) for r in report.results if r.state == "failed"],
             passed=sum(r.state == "passed" for r in report.results))
        """,
        DRIVETRAIN_OPENCL_MEMORY="buffers",
    )
    assert found["failed"] == []
    assert found["passed"] > 25


# -- what is written for the platform's compiler ---------------------------------------------------


def test_options_travel_in_the_first_line_and_no_others_than_ours_are_read() -> None:
    target = Target("opencl", "3.0", ("fp64",), "v")
    source = hal.Source.opencl("__kernel void k() {}\n", name="a.cl", defines={"N": 4})
    for given, wanted in (
        ((), ["-cl-std=CL3.0"]),
        (("--use_fast_math",), ["-cl-std=CL3.0", "-cl-fast-relaxed-math"]),
        (("--fmad=true", "-O0"), ["-cl-std=CL3.0", "-cl-mad-enable", "-cl-opt-disable"]),
    ):
        made = compiler.build(source, target, read_options(given, source.defines))
        text = made.code.decode()
        assert compiler.options_of(text) == wanted
        assert made.form == "cl"
        assert text.splitlines()[1:] == ["#define N 4", '#line 1 "a.cl"', "__kernel void k() {}"]
    assert compiler.options_of("// drivetrain: -I/etc -cl-mad-enable -DX\nint x;") == [
        "-cl-mad-enable"
    ]
    assert compiler.options_of("__kernel void k() {}") == []
    newer = compiler.build(source, Target("opencl", "3.1", (), "v"), read_options(()))
    assert compiler.options_of(newer.code.decode()) == ["-cl-std=CL3.0"]


def test_a_translation_is_of_opencl_c_1_2_and_tells_its_kernels() -> None:
    target = Target("opencl", "3.0", ("fp64",), "v")
    source = hal.Source.cuda('extern "C" __global__ void k(float *x, int n) { x[n] = 1.0f; }')
    made = compiler.build(source, target, read_options(()))
    assert compiler.options_of(made.code.decode()) == ["-cl-std=CL1.2"]
    [facts] = made.kernels.values()
    assert [param.type for param in facts.params] == ["ptr", "i32"]
    assert '#line 1 "kernel.cu"' in made.code.decode()
    assert compiler.identity(source, target) != compiler.identity(
        hal.Source.opencl("__kernel void k() {}"), target
    )
    with pytest.raises(BadInput):
        hal.Source.opencl("")
