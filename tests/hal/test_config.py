"""Files that several processes change: no change is lost, and none waits for ever."""

from __future__ import annotations

import fcntl
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from drivetrain.errors import BadInput
from drivetrain.hal import config

KEYS = [f"key{number}" for number in range(12)]


def added(known: dict[str, Any], key: str) -> dict[str, Any]:
    time.sleep(0.01)  # for another to come in between
    return {**known, key: 1}


def at_once(change: Any) -> None:
    with ThreadPoolExecutor(len(KEYS)) as pool:
        list(pool.map(change, KEYS))


def test_changes_at_the_same_time_are_all_kept(tmp_path: Path) -> None:
    path = tmp_path / "new" / "kept.json"
    at_once(lambda key: config.change_json(path, lambda known: added(known, key)))
    assert sorted(config.read_json(path)) == sorted(KEYS)
    # The control: the same without taking turns.
    other = tmp_path / "other.json"
    at_once(lambda key: config.write_json(other, added(config.read_json(other), key)))
    assert len(config.read_json(other)) < len(KEYS)


def test_a_holder_that_does_not_let_go_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    config.change_json(path, lambda known: {"a": 1})
    assert list(tmp_path.iterdir()) == [path]
    held = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        config.change_json(path, lambda known: {**known, "b": 2})
    finally:
        os.close(held)
    assert config.read_json(path) == {"a": 1, "b": 2}


def test_trust_of_several_drivers_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRIVETRAIN_HOME", str(tmp_path / "home"))
    at_once(lambda key: config.write_trust(key, "dist:entry"))
    assert sorted(config.trusted_drivers()) == sorted(KEYS)
    at_once(lambda key: config.write_trust(key, None))
    assert config.trusted_drivers() == {}
    (tmp_path / "file").touch()
    monkeypatch.setenv("DRIVETRAIN_HOME", str(tmp_path / "file" / "below"))
    with pytest.raises(BadInput, match="nothing was changed"):
        config.write_trust("a", "dist:entry")
