"""The kit itself is proven: each named defect is caught by the check that is named for it."""

from __future__ import annotations

import pytest

from drivetrain.errors import BadInput
from drivetrain.hal.conformance import mutants
from drivetrain.hal.conformance.check import checks
from drivetrain.hal.conformance.mutants import CAUGHT_BY, Verdict, prove
from drivetrain.hal.drivers.simulated_mutants import MUTANTS, defect_of

SAMPLE = (
    "free_ignores_stream",
    "copy_short",
    "view_offset_dropped",
    "event_done_early",
    "wait_ignored",
    "oom_wrong_error",
    "graph_drops_last",
    "work_error_swallowed",
    "double_free_accepted",
    "atomic_lost",
    "barrier_skipped",
    "events_leak",
    "priority_crashes",
)
"""What the default run proves; ``make soak`` proves all."""


def missed(verdicts: tuple[Verdict, ...]) -> list[str]:
    return [
        f"{v.mutant}: {[(r.name, r.state, r.reason) for r in (*v.results, *v.control)]}"
        for v in verdicts
        if not v.caught
    ]


def test_every_mutant_has_a_check_that_must_catch_it() -> None:
    assert len(MUTANTS) >= 25
    assert set(CAUGHT_BY) == set(MUTANTS)
    known = {check.name for check in checks() if not check.long}
    assert {name for names in CAUGHT_BY.values() for name in names} <= known
    assert all(CAUGHT_BY.values())
    assert all(defect_of(name) for name in MUTANTS)


@pytest.mark.timeout(300)
def test_a_sample_of_mutants_is_caught_and_the_device_without_a_defect_is_not() -> None:
    verdicts = prove(SAMPLE)
    assert missed(verdicts) == []
    assert [verdict.mutant for verdict in verdicts] == list(SAMPLE)


def test_a_mutant_that_its_checks_do_not_see_is_not_called_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The control of the proof: a check that has nothing to do with the defect."""
    monkeypatch.setattr(mutants, "CAUGHT_BY", {"copy_short": ("memory.alignment",)})
    (verdict,) = prove(["copy_short"])
    assert not verdict.caught
    assert [result.state for result in verdict.results] == ["passed"]


def test_a_mutant_that_there_is_not_is_refused() -> None:
    with pytest.raises(BadInput, match="no mutant copy_shorter"):
        prove(["copy_shorter"])


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_every_mutant_is_caught() -> None:
    assert missed(prove()) == []
