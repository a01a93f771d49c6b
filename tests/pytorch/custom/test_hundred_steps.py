"""A CNN, an LSTM and a transformer train a hundred steps on a simulated chip, as on the CPU.

The chip is the HAL's, whose kernels are not the CPU's: the losses are near. `test_device.py` does
so on chips without kernels, where what is the CPU's own gives the same bits, `test_hal_ops.py` on
``opencl:0``.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

NETWORKS = """
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

def cnn():
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
                         nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 10))

def curve(model, x, y, steps):
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses

def compare(there, steps):
    images, words = torch.randn(8, 1, 8, 8), torch.randint(0, 30, (8, 5))
    for make, x in ((cnn, images), (Lstm, words), (Transformer, words)):
        torch.manual_seed(1)
        here = make()
        far = copy.deepcopy(here).to(there)
        y = torch.randint(0, 10, (8,))
        expected = curve(here, x, y, steps)
        found = curve(far, x.to(there), y.to(there), steps)
        assert expected[-1] < expected[0]
        for one, other in zip(expected, found, strict=True):
            assert abs(one - other) <= 1e-4 * abs(one), (make.__name__, expected, found)
        print(make.__name__, len(found), "steps: at the end", found[-1], "here", expected[-1])

torch.manual_seed(0)
"""


@pytest.mark.soak
def test_three_networks_train_a_hundred_steps_on_a_simulated_chip(run: Callable[..., str]) -> None:
    code = NETWORKS + (
        "handle = register_custom_device('simulated:0', Config(fallback='allow', shim='off'))\n"
        "compare(handle.device, 100)\n"
    )
    assert run(code, DRIVETRAIN_SIMULATED="count=1 memory=64M").count("100 steps") == 3


@pytest.mark.soak
def test_a_chip_that_adds_wrongly_does_not_train_as_the_cpu(run: Callable[..., str]) -> None:
    """The control: the comparison notices."""
    code = NETWORKS + (
        "handle = register('wrong')\n"
        "raises(AssertionError, 'cnn', lambda: compare(handle.device, 100))\nprint('noticed')\n"
    )
    assert "noticed" in run(code)
