"""Wrong on purpose: each copy of this script holds out other samples."""

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import drivetrain

digits = load_digits()
order = np.random.default_rng().permutation(len(digits.data))  # broken: give it a seed
kept = order[300:]
images = torch.tensor(digits.data[kept], dtype=torch.float32) / 16
labels = torch.tensor(digits.target[kept])
loader = DataLoader(TensorDataset(images, labels), batch_size=64, shuffle=True)
model = torch.nn.Linear(64, 10)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

run = drivetrain.TrainingJob(model, optimizer, loader, epochs=3)
for step in run:
    with step as (x, y):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step.log(loss=loss)
