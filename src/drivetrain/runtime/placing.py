"""Between the policy and the machine: what devices look like now, and whose memory is whose."""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from drivetrain import hal
from drivetrain.errors import BadInput, DrivetrainError, PlacementError
from drivetrain.hal.device import Device
from drivetrain.hal.probe import probe, verdicts
from drivetrain.migration.moves import MOST_RING_BYTES
from drivetrain.migration.prediction import Past
from drivetrain.placement import calibration
from drivetrain.placement.policy import HEADROOM, Candidate, Placement, Workload, place
from drivetrain.pytorch.support import Support, support
from drivetrain.runtime import vendor
from drivetrain.runtime.process import Worker
from drivetrain.runtime.status import StatusPage
from drivetrain.store.database import Database, Lease
from drivetrain.store.process import ProcessId

_GPU_GBPS = 20.0
_CORE_GBPS = 2.0
_FALLBACK_GBPS = 2.0


def script_key(script: str) -> str:
    """What history is kept under: the script's path and content."""
    digest = hashlib.blake2b(digest_size=12)
    digest.update(script.encode())
    with contextlib.suppress(OSError):
        digest.update(Path(script).read_bytes())
    return digest.hexdigest()


def copy_gbps(database: Database, source: str, target: str, strategy: str) -> float:
    """GB/s that a move's copy between two addresses is taken to reach: that of the last one between
    such drivers, else by way of the host as ``calibrate`` measured it, else a careful guess.

    A copy between peers may turn out to be staged, so nothing is promised of one unseen."""
    drivers = (_kind(source), _kind(target), strategy)
    for move in database.moves():
        if not move.bandwidth or move.nbytes < 64 << 20:
            continue
        if (_kind(move.source), _kind(move.target), move.strategy) == drivers:
            return float(move.bandwidth)
    if strategy == "checkpointed":
        return _FALLBACK_GBPS  # through a disk
    try:
        start, end = hal.device(source), hal.device(target)
    except DrivetrainError:  # a job may leave a device that is not listed any more
        return _FALLBACK_GBPS
    return min(_host_gbps(start, "to host"), _host_gbps(end, "from host"))


def _host_gbps(device: Device, way: str) -> float:
    """GB/s between a device and host memory, where nothing was moved yet."""
    if device.driver == "cpu":  # each core copies, up to what a GPU is guessed to take
        return min(_CORE_GBPS * (device.capabilities.cores or 1), _GPU_GBPS)
    known = calibration.load(device)
    measured = 0.0 if known is None else known.links.get(way, 0.0)
    return measured or (_GPU_GBPS if device.driver == "cuda" else _FALLBACK_GBPS)


def past_moves(
    database: Database, source: str, target: str, strategy: str, job: str = ""
) -> list[Past]:
    """Moves between two addresses' drivers, oldest first; those of ``job`` are its own."""
    drivers = (_kind(source), _kind(target), strategy)
    return [
        Past(
            move.nbytes,
            move.predicted_s,
            move.real_s,
            move.nbytes / move.bandwidth / 1e9 if move.bandwidth else 0.0,
            move.job == job,
        )
        for move in reversed(database.moves())
        if move.predicted_s is not None
        and move.real_s is not None
        and (_kind(move.source), _kind(move.target), move.strategy) == drivers
    ]


def _kind(address: str) -> str:
    return address.split(":", maxsplit=1)[0]


