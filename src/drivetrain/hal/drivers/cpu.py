"""The host's processors: one device per NUMA node, or ``DRIVETRAIN_CPU_PARTITIONS`` equal parts."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path

from drivetrain.errors import BadInput, HalError
from drivetrain.hal import cgroup
from drivetrain.hal.driver import (
    Backend,
    Capabilities,
    DeviceInfo,
    Driver,
    Isolation,
    hidden_from_all,
)
from drivetrain.hal.telemetry import Telemetry, host

# --- names ---------------------------------------------------------------------------------------

NAME = "cpu"
PARTITIONS = "DRIVETRAIN_CPU_PARTITIONS"
MEMORY_DOMAIN = "host"
GROUPS = frozenset({"compute", "managed", "peer", "pinned", "timing"})

_VENDORS = {"GenuineIntel": "intel", "AuthenticAMD": "amd", "HygonGenuine": "hygon", "0x41": "arm"}
_FEATURES = {
    **{flag: flag for flag in ("avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw")},
    **{flag: flag for flag in ("avx512_vnni", "avx512_bf16", "avx512_fp16")},
    **{flag: flag for flag in ("amx_tile", "amx_bf16", "amx_int8", "amx_fp16")},
    **{flag: flag for flag in ("sve", "sve2", "sme", "bf16", "i8mm")},
    "sse4_2": "sse4.2",
    "asimd": "neon",
    "neon": "neon",
    "asimdhp": "fp16",
}
"""Flags of /proc/cpuinfo -> our word for the feature, in the order they are listed."""


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def cores_of(text: str) -> tuple[int, ...]:
    """``0-2,8`` -> (0, 1, 2, 8)."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if first.isdigit():
            found.extend(range(int(first), int(last or first) + 1))
    return tuple(found)


def text_of(cores: Iterable[int]) -> str:
    """(0, 1, 2, 8) -> ``0-2,8``."""
    runs: list[list[int]] = []
    for core in sorted(cores):
        if runs and core == runs[-1][1] + 1:
            runs[-1][1] = core
        else:
            runs.append([core, core])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


# --- discovery -----------------------------------------------------------------------------------


def absent() -> str:
    return ""


def allowed_cores() -> tuple[int, ...]:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def usable_cores(allowed: Sequence[int], quota: float | None) -> int:
    """How many cores' worth of time there is: affinity, and a quota rounded down (at least 1)."""
    return len(allowed) if quota is None else max(1, min(len(allowed), int(quota)))


def _by_closeness(cores: Sequence[int], root: Path) -> list[int]:
    """Cores ordered so that hyperthreads of one core, then cores of one package, are together."""

    def place(core: int) -> tuple[int, int, int]:
        folder = root / f"sys/devices/system/cpu/cpu{core}/topology"
        package, within = _read(folder / "physical_package_id"), _read(folder / "core_id")
        return (
            int(package) if package.isdigit() else 0,
            int(within) if within.isdigit() else core,
            core,
        )

    return sorted(cores, key=place)


def partitions(
    allowed: Sequence[int], quota: float | None, wanted: str, root: Path = cgroup.ROOT
) -> list[tuple[int, ...]]:
    """``wanted`` equal parts of the cores that may be used; cores left over stay idle.

    Raises BadInput for what is no number of parts, and for more parts than cores.
    """
    usable = usable_cores(allowed, quota)
    if not wanted.strip().isdecimal() or int(wanted) < 1:
        raise BadInput(f"{PARTITIONS}={wanted!r} is no number of parts: give 1 to {usable}")
    parts = int(wanted)
    if parts > usable:
        raise BadInput(
            f"{PARTITIONS}={parts}: there are only {usable} cores to share "
            f"({len(allowed)} by affinity"
            + (f", {quota:g} by the control group's quota" if quota is not None else "")
            + f"); give 1 to {usable}"
        )
    each = len(allowed) // parts
    ordered = _by_closeness(allowed, root)
    return [tuple(sorted(ordered[i * each : (i + 1) * each])) for i in range(parts)]


def numa_nodes(
    allowed: Sequence[int], root: Path = cgroup.ROOT
) -> list[tuple[int, tuple[int, ...]]]:
    """(node, its cores that may be used), nodes without such cores left out."""
    found = []
    folder = root / "sys/devices/system/node"
    for node in sorted(folder.glob("node[0-9]*"), key=lambda path: int(path.name[4:])):
        cores = tuple(c for c in cores_of(_read(node / "cpulist")) if c in set(allowed))
        if cores:
            found.append((int(node.name[4:]), cores))
    listed = {core for _, cores in found for core in cores}
    return found if listed == set(allowed) else [(0, tuple(allowed))]


