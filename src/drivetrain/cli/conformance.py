"""``drivetrain conformance``: what a driver promises, checked on a device."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from drivetrain.cli.devices import console
from drivetrain.errors import BadInput

if TYPE_CHECKING:
    from rich.table import Table

    from drivetrain.hal.conformance.check import Check
    from drivetrain.hal.conformance.mutants import Verdict
    from drivetrain.hal.conformance.report import Report, Result

_COLOURS = {"passed": "green", "failed": "red", "skipped": "yellow"}


def conformance(
    driver: Annotated[
        str | None, typer.Argument(metavar="DRIVER", help="cpu, cuda, opencl, ... or your own.")
    ] = None,
    device: Annotated[
        str, typer.Option("--device", metavar="ADDRESS", help="Which device; else the first.")
    ] = "",
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only",
            metavar="CHECK",
            help="A check or topic by name (with --mutants: a mutant); give it again for more.",
        ),
    ] = None,
    long: Annotated[
        bool, typer.Option("--long", help="The million cycles too; minutes to an hour.")
    ] = False,
    report: Annotated[
        Path | None, typer.Option("--report", metavar="FILE", help="Write the JSON there too.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    listing: Annotated[
        bool, typer.Option("--list", help="List the checks and what they need; run none.")
    ] = False,
    mutants: Annotated[
        bool,
        typer.Option("--mutants", help="Prove the kit: named defects, and what catches each."),
    ] = False,
) -> None:
    """Check that a driver keeps what it promises: memory, order, events, graphs, kernels, errors,
    leaks, threads, and life in the wrong order.

    Each topic runs in a process of its own, so a driver may crash or hang. Ends with 0 only if all
    that the driver declares passed, with 1 otherwise.

    Examples:

      drivetrain conformance cpu

      drivetrain conformance cuda --device cuda:1 --json --report cuda.json

      drivetrain conformance opencl --only copies --only kernels.atomics

      drivetrain conformance cpu --long

      drivetrain conformance --mutants
    """
    from drivetrain.hal.conformance.running import chosen, run, target

    names = [name for words in only or () for name in words.split(",") if name]
    if listing:
        _list(chosen(names, long=True), as_json)
        return
    if mutants:
        _refuse("--mutants", driver or "", device, long)
        _mutants(names, as_json, report)
        return
    if not driver:
        raise BadInput("name a driver to check: drivetrain conformance cpu")
    if report is not None and not report.resolve().parent.is_dir():
        raise BadInput(f"there is no folder for the report {report}")
    todo = chosen(names, long=long)
    checked = target(driver, device)
    told = _Progress(todo, as_json)
    told.head(f"{checked.address}: {checked.name}, {len(todo)} check{'s' * (len(todo) != 1)}")
    found = run(checked, long=long, only=names, tell=told.ended, starts=told.started)
    told.close()
    text = json.dumps(found.as_json(), indent=2)
    if as_json:
        print(text)
    else:
        console().print(_table(found))
        _verdict(found)
    if report is not None:
        _write(report, text)
    if not found.passed:
        raise typer.Exit(1)


def _refuse(option: str, driver: str, device: str, long: bool) -> None:
    given = [f"driver {driver}"] * bool(driver) + ["--device"] * bool(device) + ["--long"] * long
    if given:
        raise BadInput(f"{option} is about the simulated device; leave out {', '.join(given)}")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise BadInput(f"the report cannot be written to {path}: {error}") from error


# --- progress ------------------------------------------------------------------------------------


class _Progress:
    """The check that runs now, on a terminal; each topic as it ends, everywhere. On standard error
    when standard output is for JSON."""

    def __init__(self, todo: Iterable[Check], as_json: bool) -> None:
        from rich.console import Console

        self._console = Console(file=sys.stderr if as_json else sys.stdout, highlight=False)
        self._left = {
            topic: [c.topic for c in todo].count(topic) for topic in {c.topic for c in todo}
        }
        self._ended: list[Result] = []
        self._status = self._console.status("") if self._console.is_terminal else None
        if self._status is not None:
            self._status.start()

    def head(self, text: str) -> None:
        self._console.print(text, markup=False)

    def started(self, check: Check) -> None:
        if self._status is not None:
            self._status.update(f"{check.name}  [dim]{check.proves}[/]")

    def ended(self, result: Result) -> None:
        from rich.markup import escape

        self._ended.append(result)
        if result.state == "failed" or (result.state == "skipped" and not result.optional):
            colour = _COLOURS[result.state]
            self._console.print(
                f"  [{colour}]{result.state}[/] {result.name}: {escape(result.reason)}\n"
                f"         [dim]{escape(result.proves)}[/]",
                soft_wrap=True,
            )
        self._left[result.topic] -= 1
        if not self._left[result.topic]:
            of_topic = [each for each in self._ended if each.topic == result.topic]
            seconds = sum(each.seconds for each in of_topic)
            self._console.print(f"  {result.topic:<10} {_counts(of_topic):<40} {seconds:6.1f} s")

    def close(self) -> None:
        if self._status is not None:
            self._status.stop()


def _counts(results: Iterable[Result]) -> str:
    from drivetrain.hal.conformance.report import STATES

    states = [result.state for result in results]
    return ", ".join(f"{states.count(state)} {state}" for state in STATES if state in states)


# --- pages ---------------------------------------------------------------------------------------


def _plain_table(*titles: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in titles:
        table.add_column(title, overflow="fold")
    return table


def _table(found: Report) -> Table:
    """The groups that the device declares, and what came of each."""
    from drivetrain.hal.conformance.report import CORE, DISCOVERY, NOT_DECLARED
    from drivetrain.hal.driver import GROUPS

    table = _plain_table("capability", "what it is", "shown", "evidence")
    required = {
        DISCOVERY: "found untouched, sensors, probe",
        CORE: "memory, streams, events, graphs of the core",
    }
    for name, what in {**required, **GROUPS}.items():
        state = found.shown(name)
        if state == NOT_DECLARED:
            continue
        colour = _COLOURS.get(state, "dim")
        evidence = (found.evidence or "none: simulated") if state == "passed" else ""
        table.add_row(name, what, f"[{colour}]{state}[/]", evidence)
    return table


def _verdict(found: Report) -> None:
    from rich.markup import escape

    page = console()
    for gap in found.gaps:
        page.print(f"[yellow]not shown[/]: {escape(gap)}", soft_wrap=True)
    how = "[green]passed[/]" if found.passed else "[red]not passed[/]"
    page.print(f"{found.device} {how}: {_counts(found.results)}, in {found.seconds:.0f} s")


def _list(checks: Iterable[Check], as_json: bool) -> None:
    if as_json:
        facts = [
            {
                "name": check.name,
                "proves": check.proves,
                "needs": sorted(check.needs),
                "optional": check.optional,
                "long": check.long,
                "limit_s": check.limit_s,
            }
            for check in checks
        ]
        print(json.dumps({"checks": facts}, indent=2))
        return
    table = _plain_table("check", "proves", "needs")
    for check in checks:
        needs = [*sorted(check.needs), *(["--long"] if check.long else [])]
        table.add_row(check.name, check.proves, ", ".join(needs))
    console().print(table)


# --- drivetrain conformance --mutants ------------------------------------------------------------


def _mutants(names: list[str], as_json: bool, report: Path | None) -> None:
    from rich.console import Console

    from drivetrain.hal.conformance.mutants import named, prove

    todo = named(names)
    told = Console(file=sys.stderr, highlight=False)
    done = 0

    def tell(verdict: Verdict) -> None:
        nonlocal done
        done += 1
        if not verdict.caught or told.is_terminal:
            how = "caught" if verdict.caught else "NOT CAUGHT"
            told.print(f"{done}/{len(todo)} {verdict.mutant}: {how}", markup=False)

    verdicts = prove(todo, tell=tell)
    missed = [verdict for verdict in verdicts if not verdict.caught]
    text = json.dumps({"mutants": [_as_json(v) for v in verdicts], "caught": not missed}, indent=2)
    if as_json:
        print(text)
    else:
        from rich.markup import escape

        table = _plain_table("mutant", "defect", "caught by", "how it shows")
        for verdict in verdicts:
            for result, control in zip(verdict.results, verdict.control, strict=True):
                right = result.state == "failed" and control.state == "passed"
                by = result.name if right else f"[red]not by {result.name}[/]"
                reason = result.reason if control.state == "passed" else f"control {control.state}"
                table.add_row(verdict.mutant, verdict.defect, by, escape(reason))
        console().print(table)
        control_names = {r.name for v in verdicts for r in v.control if r.state == "passed"}
        console().print(
            f"{len(verdicts) - len(missed)} of {len(verdicts)} mutants caught; without a defect "
            f"{len(control_names)} of these checks passed"
        )
    if report is not None:
        _write(report, text)
    if missed:
        raise typer.Exit(1)


def _as_json(verdict: Verdict) -> dict[str, Any]:
    return {
        "mutant": verdict.mutant,
        "defect": verdict.defect,
        "caught": verdict.caught,
        "checks": [
            {"name": r.name, "state": r.state, "reason": r.reason, "control": c.state}
            for r, c in zip(verdict.results, verdict.control, strict=True)
        ],
    }
