"""Compiled kernels on disk: believed only when whole and ours, safe under many writers."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
import warnings
from pathlib import Path
from textwrap import dedent

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from drivetrain.errors import BadInput
from drivetrain.hal.driver import Target
from drivetrain.hal.language import compile
from drivetrain.hal.language import compiling as compiling_room
from drivetrain.hal.language.cache import Cache, cache, cache_folder
from drivetrain.hal.language.facts import Compiled, KernelFacts, Param
from drivetrain.hal.language.options import Options
from drivetrain.hal.language.source import Source

KEY = "0" * 64
ENTRY = Compiled(
    "cubin",
    b"\x7fELF some code",
    {
        "add<float>": KernelFacts("_Z3add", (Param("ptr", 8, "p"), Param("f32", 4, "v")), True),
        "total": KernelFacts("total", None, block=(128, 1, 1), shared_bytes=64, hidden=2),
    },
    "kernel.cu:1: warning: ü",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "kernels"


def entry(folder: Path, key: str = KEY) -> Path:
    return folder / f"{key}.kernel"


def test_what_was_put_comes_back(folder: Path) -> None:
    assert Cache(folder).get(KEY) is None
    assert not folder.exists()  # asking makes nothing
    Cache(folder).put(KEY, ENTRY)
    assert Cache(folder).get(KEY) == ENTRY
    assert Cache(folder).get("1" * 64) is None
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(entry(folder).stat().st_mode) == 0o600
    assert [path.name for path in folder.iterdir()] == [f"{KEY}.kernel"]


@given(
    code=st.binary(max_size=200),
    log=st.text(max_size=50),
    names=st.lists(st.text(min_size=1, max_size=10), max_size=3, unique=True),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
def test_anything_comes_back(folder: Path, code: bytes, log: str, names: list[str]) -> None:
    log = log.encode(errors="ignore").decode()
    names = [name.encode(errors="ignore").decode() or "k" for name in names]
    made = Compiled("so", code, {n: KernelFacts(n, (Param("i32", 4, n),)) for n in names}, log)
    Cache(folder).put(KEY, made)
    assert Cache(folder).get(KEY) == made


def test_a_flipped_bit_anywhere_is_never_believed(folder: Path) -> None:
    Cache(folder).put(KEY, ENTRY)
    whole = entry(folder).read_bytes()
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        entry(folder).write_bytes(damaged)
        assert Cache(folder).get(KEY) is None, at
        assert not entry(folder).exists()  # the next one compiles, and puts it anew
    entry(folder).write_bytes(whole)
    assert Cache(folder).get(KEY) == ENTRY  # the control: unharmed, it is


def test_a_file_of_another_length_is_never_believed(folder: Path) -> None:
    Cache(folder).put(KEY, ENTRY)
    whole = entry(folder).read_bytes()
    for damaged in (*(whole[:n] for n in range(len(whole))), whole + b"\0", b"", whole * 2):
        entry(folder).write_bytes(damaged)
        assert Cache(folder).get(KEY) is None


def test_an_entry_under_another_key_is_never_believed(folder: Path) -> None:
    Cache(folder).put(KEY, ENTRY)
    other = "f" * 64
    entry(folder).rename(entry(folder, other))
    assert Cache(folder).get(other) is None


def test_a_damaged_entry_is_compiled_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRIVETRAIN_CACHE", str(folder))
    made: list[str] = []

    class Compiler:
        @staticmethod
        def identity(source: Source, target: Target) -> str:
            return "a compiler"

        @staticmethod
        def build(source: Source, target: Target, options: Options) -> Compiled:
            made.append(source.name)
            return ENTRY

    def forget() -> None:
        monkeypatch.setattr("drivetrain.hal.language.cache._caches", {})

    monkeypatch.setattr(compiling_room, "import_module", lambda name: Compiler)
    source, target = Source.cuda("__global__ void k() {}"), Target("cuda", "sm_90")
    forget()
    assert compile(source, target) == ENTRY
    forget()
    assert compile(source, target) == ENTRY
    assert len(made) == 1
    (kept,) = folder.iterdir()
    kept.write_bytes(kept.read_bytes()[:-1] + b"!")
    forget()
    assert compile(source, target) == ENTRY
    assert len(made) == 2
    forget()
    assert compile(source, target) == ENTRY
    assert len(made) == 2


def test_the_key_has_all_that_matters(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRIVETRAIN_CACHE", str(folder))
    made: list[str] = []
    version = ["1"]

    class Compiler:
        @staticmethod
        def identity(source: Source, target: Target) -> str:
            return version[0]

        @staticmethod
        def build(source: Source, target: Target, options: Options) -> Compiled:
            made.append(source.name)
            return ENTRY

    monkeypatch.setattr(compiling_room, "import_module", lambda name: Compiler)
    text, target = "__global__ void k() {}", Target("cuda", "sm_90", (), "12.4")
    ways = [
        lambda: compile(Source.cuda(text), target),
        lambda: compile(Source.cuda(text + " "), target),
        lambda: compile(Source.cuda(text, name="other.cu"), target),
        lambda: compile(Source.cuda(text, defines={"N": 1}), target),
        lambda: compile(Source.cuda(text), target, options=["-DN=2"]),
        lambda: compile(Source.cuda(text), target, options=["-O1"]),
        lambda: compile(Source.cuda(text), target, options=["--use_fast_math"]),
        lambda: compile(Source.cuda(text), Target("cuda", "sm_80", (), "12.4")),
        lambda: compile(Source.cuda(text), Target("cuda", "sm_90", ("fp16",), "12.4")),
        lambda: compile(Source.cuda(text), Target("cuda", "sm_90", (), "12.5")),
    ]
    for number, way in enumerate(ways, 1):
        way()
        way()
        assert len(made) == number
    version[0] = "2"
    ways[0]()
    assert len(made) == len(ways) + 1


# -- whose folder it is ----------------------------------------------------------------------------


def refused(folder: Path, why: str) -> None:
    """Nothing is read from there or written to it, and that is said once."""
    kept = Cache(folder)
    before = sorted(folder.iterdir()) if folder.is_dir() else None
    with pytest.warns(RuntimeWarning, match=why) as said:  # noqa: PT031 - one warning for all
        kept.put(KEY, ENTRY)
        assert kept.get(KEY) == ENTRY  # this process still has it
        kept.get("1" * 64)
        kept.put("2" * 64, ENTRY)
    assert len(said) == 1
    assert (sorted(folder.iterdir()) if folder.is_dir() else None) == before


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o777, 0o701, 0o710])
def test_a_folder_that_others_can_use_is_left_alone(folder: Path, mode: int) -> None:
    Cache(folder).put("1" * 64, ENTRY)
    folder.chmod(mode)
    refused(folder, f"others may use it .mode 0{mode:o}.. Make it yours with mode 0700")
    with pytest.warns(RuntimeWarning):
        assert Cache(folder).get("1" * 64) is None
    folder.chmod(0o700)
    assert Cache(folder).get("1" * 64) == ENTRY  # the control


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_what_belongs_to_another_user_is_left_alone(folder: Path) -> None:
    Cache(folder).put(KEY, ENTRY)
    os.chown(entry(folder), 12345, -1)
    assert Cache(folder).get(KEY) is None
    Cache(folder).put(KEY, ENTRY)
    os.chown(folder, 12345, -1)
    refused(folder, "it belongs to user 12345")
    os.chown(folder, 0, -1)
    assert Cache(folder).get(KEY) == ENTRY  # the control


def test_a_link_in_place_of_the_folder_is_not_followed(folder: Path, tmp_path: Path) -> None:
    real = tmp_path / "real"
    Cache(real).put(KEY, ENTRY)
    folder.symlink_to(real)
    with pytest.warns(RuntimeWarning, match="cannot be used for compiled kernels"):
        assert Cache(folder).get(KEY) is None
    refused(folder, "cannot be used")
    assert [path.name for path in real.iterdir()] == [f"{KEY}.kernel"]


def test_a_link_in_place_of_an_entry_is_not_followed(folder: Path, tmp_path: Path) -> None:
    Cache(folder).put(KEY, ENTRY)
    theirs = tmp_path / "theirs"
    entry(folder).rename(theirs)
    whole = theirs.read_bytes()
    entry(folder).symlink_to(theirs)
    assert Cache(folder).get(KEY) is None
    Cache(folder).put(KEY, ENTRY)  # takes the link's place, and does not write through it
    assert not entry(folder).is_symlink()
    assert theirs.read_bytes() == whole
    assert Cache(folder).get(KEY) == ENTRY


def test_other_things_in_place_of_an_entry_do_no_harm(folder: Path) -> None:
    Cache(folder).put("1" * 64, ENTRY)
    os.mkfifo(entry(folder))
    assert Cache(folder).get(KEY) is None  # and does not wait for a writer
    entry(folder).unlink(missing_ok=True)
    entry(folder).mkdir()
    assert Cache(folder).get(KEY) is None
    with pytest.warns(RuntimeWarning, match="takes no compiled kernel"):
        Cache(folder).put(KEY, ENTRY)
    assert Cache(folder).get("1" * 64) == ENTRY


@pytest.mark.parametrize("what", ["file", "below a file"])
def test_a_folder_that_cannot_be_is_said_once(folder: Path, what: str) -> None:
    folder.write_text("in the way")
    refused(folder if what == "file" else folder / "kernels", "cannot be used")


# -- room ------------------------------------------------------------------------------------------


def test_the_least_recently_used_go_first(folder: Path) -> None:
    code = os.urandom(10_000)
    kept = Cache(folder, limit=50_000)
    keys = [f"{number:064x}" for number in range(8)]
    for number, key in enumerate(keys):
        kept.put(key, Compiled("so", code, {}))
        os.utime(entry(folder, key), (number, number))
        if number == 3:
            assert Cache(folder).get(keys[0]) is not None  # used just now
    left = {path.name.partition(".")[0] for path in folder.iterdir()}
    assert left == {keys[0], *keys[-3:]}
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 50_000


def test_what_is_larger_than_all_room_stays_in_the_process(folder: Path) -> None:
    kept = Cache(folder, limit=1000)
    large = Compiled("so", bytes(2000), {})
    kept.put(KEY, large)
    assert kept.get(KEY) == large
    assert not entry(folder).exists()


def test_what_a_dead_writer_left_goes(folder: Path) -> None:
    Cache(folder).put("1" * 64, ENTRY)
    old, new = folder / ".new-1-dead", folder / ".new-2-alive"
    old.write_bytes(b"half")
    new.write_bytes(b"half")
    long_ago = time.time() - 7200
    os.utime(old, (long_ago, long_ago))
    Cache(folder).put(KEY, ENTRY)
    assert not old.exists()
    assert new.exists()
    assert Cache(folder).get("1" * 64) == ENTRY


FULL = """
import resource, sys, warnings
from drivetrain.hal.language.cache import Cache
from drivetrain.hal.language.facts import Compiled
from pathlib import Path
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # as a disk that is full behaves
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    kept = Cache(Path(sys.argv[1]))
    for number in range(3):
        made = Compiled("so", bytes(5000), {})
        kept.put(str(number) * 64, made)
        assert kept.get(str(number) * 64) == made
