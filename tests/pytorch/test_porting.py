"""Reading a program for what ties it to a vendor: named with its line, or left alone."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drivetrain.errors import BadInput
from drivetrain.pytorch.porting import Finding, analyse, read, tables

ROOT = Path(__file__).resolve().parents[2]
HEAD = "import os, subprocess, torch\nimport torch.distributed as dist\n"


def found(text: str) -> list[Finding]:
    return read(ast.parse(HEAD + textwrap.dedent(text)), "script.py")


def said(text: str) -> list[tuple[int, str, str]]:
    """(line of the text, code, effect) of each finding."""
    return [(f.line - HEAD.count("\n"), f.code, f.effect) for f in found(text)]


TIES = {
    "model.cuda()": "device-method fails",
    "x = x.cuda(non_blocking=True)": "device-method fails",
    "x.xpu()": "device-method fails",
    "d = torch.device('cuda')": "device fails",
    "d = 'cuda:0'": "device fails",
    "x.to(f'cuda:{rank}')": "device fails",
    "x = 'cuda:{}'.format(rank)": "device fails",
    "x = 'cuda:%d' % rank": "device fails",
    "torch.zeros(3, device='mps')": "device fails",
    "c = torch.autocast('cuda')": "device differs",
    "c = torch.autocast(device_type='cuda', dtype=torch.bfloat16)": "device differs",
    "s = torch.amp.GradScaler('cuda')": "device differs",
    "print(model.cuda())": "device-method fails",
    "pair = [x.cuda(), y]": "device-method fails",
    "assert torch.cuda.is_available(), 'a GPU, please'": "device-test fails",
    "if not torch.cuda.is_available(): raise SystemExit(1)": "device-test fails",
    "import sys\nif not torch.cuda.is_available():\n    sys.exit('no')": "device-test fails",
    "x.to('npu')": "device fails",
    "def f(device='cuda'): pass": "device fails",
    "p.add_argument('--device', default='cuda', choices=['cuda', 'cpu'])": "device fails",
    "torch.load(p, map_location='cuda:0')": "device fails",
    "torch.cuda.synchronize()": "device-module fails",
    "s = torch.cuda.Stream()": "device-module fails",
    "torch.cuda.set_device(rank)": "device-module fails",
    "torch.cuda.nvtx.range_push('x')": "device-module fails",
    "torch.cuda.manual_seed_all(1)": "device-module differs",
    "torch.cuda.empty_cache()": "device-module differs",
    "ok = torch.cuda.is_available()": "device-module skips",
    "n = torch.cuda.device_count()": "device-module skips",
    "c = torch.cuda.get_device_capability()": "capability-test fails",
    "b = torch.cuda.is_bf16_supported()": "capability-test skips",
    "b = x.is_cuda": "device-test skips",
    "b = x.device.type == 'cuda'": "device-test skips",
    "b = kind in ('cuda', 'xpu')": "device-test skips",
    "v = torch.version.cuda": "device-test skips",
    "dist.init_process_group('nccl')": "collectives fails",
    "dist.init_process_group(backend='xccl')": "collectives fails",
    "dist.init_process_group('cpu:gloo,cuda:nccl')": "collectives differs",
    "torch.backends.cuda.matmul.allow_tf32 = True": "tf32-switch differs",
    "torch.backends.cudnn.allow_tf32 = True": "tf32-switch differs",
    "torch.backends.cudnn.benchmark = True": "cuda-switch differs",
    "torch.backends.cuda.enable_flash_sdp(True)": "cuda-switch differs",
    "y = x.to(torch.float8_e4m3fn)": "fp8-switch differs",
    "torch._scaled_mm(a, b, s, t)": "fp8-switch fails",
    "import flash_attn": "import fails",
    "from apex import amp": "import fails",
    "import transformer_engine.pytorch as te": "import fails",
    "import intel_extension_for_pytorch as ipex": "import fails",
    "import pynvml": "import fails",
    "from numba import cuda": "import fails",
    "from torch.utils.cpp_extension import CUDAExtension; CUDAExtension('a', ['b'])": (
        "extension fails"
    ),
    "from torch.utils.cpp_extension import load; load('a', ['k.cu'])": "extension fails",
    "from torch.utils.cpp_extension import load_inline; load_inline('a', cuda_sources=s)": (
        "extension fails"
    ),
    "cp.RawKernel(text, 'f')": "kernel fails",
    "torch.cuda._compile_kernel(text, 'f')": "kernel fails",
    "subprocess.run(['nvidia-smi', '-L'])": "vendor-tool fails",
    "os.system('rocm-smi --showuse')": "vendor-tool fails",
    "os.environ['CUDA_VISIBLE_DEVICES'] = '0'": "visible-devices differs",
    "os.environ.get('HIP_VISIBLE_DEVICES')": "visible-devices differs",
    "os.environ.setdefault('NCCL_DEBUG', 'INFO')": "tuning differs",
    "os.environ['PYTORCH_CUDA_ALLOC_CONF'] = 'x'": "tuning differs",
}

PORTABLE = [
    "device = torch.accelerator.current_accelerator()",
    "x = x.to(device, non_blocking=True)",
    "torch.accelerator.synchronize()",
    "s = torch.Stream(device)",
    "x = torch.zeros(3, device='cpu')",
    "dist.init_process_group('gloo')",
    "dist.init_process_group(dist.get_default_backend_for_device(device))",
    "torch.set_float32_matmul_precision('high')",
    "p.add_argument('--device', choices=['cpu', 'cuda'])",
    "print('cuda')",
    "print(f'cuda:{n}')",
    "parts = ['knee', 'hip', 'elbow']",
    "joint = 'hip'",
    "table = {'cuda': 1, 'cpu': 2}",
    "# model.cuda()",
    "'''Call model.cuda() first: torch.cuda.synchronize().'''",
    "cuda = 3; x = cuda + 1",
    "xla = compiled.xla",
    "from torchvision import models",
    "subprocess.run(['ls', '-l'])",
    "os.environ['HOME']",
    "with torch.autocast(device.type): pass",
]


@pytest.mark.parametrize("text", TIES)
def test_a_tie_is_named_with_its_line_and_a_portable_form(text: str) -> None:
    code, effect = TIES[text].split()
    line = 1 + text.count("\n") // 2
    assert (line, code, effect) in said(text)
    for finding in found(text):
        assert finding.portable
        assert finding.vendor


@pytest.mark.parametrize("text", PORTABLE)
def test_what_is_portable_is_left_alone(text: str) -> None:
    assert said(text) == []


GUARDED = [
    "device = 'cuda' if torch.cuda.is_available() else 'cpu'",
    "device = torch.device('cpu' if not torch.cuda.is_available() else 'cuda')",
    "if torch.cuda.is_available():\n    model.cuda()",
    "use = torch.cuda.is_available()\nif use:\n    model.cuda()",
    "if x.is_cuda:\n    torch.cuda.synchronize()",
    "if device.type == 'cuda':\n    torch.cuda.synchronize()",
    "if device.type != 'cuda':\n    pass\nelse:\n    torch.cuda.synchronize()",
    "ok = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)",
    "ok = not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (8, 0)",
    "def f():\n    if not torch.cuda.is_available():\n        return\n    torch.cuda.synchronize()",
    "try:\n    import apex\nexcept ImportError:\n    apex = None",
    "try:\n    import apex\nexcept (ImportError, OSError):\n    apex = None",
    "try:\n    subprocess.run(['nvidia-smi'])\nexcept Exception:\n    pass",
    "if torch.cuda.device_count() == 0:\n    x = 1\nelse:\n    x.cuda()",
    "if torch.cuda.device_count() > 1:\n    x.cuda()",
    "if hasattr(torch, 'xpu'):\n    x.xpu()",
    "try:\n    x.cuda()\nexcept RuntimeError:\n    pass",
]
UNGUARDED = [
    "if torch.cuda.is_available():\n    pass\nmodel.cuda()",
    "if not torch.cuda.is_available():\n    raise SystemExit('a GPU, please')\nmodel.cuda()",
    "if not torch.cuda.is_available():\n    model.cuda()",
    "if big:\n    model.cuda()",
    "if hasattr(args, 'big'):\n    model.cuda()",
    "if torch.cuda.device_count() == 0:\n    model.cuda()",
    "try:\n    model.cuda()\nexcept KeyboardInterrupt:\n    pass",
    "try:\n    a()\n    b()\n    c()\n    model.cuda()\nexcept Exception:\n    print('no')",
    "try:\n    import apex\nexcept ImportError:\n    raise",
    "device = 'cpu' if torch.cuda.is_available() else 'cuda'",
]


@pytest.mark.parametrize("text", GUARDED)
def test_what_asks_first_does_not_fail_elsewhere(text: str) -> None:
    assert {effect for _, _, effect in said(text)} == {"skips"}


@pytest.mark.parametrize("text", UNGUARDED)
def test_what_does_not_ask_fails_elsewhere(text: str) -> None:
    assert "fails" in {effect for _, _, effect in said(text)}


@pytest.mark.parametrize(
    "text",
    [
        "import torch.cuda as tc\ntc.synchronize()",
        "from torch import cuda\ncuda.synchronize()",
        "from torch.cuda import synchronize as wait\nwait()",
        "from torch import cuda as c\nc.synchronize()",
        "tc = torch.cuda\ntc.synchronize()",
    ],
)
def test_names_are_followed_however_they_are_imported(text: str) -> None:
    assert (2, "device-module", "fails") in said(text)


def test_what_needs_a_device_is_told_apart_from_what_only_uses_it(tmp_path: Path) -> None:
    script = tmp_path / "a.py"
    script.write_text("import torch\nd = 'cuda' if torch.cuda.is_available() else 'cpu'\n")
    assert analyse(script).needs == frozenset()
    script.write_text("import torch\nx = torch.ones(1).cuda()\n")
    assert analyse(script).needs == {"cuda"}
    script.write_text("import torch, apex\nx = torch.ones(1).xpu()\n")
    assert analyse(script).needs == {"xpu"}


def test_a_folder_is_read_and_what_cannot_be_is_told(tmp_path: Path) -> None:
    (tmp_path / "inner" / "deep").mkdir(parents=True)
    (tmp_path / "inner" / "deep" / "a.py").write_text("x.cuda()\n")
    (tmp_path / "ok.py").write_text("x = 1\n")
    (tmp_path / "bad.py").write_text("x = (\n")
    (tmp_path / "deep.py").write_text("(" * 5000 + "1" + ")" * 5000)
    (tmp_path / "nul.py").write_bytes(b"x = 1\0")
    (tmp_path / "kernel.cu").write_text("__global__ void f() {}")
    for skipped in (".git", "venv", "site-packages"):
        (tmp_path / skipped).mkdir()
        (tmp_path / skipped / "a.py").write_text("x.cuda()\n")
    (tmp_path / "loop").symlink_to(tmp_path)
    report = analyse(tmp_path)
    assert [(f.path, f.code) for f in report.findings] == [
        ("inner/deep/a.py", "device-method"),
        ("kernel.cu", "cuda-source"),
    ]
    assert report.files == 2
    assert sorted(path for path, _ in report.unread) == ["bad.py", "deep.py", "nul.py"]


def test_bad_input_says_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.py").write_text("x = (\n")
    for path, words in (
        (tmp_path / "none.py", "there is no file"),
        (tmp_path / "empty", "no Python file"),
        (tmp_path / "bad.py", "line 1"),
    ):
        with pytest.raises(BadInput, match=words):
            analyse(path)


def command(*words: str, folder: Path, code: str = "") -> subprocess.CompletedProcess[str]:
    text = f"{code}\nimport sys; from drivetrain.cli.main import main; main(sys.argv[1:])"
    return subprocess.run(
        [sys.executable, "-c", text, *words],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_prints_lines_and_json_without_torch(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("import torch\n\nmodel.cuda()\n")
    (tmp_path / "fine.py").write_text("import torch\n")
    blocked = "import sys; sys.modules['torch'] = None"
    done = command("port", "train.py", folder=tmp_path, code=blocked)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert lines[0].startswith("train.py:3: device-method: .cuda()")
    assert "drivetrain.device_for_this_job()" in lines[1]
    assert "only where torch has cuda" in lines[-1]
    told: dict[str, Any] = json.loads(
        command("port", "--json", ".", folder=tmp_path, code=blocked).stdout
    )
    assert (told["files"], told["needs"], told["effects"]) == (2, ["cuda"], {"fails": 1})
    assert told["findings"][0]["line"] == 3
    fine = command("port", "fine.py", folder=tmp_path, code=blocked)
    assert (fine.returncode, "portable as it is" in fine.stdout) == (0, True)
    wrong = command("port", "none.py", folder=tmp_path)
    assert (wrong.returncode, "none.py" in wrong.stderr) == (2, True)


def test_what_is_said_to_be_harmless_without_cuda_is() -> None:
    from drivetrain.pytorch.porting.rules import _ASKING, _HARMLESS

    needs_arguments = {"manual_seed": "1", "manual_seed_all": "1", "amp.autocast": "dtype=None"}
    calls = [
        f"torch.cuda.{name}({needs_arguments.get(name, '')})"
        for name in sorted((_HARMLESS | _ASKING) - {"OutOfMemoryError"})
    ]
    text = "import warnings, torch\nwarnings.simplefilter('ignore')\n" + "\n".join(calls)
    done = subprocess.run(
        [sys.executable, "-c", text],
        env={"CUDA_VISIBLE_DEVICES": "", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_every_portable_form_that_names_torch_exists() -> None:
    """The words after ``torch.`` in the tables are attributes of the torch that is installed."""
    import re

    import torch

    texts = [*tables.CALLS.values(), tables.DEVICE, tables.BACKEND, tables.CAPABILITY]
    texts += [portable for _, portable in tables.IMPORTS.values()]
    texts += [portable for *_, portable in tables.SWITCHES.values()]
    named = {name for text in texts for name in re.findall(r"\btorch(?:\.\w+)+", text)}
    assert "torch.accelerator.synchronize" in named
    for name in named:
        thing: Any = torch
        for word in name.split(".")[1:]:
            thing = getattr(thing, word)


ATOMS = st.sampled_from([*TIES, *PORTABLE, "x = 1"])


@settings(max_examples=60, deadline=None)
@given(st.lists(ATOMS, min_size=1, max_size=8), st.integers(0, 3))
def test_findings_do_not_depend_on_what_stands_around_them(atoms: list[str], depth: int) -> None:
    """Each line of a longer program gives what it gives alone, at any depth of blocks."""
    alone = [code for text in atoms for _, code, _ in said(text)]
    body = "\n".join(atoms)
    for _ in range(depth):
        body = "if big:\n" + textwrap.indent(body, "    ")
    assert sorted(code for _, code, _ in said(body)) == sorted(alone)
