"""Wrong on purpose: the best loss is a local, so it starts again at infinity after a move."""

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import drivetrain

generator = torch.Generator().manual_seed(1)
inputs = torch.randn(512, 16, generator=generator)
loader = DataLoader(TensorDataset(inputs, inputs.sum(dim=1, keepdim=True)), batch_size=32)
model = torch.nn.Linear(16, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

best = float("inf")
run = drivetrain.TrainingJob(model, optimizer, loader, epochs=3)
for step in run:
    with step as (x, y):
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step.log(loss=loss)
    best = min(best, loss.item())  # broken: keep it in run.vars["best"]

print(f"best loss: {best:.4f}")
