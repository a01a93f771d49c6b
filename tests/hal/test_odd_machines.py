"""Machines on which something is half installed: `devices` lists what works, `doctor` says what to
do about the rest, nothing hangs and nothing is printed that nobody asked for.

Each machine is an environment and a folder of packages; the two commands run on it as a user runs
them. What the machine under the tests has of the real thing is used: its OpenCL loader and
platforms, and Debian's ``libamdhip64`` and ``libze_loader`` where they are found.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fakes import built

from drivetrain.hal.drivers import hip_api, level_zero_api, opencl_loader

HEALTHY = """
from drivetrain.hal.driver import DeviceInfo, Driver, Isolation, Telemetry

def driver(name, **given):
    def discover():
        isolation = Isolation({}, None, 1, "cpu")
        return (DeviceInfo(name, 0, f"{name} chip", "odd", f"{name}-0", isolation=isolation),)
    parts = dict(name=name, vendor="odd", absent=lambda: "", discover=discover,
                 telemetry=lambda info: Telemetry(health="ok"), probe=lambda info: None)
    return Driver(**{**parts, **given})
"""


@dataclass
class Plugin:
    """A package with one driver: its module, and what is to be seen of it."""

    code: str
    state: str
    reason: str = ""
    advice: str = ""
    entry: str = ""
    trusted: bool = True


ODD = {
    "oddabsent": Plugin(
        "DRIVER = driver('oddabsent', absent=lambda: 'no odd chip on the bus', "
        "install='apt install odd-dkms')",
        "absent",
        "no odd chip on the bus",
        "apt install odd-dkms",
    ),
    "oddabort": Plugin("import os; os.abort()", "broken", "SIGABRT", "reinstall oddabort 1.0"),
    "oddexit": Plugin("import sys; sys.exit(3)", "broken", "exit code 3", "reinstall oddexit 1.0"),
    "oddgone": Plugin(
        "", "broken", "No module named 'oddgone_parts'", "reinstall oddgone 1.0", "oddgone_parts:D"
    ),
    "oddhang": Plugin(
        "import time; time.sleep(3600)",
        "broken",
        "it did not answer within 8 s",
        "its software hangs or is slow: report it to the authors of oddhang 1.0, or run "
        "drivetrain drivers untrust oddhang",
    ),
    "oddlater": Plugin(
        "import time; DRIVER = driver('oddlater', discover=lambda: time.sleep(3600))",
        "broken",
        "it did not answer within 8 s",
        "drivetrain drivers untrust oddlater",
    ),
    "oddnew": Plugin(
        "DRIVER = driver('oddnew', api_version=99)",
        "broken",
        "speaks version 99 of the driver interface; this Drivetrain takes 1 to 2",
        "it comes from oddnew 1.0: install a version that fits",
    ),
    "oddnone": Plugin("DRIVER = None", "broken", "is no drivetrain.hal.driver.Driver named"),
    "oddpoint": Plugin("", "broken", "is no module:object", "reinstall oddpoint 1.0", "not it!"),
    "oddraise": Plugin(
        "raise RuntimeError('the chip wants [red]firmware[/red]')",
        "broken",
        "RuntimeError: the chip wants [red]firmware[/red]",
        "reinstall oddraise 1.0, or report this to its authors",
    ),
    "oddrubbish": Plugin(
        "DRIVER = driver('oddrubbish', discover=lambda: 7)",
        "broken",
        "'int' object is not iterable",
        "reinstall oddrubbish 1.0",
    ),
    "oddstranger": Plugin(
        "raise AssertionError('imported')",
        "unchecked",
        "not trusted",
        "drivetrain drivers trust oddstranger",
        trusted=False,
    ),
    "oddtalks": Plugin(
        "import os, sys\n"
        "print('hello from a plug-in'); sys.stderr.write('and hello')\n"
        "os.write(1, b'raw hello'); os.write(2, b'raw hello')\n"
        "DRIVER = driver('oddtalks')",
        "usable",
    ),
    "right": Plugin("DRIVER = driver('right')", "usable"),
}


@dataclass
class Seen:
    """What the two commands told."""

    drivers: dict[str, dict[str, str]]
    devices: dict[str, dict[str, Any]]
    doctor: str
    doctor_code: int


@pytest.fixture
def look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Seen]:
    """The commands on a machine with these environment variables."""
    for name in ("DRIVETRAIN_HIP_LIBRARY", "DRIVETRAIN_LEVEL_ZERO_LIBRARY", "OCL_ICD_FILENAMES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OCL_ICD_VENDORS", str(tmp_path / "none"))
    monkeypatch.setenv("DRIVETRAIN_DISCOVERY_LIMIT_S", "8")
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")

    def command(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "drivetrain", *words],
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=110,
        )
        assert done.stderr == "", done.stderr
        assert "hello" not in done.stdout
        return done

    def seen(**environment: str) -> Seen:
        listed = command("devices", "--json", **environment)
        assert listed.returncode == 0
        found = json.loads(listed.stdout)
        examined = command("doctor", **environment)
        seen = Seen(
            {each["name"]: each for each in found["drivers"]},
            {each["address"]: each for each in found["devices"]},
            examined.stdout,
            examined.returncode,
        )
        assert "cpu:0" in seen.devices  # whatever else is wrong
        assert seen.drivers["cpu"]["state"] == "usable"
        return seen

    return seen


def lines(seen: Seen, driver: str) -> str:
    """What the doctor says of a driver: its line, and those below it."""
    said = seen.doctor.splitlines()
    first = next(n for n, line in enumerate(said) if line.startswith(f"{driver}: "))
    below = said[first + 1 :]
    count = next((n for n, line in enumerate(below) if not line.startswith("  ")), len(below))
    return "\n".join(said[first : first + 1 + count])


# -- plug-ins --------------------------------------------------------------------------------------


def installed(folder: Path, plugins: dict[str, Plugin]) -> dict[str, str]:
    """Environment of a machine with these packages, trusted by its user."""
    site, home = folder / "site", folder / "home"
    site.mkdir()
    home.mkdir()
    (site / "odd_parts.py").write_text(HEALTHY)
    trusted = {}
    for name, plugin in plugins.items():
        metadata = site / f"{name}-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        entry = plugin.entry or f"{name}:DRIVER"
        (metadata / "entry_points.txt").write_text(f"[drivetrain.drivers]\n{name} = {entry}\n")
        (site / f"{name}.py").write_text(f"from odd_parts import driver\n{plugin.code}\n")
        if plugin.trusted:
            trusted[name] = f"{name}:{entry}"
    (home / "trusted-drivers.json").write_text(json.dumps(trusted))
    left = site / "oddleft-1.0.dist-info"  # of a package that was deleted by hand
    left.mkdir()
    (left / "entry_points.txt").write_text("[drivetrain.drivers]\noddleft = oddleft:DRIVER\n")
    before = os.environ.get("PYTHONPATH", "")
    path = os.pathsep.join(filter(None, [str(site), before]))
    return {"PYTHONPATH": path, "DRIVETRAIN_HOME": str(home)}


def test_broken_plug_ins_are_named_with_what_to_do_and_harm_no_other(
    tmp_path: Path, look: Callable[..., Seen]
) -> None:
    seen = look(**installed(tmp_path, ODD))
    for name, plugin in ODD.items():
        assert seen.drivers[name]["state"] == plugin.state, seen.drivers[name]
        assert plugin.reason in seen.drivers[name]["reason"], seen.drivers[name]
        assert plugin.reason in lines(seen, name)
        assert plugin.advice in lines(seen, name)
    assert seen.drivers["oddleft"]["state"] == "unchecked"
    assert [address for address in seen.devices if address.startswith(("odd", "right"))] == [
        "oddtalks:0",
        "right:0",
    ]
    assert seen.doctor_code == 1


def test_a_machine_that_is_right_has_none_of_it(tmp_path: Path, look: Callable[..., Seen]) -> None:
    """The control: what the machines above and below are told comes from what is wrong there."""
    seen = look(**installed(tmp_path, {"right": ODD["right"]}))
    assert seen.doctor_code == 0
    assert "broken" not in seen.doctor
    assert lines(seen, "right") == "right: usable"
    assert "right:0" in seen.devices
    for said in ("is missing", "does not load", "reinstall", "install it again"):
        assert said not in seen.doctor


# -- vendors' software without a device ------------------------------------------------------------


def compiled(path: Path, *arguments: str) -> Path:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    command = [compiler, "-shared", "-fPIC", "-xc", "/dev/null", "-xnone"]
    command += ["-o", str(path), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return path


def lacking(folder: Path, name: str, needs: str) -> Path:
    """A library that needs another one, which is not there."""
    folder.mkdir(exist_ok=True)
    needed = compiled(folder / needs, f"-Wl,-soname,{needs}")
    made = compiled(folder / name, "-Wl,--no-as-needed", str(needed))
    needed.unlink()
    return made


@pytest.fixture
def no_gpu() -> None:
    for path in ("/dev/kfd", "/dev/dxg", "/dev/dri/renderD128"):
        if Path(path).exists():
            pytest.skip(f"this machine has a GPU's {path}")
    if level_zero_api.find(level_zero_api.DRIVERS, Path("/")):
        pytest.skip("this machine has a driver of Level Zero's")


def test_rocm_and_level_zero_without_a_gpu_are_absent_with_the_reason(
    no_gpu: None, tmp_path: Path, look: Callable[..., Seen]
) -> None:
    """The libraries lie where Debian's packages put them, and are not loaded to know it."""
    folder = tmp_path / "lib"
    if not (hip_api.paths() and level_zero_api.find([level_zero_api.LOADER], Path("/"))):
        lacking(folder, "libamdhip64.so.5", "libhsakmt.so.1")
        lacking(folder, level_zero_api.LOADER, "libnothing.so.1")
    before = os.environ.get("LD_LIBRARY_PATH", "")
    seen = look(LD_LIBRARY_PATH=os.pathsep.join(filter(None, [str(folder), before])))
    assert seen.drivers["hip"]["state"] == seen.drivers["level_zero"]["state"] == "absent"
    assert "libamdhip64 is installed, but there is no AMD GPU" in lines(seen, "hip")
    assert "install the amdgpu kernel driver" in lines(seen, "hip")
    assert "the Level Zero loader is installed, but no driver" in lines(seen, "level_zero")
    assert "apt install libze1 libze-intel-gpu1" in lines(seen, "level_zero")
    assert seen.doctor_code == 0


