"""Placement: hard filters, a score of documented terms, a decision that explains itself."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivetrain.errors import BadInput, PlacementError
from drivetrain.placement.policy import OPTIMISATIONS, WEIGHTS, Candidate, Workload, place, score

GIB = 1 << 30


def device(address: str, **more: Any) -> Candidate:
    driver = address.split(":")[0]
    given_: dict[str, Any] = {
        "key": address,
        "driver": driver,
        "vendor": {"cpu": "amd", "cuda": "nvidia", "hip": "amd"}.get(driver, driver),
        "name": address.upper(),
        "total_bytes": 16 * GIB,
        "free_bytes": 16 * GIB,
        "domain": "host" if driver == "cpu" else address,
        "utilisation": 0.0,
    }
    return Candidate(address, **(given_ | more))


def job(**more: Any) -> Workload:
    return Workload("train.py", **more)


CPU, GPU = device("cpu:0"), device("cuda:0")


def test_an_accelerator_wins_a_tie_whatever_the_order() -> None:
    for order in ([CPU, GPU], [GPU, CPU]):
        decision = place(job(), order)
        assert decision.address == "cuda:0"
        assert "an accelerator goes before a CPU" in decision.reason
        assert [s.address for s in decision.alternatives] == ["cpu:0"]


def test_the_cpu_wins_where_it_scores_better() -> None:
    busy = device("cuda:0", utilisation=0.9)
    decision = place(job(), [busy, CPU])
    assert decision.address == "cpu:0"
    assert "being more idle" in decision.reason


def test_the_terms_are_those_of_the_docstring() -> None:
    fast = device("cuda:0", known_step_seconds=0.1, utilisation=0.25, free_bytes=8 * GIB)
    slow = device("cuda:1", known_step_seconds=0.4, features=frozenset(OPTIMISATIONS[:3]))
    new = device("cuda:2", utilisation=None, peaks={"f32": 5.0, "copy": 10.0})
    other = device("cpu:0", peaks={"f32": 10.0})
    found = {s.address: s for s in score([fast, slow, new, other], needed=4 * GIB)}
    assert found["cuda:0"].terms == {
        "history": 1.0,
        "utilisation": 0.75,
        "optimisation": 0.0,
        "memory": 0.25,
    }
    assert found["cuda:0"].assumed == ()
    assert found["cuda:1"].terms["history"] == pytest.approx(0.25)
    assert found["cuda:1"].terms["optimisation"] == 0.5
    assert found["cuda:2"].terms["history"] == pytest.approx((0.5 + 1.0) / 2)
    assert found["cuda:2"].terms["utilisation"] == 0.5
    assert found["cuda:2"].assumed == ("history", "utilisation")
    assert found["cpu:0"].assumed == ("history",)
    expected = 0.4 * 1.0 + 0.3 * 0.75 + 0.2 * 0.0 + 0.1 * 0.25
    assert found["cuda:0"].score == pytest.approx(expected)


def test_without_history_and_peaks_the_history_is_half_and_assumed() -> None:
    decision = place(job(), [CPU])
    assert decision.terms["history"] == 0.5
    assert decision.assumed == ("history",)


def test_memory_needs_headroom_beside_leases() -> None:
    need = 10 * GIB
    tight = device("cuda:0", free_bytes=11 * GIB)
    roomy = device("cuda:1", free_bytes=12 * GIB, utilisation=1.0)
    decision = place(job(memory_bytes=need), [tight, roomy])
    assert decision.address == "cuda:1"
    assert decision.rejected[0].address == "cuda:0"
    assert "headroom" in decision.rejected[0].reason
    with pytest.raises(PlacementError, match=r"cuda:0: needs 10 GiB and headroom"):
        place(job(memory_bytes=need), [tight])


def test_memory_is_what_was_said_else_the_last_peak_else_assumed_zero() -> None:
    said = place(job(memory_bytes=3, last_peak_bytes=5), [GPU])
    assert (said.memory_bytes, said.memory_assumed) == (3, False)
    seen = place(job(last_peak_bytes=5), [GPU])
    assert (seen.memory_bytes, seen.memory_assumed) == (5, False)
    unknown = place(job(), [GPU])
    assert (unknown.memory_bytes, unknown.memory_assumed) == (0, True)


def test_replicas_count_against_host_memory_wherever_the_job_runs() -> None:
    small_host = device("cpu:0", free_bytes=2 * GIB)
    with pytest.raises(PlacementError, match="host memory"):
        place(job(host_bytes=3 * GIB), [small_host, GPU])
    assert place(job(host_bytes=GIB), [small_host, GPU]).address == "cuda:0"
    with pytest.raises(PlacementError, match="for replicas"):
        place(job(memory_bytes=GIB, host_bytes=GIB), [small_host])
    shared = device("cuda:0", domain="host", free_bytes=2 * GIB)
    with pytest.raises(PlacementError, match="for replicas"):
        place(job(memory_bytes=GIB, host_bytes=GIB), [small_host, shared])
    assert "not checked" in place(job(host_bytes=GIB), [GPU]).warnings[0]


def test_features_exclusions_and_unusable_devices_are_filters_with_reasons() -> None:
    candidates = [
        device("cuda:0", features=frozenset({"bf16"})),
        device("cuda:1", usable=False, reason="the driver is too old"),
        device("cuda:2", features=frozenset({"bf16"}), usable=True),
        CPU,
    ]
    decision = place(job(features=("bf16",), exclude=("cuda:0",)), candidates)
    assert decision.address == "cuda:2"
    assert {r.address: r.reason for r in decision.rejected} == {
        "cuda:0": "excluded",
        "cuda:1": "the driver is too old",
        "cpu:0": "it lacks bf16",
    }


def test_a_preferred_vendor_is_taken_even_with_a_lower_score() -> None:
    weak = device("hip:0", utilisation=0.9)
    decision = place(job(prefer=("AMD",)), [GPU, weak])
    assert decision.address == "hip:0"
    assert decision.warnings == ()
    assert decision.rejected[0].reason == "AMD was preferred"


def test_an_absent_preference_is_passed_over_with_a_warning_or_fails_when_strict() -> None:
    decision = place(job(prefer=("intel", "nvidia")), [CPU, GPU])
    assert decision.address == "cuda:0"
    assert len(decision.warnings) == 1
    assert "intel" in decision.warnings[0]
    assert "nvidia is used instead" in decision.warnings[0]
    decision = place(job(prefer=("intel",)), [CPU, GPU])
    assert "any other device" in decision.warnings[0]
    with pytest.raises(PlacementError, match=r"preferred intel .*none is there.*--strict"):
        place(job(prefer=("intel", "nvidia"), strict=True), [CPU, GPU])


def test_a_preferred_device_that_does_not_fit_is_named_with_its_reason() -> None:
    full = device("cuda:0", free_bytes=0)
    decision = place(job(prefer=("nvidia",), memory_bytes=GIB), [CPU, full])
    assert decision.address == "cpu:0"
    assert "cuda:0: needs 1 GiB" in decision.warnings[0]


def test_on_an_address_means_that_device_only() -> None:
    decision = place(job(on="cpu:0", prefer=("nvidia",), strict=True), [CPU, GPU])
    assert decision.address == "cpu:0"
    assert decision.rejected[0].reason == "cpu:0 was asked for"
    with pytest.raises(BadInput, match=r"no device cuda:9; there are: cpu:0, cuda:0"):
        place(job(on="cuda:9"), [CPU, GPU])
    with pytest.raises(PlacementError, match=r"cannot run on cuda:0: needs"):
        place(job(on="cuda:0", memory_bytes=99 * GIB), [CPU, GPU])


def test_a_device_for_callers_by_name_is_not_chosen_by_itself() -> None:
    runtime = device("opencl:0", by_name_only=True)
    busy = device("cpu:0", utilisation=1.0)
    assert place(job(), [runtime, busy]).address == "cpu:0"
    assert place(job(prefer=("opencl",)), [runtime, busy]).address == "opencl:0"
    assert place(job(on="opencl:0"), [runtime, busy]).address == "opencl:0"


def test_no_device_at_all_is_said() -> None:
    with pytest.raises(PlacementError, match="no device was found"):
        place(job(), [])


def test_a_decision_is_json() -> None:
    decision = place(job(memory_bytes=1), [CPU, GPU, device("cuda:1", usable=False)])
    found = json.loads(json.dumps(decision.to_json()))
    assert found["address"] == decision.address
    assert found["terms"] == dict(decision.terms)
    assert found["alternatives"][0]["address"] == "cpu:0"
    assert found["rejected"][0]["reason"] == "not usable"


def _candidates() -> st.SearchStrategy[list[Candidate]]:
    size = st.integers(0, 64 * GIB)
    one = st.builds(
        lambda total, free, busy, peaks, step: device(
            "cuda:0",
            total_bytes=total,
            free_bytes=free,
            utilisation=busy,
            peaks=peaks,
            known_step_seconds=step,
        ),
        size,
        size,
        st.none() | st.floats(0, 1),
        st.dictionaries(st.sampled_from(["a", "b"]), st.floats(0, 1e15)),
        st.none() | st.floats(0, 1e6),
    )
    return st.lists(one, min_size=1, max_size=5)


@given(_candidates(), st.integers(0, 64 * GIB))
def test_every_term_is_in_the_unit_interval_and_the_best_comes_first(
    candidates: list[Candidate], needed: int
) -> None:
    scored = score(candidates, needed)
    for one in scored:
        assert set(one.terms) == set(WEIGHTS)
        assert all(0.0 <= term <= 1.0 for term in one.terms.values())
        assert one.score == pytest.approx(sum(WEIGHTS[t] * v for t, v in one.terms.items()))
    values = [round(one.score, 9) for one in scored]
    assert values == sorted(values, reverse=True)
