"""The peers' ways to do the same things; what is not installed is named and left out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.hal.common import Call, HalReport, Statement, Way
from drivetrain import hal

SOURCE = """
extern "C" __global__ void add(float* x, const float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) x[i] += y[i];
}
"""
SPIN = """
extern "C" __global__ void spin(float* x, int n) {
    float v = x[0];
    for (int i = 0; i < n; i++) v = v * 0.9999f + 1e-3f;
    x[0] = v;
}
"""
OPENCL = """__kernel void spin(__global float* x, int n) {
    float v = x[0];
    for (int i = 0; i < n; i++) v = v * 0.9999f + 1e-3f;
    x[0] = v;
}
__kernel void add(__global float* x, __global const float* y, int n) {
    int i = get_global_id(0);
    if (i < n) x[i] += y[i];
}"""

Ways = dict[str, Way]


def cuda(report: HalReport, bench: Any, alloc_bytes: int) -> tuple[Ways, Ways, Ways]:
    """(launch, memory, event) of torch, CuPy and cuda.core, on the GPU of ``bench``."""
    launch: Ways = {}
    memory: Ways = {}
    event: Ways = {}
    for name, add in (("torch with CUDA", _torch), ("CuPy", _cupy), ("cuda.core", _cuda_core)):
        try:
            add(bench, alloc_bytes, launch, memory, event)
        except Exception as error:  # peers are others' software: whatever it is, it is told
            report.missing(name, f"{type(error).__name__}: {error}")
    return launch, memory, event


def _torch(bench: Any, nbytes: int, launch: Ways, memory: Ways, event: Ways) -> None:
    import torch

    where = f"cuda:{bench.device.index}"
    x, y = torch.zeros(256, device=where), torch.zeros(256, device=where)
    launch["torch.add(out=)"] = Statement("add(x, y, out=x)", add=torch.add, x=x, y=y)
    memory["torch.empty"] = Statement(
        "empty(n, device=where)", empty=torch.empty, n=nbytes // 4, where=torch.device(where)
    )
    mark = torch.cuda.Event()
    with torch.cuda.device(where):
        mark.record()
    event["torch event.record()"] = Statement("mark.record()", mark=mark)


def _cupy(bench: Any, nbytes: int, launch: Ways, memory: Ways, event: Ways) -> None:
    import cupy

    cupy.cuda.Device(bench.device.index).use()
    kernel = cupy.RawKernel(SOURCE, "add")
    x, y, n = cupy.zeros(256, np.float32), cupy.zeros(256, np.float32), np.int32(256)
    kernel((1,), (256,), (x, y, n))
    launch["CuPy RawKernel"] = Statement(
        "kernel((1,), (256,), (x, y, n))", kernel=kernel, x=x, y=y, n=n
    )
    pool = cupy.get_default_memory_pool()
    memory["CuPy pool.malloc + free"] = Statement("pool.malloc(n)", pool=pool, n=nbytes)


def _cuda_core(bench: Any, nbytes: int, launch: Ways, memory: Ways, event: Ways) -> None:
    from cuda import core

    if not hasattr(core, "Device"):
        from cuda.core import experimental as core
    device = core.Device(bench.device.index)
    device.set_current()
    stream = device.create_stream()
    options = core.ProgramOptions(arch=bench.stream._opened.backend.target.arch)
    program = core.Program(SOURCE, code_type="c++", options=options)
    found = program.compile("cubin").get_kernel("add")
    config = core.LaunchConfig(grid=1, block=256)
    px, py, pn = bench.x.ptr, bench.y.ptr, np.int32(256)
    core.launch(stream, config, found, px, py, pn)
    launch["cuda.core launch"] = Statement(
        "launch(stream, config, found, px, py, pn)",
        launch=core.launch, stream=stream, config=config, found=found, px=px, py=py, pn=pn,
    )  # fmt: skip
    resource = device.memory_resource
    resource.allocate(nbytes, stream=stream).close()
    memory["cuda.core pool"] = Statement(
        "resource.allocate(n, stream=stream).close()", resource=resource, n=nbytes, stream=stream
    )


def vendors() -> None:
    """Where NVIDIA's OpenCL is present but registered nowhere, register it for this process."""
    if os.environ.get("OCL_ICD_VENDORS") or os.environ.get("OCL_ICD_FILENAMES"):
        return
    folder = Path("/etc/OpenCL/vendors")
    known = [file.read_text(errors="replace") for file in folder.glob("*.icd")]
    if any("nvidia" in text for text in known):
        return
    import ctypes
    import tempfile

    try:
        ctypes.CDLL("libnvidia-opencl.so.1")
    except OSError:
        return
    made = Path(tempfile.mkdtemp(prefix="drivetrain-vendors-"))
    (made / "nvidia.icd").write_text("libnvidia-opencl.so.1\n")
    for number, text in enumerate(known):
        (made / f"known-{number}.icd").write_text(text)
    os.environ["OCL_ICD_VENDORS"] = str(made)


