"""A chip is a torch device: tensors, modules, training, saving, with each sort of memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest

TENSORS = """
h = register({memory!r})
D = "npu"
assert str(h.device) == "npu:0" and h.name == "npu" and registered() is h
assert h.shim == (SHIM != "off")
assert type(torch.ones(2, device=D)) is torch.Tensor
x = torch.arange(12.0).to(D).reshape(3, 4)
assert x.device == h.device and x.is_npu and torch.ones(2).npu().is_npu
assert torch.equal((x + 1).cpu(), torch.arange(12.0).reshape(3, 4) + 1)

# Views share memory, and every write shows.
x.t()[1, 2] = 100
assert x[2, 1].item() == 100
x.view(-1)[3:5].zero_()
assert x[0, 3].item() == 0 and x.view(-1).data_ptr() == x.data_ptr()
torch._foreach_add_([x[:, 0], x[:, 1]], 1)  # two arguments in one memory, interleaved
assert x[0, :2].tolist() == [1, 2]
x[0:2].copy_(x[1:3].clone())
y = torch.arange(6, device=D)
y[1:].copy_(y[:-1].clone())
assert y.tolist() == [0, 0, 1, 2, 3, 4]
assert x.untyped_storage().device == h.device and x[1:].data_ptr() - x.data_ptr() == 16

# Out, resize, indices, types, bits.
out = torch.empty(0, device=D)
torch.add(torch.ones(3, device=D), 1, out=out)
assert out.tolist() == [2, 2, 2]
held = torch.empty(3, device=D)
address = held.data_ptr()
torch.mul(out, 2, out=held)
assert held.data_ptr() == address and held.tolist() == [4, 4, 4]
held.resize_(5)
assert held[:3].tolist() == [4, 4, 4]
i = torch.tensor([0, 2], device=D)
assert torch.equal(x[i].cpu(), x.cpu()[[0, 2]])
assert torch.equal(x[x > 5].cpu(), x.cpu()[x.cpu() > 5])
for name in "float64 float16 bfloat16 int8 uint8 int16 int64 bool complex64".split():
    t = torch.ones(3, dtype=getattr(torch, name), device=D)
    assert torch.equal((t + t).cpu(), t.cpu() + t.cpu()), name
assert torch.ones(4, device=D).to(torch.float8_e4m3fn).float().tolist() == [1] * 4
c = torch.tensor([1 + 2j, 3j], device=D)
assert (c.conj() * c).real.tolist() == [5, 9] and c.conj().imag.clone().tolist() == [-2, -3]
assert torch.ones((), device=D, dtype=torch.float16).mul(2.5).dtype == torch.float16
assert torch.equal(torch.linalg.svd(x)[1].cpu(), torch.linalg.svd(x.cpu())[1])
assert (torch.ones(3, device=D) + torch.tensor(1.0)).tolist() == [2, 2, 2]
raises(RuntimeError, "same device", lambda: torch.ones(3, device=D) + torch.ones(3))
raises(RuntimeError, "npu:0", lambda: torch.ones(3, device="npu:5"))
with torch.device(D):
    assert torch.ones(2).device == h.device and torch.randn(2, 2).relu().device == h.device

# Each memory goes back, also when an exception is on its way.
if {memory!r} != "shared":
    (chip,) = h.backends
    def fails():
        t = torch.ones(1000, device=D)
        return t + torch.ones(3, device=D)
    del x, y, out, held, i, t, c
    gc.collect()
    before = len(chip.live)
    for _ in range(3):
        raises(RuntimeError, "size", fails)
    z = [torch.ones(100, device=D) * 2 for _ in range(10)]
    saved = (z[0].requires_grad_() ** 2).sum()
    assert len(chip.live) > before
    del z, saved
    gc.collect()
    assert len(chip.live) == before, (len(chip.live), before)
    assert torch.npu.memory_allocated() == sum(len(r) - 64 for r in chip.live.values())
    chip.limit = 1000
    error = raises(OutOfMemory, "smaller batch", lambda: torch.empty(10000, device=D))
    assert isinstance(error, RuntimeError) and error.requested == 40000
    chip.limit = 1 << 40
assert "aten::add.Tensor" in h.fallbacks and "left npu" in str(h.fallbacks)

# Random numbers: the device's own, reproducible, forked and restored.
torch.manual_seed(5)
a = torch.randn(4, device=D)
state = torch.npu.get_rng_state()
b = F.dropout(torch.ones(100, device=D))
torch.npu.set_rng_state(state)
assert torch.equal(b.cpu(), F.dropout(torch.ones(100, device=D)).cpu())
torch.manual_seed(5)
assert torch.equal(a.cpu(), torch.randn(4, device=D).cpu())
before = torch.get_rng_state()
torch.randn(3, device=D)
F.dropout(torch.ones(9, device=D))
assert torch.equal(before, torch.get_rng_state())  # the CPU's own numbers are left alone
with torch.random.fork_rng(device_type=D):
    kept = torch.randn(2, device=D)
assert torch.equal(kept.cpu(), torch.randn(2, device=D).cpu())
print("end")
"""

TRAINING = """
h = register({memory!r})
D = "npu"
torch.manual_seed(0)

