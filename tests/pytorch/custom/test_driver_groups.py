"""Optional groups of an outside driver, from its entry point to torch: ``collectives`` becomes a
process group, ``compile_graph`` a back end of torch.compile, a driver without ``compute`` a device
whose operations the CPU does."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

DRIVER = '''
import ctypes, os, time
from dataclasses import replace
from pathlib import Path
import numpy as np
from drivetrain.errors import Timeout
from drivetrain.hal.driver import Driver, Way
from drivetrain.hal.drivers import simulated
from drivetrain.hal.drivers.simulated_backend import Simulated

GROUPS = frozenset(os.environ["FAKE_GROUPS"].split())
CALLS = []

class Chip(Simulated):
    """Its network is a folder: each rank leaves what it has and reads what the others left."""
    round, members = 0, {}

    def collective_id(self):
        return os.environ["FAKE_NETWORK"].encode()

    def collective_join(self, identity, rank, size, timeout_s):
        Chip.members = (Path(identity.decode()), rank, size, timeout_s)
        return 7

    def collective_leave(self, communicator):
        pass

    def host(self, ptr, nbytes, stream):
        out = np.empty(nbytes, np.uint8)
        self.copy(out.ctypes.data, ptr, nbytes, Way.DEVICE_TO_HOST, stream, False)
        assert self.stream_synchronize(stream, 60)
        return out

    def back(self, ptr, data, stream):
        data = np.ascontiguousarray(data)
        self.copy(ptr, data.ctypes.data, data.nbytes, Way.HOST_TO_DEVICE, stream, True)
        assert self.stream_synchronize(stream, 60)

    def exchanged(self, name, communicator, own):
        assert communicator == 7
        CALLS.append(name)
        folder, rank, size, limit = Chip.members
        Chip.round += 1
        path = folder / f"{Chip.round}-{rank}"
        path.with_suffix(".part").write_bytes(own.tobytes())
        path.with_suffix(".part").rename(path)
        until, found = time.monotonic() + limit, []
        for each in range(size):
            other = folder / f"{Chip.round}-{each}"
            while not other.exists():
                if time.monotonic() > until:
                    raise Timeout("a rank did not come", code="timeout", driver="fakechip", op=name)
                time.sleep(0.002)
            found.append(np.frombuffer(other.read_bytes(), np.uint8))
        return found

    def all_reduce(self, communicator, ptr, count, dtype, op, stream):
        kind = np.dtype(dtype)
        own = self.host(ptr, count * kind.itemsize, stream)
        parts = self.exchanged("all_reduce", communicator, own)
        by = {"sum": np.add, "product": np.multiply, "min": np.minimum, "max": np.maximum}[op]
        self.back(ptr, by.reduce([part.view(kind) for part in parts]).astype(kind), stream)

    def broadcast(self, communicator, ptr, nbytes, root, stream):
        parts = self.exchanged("broadcast", communicator, self.host(ptr, nbytes, stream))
        self.back(ptr, parts[root], stream)

    def all_gather(self, communicator, dst, src, nbytes, stream):
        parts = self.exchanged("all_gather", communicator, self.host(src, nbytes, stream))
        self.back(dst, np.concatenate(parts), stream)

    def reduce_scatter(self, communicator, dst, src, count, dtype, op, stream):
        kind, (_, rank, size, _) = np.dtype(dtype), Chip.members
        own = self.host(src, size * count * kind.itemsize, stream)
        parts = self.exchanged("reduce_scatter", communicator, own)
        assert op == "sum"
        whole = np.add.reduce([part.view(kind) for part in parts])
        self.back(dst, whole[rank * count : (rank + 1) * count].astype(kind), stream)

    def compile_graph(self, gm, example_inputs):
        CALLS.append(len([n for n in gm.graph.nodes if n.op == "call_function"]))
        return gm.forward

def discover():
    (info,) = simulated.discover()
    told = replace(info.capabilities, groups=tuple(sorted(GROUPS)))
    return (replace(info, driver="fakechip", uuid="FAKE-0", capabilities=told),)

def open_chip(info):
    chip = Chip(info, simulated.configuration())
    chip.groups = GROUPS
    return chip

DRIVER = Driver(
    name="fakechip", vendor="fake", absent=lambda: "", discover=discover, open=open_chip,
    telemetry=simulated.telemetry, probe=lambda info: None, groups=GROUPS,
)
'''

BEGIN = """
from drivetrain.hal import registry
registry.trust("fakechip")
h = register_custom_device("fakechip:0", Config(name="npu", fallback="allow", shim="off"))
import fakechip
"""

COMPILED = (
    BEGIN
    + """
