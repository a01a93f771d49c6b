"""How a job's torch gets at a device, as placement is told before anything runs."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from drivetrain import hal
from drivetrain.errors import PlacementError
from drivetrain.hal.device import Device, Isolation
from drivetrain.placement.policy import Candidate, Workload, place
from drivetrain.pytorch.support import Support, build_of, support


def device(
    driver: str, torch_device: str = "cpu", groups: tuple[str, ...] = ("compute",)
) -> Device:
    """The facts of a device that may not be here."""
    info = hal.device("cpu:0").info
    facts = replace(
        info,
        driver=driver,
        vendor="acme",
        uuid="A-1",
        isolation=Isolation(torch_device=torch_device),
        capabilities=replace(info.capabilities, groups=groups),
    )
    return Device(f"{driver}:0", facts, "A-1")


def environment(folder: Path, version: str, **built: str) -> str:
    """An interpreter whose torch says of itself what a build says."""
    package = folder / "site/torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('only looked for, never imported')")
    lines = [f"__version__ = {version!r}", "debug = False"]
    lines += [f"{name}: Optional[str] = {built.get(name)!r}" for name in ("cuda", "hip", "xpu")]
    (package / "version.py").write_text("\n".join(lines))
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={folder}/site exec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    return str(python)


def test_a_device_is_torchs_own_where_the_build_serves_it_and_else_a_custom_one(
    tmp_path: Path,
) -> None:
    rocm = environment(tmp_path, "2.13.0+rocm", hip="7.0")
    build = build_of(rocm)
    assert build is not None
    assert (build.version, build.serves) == ("2.13.0+rocm", {"hip"})
    assert support(device("cpu"), rocm) == Support("cpu")
    assert support(device("hip", "cuda:0"), rocm) == Support("cuda:0")
    nvidia = support(device("cuda", "cuda:0"), rocm)
    assert nvidia.custom
    assert "2.13.0+rocm is not built for acme" in nvidia.missing
    assert support(device("opencl"), rocm) == Support(custom=True)
    assert support(device("npu", "npu:0"), rocm) == Support("npu:0")  # its package gives it one
    assert build_of("/nowhere/python") is None
    assert support(device("cuda", "cuda:0"), "/nowhere/python") == Support("cuda:0")


def test_a_device_without_kernels_is_ruled_out_with_the_reason() -> None:
    refused = support(device("acme", groups=("pinned",)))
    assert not refused.custom
    assert "torch has no device for the driver acme" in refused.reason
    assert "no `compute` group" in refused.reason

    def candidate(reason: str) -> Candidate:
        return Candidate(
            "acme:0", "A-1", "acme", "acme", "A", 1 << 30, 1 << 30, "A", support=reason
        )

    with pytest.raises(PlacementError, match="no `compute` group"):
        place(Workload("s", on="acme:0"), [candidate(refused.reason)])
    assert place(Workload("s", on="acme:0"), [candidate("")]).address == "acme:0"
