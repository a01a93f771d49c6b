"""A process is known by more than its pid."""

from __future__ import annotations

import dataclasses
import os
import select
import signal
import subprocess
import sys

import pytest

from drivetrain.errors import StoreError
from drivetrain.store.process import ProcessId


def sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])


def test_this_process_is_alive_and_survives_json() -> None:
    me = ProcessId.of()
    assert me.pid == os.getpid()
    assert me.alive
    assert ProcessId.from_json(me.to_json()) == me


def test_a_reused_pid_or_another_boot_is_not_the_process() -> None:
    me = ProcessId.of()
    assert not dataclasses.replace(me, start_time=me.start_time + 1).alive
    assert not dataclasses.replace(me, boot_id="another").alive
    with pytest.raises(ProcessLookupError):
        dataclasses.replace(me, start_time=me.start_time + 1).pidfd()


def test_a_zombie_is_not_alive_and_kill_says_whether_it_was_there() -> None:
    child = sleeper()
    identity = ProcessId.of(child.pid)
    fd = identity.pidfd()
    try:
        assert identity.alive
        assert identity.kill(signal.SIGKILL)
        assert select.select([fd], [], [], 10)[0]
        assert not identity.alive  # not waited for yet: a zombie
    finally:
        os.close(fd)
        child.wait()
    assert not identity.alive
    assert not identity.kill()


def test_kill_spares_whoever_has_the_pid_now() -> None:
    child = sleeper()
    try:
        identity = ProcessId.of(child.pid)
        assert not dataclasses.replace(identity, start_time=1).kill()
        assert child.poll() is None
    finally:
        child.kill()
        child.wait()


def test_no_such_process_and_no_such_json() -> None:
    with pytest.raises(ProcessLookupError):
        ProcessId.of(2**22 + 1)
    with pytest.raises(StoreError):
        ProcessId.from_json({"pid": 1})
