"""The C code without Python under gcc's sanitizers: addresses, undefined behaviour, races."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import drivetrain.hal

HERE = Path(__file__).parent
HAL = Path(drivetrain.hal.__file__).parent
WARNINGS = ["-Wall", "-Wextra", "-Werror"]


def build(folder: Path, sanitizer: str, harness: Path = HERE / "sanitized.c") -> Path:
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no gcc")
    program = folder / "sanitized"
    command = [compiler, "-std=gnu11", "-g", "-O1", "-pthread", f"-fsanitize={sanitizer}"]
    command += [*WARNINGS, "-fno-omit-frame-pointer", f"-I{HAL}"]
    command += [str(harness), *map(str, sorted(HAL.glob("[!_]*.c"))), "-o", str(program), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if "cannot find -l" in done.stderr or "cannot find /" in done.stderr:
        pytest.skip(f"gcc has no sanitizer {sanitizer} here")
    assert done.returncode == 0, done.stderr
    return program


def run(program: Path, turns: int) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "ASAN_OPTIONS": "detect_leaks=1:abort_on_error=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1",
    }
    command = [str(program), str(turns)]
    setarch = shutil.which("setarch")
    if setarch is not None and program.parent.name == "thread":
        command = [setarch, "-R", *command]  # its shadow memory wants addresses in their old places
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=900, env=environment
    )


@pytest.mark.parametrize(
    ("sanitizer", "turns"),
    [
        ("address,undefined", 1500),
        pytest.param("address,undefined", 100_000, marks=pytest.mark.soak, id="address-long"),
        pytest.param("thread", 20_000, marks=pytest.mark.soak, id="thread-long"),
    ],
)
@pytest.mark.timeout(1200)
def test_the_core_is_clean_under_the_sanitizers(tmp_path: Path, sanitizer: str, turns: int) -> None:
    folder = tmp_path / sanitizer.partition(",")[0]
    folder.mkdir()
    done = run(build(folder, sanitizer), turns)
    assert (done.returncode, done.stdout) == (0, "end\n"), done.stderr[-5000:]


@pytest.mark.parametrize(
    ("sanitizer", "fault", "word"),
    [
        ("address,undefined", "char *p = malloc(8); free(p); return p[0];", "use-after-free"),
        ("address,undefined", "return 1 << (turns + 40);", "shift exponent"),
        pytest.param(
            "thread",
            "pthread_t t; void *w(void *a) { turns++; return a; }"
            "pthread_create(&t, 0, w, 0); turns++; pthread_join(t, 0); return 0;",
            "data race",
            marks=pytest.mark.soak,
        ),
    ],
)
def test_the_sanitizers_see_a_fault_that_is_put_in(
    tmp_path: Path, sanitizer: str, fault: str, word: str
) -> None:
    folder = tmp_path / sanitizer.partition(",")[0]
    folder.mkdir()
    text = (
        "#include <pthread.h>\n#include <stdlib.h>\nvolatile int turns;\n"
        f"int main(void) {{ {fault} }}\n"
    )
    (folder / "faulty.c").write_text(text)
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no gcc")
    program = folder / "faulty"
    command = [compiler, "-g", "-O0", "-pthread", "-w", f"-fsanitize={sanitizer}"]
    done = subprocess.run(
        [*command, str(folder / "faulty.c"), "-o", str(program)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"gcc has no sanitizer {sanitizer} here")
    found = run(program, 1)
    assert found.returncode != 0
    assert word in found.stderr


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_the_extensions_are_clean_under_the_address_sanitizer(tmp_path: Path) -> None:
    """The tests of the objects, with every extension built anew and each block a malloc of its
    own, so that what is used after its end is seen."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no gcc")
    package = tmp_path / "src" / "drivetrain"
    shutil.copytree(HAL.parent, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    hal = package / "hal"
    free_of_python = [str(path) for path in sorted(hal.glob("[!_]*.c"))]
    for path in sorted(hal.glob("_*.c")):
        target = hal / f"{path.stem}{sysconfig.get_config_var('EXT_SUFFIX')}"
        command = [compiler, "-shared", "-fPIC", "-std=gnu11", "-g", "-O1", "-pthread", "-w"]
        command += ["-fsanitize=address", "-fno-omit-frame-pointer", f"-I{hal}"]
        command += [f"-I{sysconfig.get_paths()['include']}", str(path), *free_of_python]
        subprocess.run([*command, "-o", str(target), "-ldl"], check=True, timeout=300)
    library = subprocess.run(
        [compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(library).is_absolute():
        pytest.skip("there is no libasan")
    names = ["memory", "kernel", "graph", "stream", "pool", "native_pool", "twin"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += ["-k", "not torch and not subprocess and not sample and not control and not lock"]
    command += [str(HERE / f"test_{name}.py") for name in names]
    environment = {
        **os.environ,
        "PYTHONPATH": str(tmp_path / "src"),
        "PYTHONMALLOC": "malloc",
        "LD_PRELOAD": library,
        "ASAN_OPTIONS": "detect_leaks=0:handle_segv=1",
    }
    used = [sys.executable, "-c", "from drivetrain.hal import _hot; print(_hot.__file__)"]
    found = subprocess.run(used, capture_output=True, text=True, check=True, env=environment)
    assert found.stdout.startswith(str(tmp_path))
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=1700, env=environment
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
