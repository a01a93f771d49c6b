"""Everything that needs a GPU: the marked tests, the CUDA backend's own checks, floor 1's
benchmarks, a failover, moves of 10 GiB.

Run through `make gpu-check`. With two GPUs also the move between them, in workers that do not see
each other's device. Ends 1 when a gate is missed or a check fails.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import Gate, Report, spread  # noqa: E402

STATE_GIB = 10.0
STEP_S = 0.05
PEER_MS = 250.0
STAGED_MS = 500.0
STAGED_SHARE, LINK_GBPS = 0.9, 54.0
"""Of the link: what pinned memory reaches in this run, and no more than was seen at the best."""
LINK_BYTES = 1 << 30
HAL = (
    ("hal_launch", "cuda"),
    ("hal_launch", "opencl"),
    ("hal_copies", "cuda"),
    ("hal_workloads", "cuda"),
)
"""Benchmarks of floor 1, and the parts that need a GPU."""
HAL_LIMIT_S = 120.0
_FAILED: list[str] = []


def _check(name: str, true: bool, detail: str = "") -> None:
    print(f"  {'ok       ' if true else 'FAILED   '} {name} {detail}", flush=True)
    if not true:
        _FAILED.append(name)


def _stage(name: str, run: Callable[[], None]) -> None:
    began = time.monotonic()
    print(f"== {name}", flush=True)
    try:
        run()
    except Exception as error:
        traceback.print_exc()
        _check(name, False, f"{type(error).__name__}: {error}")
    print(f"   ({time.monotonic() - began:.0f} s)", flush=True)


def _tests() -> None:
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, str(ROOT / "tests")], check=False, cwd=ROOT)
    _check("tests marked gpu", done.returncode in (0, 5))


def _backend() -> None:
    """What the kit does not ask of CUDA: the caller's context, torch's streams, a stray kernel."""
    script = ROOT / "tools/hal_gpu_try.py"
    done = subprocess.run([sys.executable, str(script)], check=False, cwd=ROOT, timeout=120)
    _check("the cuda backend's own checks", done.returncode == 0, f"ended {done.returncode}")


def _until(job: Any, step: int, limit_s: float = 240.0) -> None:
    deadline = time.monotonic() + limit_s
    while job.step < step and job.wait(0.1) is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"the job stands at step {job.step}")
    if job.exit_code is not None:
        raise RuntimeError((job.directory / "logs" / "err").read_text(errors="replace")[-3000:])


def _told(move: dict[str, Any]) -> None:
    print(f"  {move['from']} -> {move['to']}: {json.dumps(move)}", flush=True)


def _small(runtime: Any, gpus: list[str]) -> None:
    """The digits job on a GPU: to the CPU and back, killed, ended; every hash equal."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        script = ROOT / "src/drivetrain/cli/demo/train_digits.py"
        arguments = [str(result), "--epochs", "200"]
        job = runtime.submit(script, arguments, on=gpus[0], backup=[gpus[-1]])
        _until(job, 200)
        for to, strategy in (("cpu:0", "immediate"), (gpus[-1], "checkpointed")):
            move = job.migrate(to, strategy)
            _told(move)
            same = move["ok"] and move["hash_source"] == move["hash_target"] != ""
            _check(f"digits {move['from']} -> {to} {strategy}", same)
            _until(job, job.step + 20)
        os.kill(job.report()["workers"][0]["pid"], signal.SIGKILL)
        before = time.monotonic()
        while not job.report()["failovers"] and time.monotonic() - before < 60:
            time.sleep(0.1)
        lost = job.report()["failovers"]
        print(f"  failover: {json.dumps(lost)}", flush=True)
        _check("failover on the GPU", bool(lost) and lost[0]["ok"])
        job.wait()
        found = json.loads(result.read_text()) if result.exists() else {}
        right = found.get("samples_lost") == found.get("samples_doubled") == 0
        _check("digits: nothing lost or doubled", right, f"accuracy {found.get('accuracy')}")
        replica = job.report()["replica"]
        print(f"  replicas: {json.dumps(replica)}", flush=True)


def _link(address: str) -> dict[str, list[float]]:
    """GB/s of copies between a GPU and pinned memory, both ways, nine rounds of each."""
    from drivetrain import hal

    device = hal.device(address)
    found: dict[str, list[float]] = {"from": [], "to": []}
    with device.stream() as stream:
        on = device.alloc(LINK_BYTES, stream=stream)
        off = device.alloc(LINK_BYTES, stream=stream, kind=hal.MemoryKind.PINNED)
        for _ in range(10):
            for way, into, out_of in (("from", off, on), ("to", on, off)):
                stream.synchronize()
                began = time.perf_counter()
                into.copy_from(out_of, stream=stream)
                stream.synchronize()
                found[way].append(LINK_BYTES / (time.perf_counter() - began) / 1e9)
    return {way: rates[1:] for way, rates in found.items()}


