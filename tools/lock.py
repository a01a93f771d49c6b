"""Write requirements.lock: every package that the tests use, pinned, with the registry's hashes.

Each Python version in PYTHONS is resolved by pip itself (a dry run; nothing is installed), within
constraints.txt, without the local package folders that this machine may be configured with, so
that the hashes are those that everybody sees.

torch is left out on purpose: its CPU, CUDA, ROCm and XPU builds are different archives under one
version, so a hash of one would forbid the others. So are the libraries that only its CUDA build
wants.

    python tools/lock.py            # writes requirements.lock
    python tools/lock.py --check    # ends 1 when constraints.txt pins something else than the lock
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
CONSTRAINTS = ROOT / "constraints.txt"
EXTRAS = ("torch", "kernels", "placement", "test", "bench", "dev")
PYTHONS = ("3.11", "3.12", "3.13")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
# What torch wants besides its vendor's libraries; listed because torch itself is not resolved.
TORCH_NEEDS = ("filelock", "fsspec", "jinja2", "networkx", "sympy", "typing-extensions")
BUILD = ("setuptools",)

HEADER = f"""\
# Written by tools/lock.py from pyproject.toml and constraints.txt. Do not edit.
# Linux x86_64, Python {", ".join(PYTHONS)}. Wheels only. Use it so:
#   pip install --require-hashes --no-deps -r requirements.lock
#   pip install -c constraints.txt torch       # the build that fits your accelerator
#   pip install --no-deps --no-build-isolation -e .
# torch is not here: its CPU, CUDA, ROCm and XPU builds are different archives of one version,
# and a hash of one would forbid the others.
"""


def normal(name: str) -> str:
    """A distribution's name as the registry compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def wanted() -> list[str]:
    """The project's own requirements for the extras, torchdata's and torch's needs included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = list(project["dependencies"])
    for extra in EXTRAS:
        found += project["optional-dependencies"][extra]
    found += [*TORCH_NEEDS, *BUILD, "requests", "urllib3"]  # the last two: torchdata's
    return [line for line in found if not re.match(r"torch(data)?[<>=]", line)]


def pins() -> dict[str, str]:
    """Name to version, from constraints.txt."""
    lines = (line.split("#")[0].strip() for line in CONSTRAINTS.read_text().splitlines())
    return {normal(n): v for n, _, v in (line.partition("==") for line in lines if line)}


def resolve(python: str, requirements: list[str], *flags: str) -> list[dict[str, Any]]:
    """pip's own answer: one entry a package, with its archive's address and sha256."""
    env = {k: v for k, v in os.environ.items() if not re.match(r"PIP_(FIND|EXTRA|INDEX|NO_I)", k)}
    env["PIP_CONFIG_FILE"] = os.devnull
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run"]
        command += ["--ignore-installed", "--only-binary=:all:", "--python-version", python]
        for platform in PLATFORMS:
            command += ["--platform", platform]
        command += ["--target", str(Path(folder, "site")), "--constraint", str(CONSTRAINTS)]
        command += ["--report", str(report), *flags, *requirements]
        subprocess.run(command, env=env, check=True)
        answer: list[dict[str, Any]] = json.loads(report.read_text())["install"]
    return answer


def lock() -> dict[tuple[str, str], set[str]]:
    """(name, version) to the hashes of the archives that the Python versions take."""
    hashes: dict[tuple[str, str], set[str]] = {}
    for python in PYTHONS:
        answer = resolve(python, wanted())
        answer += resolve(python, ["torchdata"], "--no-deps")
        for entry in answer:
            facts = entry["metadata"]
            key = normal(facts["name"]), facts["version"]
            if key[0] == "pip":  # pip-audit wants one; whichever reads the lock will do
                continue
            hashes.setdefault(key, set()).add(entry["download_info"]["archive_info"]["hash"])
        print(f"Python {python}: {len(answer)} packages", file=sys.stderr)
    return hashes


def text(hashes: dict[tuple[str, str], set[str]]) -> str:
    """The lock file's text."""
    lines = [HEADER]
    for (name, version), found in sorted(hashes.items()):
        marks = " \\\n".join(f"    --hash={mark.replace('=', ':', 1)}" for mark in sorted(found))
        lines.append(f"{name}=={version} \\\n{marks}\n")
    return "".join(lines)


def disagreements() -> list[str]:
    """What constraints.txt and the lock say differently."""
    pinned = pins()
    locked = dict(re.findall(r"^([a-z0-9-]+)==(\S+) \\$", LOCK.read_text(), re.MULTILINE))
    found = [
        f"{name}: constraints.txt has {pinned.get(name, 'nothing')}, the lock has {version}"
        for name, version in locked.items()
        if pinned.get(name) != version
    ]
    found += [f"{n}: not in the lock" for n in pinned if n not in locked and n != "torch"]
    return found


def main() -> int:
    if "--check" not in sys.argv[1:]:
        LOCK.write_text(text(lock()))
    found = disagreements()
    for line in found:
        print(line, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
