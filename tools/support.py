"""Write docs/support.md from what lies in docs/evidence.

    drivetrain conformance NAME --report docs/evidence/NAME.json     a report of a device
    python tools/support.py [--check]                                the page

``docs/evidence/tests.json`` lists what tests of this repository show without a device: ``fake`` and
``compiled``. Each kind of evidence is told beside the others and never stands for another one.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from drivetrain.errors import BadInput
from drivetrain.hal.conformance.mutants import CAUGHT_BY
from drivetrain.hal.conformance.report import (
    CORE,
    DISCOVERY,
    FAILED,
    NOT_HERE,
    PASSED,
    STATES,
    Report,
    read,
)
from drivetrain.hal.driver import GROUPS
from drivetrain.hal.drivers.simulated_mutants import defect_of

ROOT = Path(__file__).resolve().parent.parent
EVIDENCE, PAGE = ROOT / "docs" / "evidence", ROOT / "docs" / "support.md"
TESTS = "tests.json"
CAPABILITIES = (DISCOVERY, CORE, *GROUPS)
KINDS = {
    "compiled": "the vendor's compiler, or Triton's back end for that target, made code for it",
    "fake": "a library of our own stood behind the API: the order of calls and faults, not results",
    "emulated": "somebody else's implementation ran it on a processor (PoCL, Intel's runtime)",
    "hardware": "it ran on the device itself",
}


@dataclass(frozen=True)
class Claim:
    """What a test of this repository shows."""

    driver: str
    capability: str
    evidence: str
    what: str
    test: str
    """``file::function``."""


def reports(folder: Path = EVIDENCE) -> tuple[Report, ...]:
    """The reports of devices, by file name. Raises BadInput for one that shows nothing."""
    found = []
    for path in sorted(folder.glob("*.json")):
        if path.name == TESTS:
            continue
        report = read(path)
        if report.evidence not in ("emulated", "hardware") or report.driver == "simulated":
            raise BadInput(f"{path.name}: {report.device} shows nothing about any device")
        if not report.whole:
            raise BadInput(f"{path.name}: only some checks ran; leave out --only")
        found.append(report)
    return tuple(found)


def claims(folder: Path = EVIDENCE, root: Path = ROOT) -> tuple[Claim, ...]:
    """What tests show. Raises BadInput when a test is not there."""
    path = folder / TESTS
    if not path.exists():
        return ()
    found = tuple(Claim(**each) for each in json.loads(path.read_text())["claims"])
    for claim in found:
        file, _, function = claim.test.partition("::")
        if claim.evidence not in ("compiled", "fake") or claim.capability not in CAPABILITIES:
            raise BadInput(f"{TESTS}: {claim} is no evidence that a test can give")
        text = (root / file).read_text() if (root / file).is_file() else ""
        if not re.search(rf"^def {re.escape(function)}\(", text, re.MULTILINE):
            raise BadInput(f"{TESTS}: there is no test {claim.test}")
    return found


def page(found: Sequence[Report], shown: Sequence[Claim]) -> str:
    """docs/support.md."""
    drivers = sorted({r.driver for r in found} | {c.driver for c in shown})
    table = {(d, c): _cell(d, c, found, shown) for d in drivers for c in CAPABILITIES}
    columns = [c for c in CAPABILITIES if any(table[d, c] for d in drivers)]
    empty = [f"`{c}`" for c in CAPABILITIES if c not in columns]
    return "\n".join(
        [
            "# What each driver can do, and how that was shown",
            "",
            "This page is written by `python tools/support.py` from [the reports](evidence) that",
            "`drivetrain conformance` wrote and from the tests named below. Numbers lead to the",
            "report or the test. An empty field was not declared, or not shown by anything here.",
            "",
            *_rows(["driver", *columns], ([d, *(table[d, c] for c in columns)] for d in drivers)),
            "",
            f"No driver here has {', '.join(empty)}." if empty else "",
            "",
            *_rows(["evidence", "what it says"], ([f"`{k}`", v] for k, v in KINDS.items())),
            "",
            "Kinds of evidence are never merged: each says what it says. A simulated device shows",
            "nothing about any other and is not listed.",
            "",
            "## Reports of devices",
            "",
            *_rows(
                ["", "driver", "device", "driver version", "evidence", "checks", "machine", "date"],
                (_report(number, report) for number, report in enumerate(found, 1)),
            ),
            "",
            "A new one: `drivetrain conformance NAME --report docs/evidence/NAME.json`, then",
            "`python tools/support.py`.",
            "",
            "## Tests that need no device",
            "",
            *_rows(
                ["", "driver", "capability", "evidence", "what it shows", "test"],
                (
                    [_letter(n), c.driver, c.capability, f"`{c.evidence}`", c.what, f"`{c.test}`"]
                    for n, c in enumerate(shown)
                ),
            ),
            "",
            "## How the kit itself is proven",
            "",
            f"A simulated device can have any of {len(CAUGHT_BY)} named defects. Each is caught by",
            "the check beside it, and the device without a defect passes them all:",
            "`drivetrain conformance --mutants`.",
            "",
            *_rows(
                ["mutant", "its defect", "caught by"],
                (
                    [f"`{mutant}`", defect_of(mutant), ", ".join(f"`{name}`" for name in names)]
                    for mutant, names in CAUGHT_BY.items()
                ),
            ),
            "",
        ]
    )


def _cell(driver: str, capability: str, found: Sequence[Report], shown: Sequence[Claim]) -> str:
    """Each kind of evidence with where it comes from."""
    words: dict[str, list[str]] = {}
    for number, report in enumerate(found, 1):
        state = report.shown(capability) if report.driver == driver else ""
        if state == PASSED:
            words.setdefault(report.evidence, []).append(str(number))
        elif state in (FAILED, NOT_HERE):
            words.setdefault(f"**{state}**", []).append(str(number))
    for number, claim in enumerate(shown):
        if (claim.driver, claim.capability) == (driver, capability):
            words.setdefault(claim.evidence, []).append(_letter(number))
    order = [*reversed(KINDS), *(word for word in words if word not in KINDS)]
    return ", ".join(f"{word} ({', '.join(words[word])})" for word in order if word in words)


def _report(number: int, report: Report) -> list[str]:
    counts = ", ".join(f"{len(report.of(s))} {s}" for s in STATES if report.of(s))
    machine = f"{report.machine['system']}, Python {report.machine['python']}"
    name = f"{report.device}, {report.name}"
    version, kind = report.driver_version, f"`{report.evidence}`"
    return [str(number), report.driver, name, version, kind, counts, machine, report.date]


def _letter(number: int) -> str:
    return chr(ord("a") + number) if number < 26 else f"a{_letter(number - 26)}"


def _rows(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [titles, ["---"] * len(titles), *rows]
    return [f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if it would differ")
    asked = parser.parse_args(arguments)
    try:
        text = page(reports(), claims())
    except BadInput as error:
        print(f"support: {error}", file=sys.stderr)
        return 2
    if asked.check:
        same = PAGE.exists() and PAGE.read_text() == text
        print(f"{PAGE.relative_to(ROOT)}: {'up to date' if same else 'differs'}")
        return 0 if same else 1
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
