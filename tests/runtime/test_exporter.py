"""The exporter: what it tells, to whom, and in what form."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivetrain import hal
from drivetrain.errors import BadInput
from drivetrain.hal import registry
from drivetrain.hal.probe import Verdict
from drivetrain.hal.telemetry import Telemetry
from drivetrain.runtime import metrics
from drivetrain.runtime.exposition import MOST_SAMPLES, Metric, render
from drivetrain.runtime.metrics import Collector
from drivetrain.runtime.metrics_jobs import Counts
from drivetrain.runtime.metrics_server import MOST_CONNECTIONS, MetricsServer, write_textfile
from drivetrain.store.database import Database
from drivetrain.store.home import home, job_dir
from drivetrain.store.process import ProcessId

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = re.compile(r'[a-z_]+(\{[a-z_]+="(\\.|[^"\\\n])*"(,[a-z_]+="(\\.|[^"\\\n])*")*\})? \S+')
EVERYTHING = Telemetry(
    0.5, 10, 100, 250.0, 300.0, 60.0, 70.0, 1500.0, 3000.0, ("hw_thermal",), 3, 1, "ok", 1.0,
    (("sm_busy_ratio", 0.25),),
)  # fmt: skip


# --- the text ------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.text(max_size=200), st.floats() | st.integers(-(2**60), 2**60))),
    st.text(),
)
def test_whatever_the_labels_hold_each_sample_is_one_well_formed_line(
    values: list[tuple[str, float]], told: str
) -> None:
    metric = Metric("drivetrain_x", "gauge", told)
    for text, value in values:
        metric.add(value, label=text)
    lines = render([metric]).split("\n")
    assert lines.pop() == ""
    samples = [line for line in lines if line and not line.startswith("#")]
    assert len(samples) == len(values)
    for line, (_, value) in zip(samples, values, strict=True):
        assert SAMPLE.fullmatch(line), line
        read = float(line.rpartition(" ")[2])
        assert read == float(value) or value != value


def test_an_absent_sensor_is_no_sample_and_too_many_are_counted() -> None:
    metric = Metric("drivetrain_x", "gauge", "")
    metric.add(None, device="a")
    assert render([metric]) == "\n"
    for number in range(MOST_SAMPLES + 5):
        metric.add(number, device=str(number))
    assert (len(metric.samples), metric.left_out) == (MOST_SAMPLES, 5)


def test_buckets_of_a_histogram_are_cumulative() -> None:
    metric = Metric("drivetrain_x", "histogram", "")
    metric.add_histogram((1.0, 2.5), (3, 0, 2), 11.5)
    assert render([metric]).splitlines()[2:] == [
        'drivetrain_x_bucket{le="1"} 3',
        'drivetrain_x_bucket{le="2.5"} 3',
        'drivetrain_x_bucket{le="+Inf"} 5',
        "drivetrain_x_sum 11.5",
        "drivetrain_x_count 5",
    ]


# --- what it tells -------------------------------------------------------------------------------


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A page of a machine on which every sensor exists and a lease is held."""
    monkeypatch.setenv("DRIVETRAIN_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(registry, "telemetry", lambda device: EVERYTHING)
    probed = Verdict(True, 0.0, "")
    monkeypatch.setattr(metrics, "verdicts", lambda found: dict.fromkeys(found, probed))
    database = Database(home() / "drivetrain.sqlite")
    database.lease("host", 1000, 400, ProcessId.of(), "train-1")
    database.lease("host", 1000, 100, ProcessId.of(), "train-2")
    yield Collector().page()
    database.close()


def test_every_sensor_the_verdict_and_leases_are_told(page: str) -> None:
    (device, *_) = [device.address for device in hal.devices()]
    for name, value in {
        "utilisation_ratio": "0.5", "memory_used_bytes": "10", "memory_bytes": "100",
        "power_watts": "250", "power_limit_watts": "300", "temperature_celsius": "60",
        "memory_temperature_celsius": "70", "clock_hertz": "1500000000",
        "memory_clock_hertz": "3000000000",
    }.items():  # fmt: skip
        assert f'drivetrain_device_{name}{{device="{device}"}} {value}\n' in page
    at = f'device="{device}"'
    assert f'drivetrain_device_ecc_errors_total{{{at},kind="uncorrected"}} 1\n' in page
    assert f'drivetrain_device_throttled{{{at},reason="hw_thermal"}} 1\n' in page
    assert f'drivetrain_device_health{{{at},state="degraded"}} 1\n' in page
    assert f'drivetrain_device_health{{{at},state="ok"}} 0\n' in page
    assert f'drivetrain_device_vendor_reading{{{at},reading="sm_busy_ratio"}} 0.25\n' in page
    assert 'drivetrain_leased_bytes{domain="host"} 500\n' in page
    assert 'drivetrain_leases{domain="host"} 2\n' in page


def test_promtool_takes_the_page(page: str) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("needs promtool (Debian: apt install prometheus)")
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=page, text=True, capture_output=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_dashboard_the_alerts_and_the_page_of_docs_name_metrics_that_exist(page: str) -> None:
    there = set(re.findall(r"^# TYPE (\S+)", page, re.MULTILINE))
    source = "".join(p.read_text() for p in (ROOT / "src/drivetrain/runtime").glob("metrics*.py"))
    # Those of jobs appear with jobs.
    there |= set(re.findall(r'"(drivetrain_job_\w+)"', source))
    there |= {f"{name}_bucket" for name in there}
    dashboard = json.loads((ROOT / "docs/monitoring/dashboard.json").read_text())
    text = json.dumps(dashboard) + (ROOT / "docs/monitoring/alerts.yml").read_text()
    text += (ROOT / "docs/monitoring.md").read_text()
    used = set(re.findall(r"\bdrivetrain_(?:device|driver|job|move|fail|leas|build|exp)\w*", text))
    assert used - there == set()
    documented = set(re.findall(r"`(drivetrain_\w+)`", (ROOT / "docs/monitoring.md").read_text()))
    assert {name for name in there if not name.endswith("_bucket")} - documented == set()
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))


