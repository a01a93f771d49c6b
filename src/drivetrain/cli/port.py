"""``drivetrain port``: what ties a PyTorch program to one vendor, and the portable form."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import groupby
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from drivetrain.pytorch.porting import Finding, Report

_EFFECTS = {
    "fails": "fails elsewhere",
    "skips": "asks first: the device there is not used",
    "differs": "runs elsewhere, and does nothing or something else",
}


def port(
    path: Annotated[str, typer.Argument(metavar="SCRIPT", help="A Python file or a folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Name each line that ties a PyTorch program to one vendor, and what to write instead.

    Reads the text only: nothing is run, and torch need not be installed. Exits 0 when the program
    is portable as it is, 1 when something was found.

    Examples: drivetrain port train.py · drivetrain port my_project/ --json
    """
    from drivetrain.pytorch.porting import analyse

    report = analyse(path)
    if as_json:
        print(json.dumps(report.as_json()))
    else:
        print("\n".join(_page(report)))
    return 1 if report.findings else 0


def _page(report: Report) -> Iterable[str]:
    for name, why in report.unread:
        yield f"{name}: not read: {why}"
    single = report.files == 1 and all(f.path == report.path for f in report.findings)
    for file, group in groupby(report.findings, key=lambda finding: finding.path):
        for finding in group:
            yield f"{file}:{finding.line}: {finding.code}: {finding.text} ({finding.vendor})"
            yield f"    {_EFFECTS[finding.effect]}; portable: {finding.portable}"
    yield _verdict(report, "it" if single else "this program")


def _verdict(report: Report, what: str) -> str:
    files = "1 file" if report.files == 1 else f"{report.files} files"
    if not report.findings:
        return f"{report.path}: portable as it is ({files} read)"
    counts = ", ".join(f"{n} {_SHORT[effect]}" for effect, n in sorted(report.effects.items()))
    if not report.needs:
        return f"{report.path}: {counts} ({files} read); {what} needs no particular device"
    kinds = " and ".join(sorted(report.needs))
    return (
        f"{report.path}: {counts} ({files} read); as it is, {what} runs only where torch has "
        f"{kinds}{_where(report.findings)}"
    )


_SHORT = {"fails": "fail elsewhere", "skips": "ask first", "differs": "do nothing elsewhere"}


def _where(findings: tuple[Finding, ...]) -> str:
    if any(f.device_type == "cuda" for f in findings):
        return ", which is NVIDIA, and AMD under ROCm"
    return ""
