"""Measures one device: ``python -m drivetrain.placement.profile REQUEST``, in a worker of its own.

Writes JSON lines to standard output: ``{"progress", "share"}`` while it works, then ``{"result"}``
or ``{"error"}``. Peaks are medians of several rounds on random data: zeros draw less power and
look faster. The HAL measures with its own kernels and the vendor's BLAS; torch is imported only by
the task ``torch``, for types of numbers that neither does as well as the device can.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from drivetrain.hal.device import Device
    from drivetrain.hal.stream import Stream

_ROUNDS = 7
_LONG_ENOUGH_S = 0.02
_TOO_LONG_S = 0.25
_LARGEST = {"cpu": 2048, "cuda": 8192}
_COPY_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}
_HOST_BYTES = 256 << 20
_LAUNCHES = 2000


def _say(**facts: Any) -> None:
    sys.__stdout__.write(json.dumps(facts) + "\n")  # type: ignore[union-attr]
    sys.__stdout__.flush()  # type: ignore[union-attr]


class _Clock:
    """Times work that is queued, waiting for it to end."""

    def __init__(self, wait: Callable[[], Any]) -> None:
        self.wait = wait

    def seconds(self, work: Callable[[], Any], repeats: int = 1) -> float:
        self.wait()
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        self.wait()
        return (time.perf_counter() - start) / repeats

    def median_s(self, work: Callable[[], Any], repeats: int = 1) -> float:
        work()
        return statistics.median(self.seconds(work, repeats) for _ in range(_ROUNDS))


def _gemm_flops(
    clock: _Clock, largest: int, product_of: Callable[[int], Callable[[], Any]]
) -> float:
    """Operations/s (2 n^3 a product) at the size where one product takes long enough to time;
    ``product_of`` makes the product of two matrices of that size."""
    n = 256
    while True:
        product = product_of(n)
        product()
        once = clock.seconds(product)
        if 2 * n > largest or once >= _LONG_ENOUGH_S or 8 * once > _TOO_LONG_S:
            break
        n *= 2
    repeats = max(1, int(_LONG_ENOUGH_S / max(once, 1e-6)))
    return float(2 * n**3 / clock.median_s(product, repeats))


# -- by the HAL ------------------------------------------------------------------------------------


def _device(driver: str, uuid: str) -> Device:
    from drivetrain import hal

    found = [each for each in hal.devices(driver) if each.uuid == uuid]
    if not found:
        raise RuntimeError(f"this process does not see the {driver} device {uuid}")
    return found[0]


def _dtypes(device: Device) -> tuple[list[str], list[str]]:
    """Types that the HAL measures, and those that it leaves to torch."""
    from drivetrain.hal import blas
    from drivetrain.hal.opened import opened

    here = opened(device)
    library = blas.backend(here).blas
    known = library.dtypes if library is not None else frozenset()
    asked = ["float32"]
    if here.backend.target.kind != "opencl" or "fp64" in here.backend.target.features:
        asked.append("float64")
    if device.driver in ("cpu", "cuda", "hip"):  # torch has these, too
        asked.append("bfloat16")
    if device.driver in ("cuda", "hip"):
        asked.append("float16")
    if device.driver == "cuda":
        asked.append("tf32")
    plain = ("float32", "float64")  # ours are good at these; the others have units of their own
    mine = [t for t in asked if t in known or t in plain or (t == "tf32" and library is not None)]
    return mine, [t for t in asked if t not in mine]


def _products(stream: Stream, name: str) -> Callable[[int], Callable[[], Any]]:
    from drivetrain.hal import ops
    from drivetrain.hal.product import multiply

    dtype = "float32" if name == "tf32" else name

    def product_of(n: int) -> Callable[[], Any]:
        a, b = (ops.random.normal((n, n), seed=i, dtype=dtype, stream=stream) for i in (1, 2))
        out = ops.empty((n, n), dtype=dtype, stream=stream)
        return lambda: multiply(out, a, b, stream=stream, tf32=name == "tf32")

    return product_of


def _copy_gbps(clock: _Clock, stream: Stream) -> tuple[float, str]:
    """GB/s by the driver's copy or a kernel of ours, whichever is faster, and which it was."""
    from drivetrain.hal import ops

    size = _COPY_BYTES.get(stream.device.driver, 256 << 20)
    source = ops.random.bits(size // 4, seed=1, stream=stream)
    target = ops.empty_like(source)
    ours = clock.median_s(lambda: target.assign(source))
    into, out_of = target.memory.buffer, source.memory.buffer
    theirs = clock.median_s(lambda: into.copy_from(out_of, stream=stream))
    return size / min(ours, theirs) / 1e9, "own" if ours < theirs else "the driver's copy"


def _launch_us(clock: _Clock, stream: Stream) -> float:
    from drivetrain.hal.kernels import elementwise, family

    found = family.kernel(stream.device, "saxpy", elementwise.saxpy_source)
    with stream.device.alloc(64, stream=stream) as buffer:
        buffer.fill(b"\0" * 4, stream=stream)
        return clock.median_s(lambda: found(stream, 1, 1, buffer, buffer, 1.0, 1), _LAUNCHES) * 1e6


def _host_links(clock: _Clock, stream: Stream) -> dict[str, float]:
    """Pinned copies to and from the host; nothing on the CPU, which is the host."""
    from drivetrain import hal
    from drivetrain.hal.opened import opened

    device = stream.device
    if device.driver == "cpu" or "pinned" not in opened(device).backend.groups:
        return {}
    pinned = hal.MemoryKind.PINNED
    with (
        device.alloc(_HOST_BYTES, stream=stream, kind=pinned) as host,
        device.alloc(_HOST_BYTES, stream=stream) as mine,
    ):
        mine.fill(b"\x5a", stream=stream)
        to = clock.median_s(lambda: host.copy_from(mine, stream=stream))
        back = clock.median_s(lambda: mine.copy_from(host, stream=stream))
    return {"from host": _HOST_BYTES / back / 1e9, "to host": _HOST_BYTES / to / 1e9}


def measure_device(request: dict[str, Any]) -> dict[str, Any]:
    """Peaks of the device that the request names, in the fields of ``Calibration``; ``left`` are
    the types of numbers that torch may measure."""
    _keep_to(request.get("cpus"))
    device = _device(request["driver"], request["uuid"])
    stream = device.stream()
    clock = _Clock(stream.synchronize)
    from drivetrain.hal import blas
    from drivetrain.hal.opened import opened

    choice = blas.backend(opened(device))
    known = choice.blas.dtypes if choice.blas is not None else frozenset()
    dtypes, left = _dtypes(device)
    steps = len(dtypes) + 3
    peaks: dict[str, float] = {}
    told: dict[str, str] = {}
    for done, name in enumerate(dtypes):
        _say(progress=f"matrix product in {name}", share=done / steps)
        largest = _LARGEST.get(device.driver, 4096)
        peaks[name] = _gemm_flops(clock, largest, _products(stream, name))
        told[name] = choice.name if name in known or name == "tf32" else "own"
    _say(progress="copy bandwidth", share=(steps - 3) / steps)
    copy, told["copy"] = _copy_gbps(clock, stream)
    _say(progress="launch latency", share=(steps - 2) / steps)
    launch, told["launch"] = _launch_us(clock, stream), "own"
    _say(progress="links to the host", share=(steps - 1) / steps)
    return {
        "peak_flops": peaks,
        "copy_gbps": copy,
        "launch_us": launch,
        "links": _host_links(clock, stream),
        "measured_with": told,
        "left": left,
    }


def _keep_to(cpus: list[int] | None) -> None:
    """Run on these cores only; before any library starts its threads."""
    if cpus and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cpus)


