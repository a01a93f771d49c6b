"""A file or a folder of a PyTorch program, and what ties it to a vendor."""

from __future__ import annotations

import ast
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drivetrain.errors import BadInput
from drivetrain.pytorch.porting import tables
from drivetrain.pytorch.porting.reading import Finding, needed_devices, read

__all__ = ["MOST_BYTES", "MOST_FILES", "Report", "analyse"]

MOST_FILES = 20_000
MOST_BYTES = 4 << 20
"""Of one file; a larger one is not read, and that is told."""

_NOT_THEIRS = {
    "__pycache__",
    "build",
    "dist",
    "env",
    "node_modules",
    "site-packages",
    "venv",
}
_KERNEL_FILES = (".cu", ".cuh", ".hip")


@dataclass(frozen=True)
class Report:
    """What was found in a program."""

    path: str
    files: int
    """How many were read."""
    findings: tuple[Finding, ...]
    unread: tuple[tuple[str, str], ...]
    """Files that could not be read, and why."""

    @property
    def needs(self) -> frozenset[str]:
        """Kinds of torch devices without which it fails; empty when it runs on any."""
        return needed_devices(list(self.findings))

    @property
    def effects(self) -> dict[str, int]:
        """How many findings fail elsewhere, skip the device there, or do something else."""
        return dict(Counter(finding.effect for finding in self.findings))

    def as_json(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "files": self.files,
            "needs": sorted(self.needs),
            "effects": self.effects,
            "findings": [finding.as_json() for finding in self.findings],
            "unread": [{"path": path, "reason": why} for path, why in self.unread],
        }


def analyse(path: str | os.PathLike[str]) -> Report:
    """Read a Python file, or every one in a folder (not in virtual environments, hidden folders or
    links), and CUDA and HIP sources by name.

    Raises BadInput where there is no such path, a single file is no Python, or a folder has no
    Python file or more than `MOST_FILES`.
    """
    root = Path(path)
    if root.is_dir():
        return _folder(root)
    if not root.is_file():
        raise BadInput(f"there is no file or folder {os.fspath(path)!r}")
    found, why = _file(root, os.fspath(path))
    if why:
        raise BadInput(f"{os.fspath(path)}: {why}")
    return Report(os.fspath(path), 1, tuple(found), ())


def _folder(root: Path) -> Report:
    findings: list[Finding] = []
    unread: list[tuple[str, str]] = []
    count = 0
    for file in _files(root):
        if count + len(unread) >= MOST_FILES:
            raise BadInput(f"{root} has more than {MOST_FILES} files to read; name a part of it")
        name = str(file.relative_to(root))
        if file.suffix in _KERNEL_FILES:
            findings.append(_kernel_file(name, file.suffix))
            continue
        found, why = _file(file, name)
        if why:
            unread.append((name, why))
            continue
        count += 1
        findings += found
    if not count and not findings and not unread:
        raise BadInput(f"there is no Python file in {root}")
    return Report(str(root), count, tuple(sorted(findings)), tuple(unread))


def _files(root: Path) -> Iterator[Path]:
    for folder, inner, files in os.walk(root):
        inner[:] = sorted(
            name
            for name in inner
            if name not in _NOT_THEIRS
            and not name.startswith(".")
            and not (Path(folder) / name / "pyvenv.cfg").exists()
        )
        for name in sorted(files):
            path = Path(folder) / name
            if path.suffix in (".py", *_KERNEL_FILES) and path.is_file():
                yield path


def _kernel_file(name: str, suffix: str) -> Finding:
    vendor = "AMD" if suffix == ".hip" else "NVIDIA"
    return Finding(name, 1, "cuda-source", vendor, "fails", suffix, tables.KERNELS)


def _file(path: Path, name: str) -> tuple[list[Finding], str]:
    """The findings, or why there are none to be had."""
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            return [], f"{size} bytes; files of at most {MOST_BYTES} are read"
        tree = ast.parse(path.read_bytes(), filename=name)
        return read(tree, name), ""
    except OSError as error:
        return [], f"cannot be read: {error.strerror}"
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None) or 1
        said = getattr(error, "msg", None) or str(error)
        return [], f"line {line}: not valid Python: {said}"
    except (RecursionError, MemoryError):
        return [], "nested too deeply to be read"
