"""Scripts written for one vendor, unchanged, as jobs: where they run and what they find there."""

from __future__ import annotations

import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from drivetrain import hal
from drivetrain.hal.device import Device, Isolation
from drivetrain.placement.policy import Candidate
from drivetrain.pytorch.support import Build
from drivetrain.runtime.placing import Placer
from drivetrain.store.database import Database

from .conftest import Home

ASKS = """
import os
os.environ["CUDA_VISIBLE_DEVICES"] = "0"
os.environ["HIP_VISIBLE_DEVICES"] = "0"
os.environ.pop("ROCR_VISIBLE_DEVICES", None)
os.environ["NCCL_DEBUG"] = "WARN"
import torch
torch.manual_seed(0)
torch.cuda.manual_seed_all(0)
torch.backends.cudnn.benchmark = True
torch.backends.cuda.matmul.allow_tf32 = True
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
model = torch.nn.Linear(8, 2).to(device)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(5):
    loss = model(torch.randn(4, 8, device=device)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(device, torch.cuda.device_count(), loss.item().hex(), os.environ["NCCL_DEBUG"])
"""
DOES_NOT_ASK = "import torch\nprint('begins')\nx = torch.ones(1).cuda()\nprint(x)\n"


def test_a_script_that_asks_for_cuda_gives_as_a_job_what_it_gives_alone(home: Home) -> None:
    path = home.folder / "asks.py"
    path.write_text(ASKS)
    hidden = {**home.env, "CUDA_VISIBLE_DEVICES": ""}
    # Alone it would take what it names; here both sides have a processor.
    text = ASKS.replace('os.environ["CUDA_VISIBLE_DEVICES"] = "0"', "")
    alone = subprocess.run(
        [sys.executable, "-c", text], env=hidden, capture_output=True, text=True, check=True
    )
    hosted = home.run("--on", "cpu:0", "--name", "asks", script=path)
    assert hosted.wait() == 0, hosted.err
    assert hosted.out == alone.stdout
    assert hosted.out.startswith("cpu 0 ")
    # What would be a device that the job does not hold is told and ignored, the rest is obeyed.
    assert "the script sets CUDA_VISIBLE_DEVICES; a job keeps the device" in hosted.err
    assert "the script deletes ROCR_VISIBLE_DEVICES" in hosted.err
    assert "sets NCCL_DEBUG" not in hosted.err
    assert "fails when" not in hosted.err


def test_a_script_that_does_not_ask_is_told_so_before_it_fails(home: Home) -> None:
    path = home.folder / "tied.py"
    path.write_text(DOES_NOT_ASK)
    hosted = home.run("--on", "cpu:0", script=path)
    assert hosted.wait() == 1
    assert hosted.out == "begins\n"
    assert "line 3 of tied.py says .cuda()" in hosted.err
    assert "drivetrain port" in hosted.err


@pytest.mark.soak
def test_a_script_that_cannot_be_read_is_run_all_the_same(home: Home) -> None:
    path = home.folder / "broken.py"
    path.write_text("x = (\n")
    hosted = home.run("--on", "cpu:0", script=path)
    assert hosted.wait() == 1
    assert "SyntaxError" in hosted.err


def machine(monkeypatch: pytest.MonkeyPatch, driver: str) -> None:
    """A processor that scores better than a GPU, as placement sees them."""
    cpu = hal.device("cpu:0")
    facts = replace(
        cpu.info, driver=driver, uuid="GPU-1", isolation=Isolation(torch_device="cuda:0")
    )
    gpu = Device(f"{driver}:0", facts, "GPU-1")

    def candidate(device: Device, busy: float) -> Candidate:
        kind = device.isolation().torch_device.partition(":")[0]
        return Candidate(
            address=device.address,
            key=device.uuid,
            driver=device.driver,
            vendor=device.vendor,
            name=device.name,
            total_bytes=1 << 34,
            free_bytes=1 << 33,
            domain=device.uuid,
            utilisation=busy,
            features=frozenset({f"torch:{kind}"}),
        )

    pairs = [(candidate(cpu, 0.0), cpu), (candidate(gpu, 0.9), gpu)]
    monkeypatch.setattr(Placer, "candidates", lambda self, named=(): pairs)
    built = Build("2.13.0+both", frozenset({"cuda", "hip"}))
    monkeypatch.setattr("drivetrain.pytorch.support.build_of", lambda python: built)


@pytest.mark.parametrize("driver", ["cuda", "hip"])
@pytest.mark.parametrize(
    ("text", "more", "address"),
    [
        ("import torch\n", {}, "cpu:0"),
        ("import torch\nd = 'cuda' if torch.cuda.is_available() else 'cpu'\n", {}, "cpu:0"),
        ("import torch\nx = torch.ones(1).cuda()\n", {}, "gpu:0"),
        ("import torch\nx = torch.ones(1, device='cuda:0')\n", {}, "gpu:0"),
        ("import torch\nx = torch.ones(1).cuda()\n", {"prefer": ["cpu"]}, "cpu:0"),
        ("import torch\nx = torch.ones(1).cuda()\n", {"on": "cpu:0"}, "cpu:0"),
        ("import torch\nx = torch.ones(1).xpu()\n", {}, "cpu:0"),
    ],
)
def test_a_script_goes_to_the_kind_of_device_that_it_names(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    more: dict[str, object],
    address: str,
    driver: str,
) -> None:
    machine(monkeypatch, driver)
    address = address.replace("gpu", driver)
    script = tmp_path / "train.py"
    script.write_text(text)
    with closing(Database(tmp_path / "store.sqlite")) as database:
        placer = Placer(database, {"script": str(script), **more})
        placement, device = placer.choose()
        ranked = [each.address for each in placer.ranked()]
    assert device.address == placement["device"] == address
    unasked = "is_available" not in text and "torch.ones" in text
    fails = unasked and address == "cpu:0"
    assert any("fails when" in warning for warning in placement["warnings"]) == fails
    if not more:
        assert ranked[0] == address
        assert sorted(ranked) == ["cpu:0", f"{driver}:0"]


@pytest.mark.gpu
def test_a_cuda_only_script_runs_unchanged_on_the_gpu_of_its_job(home: Home) -> None:
    path = home.folder / "tied.py"
    path.write_text(
        DOES_NOT_ASK + "import os\nos.environ['CUDA_VISIBLE_DEVICES'] = '7'\n"
        "torch.cuda.synchronize()\nprint(torch.cuda.device_count(), torch.cuda.current_device())\n"
    )
    for address in [device.address for device in hal.devices("cuda")]:
        hosted = home.run("--on", address, script=path)
        assert hosted.wait() == 0, hosted.err
        assert hosted.out.splitlines() == [
            "begins",
            "tensor([1.], device='cuda:0')",
            "1 0",
        ]
        assert "a job keeps the device" in hosted.err
