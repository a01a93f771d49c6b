"""Without C everything is the same: the tests of the objects pass with the twins as well, and what
the two say of the same calls is equal. The C code may run without the GIL."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

import drivetrain.hal
from drivetrain.hal import _hot_twin, hot

HERE = Path(__file__).parent
OBJECTS = ["memory", "stream", "kernel", "graph", "copies", "resource", "pool", "link", "dlpack"]
SAMPLE = "cpu and (bad or plan or reference or forgotten or closing or again or threads or grid)"


def passes(files: list[str], *options: str, limit_s: float) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *options]
    command += [str(HERE / f"test_{name}.py") for name in files]
    environment = {**os.environ, "DRIVETRAIN_NATIVE": "0"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, timeout=limit_s
    )
    assert done.returncode == 0, done.stdout[-5000:]


def test_a_sample_of_the_tests_passes_without_c() -> None:
    passes(["memory", "kernel", "graph"], "-k", SAMPLE, limit_s=110)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_every_test_of_the_objects_passes_without_c() -> None:
    passes(OBJECTS, limit_s=1700)


def test_the_environment_chooses_the_twin() -> None:
    code = "from drivetrain.hal import hot, bytes; print(hot.BACKEND, bytes.BACKEND)"
    for value, expected in (("0", "python"), ("1", hot.BACKEND)):
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "DRIVETRAIN_NATIVE": value},
        )
        assert done.stdout.split()[0] == expected


def pairs() -> list[tuple[type, type]]:
    if hot.BACKEND != "native":
        pytest.skip("the C code is not used")
    from drivetrain.hal import _hot

    names = [name for name in dir(_hot) if name.endswith("Core") or name == "FreeLists"]
    assert len(names) >= 5
    return [(getattr(_hot, name), getattr(_hot_twin, name)) for name in names]


def test_both_have_the_same_classes_with_the_same_names() -> None:
    for native, twin in pairs():
        names = {name for name in dir(native) if not name.startswith("__")}
        for each in names - set(dir(object)):
            assert hasattr(twin, each) or each in getattr(twin, "__annotations__", {}), (
                f"{twin.__name__} lacks {each}"
            )


def test_free_lists_in_c_and_in_python_say_the_same() -> None:
    (native_type, twin_type) = next(p for p in pairs() if p[0].__name__ == "FreeLists")
    rng = random.Random(5)
    native, twin = native_type(), twin_type()
    top = 1 << 20
    for _ in range(5000):
        nbytes, stream = rng.choice([0, 1, 511, 512, 513, 4096, 70_000]), rng.randrange(3)
        what = rng.random()
        if what < 0.5:
            found: Any = native.take(nbytes, stream)
            assert twin.take(nbytes, stream) == found
            if not found:
                native.count(nbytes, True)
                twin.count(nbytes, True)
                top += 4096
                found = top
            if rng.random() < 0.9:
                assert native.put(found, nbytes, stream) == twin.put(found, nbytes, stream)
            else:
                native.count(nbytes, False)
                twin.count(nbytes, False)
        elif what < 0.505:
            arguments = rng.choice([(), (stream,), (stream, 1024)])
            assert sorted(native.drain(*arguments)) == sorted(twin.drain(*arguments))
        assert native.counts() == twin.counts()


def test_free_lists_refuse_what_is_no_number() -> None:
    for kind in pairs()[0][0], _hot_twin.FreeLists:
        if kind.__name__ != "FreeLists":
            continue
        with pytest.raises(TypeError):
            kind().take("1", 2)
        with pytest.raises(TypeError):
            kind().put(1)


def test_every_extension_says_that_it_needs_no_gil() -> None:
    sources = sorted(Path(drivetrain.hal.__file__).parent.glob("_*.c"))
    assert len(sources) >= 4
    for path in sources:
        assert "{Py_mod_gil, Py_MOD_GIL_NOT_USED}" in path.read_text(), path.name


@pytest.mark.skipif(
    not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="this Python has the GIL"
)
def test_importing_the_extensions_leaves_the_gil_off() -> None:
    code = (
        "import sys\n"
        "from drivetrain.hal import _cpu, _crew, _hot, _native\n"
        "assert not sys._is_gil_enabled()\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