class OpenCL:
    """pyopencl on the platform of a HAL device. Raises ImportError, LookupError."""

    def __init__(self, device: hal.Device, source: str = OPENCL) -> None:
        import pyopencl as cl

        self.cl = cl
        all_devices = [d for p in cl.get_platforms() for d in p.get_devices()]
        same = [d for d in all_devices if d.name.strip() == device.name.strip()]
        if not same:
            known = ", ".join(d.name for d in all_devices) or "no device"
            raise LookupError(f"pyopencl does not see {device.name!r} (it sees {known})")
        self.device = same[0]
        self.context = cl.Context([self.device])
        self.queue = cl.CommandQueue(self.context)
        self.program = cl.Program(self.context, source).build()
        self.kept: list[Any] = []

    def buffer(self, array: Any) -> Any:
        flags = self.cl.mem_flags.READ_WRITE | self.cl.mem_flags.COPY_HOST_PTR
        return self.cl.Buffer(self.context, flags, hostbuf=array)

    def read(self, buffer: Any, like: Any) -> Any:
        found = np.empty_like(like)
        self.cl.enqueue_copy(self.queue, found, buffer)
        self.queue.finish()
        return found

    def spin(self, count: int) -> Call:
        """Keeps the queue busy; see ``Bench.hold``."""
        kernel, x = self.cl.Kernel(self.program, "spin"), self.buffer(np.ones(1, np.float32))
        kernel.set_args(x, np.int32(count))
        self.kept.append(x)  # a kernel does not keep its arguments alive

        def hold() -> None:
            self.cl.enqueue_nd_range_kernel(self.queue, kernel, (1,), (1,))
            self.queue.flush()

        return hold

    def launches(self) -> Ways:
        """A launch with its arguments, and of arguments that were set before. Each makes an event:
        pyopencl has no launch without one."""
        x, y = (self.buffer(np.zeros(256, np.float32)) for _ in range(2))
        kernel, other, n = (*(self.cl.Kernel(self.program, "add") for _ in range(2)), np.int32(256))
        other.set_args(x, y, n)
        queue, enqueue = self.queue, self.cl.enqueue_nd_range_kernel
        return {
            "pyopencl kernel(...)": Statement(
                "kernel(queue, (256,), (256,), x, y, n)", kernel=kernel, queue=queue, x=x, y=y, n=n
            ),
            "pyopencl enqueue, arguments set": Statement(
                "enqueue(queue, other, (256,), (256,))", enqueue=enqueue, queue=queue, other=other
            ),
        }

    def memory(self, nbytes: int) -> Ways:
        tools = __import__("pyopencl.tools", fromlist=["MemoryPool"])
        pool = tools.MemoryPool(tools.ImmediateAllocator(self.queue))
        pool.allocate(nbytes).release()
        return {"pyopencl MemoryPool": Statement("pool.allocate(n).release()", pool=pool, n=nbytes)}

    def events(self) -> Ways:
        marker, queue = self.cl.enqueue_marker, self.queue
        return {"pyopencl enqueue_marker": Statement("marker(queue)", marker=marker, queue=queue)}
