"""What came of the checks, as facts that can be kept and read again."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drivetrain.errors import BadInput
from drivetrain.hal.driver import GROUPS

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
NOT_DECLARED, NOT_HERE = "not declared", "not here"
STATES = {
    PASSED: "the promise was seen to hold",
    FAILED: "it does not hold",
    SKIPPED: "the device said Unsupported, or the machine has no compiler",
    NOT_DECLARED: "the driver does not declare what it needs",
    NOT_HERE: "it needs a second device, which this machine does not have",
}

FAKE, EMULATED, HARDWARE, NONE = "fake", "emulated", "hardware", ""
DISCOVERY, CORE = "discovery", "core"
"""Beside the groups: what every driver has, and memory, streams and events, which every device
that opens has."""
FORM = 1
"""Of the JSON below; another number is another form."""


@dataclass(frozen=True)
class Result:
    """What came of one check."""

    name: str
    state: str
    """One of `STATES`."""
    reason: str
    seconds: float
    proves: str
    needs: tuple[str, ...] = ()
    optional: str = ""
    """What a device may lack, so that skipping the check is no gap."""

    @property
    def topic(self) -> str:
        return self.name.partition(".")[0]


@dataclass(frozen=True)
class Report:
    """What came of all of them, on one device."""

    driver: str
    device: str
    name: str
    vendor: str
    driver_version: str
    api_version: int
    groups: tuple[str, ...]
    """What the open device declares."""
    evidence: str
    """``hardware``, ``emulated`` or ``fake``; empty for a simulated device, which shows nothing."""
    date: str
    seconds: float
    whole: bool
    """Whether all checks ran, not some that were asked for."""
    long: bool
    """Whether the long ones ran too."""
    machine: dict[str, str] = field(default_factory=dict)
    results: tuple[Result, ...] = ()

    def of(self, state: str) -> tuple[Result, ...]:
        return tuple(result for result in self.results if result.state == state)

    @property
    def gaps(self) -> tuple[str, ...]:
        """What is declared and was not shown: checks that were skipped though no device may lack
        what they show, and groups that the kit knows no check for."""
        skipped = [f"{r.name}: {r.reason}" for r in self.of(SKIPPED) if not r.optional]
        known = {need for r in self.results for need in r.needs}
        unknown = sorted(set(self.groups) - known) if self.whole else []
        return (*skipped, *(f"group {name}: the kit has no check for it" for name in unknown))

    @property
    def passed(self) -> bool:
        """Whether all that the driver declares was shown, as far as this machine can."""
        return not self.of(FAILED) and not self.gaps and bool(self.of(PASSED))

    def shown(self, group: str) -> str:
        """What came of a group's checks in all, or with `DISCOVERY` and `CORE` of those that need
        no group: ``failed`` if one did, else ``passed`` if one did, else the state they have;
        ``not run`` or ``not declared`` where there is none."""
        if group not in (DISCOVERY, CORE, *self.groups):
            return NOT_DECLARED
        states = {r.state for r in self.results if _is_of(r, group)}
        order = (FAILED, PASSED, SKIPPED, NOT_HERE)
        return next((state for state in order if state in states), "not run")

    def as_json(self) -> dict[str, Any]:
        facts = {name: getattr(self, name) for name in self.__dataclass_fields__}
        facts["groups"] = list(self.groups)
        facts["results"] = [
            {**{n: getattr(r, n) for n in r.__dataclass_fields__}, "needs": list(r.needs)}
            for r in self.results
        ]
        return {
            "form": FORM,
            **{name: value for name, value in facts.items() if name != "results"},
            "passed": self.passed,
            "gaps": list(self.gaps),
            "counts": {state: len(self.of(state)) for state in STATES},
            "results": facts["results"],
        }


def _is_of(result: Result, group: str) -> bool:
    if group in (CORE, DISCOVERY):
        return not GROUPS.keys() & set(result.needs) and (result.topic == DISCOVERY) == (
            group == DISCOVERY
        )
    return group in result.needs or group == result.topic


def from_json(facts: Any) -> Report:
    """The report that `Report.as_json` wrote. Raises BadInput for anything else."""
    if not isinstance(facts, dict) or facts.get("form") != FORM:
        raise BadInput(f"this is no report of form {FORM} by drivetrain conformance")
    try:
        results = tuple(
            Result(**{**each, "needs": tuple(each["needs"])}) for each in facts["results"]
        )
        names = set(Report.__dataclass_fields__) - {"results", "groups"}
        return Report(
            **{name: facts[name] for name in names},
            groups=tuple(facts["groups"]),
            results=results,
        )
    except (KeyError, TypeError) as error:
        raise BadInput(f"this is no whole report: {error}") from error


def read(path: Path) -> Report:
    """The report in a file. Raises BadInput."""
    try:
        return from_json(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: {error}") from error
