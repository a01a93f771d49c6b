"""torch's compiler comes when something is compiled, and then does what it always does."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys, inspect, torch
from drivetrain.pytorch.late_compiler import load_compiler_late

if sys.argv[1] == "late":
    load_compiler_late()
loaded = lambda: "torch._dynamo.convert_frame" in sys.modules
model = torch.nn.Linear(4, 4)
optimizer = torch.optim.AdamW(model.parameters())

def train():
    optimizer.zero_grad()
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()

train()
optimizer.load_state_dict(optimizer.state_dict())
inspect.getmodule(train)  # looks through all modules
print(loaded())
import torch._dynamo as alias
from torch._dynamo.testing import CompileCounter
alias.config.suppress_errors = False
counter = CompileCounter()
torch.compile(train, backend=counter)()

@alias.disable
def left_alone(x):
    return x + 1

torch.compile(lambda x: left_alone(x) * 2, backend=counter)(torch.ones(2))
same = sys.modules["torch._dynamo"] is torch._dynamo
print(counter.frame_count, counter.op_count, loaded(), same)
"""


def told(how: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.timeout(240)
def test_an_optimizer_does_not_load_it_and_compiling_does() -> None:
    late, as_always = told("late"), told("as always")
    assert late[0] == "False"
    assert as_always[0] == "True"  # the control: else there was nothing to put off
    assert late[1] == as_always[1]
