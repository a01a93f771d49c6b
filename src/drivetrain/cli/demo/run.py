"""``drivetrain demo``: a real training job, moved twice and killed once, against one left alone."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from drivetrain.cli.demo.report import write_html
from drivetrain.errors import BadInput, DrivetrainError, JobError
from drivetrain.pytorch.support import support

EPOCHS = 50
CHIP_EPOCHS = 40
"""So many that a slow machine is ready to go back to the chip before they end on a processor."""
_CHIP_STEPS = 8
_SCRIPT = Path(__file__).with_name("train_digits.py")
_MOVE_FIELDS = (
    "strategy",
    "from",
    "to",
    "downtime_ms",
    "predicted_downtime_ms",
    "state_bytes",
    "hash_source",
    "hash_target",
    "steps_lost",
    "steps_repeated",
    "ok",
    "step",
)


def run_demo(*, print_json: bool = False, epochs: int = EPOCHS) -> int:
    """Run it; 0 when everything held, 1 when something did not. Writes the two report files."""
    with tempfile.TemporaryDirectory(prefix="drivetrain-demo-") as folder:
        os.environ["DRIVETRAIN_HOME"] = folder
        os.environ["DRIVETRAIN_CPU_PARTITIONS"] = "2"
        report, losses = _Demo(Path(folder), epochs).play()
    Path("demo-report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    write_html(report, losses, Path("demo-report.html"))
    faults = _faults(report)
    _say("")
    for fault in faults:
        _say(f"NOT as promised: {fault}")
    if not faults:
        _say("every state arrived with its hash, nothing was lost or doubled, and the moved and")
        _say("killed run ended bit for bit like the one left alone.")
    _say("wrote demo-report.json and demo-report.html")
    if print_json:
        print(json.dumps(report))
    return 1 if faults else 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _faults(report: dict[str, Any]) -> list[str]:
    """What did not hold, in sentences."""
    found = []
    final = report["final"]
    if final["accuracy"] < 0.95:
        found.append(f"the accuracy is {final['accuracy']:.3f}, less than 0.95")
    if final["bit_identical"] is not True:
        found.append("the moved run did not end bit for bit like the unmoved one")
    for move in report["migrations"]:
        if not move["ok"] or move["hash_source"] != move["hash_target"]:
            found.append(f"the move {move['from']} -> {move['to']} did not arrive with its hash")
    lost = report["failover"]
    if lost["samples_lost"] or lost["samples_doubled"]:
        found.append(f"{lost['samples_lost']} samples lost, {lost['samples_doubled']} doubled")
    return found + _chip_faults(report["chip"])


def _chip_faults(chip: dict[str, Any] | None) -> list[str]:
    """Of the job on a chip."""
    if chip is None:
        return []
    if "error" in chip:
        return [f"{chip['device']} did not do it: {chip['error']}"]
    found = [
        f"the move {move['from']} -> {move['to']} did not arrive with its hash"
        for move in chip["migrations"]
        if not move["ok"] or move["hash_source"] != move["hash_target"]
    ]
    if chip["samples_lost"] or chip["samples_doubled"]:
        found.append(
            f"{chip['samples_lost']} samples lost, {chip['samples_doubled']} doubled in the job on "
            f"{chip['device']}"
        )
    if chip["accuracy"] < 0.95:
        found.append(f"the accuracy by way of {chip['device']} is {chip['accuracy']:.3f}")
    return found


class _Demo:
    def __init__(self, folder: Path, epochs: int) -> None:
        self._folder = folder
        self._epochs = epochs
        self._steps = 0

    def play(self) -> tuple[dict[str, Any], list[tuple[int, float]]]:
        from drivetrain import hal
        from drivetrain.runtime import Runtime

        devices = hal.devices()
        _say("devices")
        for device in devices:
            memory = device.info.memory_bytes / 2**30
            _say(f"  {device.address:8} {device.name}, {memory:.0f} GiB")
        addresses = [device.address for device in devices]
        if "cpu:1" not in addresses:
            raise BadInput("the demo needs a machine with at least two CPU cores")
        with Runtime() as runtime:
            moved, job, failover = self._moved(runtime)
            alone, left = self._controls(runtime)
            accelerated = self._accelerated(runtime, devices)
            chip = self._chip(runtime, devices)
        facts = job.report()
        losses = _losses(job.directory)
        same = moved["state_hash"] == alone["state_hash"] == left["state_hash"]
        same = same and moved["fold"] == alone["fold"] == left["fold"]
        failover["samples_lost"] = moved["samples_lost"]
        failover["samples_doubled"] = moved["samples_doubled"]
        report: dict[str, Any] = {
            "devices": _device_table(devices),
            "placement": facts["placement"],
            "migrations": [_picked(move) for move in facts["moves"]] + accelerated,
            "failover": failover,
            "chip": chip,
            "final": {
                "accuracy": moved["accuracy"],
                "loss": moved["loss"],
                "state_hash": moved["state_hash"],
                "unmoved_state_hash": alone["state_hash"],
                "bit_identical": same,
                "steps": moved["steps"],
                "exactly_once_fold": str(moved["fold"]),
                "unmoved_exactly_once_fold": str(alone["fold"]),
            },
            "overhead": {
                "step_ms_plain": alone["step_ms"],
                "step_ms_job": left["step_ms"],
                "ratio": left["step_ms"] / alone["step_ms"],
            },
        }
        self._summary(report)
        return report, losses

    # -- the three runs -----------------------------------------------------------------------

    def _moved(self, runtime: Any) -> tuple[dict[str, Any], Any, dict[str, Any]]:
        result = self._folder / "moved.json"
        job = runtime.submit(_SCRIPT, [str(result), "--epochs", str(self._epochs)], name="demo")
        self._steps = self._epochs * 23
        _say(f"\njob {job.id}: a convolutional network learns handwritten digits")
        while job.wait(0.05) is None and not job.report()["placement"]:
            pass
        _say(f"  placed: {(job.report()['placement'] or {}).get('reason', '')}")
        self._until(job, 0.2)
        there = {"cpu:0": "cpu:1", "cpu:1": "cpu:0"}
        if job.device not in there:  # an accelerator won; the comparison is on the CPU
            job.migrate("cpu:0")
        self._move(job, there[job.device], "immediate")
        self._until(job, 0.45)
        self._move(job, there[job.device], "checkpointed")
        self._until(job, 0.7)
        failover = self._kill(job)
        self._until(job, 1.0)
        return self._ended(job, result), job, failover

    def _controls(self, runtime: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The same training twice without any move, side by side: alone, and as a job."""
        _say("\nthe same training without any move, twice: as a plain script, and as a job")
        from drivetrain import hal

        alone = self._folder / "alone.json"
        left = self._folder / "left.json"
        isolation = hal.device("cpu:0").isolation()
        env = {**os.environ, **isolation.environment, "PYTHONHASHSEED": "0"}
        command = [sys.executable, str(_SCRIPT), str(alone), "--epochs", str(self._epochs)]
        cores = set(isolation.cpus or ())
        with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL) as plain:
            with contextlib.suppress(OSError):
                if cores:
                    for thread in os.listdir(f"/proc/{plain.pid}/task"):
                        os.sched_setaffinity(int(thread), cores)
            try:
                arguments = [str(left), "--epochs", str(self._epochs)]
                job = runtime.submit(_SCRIPT, arguments, on="cpu:1", name="unmoved")
                self._until(job, 1.0)
                found = self._ended(job, left)
                if plain.wait() != 0:
                    raise JobError(f"the plain script ended with code {plain.returncode}")
            finally:
                plain.kill()
        return json.loads(alone.read_text(encoding="utf-8")), found

    def _accelerated(self, runtime: Any, devices: Any) -> list[dict[str, Any]]:
        """With a GPU of torch's: the same job from it to the CPU and back."""
        gpus = [d.address for d in devices if d.driver != "cpu" and support(d).torch_device]
        if not gpus:
            return []
        gpu = gpus[0]
        _say(f"\nthe same job from {gpu} to the CPU and back")
        result = self._folder / "gpu.json"
        job = runtime.submit(_SCRIPT, [str(result), "--epochs", str(self._epochs)], on=gpu)
        self._until(job, 0.1)
        self._move(job, "cpu:0", "immediate")
        step = job.step
        self._until(job, min(0.9, (step + 30) / self._steps))
        self._move(job, gpu, "checkpointed")
        self._until(job, 1.0)
        self._ended(job, result)
        return [_picked(move) for move in job.report()["moves"]]

    def _chip(self, runtime: Any, devices: Any) -> dict[str, Any] | None:
        """With a device that torch does not know: a shorter job from it, to it and from it again.
        Kernels and random numbers are others there than on the processor, so that what is shown is
        the state at each move, each sample's count, and the accuracy; not the last bits."""
        from drivetrain.hal.probe import probe

        chips = [device for device in devices if support(device).custom]
        known = probe(chips)
        chips = [device for device in chips if known[device].usable]
        if not chips:
            return None
        chip = chips[0].address
        _say(f"\na shorter job on {chip}, which torch does not know, and on the processor in turns")
        result = self._folder / "chip.json"
        self._steps = CHIP_EPOCHS * 23
        # First on the chip: compiling takes longer there than such a job on the processor.
        arguments = [str(result), "--epochs", str(CHIP_EPOCHS)]
        job = runtime.submit(_SCRIPT, arguments, on=chip, name="chip")
        try:
            self._until(job, _CHIP_STEPS / self._steps)
            self._move(job, "cpu:0", "immediate")
            self._move(job, chip, "immediate")
            self._until(job, (job.step + _CHIP_STEPS) / self._steps)
            self._move(job, "cpu:1", "immediate")
            self._until(job, 1.0)
            found = self._ended(job, result)
        except DrivetrainError as error:
            _say(f"  {chip} did not do it: {error}")
            return {"device": chip, "error": str(error)}
        told = ("steps", "accuracy", "samples", "samples_lost", "samples_doubled")
        return {
            "device": chip,
            "migrations": [_picked(move) for move in job.report()["moves"]],
            **{name: found[name] for name in told},
        }

    # -- what happens in them -----------------------------------------------------------------

    def _until(self, job: Any, share: float) -> None:
        """Show progress until that share of the steps is done (or the job has ended)."""
        wanted = int(share * self._steps)
        shown = 0.0
        while job.wait(0.05) is None and job.step < wanted:
            if time.monotonic() - shown >= 5.0:
                shown = time.monotonic()
                losses = _losses(job.directory, last=20)
                if losses:
                    loss = statistics.mean(v for _, v in losses)
                    _say(f"  {job.device:6} step {job.step:5}/{self._steps}  loss {loss:.4f}")

    def _move(self, job: Any, to: str, strategy: str) -> None:
        _say(f"  move {job.device} -> {to}, {strategy}")
        report = job.migrate(to, strategy)
        _say(
            f"    at step {report['step']}: stopped for {report['downtime_ms']:.0f} ms "
            f"(predicted {report['predicted_downtime_ms']:.0f} ms), "
            f"{report['state_bytes'] / 2**20:.1f} MiB, hash {report['hash_target'][:16]}"
        )

    def _kill(self, job: Any) -> dict[str, Any]:
        pid = job.report()["workers"][0]["pid"]
        _say(f"  SIGKILL to the worker {pid} on {job.device} after step {job.step}")
        before = len(job.report()["failovers"])
        killed_at, killed_ns = time.time(), time.monotonic_ns()
        os.kill(pid, signal.SIGKILL)
        detected = None
        while job.wait(0.02) is None:
            if detected is None:
                for event in job.events(follow=False):
                    if event.get("state") == "recovering" and event["at"] >= killed_at:
                        detected = (event["at"] - killed_at) * 1e3
            lost = job.report()["failovers"]
            if len(lost) > before:
                break
        else:
            raise JobError("the job ended before it recovered")
        facts = lost[-1]
        resumed = (job.first_step_end_ns - killed_ns) / 1e6
        _say(
            f"    went on on {facts['to']} after {resumed:.0f} ms, "
            f"{facts['steps_repeated']} steps repeated"
        )
        return {
            "from": facts["from"],
            "to": facts["to"],
            "step": facts["step"],
            "detected_ms": round(detected or facts["detected_ms"], 3),
            "resumed_ms": round(resumed, 3),
            "steps_repeated": facts["steps_repeated"],
        }

    def _ended(self, job: Any, result: Path) -> dict[str, Any]:
        code = job.wait()
        if code != 0:
            errors = (job.directory / "logs" / "err").read_text(errors="replace")[-2000:]
            raise JobError(f"the job ended with code {code}: {job.report()['exit']}\n{errors}")
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        _say(f"  done: accuracy {found['accuracy']:.4f}, state {found['state_hash'][:16]}")
        return found

    def _summary(self, report: dict[str, Any]) -> None:
        final, overhead = report["final"], report["overhead"]
        _say(f"\nmoved    {final['state_hash']}")
        _say(f"unmoved  {final['unmoved_state_hash']}")
        _say(
            f"a step takes {overhead['step_ms_plain']:.2f} ms in the plain script, "
            f"{overhead['step_ms_job']:.2f} ms as a job (ratio {overhead['ratio']:.3f}, "
            "two cores side by side)"
        )


def _picked(move: dict[str, Any]) -> dict[str, Any]:
    return {name: move[name] for name in _MOVE_FIELDS}


def _losses(directory: Path, last: int | None = None) -> list[tuple[int, float]]:
    found = []
    with contextlib.suppress(OSError):
        lines = (directory / "logs" / "steps.jsonl").read_text(encoding="utf-8").splitlines()
        for line in lines if last is None else lines[-last:]:
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                loss = record.get("logged", {}).get("loss")
                if isinstance(loss, float):
                    found.append((int(record["step"]), loss))
    return found


def _device_table(devices: Any) -> list[dict[str, Any]]:
    from drivetrain.hal.probe import verdicts

    known = verdicts(devices)
    return [
        {
            "address": device.address,
            "name": device.name,
            "vendor": device.vendor,
            "driver": device.driver,
            "memory_bytes": device.info.memory_bytes,
            "usable": known[device].usable,
        }
        for device in devices
    ]
