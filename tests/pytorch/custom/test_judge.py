"""A small fixed part of what `make judge-torch` runs, and that it notices what is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
ROOT = Path(__file__).parents[3]
SAMPLE = (
    "op_db float32 forward/add,op_db float32 backward/mul,op_db float32 backward/cumsum,"
    "op_db float32 forward/copysign,op_db int64 forward/bitwise_and,op_db bool forward/any,"
    "op_db bfloat16 forward/sum,module_db/nn_LayerNorm,module_db/nn_LSTMCell,optim_db/Adam,"
    "op_db bfloat16 forward/nn_functional_linear_cross_entropy_chunked,"
    "op_db float32 forward/sparse_sampled_addmm,op_db float32 backward/sparse_mm_reduce,"
    "optim_db/SparseAdam"
)


def judge(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools/judge_torch.py"), "--processes", "1", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )


@pytest.mark.timeout(300)  # torch's databases take their time to be read
def test_a_sample_of_torchs_own_suites_passes_on_the_device() -> None:
    done = judge("--memory", "shared", "--only", SAMPLE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "shared optim_db 2/2 100.00%" in done.stdout.splitlines()[-1]
    assert "op_db float32 forward 3/3" in done.stdout.splitlines()[-1]
    assert "op_db bfloat16 forward 1/2" in done.stdout.splitlines()[-1]  # expected, yet it counts


@pytest.mark.timeout(300)  # torch's databases take their time to be read
def test_the_judge_notices_a_kernel_that_is_wrong() -> None:
    done = judge("--memory", "wrong", "--only", "op_db float32 forward/add,optim_db/Adam")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILED op_db float32 forward/add" in done.stdout
