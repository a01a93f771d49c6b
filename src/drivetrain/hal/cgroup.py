"""Limits that the control groups (v1 and v2) put on this process.

Every function takes the ``root`` under which ``proc`` and ``sys`` lie. In a container the paths in
``/proc/self/cgroup`` may be those of the host, which do not exist inside: then the mount itself is
the process's group. A limit holds for all groups below it, so the least of the chain counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")
_UNLIMITED = 1 << 60  # v1 writes "no limit" as the largest page-aligned 64-bit number


@dataclass(frozen=True)
class MemoryGroup:
    """``limit_bytes`` is ``None`` without a limit. ``used_bytes`` leaves out cache that can go."""

    limit_bytes: int | None
    used_bytes: int | None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _number(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None


def _mounts(root: Path) -> Iterator[tuple[str, str, Path, set[str]]]:
    """(file system, root inside it, mount point, options) of each control group mount."""
    for line in _read(root / "proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        fields, tail = left.split(), right.split()
        if len(fields) > 4 and len(tail) > 2 and tail[0] in ("cgroup", "cgroup2"):
            point = fields[4].replace("\\040", " ").lstrip("/")
            yield tail[0], fields[3], root / point, set(tail[2].split(","))


def _membership(root: Path) -> dict[str, str]:
    """Controller -> this process's group; ``""`` is the v2 hierarchy."""
    groups: dict[str, str] = {}
    for line in _read(root / "proc/self/cgroup").splitlines():
        parts = line.split(":", 2)
        if len(parts) == 3:
            for controller in parts[1].split(","):
                groups[controller] = parts[2]
    return groups


def _chain(controller: str, root: Path) -> tuple[list[Path], bool]:
    """Folders of this process's groups, the innermost first, and whether they are v2."""
    membership = _membership(root)
    for kind, inside, mount, options in _mounts(root):
        is_v2 = kind == "cgroup2"
        if is_v2 == (controller in membership):
            continue
        if not is_v2 and controller not in options:
            continue
        group = membership.get("" if is_v2 else controller)
        if group is None:
            continue
        relative = group.strip("/")
        if inside != "/" and (group + "/").startswith(inside.rstrip("/") + "/"):
            relative = group[len(inside.rstrip("/")) :].strip("/")
        folder = mount / relative if ".." not in Path(relative).parts else mount
        if not folder.is_dir():
            folder = mount
        chain = [folder]
        while folder != mount:
            folder = folder.parent
            chain.append(folder)
        return chain, is_v2
    return [], False


def memory(root: Path = ROOT) -> MemoryGroup:
    """The tightest memory limit, and what is in use in the group that sets it."""
    chain, is_v2 = _chain("memory", root)
    limit: int | None = None
    used: int | None = None
    for folder in chain:
        found = _number(_read(folder / ("memory.max" if is_v2 else "memory.limit_in_bytes")))
        if found is None or found >= _UNLIMITED or (limit is not None and found >= limit):
            continue
        limit = found
        usage = _number(_read(folder / ("memory.current" if is_v2 else "memory.usage_in_bytes")))
        stat = dict(
            line.split(maxsplit=1)
            for line in _read(folder / "memory.stat").splitlines()
            if " " in line
        )
        cache = _number(stat.get("inactive_file" if is_v2 else "total_inactive_file", "0")) or 0
        used = None if usage is None else max(0, usage - cache)
    return MemoryGroup(limit, used)


def cpu_quota(root: Path = ROOT) -> float | None:
    """How many CPUs' worth of time the process may use; ``None`` without a limit."""
    chain, is_v2 = _chain("cpu", root)
    least: float | None = None
    for folder in chain:
        if is_v2:
            words = _read(folder / "cpu.max").split()
        else:
            words = [_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")]
        if len(words) != 2:
            continue
        quota, period = _number(words[0]), _number(words[1])
        if quota is None or period is None or quota <= 0 or period <= 0:
            continue
        least = quota / period if least is None else min(least, quota / period)
    return least
