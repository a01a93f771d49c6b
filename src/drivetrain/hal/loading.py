"""Which drivers there are, and their ``Driver`` objects."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module

from drivetrain.errors import BadInput, HalError

# Early: once the package is loaded, ``hal.drivers`` can be the function of that name for good.
from drivetrain.hal import drivers as _drivers
from drivetrain.hal.driver import ENTRY_POINT_GROUP, Driver

_PACKAGE = _drivers.__name__

ACCELERATORS = ("cuda", "hip", "opencl", "sycl", "level_zero")
"""Built-in drivers by preference; outside drivers come after them, the cpu last."""

BY_NAME = ("simulated",)
"""Built-in drivers that are there only for those who name them: never listed among the devices,
never the default."""

BUILT_IN = (*ACCELERATORS, "cpu", *BY_NAME)


@dataclass(frozen=True)
class Outside:
    """A driver that another distribution offers, known by its metadata alone."""

    name: str
    value: str
    distribution: str
    version: str

    @property
    def identity(self) -> str:
        """What is trusted: a driver of that name from elsewhere has to be trusted anew."""
        return f"{self.distribution}:{self.value}"


def outside() -> dict[str, Outside]:
    """Drivers under the entry-point group, by name; nothing is imported."""
    from importlib.metadata import entry_points

    found: dict[str, Outside] = {}
    for point in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda point: point.name):
        distribution = point.dist
        found.setdefault(
            point.name,
            Outside(
                point.name,
                point.value,
                (distribution.name if distribution is not None else "") or "?",
                (distribution.version if distribution is not None else "") or "?",
            ),
        )
    return found


_given: dict[str, Driver] = {}


def give(driver: Driver) -> None:
    """Use this driver in this process, under its name. Its code runs here: whoever calls this
    trusts it. Raises BadInput for a name that another driver has."""
    if driver.name in BUILT_IN or driver.name in outside():
        raise BadInput(f"there is a driver {driver.name!r} already; this one needs another name")
    _given[driver.name] = driver


def is_here(name: str) -> bool:
    """Whether the driver's code may run in this process without a child."""
    return name in BUILT_IN or name in _given


@cache
def built_in(name: str) -> Driver:
    driver: Driver = import_module(f"{_PACKAGE}.{name}").DRIVER
    return driver


def load(name: str) -> Driver:
    """The driver object. For an outside driver this imports foreign code: in a child only.

    Raises HalError when what the entry point names is no driver of that name, and whatever the
    import raises.
    """
    if name in BUILT_IN:
        return built_in(name)
    if name in _given:
        return _given[name]
    from importlib.metadata import entry_points

    points = [point for point in entry_points(group=ENTRY_POINT_GROUP) if point.name == name]
    if not points:
        raise BadInput(f"there is no driver {name!r}")
    if points[0].pattern.match(points[0].value) is None:
        raise HalError(
            f"its entry point {points[0].value!r} is no module:object", code="broken", driver=name
        )
    driver = points[0].load()
    if not isinstance(driver, Driver) or driver.name != name:
        raise HalError(
            f"{points[0].value} is no drivetrain.hal.driver.Driver named {name}",
            code="broken",
            driver=name,
        )
    return driver