def measure_links(request: dict[str, Any]) -> dict[str, Any]:
    """[source, target, GB/s] for each ordered pair of devices between which there is a way."""
    devices = [_device(driver, uuid) for driver, uuid in request["devices"]]
    count = len(devices)
    pairs = [(s, t) for s in range(count) for t in range(count) if s != t]
    found = []
    for done, (s, t) in enumerate(pairs):
        _say(progress=f"link {s} -> {t}", share=done / len(pairs))
        gbps = devices[s].link(devices[t]).bandwidth_gbps
        if gbps is not None:
            found.append([s, t, gbps])
    return {"links": found}


# -- by torch --------------------------------------------------------------------------------------


def measure_torch(request: dict[str, Any]) -> dict[str, Any]:
    """Matrix products in the types that the request names; those that torch cannot are left out."""
    _keep_to(request.get("cpus"))
    import torch

    device = torch.device(request["torch_device"])
    if device.type == "cpu":
        torch.set_num_threads(int(request.get("threads") or 1))
    clock = _Clock(torch.accelerator.synchronize if device.type != "cpu" else lambda: None)
    peaks: dict[str, float] = {}
    for done, name in enumerate(request["dtypes"]):
        _say(progress=f"matrix product in {name}", share=done / len(request["dtypes"]))
        dtype = torch.float32 if name == "tf32" else getattr(torch, name)
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"

        def product_of(n: int, dtype: Any = dtype) -> Callable[[], Any]:
            a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
            out = torch.empty(n, n, device=device, dtype=dtype)
            return lambda: torch.matmul(a, b, out=out)

        try:
            peaks[name] = _gemm_flops(clock, _LARGEST.get(device.type, 4096), product_of)
        except (RuntimeError, NotImplementedError) as error:
            if device.type != "cpu" and "not implemented" not in str(error).lower():
                raise
            print(f"{name}: {error}", file=sys.stderr)  # a dtype that this device does not have
    return {"torch_version": str(torch.__version__), "peak_flops": peaks}


def main(arguments: list[str]) -> int:
    request = json.loads(arguments[0])
    tasks = {"device": measure_device, "links": measure_links, "torch": measure_torch}
    try:
        result = tasks[request["task"]](request)
    except ImportError as error:
        extra = "torch" if request["task"] == "torch" else "kernels"
        _say(error=f"{error}; install it with: pip install 'drivetrain[{extra}]'")
        return 1
    except Exception as error:  # The border of the process: the parent tells the reason.
        _say(error=f"{type(error).__name__}: {error}")
        return 1
    _say(progress="done", share=1.0)
    _say(result=result)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
