"""Wrong on purpose: runs on one vendor's devices only, and on the first of them."""

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import drivetrain

generator = torch.Generator().manual_seed(1)
inputs = torch.randn(512, 16, generator=generator)
loader = DataLoader(TensorDataset(inputs, inputs.sum(dim=1, keepdim=True)), batch_size=32)
model = torch.nn.Linear(16, 1)
model.cuda()  # broken: TrainingJob places the model; device_for_this_job() names the device
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

run = drivetrain.TrainingJob(model, optimizer, loader, epochs=3)
for step in run:
    with step as (x, y):
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step.log(loss=loss)
