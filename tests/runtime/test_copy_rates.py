"""The rate that a move's bytes are predicted with: of earlier moves, as calibrated, or guessed."""

from pathlib import Path

import pytest

from drivetrain.hal import Capabilities, Device
from drivetrain.hal.device import DeviceInfo
from drivetrain.placement import calibration
from drivetrain.runtime.placing import copy_gbps
from drivetrain.store.database import Database, Move


def device(driver: str, index: int = 0, cores: int | None = None) -> Device:
    uuid = f"{driver}-{index}"
    info = DeviceInfo(driver, index, "d", "v", uuid, capabilities=Capabilities(cores=cores))
    return Device(f"{driver}:{index}", info, uuid)


GPU, OTHER = device("cuda"), device("cuda", 1)


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Database:
    monkeypatch.setenv("DRIVETRAIN_HOME", str(tmp_path))
    return Database(tmp_path / "drivetrain.sqlite")


def calibrated(which: Device, **links: float) -> None:
    found = calibration.Calibration(which.uuid, "", "", 0.0, links=dict(links))
    calibration.save(which, found)


def test_a_guess_grows_with_the_cores_up_to_what_a_gpu_is_guessed_to_take(
    database: Database,
) -> None:
    rates = [
        copy_gbps(database, device("cpu", cores=cores), GPU, "immediate") for cores in (1, 4, 64)
    ]
    assert rates[0] < rates[1] < rates[2]
    assert rates[2] == copy_gbps(database, GPU, OTHER, "immediate")
    small = copy_gbps(database, device("cpu", 0, 1), device("cpu", 1, 64), "immediate")
    assert small == rates[0]  # of the side that has fewer


def test_a_calibrated_link_says_more_than_a_guess(database: Database) -> None:
    calibrated(GPU, **{"to host": 11.0, "from host": 7.0, OTHER.uuid: 300.0})
    host = device("cpu", cores=64)
    assert copy_gbps(database, GPU, host, "immediate") == 11.0
    assert copy_gbps(database, host, GPU, "immediate") == 7.0
    assert copy_gbps(database, GPU, OTHER, "immediate") == 300.0
    assert copy_gbps(database, device("cpu", cores=1), GPU, "immediate") < 7.0
    assert copy_gbps(database, GPU, OTHER, "checkpointed") < 7.0  # through a disk


def test_the_newest_large_move_between_such_drivers_says_most(database: Database) -> None:
    calibrated(GPU, **{"to host": 11.0})
    host = device("cpu", cores=64)
    for at, nbytes, rate, strategy in (
        (1.0, 1 << 30, 40.0, "immediate"),
        (2.0, 1 << 30, 50.0, "immediate"),
        (3.0, 1 << 20, 60.0, "immediate"),  # small
        (4.0, 1 << 30, 70.0, "checkpointed"),
    ):
        database.add_move(Move("j", "cuda:1", "cpu:0", nbytes, 1.0, 1.0, rate, strategy, at))
    assert copy_gbps(database, GPU, host, "immediate") == 50.0
    assert copy_gbps(database, host, GPU, "immediate") != 50.0
