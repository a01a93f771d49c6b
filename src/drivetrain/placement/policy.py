"""Which device a workload gets: hard filters first, then a score of four terms.

The decision carries every number that went into it, so that a person can follow it.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from drivetrain.errors import BadInput, PlacementError

WEIGHTS = {"history": 0.4, "utilisation": 0.3, "optimisation": 0.2, "memory": 0.1}
HEADROOM = 1.15
"""A device must have this many times the memory that the workload needs."""
OPTIMISATIONS = ("bf16", "f16", "matrix", "graphs", "compile", "triton")
"""What makes a workload faster on a device; the optimisation term is the share it has."""
UNKNOWN = 0.5
"""The value of a term of which nothing is known; it is listed as assumed."""


@dataclass(frozen=True)
class Workload:
    """What is to be placed.

    ``memory_bytes``: device memory that the caller asked for, None if it did not say; then
    ``last_peak_bytes``, what this script took last time, counts. ``host_bytes``: replicas and
    segments, which take host memory wherever the workload runs. ``features`` must all be there.
    ``prefer``: vendors (or drivers, or addresses), best first. ``on``: "auto" or one address.
    ``strict``: fail rather than pass over the first preference. ``exclude``: addresses.
    """

    script_key: str
    memory_bytes: int | None = None
    host_bytes: int = 0
    features: tuple[str, ...] = ()
    prefer: tuple[str, ...] = ()
    on: str = "auto"
    strict: bool = False
    exclude: tuple[str, ...] = ()
    last_peak_bytes: int | None = None


@dataclass(frozen=True)
class Candidate:
    """One device as it is now.

    ``free_bytes``: after other processes, the control group's limit and all leases. ``domain``:
    devices of one domain share one memory. ``utilisation``: 0 idle to 1 busy, None if not known.
    ``features``: what `Workload.features` and `OPTIMISATIONS` ask for. ``peaks``: calibrated rates
    by name (FLOP/s, bytes/s). ``known_step_seconds``: of this script here. ``usable``: None means
    not checked yet. ``support``: why torch cannot use it; empty where it can. ``by_name_only``:
    never chosen unless preferred or asked for; ``hint`` says why, where there is more to say.
    """

    address: str
    key: str
    driver: str
    vendor: str
    name: str
    total_bytes: int
    free_bytes: int
    domain: str
    utilisation: float | None = None
    features: frozenset[str] = frozenset()
    peaks: Mapping[str, float] = field(default_factory=dict)
    known_step_seconds: float | None = None
    usable: bool | None = None
    reason: str = ""
    support: str = ""
    by_name_only: bool = False
    hint: str = ""

    @property
    def is_cpu(self) -> bool:
        return self.driver == "cpu"


@dataclass(frozen=True)
class Scored:
    """A device that could take the workload: its score, each term, and which were assumed."""

    address: str
    name: str
    score: float
    terms: Mapping[str, float]
    assumed: tuple[str, ...]


@dataclass(frozen=True)
class Rejected:
    """A device that could not, with the reason."""

    address: str
    name: str
    reason: str


@dataclass(frozen=True)
class Placement:
    """A decision: the device, the score with its terms, the reason, and what else there was.

    ``memory_assumed``: nobody said or knew how much memory is needed.
    """

    address: str
    score: float
    terms: Mapping[str, float]
    assumed: tuple[str, ...]
    reason: str
    warnings: tuple[str, ...]
    alternatives: tuple[Scored, ...]
    rejected: tuple[Rejected, ...]
    memory_bytes: int
    memory_assumed: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def place(workload: Workload, candidates: Sequence[Candidate]) -> Placement:
    """Choose a device.

    Raises BadInput for an address that does not exist and PlacementError, naming what ruled each
    device out, when none fits.
    """
    known = {candidate.address: candidate for candidate in candidates}
    asked = "" if workload.on in ("", "auto") else workload.on
    if asked and asked not in known:
        there = ", ".join(sorted(known)) or "none"
        raise BadInput(f"There is no device {asked}; there are: {there}")
    needed, assumed = _needed(workload)
    fitting: list[Candidate] = []
    rejected: list[Rejected] = []
    for candidate in candidates:
        why = _obstacle(workload, candidate, needed, candidates, asked)
        if why:
            rejected.append(Rejected(candidate.address, candidate.name, why))
        else:
            fitting.append(candidate)
    warnings: list[str] = []
    if fitting and not asked:
        fitting = _preferred(workload, candidates, fitting, rejected, warnings)
    if not fitting:
        raise PlacementError(_nothing_fits(asked, rejected))
    if workload.host_bytes and not _host_free(candidates):
        warnings.append("host memory for replicas was not checked: no CPU device is listed")
    scored = score(fitting, needed)
    best, others = scored[0], scored[1:]
    return Placement(
        best.address,
        best.score,
        best.terms,
        best.assumed,
        _reason(best, others, bool(asked), {c.address for c in candidates if c.is_cpu}),
        tuple(warnings),
        others,
        tuple(rejected),
        needed,
        assumed,
    )


# -- hard filters ---------------------------------------------------------------------------------


def _needed(workload: Workload) -> tuple[int, bool]:
    if workload.memory_bytes is not None:
        return workload.memory_bytes, False
    if workload.last_peak_bytes is not None:
        return workload.last_peak_bytes, False
    return 0, True


def _host_free(candidates: Sequence[Candidate]) -> dict[str, int]:
    """Free bytes of each host memory domain."""
    free: dict[str, int] = {}
    for candidate in candidates:
        if candidate.is_cpu:
            free[candidate.domain] = max(free.get(candidate.domain, 0), candidate.free_bytes)
    return free


def _obstacle(
    workload: Workload,
    candidate: Candidate,
    needed: int,
    candidates: Sequence[Candidate],
    asked: str,
) -> str:
    """Why the workload cannot run there; empty if it can."""
    if asked and candidate.address != asked:
        return f"{asked} was asked for"
    if candidate.address in workload.exclude:
        return "excluded"
    if candidate.usable is False:
        return candidate.reason or "not usable"
    if candidate.support:
        return candidate.support
    if candidate.by_name_only and not asked and not _is_preferred(candidate, workload.prefer):
        hint = f": {candidate.hint}" if candidate.hint else ""
        return f"used only when asked for by name{hint}"
    missing = [feature for feature in workload.features if feature not in candidate.features]
    if missing:
        return f"it lacks {', '.join(missing)}"
    return _memory_obstacle(workload, candidate, needed, _host_free(candidates))


def _memory_obstacle(
    workload: Workload, candidate: Candidate, needed: int, host: Mapping[str, int]
) -> str:
    with_headroom = int(needed * HEADROOM)
    shares_host = candidate.domain in host
    here = with_headroom + (workload.host_bytes if shares_host else 0)
    if here > candidate.free_bytes:
        parts = f"{_size(needed)} and headroom"
        if shares_host and workload.host_bytes:
            parts += f" and {_size(workload.host_bytes)} for replicas"
        return f"needs {parts}, {_size(candidate.free_bytes)} of its memory are free"
    if not shares_host and host and workload.host_bytes > max(host.values()):
        return (
            f"replicas and segments need {_size(workload.host_bytes)} of host memory, "
            f"{_size(max(host.values()))} are free"
        )
    return ""


def _is_preferred(candidate: Candidate, prefer: Sequence[str]) -> bool:
    return any(_matches(candidate, name) for name in prefer)


def _matches(candidate: Candidate, name: str) -> bool:
    names = (candidate.vendor.lower(), candidate.driver.lower(), candidate.address.lower())
    return name.lower() in names


def _preferred(
    workload: Workload,
    candidates: Sequence[Candidate],
    fitting: list[Candidate],
    rejected: list[Rejected],
    warnings: list[str],
) -> list[Candidate]:
    """Keep the devices of the first preference that has one; warn of those passed over."""
    passed: list[str] = []
    reasons = {r.address: r.reason for r in rejected}
    for name in workload.prefer:
        kept = [candidate for candidate in fitting if _matches(candidate, name)]
        if kept:
            rejected.extend(
                Rejected(c.address, c.name, f"{name} was preferred")
                for c in fitting
                if c not in kept
            )
            warnings.extend(f"{why}; {name} is used instead" for why in passed)
            return kept
        there = [c for c in candidates if _matches(c, name)]
        facts = "; ".join(f"{c.address}: {reasons.get(c.address, 'not usable')}" for c in there)
        why = f"no device of the preferred {name} can be used ({facts or 'none is there'})"
        if workload.strict:
            raise PlacementError(
                f"{why[0].upper()}{why[1:]}. Leave out --strict to use another device"
            )
        passed.append(why)
    warnings.extend(f"{why}; any other device is used instead" for why in passed)
    return fitting


def _nothing_fits(asked: str, rejected: Sequence[Rejected]) -> str:
    if asked:
        why = next((r.reason for r in rejected if r.address == asked), "it is not there")
        return f"The workload cannot run on {asked}: {why}. Choose another device"
    facts = "; ".join(f"{r.address}: {r.reason}" for r in rejected) or "no device was found"
    return f"No device can take the workload. {facts}"


# -- score ----------------------------------------------------------------------------------------


def score(candidates: Sequence[Candidate], needed: int = 0) -> tuple[Scored, ...]:
    """Score candidates that passed the filters, best first; an accelerator wins a tie.

    Each term is in [0, 1] and the score is their weighted sum (`WEIGHTS`):

    * history: the best known step time of this script on any candidate, divided by this device's.
      Where this device's is not known, its calibrated peaks divided by the best candidate's (mean
      over the peaks it has), and without peaks 0.5; both are assumed.
    * utilisation: the share of the device that is idle, 1 - utilisation; 0.5, assumed, if unknown.
    * optimisation: the share of `OPTIMISATIONS` that the device supports.
    * memory: the share of the device's memory that stays free once the workload has its own.
    """
    times = [c.known_step_seconds for c in candidates if c.known_step_seconds]
    best_time = min(times, default=None)
    best_peaks: dict[str, float] = {}
    for candidate in candidates:
        for name, rate in candidate.peaks.items():
            best_peaks[name] = max(best_peaks.get(name, 0.0), rate)
    scored = []
    for candidate in candidates:
        terms, assumed = {}, []
        if best_time is not None and candidate.known_step_seconds:
            terms["history"] = best_time / candidate.known_step_seconds
        else:
            terms["history"] = _peak_ratio(candidate, best_peaks)
            assumed.append("history")
        if candidate.utilisation is None:
            terms["utilisation"] = UNKNOWN
            assumed.append("utilisation")
        else:
            terms["utilisation"] = 1.0 - candidate.utilisation
        having = sum(feature in candidate.features for feature in OPTIMISATIONS)
        terms["optimisation"] = having / len(OPTIMISATIONS)
        total = max(candidate.total_bytes, 1)
        terms["memory"] = (candidate.free_bytes - needed) / total
        terms = {name: min(1.0, max(0.0, value)) for name, value in terms.items()}
        value = sum(WEIGHTS[name] * term for name, term in terms.items())
        scored.append(Scored(candidate.address, candidate.name, value, terms, tuple(assumed)))
    cpus = {candidate.address for candidate in candidates if candidate.is_cpu}
    # Rounded for the order only: a difference in the last bits is a tie.
    return tuple(sorted(scored, key=lambda s: (-round(s.score, 9), s.address in cpus)))


def _peak_ratio(candidate: Candidate, best: Mapping[str, float]) -> float:
    ratios = [rate / best[name] for name, rate in candidate.peaks.items() if best[name] > 0]
    return sum(ratios) / len(ratios) if ratios else UNKNOWN


# -- words ----------------------------------------------------------------------------------------

_PHRASES = {
    "history": "its step time",
    "utilisation": "being more idle",
    "optimisation": "supporting more optimisations",
    "memory": "its free memory",
}


def _reason(best: Scored, others: Sequence[Scored], was_asked: bool, cpus: Container[str]) -> str:
    name = f"{best.address} ({best.name})"
    if was_asked:
        return f"{name} was asked for and fits."
    if not others:
        return f"{name} is the only device that fits."
    second = others[0]
    gains = {t: WEIGHTS[t] * (best.terms[t] - second.terms[t]) for t in WEIGHTS}
    decisive = max(gains, key=lambda term: gains[term])
    if best.score - second.score <= 1e-9:
        goes_first = best.address not in cpus and second.address in cpus
        what = "an accelerator goes before a CPU" if goes_first else "it is listed first"
        return f"{name} scores {best.score:.2f}, as much as {second.address}; {what}."
    guess = " (assumed)" if decisive in best.assumed or decisive in second.assumed else ""
    return (
        f"{name} scores {best.score:.2f} against {second.score:.2f} of {second.address}, mostly "
        f"for {_PHRASES[decisive]}{guess}."
    )


def _size(nbytes: int) -> str:
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} TiB"