def mlp():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

def cnn():
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
                         nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 4))

class Rnn(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn, self.end = kind(8, 8), nn.Linear(8, 4)
    def forward(self, x):
        return self.end(self.rnn(x)[0][-1])

class Former(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.end = nn.Linear(8, 4)
    def forward(self, x):
        return self.end(self.layer(x).mean(1))

cases = [(mlp, (16, 8)), (cnn, (16, 1, 8, 8)), (lambda: Rnn(nn.LSTM), (5, 16, 8)),
         (lambda: Rnn(nn.GRU), (5, 16, 8)), (Former, (16, 5, 8))]
for make, shape in cases:
    model = make()
    ours = copy.deepcopy(model).to(D)
    x, y = torch.randn(*shape), torch.randint(0, 4, (16,))
    curves = []
    for part, where in ((model, "cpu"), (ours, D)):
        optimizer = torch.optim.Adam(part.parameters(), lr=0.01)
        curves.append([])
        for _ in range({steps}):
            loss = F.cross_entropy(part(x.to(where)), y.to(where))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curves[-1].append(loss.item())
    name = type(model).__name__
    assert curves[1][-1] < curves[1][0], name
    if name == "Sequential":  # each operation is the CPU's own
        assert curves[0] == curves[1], (name, curves[0][-1], curves[1][-1])
    # Cells and attention are put together from other operations than the CPU's.
    assert all(abs(a - b) <= 1e-4 * abs(a) for a, b in zip(*curves)), (name, curves)

# Parameters stay themselves: tied weights, and an optimizer that was there before.
tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
tied[1].weight = tied[0].weight
optimizer = torch.optim.SGD(tied.parameters(), lr=0.1)
parameter = tied[0].weight
tied.to(D)
assert tied[0].weight is tied[1].weight is parameter and parameter.device == h.device
before = parameter.detach().cpu().clone()
tied(torch.ones(2, 4, device=D)).sum().backward()
optimizer.step()
assert not torch.equal(parameter.detach().cpu(), before)

lazy = nn.Sequential(nn.LazyConv1d(4, 3), nn.LazyBatchNorm1d()).to(D)
assert lazy(torch.randn(2, 3, 8, device=D)).shape == (2, 4, 6)
assert lazy[0].weight.device == lazy[1].running_mean.device == h.device

# Saved here, loaded there, both ways; copies.
model = cnn().to(D)
data = io.BytesIO()
torch.save(model.state_dict(), data)
for where, expected in ((None, D), ("cpu", "cpu"), (torch.device(D), D)):
    data.seek(0)
    loaded = torch.load(data, weights_only=True, map_location=where)
    assert loaded["0.weight"].device.type == expected
    assert torch.equal(loaded["0.weight"].cpu(), model[0].weight.detach().cpu())
data = io.BytesIO()
torch.save(mlp().state_dict(), data)
data.seek(0)
assert torch.load(data, weights_only=True, map_location=D)["0.weight"].device == h.device
shared = torch.arange(4.0, device=D)
a, b = copy.deepcopy([shared, shared[1:]])
a.fill_(7)
assert b.tolist() == [7, 7, 7]

# Autocast, GradScaler, DataLoader.
model = mlp().to(D)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
scaler = torch.amp.GradScaler(D)
data = torch.utils.data.TensorDataset(torch.randn(8, 8), torch.randint(0, 4, (8,)))
for x, y in torch.utils.data.DataLoader(data, 4, num_workers={workers}):
    with torch.autocast(D, torch.bfloat16):
        out = model(x.to(D))
        assert out.dtype == torch.bfloat16
        loss = F.cross_entropy(out, y.to(D))
        assert loss.dtype == torch.float32
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
assert model[0].weight.grad.dtype == torch.float32
with torch.autocast(D, torch.bfloat16):
    assert torch.ones(2, device=D).exp().dtype == torch.float32
    both = torch.cat([torch.ones(1, device=D), torch.ones(1, device=D).bfloat16()])
    assert both.dtype == torch.float32
assert (torch.ones(2, 2, device=D) @ torch.ones(2, 2, device=D)).dtype == torch.float32

# Autograd: twice, across devices, checked, in checkpoints.
x = torch.ones(3, device=D, requires_grad=True)
(g,) = torch.autograd.grad((x ** 3).sum(), x, create_graph=True)
g.sum().backward()
assert x.grad.tolist() == [6, 6, 6]
x = torch.ones(3, requires_grad=True)
(x.to(D) * 2).sum().backward()
assert x.grad.tolist() == [2, 2, 2]
x = torch.randn(3, dtype=torch.float64).to(D).requires_grad_()
assert torch.autograd.gradcheck(lambda t: (t.sin() * t).sum(), (x,))
from torch.utils.checkpoint import checkpoint
x = torch.ones(3, device=D, requires_grad=True)
checkpoint(lambda t: F.dropout(t).exp().sum(), x, use_reentrant=False).backward()
assert x.grad is not None
print("end")
"""


SEVERAL = """
h = register(count=3)
tensors = [torch.arange(3.0, device=d, requires_grad=True) for d in h.devices]
for t in tensors:
    results = (t + t, t.relu(), t.sort()[1], t @ t, t.sum(), torch.copysign(t, -1.0),
               torch.lerp(t, t, 0.5), torch.ones((), device="cpu") * t)
    assert {each.device for each in results} == {t.device}
    (t.exp() * t).sum().backward()
    assert t.grad.device == t.device
one, other = (each.detach() for each in tensors[1:])
for act in (lambda: one + other, lambda: torch.lerp(one, one, other), lambda: one.add_(other),
            lambda: torch.cat([one, other]), lambda: torch.add(one, one, out=other)):
    raises(RuntimeError, "same device", act)
assert torch.equal(one.to(other.device), other)
print("end")
"""


def test_operations_stay_on_their_device(run: Callable[..., str]) -> None:
    assert "end" in run(SEVERAL)


@pytest.mark.soak
def test_operations_stay_on_their_device_with_the_shim(with_shim: Callable[..., str]) -> None:
    assert "end" in with_shim(SEVERAL)


@pytest.mark.parametrize("memory", ["shared", "visible", "opaque"])
def test_a_tensor_of_the_device_is_a_tensor(run: Callable[..., str], memory: str) -> None:
    assert run(TENSORS.format(memory=memory)).split()[-1] == "end"


@pytest.mark.parametrize("memory", ["shared", "opaque"])
def test_models_train_and_travel_as_on_the_cpu(run: Callable[..., str], memory: str) -> None:
    workers = 1 if memory == "shared" else 0
    assert "end" in run(TRAINING.format(memory=memory, steps=6, workers=workers))


@pytest.mark.soak
@pytest.mark.parametrize("memory", ["shared", "visible", "opaque"])
def test_a_tensor_of_the_device_is_the_same_with_the_shim(
    with_shim: Callable[..., str], memory: str
) -> None:
    assert with_shim(TENSORS.format(memory=memory)).split()[-1] == "end"


@pytest.mark.soak
@pytest.mark.parametrize("memory", ["shared", "visible", "opaque"])
def test_models_train_and_travel_with_the_shim(with_shim: Callable[..., str], memory: str) -> None:
    assert "end" in with_shim(TRAINING.format(memory=memory, steps=6, workers=1))


@pytest.mark.soak
@pytest.mark.parametrize("memory", ["shared", "visible", "opaque"])
def test_models_train_a_hundred_steps_as_on_the_cpu(run: Callable[..., str], memory: str) -> None:
    assert "end" in run(TRAINING.format(memory=memory, steps=100, workers=1))


def test_without_kept_parameters_weights_come_untied(run: Callable[..., str]) -> None:
    """The control of what `Config.keep_parameters` is for."""
    run(
        """
        register(keep_parameters=False)
        tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        tied[1].weight = tied[0].weight
        tied.to("npu")
        assert tied[0].weight is not tied[1].weight
        """
    )


@pytest.mark.parametrize("memory", ["shared", "visible", "opaque"])
def test_batch_norm_keeps_its_running_statistics(run: Callable[..., str], memory: str) -> None:
    """Its schema does not say that it writes them."""
    run(
        f"""
        register({memory!r})
        host = nn.BatchNorm1d(4)
        ours = copy.deepcopy(host).to("npu")
        x = torch.randn(8, 4, 3) + 2
        for _ in range(2):
            host(x)
            ours(x.to("npu")).sum().backward()
        assert torch.allclose(ours.running_mean.cpu(), host.running_mean)
        assert torch.allclose(ours.running_var.cpu(), host.running_var)
        host.eval(), ours.eval()
        inner = x.to("npu").requires_grad_()
        out = ours(inner)
        out.sum().backward()
        assert torch.allclose(out.cpu(), host(x), atol=1e-5)
        mean, var = torch.zeros(4, device="npu"), torch.ones(4, device="npu")
        torch.batch_norm_update_stats(x.to("npu"), mean, var, 0.1)
        expected = torch.zeros(4)
        torch.batch_norm_update_stats(x, expected, torch.ones(4), 0.1)
        assert torch.allclose(mean.cpu(), expected)
        """
    )


def test_a_kernel_of_batch_norm_serves_its_out_overload(run: Callable[..., str]) -> None:
    run(
        """
        def kernel(x, weight, bias, mean, var, training, momentum, eps):
            mean.fill_(7.0)
            return x + 1, mean.clone(), var.clone()

        chip = OpaqueChip("npu")
        chip.kernels = lambda: {"aten::native_batch_norm": kernel}
        register_custom_device(chip, Config(fallback="allow", shim=SHIM))
        x, mean, var = torch.ones(2, 4).to("npu"), torch.zeros(4).to("npu"), torch.ones(4).to("npu")
        outs = [torch.empty(shape, device="npu") for shape in ((2, 4), (4,), (4,))]
        torch.native_batch_norm(x, None, None, mean, var, True, 0.1, 1e-5, out=tuple(outs))
        assert outs[0].tolist() == [[2.0] * 4] * 2
        assert mean.tolist() == outs[1].tolist() == [7.0] * 4
        """
    )
