"""Commands on jobs that exist: jobs, show, logs, migrate, pause, resume, stop, prune."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from drivetrain.errors import BadInput

JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="Id, beginning of it, or name.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Reason = Annotated[str, typer.Option("--reason", help="Kept in the job's journal.")]


def _print(value: Any) -> None:
    print(json.dumps(value, default=str))


def _age(then: float) -> str:
    seconds = max(0, int(time.time() - then))
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


def jobs(as_json: Json = False) -> None:
    """List every job: its state, step, device.

    Examples: drivetrain jobs · drivetrain jobs --json
    """
    from drivetrain.runtime.jobs import all_jobs

    found = [job.summary() for job in all_jobs()]
    if as_json:
        _print({"jobs": found})
        return
    if not found:
        print("no jobs yet; start one with `drivetrain run train.py`")
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for column in ("job", "state", "step", "device", "script", "started"):
        table.add_column(column, justify="right" if column == "step" else "left")
    colours = {
        "running": "green",
        "failed": "red",
        "lost": "red",
        "paused": "yellow",
        "done": "dim",
    }
    for job in found:
        devices = ", ".join(w["device"] for w in job["workers"]) or "-"
        colour = colours.get(job["state"], "cyan")
        table.add_row(
            job["name"] or job["id"],
            f"[{colour}]{job['state']}[/]",
            str(job["step"]),
            devices,
            escape(Path(job["script"]).name),
            f"{_age(job['started'])} ago",
        )
    Console().print(table)


def show(job: JobArgument, as_json: Json = False) -> None:
    """Show one job: placement, moves, failovers, replica, exit.

    Examples: drivetrain show train-3f2a · drivetrain show train-3f2a --json
    """
    from drivetrain.runtime.jobs import find

    facts = find(job).details()
    if as_json:
        _print(facts)
        return
    print(f"{facts['id']}  {facts['state']}  step {facts['step']}  on {facts['device'] or '-'}")
    print(f"  script    {facts['script']}")
    placement = facts["placement"] or {}
    if placement.get("reason"):
        print(f"  placed    {placement['reason']}")
    replica = facts["replica"]
    if replica["every"]:
        print(
            f"  replica   every {replica['every']} steps, at step {replica['step']}, "
            f"{(replica['bytes'] or 0) / 2**20:.1f} MiB, {100 * replica['cost']:.2f}% of a step"
        )
    for move in facts["moves"]:
        print("  move      " + move_line(move))
    for lost in facts["failovers"]:
        print(
            f"  failover  {lost['from']} -> {lost['to']} at step {lost['step']}, resumed in "
            f"{lost['resumed_ms'] or float('nan'):.0f} ms, {lost['steps_repeated']} steps repeated"
            f" ({lost['error']})"
        )
    for checkpoint in facts["checkpoints"]:
        print(f"  on disk   step {checkpoint['step']}: {checkpoint['path']}")
    if facts["exit"]:
        ending = facts["exit"]
        print(f"  ended     {ending['state']}, code {ending['code']} {ending.get('reason', '')}")


def move_line(move: dict[str, Any]) -> str:
    """One move in a line."""
    where = f"{move['from']} -> {move['to']} {move['strategy']}"
    if not move["ok"]:
        return f"{where}: failed, the job stayed: {move['reason']}"
    parts = [f"{where} at step {move['step']}"]
    if move["downtime_ms"] is not None:
        parts.append(f"downtime {move['downtime_ms']:.0f} ms")
    if move["predicted_downtime_ms"] is not None:
        parts.append(f"predicted {move['predicted_downtime_ms']:.0f} ms")
    parts.append(f"{move['state_bytes'] / 2**20:.1f} MiB")
    if move["bandwidth_gbps"]:
        parts.append(f"{move['bandwidth_gbps']:.2f} GB/s")
    return ", ".join(parts)


def logs(
    job: JobArgument,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the job ends.")
    ] = False,
    errors: Annotated[bool, typer.Option("--stderr", help="Its stderr instead.")] = False,
    events: Annotated[
        bool, typer.Option("--events", help="Drivetrain's events, JSON lines.")
    ] = False,
    steps: Annotated[bool, typer.Option("--steps", help="The step log, JSON lines.")] = False,
) -> None:
    """Print what a job's owner wrote, byte for byte.

    Examples: drivetrain logs train-3f2a -f · drivetrain logs train-3f2a --steps
    """
    from drivetrain.runtime.jobs import find, load

    record = find(job)
    name = "events.jsonl" if events else "steps.jsonl" if steps else "err" if errors else "out"
    path = record.directory / "logs" / name
    offset = 0
    while True:
        ended = load(record.directory).view.ended
        if path.exists():
            with path.open("rb") as file:
                file.seek(offset)
                while block := file.read(1 << 16):
                    sys.stdout.buffer.write(block)
                    offset += len(block)
            sys.stdout.flush()
        if ended or not follow:
            return
        time.sleep(0.2)


def migrate(
    job: JobArgument,
    to: Annotated[str, typer.Option("--to", metavar="ADDRESS", help="Where to go: cuda:1, cpu:0.")],
    strategy: Annotated[
        str, typer.Option("--strategy", metavar="S", help="immediate or checkpointed.")
    ] = "immediate",
    max_downtime: Annotated[
        float | None,
        typer.Option("--max-downtime", metavar="T", help="Refuse a slower move (seconds)."),
    ] = None,
    reason: Reason = "",
    as_json: Json = False,
) -> None:
    """Move a running job to another device.

    The target warms up while the job goes on; then the job stops at a step boundary, its state is
    copied and verified, and it goes on at the target. Whatever fails before that leaves the job
    running where it was.

    Examples: drivetrain migrate train-3f2a --to cuda:1 ·
    drivetrain migrate train-3f2a --to cpu:0 --strategy checkpointed --max-downtime 2
    """
    from drivetrain import hal
    from drivetrain.migration.moves import check_max_downtime, check_strategy
    from drivetrain.runtime.client import request

    check_strategy(strategy)
    hal.device(to)
    check_max_downtime(max_downtime)

    def phase(name: str, facts: dict[str, Any]) -> None:
        if not as_json:
            print(f"  {name}", file=sys.stderr, flush=True)

    body: dict[str, Any] = {"to": to, "strategy": strategy, "reason": reason}
    if max_downtime is not None:
        body["max_downtime"] = max_downtime
    report = request(job, "migrate", body, on_phase=phase)
    if as_json:
        _print(report)
    else:
        print(move_line(report))


def pause(
    job: JobArgument,
    release: Annotated[
        bool, typer.Option("--release", help="Give device and memory back too.")
    ] = False,
    to_disk: Annotated[
        bool, typer.Option("--to-disk", help="With --release: into a durable checkpoint.")
    ] = False,
    reason: Reason = "",
    as_json: Json = False,
) -> None:
    """Stop a job at its next step boundary.

    Examples: drivetrain pause train-3f2a · drivetrain pause train-3f2a --release --to-disk
    """
    from drivetrain.runtime.client import request

    if to_disk and not release:
        raise BadInput("--to-disk goes with --release")
    result = request(job, "pause", {"release": release, "to_disk": to_disk, "reason": reason})
    _print(result) if as_json else print(f"paused at step {result['step']}")


def resume(
    job: JobArgument,
    on: Annotated[
        str, typer.Option("--on", metavar="ADDRESS", help="Go on here (after --release).")
    ] = "",
    reason: Reason = "",
    as_json: Json = False,
) -> None:
    """Let a paused job go on.

    Examples: drivetrain resume train-3f2a · drivetrain resume train-3f2a --on cpu:1
    """
    from drivetrain import hal
    from drivetrain.runtime.client import request

    if on and on != "auto":
        hal.device(on)
    result = request(job, "resume", {"on": on, "reason": reason})
    _print(result) if as_json else print(f"running on {result['device']}")


def stop(job: JobArgument, reason: Reason = "", as_json: Json = False) -> None:
    """End a job at its next step boundary.

    Example: drivetrain stop train-3f2a
    """
    from drivetrain.runtime.client import request

    result = request(job, "stop", {"reason": reason})
    _print(result) if as_json else print(f"stopped after step {result['step']}")


def prune(
    keep: Annotated[int, typer.Option("--keep", help="How many ended jobs to keep.")] = 20,
    as_json: Json = False,
) -> None:
    """Remove the folders of ended jobs, the oldest first.

    Example: drivetrain prune --keep 5
    """
    from drivetrain.runtime.jobs import all_jobs

    if keep < 0:
        raise BadInput(f"--keep must not be negative: {keep}")
    ended = [job for job in all_jobs() if job.view.ended and not job.damage]
    gone = ended[: max(0, len(ended) - keep)]
    for job in gone:
        shutil.rmtree(job.directory)
    _print({"removed": [job.id for job in gone]}) if as_json else print(f"removed {len(gone)} jobs")
