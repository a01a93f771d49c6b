"""What `drivetrain run`, `jobs` and `show` promise a person, a script and a batch system."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from drivetrain.store.database import Database

from .conftest import LIMIT_S, SCRIPT, Home, Hosted, until

SECRET = "sw0rdf1sh-7781"
HOLDS = "import os, sys, time\nwhile not os.path.exists(sys.argv[1]):\n    time.sleep(0.05)\n"


def script(home: Home, text: str) -> Path:
    path = home.folder / "script.py"
    path.write_text(text)
    return path


def test_output_passes_through_byte_for_byte(home: Home) -> None:
    text = (
        "import os, sys\n"
        "os.write(1, bytes(range(256)) + b'\\r\\n\\x1b[31m')\n"
        "os.write(2, b'\\xff\\xfe err\\n')\n"
        "print('h\\u00e9llo', end='')\n"
    )
    hosted = home.run(script=script(home, text))
    assert hosted.wait() == 0
    out = (hosted.folder / "stdout").read_bytes()
    assert out == bytes(range(256)) + b"\r\n\x1b[31m" + "héllo".encode()
    err = (hosted.folder / "stderr").read_bytes()
    assert b"\xff\xfe err\n" in err
    others = err.replace(b"\xff\xfe err\n", b"").decode().splitlines()
    assert others
    assert all(line.startswith("drivetrain: ") for line in others)


def test_options_are_read_on_both_sides_and_the_rest_goes_to_the_script(home: Home) -> None:
    path = script(home, "import sys; print(sys.argv[1:])\n")
    line = ["run", "--on", "cpu:1", str(path), "--name", "both", "--", "--on", "x", "--json"]
    done = home.drivetrain(*line)
    assert (done.returncode, done.stdout) == (0, "['--on', 'x', '--json']\n")
    assert home.details("both")["device"] == "cpu:1"


def test_modules_beside_the_script_are_the_scripts_alone(home: Home) -> None:
    """One may even be called as this package is, or as one of Python's that a worker imports."""
    for name in ("drivetrain", "argparse", "selectors"):
        (home.folder / f"{name}.py").write_text("raise SystemExit('the wrong module')\n")
    (home.folder / "mine.py").write_text("WORD = 'mine'\n")
    path = script(home, "import sys, mine; print(mine.WORD, sys.path[0])\n")
    done = home.drivetrain("run", str(path))
    assert (done.returncode, done.stdout) == (0, f"mine {home.folder}\n"), done.stderr


def test_an_unknown_option_is_refused_and_names_the_dashes(home: Home) -> None:
    done = home.drivetrain("run", str(SCRIPT), "--lr", "3e-4")
    assert done.returncode == 2
    assert "--lr" in done.stderr
    assert "`--`" in done.stderr
    assert home.records() == []


def test_the_final_record_is_the_last_line(home: Home) -> None:
    done = home.drivetrain("run", "--json", str(script(home, "print('mine')\n")))
    lines = done.stdout.splitlines()
    assert lines[0] == "mine"
    record = json.loads(lines[-1])
    assert (record["state"], record["exit"]["code"]) == ("done", 0)


