"""Ends when the held-out loss has not fallen for three epochs; the patience is state as well."""

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import drivetrain

device = drivetrain.device_for_this_job()
generator = torch.Generator().manual_seed(3)
inputs = torch.randn(1024, 20, generator=generator)
target = inputs[:, :3].sum(dim=1, keepdim=True) + torch.randn(1024, 1, generator=generator)
loader = DataLoader(TensorDataset(inputs[:768], target[:768]), batch_size=64, shuffle=True)
test_inputs, test_target = inputs[768:].to(device), target[768:].to(device)

model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

run = drivetrain.TrainingJob(model, optimizer, loader, epochs=60)
run.vars.setdefault("best", float("inf"))
run.vars.setdefault("patience", 3)
for step in run:
    with step as (x, y):
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step.log(loss=loss)
    if step.ends_epoch:
        with torch.no_grad():
            held_out = F.mse_loss(model(test_inputs), test_target).item()
        better = held_out < run.vars["best"]
        run.vars["patience"] = 3 if better else run.vars["patience"] - 1
        run.vars["best"] = min(held_out, run.vars["best"])
        run.vars["epochs"] = step.epoch + 1
        step.log(held_out=held_out)
        if run.vars["patience"] <= 0:
            break

print(f"best held-out loss: {run.vars['best']:.4f} after {run.vars['epochs']} epochs")
