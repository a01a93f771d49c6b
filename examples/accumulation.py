"""Four batches for one optimizer step. A move waits for the end of such a group."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import drivetrain

GROUP = 4
device = drivetrain.device_for_this_job()
digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32) / 16
labels = torch.tensor(digits.target)
loader = DataLoader(TensorDataset(images, labels), batch_size=16, shuffle=True, drop_last=True)

model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

run = drivetrain.TrainingJob(model, optimizer, loader, epochs=6, accumulate=GROUP)
for step in run:
    with step as (x, y):
        loss = F.cross_entropy(model(x), y)
        (loss / GROUP).backward()
        if step.updates:  # the last batch of a group
            optimizer.step()
            optimizer.zero_grad()
        step.log(loss=loss)

with torch.no_grad():
    x, y = images.to(device), labels.to(device)
    print(f"accuracy on what it saw: {(model(x).argmax(dim=1) == y).float().mean().item():.4f}")
