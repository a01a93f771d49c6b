"""The C code without Python under gcc's sanitizers: addresses, undefined behaviour, races."""

from __future__ import annotations

import os
import shutil
import subprocess
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