model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
x = torch.randn(2, 4)
with torch.no_grad():
    expected = model(x)
there = model.to("npu")
fast = torch.compile(there, backend="npu", fullgraph=True)
assert torch.allclose(fast(x.to("npu")).cpu(), expected, atol=1e-6)
assert fakechip.CALLS and fakechip.CALLS[0] >= 3, fakechip.CALLS
print("end")
"""
)

TORCH_ONLY = (
    BEGIN
    + """
from drivetrain import hal
raises(Unsupported, "no compute", lambda: hal.device("fakechip:0").compile(hal.Source.cuda("k")))
x = torch.randn(3, 4)
there = x.to("npu")
assert there.device.type == "npu" and torch.equal(there.cpu(), x)
assert torch.equal((there * 2 + 1).cpu(), x * 2 + 1)
assert "aten::mul.Tensor" in h.fallbacks
# The driver has these methods and does not declare them: they do not reach torch.
assert not hasattr(h.backends[0], "collectives") and not hasattr(h.backends[0], "compile_graph")
from drivetrain.pytorch.support import support
assert "no `compute` group" in support(hal.device("fakechip:0")).reason
print("end")
"""
)

RANK = (
    BEGIN
    + """
import datetime, os
import torch.distributed as dist
rank = int(os.environ["RANK_HERE"])
dist.init_process_group("npu_ccl", store=dist.FileStore(os.environ["MEETING"], 2), rank=rank,
                        world_size=2, timeout=datetime.timedelta(seconds=60))
x = (torch.arange(6.0).reshape(2, 3) + 10 * rank).to("npu")
dist.all_reduce(x)
assert torch.equal(x.cpu(), 2 * torch.arange(6.0).reshape(2, 3) + 10)
turned = (torch.arange(6.0).reshape(2, 3) + rank).to("npu").t()  # not in one piece
dist.all_reduce(turned, op=dist.ReduceOp.MAX)
assert torch.equal(turned.cpu(), torch.arange(6.0).reshape(2, 3).t() + 1)
y = torch.full((3,), float(rank)).to("npu")
dist.broadcast(y, src=1)
assert y.tolist() == [1.0, 1.0, 1.0]
parts = [torch.empty(2, device="npu") for _ in range(2)]
dist.all_gather(parts, torch.full((2,), float(rank), device="npu"))
assert [p.tolist() for p in parts] == [[0.0, 0.0], [1.0, 1.0]]
out = torch.empty(2, device="npu")
dist.reduce_scatter(out, [torch.full((2,), float(rank + i), device="npu") for i in range(2)])
assert out.tolist() == [1.0 + 2 * rank] * 2
dist.barrier()
assert set(fakechip.CALLS) == {"all_reduce", "broadcast", "all_gather", "reduce_scatter"}
print("end")
"""
)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    site = tmp_path / "site"
    metadata = site / "fakechip-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: fakechip\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[drivetrain.drivers]\nfakechip = fakechip:DRIVER\n")
    (site / "fakechip.py").write_text(DRIVER)
    before = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(site), before])))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("DRIVETRAIN_SIMULATED", "count=1")
    return site


@pytest.mark.soak
def test_compile_graph_of_a_driver_is_a_back_end_of_torch_compile(
    site: Path, run: Callable[..., str]
) -> None:
    assert run(COMPILED, FAKE_GROUPS="compute timing compile_graph").endswith("end\n")


def test_a_driver_without_compute_is_a_device_of_torch_whose_work_the_cpu_does(
    site: Path, run: Callable[..., str]
) -> None:
    assert run(TORCH_ONLY, FAKE_GROUPS="timing").endswith("end\n")


@pytest.mark.soak
def test_collectives_of_a_driver_are_a_process_group(
    site: Path, tmp_path: Path, run: Callable[..., str]
) -> None:
    network = tmp_path / "network"
    network.mkdir()

    def rank(number: int) -> str:
        return run(
            RANK,
            DRIVETRAIN_HOME=str(tmp_path / f"home{number}"),
            FAKE_GROUPS="compute timing collectives",
            FAKE_NETWORK=str(network),
            MEETING=str(tmp_path / "meeting"),
            RANK_HERE=str(number),
        )

    with ThreadPoolExecutor(2) as pool:
        assert all(out.endswith("end\n") for out in pool.map(rank, range(2)))
