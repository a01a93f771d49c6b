"""Discovery: found without being touched, the same each time, and used once to see it work."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from drivetrain import hal
from drivetrain.hal import loading
from drivetrain.hal.conformance.check import NOT_OPENED, check, expect
from drivetrain.hal.device import Device
from drivetrain.hal.driver import API_VERSION, GROUPS, OLDEST_API_VERSION
from drivetrain.hal.isolated import python_path
from drivetrain.hal.opened import opened
from drivetrain.hal.probe import probe


def _in_a_child(code: str, *arguments: str) -> str:
    """What a new process prints. Raises Failed when it does not end well."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": python_path()},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=50.0,
        check=False,
    )
    said = done.stderr.strip().splitlines()
    expect(done.returncode == 0, f"it ended with {done.returncode}: {said[-1:] or 'silently'}")
    return done.stdout.strip()


@check(NOT_OPENED)
def facts(device: Device) -> None:
    """Each device has the driver's name, an index and a uuid of its own, a vendor and a name."""
    found = hal.devices(device.driver, all_routes=True)
    infos = [each.info for each in found]
    for info in infos:
        what = f"device {info.index}"
        expect(info.driver == device.driver, f"{what} says that its driver is {info.driver!r}")
        expect(info.name and info.vendor and info.uuid, f"{what} has no name, vendor or uuid")
        expect(info.memory_bytes > 0, f"{what} has {info.memory_bytes} bytes of memory")
    for word in ("index", "uuid"):
        values = [getattr(info, word) for info in infos]
        expect(len(set(values)) == len(values), f"two devices have one {word}: {sorted(values)}")
    pci = device.info.pci
    expect(not pci or len(pci.split(":")) == 3, f"{pci!r} is no PCI address like 00000000:18:00.0")


@check(NOT_OPENED)
def declared(device: Device) -> None:
    """The driver speaks a version of the interface that is taken, and declares groups that exist;
    an open device declares none that its driver does not."""
    driver = loading.load(device.driver)
    version = driver.api_version
    expect(
        OLDEST_API_VERSION <= version <= API_VERSION,
        f"it speaks version {version} of the driver interface, not {OLDEST_API_VERSION} to "
        f"{API_VERSION}",
    )
    unknown = driver.groups - set(GROUPS)
    expect(not unknown, f"it declares groups that do not exist: {sorted(unknown)}")
    if driver.open is not None:
        more = opened(device).backend.groups - driver.groups
        expect(not more, f"the open device declares {sorted(more)}, which its driver does not")


_SAME = """
import json, sys
from drivetrain import hal
print(json.dumps({d.address: d.uuid for d in hal.devices(sys.argv[1], all_routes=True)}))
"""


@check(NOT_OPENED)
def same_again(device: Device) -> None:
    """Another process finds the same devices under the same addresses."""
    here = {d.address: d.uuid for d in hal.devices(device.driver, all_routes=True)}
    there = json.loads(_in_a_child(_SAME, device.driver))
    expect(here == there, f"here are {sorted(here.items())}, in a child {sorted(there.items())}")


_FORKED = """
import os, sys
from drivetrain import hal
device = hal.device(sys.argv[1])
device.telemetry(); device.memory()
child = os.fork()
if child == 0:
    stream = device.stream()
    buffer = device.alloc(1000, stream=stream)
    buffer.fill(b"x", stream=stream)
    out = bytearray(1000)
    buffer.copy_to(out, stream=stream)
    stream.synchronize(30)
    os._exit(0 if bytes(out) == b"x" * 1000 else 3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@check(NOT_OPENED)
def passive(device: Device) -> None:
    """Finding the device and reading its sensors opens nothing: a fork after it can use it."""
    if not hasattr(os, "fork") or loading.load(device.driver).open is None:
        return
    code = _in_a_child(_FORKED, device.address)
    expect(
        code == "0", f"a process forked after discovery could not use the device: it gave {code}"
    )


@check(NOT_OPENED)
def sensors(device: Device) -> None:
    """Telemetry is in its units, and an absent sensor is None."""
    now = device.telemetry()
    expect(now.health.partition(":")[0] in ("ok", "degraded", "lost", "unknown"), now.health)
    busy, used, total = now.utilisation, now.memory_used_bytes, now.memory_total_bytes
    expect(busy is None or 0 <= busy <= 1, f"a utilisation of {busy}, not within [0, 1]")
    expect(total is None or total > 0, f"{total} bytes of memory in all")
    expect(used is None or used >= 0, f"{used} bytes of memory in use")
    expect(used is None or total is None or used <= total, f"{used} of {total} bytes are in use")
    for word in ("power_w", "clock_mhz", "memory_clock_mhz"):
        value = getattr(now, word)
        expect(value is None or 0 <= value < 1e6, f"{word} is {value}")
    memory = device.memory()
    expect(
        memory.free_bytes + memory.used_bytes == memory.total_bytes,
        f"{memory.used_bytes} bytes used and {memory.free_bytes} free are not {memory.total_bytes}",
    )


@check(NOT_OPENED)
def probed(device: Device) -> None:
    """The driver's own small operation, in a process that sees only this device, succeeds."""
    verdict = probe([device])[device]
    expect(verdict.usable is True, f"its probe says: {verdict.reason}")
