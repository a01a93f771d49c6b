"""A loader with two worker processes. After a move no sample is skipped and none comes twice."""

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, default_collate

import drivetrain


class Waves(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Noisy sine waves of four frequencies; sample i is the same in every process."""

    def __len__(self) -> int:
        return 1024

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(i)
        time = torch.linspace(0, 6.28, 64) + 6.28 * torch.rand(1, generator=generator)
        wave = torch.sin(time * (1 + i % 4)) + 0.3 * torch.randn(64, generator=generator)
        return wave, torch.tensor(i % 4)


def main() -> None:
    device = drivetrain.device_for_this_job()
    loader = DataLoader(Waves(), batch_size=32, shuffle=True, num_workers=2)
    model = torch.nn.Sequential(
        torch.nn.Unflatten(1, (1, 64)),
        torch.nn.Conv1d(1, 8, 9, stride=2),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(8 * 28, 4),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    run = drivetrain.TrainingJob(model, optimizer, loader, epochs=4)
    for step in run:
        with step as (x, y):
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step.log(loss=loss)

    with torch.no_grad():
        x, y = default_collate([loader.dataset[i] for i in range(256)])
        right = (model(x.to(device)).argmax(dim=1) == y.to(device)).float().mean().item()
    print(f"accuracy on 256 of them: {right:.4f}")


if __name__ == "__main__":  # loader workers may import this file again
    main()