@pytest.mark.soak
def test_libraries_that_are_asked_and_find_no_device_are_absent(
    no_gpu: None, tmp_path: Path, look: Callable[..., Seen]
) -> None:
    """Debian's own where the machine has them."""
    hip = next((p for p in hip_api.paths() if "/" in p), str(built("fake_hip.c", tmp_path)))
    ze = level_zero_api.find([level_zero_api.LOADER], Path("/"))
    seen = look(
        DRIVETRAIN_HIP_LIBRARY=hip,
        DRIVETRAIN_LEVEL_ZERO_LIBRARY=ze or str(built("fake_ze.c", tmp_path)),
        FAKE_HIP_FAULT="hipInit:1:100",
        FAKE_ZE_NO_DRIVER="1",
    )
    assert seen.drivers["hip"]["state"] == seen.drivers["level_zero"]["state"] == "absent"
    assert "hipInit failed: hipError" in lines(seen, "hip")  # by version: no or an invalid device
    assert "no driver stands behind the loader" in lines(seen, "level_zero")
    assert "apt install libze1 libze-intel-gpu1" in lines(seen, "level_zero")
    assert seen.doctor_code == 0


# -- libraries that lack others --------------------------------------------------------------------

loader = pytest.mark.skipif(
    not opencl_loader.library(opencl_loader.LOADER), reason="there is no OpenCL loader"
)
REGISTERED = [path for path in opencl_loader.icd_files() if "pocl" in opencl_loader.text(path)]


