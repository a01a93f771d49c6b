"""torch takes its memory from Drivetrain's pool."""

from __future__ import annotations

import subprocess
import sys
from textwrap import dedent

import pytest

from drivetrain import hal
from drivetrain.errors import BadInput, Unsupported

torch = pytest.importorskip("torch")


def test_only_a_cuda_device_can_serve_torch() -> None:
    from drivetrain.pytorch.allocator import use_pool

    with pytest.raises(BadInput, match="on CUDA only"):
        use_pool(hal.device("cpu:0"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this torch has CUDA")
def test_a_torch_without_cuda_says_so() -> None:
    from drivetrain.pytorch.allocator import _check_torch

    info = hal.DeviceInfo(driver="cuda", index=0, name="none", vendor="nvidia", uuid="GPU-0")
    with pytest.raises(Unsupported, match="without CUDA"):
        _check_torch(hal.Device("cuda:0", info, info.uuid))


def on_gpu(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", dedent(code)], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "end"


@pytest.mark.gpu
def test_a_model_trains_on_memory_of_the_pool() -> None:
    on_gpu(
        """
        import gc, torch
        from drivetrain import hal
        from drivetrain.pytorch.allocator import use_pool

        pool = use_pool("cuda:0", limit=4 << 30)
        assert use_pool("cuda:0") is pool
        model = torch.nn.Sequential(torch.nn.Linear(512, 2048), torch.nn.ReLU(),
                                    torch.nn.Linear(2048, 10)).cuda()
        optimizer = torch.optim.Adam(model.parameters())
        torch.manual_seed(0)
        x, y = torch.randn(256, 512).cuda(), torch.randint(0, 10, (256,)).cuda()
        losses = []
        for _ in range(30):
            loss = torch.nn.functional.cross_entropy(model(x), y)
            loss.backward()  # frees on autograd's own threads
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0] / 2, losses
        stats = pool.stats()
        assert stats.live > 0 and stats.peak_requested > 10 << 20 and stats.failures == 0

        # Buffers of the device come from the same pool.
        device = hal.device("cuda:0")
        stream = device.stream()
        before = pool.stats().live
        buffer = device.alloc(1 << 20, stream=stream)
        assert pool.stats().live == before + 1
        buffer.close()

        # Work on another stream keeps a tensor's memory.
        side = torch.cuda.Stream()
        for turn in range(20):
            a = torch.full((1 << 20,), float(turn), device="cuda")
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                torch.cuda._sleep(20_000_000)
                b = a.clone()
            a.record_stream(side)
            del a
            c = torch.full((1 << 20,), -1.0, device="cuda")
            torch.cuda.synchronize()
            assert (b == turn).all(), turn

        del model, optimizer, x, y, loss, b, c
        gc.collect()
        torch.cuda.synchronize()
        reserved = pool.stats().reserved
        torch.cuda.empty_cache()
        assert pool.stats().reserved < reserved

        try:
            torch.empty(5 << 30, dtype=torch.uint8, device="cuda")
        except RuntimeError as error:
            assert "out of memory" in str(error) and "limit" in str(error), error
        else:
            raise SystemExit("more than the limit was given")
        print("end")
        """
    )


@pytest.mark.gpu
def test_it_is_too_late_once_torch_has_used_cuda() -> None:
    on_gpu(
        """
        import torch
        from drivetrain.errors import BadInput
        from drivetrain.pytorch.allocator import use_pool

        torch.zeros(1, device="cuda")
        try:
            use_pool("cuda:0")
        except BadInput as error:
            assert "first CUDA tensor" in str(error)
            print("end")
        """
    )
