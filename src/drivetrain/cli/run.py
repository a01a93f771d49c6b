"""``drivetrain run``: host a job in this terminal until it ends; and ``check`` and ``demo``."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from drivetrain.errors import BadInput, DrivetrainError

_REQUEUE = 75
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def parse_bytes(text: str) -> int:
    """``4096``, ``512M``, ``20GiB`` in bytes (powers of two)."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if not found:
        raise BadInput(f"{text!r} is no size: write bytes, or for example 512M or 20G")
    nbytes = float(found[1]) * _UNITS[found[2]]
    if nbytes >= 1 << 63:
        raise BadInput(f"{text!r} is more bytes than any device has")
    return int(nbytes)


def parse_seconds(text: str) -> float:
    """``90``, ``90s``, ``10m``, ``2h`` in seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|sec|m|min|h)?", text.strip().lower())
    if not found:
        raise BadInput(f"{text!r} is no duration: write seconds, or for example 10m or 2h")
    return float(found[1]) * {"m": 60.0, "min": 60.0, "h": 3600.0}.get(found[2] or "s", 1.0)


def run(
    script: Annotated[str | None, typer.Argument(metavar="SCRIPT", help="A python script.")] = None,
    on: Annotated[str, typer.Option("--on", metavar="auto|ADDRESS", help="Where to run.")] = "auto",
    prefer: Annotated[
        list[str] | None,
        typer.Option("--prefer", metavar="VENDOR", help="Preferred vendor; repeat."),
    ] = None,
    backup: Annotated[
        list[str] | None,
        typer.Option("--backup", metavar="ADDRESS", help="Go on here after a loss; repeat."),
    ] = None,
    standby: Annotated[
        str | None, typer.Option("--standby", metavar="ADDRESS", help="Keep a warm copy here.")
    ] = None,
    env: Annotated[
        str | None, typer.Option("--env", metavar="NAME|PATH", help="The worker's environment.")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail when --prefer cannot be met.")
    ] = False,
    memory: Annotated[
        str | None, typer.Option("--memory", metavar="BYTES", help="Device memory it needs (20G).")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="The job's one seed.")] = 0,
    replicate_every: Annotated[
        int | None,
        typer.Option(
            "--replicate-every", metavar="N", help="Steps between replicas (default: measured)."
        ),
    ] = None,
    replicas: Annotated[
        str, typer.Option("--replicas", metavar="on|off", help="Keep replicas.")
    ] = "on",
    checkpoint_every: Annotated[
        str,
        typer.Option("--checkpoint-every", metavar="T", help="Durable checkpoints: 90, 10m, off."),
    ] = "10m",
    orphan: Annotated[
        str, typer.Option("--orphan", metavar="run|exit", help="When this process dies.")
    ] = "run",
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="A name for the job.")] = "",
    resume: Annotated[
        str | None,
        typer.Option("--resume", metavar="JOB", help="Take over a job whose runtime is gone."),
    ] = None,
    resume_or_start: Annotated[
        str | None,
        typer.Option(
            "--resume-or-start", metavar="NAME", help="For batch files: resume NAME, else start it."
        ),
    ] = None,
    grace: Annotated[
        str, typer.Option("--grace", metavar="T", help="For the checkpoint on SIGTERM or SIGUSR1.")
    ] = "25",
    as_json: Annotated[
        bool, typer.Option("--json", help="The final record as the last line.")
    ] = False,
) -> int:
    """Run a script as a job: place it, watch it, bring it back after a loss.

    Its output passes through unchanged; Drivetrain's own lines go to stderr. SIGTERM or SIGUSR1
    saves the state to disk and exits 75, so that a batch system requeues it.

    Examples: drivetrain run train.py ·
    drivetrain run train.py --on cuda:0 --backup cuda:1 -- --lr 3e-4 ·
    drivetrain run --resume train-3f2a · drivetrain run --resume-or-start nightly train.py
    """
    from drivetrain.cli.main import script_args
    from drivetrain.runtime import Runtime, jobs

    if replicas not in ("on", "off"):
        raise BadInput(f"--replicas is on or off, not {replicas!r}")
    every = None if checkpoint_every == "off" else parse_seconds(checkpoint_every)
    grace_s = parse_seconds(grace)
    if resume and script:
        raise BadInput("--resume takes a job, not a script: leave the script out")
    if resume is None and resume_or_start is None and script is None:
        raise BadInput("give a script to run, or --resume JOB")
    if resume_or_start is not None:
        jobs.check_name(resume_or_start)
        resume = _resumable(resume_or_start)
        name = resume_or_start
        if resume is None and script is None:
            raise BadInput(f"there is no job {name!r} to resume, and no script to start")
    host = _Host(as_json=as_json, grace_s=grace_s)
    with Runtime() as runtime:
        if resume is not None:
            job = runtime.resume(resume, on="" if on == "auto" else on)
        else:
            assert script is not None
            job = runtime.submit(
                script,
                script_args(),
                on=on,
                prefer=prefer or (),
                backup=backup or (),
                standby=standby,
                environment=env,
                strict=strict,
                memory=None if memory is None else parse_bytes(memory),
                replicate_every=replicate_every,
                checkpoint_every=every,
                replicas=replicas == "on",
                seed=seed,
                orphan=orphan,
                name=name,
            )
        return host.attend(job, from_start=resume is None)


def _resumable(name: str) -> str | None:
    from drivetrain.runtime import jobs

    try:
        record = jobs.find(name)
    except BadInput:
        return None
    if record.view.ended:
        if record.view.state == "done":
            print(f"drivetrain: {name} is done already", file=sys.stderr)
            raise typer.Exit(0)
        return None
    return record.id


class _Host:
    """Passes a job's output through and shows its progress until it ends."""

    def __init__(self, *, as_json: bool, grace_s: float) -> None:
        self._as_json = as_json
        self._grace_s = grace_s
        self._signal = 0
        self._live = sys.stderr.isatty()
        self._shown = False
        self._lines: list[str] = []
        self._last_line = 0.0
        self._last_progress = time.monotonic()
        self._rate_from = (0, time.monotonic())

    def attend(self, job: Any, *, from_start: bool) -> int:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._on_signal)
        logs = job.directory / "logs"
        streams = [_Tail(logs / "out", 1, from_start), _Tail(logs / "err", 2, from_start)]
        seen = 0
        print(f"drivetrain: job {job.id}", file=sys.stderr, flush=True)
        self._last_line = time.monotonic()
        requeue = False
        while True:
            job.wait(0.05)
            ended = job.ended
            for stream in streams:
                if stream.waiting():
                    self._clear()
                    stream.pass_on()
            known = list(job.events(follow=False))
            for event in known[seen:]:
                line = _event_line(event)
                if line:
                    self._lines.append(line)
            seen = len(known)
            self._say(job, force=False)
            if ended:
                break
            if self._signal:
                requeue = self._obey_signal(job) or requeue
                if requeue:
                    break
        for stream in streams:
            stream.pass_on()
        self._clear()
        return self._finish(job, requeue)

    def _on_signal(self, number: int, _frame: object) -> None:
        self._signal = number

    def _obey_signal(self, job: Any) -> bool:
        number, self._signal = self._signal, 0
        if number == signal.SIGINT:
            self._lines.append("stopping (Ctrl-C)")
            try:
                job.stop(interrupt=True, reason="Ctrl-C")
            except DrivetrainError as error:
                self._lines.append(str(error))
            return False
        reason = signal.Signals(number).name
        self._lines.append(f"{reason}: saving the state to disk")
        try:
            saved = job.pause(to_disk=True, reason=reason, limit_s=self._grace_s)
        except DrivetrainError as error:
            self._lines.append(f"could not save ({error}); what was saved before still counts")
            job.leave()
            return not job.exit_code_known
        self._lines.append(f"saved at step {saved['step']}: {saved['path']}")
        job.leave()
        return True

    def _finish(self, job: Any, requeue: bool) -> int:
        if self._lines and not self._live:  # one line a second, the last one too
            time.sleep(max(0.0, self._last_line + 1.0 - time.monotonic()))
        self._say(job, force=True)
        self._clear()
        if job.problem:
            print(f"drivetrain: {job.problem}", file=sys.stderr, flush=True)
        report = job.report()
        if self._as_json:
            sys.stdout.flush()
            print(json.dumps(report, default=str), flush=True)
        if requeue:
            return _REQUEUE
        return int(job.exit_code if job.exit_code is not None else 1)

    def _say(self, job: Any, *, force: bool) -> None:
        now = time.monotonic()
        if self._live:
            if self._lines or now - self._last_progress >= 0.2:
                self._clear()
                for line in self._lines:
                    os.write(2, f"drivetrain: {line}\n".encode())
                self._lines = []
                os.write(2, f"\r\x1b[K{self._progress(job)}".encode())
                self._shown = True
                self._last_progress = now
            return
        if now - self._last_line < 1.0 and not force:
            return
        if not self._lines and now - self._last_progress >= 10.0 and job.step:
            self._lines.append(self._progress(job))
        if self._lines:
            os.write(2, ("drivetrain: " + "; ".join(self._lines) + "\n").encode())
            self._lines = []
            self._last_line = self._last_progress = now

    def _progress(self, job: Any) -> str:
        step, now = job.step, time.monotonic()
        then_step, then = self._rate_from
        rate = (step - then_step) / (now - then) if now > then else 0.0
        if now - then > 5.0:
            self._rate_from = (step, now)
        values = " ".join(f"{k} {v:.4g}" for k, v in _last_logged(job.directory).items())
        return f"{job.state} on {job.device}  step {step}  {values}  {max(rate, 0.0):.1f} steps/s"

    def _clear(self) -> None:
        if self._shown:
            os.write(2, b"\r\x1b[K")
            self._shown = False