def test_the_shapes_of_jobs_and_show(home: Home) -> None:
    secret = {"API_TOKEN": SECRET}
    hosted = home.run("--on", "cpu:0", "--name", "j", "--replicate-every", "1", env=secret)
    until(lambda: home.job("j"), "the job")
    first = home.summary("j")
    assert isinstance(first["step"], int)
    pid = home.wait_step(5, "j")
    found = home.summary("j")
    assert {"id", "script", "state", "step", "started", "workers"} <= found.keys()
    assert found["script"] == str(SCRIPT)
    assert os.path.isabs(found["script"])
    assert found["workers"] == [{"rank": 0, "device": "cpu:0", "pid": pid}]
    command = Path(f"/proc/{pid}/cmdline").read_bytes()
    assert b"drivetrain.runtime.worker" in command
    home.ok("migrate", "j", "--to", "cpu:1", "--reason", "to see")
    os.kill(int(home.summary("j")["workers"][0]["pid"]), 9)
    until(lambda: home.job("j").view.failovers, "the failover")  # type: ignore[union-attr]
    home.go.touch()
    assert hosted.wait() == 0
    shown = home.details("j")
    assert {"placement", "moves", "failovers", "replica", "exit"} <= shown.keys()
    assert {
        "strategy",
        "from",
        "to",
        "downtime_ms",
        "predicted_downtime_ms",
        "state_bytes",
        "hash_source",
        "hash_target",
        "steps_lost",
        "steps_repeated",
        "ok",
    } <= shown["moves"][0].keys()
    assert {
        "detected_ms",
        "resumed_ms",
        "steps_repeated",
        "samples_lost",
        "samples_doubled",
    } <= shown["failovers"][0].keys()
    assert shown["moves"][0]["hash_source"] == shown["moves"][0]["hash_target"]
    waited = shown["moves"][0]["waited_ms"]
    assert set(waited) == {"source", "target"}
    # Neither began before it was asked; each waits for the other within the copy.
    assert all(0 <= each <= shown["moves"][0]["phases_ms"]["copy"] for each in waited.values())
    assert shown["workers"] == []
    with closing(Database(home.state / "drivetrain.sqlite")) as database:
        assert database.placements(shown["id"]) == (shown["placement"],)
    asked = shown["requests"][0]
    assert (asked["command"], asked["uid"], asked["reason"]) == (
        "migrate",
        os.getuid(),
        "to see",
    )
    environment_values_are_written_nowhere(home, hosted)


def environment_values_are_written_nowhere(home: Home, hosted: Hosted) -> None:
    """Not by a run, a move or a failover either."""
    assert SECRET not in hosted.out + hosted.err
    for path in home.state.rglob("*"):
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes(), path
    assert SECRET not in home.ok("show", "j", "--json") + home.ok("logs", "j", "--events")


def test_a_worker_sees_its_own_device_alone(home: Home) -> None:
    text = (
        "import json, os\n"
        "names = ('CUDA_VISIBLE_DEVICES', 'HIP_VISIBLE_DEVICES', 'ZE_AFFINITY_MASK',\n"
        "         'OMP_NUM_THREADS')\n"
        "print(json.dumps([sorted(os.sched_getaffinity(0)), *map(os.environ.get, names)]))\n"
    )
    path = script(home, text)
    hidden = {"CUDA_VISIBLE_DEVICES": "0,1", "OMP_NUM_THREADS": "64"}
    seen = []
    for address in ("cpu:0", "cpu:1"):
        hosted = home.run("--on", address, script=path, env=hidden)
        assert hosted.wait() == 0
        seen.append(json.loads(hosted.out))
    assert not set(seen[0][0]) & set(seen[1][0])
    for cores, cuda, hip, ze, threads in seen:
        assert cuda == ""
        assert hip == "-1"
        assert ze == "9999"
        assert int(threads) == len(cores)


def test_eight_submissions_at_once_never_overcommit(home: Home) -> None:
    path = script(home, HOLDS)
    facts = json.loads(home.ok("devices", "--json"))["devices"][0]
    each = int(facts["memory_bytes"] * 0.24)
    line = ["run", "--memory", str(each), str(path), "--", str(home.go)]
    code = "from drivetrain.cli.main import main; main()"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, *line],
            env=home.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=home.folder,
        )
        for _ in range(8)
    ]
    until(lambda: (home.state / "drivetrain.sqlite").exists(), "the first one's database")
    database = Database(home.state / "drivetrain.sqlite")
    most = 0

    def all_decided() -> bool:
        """Each of them was refused, or holds its lease until it may end."""
        nonlocal most
        held = [lease.nbytes for lease in database.leases()]
        most = max(most, sum(held))
        assert most <= facts["memory_bytes"]
        refused = sum(process.poll() is not None for process in processes)
        return refused + len(held) == len(processes)

    until(all_decided, "eight decisions")
    home.go.touch()
    for process in processes:
        process.wait(LIMIT_S)
    database.close()
    codes = [process.returncode for process in processes]
    told = [process.stderr.read() for process in processes if process.stderr]
    assert 1 <= codes.count(0) <= 4, told
    assert most == each * codes.count(0)
    for code, text in zip(codes, told, strict=True):
        assert code == 0 or "memory" in text or "bytes" in text


@pytest.mark.parametrize("words", [("jobs", "--json"), ("jobs",)])
def test_an_empty_state_folder_is_no_error(home: Home, words: tuple[str, ...]) -> None:
    assert home.drivetrain(*words).returncode == 0
