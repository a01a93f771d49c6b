"""Wrong on purpose: a copy that does not own the job writes its steps as well."""

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import drivetrain

generator = torch.Generator().manual_seed(1)
inputs = torch.randn(512, 16, generator=generator)
loader = DataLoader(TensorDataset(inputs, inputs.sum(dim=1, keepdim=True)), batch_size=32)
model = torch.nn.Linear(16, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

run = drivetrain.TrainingJob(model, optimizer, loader, epochs=3)
for step in run:
    with step as (x, y):
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step.log(loss=loss)
    with open("losses.csv", "a") as rows:  # broken: guard it with `if run.owner:`
        rows.write(f"{step.index},{loss.item()}\n")
