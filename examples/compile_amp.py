"""torch.compile and mixed precision. Compiled code is made anew on the target; the scaler moves."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import drivetrain

device = drivetrain.device_for_this_job()
half = torch.float16 if device.type == "cuda" else torch.bfloat16
digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32) / 16
labels = torch.tensor(digits.target)
loader = DataLoader(TensorDataset(images, labels), batch_size=64, shuffle=True, drop_last=True)

model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
compiled = torch.compile(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
scaler = torch.amp.GradScaler(device.type, enabled=half is torch.float16)

run = drivetrain.TrainingJob(model, optimizer, loader, epochs=6, scaler=scaler)
for step in run:
    with step as (x, y):
        with torch.autocast(device.type, dtype=half):
            loss = F.cross_entropy(compiled(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        step.log(loss=loss)

with torch.no_grad():
    x, y = images.to(device), labels.to(device)
    print(f"accuracy on what it saw: {(model(x).argmax(dim=1) == y).float().mean().item():.4f}")