def test_queries_of_the_dashboard_are_promql(tmp_path: Path) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("needs promtool (Debian: apt install prometheus)")
    dashboard = json.loads((ROOT / "docs/monitoring/dashboard.json").read_text())
    queries = [t["expr"] for panel in dashboard["panels"] for t in panel["targets"]]
    rules = [{"record": f"q{n}", "expr": text} for n, text in enumerate(queries)]
    file = tmp_path / "rules.yml"
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    check = ["promtool", "check", "rules", str(file)]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_totals_never_go_back_when_jobs_are_pruned() -> None:
    class View:
        def __init__(self, moves: int, failovers: int) -> None:
            move = {"strategy": "immediate", "ok": True, "downtime_ms": 90.0, "state_bytes": 8}
            self.moves = [move] * moves
            self.failovers = [{"resumed_ms": None, "steps_repeated": 2}] * failovers

    class Job:
        def __init__(self, name: str, moves: int, failovers: int) -> None:
            self.id, self.view = name, View(moves, failovers)

    counts = Counts()
    counts.take([Job("a", 2, 1), Job("b", 1, 0)])  # type: ignore[list-item]
    counts.take([Job("b", 3, 0)])  # type: ignore[list-item]
    counts.take([])
    told = render(counts.metrics())
    assert 'drivetrain_moves_total{strategy="immediate",result="ok"} 5\n' in told
    assert "drivetrain_failovers_total 1\n" in told
    assert "drivetrain_move_downtime_seconds_count 5\n" in told
    assert "drivetrain_moved_bytes_total 40\n" in told


def test_a_damaged_journal_is_a_lost_job_and_not_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRIVETRAIN_HOME", str(tmp_path / "home"))
    (job_dir("bad-1", create=True) / "journal").write_bytes(b"this is no journal")
    told = Collector().page()
    assert 'drivetrain_jobs{state="lost"} 1\n' in told
    assert 'drivetrain_exporter_errors_total{part="jobs"} 0\n' in told


# --- to whom -------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[MetricsServer]:
    with MetricsServer("127.0.0.1", 0, lambda: "drivetrain_x 1\n") as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server: MetricsServer, request: str) -> str:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(request.encode())
        answer = b""
        while block := connection.recv(65536):
            answer += block
    return answer.decode()


