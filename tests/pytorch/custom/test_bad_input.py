"""What cannot be is refused before torch is touched, and what torch would die of is not reached."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

REFUSED = """
def refused(text, backend, **config):
    raises(BadInput, text, lambda: register_custom_device(backend, Config(**config)))
    assert torch._C._get_privateuse1_backend_name() == "privateuseone"
    assert registered() is None

chip = SharedChip("npu")
for name in ("npu0x", "my-dev", "a b", "NPU", "", "_", "n" * 65):
    refused("npu", chip, name=name)
for name in ("cuda", "xpu", "mps", "vulkan", "meta", "opencl", "hip", "cpu", "float", "if",
             "privateuseone", "sum"):
    refused(repr(name), chip, name=name)
refused("a str", chip, name=7)
refused("has no name", type("X", (), {"host_visible": True, "device_count": lambda s: 1,
                                      "synchronize": lambda s, i: None})())
for text, config in (("shim", {"shim": "maybe"}), ("fallback", {"fallback": "sometimes"}),
                     ("amp_dtypes", {"amp_dtypes": ("half_a_float",)}),
                     ("amp_dtypes", {"amp_dtypes": ()})):
    raises(BadInput, text, lambda: Config(**config))
raises(BadInput, "give a Config", lambda: register_custom_device(chip, {"name": "npu"}))
refused("is a class", SharedChip)
refused("host_visible", object())
refused("device_count, synchronize", type("X", (), {"host_visible": True, "name": "x"})())

class Half(SharedChip):
    host_visible = False
refused("alloc, free, copy_in, copy_out, copy_within", Half("npu"))

class OnlyAlloc(SharedChip):
    def alloc(self, nbytes, index): return 1
refused("free", OnlyAlloc("npu"))
refused("device_count", SharedChip("npu", count=0))
refused("at most 64", [SharedChip("npu", count=40), SharedChip("b", count=40)])
refused("no backend", [])
refused("no device 'quantum:0'", "quantum:0")
refused("do not go together", ["cpu:0", chip])
refused("does not know", SharedChip("npu", kernels={"aten::no_such_thing": max}))
refused("no function", SharedChip("npu", kernels={"aten::relu": 3}))
refused("takes apart", SharedChip("npu", kernels={"aten::linear": max}))

# A second one, and the same again.
handle = register_custom_device(chip, Config(fallback="allow", shim=SHIM))
assert register_custom_device(chip) is handle
raises(BadInput, "register_custom_device([first, second])",
       lambda: register_custom_device(SharedChip("other")))
raises(BadInput, "already", lambda: register_custom_device(chip, Config(name="other")))
print("end")
"""

HAZARDS = """
import os
h = register({memory!r})
D = "npu"
x, s = torch.ones(3, device=D), torch.ones(8, dtype=torch.uint8, device=D).untyped_storage()

def storage(n, *a):
    return torch.UntypedStorage(n, *a, device=D)

