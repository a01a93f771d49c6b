"""Evaluation after each epoch. What must survive a move lives in run.vars, not in a local."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import drivetrain

device = drivetrain.device_for_this_job()
digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32) / 16
labels = torch.tensor(digits.target)
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(7))
held_out, kept = order[:300], order[300:]
loader = DataLoader(TensorDataset(images[kept], labels[kept]), batch_size=64, shuffle=True)
test_images, test_labels = images[held_out].to(device), labels[held_out].to(device)

model = torch.nn.Sequential(
    torch.nn.Linear(64, 128), torch.nn.BatchNorm1d(128), torch.nn.ReLU(), torch.nn.Linear(128, 10)
)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)


@torch.no_grad()
def evaluate() -> float:
    """Accuracy on the held-out digits."""
    model.eval()
    right = (model(test_images).argmax(dim=1) == test_labels).float().mean()
    model.train()
    return right.item()


run = drivetrain.TrainingJob(model, optimizer, loader, epochs=6)
for step in run:
    with step as (x, y):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step.log(loss=loss)
    if step.ends_epoch:
        accuracy = evaluate()
        run.vars["best"] = max(run.vars.get("best", 0.0), accuracy)
        step.log(accuracy=accuracy)

print(f"best accuracy: {run.vars['best']:.4f}")
