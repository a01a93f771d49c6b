"""Wrong on purpose: the order of a set of strings decides which class has which number."""

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import drivetrain

names = ["oak", "elm", "ash", "fir"] * 128
classes = list(set(names))  # broken: sorted(set(names)) is the same everywhere

generator = torch.Generator().manual_seed(1)
labels = torch.tensor([classes.index(name) for name in names])
inputs = torch.randn(512, 16, generator=generator)
inputs[:, 0] += torch.tensor([float(len(set(name))) for name in names])
loader = DataLoader(TensorDataset(inputs, labels), batch_size=32, shuffle=True)
model = torch.nn.Linear(16, len(classes))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

run = drivetrain.TrainingJob(model, optimizer, loader, epochs=3)
for step in run:
    with step as (x, y):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step.log(loss=loss)
