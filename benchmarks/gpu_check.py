"""Everything that needs a GPU: the conformance kit on CUDA and every OpenCL platform, the marked
tests, the CUDA backend's own checks, a failover, floor 1's benchmarks, moves of 10 GiB.

Run through `make gpu-check`. With two GPUs also the move between them, in workers that do not see
each other's device. The kits run beside what is not timed, and end before the rest begins. Ends 1
when a gate is missed or a check fails.
"""

from __future__ import annotations

import argparse
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
KIT_LIMIT_S = 300.0
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
    """What the kit does not ask of CUDA: the caller's context, torch's streams, a stray kernel.
    It counts the GPU's free memory, so it wants the GPU for itself."""
    script = ROOT / "tools/hal_gpu_try.py"
    done = subprocess.run([sys.executable, str(script)], check=False, cwd=ROOT, timeout=120)
    _check("the cuda backend's own checks", done.returncode == 0, f"ended {done.returncode}")


class _Kits:
    """The conformance kit on the last GPU through CUDA, and on a device of each OpenCL platform:
    on another GPU, where there is one. All at once, each in a process of its own."""

    def __init__(self, reports: Path) -> None:
        from drivetrain import hal

        self._reports = reports
        self._began = time.monotonic()
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        gpu = hal.devices("cuda")[-1]
        chosen = {"cuda": gpu}
        for device in hal.devices("opencl", all_routes=True):
            name = f"opencl-{device.vendor}"
            if name not in chosen or chosen[name].info.pci == gpu.info.pci:
                chosen[name] = device
        for name, device in chosen.items():
            (reports / f"{name}.json").unlink(missing_ok=True)  # of a run before
            command = [sys.executable, "-m", "drivetrain", "conformance", device.driver]
            command += ["--device", device.address, "--report", str(reports / f"{name}.json")]
            with (reports / f"{name}.log").open("wb") as log:
                self._running[name] = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
                )
            print(f"  {name}: {device.address}, {device.name}", flush=True)

    def ended(self) -> None:
        """Wait for all of them and say what came of each."""
        from drivetrain.hal.conformance.report import STATES, read

        for name in ("opencl-nvidia", "opencl-pocl"):
            if name not in self._running:
                print(f"  ({name} is not here)", flush=True)
        for name, process in self._running.items():
            left = self._began + KIT_LIMIT_S - time.monotonic()
            try:
                process.wait(max(left, 1.0))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            path = self._reports / f"{name}.json"
            if not path.exists():
                print((self._reports / f"{name}.log").read_text(errors="replace")[-3000:])
                _check(f"the kit on {name}", False, f"no report; it ended {process.returncode}")
                continue
            report = read(path)
            told = ", ".join(f"{len(report.of(s))} {s}" for s in STATES if report.of(s))
            for result in report.of("failed"):
                print(f"  {result.name}: {result.reason}", flush=True)
            for gap in report.gaps:
                print(f"  {gap}", flush=True)
            passed = process.returncode == 0 and report.passed
            _check(f"the kit on {name}, {report.name}", passed, f"{told} in {report.seconds:.0f} s")

    def close(self) -> None:
        for process in self._running.values():
            if process.poll() is None:
                process.kill()
                process.wait()


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


def _hal(brief: bool) -> None:
    """The benchmarks of floor 1, each in a process of its own, with a limit."""
    quick = ["--quick"] if brief else []
    for name, *parts in HAL:
        script = ROOT / f"benchmarks/bench_{name}.py"
        command = [sys.executable, str(script), *quick, *parts]
        try:
            done = subprocess.run(command, check=False, cwd=ROOT, timeout=HAL_LIMIT_S)
            _check(f"{name} {' '.join(parts)}", done.returncode == 0, f"ended {done.returncode}")
        except subprocess.TimeoutExpired:
            _check(f"{name} {' '.join(parts)}", False, f"not done within {HAL_LIMIT_S:g} s")


def _chosen(arguments: list[str]) -> argparse.Namespace:
    summary, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    stages = ("tests", "digits", "kit", "backend", "hal", "large")
    parser.add_argument("--only", choices=stages, default="", help="run this stage alone")
    parser.add_argument("--quick", action="store_true", help="few rounds: shows that all runs")
    parser.add_argument("--json", action="store_true", help="the gates as one JSON object, at last")
    told = "leave the kit's reports there, as DRIVER.json or DRIVER-VENDOR.json"
    parser.add_argument("--reports", type=Path, metavar="FOLDER", help=told)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    chosen = _chosen(arguments)
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
        reports = chosen.reports or Path(home) / "kit"
        reports.mkdir(parents=True, exist_ok=True)
        kits = _Kits(reports) if chosen.only in ("", "kit") else None
        try:
            with Runtime() as runtime:
                stages: dict[str, Callable[[], None]] = {
                    "tests": _tests,
                    "digits": lambda: _small(runtime, gpus),
                    "kit": lambda: kits.ended() if kits else None,
                    "backend": _backend,
                    "hal": lambda: _hal(chosen.quick),
                    "large": lambda: _large(runtime, gpus, report, chosen.quick),
                }
                for name, stage in stages.items():
                    if not chosen.only or name == chosen.only:
                        _stage(name, stage)
        finally:
            if kits is not None:
                kits.close()
    code = report.finish()
    if _FAILED:
        print(f"failed: {', '.join(_FAILED)}")
    return 1 if _FAILED else code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
