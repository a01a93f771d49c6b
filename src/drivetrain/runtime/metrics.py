"""One look at this machine as metrics: drivers, devices, jobs, moves, failovers, leases."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from drivetrain import hal
from drivetrain.errors import DrivetrainError
from drivetrain.hal import registry
from drivetrain.hal.probe import verdicts
from drivetrain.runtime import jobs as on_disk
from drivetrain.runtime import metrics_devices, metrics_jobs
from drivetrain.runtime.exposition import Metric, render
from drivetrain.runtime.jobs import JobRecord
from drivetrain.store.database import Database
from drivetrain.store.home import home, jobs_dir

FRESH_S = 1.0
"""Looks closer together than this get the same page: whoever asks often costs no more."""
_DISCOVER_S = 60.0
_PARTS = ("devices", "jobs", "leases")


class Collector:
    """Looks at this machine. Safe between threads; what fails is counted, and the rest is told."""

    def __init__(self, *, fresh_s: float = FRESH_S) -> None:
        self._fresh_s = fresh_s
        self._lock = threading.Lock()
        self._page = ""
        self._looked: float | None = None
        self._discovered = 0.0
        self._counts = metrics_jobs.Counts()
        self._errors = dict.fromkeys(_PARTS, 0)
        self._read: dict[str, tuple[tuple[int, int], JobRecord]] = {}
        self._database: Database | None = None

    def page(self) -> str:
        """The page, at most a second old."""
        with self._lock:
            now = time.monotonic()
            if self._looked is None or now - self._looked >= self._fresh_s:
                self._page = render(self._collect())
                self._looked = time.monotonic()
            return self._page

    def _collect(self) -> list[Metric]:
        from drivetrain import __version__

        started = time.monotonic()
        looks: dict[str, Callable[[], Iterable[Metric]]] = {
            "devices": self._devices,
            "jobs": self._jobs,
            "leases": self._leases,
        }
        found: list[Metric] = []
        for part, look in looks.items():
            try:
                found += look()
            except (DrivetrainError, OSError):
                self._errors[part] += 1
        build = Metric("drivetrain_build_info", "gauge", "1; the version of Drivetrain.")
        build.add(1, version=__version__)
        errors = Metric(
            "drivetrain_exporter_errors_total", "counter", "Looks at a part that failed."
        )
        for part, count in self._errors.items():
            errors.add(count, part=part)
        left_out = Metric(
            "drivetrain_exporter_left_out_samples", "gauge", "Samples beyond the exporter's limits."
        )
        left_out.add(sum(metric.left_out for metric in found))
        took = Metric("drivetrain_exporter_collect_seconds", "gauge", "How long this look took.")
        took.add(time.monotonic() - started)
        return [*found, build, errors, left_out, took]

    def _devices(self) -> Iterable[Metric]:
        if time.monotonic() - self._discovered >= _DISCOVER_S:
            registry.refresh()  # devices come and go while an exporter lives
            self._discovered = time.monotonic()
        found = hal.devices()[: metrics_jobs.MOST_JOBS]
        now = {device: device.telemetry() for device in found}
        yield from metrics_devices.drivers(hal.drivers())
        yield from metrics_devices.devices(found, verdicts(found), now)

    def _jobs(self) -> Iterable[Metric]:
        found = self._all_jobs()
        self._counts.take(found)
        return (*metrics_jobs.jobs(found), *self._counts.metrics())

    def _all_jobs(self) -> list[JobRecord]:
        """Every job, oldest first; a journal that did not change is not read again."""
        read: dict[str, tuple[tuple[int, int], JobRecord]] = {}
        for entry in os.scandir(jobs_dir()):
            journal = Path(entry.path) / "journal"
            with contextlib.suppress(OSError):
                facts = journal.stat()
                mark = (facts.st_size, facts.st_mtime_ns)
                known = self._read.get(entry.name)
                if known is None or known[0] != mark or known[1].page is None:
                    known = (mark, on_disk.load(Path(entry.path)))
                if known[1].view.seq or known[1].damage:
                    read[entry.name] = known
        self._read = read
        return sorted((job for _, job in read.values()), key=lambda job: job.view.started)

    def _leases(self) -> Iterable[Metric]:
        path = home() / "drivetrain.sqlite"
        if not path.exists():
            return ()
        if self._database is None:
            self._database = Database(path)
        return metrics_jobs.leases(self._database.leases())