@loader
def test_runtimes_that_lack_a_library_are_broken_and_the_package_is_named(
    tmp_path: Path, look: Callable[..., Seen]
) -> None:
    vendors, folder = tmp_path / "vendors", tmp_path / "lib"
    vendors.mkdir()
    intel = lacking(folder, "libintelocl.so", "libimf.so")
    (vendors / "intel64.icd").write_text(f"{intel}\n")
    seen = look(
        OCL_ICD_VENDORS=str(vendors),
        DRIVETRAIN_HIP_LIBRARY=str(lacking(folder, "libamdhip64.so.6", "libhsakmt.so.99")),
        DRIVETRAIN_CUDA_LIBRARY=str(lacking(folder, "libcuda.so.1", "libnothing.so.1")),
        DRIVETRAIN_LEVEL_ZERO_LIBRARY=str(lacking(folder, "libze_loader.so.1", "libno.so.1")),
    )
    asked = ("opencl", "hip", "cuda", "level_zero")
    assert [seen.drivers[name]["state"] for name in asked] == ["broken"] * 4
    assert "libnothing.so.1 is missing: install the package that has it" in lines(seen, "cuda")
    assert "libno.so.1 is missing" in lines(seen, "level_zero")
    assert "intel64.icd: libimf.so: cannot open" in lines(seen, "opencl")
    assert "libimf.so is missing: pip install intel-cmplr-lib-rt" in lines(seen, "opencl")
    assert "libhsakmt.so.99 is missing: reinstall ROCm" in lines(seen, "hip")
    assert seen.doctor_code == 1


@loader
def test_a_platform_that_vanishes_beside_one_that_works_is_told(
    tmp_path: Path, look: Callable[..., Seen]
) -> None:
    """The loader says nothing of it, and the driver is usable by the other platform."""
    vendors, folder = tmp_path / "vendors", tmp_path / "lib"
    vendors.mkdir()
    if not REGISTERED:
        pytest.skip("there is no OpenCL platform beside it (Debian: pocl-opencl-icd)")
    shutil.copy(REGISTERED[0], vendors)
    intel = lacking(folder, "libintelocl.so", "libimf.so")
    (vendors / "intel64.icd").write_text(f"{intel}\n")
    (vendors / "left.icd").write_text("/opt/removed/libleft.so\n")
    seen = look(OCL_ICD_VENDORS=str(vendors))
    assert seen.drivers["opencl"] == {"name": "opencl", "state": "usable", "reason": ""}
    assert seen.devices["opencl:0"]["usable"] is not False
    said = lines(seen, "opencl").splitlines()
    assert said[0] == "opencl: usable"
    assert said[1].startswith("  intel64.icd registers a platform that does not load")
    assert said[1].endswith("libimf.so is missing: pip install intel-cmplr-lib-rt")
    assert said[2].startswith("  left.icd registers a platform that does not load")
    assert said[2].endswith(f"install the platform again, or delete {vendors / 'left.icd'}")
    assert len(said) == 3
    assert seen.doctor_code == 1
    for name in ("intel64.icd", "left.icd"):
        (vendors / name).unlink()
    control = look(OCL_ICD_VENDORS=str(vendors))
    assert lines(control, "opencl") == "opencl: usable"
    assert control.doctor_code == 0
