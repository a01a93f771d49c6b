"""Compilers in child processes: whatever they do, the caller has an answer and nothing is left."""

from __future__ import annotations

import os
import stat
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from drivetrain.errors import BadInput, HalError
from drivetrain.hal.language import process
from drivetrain.hal.language.process import Ended, limit_s, private_folder, run

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


def python(text: str, folder: Path, *arguments: str, limit: float = 30.0, **more: int) -> Ended:
    return run([sys.executable, "-c", text, *arguments], folder, limit=limit, **more)


def runs(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_what_it_says_and_how_it_ends(tmp_path: Path) -> None:
    text = "import sys; print('out'); print('first\\nlast', file=sys.stderr); sys.exit(3)"
    ended = python(text, tmp_path)
    assert (ended.status, ended.out, ended.err) == (3, "out\n", "first\nlast\n")
    assert ended.reason == "it ended with exit code 3: last"
    ended = python("print('fine')", tmp_path)
    assert (ended.status, ended.reason, ended.out) == (0, "", "fine\n")


def test_it_runs_in_its_folder_with_nothing_to_read(tmp_path: Path) -> None:
    text = (
        "import os, sys, tempfile; print(os.getcwd()); print(tempfile.gettempdir());"
        "print(repr(sys.stdin.read()), os.environ['MORE'], os.environ['LC_ALL'])"
    )
    ended = run([sys.executable, "-c", text], tmp_path, environment={"MORE": "1"})
    assert ended.out.splitlines() == [str(tmp_path.resolve()), str(tmp_path), "'' 1 C"]


def test_no_argument_is_the_shells(tmp_path: Path) -> None:
    words = ["; touch pwned", "$(touch pwned)", "`touch pwned`", "a b", "*", '"', "'"]
    ended = python("import sys; print(sys.argv[1:])", tmp_path, *words)
    assert ended.out.strip() == repr(words)
    assert not (tmp_path / "pwned").exists()


def test_a_hang_ends_at_the_limit(tmp_path: Path) -> None:
    ended = python("import time; print('on', flush=True); time.sleep(600)", tmp_path, limit=0.5)
    assert (ended.status, ended.out) == (None, "on\n")
    assert ended.reason.startswith("it did not end within 0.5 s and was ended (set DRIVETRAIN_")


def test_one_that_ignores_all_signals_ends_too(tmp_path: Path) -> None:
    text = (
        "import signal, time\nfor n in signal.valid_signals():\n"
        "    try: signal.signal(n, signal.SIG_IGN)\n    except OSError: pass\n"
        "print('deaf', flush=True); time.sleep(600)"
    )
    ended = python(text, tmp_path, limit=1.0)
    assert (ended.status, ended.out) == (None, "deaf\n")


def test_a_crash_is_named_and_leaves_no_core(tmp_path: Path) -> None:
    ended = python("import os; os.abort()", tmp_path)
    assert ended.reason == "it crashed (SIGABRT)"
    ended = python("import ctypes; ctypes.string_at(0)", tmp_path)
    assert ended.reason.startswith("it crashed (SIGSEGV)")
    assert not [path for path in tmp_path.iterdir() if "core" in path.name]


def test_a_command_that_is_not_there(tmp_path: Path) -> None:
    ended = run(["/nonexistent/compiler"], tmp_path)
    assert ended.status in (126, 127)
    assert "not found" in ended.reason or "No such file" in ended.reason


CHILDREN = """
import os, sys, time
pids = []
for index in range(6):
    pid = os.fork()
    if pid == 0:
        if index % 2:
            os.setsid()            # out of the compiler's group
        if index % 3 == 0 and os.fork():
            os._exit(0)            # and out of its family
        with open(f"pid-{os.getpid()}", "w"):
            pass
        time.sleep(600)
while len([n for n in os.listdir(".") if n.startswith("pid-")]) < 6:
    time.sleep(0.01)
print("left", flush=True)
"""


@linux
@pytest.mark.parametrize("end", ["", "os.abort()", "time.sleep(600)"])
def test_what_it_left_behind_is_gone(tmp_path: Path, end: str) -> None:
    ended = python(CHILDREN + end, tmp_path, limit=5.0)
    assert ended.out == "left\n"
    left = [int(path.name[4:]) for path in tmp_path.glob("pid-*")]
    assert len(left) == 6
    gone_by = time.monotonic() + 10  # the kernel buries them in its own time
    while any(map(runs, left)) and time.monotonic() < gone_by:
        time.sleep(0.01)
    assert not any(map(runs, left))


@linux
def test_nobody_elses_process_is_ended(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    with ThreadPoolExecutor() as threads:
        slow = threads.submit(python, "import time; time.sleep(1.5); print('alive')", folders[0])
        python("import os; os.abort()", folders[1])
        python("pass", folders[2])
        assert slow.result().out == "alive\n"


def test_a_flood_of_words_is_cut(tmp_path: Path) -> None:
    text = "import sys\nfor n in range(400000): print(n)\nprint('end', file=sys.stderr)"
    ended = python(text, tmp_path)
    assert len(ended.out) == process.LARGEST_SPEECH
    assert ended.out.endswith("399999\n")


def test_a_file_without_end_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "LARGEST_FILE", 1 << 20)
    text = (
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_DFL)\nwhile True: print('x' * 99)"
    )
    ended = python(text, tmp_path)
    assert ended.reason.startswith("it crashed (SIGXFSZ)")
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 2 << 20


def test_memory_has_a_limit(tmp_path: Path) -> None:
    text = "x = bytearray(1 << 30); print(len(x))"
    assert python(text, tmp_path, memory=600 << 20).reason.endswith("MemoryError")
    assert python(text, tmp_path, memory=0).out == f"{1 << 30}\n"


def test_a_private_folder_is_ours_and_goes() -> None:
    with private_folder() as folder:
        facts = folder.stat()
        assert stat.S_IMODE(facts.st_mode) == 0o700
        assert facts.st_uid == os.geteuid()
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text("x")
    assert not folder.exists()
    with pytest.raises(KeyError), private_folder() as folder:
        raise KeyError
    assert not folder.exists()


def test_without_room_for_a_folder_tmpdir_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process.tempfile, "tempdir", str(tmp_path / "absent"))
    with (
        pytest.raises(HalError, match="set TMPDIR to a folder with space") as caught,
        private_folder(),
    ):
        pass
    assert caught.value.code == "temporary_folder"


def test_the_limit_is_a_number_of_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DRIVETRAIN_COMPILE_LIMIT_S", raising=False)
    assert limit_s() == 60.0
    for text, seconds in (("2.5", 2.5), ("1e3", 1000.0), ("", 60.0)):
        monkeypatch.setenv("DRIVETRAIN_COMPILE_LIMIT_S", text)
        assert limit_s() == seconds
    for text in ("0", "-1", "nan", "inf", "1e9", "soon"):
        monkeypatch.setenv("DRIVETRAIN_COMPILE_LIMIT_S", text)
        with pytest.raises(BadInput, match="DRIVETRAIN_COMPILE_LIMIT_S="):
            limit_s()
