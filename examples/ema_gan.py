"""A small GAN: two models, two optimizers, and an EMA of the generator that moves with them."""

import copy

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import drivetrain

device = drivetrain.device_for_this_job()
digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32) / 8 - 1
loader = DataLoader(TensorDataset(images), batch_size=64, shuffle=True, drop_last=True)


def network(wide: int, out: int) -> torch.nn.Sequential:
    return torch.nn.Sequential(
        torch.nn.Linear(wide, 128), torch.nn.LeakyReLU(0.2), torch.nn.Linear(128, out)
    )


models = {"generator": network(16, 64), "critic": network(64, 1)}
generator, critic = models["generator"], models["critic"]
optimizers = {
    name: torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.5, 0.99))
    for name, model in models.items()
}
ema = copy.deepcopy(generator).requires_grad_(False)

run = drivetrain.TrainingJob(models, optimizers, loader, epochs=6, extra={"ema": ema})
for step in run:
    with step as (real,):
        fake = generator(torch.randn(len(real), 16, device=real.device)).tanh()
        judged = F.softplus(-critic(real)).mean() + F.softplus(critic(fake.detach())).mean()
        optimizers["critic"].zero_grad()
        judged.backward()
        optimizers["critic"].step()

        fooled = F.softplus(-critic(fake)).mean()
        optimizers["generator"].zero_grad()
        fooled.backward()
        optimizers["generator"].step()
        with torch.no_grad():
            for slow, fast in zip(ema.parameters(), generator.parameters(), strict=True):
                slow.lerp_(fast, 0.01)
        step.log(critic=judged, generator=fooled)

with torch.no_grad():
    drawn = ema(torch.randn(256, 16, device=device)).tanh().mean().item()
print(f"mean brightness: drawn {drawn:.3f}, real {images.mean().item():.3f}")
