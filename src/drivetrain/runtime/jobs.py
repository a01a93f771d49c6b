"""Jobs on disk: how they are found, what they are now. Needs no runtime to be alive."""

from __future__ import annotations

import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drivetrain.errors import BadInput, StoreError
from drivetrain.runtime.status import StatusPage
from drivetrain.runtime.view import JobView
from drivetrain.store.home import jobs_dir
from drivetrain.store.journal import Journal

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def check_name(name: str) -> str:
    """A job's name: letters, digits, dot, underscore and dash, at most 64."""
    if not _NAME.fullmatch(name):
        raise BadInput(
            f"the job name {name!r} will not do: use letters, digits, '.', '_' and '-', at most 64"
        )
    return name


@dataclass
class JobRecord:
    """One job as its journal and status page show it."""

    id: str
    directory: Path
    view: JobView
    page: StatusPage | None
    damage: str = ""

    @property
    def step(self) -> int:
        return 0 if self.page is None else self.page.step

    def summary(self) -> dict[str, Any]:
        """The entry of ``drivetrain jobs --json``."""
        view = self.view
        state = "lost" if self.damage else view.present_state()
        workers = []
        if view.worker is not None and view.worker.alive and not view.ended:
            workers.append({"rank": 0, "device": view.device, "pid": view.worker.pid})
        found: dict[str, Any] = {
            "id": self.id,
            "name": view.spec.get("name", ""),
            "script": view.spec.get("script", ""),
            "state": state,
            "step": self.step,
            "started": view.started,
            "workers": workers,
        }
        if self.damage:
            found["damage"] = self.damage
        return found

    def details(self) -> dict[str, Any]:
        """The answer of ``drivetrain show --json``."""
        view, page = self.view, self.page
        replica: dict[str, Any] = {"every": None, "step": None, "bytes": None, "cost": None}
        if page is not None and page.replicate_every:
            replica = {
                "every": page.replicate_every,
                "step": page.replica_step,
                "bytes": page.state_bytes,
                "cost": page.replica_cost_ppm / 1e6,
            }
        return {
            **self.summary(),
            "device": view.device,
            "epoch": view.epoch,
            "placement": view.placement,
            "moves": view.moves,
            "failovers": view.failovers,
            "replica": replica,
            "checkpoints": view.checkpoints[-2:],
            "released": view.released,
            "requests": view.requests[-20:],
            "exit": view.exit,
            "runtime": None if view.runtime is None else view.runtime.pid,
            "directory": str(self.directory),
        }


def load(directory: Path) -> JobRecord:
    """Read one job; a damaged journal gives a record that says so."""
    damage = ""
    view = JobView()
    try:
        with Journal.open(directory / "journal") as journal:
            view = JobView.of(journal.records())
    except StoreError as error:
        damage = str(error)
    try:
        page = StatusPage.open(directory / "status")
    except StoreError:
        page = None
    return JobRecord(directory.name, directory, view, page, damage)


def all_jobs() -> list[JobRecord]:
    """Every job in the state folder, oldest first.

    A folder whose submission was cut short before its first record was durable is no job.
    """
    found = []
    for entry in os.scandir(jobs_dir()):
        if entry.is_dir() and os.path.exists(os.path.join(entry.path, "journal")):
            job = load(Path(entry.path))
            if job.view.seq or job.damage:
                found.append(job)
    return sorted(found, key=lambda job: job.view.started)


def find(name: str) -> JobRecord:
    """The job with this id, unique beginning of an id, or name (the newest of that name)."""
    matches: list[JobRecord] = []
    for job in all_jobs():
        if job.id == name:
            matches = [job]
            break
        if job.view.spec.get("name") == name or (len(name) >= 3 and job.id.startswith(name)):
            matches.append(job)
    if not matches:
        raise BadInput(f"there is no job {name!r}; see `drivetrain jobs`")
    by_name = [job for job in matches if job.view.spec.get("name") == name]
    if len(matches) > 1 and not by_name:
        raise BadInput(f"{name!r} could be {', '.join(job.id for job in matches[:5])}")
    job = (by_name or matches)[-1]
    owner = os.stat(job.directory).st_uid
    if owner != os.geteuid():
        raise BadInput(f"job {job.id} is not yours: it belongs to user {owner}")
    return job


def remove_unborn(older_than_s: float = 60.0) -> None:
    """Remove the folders of submissions that were cut short before they became jobs."""
    for entry in os.scandir(jobs_dir()):
        if time.time() - entry.stat().st_mtime < older_than_s:
            continue
        job = load(Path(entry.path))
        journal = job.directory / "journal"
        if not job.view.seq and (not job.damage or not journal.exists()):
            shutil.rmtree(job.directory, ignore_errors=True)


def new_directory(job_id: str) -> Path:
    """Make a job's folder (0700) with its parts."""
    directory = jobs_dir() / job_id
    directory.mkdir(mode=0o700)
    for part in ("logs", "checkpoints"):
        (directory / part).mkdir(mode=0o700)
    return directory


def new_id(script: str) -> str:
    """A short id that sorts by time and shows the script: ``train-8c21f0a3``."""
    stem = re.sub(r"[^A-Za-z0-9]+", "-", Path(script).stem).strip("-").lower()[:24] or "job"
    stamp = f"{int(time.time()) & 0xFFFFFFFF:08x}"
    return f"{stem}-{stamp[-4:]}{os.urandom(3).hex()}"
