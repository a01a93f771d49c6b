"""A HAL device as a torch device: its kernels give what the CPU gives, and nothing leaves it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from drivetrain import hal

pytest.importorskip("tree_sitter_cuda")

Run = Callable[..., str]

HEAD = """
handle = register_custom_device("opencl:0", Config(fallback="error", shim="off"))
there = handle.device

def near(found, wanted, what, loose=2e-4):
    if isinstance(wanted, (tuple, list)):
        for one, other in zip(found, wanted, strict=True):
            near(one, other, what)
        return
    assert found.device.type == handle.name, (what, found.device)
    assert found.shape == wanted.shape and found.dtype == wanted.dtype, (what, found, wanted)
    torch.testing.assert_close(found.cpu(), wanted, rtol=loose, atol=loose, equal_nan=True,
                               msg=lambda text: f"{what}: {text}")

def check(act, *inputs, gradient=True):
    torch.manual_seed(0)
    here = [each.clone().requires_grad_(gradient and each.is_floating_point()) for each in inputs]
    far = [each.to(there).requires_grad_(gradient and each.is_floating_point()) for each in inputs]
    wanted, found = act(*here), act(*far)
    near(found, wanted, act)
    first = (wanted if isinstance(wanted, tuple) else (wanted,))[0]
    if first.requires_grad:
        slope = torch.randn(first.shape)
        first.backward(slope)
        (found if isinstance(found, tuple) else (found,))[0].backward(slope.to(there))
        for one, other in zip(far, here, strict=True):
            if other.grad is not None:
                near(one.grad, other.grad, ("gradient", act))
r = torch.randn
"""


@pytest.fixture(autouse=True)
def _opencl() -> None:
    if not hal.devices("opencl", all_routes=True):
        pytest.skip("this machine has no OpenCL device")


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_operations_give_what_the_cpu_gives_and_none_leaves_the_device(run: Run) -> None:
    run(
        HEAD
        + """
check(lambda a, b: a + 2 * b[:, :1] - a.t().contiguous().t() / 3, r(5, 7), r(5, 7))
check(lambda a: (a * a).tanh().sigmoid().exp(), r(3, 4).t())
check(lambda a: F.gelu(a) + F.silu(a) + F.leaky_relu(a, 0.2) + F.softplus(a), r(40))
check(lambda a, i: a[:, 1:].where(a[:, 1:] > 0, 0.5) + i, r(4, 6), torch.arange(5))
check(lambda a: (a.sum(1), a.mean(), a.amax(0), a.max(1).values, a.var(0)), r(6, 9))
check(lambda a: (a.argmax(1), (a > 0).any(0), (a > 0).sum(), a.masked_fill(a > 0, 1.0)), r(6, 9),
      gradient=False)
check(lambda a, b: a @ b.transpose(1, 2), r(3, 5, 4), r(3, 6, 4))
check(lambda a, w, b: F.linear(a, w, b), r(2, 3, 5), r(4, 5), r(4))
check(lambda a: F.softmax(a, 1) + F.log_softmax(a, 0), r(4, 10))
for more in ({}, {"stride": 2, "padding": 1}, {"dilation": 2, "groups": 2}):
    shape = (6, 4 // more.get("groups", 1), 3, 3)
    check(lambda a, w, b: F.conv2d(a, w, b, **more), r(2, 4, 9, 8), r(shape), r(6))
check(lambda a, w: F.conv_transpose2d(a, w, stride=2, output_padding=1), r(2, 4, 5, 5),
      r(4, 3, 3, 3))
check(lambda a, w: F.conv1d(a, w, padding=2), r(2, 4, 9), r(5, 4, 3))
check(lambda a: F.max_pool2d(a, 3, 2, 1), r(2, 3, 9, 9))
check(lambda a: F.avg_pool2d(a, 3, 2, 1, ceil_mode=True, count_include_pad=False), r(2, 3, 9, 8))
check(lambda a: F.adaptive_avg_pool2d(a, (3, 2)), r(2, 3, 7, 5))
check(lambda a, w, b: F.layer_norm(a, (6,), w, b), r(5, 6), r(6), r(6))
check(lambda a, w, b: F.group_norm(a, 2, w, b), r(3, 4, 5), r(4), r(4))
for training in (True, False):
    check(lambda a, w, b: F.batch_norm(a, torch.zeros(4, device=a.device),
                                       torch.ones(4, device=a.device), w, b, training),
          r(3, 4, 5, 2), r(4), r(4))
t = torch.tensor([1, 0, 2, 1, -100])
check(lambda a, t: F.cross_entropy(a, t), r(5, 3), t)
check(lambda a, t, w: F.cross_entropy(a, t, w.detach(), reduction="sum"), r(5, 3), t, r(3).abs())
check(lambda a, t: F.cross_entropy(a, t), r(2, 3, 4), torch.randint(0, 3, (2, 4)))
check(lambda w, i: F.embedding(i, w, padding_idx=2), r(7, 5), torch.randint(0, 7, (4, 6)))
check(lambda a, i: a.gather(1, i), r(4, 6), torch.randint(0, 6, (4, 3)))
check(lambda a, b: torch.cat([a, b.t()], 1)[:, ::2], r(4, 3), r(2, 4))
check(lambda a: (torch.tril(a), a.abs(), a.bfloat16().float()), r(5, 5))
check(lambda a, b: F.mse_loss(a, b), r(4, 5), r(4, 5))
assert not handle.fallbacks, handle.fallbacks
raises(RuntimeError, "match", lambda: torch.ones(2, device=there) + torch.ones(3, device=there))
raises(Unsupported, "the policy is 'error'", lambda: torch.ones(4, device=there).cumsum(0))
"""
    )


NETWORKS = """
class Cnn(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.last = nn.Conv2d(8, 8, 3, stride=2), nn.Linear(8, 10)
    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm(self.first(x))), 2)
        return self.last(F.relu(self.second(x)).mean((2, 3)))

