"""The kit as tests, for the author of a driver: each check is a test item of its own.

::

    pytest -p drivetrain.hal.conformance.pytest_plugin --drivetrain-device mychip:0

runs them beside the tests of your own; ``-k memory`` chooses some. Without ``--drivetrain-device``
it adds nothing. A check of something that the driver does not declare, or that this machine cannot
show, is skipped with that reason. Checks run in child processes, so a driver may crash or hang.

To have it in every run, put this into your ``pyproject.toml``::

    [tool.pytest.ini_options]
    addopts = ["-p", "drivetrain.hal.conformance.pytest_plugin", "--drivetrain-device", "mychip:0"]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from drivetrain import hal
from drivetrain.errors import DrivetrainError
from drivetrain.hal.conformance.check import Check, Failed
from drivetrain.hal.conformance.report import FAILED, PASSED, SKIPPED
from drivetrain.hal.conformance.running import Examination, chosen

if TYPE_CHECKING:
    from collections.abc import Iterator

OPTION = "--drivetrain-device"
_NAME = "drivetrain-conformance"
_examination = pytest.StashKey[Examination]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("drivetrain", "conformance of a Drivetrain driver")
    group.addoption(
        OPTION, metavar="ADDRESS", default="", help="check this device, for example mychip:0"
    )
    group.addoption(
        "--drivetrain-long", action="store_true", help="the million cycles of the kit too"
    )


def pytest_configure(config: pytest.Config) -> None:
    address = config.getoption(OPTION)
    if not address or config.option.help:
        return
    try:
        device = hal.device(address)
    except DrivetrainError as error:
        raise pytest.UsageError(f"{OPTION} {address}: {error}") from error
    config.stash[_examination] = Examination(device.address)


def pytest_unconfigure(config: pytest.Config) -> None:
    examination = config.stash.get(_examination, None)
    if examination is not None:
        examination.__exit__()


def pytest_report_header(config: pytest.Config) -> str | None:
    examination = config.stash.get(_examination, None)
    if examination is None:
        return None
    device = hal.device(examination.address)
    return f"drivetrain: {device.address}, {device.name}, driver {device.info.driver_version}"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session: pytest.Session, items: list[pytest.Item]) -> None:
    examination = session.config.stash.get(_examination, None)
    if examination is None:
        return
    long = bool(session.config.getoption("--drivetrain-long"))
    kit = Kit.from_parent(session, name=_NAME, nodeid=_NAME)
    added = [
        Item.from_parent(kit, name=check.name, check=check, examination=examination)
        for check in chosen(long=long)
    ]
    items.extend(added)
    report = pytest.CollectReport(_NAME, "passed", longrepr=None, result=list(added))
    session.ihook.pytest_collectreport(report=report)  # so that they are counted


class Kit(pytest.Collector):
    """Where the items hang."""

    def collect(self) -> Iterator[pytest.Item]:
        return iter(())


class Item(pytest.Item):
    """One check of the kit."""

    def __init__(self, *, check: Check, examination: Examination, **given: Any) -> None:
        super().__init__(**given)
        self.check = check
        self._examination = examination

    def runtest(self) -> None:
        result = self._examination.of(self.check)
        if result.state == PASSED:
            return
        if result.state == FAILED:
            raise Failed(result.reason)
        kind = "Unsupported" if result.state == SKIPPED else result.state
        pytest.skip(f"{kind}: {result.reason}")

    def ends(self) -> None:
        """After the last item of a topic its process ends; the device must close."""
        complaint = self._examination.close()
        if complaint:
            raise Failed(f"after {self.check.topic}: {complaint}")

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], *_: Any) -> Any:
        if isinstance(excinfo.value, Failed):
            return f"{self.check.proves}\nIt does not hold: {excinfo.value}"
        return super().repr_failure(excinfo)

    def reportinfo(self) -> tuple[str, int | None, str]:
        return _NAME, None, f"{self._examination.address} {self.check.name}"


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    if not isinstance(item, Item):
        return
    if not isinstance(nextitem, Item) or nextitem.check.topic != item.check.topic:
        item.ends()
