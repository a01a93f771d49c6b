#!/usr/bin/env bash
# Make ./.venv with the project installed editable and all that the tests use. `make setup` calls
# it when something that it depends on has changed. PYTHON=... picks the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'setup: %s\n' "$*" >&2; }

fits() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

pick_python() {
    local name
    for name in ${PYTHON:-} python3 python3.13 python3.12 python3.11; do
        if command -v "$name" >/dev/null 2>&1 && fits "$name"; then
            command -v "$name"
            return
        fi
    done
    say "no Python 3.11 or newer was found; install one, or name it: make setup PYTHON=/path/to/python3"
    return 1
}

python=$(pick_python)
# A compiler and Python's headers (the C extension, torch.compile) and PoCL (OpenCL on a CPU). The
# project works without them; the tests that want one say so and skip.
packages=(g++ python3-dev pocl-opencl-icd ocl-icd-libopencl1 opencl-headers)
# Debian splits venv off; an interpreter from elsewhere brings its own.
"$python" -c 'import ensurepip, venv' >/dev/null 2>&1 || packages+=(python3-venv)
tools/debian.sh "${packages[@]}"

if [ -x .venv/bin/python ] && ! fits .venv/bin/python; then
    say ".venv holds a Python older than 3.11 or a broken one; making it anew"
    rm -rf .venv
fi
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    say "making .venv with $python"
    "$python" -m venv .venv
fi

pip=(.venv/bin/python -m pip --disable-pip-version-check)
say "installing the project and what its tests use (torch is the large one)"
"${pip[@]}" install --quiet --constraint constraints.txt setuptools
"${pip[@]}" install --quiet --constraint constraints.txt --no-build-isolation \
    --editable '.[torch,kernels,placement,test,bench,dev]'
# pip does not for an editable one; where PYTHONDONTWRITEBYTECODE is set, each worker would compile
# every module anew.
.venv/bin/python -m compileall -q src

.venv/bin/python - <<'PY' >&2
import importlib.util
import platform

from drivetrain import __version__

native = importlib.util.find_spec("drivetrain.hal._native") if importlib.util.find_spec(
    "drivetrain.hal"
) else None
print(
    f"setup: drivetrain {__version__} on Python {platform.python_version()},",
    "with the C extension" if native else "without the C extension (the pure-Python twin is used)",
)
PY
touch .venv/.ready