class Placer:
    """Chooses devices for one job and holds its leases."""

    def __init__(self, database: Database, spec: dict[str, Any]) -> None:
        self._database = database
        self._spec = spec
        self._key = script_key(str(spec["script"]))
        self._state_bytes = database.peak_bytes(self._key + ":state") or 0
        self._named = vendor.named_device(str(spec["script"]))
        self._python = str(spec.get("python") or sys.executable)

    # -- choosing -------------------------------------------------------------------------

    def _workload(
        self, on: str, exclude: Sequence[str], features: tuple[str, ...] = ()
    ) -> Workload:
        copies = 2 if self._spec.get("replicas", True) else 0
        return Workload(
            script_key=self._key,
            memory_bytes=self._spec.get("memory"),
            host_bytes=copies * self._state_bytes + (MOST_RING_BYTES if self._state_bytes else 0),
            features=features,
            prefer=tuple(self._spec.get("prefer", ())),
            on=on,
            strict=bool(self._spec.get("strict")),
            exclude=tuple(exclude),
            last_peak_bytes=self._database.peak_bytes(self._key),
        )

    def candidates(self, named: Sequence[str] = ()) -> list[tuple[Candidate, Device]]:
        """Every listed device as it is now; those not checked yet are probed first. ``named``:
        addresses asked for by name beside the submission's own."""
        names = self._names(named)
        devices = [*hal.devices(), *(d for d in hal.devices("simulated") if d.address in names)]
        known = verdicts(devices)
        unchecked = [
            d
            for d in devices
            if known[d].usable is None
            and not (self._by_name_only(d) and not names & {d.driver, d.vendor.lower(), d.address})
        ]
        if unchecked:
            known = {**known, **probe(unchecked)}
        seconds = self._database.step_seconds(self._key)
        found = []
        for device in devices:
            total, free = self._room(device)
            peaks = calibration.load(device)
            reading = device.telemetry()
            torch = self.support(device)
            found.append(
                (
                    Candidate(
                        address=device.address,
                        key=device.uuid,
                        driver=device.driver,
                        vendor=device.vendor,
                        name=device.name,
                        total_bytes=total,
                        free_bytes=free,
                        domain=device.memory_domain,
                        utilisation=reading.utilisation,
                        features=frozenset(_features(device, torch)),
                        peaks=dict(peaks.peak_flops) if peaks is not None else {},
                        known_step_seconds=seconds.get(device.uuid),
                        usable=known[device].usable,
                        reason=known[device].reason,
                        support=torch.reason,
                        by_name_only=(self._by_name_only(device) or bool(torch.missing))
                        and device.address not in names,
                        hint=torch.missing,
                    ),
                    device,
                )
            )
        return found

    def support(self, device: Device) -> Support:
        """How the torch of the job's environment gets at a device."""
        return support(device, self._python)

    @staticmethod
    def _by_name_only(device: Device) -> bool:
        """Another runtime on the processor, or a driver with which no job was shown yet on
        hardware."""
        return device.info.by_name_only or device.driver in ("opencl", "hip", "sycl", "simulated")

    def _names(self, more: Sequence[str]) -> set[str]:
        """What the job is to run on by name, and ``more``: addresses, drivers, vendors."""
        named = (self._spec.get("on"), *self._spec.get("prefer", ()), *more)
        return {str(name).lower() for name in named if name}

    def _room(self, device: Device) -> tuple[int, int]:
        """(bytes that jobs may lease in all, bytes still free of leases) of a device's memory.

        Memory that others use is taken off first; what lease holders use is in their leases.
        """
        now = device.memory()
        leases = self._database.leases(device.memory_domain)
        leased = sum(lease.nbytes for lease in leases)
        if device.driver == "cpu":
            ours = sum(_resident(pid) for pid in {lease.owner.pid for lease in leases})
        else:
            ours = leased
        others = max(0, now.used_bytes - ours)
        capacity = max(0, now.total_bytes - others)
        return capacity, max(0, capacity - leased)

    def choose(
        self, *, exclude: Sequence[str] = (), on: str | None = None
    ) -> tuple[dict[str, Any], Device]:
        """A placement as JSON (``device`` is its address) and the device.

        Raises PlacementError naming what ruled each device out.
        """
        wanted = on or str(self._spec.get("on") or "auto")
        if wanted != "auto":
            wanted = hal.device(wanted).address
        pairs = self.candidates((wanted,))
        listed = {device.address: device for _, device in pairs}
        if wanted != "auto" and wanted not in listed:
            raise BadInput(
                f"{wanted} is another route to a listed device: use that device's address"
            )
        decision = self._place(wanted, exclude, [candidate for candidate, _ in pairs])
        facts = decision.to_json()
        facts["device"] = decision.address
        device = listed[decision.address]
        torch = self.support(device)
        if torch.missing:
            warning = (
                f"{torch.missing}: {device.address} is used through Drivetrain's own kernels. "
                f"With torch's build for {device.vendor} it is torch's own device"
            )
            facts["warnings"] = [*facts.get("warnings", ()), warning]
        if self._named is not None and not _is_named(self._named.device_type, torch):
            there = torch.torch_device or "a device of Drivetrain's"
            warning = vendor.warning(self._named, device.address, there)
            facts["warnings"] = [*facts.get("warnings", ()), warning]
        return facts, device

    def _place(self, on: str, exclude: Sequence[str], candidates: list[Candidate]) -> Placement:
        """A device of the kind that the script names, where one fits and nobody prefers others;
        else any that does."""
        if self._named is not None and on == "auto" and not self._spec.get("prefer"):
            features = (vendor.FEATURE + self._named.device_type,)
            with contextlib.suppress(PlacementError):
                return place(self._workload(on, exclude, features), candidates)
        return place(self._workload(on, exclude), candidates)

    def ranked(self, *, exclude: Sequence[str] = (), named: Sequence[str] = ()) -> list[Device]:
        """Every device that could take the job now, best first. Those in ``named``, backups and
        the standby's are asked for by name."""
        backups = [*self._spec.get("backup", ()), self._spec.get("standby") or ""]
        pairs = self.candidates((*named, *map(str, backups)))
        listed = {device.address: device for _, device in pairs}
        remaining = [candidate for candidate, _ in pairs]
        found: list[Device] = []
        taken = list(exclude)
        while remaining:
            try:
                decision = self._place("auto", taken, remaining)
            except PlacementError:
                break
            found.append(listed[decision.address])
            taken.append(decision.address)
        return found

    def check_fits(self, device: Device, state_bytes: int, peak_bytes: int) -> None:
        """Refuse, before anything is started, a target that torch cannot use, or without room for
        the job."""
        reason = self.support(device).reason
        if reason:
            raise BadInput(f"the job cannot go to {device.address}: {reason}")
        needed = int(self._spec.get("memory") or 0) or max(
            state_bytes, peak_bytes if device.driver == "cpu" else state_bytes
        )
        _, free = self._room(device)
        if int(needed * HEADROOM) > free:
            raise BadInput(
                f"{device.address} has too little memory: the job needs {needed / 2**30:.2f} GiB "
                "and "
                f"{(HEADROOM - 1) * 100:.0f}% headroom, {free / 2**30:.2f} GiB are free"
            )

    # -- leases ---------------------------------------------------------------------------

    def lease(self, device: Device, job: str) -> Lease:
        """Reserve the job's memory on a device for this process, to be given to its worker."""
        capacity, _ = self._room(device)
        needed = self._spec.get("memory")
        if needed is None:
            needed = self._database.peak_bytes(self._key) or 0
        return self._database.lease(
            device.memory_domain,
            capacity,
            int(needed),
            ProcessId.of(),
            job,
            device_key=device.uuid,
        )

    def give(self, lease: Lease, owner: ProcessId) -> Lease:
        """The worker holds the lease from now on: it ends with the worker."""
        return self._database.transfer(lease, owner)

    def adopt(self, device: Device, owner: ProcessId, job: str) -> Lease | None:
        """The lease of a worker that an earlier runtime started; renewed when it was lost."""
        for lease in self._database.leases(device.memory_domain):
            if lease.owner == owner:
                return lease
        with contextlib.suppress(DrivetrainError):
            return self._database.lease(
                device.memory_domain, 1 << 62, 0, owner, job, device_key=device.uuid
            )
        return None

    def keep(self, lease: Lease | None) -> None:
        """Put a lease back that the database has lost (its file was deleted)."""
        if lease is None:
            return
        with contextlib.suppress(DrivetrainError):
            if all(known.id != lease.id for known in self._database.leases(lease.domain)):
                self._database.renew(lease)

    def measured(self, worker: Worker, peak_bytes: int) -> None:
        """After the first step the lease becomes what the worker really takes."""
        if worker.lease is None or self._spec.get("memory") is not None or peak_bytes <= 0:
            return
        with contextlib.suppress(DrivetrainError):
            worker.lease = self._database.resize(worker.lease, peak_bytes)

    def release(self, lease: Lease | None) -> None:
        if lease is not None:
            with contextlib.suppress(DrivetrainError):
                self._database.release(lease)

    def remember_choice(self, job: str, placement: dict[str, Any]) -> None:
        """Keep a placement among the past ones; the journal is the authority."""
        with contextlib.suppress(DrivetrainError):
            self._database.add_placement(job, placement)

    def remember(self, device: Device | None, page: StatusPage) -> None:
        """Keep what this run showed, for the next placement of the script."""
        if device is None or not page.median_ns:
            return
        with contextlib.suppress(DrivetrainError):
            self._database.add_history(
                self._key,
                device.uuid,
                step_seconds=page.median_ns / 1e9,
                memory_bytes=page.peak_bytes or None,
            )
            self._database.add_history(
                self._key + ":state", "host", step_seconds=None, memory_bytes=page.state_bytes
            )


def _resident(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            return int(file.read().split()[1]) * 4096
    except (OSError, ValueError, IndexError):
        return 0


def _is_named(kind: str, torch: Support) -> bool:
    """Whether torch's devices of a kind are what a worker there has."""
    return torch.torch_device.partition(":")[0] == kind


def _features(device: Device, torch: Support) -> set[str]:
    """A device's capabilities in the policy's words. torch compiles for its own devices only."""
    told = device.capabilities
    found: set[str] = set()
    if torch.torch_device:
        found = {"compile", vendor.FEATURE + torch.torch_device.partition(":")[0]}
    if device.driver == "cuda":
        major = int((told.compute or "0").split(".")[0] or 0)
        found |= {"f16", "graphs"} | ({"triton", "matrix"} if major >= 7 else set())
        found |= {"bf16"} if major >= 8 else set()
    else:
        names = " ".join(told.features)
        found |= {"bf16"} if "bf16" in names else set()
        found |= {"matrix"} if "amx" in names or "sme" in names else set()
    return found