class _Tail:
    """Copies what is appended to a file to a descriptor, byte for byte."""

    def __init__(self, path: Path, fd: int, from_start: bool) -> None:
        self._path = path
        self._fd = fd
        self._offset = 0 if from_start or not path.exists() else path.stat().st_size

    def waiting(self) -> bool:
        try:
            return self._path.stat().st_size > self._offset
        except OSError:
            return False

    def pass_on(self) -> None:
        if not self.waiting():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            while block := file.read(1 << 16):
                self._offset += len(block)
                while block:
                    block = block[os.write(self._fd, block) :]


def _last_logged(directory: Path) -> dict[str, float]:
    path = directory / "logs" / "steps.jsonl"
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            lines = file.read().splitlines()
        logged = json.loads(lines[-1]).get("logged", {})
    except (OSError, ValueError, IndexError):
        return {}
    return {k: v for k, v in logged.items() if isinstance(v, (int, float))}


def _event_line(event: dict[str, Any]) -> str:
    kind = event["event"]
    if kind == "placement":
        return str(event.get("reason", ""))
    if kind == "notice":
        return str(event["text"])
    if kind == "phase":
        return f"move {event['move']}: {event['phase']}"
    if kind in ("moved", "move_failed"):
        from drivetrain.cli.jobs import move_line

        return move_line(event)
    if kind == "failover":
        return (
            f"went on on {event['to']} from step {event['step']}: "
            f"{event['steps_repeated']} steps repeated, "
            f"resumed in {event['resumed_ms'] or 0:.0f} ms"
        )
    if kind == "gave_up":
        return f"the job is given up: {event['reason']}"
    return ""


