"""The loop: model, optimizer, scheduler and loader handed over; the rest is ordinary PyTorch."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import drivetrain

device = drivetrain.device_for_this_job()
digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32) / 16
labels = torch.tensor(digits.target)
loader = DataLoader(TensorDataset(images, labels), batch_size=64, shuffle=True)

model = torch.nn.Sequential(
    torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Dropout(0.1), torch.nn.Linear(128, 10)
)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8 * len(loader))

run = drivetrain.TrainingJob(model, optimizer, loader, epochs=8, scheduler=scheduler)
for step in run:
    with step as (x, y):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        step.log(loss=loss)

model.eval()
with torch.no_grad():
    x, y = images.to(device), labels.to(device)
    print(f"accuracy on what it saw: {(model(x).argmax(dim=1) == y).float().mean().item():.4f}")