def test_get_and_head_are_answered_and_nothing_else(server: MetricsServer) -> None:
    host = "Host: 127.0.0.1\r\nConnection: close\r\n\r\n"
    whole = ask(server, f"GET /metrics HTTP/1.1\r\n{host}")
    assert whole.startswith("HTTP/1.0 200")
    assert "text/plain; version=0.0.4" in whole
    assert whole.endswith("\r\n\r\ndrivetrain_x 1\n")
    assert ask(server, f"HEAD /metrics HTTP/1.1\r\n{host}").endswith("\r\n\r\n")
    assert " 404 " in ask(server, f"GET /../etc/passwd HTTP/1.1\r\n{host}").splitlines()[0]
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "TRACE"):
        first = ask(server, f"{method} /metrics HTTP/1.1\r\n{host}").splitlines()[0]
        assert " 501 " in first, method


def test_a_name_that_is_made_to_lead_here_is_refused(server: MetricsServer) -> None:
    for host in ("127.0.0.1:1", "localhost", "[::1]:9834"):
        assert " 200 " in ask(server, f"GET /metrics HTTP/1.0\r\nHost: {host}\r\n\r\n")
    for host in ("evil.example", "127.0.0.1.evil.example", ""):
        answer = ask(server, f"GET /metrics HTTP/1.0\r\nHost: {host}\r\n\r\n")
        assert " 403 " in answer.splitlines()[0]
        assert "drivetrain_x" not in answer


def test_clients_that_say_nothing_do_not_take_all_of_it(server: MetricsServer) -> None:
    silent = [
        socket.create_connection(("127.0.0.1", server.port), timeout=10)
        for _ in range(MOST_CONNECTIONS + 8)
    ]
    # Beyond the limit they are let go of at once.
    closed = 0
    for connection in silent:
        connection.settimeout(0.2)
        try:
            closed += connection.recv(1) == b""
        except TimeoutError:
            pass
        except ConnectionResetError:
            closed += 1
    for connection in silent:
        connection.close()
    assert closed >= 8


def test_a_port_that_is_taken_or_an_address_that_is_not_ours_is_bad_input(
    server: MetricsServer,
) -> None:
    for host, port in (("127.0.0.1", server.port), ("192.0.2.1", 0), ("no.such.host.invalid", 0)):
        with pytest.raises(BadInput, match="cannot listen"):
            MetricsServer(host, port, lambda: "")


def test_a_textfile_is_replaced_in_one_step_and_readable(tmp_path: Path) -> None:
    path = tmp_path / "drivetrain.prom"
    write_textfile(path, "old 1\n")
    with path.open() as reader:
        write_textfile(path, "new 1\n")
        assert reader.read() == "old 1\n", "who had it open reads a whole page"
    assert path.read_text() == "new 1\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert os.listdir(tmp_path) == ["drivetrain.prom"]
    for wrong in (tmp_path / "metrics.txt", tmp_path / "nowhere/x.prom"):
        with pytest.raises(BadInput):
            write_textfile(wrong, "")


# --- the command ---------------------------------------------------------------------------------


def test_the_command_serves_writes_and_ends_when_told(tmp_path: Path) -> None:
    environment = {**os.environ, "DRIVETRAIN_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "drivetrain", "exporter"]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *arguments], env=environment, capture_output=True, text=True, check=False
        )

    for bad in (["--every", "5"], ["--port", "70000"], ["--textfile", str(tmp_path / "x.txt")]):
        assert run(*bad).returncode == 2, bad
    file = tmp_path / "node.prom"
    assert run("--textfile", str(file)).returncode == 0
    assert "drivetrain_build_info" in file.read_text()
    with subprocess.Popen(
        [*command, "--port", "0"], env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.fullmatch(r"drivetrain: metrics at (http://127\.0\.0\.1:\d+/metrics)\n", line)
        assert found is not None, line
        with urllib.request.urlopen(found[1], timeout=30) as answer:
            assert b'drivetrain_device_info{device="cpu:0"' in answer.read()
        with pytest.raises(urllib.error.HTTPError, match="501"):
            urllib.request.urlopen(found[1], data=b"x", timeout=30)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert process.stderr.read() == ""
