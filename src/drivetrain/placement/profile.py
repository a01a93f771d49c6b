"""Measures one device: ``python -m drivetrain.placement.profile REQUEST``, in a worker of its own.

Writes JSON lines to standard output: ``{"progress", "share"}`` while it works, then ``{"result"}``
or ``{"error"}``. Peaks are medians of several rounds on random data: zeros draw less power and
look faster.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

_ROUNDS = 7
_LONG_ENOUGH_S = 0.02
_TOO_LONG_S = 0.25
_LARGEST = {"cpu": 2048, "cuda": 8192}
_COPY_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}
_LAUNCHES = 2000


def _say(**facts: Any) -> None:
    sys.__stdout__.write(json.dumps(facts) + "\n")  # type: ignore[union-attr]
    sys.__stdout__.flush()  # type: ignore[union-attr]


class _Bench:
    """Times work on one torch device, waiting for it to end."""

    def __init__(self, torch: Any, device: str) -> None:
        self.torch, self.device = torch, torch.device(device)
        self.kind = self.device.type

    def wait(self) -> None:
        if self.kind != "cpu":
            self.torch.accelerator.synchronize()

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


def _gemm_flops(bench: _Bench, dtype: Any) -> float:
    """Operations/s (2 n^3 a product) at the size where one product takes long enough to time."""
    torch = bench.torch
    largest = _LARGEST.get(bench.kind, 4096)
    n = 256
    while True:
        a, b = (torch.randn(n, n, device=bench.device).to(dtype) for _ in range(2))
        out = torch.empty(n, n, device=bench.device, dtype=dtype)

        def product(out: Any = out, a: Any = a, b: Any = b) -> None:
            torch.matmul(a, b, out=out)

        product()
        once = bench.seconds(product)
        if 2 * n > largest or once >= _LONG_ENOUGH_S or 8 * once > _TOO_LONG_S:
            break
        n *= 2
    repeats = max(1, int(_LONG_ENOUGH_S / max(once, 1e-6)))
    return float(2 * n**3 / bench.median_s(product, repeats))


def _copy_gbps(bench: _Bench) -> float:
    size = _COPY_BYTES.get(bench.kind, 256 << 20)
    source = bench.torch.ones(size, dtype=bench.torch.uint8, device=bench.device)
    target = bench.torch.empty_like(source)
    return float(size / bench.median_s(lambda: target.copy_(source)) / 1e9)


def _launch_us(bench: _Bench) -> float:
    one = bench.torch.zeros(1, device=bench.device)
    return float(bench.median_s(lambda: one.add_(1.0), _LAUNCHES) * 1e6)


def _host_links(bench: _Bench) -> dict[str, float]:
    """Pinned copies to and from the host; nothing on the CPU, which is the host."""
    if bench.kind != "cuda":
        return {}
    size = 256 << 20
    host = bench.torch.empty(size, dtype=bench.torch.uint8, pin_memory=True)
    mine = bench.torch.empty(size, dtype=bench.torch.uint8, device=bench.device)
    return {
        "from host": size / bench.median_s(lambda: mine.copy_(host, non_blocking=True)) / 1e9,
        "to host": size / bench.median_s(lambda: host.copy_(mine, non_blocking=True)) / 1e9,
    }


def _dtypes(torch: Any, kind: str) -> list[tuple[str, Any]]:
    found = [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float64", torch.float64)]
    if kind == "cuda":
        found = [("tf32", torch.float32), ("float16", torch.float16), *found]
    return found


def measure_device(request: dict[str, Any]) -> dict[str, Any]:
    """Peaks of the device that the request names, in the fields of ``Calibration``."""
    cpus = request.get("cpus")
    if cpus and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cpus)  # before torch starts its threads
    import torch

    if request["torch_device"] == "cpu":
        torch.set_num_threads(int(request.get("threads") or 1))
    bench = _Bench(torch, request["torch_device"])
    dtypes = _dtypes(torch, bench.kind)
    steps = len(dtypes) + 3
    peaks: dict[str, float] = {}
    for done, (name, dtype) in enumerate(dtypes):
        _say(progress=f"matrix product in {name}", share=done / steps)
        if bench.kind == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        try:
            peaks[name] = _gemm_flops(bench, dtype)
        except (RuntimeError, NotImplementedError) as error:
            if bench.kind != "cpu" and "not implemented" not in str(error).lower():
                raise
            print(f"{name}: {error}", file=sys.stderr)  # a dtype that this device does not have
    _say(progress="copy bandwidth", share=(steps - 3) / steps)
    copy = _copy_gbps(bench)
    _say(progress="launch latency", share=(steps - 2) / steps)
    launch = _launch_us(bench)
    _say(progress="links to the host", share=(steps - 1) / steps)
    links = _host_links(bench)
    return {
        "torch_version": str(torch.__version__),
        "peak_flops": peaks,
        "copy_gbps": copy,
        "launch_us": launch,
        "links": links,
    }


def measure_links(request: dict[str, Any]) -> dict[str, Any]:
    """[source, target, GB/s] for each ordered pair of the CUDA devices that are visible."""
    import torch

    count = int(request["count"])
    if torch.cuda.device_count() != count:
        raise RuntimeError(f"torch sees {torch.cuda.device_count()} of {count} devices")
    size = 256 << 20
    buffers = [torch.zeros(size, dtype=torch.uint8, device=f"cuda:{i}") for i in range(count)]
    pairs = [(s, t) for s in range(count) for t in range(count) if s != t]
    found = []
    for done, (s, t) in enumerate(pairs):
        _say(progress=f"link {s} -> {t}", share=done / len(pairs))
        source, target = buffers[s], buffers[t]
        times = []
        for _ in range(_ROUNDS + 1):
            torch.cuda.synchronize(s)
            torch.cuda.synchronize(t)
            start = time.perf_counter()
            target.copy_(source, non_blocking=True)
            torch.cuda.synchronize(s)
            torch.cuda.synchronize(t)
            times.append(time.perf_counter() - start)
        found.append([s, t, size / statistics.median(times[1:]) / 1e9])
    return {"links": found}


def main(arguments: list[str]) -> int:
    request = json.loads(arguments[0])
    task = {"device": measure_device, "links": measure_links}[request["task"]]
    try:
        result = task(request)
    except ImportError as error:
        _say(error=f"{error}; install it with: pip install 'drivetrain[torch]'")
        return 1
    except Exception as error:  # The border of the process: the parent tells the reason.
        _say(error=f"{type(error).__name__}: {error}")
        return 1
    _say(progress="done", share=1.0)
    _say(result=result)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