class Lstm(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.cells = nn.Embedding(30, 8), nn.LSTM(8, 12, batch_first=True)
        self.last = nn.Linear(12, 10)
    def forward(self, x):
        return self.last(self.cells(self.words(x))[0][:, -1])

class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.words = nn.Embedding(30, 16)
        self.layers = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.last = nn.Linear(16, 10)
    def forward(self, x):
        return self.last(self.layers(self.words(x)).mean(1))

def mlp():
    return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 10))

def train(make, x, steps, optimizer):
    torch.manual_seed(1)
    here = make()
    far = copy.deepcopy(here).to(there)
    y = torch.randint(0, 10, (len(x),))
    losses = []
    for model, x, y in ((here, x, y), (far, x.to(there), y.to(there))):
        steps_of = optimizer(model.parameters())
        mine = []
        for _ in range(steps):
            loss = F.cross_entropy(model(x), y)
            steps_of.zero_grad()
            loss.backward()
            steps_of.step()
            mine.append(loss.item())
        losses.append(mine)
    for one, other in zip(*losses, strict=True):
        assert abs(one - other) <= 1e-4 * abs(one), (make, losses)
    assert losses[0][-1] < losses[0][0]
    assert not handle.fallbacks, handle.fallbacks

def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.02)

def fused(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3, fused=True)

images, words = r(4, 3, 10, 10), torch.randint(0, 30, (4, 5))
"""


@pytest.mark.timeout(400)
def test_networks_train_as_on_the_cpu_and_nothing_leaves_the_device(run: Run) -> None:
    run(
        HEAD
        + NETWORKS
        + """
train(mlp, r(16, 20), 5, fused)
train(Cnn, images, 5, fused)
torch.manual_seed(3)
for out in (torch.empty(4, 5), torch.empty(5, 4).t(), torch.empty(0)):
    out = out.to(there)
    a, b = r(4, 5), r(5)
    assert torch.mul(a.to(there), b.to(there), out=out) is out
    near(out, a * b, "out=")
raises(RuntimeError, "can't be cast",
       lambda: torch.mul(out, 2, out=torch.ones(4, 5, dtype=torch.int64, device=there)))
kept = F.dropout(torch.ones(4000, device=there), 0.25).cpu()
assert set(kept.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
assert abs(kept.mean() - 1) < 0.1
assert not handle.fallbacks, handle.fallbacks
raises(RuntimeError, "match", lambda: torch.ones(2, device=there) + torch.ones(3, device=there))
raises(Unsupported, "the policy is 'error'", lambda: torch.ones(4, device=there).cumsum(0))
"""
    )


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_four_networks_train_a_hundred_steps_as_on_the_cpu(run: Run) -> None:
    run(
        HEAD
        + NETWORKS
        + """
train(mlp, r(32, 20), 100, lambda p: torch.optim.Adam(p, lr=1e-3))
train(Cnn, images, 100, sgd)
train(Lstm, words, 100, sgd)
train(Transformer, words, 100, sgd)
"""
    )
