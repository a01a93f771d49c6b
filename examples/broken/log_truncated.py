"""Wrong on purpose: a second copy of this script empties the log that the first one writes."""

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import drivetrain

log = open("train.log", "w")  # broken: use run.owner, or append after the loop

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
    if step.ends_epoch and run.owner:
        print(step.epoch, loss.item(), file=log, flush=True)
log.close()