def discover(root: Path = cgroup.ROOT) -> tuple[DeviceInfo, ...]:
    allowed, quota = allowed_cores(), cgroup.cpu_quota(root)
    wanted = os.environ.get(PARTITIONS, "")
    parts: list[tuple[int | None, tuple[int, ...]]]
    if wanted:
        parts = [(None, cores) for cores in partitions(allowed, quota, wanted, root)]
    else:
        parts = [*numa_nodes(allowed, root)]
    name, vendor, flags = _processor(root)
    total = host.memory(root).total_bytes
    usable = usable_cores(allowed, quota)
    return tuple(
        DeviceInfo(
            driver=NAME,
            index=index,
            name=name,
            vendor=vendor,
            uuid=f"CPU-{text_of(cores)}",
            memory_bytes=total,
            memory_domain=MEMORY_DOMAIN,
            driver_version=platform.release(),
            numa_node=node,
            capabilities=_capabilities(cores, flags, root),
            isolation=isolation(cores, max(1, min(len(cores), usable // len(parts)))),
            telemetry=host.telemetry(cores),
        )
        for index, (node, cores) in enumerate(parts)
    )


# --- capabilities --------------------------------------------------------------------------------


def _processor(root: Path) -> tuple[str, str, frozenset[str]]:
    """(model name, vendor, flags) as /proc/cpuinfo tells them."""
    facts: dict[str, str] = {}
    for line in _read(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    name = facts.get("model name") or platform.processor() or platform.machine() or "CPU"
    unknown = "apple" if platform.system() == "Darwin" else "unknown"
    vendor = _VENDORS.get(facts.get("vendor_id") or facts.get("CPU implementer") or "", unknown)
    flags = (facts.get("flags") or facts.get("Features") or "").split()
    return name, vendor, frozenset(flags)


def _level(flags: frozenset[str]) -> str:
    """The x86-64 psABI's level, or the machine's name."""
    machine = platform.machine().lower()
    if machine not in ("x86_64", "amd64"):
        return machine
    if {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"} <= flags:
        return "x86-64-v4"
    if {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"} <= flags:
        return "x86-64-v3"
    if {"cx16", "lahf_lm", "popcnt", "sse4_1", "sse4_2", "ssse3"} <= flags:
        return "x86-64-v2"
    return "x86-64"


def _size(text: str) -> int:
    unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
    digits = text.rstrip("KMG")
    return int(digits) * unit if digits.isdigit() else 0


def _caches(cores: Sequence[int], root: Path) -> tuple[tuple[str, int], ...]:
    """l1d and l2 of one core; l3 summed over what these cores reach."""
    sizes: dict[str, int] = {}
    shared: dict[str, int] = {}
    for core in cores:
        for index in sorted((root / f"sys/devices/system/cpu/cpu{core}/cache").glob("index*")):
            level, kind = _read(index / "level"), _read(index / "type")
            size = _size(_read(index / "size"))
            if level == "3":
                shared[_read(index / "shared_cpu_list") or str(core)] = size
            elif kind != "Instruction":
                sizes.setdefault("l1d" if level == "1" else f"l{level}", size)
    if shared:
        sizes["l3"] = sum(shared.values())
    return tuple(sorted(sizes.items()))


def _capabilities(cores: Sequence[int], flags: frozenset[str], root: Path) -> Capabilities:
    physical = {
        _read(root / f"sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list") or str(core)
        for core in cores
    }
    fastest = _read(root / f"sys/devices/system/cpu/cpu{cores[0]}/cpufreq/cpuinfo_max_freq")
    return Capabilities(
        compute=_level(flags),
        cores=len(cores),
        physical_cores=len(physical),
        features=tuple(dict.fromkeys(w for flag, w in _FEATURES.items() if flag in flags)),
        caches=_caches(cores, root),
        clock_mhz=int(fastest) // 1000 if fastest.isdigit() else None,
        groups=tuple(sorted(GROUPS)),
    )


# --- telemetry -----------------------------------------------------------------------------------


def telemetry(info: DeviceInfo) -> Telemetry:
    return host.telemetry(info.isolation.cpus or ())


# --- isolation -----------------------------------------------------------------------------------


def isolation(cores: tuple[int, ...], threads: int) -> Isolation:
    """No accelerator, these cores, and one thread a core (fewer under a CPU quota)."""
    environment = hidden_from_all(
        OMP_NUM_THREADS=str(threads),
        MKL_NUM_THREADS=str(threads),
        OPENBLAS_NUM_THREADS=str(threads),
        # The worker's affinity is the partition; it must not be cut again.
        **{PARTITIONS: "1"},
    )
    return Isolation(environment, cores, threads, "cpu")


# --- probe ---------------------------------------------------------------------------------------


def probe(info: DeviceInfo) -> None:
    """Runs on the device's cores and adds numbers there. Raises HalError."""
    cores = info.isolation.cpus
    if cores and hasattr(os, "sched_setaffinity"):
        try:
            os.sched_setaffinity(0, cores)
        except OSError as error:
            raise HalError(
                f"cores {text_of(cores)} cannot be used: {error}",
                code="error",
                driver=NAME,
                native=error.errno or 0,
                op="sched_setaffinity",
                device=info.uuid,
            ) from error
    if sum(i * i for i in range(1000)) != 332833500:
        raise HalError("wrong result of an addition", code="wrong", driver=NAME, device=info.uuid)


# --- open ----------------------------------------------------------------------------------------


def open_device(info: DeviceInfo) -> Backend:
    """Threads on the device's cores, ready for work. Raises HalError."""
    from drivetrain.hal.drivers import cpu_backend

    return cpu_backend.Cpu(info)


DRIVER = Driver(
    name=NAME,
    vendor="host",
    absent=absent,
    discover=discover,
    telemetry=telemetry,
    probe=probe,
    open=open_device,
    in_process=True,
    groups=GROUPS,
)