print(len(said), said[0].message)
"""


def test_a_full_disk_costs_the_cache_only(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(folder)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.startswith(f"1 {folder} takes no compiled kernel: "), done.stderr
    assert list(folder.iterdir()) == []


WRITER = dedent(
    """
    import random, sys, time
    from pathlib import Path
    from drivetrain.hal.language.cache import Cache
    from drivetrain.hal.language.facts import Compiled
    folder, seed, until = Path(sys.argv[1]), int(sys.argv[2]), time.monotonic() + 3
    random.seed(seed)
    found = rounds = 0
    while time.monotonic() < until:
        rounds += 1
        number = random.randrange(5)
        key, made = f"{number:064x}", Compiled("so", bytes([number]) * (60_000 + number), {})
        kept = Cache(folder, limit=200_000)   # smaller than all: entries go while others read
        if random.random() < 0.5:
            kept.put(key, made)
        else:
            read = kept.get(key)
            assert read is None or read == made, number
            found += read is not None
    print(found, rounds)
    """
)


def test_many_writers_readers_and_evictions_at_once(folder: Path) -> None:
    writers = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", WRITER, str(folder), str(seed)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in range(4)
    ]
    said = [writer.communicate(timeout=60) for writer in writers]
    assert [writer.returncode for writer in writers] == [0] * 4, said
    assert sum(int(out.split()[0]) for out, _ in said) > 0
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 200_000 + 4 * 61_000
    assert not list(folder.glob(".new-*"))


# -- where it is -----------------------------------------------------------------------------------


@pytest.fixture
def no_variables(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("DRIVETRAIN_CACHE", "DRIVETRAIN_CACHE_LIMIT_MIB"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_the_environment_names_the_folder_and_its_size(
    no_variables: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert cache_folder() == tmp_path / "home" / "cache" / "kernels"
    no_variables.setenv("DRIVETRAIN_CACHE", str(tmp_path / "other"))
    no_variables.setenv("DRIVETRAIN_CACHE_LIMIT_MIB", "3")
    found = cache()
    assert (found.folder, found.limit) == (tmp_path / "other", 3 << 20)
    assert cache() is found
    for text in ("-1", "1.5", "much"):
        no_variables.setenv("DRIVETRAIN_CACHE_LIMIT_MIB", text)
        with pytest.raises(BadInput, match="DRIVETRAIN_CACHE_LIMIT_MIB="):
            cache()


def test_nothing_is_said_of_a_folder_that_is_fine(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Cache(folder).put(KEY, ENTRY)
        Cache(folder).get(KEY)
