"""A stage for a script: a private state folder, a copy of the folder it runs in, two alike devices.

A run on the stage is a job under the real runtime that waits after every few steps until it is
told to go on, so that its state can be looked at there. Everything that the script names by a
relative path is in the copy of its folder; absolute paths are the real ones.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drivetrain import hal
from drivetrain.errors import BadInput, DrivetrainError
from drivetrain.migration.loaded import load
from drivetrain.runtime import Job, Runtime

_PARTITIONS = "DRIVETRAIN_CPU_PARTITIONS"
_COPY_FILE = 16 << 20  # larger files are linked, not copied
_COPY_ALL = 256 << 20
_COPY_ENTRIES = 5000
_LINKED = {".git", ".hg", ".venv", "venv", "node_modules", "__pycache__"}
_POLL_S = 0.02
_LONG = 60  # sockets in a folder with a longer name would need a folder elsewhere


@contextlib.contextmanager
def stage() -> Iterator[tuple[Path, tuple[str, str]]]:
    """A private state folder, in force for this process, and the addresses of two alike devices.

    Everything is put back and removed at the end.
    """
    long = len(tempfile.gettempdir()) > _LONG
    root = Path(tempfile.mkdtemp(prefix="drivetrain-check-", dir="/tmp" if long else None))
    before = {name: os.environ.get(name) for name in ("DRIVETRAIN_HOME", _PARTITIONS)}
    try:
        os.environ["DRIVETRAIN_HOME"] = str(root / "home")
        yield root, _pair()
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        shutil.rmtree(root, ignore_errors=True)


def _pair() -> tuple[str, str]:
    """Two accelerators of one model, else two equal parts of the processor."""
    found: dict[tuple[str, str], list[str]] = {}
    for device in hal.devices():
        passed_over = device.driver in ("cpu", "opencl", "hip", "sycl") or device.info.by_name_only
        if not passed_over and not device.info.fault:
            found.setdefault((device.driver, device.name), []).append(device.address)
    for addresses in found.values():
        if len(addresses) >= 2:
            return addresses[0], addresses[1]
    if not os.environ.get(_PARTITIONS, "").isdigit() or int(os.environ[_PARTITIONS]) < 2:
        os.environ[_PARTITIONS] = "2"
    parts = [device.address for device in hal.devices("cpu")]
    if len(parts) < 2:
        raise BadInput(
            "a rehearsal needs two devices of one kind, or two processor cores: this machine "
            "gives neither; run it where there are more"
        )
    return parts[0], parts[1]


def copy_of(folder: Path, into: Path) -> None:
    """A copy of the folder to rehearse in: small files copied, large ones and the rest linked."""
    entries, room = 0, _COPY_ALL
    waiting = [(folder, into)]
    while waiting:
        source, target = waiting.pop(0)
        target.mkdir(parents=True)
        for entry in sorted(os.scandir(source), key=lambda each: each.name):
            if Path(entry.path) == into.parent:
                continue
            entries += 1
            copy = target / entry.name
            enough = entries > _COPY_ENTRIES or entry.name in _LINKED or entry.is_symlink()
            if entry.is_dir() and not enough:
                waiting.append((Path(entry.path), copy))
                continue
            if entry.is_file() and not enough:
                size = entry.stat().st_size
                if size <= min(_COPY_FILE, room):
                    with contextlib.suppress(OSError):
                        shutil.copy2(entry.path, copy)
                        room -= size
                        continue
            with contextlib.suppress(OSError):
                copy.symlink_to(os.path.abspath(entry.path))


@dataclass(frozen=True)
class State:
    """A job's state as a checkpoint holds it: bytes of each tensor, and the tree."""

    step: int
    digest: str
    tensors: Mapping[str, bytes]
    tree: Any
    facts: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> State:
        with load(path) as loaded:
            tensors = {}
            for spec in loaded.manifest.tensors:
                if spec.alias_of is None:
                    data = bytearray(spec.nbytes)
                    if data:
                        loaded.read(spec.name, ctypes.addressof(ctypes.c_char.from_buffer(data)))
                    tensors[spec.name] = bytes(data)
            tree = json.loads(loaded.tree_json)
            return cls(loaded.step, loaded.state_hash, tensors, tree, loaded.facts)

    def differences(self, other: State) -> list[str]:
        """The names of tensors and parts of the tree that are not the same in both."""
        if self.digest == other.digest:
            return []
        names = sorted({*self.tensors, *other.tensors})
        found = [n for n in names if self.tensors.get(n) != other.tensors.get(n)]
        ours, theirs = dict(_leaves(self.tree)), dict(_leaves(other.tree))
        paths = [*ours, *(path for path in theirs if path not in ours)]
        return found + [p for p in paths if ours.get(p) != theirs.get(p)]


