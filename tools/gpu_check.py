"""`make gpu-check`: prepare a given interpreter, without changing it, and run the GPU checks.

The torch that the interpreter has is used as it is. What else the project needs and the
interpreter lacks comes from a folder of wheels, into a temporary folder that is put on the path;
no package registry is asked. The C extensions are built in place when a compiler is there.

    python3 tools/gpu_check.py [--wheels FOLDER] [ARGUMENTS OF benchmarks/gpu_check.py]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHECK = ROOT / "benchmarks" / "gpu_check.py"
KEPT = re.compile(r"torch|triton|nvidia(?!-ml-py)|numpy")
"""Never replaced: they belong to the torch that is there."""


def has(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def lacking(wheels: Path) -> list[str]:
    """The distributions in the folder that this interpreter does not have."""
    names = {path.name.split("-")[0].replace("_", "-").lower() for path in wheels.glob("*.whl")}
    return sorted(n for n in names if not has(n) and (n == "torchdata" or not KEPT.match(n)))


def add_wheels(wheels: Path, site: Path) -> None:
    names = lacking(wheels)
    print(f"gpu-check: from {wheels}: {', '.join(names) or 'nothing is lacking'}", flush=True)
    if not names:
        return
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--no-index", "--no-deps", "--find-links", str(wheels), "--target", str(site)]
    for name in names:  # one by one: a wheel for another Python must not stop the rest
        if subprocess.run([*command, "--upgrade", name], check=False).returncode:
            print(f"gpu-check: {name} could not be added", flush=True)


def build_extensions() -> None:
    """Compile the C extensions with the compiler alone: the given setuptools may be any version."""
    hal = ROOT / "src" / "drivetrain" / "hal"
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        print("gpu-check: no C compiler, so no C extension; the Python twins are used", flush=True)
        return
    command = [compiler, "-O3", "-std=gnu11", "-fPIC", "-pthread", "-shared"]
    command += [f"-I{sysconfig.get_path('include')}", f"-I{hal}"]
    for path in sorted(hal.glob("_*.c")):
        target = path.with_name(f"{path.stem}{sysconfig.get_config_var('EXT_SUFFIX')}")
        sources = [str(path), *map(str, sorted(hal.glob("[!_]*.c")))]
        if subprocess.run([*command, *sources, "-o", str(target)], check=False).returncode:
            print(f"gpu-check: no {path.stem} (the lines above say why); its Python twin is used")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to take from")
    options, rest = parser.parse_known_args()
    if sys.version_info < (3, 11):  # noqa: UP036  any interpreter may be given
        print(f"gpu-check: {sys.executable} is older than 3.11; set PYTHON=", file=sys.stderr)
        return 2
    if options.wheels and not options.wheels.is_dir():
        print(f"gpu-check: there is no folder {options.wheels}", file=sys.stderr)
        return 2
    if not CHECK.exists():
        print(f"gpu-check: {CHECK.relative_to(ROOT)} is missing from this copy", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="drivetrain-gpu-check-") as folder:
        site = Path(folder)
        if options.wheels:
            add_wheels(options.wheels.resolve(), site)
        path = [str(site), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in path if p)}
        build_extensions()
        return subprocess.run([sys.executable, str(CHECK), *rest], env=env, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