acts = dict(
    storage_made=lambda: storage(4).nbytes() == 4 or 1 / 0,
    storage_filled=lambda: storage(4).fill_(3).tolist() == [3] * 4 or 1 / 0,
    storage_of_a_list=lambda: storage([1, 2]).tolist() == [1, 2] or 1 / 0,
    storage_negative=lambda: raises(RuntimeError, "-1 bytes", lambda: storage(-1)),
    storage_typed=lambda: torch.TypedStorage(4, device=D),
    storage_new=lambda: s.new(),
    storage_cloned=lambda: s.clone().tolist() == [1] * 8 or 1 / 0,
    storage_resized=lambda: s.resize_(16).nbytes() == 16 or 1 / 0 if h.shim
    else raises(Unsupported, "shim", lambda: s.resize_(16)),
    storage_swapped=lambda: s.byteswap(torch.float32),
    storage_sliced=lambda: s[1:3].tolist() == [1, 1] or 1 / 0,
    storage_written=lambda: s._write_file(open(os.devnull, "wb"), False, False, 1),
    storage_float=lambda: s.float(),
    storage_shared=lambda: x.share_memory_(),
    conj_copied=lambda: torch.ones(2, device=D, dtype=torch.complex64).conj().clone().cpu(),
    neg_copied=lambda: torch.ones(2, device=D, dtype=torch.complex64).conj().imag.clone().cpu(),
    zeros_of_autograd_read=lambda: torch._efficientzerotensor(3, device=D).cpu().tolist() == [0] * 3
    or 1 / 0,
    zeros_of_autograd_used=lambda: (torch._efficientzerotensor(3, device=D) + x).cpu(),
    number_for_a_tensor=lambda: torch.copysign(x, -1.5).tolist() == [-1] * 3 or 1 / 0,
    mixed=lambda: raises(RuntimeError, "same device", lambda: torch.mm(x[None], torch.ones(3, 1))),
    mixed_without_data=lambda: raises(RuntimeError, "expected device",
        lambda: x + torch.ones(3, device="meta")),
    out_resized=lambda: torch.add(x, 1, out=torch.empty(1, device=D).resize_(0)).tolist()
    == [2] * 3 or 1 / 0,
    other_storage=lambda: raises(RuntimeError, "different device",
        lambda: torch.empty(0, device=D).set_(torch.ones(3).untyped_storage())),
    beyond=lambda: raises(RuntimeError, "storage", lambda: torch.as_strided(x, (9,), (1,))),
    too_much=lambda: raises((RuntimeError, MemoryError), "",
        lambda: torch.empty(1 << 46, device=D)),
    to_numpy=lambda: raises(TypeError, "cpu()", lambda: x.numpy()),
    data_of_the_cpu=lambda: raises(RuntimeError, "",
        lambda: setattr(nn.Parameter(torch.ones(2, device=D)), "data", torch.ones(2))),
    sparse=lambda: x.to_sparse().to_dense().tolist() == [1] * 3 or 1 / 0,
    compressed=lambda: x[None].to_sparse_csr().cpu().to_dense().tolist() == [[1] * 3] or 1 / 0,
    compressed_inside=lambda: raises((Unsupported, RuntimeError), "",
        lambda: x[None].to_sparse_csr().relu_()),
    pinned=lambda: torch.ones(3).pin_memory().is_pinned() or 1 / 0 if h.shim
    else raises(NotImplementedError, "", lambda: torch.ones(3).pin_memory()),
    generator=lambda: torch.randn(3, device=D, generator=torch.Generator(device=D)) if h.shim
    else raises(NotImplementedError, "", lambda: torch.Generator(device=D)),
    set_beyond=lambda: torch.empty(0, dtype=torch.uint8, device=D).set_(s, 4, (12,)).sum().item()
    if h.shim else None,
    set_to_nothing=lambda: x.set_().shape == (0,) and x.device.type == D or 1 / 0,
    quantized=lambda: raises((NotImplementedError, RuntimeError, BufferError, TypeError), "",
        lambda: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)),
    quantized_moved=lambda: raises((NotImplementedError, RuntimeError, BufferError, TypeError), "",
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8).to(D)),
    nested=lambda: raises((NotImplementedError, RuntimeError, BufferError, TypeError), "",
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]).to(D)),
    jagged=lambda: torch.nested.nested_tensor([x, x[:2]], layout=torch.jagged).sin().unbind(),
    event=lambda: torch.Event(device=D).record(),
    stream=lambda: x.record_stream(torch.Stream(device=D)),
    dlpack=lambda: torch.from_dlpack(x).data_ptr() == x.data_ptr() or 1 / 0,
    no_such_device=lambda: raises(RuntimeError, "npu:7", lambda: torch.ones(2, device="npu:7")),
)
failed = []
for name, act in acts.items():
    pid = os.fork()
    if not pid:
        try:
            act()
        except BaseException as error:
            print(name, repr(error)[:200], flush=True)
            os._exit(1)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    if status:
        failed.append((name, status))
assert not failed, failed
left = torch.ones(100, device=D)  # outlives the interpreter
sys.stderr.kept = [left, left.view(10, 10)]
print("end")
"""

UNGUARDED = """
import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend as setup
setup("npu")
torch.UntypedStorage(4, device="npu")
"""


def test_what_cannot_be_is_refused_before_torch_is_touched(run: Callable[..., str]) -> None:
    assert "end" in run(REFUSED)


@pytest.mark.parametrize("memory", ["shared", "opaque"])
def test_what_ends_other_processes_is_an_exception_here(
    run: Callable[..., str], memory: str
) -> None:
    assert run(HAZARDS.format(memory=memory)).split()[-1] == "end"


@pytest.mark.soak
@pytest.mark.parametrize("memory", ["shared", "visible", "opaque"])
def test_what_ends_other_processes_does_not_end_one_with_the_shim(
    with_shim: Callable[..., str], memory: str
) -> None:
    assert with_shim(HAZARDS.format(memory=memory)).split()[-1] == "end"


def test_without_the_guard_the_process_ends() -> None:
    """The control: a storage of a device that torch's own function registered."""
    done = subprocess.run([sys.executable, "-c", UNGUARDED], capture_output=True, check=False)
    assert done.returncode < 0