ROUNDS = {"staged": 5, "peer": 3}
"""Moves there and back; the ones through the host vary more."""


def _large(runtime: Any, gpus: list[str], report: Report, quick: bool) -> None:
    """10 GiB: GPU to GPU by peer copy, and through the host to the CPU and back."""
    link = _link(gpus[0])
    script = ROOT / "benchmarks/state_job.py"
    job = runtime.submit(script, [str(STATE_GIB), str(STEP_S)], on=gpus[0], replicas=False)
    _until(job, 20)
    routes = [("staged", [("cpu:0", gpus[0])])]
    if len(gpus) > 1:
        routes.append(("peer", [(gpus[1], gpus[0])]))
    for kind, legs in routes:
        times: dict[str, list[float]] = {}
        rates: dict[str, list[float]] = {}
        for _ in range(1 if quick else ROUNDS[kind]):
            for there, back in legs:
                for to in (there, back):
                    move = job.migrate(to)
                    _told(move)
                    key = f"{move['from']} -> {to}"
                    times.setdefault(key, []).append(move["downtime_ms"])
                    rates.setdefault(key, []).append(move["bandwidth_gbps"])
                    same = move["hash_source"] == move["hash_target"]
                    _check(f"hash of {key}", same)
                    if kind == "peer":
                        _check("copied by peer", move["path"] == "peer", move["path"])
                    _until(job, job.step + 10)
        for key, values in times.items():
            limit = PEER_MS if kind == "peer" else STAGED_MS
            rate = statistics.median(rates[key])
            report.add(
                Gate(
                    f"10 GiB {key} ({kind})",
                    statistics.median(values),
                    limit,
                    "ms",
                    detail=f"{rate:.1f} GB/s",
                )
            )
            if kind == "staged":
                way = link["from" if key.startswith(gpus[0]) else "to"]
                best = min(LINK_GBPS, statistics.median(way))
                gate = Gate(
                    f"10 GiB {key}: the link's rate over the move's",
                    best / rate,
                    1 / STAGED_SHARE,
                    "x",
                    spread(rates[key]),
                    1 / STAGED_SHARE - 1,
                    f"the link {best:.1f} GB/s",
                )
                report.add(gate)
    job.stop()


def _hal() -> None:
    """The benchmarks of floor 1, each in a process of its own, with a limit."""
    quick = ["--quick"] if "--quick" in sys.argv else []
    for name, *parts in HAL:
        script = ROOT / f"benchmarks/bench_{name}.py"
        command = [sys.executable, str(script), *quick, *parts]
        try:
            done = subprocess.run(command, check=False, cwd=ROOT, timeout=HAL_LIMIT_S)
            _check(f"{name} {' '.join(parts)}", done.returncode == 0, f"ended {done.returncode}")
        except subprocess.TimeoutExpired:
            _check(f"{name} {' '.join(parts)}", False, f"not done within {HAL_LIMIT_S:g} s")


def main() -> int:
    report = Report("gpu")
    with tempfile.TemporaryDirectory(dir=os.environ.get("DRIVETRAIN_GPU_TMP")) as home:
        os.environ["DRIVETRAIN_HOME"] = home
        from drivetrain import hal
        from drivetrain.hal import bytes as raw
        from drivetrain.runtime import Runtime

        gpus = [device.address for device in hal.devices("cuda")]
        print(f"devices: {[str(d) + ' ' + d.name for d in hal.devices()]}, bytes {raw.BACKEND}")
        if not gpus:
            print("no NVIDIA GPU here: nothing to check")
            return 2
        only = sys.argv[sys.argv.index("--only") + 1] if "--only" in sys.argv else ""
        with Runtime() as runtime:
            stages: dict[str, Callable[[], None]] = {
                "tests": _tests,
                "backend": _backend,
                "hal": _hal,
                "digits": lambda: _small(runtime, gpus),
                "large": lambda: _large(runtime, gpus, report, "--quick" in sys.argv),
            }
            for name, stage in stages.items():
                if not only or name == only:
                    _stage(name, stage)
    code = report.finish()
    if _FAILED:
        print(f"failed: {', '.join(_FAILED)}")
    return 1 if _FAILED else code


if __name__ == "__main__":
    sys.exit(main())