def _leaves(tree: Any) -> Iterator[tuple[str, str]]:
    """(part of the state, its JSON) with names as the script's author knows them."""
    for part, body in tree.items():
        if part in ("vars", "extra", "rng", "loader", "schedulers", "scalers", "optimizers"):
            pairs = list(body.items()) if isinstance(body, dict) else []
            if isinstance(body, dict) and isinstance(body.get("dict"), list):
                pairs = [(str(pair[0]), pair[1]) for pair in body["dict"]]
            if not pairs:
                yield part, json.dumps(body, sort_keys=True)
            for name, value in pairs:
                yield f"{part}.{name}", json.dumps(value, sort_keys=True)
        else:
            yield part, json.dumps(body, sort_keys=True)


class Rehearsal:
    """One run of the script on the stage."""

    def __init__(
        self,
        runtime: Runtime,
        script: Path,
        args: Sequence[str],
        *,
        folder: Path,
        on: str,
        every: int,
        hash_seed: int,
        tell: Callable[[str], None],
    ) -> None:
        self.script = script
        self.folder = folder
        self._tell = tell
        before = os.getcwd()
        if folder.exists():
            shutil.rmtree(folder)
        copy_of(Path(before), folder)
        os.chdir(folder)
        try:
            self.job: Job = runtime.submit(
                script,
                args,
                on=on,
                checkpoint_every=None,
                orphan="exit",
                options={"watch": True, "hold_every": every, "target_hash_seed": hash_seed},
            )
        finally:
            os.chdir(before)

    def events(self, kind: str = "") -> list[dict[str, Any]]:
        """What was told so far, of one kind or all."""
        return [e for e in self.job.events(follow=False) if kind in ("", e["event"])]

    def held_after(self, step: int) -> int | None:
        """Wait until the run waits after more than ``step`` steps; None when it ended first."""
        shown = -1
        while True:
            over = self.job.ended
            for event in self.events("held"):
                if event["step"] > step:
                    return int(event["step"])
            if over:
                return None
            if self.job.step != shown:
                shown = self.job.step
                self._tell(f"step {shown} on {self.job.device}" if shown else "starting")
            time.sleep(_POLL_S)

    def state(self) -> State:
        """The state where the run waits."""
        return State.read(Path(self.job.checkpoint()["path"]))

    def go_on(self) -> None:
        self.job.pause(reason="rehearsal")
        self.job.resume(reason="rehearsal")

    def end(self) -> None:
        """End the run if it has not ended by itself."""
        if not self.job.ended:
            with contextlib.suppress(DrivetrainError):
                self.job.stop(reason="the rehearsal is over", grace_s=0.5)
        self.job.wait(20.0)

    def failure(self) -> tuple[int, str] | None:
        """(line of the script, what was raised) of a copy that failed."""
        logs = self.job.directory / "logs"
        for path in [logs / "err", *sorted(logs.glob("target-*.err"))]:
            text = path.read_text(errors="replace") if path.exists() else ""
            at = text.rfind("Traceback (most recent call last):")
            if at < 0:
                at = text.rfind(f'  File "{self.script}", line ')  # a SyntaxError has none
            if at < 0:
                continue
            lines = re.findall(rf'File "{re.escape(str(self.script))}", line (\d+)', text[at:])
            raised = [line for line in text[at:].splitlines() if line and line[0] not in " \t"]
            what = (raised[-1] if raised else "it failed").replace(f"{self.folder}/", "")
            return int(lines[-1]) if lines else 1, what
        return None

    def touched(self) -> list[dict[str, Any]]:
        """What copies did to files and ports, paths as seen from the script's folder."""
        found = []
        for event in self.events("touched"):
            path = str(event["path"])
            with contextlib.suppress(ValueError):
                path = str(Path(path).relative_to(self.folder))
            found.append({**event, "path": path})
        return found


def counted(names: Sequence[str], most: int = 4) -> str:
    """A list of names for a sentence."""
    rest = len(names) - most
    text = ", ".join(names[:most])
    return f"{text} and {rest} more" if rest > 0 else text