def check(
    script: Annotated[str, typer.Argument(metavar="SCRIPT", help="A script with a TrainingJob.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Rehearse five steps, a move, five steps; name what would be doubled or lost.

    Exits 0 when nothing was found, 1 when something was.

    Examples: drivetrain check train.py · drivetrain check train.py -- --epochs 1
    """
    from drivetrain.cli.main import script_args
    from drivetrain.training.check import rehearse

    findings = rehearse(
        script,
        script_args(),
        on_progress=lambda text: print(f"drivetrain: {text}", file=sys.stderr, flush=True),
    )
    if as_json:
        print(
            json.dumps(
                {"script": os.path.abspath(script), "findings": [f.to_json() for f in findings]}
            )
        )
    elif not findings:
        print(f"{script}: moves without loss")
    else:
        for finding in findings:
            print(f"{script}:{finding.line}: {finding.code}: {finding.message}")
            if finding.remedy:
                print(f"    {finding.remedy}")
    return 1 if findings else 0


def demo(
    as_json: Annotated[bool, typer.Option("--json", help="Print the report too.")] = False,
) -> int:
    """Train a small network on real digits; move it twice, kill it once, and compare.

    Writes demo-report.json and demo-report.html into the current folder.

    Example: drivetrain demo
    """
    from drivetrain.cli.demo.run import run_demo

    return run_demo(print_json=as_json)
