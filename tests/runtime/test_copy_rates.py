"""The rate that a move's bytes are predicted with: of earlier moves, as calibrated, or guessed."""

from pathlib import Path

import pytest

from drivetrain.errors import BadInput
from drivetrain.hal import Capabilities, Device
from drivetrain.hal.device import DeviceInfo
from drivetrain.placement import calibration
from drivetrain.runtime.placing import copy_gbps
from drivetrain.store.database import Database, Move


def device(address: str, cores: int | None = None) -> Device:
    driver, _, index = address.partition(":")
    info = DeviceInfo(
        driver, int(index), "d", "v", "uuid-" + address, capabilities=Capabilities(cores=cores)
    )
    return Device(address, info, info.uuid)


MACHINE = {
    each.address: each
    for each in (
        device("cuda:0"),
        device("cuda:1"),
        device("cpu:0", 64),
        device("cpu:1", 4),
        device("cpu:2", 1),
    )
}


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Database:
    def find(address: str) -> Device:
        if address not in MACHINE:
            raise BadInput(address)
        return MACHINE[address]

    monkeypatch.setattr("drivetrain.hal.device", find)
    monkeypatch.setenv("DRIVETRAIN_HOME", str(tmp_path))
    return Database(tmp_path / "drivetrain.sqlite")


def calibrated(address: str, **links: float) -> None:
    which = MACHINE[address]
    calibration.save(which, calibration.Calibration(which.uuid, "", "", 0.0, links=dict(links)))


def test_a_guess_grows_with_the_cores_up_to_what_a_gpu_is_guessed_to_take(
    database: Database,
) -> None:
    one, four, many = (
        copy_gbps(database, address, "cuda:0", "immediate")
        for address in ("cpu:2", "cpu:1", "cpu:0")
    )
    assert one < four < many
    assert many == copy_gbps(database, "cuda:0", "cuda:1", "immediate")
    assert copy_gbps(database, "cpu:2", "cpu:0", "immediate") == one  # of the side with fewer


def test_a_calibrated_link_says_more_than_a_guess(database: Database) -> None:
    calibrated("cuda:0", **{"to host": 11.0, "from host": 7.0, MACHINE["cuda:1"].uuid: 300.0})
    calibrated("cuda:1", **{"to host": 50.0, "from host": 9.0})
    assert copy_gbps(database, "cuda:0", "cpu:0", "immediate") == 11.0
    assert copy_gbps(database, "cpu:0", "cuda:0", "immediate") == 7.0
    assert copy_gbps(database, "cuda:0", "cuda:1", "immediate") == 9.0  # it may be staged
    assert copy_gbps(database, "cpu:2", "cuda:0", "immediate") < 7.0
    assert copy_gbps(database, "cuda:0", "cuda:1", "checkpointed") < 7.0  # through a disk


def test_a_job_may_leave_a_device_that_is_not_listed_any_more(database: Database) -> None:
    assert copy_gbps(database, "cuda:7", "cpu:0", "immediate") > 0


def test_the_newest_large_move_between_such_drivers_says_most(database: Database) -> None:
    calibrated("cuda:0", **{"to host": 11.0})
    for at, nbytes, rate, strategy in (
        (1.0, 1 << 30, 40.0, "immediate"),
        (2.0, 1 << 30, 50.0, "immediate"),
        (3.0, 1 << 20, 60.0, "immediate"),  # small
        (4.0, 1 << 30, 70.0, "checkpointed"),
    ):
        database.add_move(Move("j", "cuda:1", "cpu:0", nbytes, 1.0, 1.0, rate, strategy, at))
    assert copy_gbps(database, "cuda:0", "cpu:0", "immediate") == 50.0
    assert copy_gbps(database, "cpu:0", "cuda:0", "immediate") != 50.0
