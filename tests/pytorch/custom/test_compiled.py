"""torch.compile, custom operations, several processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

COMPILED = """
import operator

class Fusing(SharedChip):
    '''It runs chains of elementwise operations as one, and counts its launches.'''
    launches, graphs = 0, 0
    CHAIN = {"mul", "add", "sub", "relu", "tanh", "sigmoid"}

    def compile_graph(self, gm, inputs):
        Fusing.graphs += 1
        steps, runs = [], []
        for node in gm.graph.nodes:
            if node.op == "call_function":
                name = str(node.target).split(".")[1] if "." in str(node.target) else ""
                if runs and name in self.CHAIN and runs[-1] in self.CHAIN:
                    pass  # the same launch goes on
                else:
                    steps.append(node)
                runs.append(name)
        def run(*args):
            Fusing.launches += len(steps)
            return gm.forward(*args)
        return run

chip = Fusing("npu")
h = register_custom_device(chip, Config(fallback="allow", shim="off"))
D = "npu"
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)).to(D)
x = torch.randn(2, 4).to(D)
expected = model(x)
for backend in ("eager", "aot_eager", "npu"):
    found = torch.compile(model, backend=backend, fullgraph=True)(x)
    assert torch.equal(found.cpu(), expected.cpu()), backend
def chain(t):
    return ((t * 2 + 1).relu() - 3).tanh().sum()
Fusing.launches = Fusing.graphs = 0
t = torch.randn(5).to(D)
fast = torch.compile(chain, backend="npu", fullgraph=True)
assert torch.equal(fast(t).cpu(), chain(t).cpu())
assert (Fusing.graphs, Fusing.launches) == (1, 2), (Fusing.graphs, Fusing.launches)  # six steps
t.requires_grad_()
fast(t).backward()
grad, t.grad = t.grad, None
chain(t).backward()
assert torch.allclose(grad.cpu(), t.grad.cpu()) and Fusing.graphs == 3  # forward and backward
program = torch.export.export(model, (x,))
assert torch.equal(program.module()(x).cpu(), expected.cpu())

@torch.library.custom_op("chip::plus", mutates_args=())
def plus(x: torch.Tensor) -> torch.Tensor:
    return x + 1
plus.register_kernel(D)(lambda x: x + 10)
assert plus(torch.ones(2, device=D)).tolist() == [11, 11] and plus(torch.ones(2)).tolist() == [2, 2]
print("end")
"""

RANK = """
import datetime, os
import torch.distributed as dist
rank, file = int(os.environ["RANK_HERE"]), os.environ["MEETING"]
h = register({memory!r})
dist.init_process_group("npu_ccl", store=dist.FileStore(file, 2), rank=rank, world_size=2,
                        timeout=datetime.timedelta(seconds=60))
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
whole = copy.deepcopy(model)
x = torch.randn(8, 4)
ddp = nn.parallel.DistributedDataParallel(model.to("npu"))
ddp(x[rank * 4 : rank * 4 + 4].to("npu")).pow(2).mean().backward()
whole(x).pow(2).mean().backward()
for one, other in zip(model.parameters(), whole.parameters()):
    assert torch.allclose(one.grad.cpu(), other.grad, atol=1e-6)
t = torch.full((3,), float(rank), device="npu")
dist.broadcast(t, 1)
assert t.tolist() == [1, 1, 1]
parts = [torch.empty(2, device="npu") for _ in range(2)]
dist.all_gather(parts, torch.full((2,), float(rank), device="npu"))
assert [p.tolist() for p in parts] == [[0, 0], [1, 1]]
dist.barrier()
dist.destroy_process_group()
print("end")
"""


def test_graphs_compile_and_a_chip_fuses_its_own(run: Callable[..., str]) -> None:
    assert "end" in run(COMPILED)


def test_gradients_of_two_processes_are_those_of_the_whole_batch(
    run: Callable[..., str], tmp_path: Path
) -> None:
    from concurrent.futures import ThreadPoolExecutor

    meeting = str(tmp_path / "meeting")

    def rank(number: int) -> str:
        code = RANK.format(memory="shared" if number else "opaque")
        return run(code, RANK_HERE=str(number), MEETING=meeting)

    with ThreadPoolExecutor(2) as pool:
        assert all("end" in out for out in pool.map(rank, range(2)))
