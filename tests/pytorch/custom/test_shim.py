"""The C++ shim: what it adds, when it is used, and what is loaded. Built once in a session."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch")

NATIVE = """
import threading
h = register({memory!r}, count=2)
assert h.shim and not h.without_shim and "C++" in repr(h), h.without_shim
D, other = "npu", h.devices[1]

# Storages are torch's own: they grow in place, and what shares one sees it.
s = torch.UntypedStorage(8, device=D).fill_(3)
first, second = (torch.empty(0, dtype=torch.uint8, device=D).set_(s) for _ in range(2))
s.resize_(16)
assert s.nbytes() == 16 and s[:8].tolist() == [3] * 8
first.resize_(24)[20:] = 5
assert s.nbytes() == 24 and second.set_(s, 20, (4,)).tolist() == [5] * 4
t = torch.UntypedStorage(4, device=other)
assert t.device == other and torch.empty(0, device=other).set_(t, 1, (3,)).shape == (3,)
assert t.nbytes() == 16
raises(RuntimeError, "npu:2", lambda: torch.empty(1, device="npu:2"))
raises(RuntimeError, "npu:2", lambda: torch.accelerator.set_device_index(2))

# Backward on each device, through both, and in threads; the current device is a thread's own.
assert torch.autograd.is_multithreading_enabled()
for device in h.devices:
    w = torch.ones(3, device=device, requires_grad=True)
    (w * w).sum().backward()
    assert w.grad.tolist() == [2] * 3 and w.grad.device == device
x = torch.ones(2, requires_grad=True)
seen = []
def note(grad):
    seen.append((threading.get_ident(), torch.npu.current_device()))
y = x.to(D) * 2
y.register_hook(note)
z = y.to(other) * 3
z.register_hook(note)
z.sum().backward()
assert x.grad.tolist() == [6, 6] and [d for _, d in seen] == [1, 0]
assert len({{t for t, _ in seen}} | {{threading.get_ident()}}) == 3  # a thread for each device
def work(index, failed):
    try:
        torch.npu.set_device(index % 2)
        for _ in range(50):
            w = torch.randn(8, 8, device=D, requires_grad=True)
            assert w.device.index == index % 2
            (w @ w).relu().sum().backward()
            assert w.grad.device == w.device
    except BaseException as error:
        failed.append(error)
failed = []
threads = [threading.Thread(target=work, args=(i, failed)) for i in range(4)]
[each.start() for each in threads]
[each.join() for each in threads]
assert not failed and torch.npu.current_device() == 0, failed
with torch.accelerator.device_index(1):
    assert torch.npu.current_device() == 1 and torch.ones(1, device=D).device == other
with torch.npu.device(1):
    assert torch.accelerator.current_device_index() == 1

# Random numbers: a generator of the device's own.
g = torch.Generator(device=D).manual_seed(7)
assert g.device == h.device
a = torch.randn(4, device=D, generator=g)
state = g.get_state()
b = torch.randn(4, device=D, generator=g)
g.set_state(state)
assert torch.equal(b.cpu(), torch.randn(4, device=D, generator=g).cpu())
g.manual_seed(7)
assert torch.equal(a.cpu(), torch.randn(4, device=D, generator=g).cpu())
assert torch.Generator(device=other).device == other

# Pinned memory, also through a view of it and by a DataLoader.
pinned = torch.arange(8.0).pin_memory()
assert pinned.is_pinned() and pinned[3:].is_pinned() and not torch.ones(3).is_pinned()
assert torch.equal(pinned.to(D, non_blocking=True).cpu(), torch.arange(8.0))
data = torch.utils.data.TensorDataset(torch.arange(8.0))
for (batch,) in torch.utils.data.DataLoader(data, 4, pin_memory=True):
    assert batch.is_pinned()

# Streams and events.
stream = torch.npu.Stream()
assert stream.device == h.device and stream != torch.npu.current_stream()
with torch.npu.stream(stream):
    assert torch.npu.current_stream() == stream == torch.accelerator.current_stream()
assert torch.npu.current_stream() == torch.npu.default_stream()
begin, end = (torch.npu.Event(enable_timing=True) for _ in range(2))
begin.record()
torch.ones(64, 64, device=D) @ torch.ones(64, 64, device=D)
end.record(stream)
stream.wait_event(end)
assert end.query() and begin.elapsed_time(end) > 0 and isinstance(end, torch.npu.Event)
stream.synchronize()
torch.accelerator.synchronize()
assert torch.accelerator.get_memory_info() == (0, 0)  # the chip does not tell

# Memory is counted, and goes back.
gc.collect()
before = torch.npu.memory_allocated(1)
held = torch.ones(1000, device=other)
held = held + 1
assert torch.accelerator.memory_allocated(1) == torch.npu.memory_allocated(1) == before + 4000
assert torch.accelerator.max_memory_allocated(1) >= before + 8000
torch.accelerator.reset_peak_memory_stats(1)
assert torch.npu.max_memory_allocated(1) == before + 4000
del held
assert torch.npu.memory_allocated(1) == before

if {memory!r} != "shared":
    # The backend's own exceptions, from C++, from another thread; memory that does not go back.
    (chip,) = h.backends
    w = torch.ones(1000, device=other, requires_grad=True)
    loss = w.sum()
    chip.limit = sum(map(len, chip.live.values())) + 200
    for act in (lambda: torch.empty(1000, device=D), lambda: torch.UntypedStorage(4000, device=D),
                lambda: s.resize_(4000), lambda: w + 1, lambda: loss.backward()):
        error = raises(OutOfMemory, "smaller batch", act)
        assert error.requested == 4000, error.requested
    chip.limit = 1 << 40
    assert s.nbytes() == 24 and s[:8].tolist() == [3] * 8
    kept, chip.free = chip.free, lambda *_: 1 / 0
    said = []
    sys.unraisablehook = said.append
    torch.empty(10, device=D)
    chip.free = kept
    assert [each.exc_type for each in said] == [ZeroDivisionError]

pid = os.fork()
if not pid:
    t = torch.ones(3, device=other) + 1
    os._exit(0 if t.tolist() == [2] * 3 else 1)
assert os.waitpid(pid, 0)[1] == 0
sys.stderr.kept = [torch.ones(100, device=D), torch.npu.Stream(), g]  # outlive the interpreter
print("end")
"""

TWO_WITHOUT = """
register(count=2)
torch.autograd.graph._engine_run_backward = torch.autograd.graph._engine_run_backward.__wrapped__
torch.autograd._engine_run_backward = torch.autograd.graph._engine_run_backward
w = torch.ones(3, device="npu:1", requires_grad=True)
raises(RuntimeError, "INTERNAL ASSERT", (w * w).sum().backward)
"""

SHARDED = """
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
child = os.fork()  # two ranks
rank = 0 if child else 1
h = register({memory!r})
D = "npu"
store = dist.FileStore(os.path.abspath("store"), 2)
dist.init_process_group("npu_ccl", store=store, rank=rank, world_size=2)
mesh = dist.device_mesh.init_device_mesh(D, (2,))
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
sharded = copy.deepcopy(model).to(D)
for layer in (sharded[0], sharded[2], sharded):
    fully_shard(layer, mesh=mesh)
replicated = nn.parallel.DistributedDataParallel(copy.deepcopy(model).to(D),
                                                 find_unused_parameters=True)
x = torch.randn(4, 8)
before = model[0].weight.detach().clone()
for part, batch in ((model, x), (sharded, x[rank::2].to(D)), (replicated, x[rank::2].to(D))):
    optimizer = torch.optim.SGD(part.parameters(), lr=0.1)
    for _ in range(3):
        part(batch).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
assert not torch.allclose(model[0].weight, before, atol=1e-4)
for whole, part, copied in zip(model.parameters(), sharded.parameters(), replicated.parameters()):
    assert part.to_local().shape[0] == whole.shape[0] // 2
    assert torch.allclose(whole, part.full_tensor().cpu(), atol=1e-6)
    assert torch.allclose(whole, copied.cpu(), atol=1e-6)
dist.destroy_process_group()
if not child:
    sys.stdout.flush()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print("end")
"""

NO_COMPILER = """
chip = SharedChip("npu")
raises(BadInput, "no digits", lambda: register_custom_device(chip, Config("npu0", shim="require")))
error = raises(Unsupported, "apt-get install g++",
               lambda: register_custom_device(chip, Config(shim="require")))
assert "there is no C++ compiler" in str(error) and "shim='auto'" in str(error)
assert torch._C._get_privateuse1_backend_name() == "privateuseone" and registered() is None
h = register_custom_device(chip, Config(shim="auto", fallback="allow"))
assert not h.shim and "there is no C++ compiler" in h.without_shim, h.without_shim
assert (torch.ones(2, device="npu") + 1).tolist() == [2, 2]
print("end")
"""

BESIDE_ANOTHER = """
register(count=2, accelerator=False)  # torch.accelerator is another's, or nobody's
assert torch.accelerator.current_accelerator() is None and not torch.accelerator.is_available()
stream = torch.npu.Stream(1)
with torch.npu.stream(stream):
    assert torch.npu.current_stream(1) == stream and torch.npu.current_stream(0) != stream
torch.npu.set_stream(stream)
assert torch.npu.current_stream(1) == stream
w = torch.ones(3, device="npu:1", requires_grad=True)
(w * 2).sum().backward()
assert w.grad.tolist() == [2] * 3
print("end")
"""

AUTO = """
h = register_custom_device(SharedChip("npu"), Config(fallback="allow"))
assert (torch.ones(2, device="npu") + 1).tolist() == [2, 2]
print(h.shim, h.without_shim, sep=": ")
"""


@pytest.mark.timeout(400)  # of which the build takes most
def test_what_torch_asks_for_in_cpp_is_there_with_the_shim(
    with_shim: Callable[..., str], built: Path, run: Callable[..., str], tmp_path: Path
) -> None:
    assert with_shim(NATIVE.format(memory="shared")).split()[-1] == "end"
    # A build that is there is used without being asked for; one that was changed is not loaded.
    assert run(AUTO, DRIVETRAIN_CACHE=str(built)) == "True: \n"
    changed = tmp_path / "changed"
    shutil.copytree(built, changed)
    (library,) = changed.glob("shim/*.so")
    library.chmod(0o700)
    with library.open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(b"\1")
    said = run(AUTO, DRIVETRAIN_CACHE=str(changed))
    assert said.startswith("False: it has not been built"), said
    assert "python -m drivetrain.pytorch.custom.shim" in said
    assert not library.exists()


def test_without_a_compiler_the_shim_is_refused_or_done_without(
    run: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "bin").mkdir()
    cache = str(tmp_path / "cache")
    assert "end" in run(NO_COMPILER, PATH=str(tmp_path / "bin"), CXX="", DRIVETRAIN_CACHE=cache)
    assert not (tmp_path / "cache").exists()


@pytest.mark.soak
@pytest.mark.parametrize("memory", ["visible", "opaque"])
def test_what_torch_asks_for_in_cpp_is_there_for_memory_of_the_backend(
    with_shim: Callable[..., str], memory: str
) -> None:
    assert with_shim(NATIVE.format(memory=memory)).split()[-1] == "end"


@pytest.mark.soak
def test_a_device_that_is_not_the_accelerator_has_its_streams(
    with_shim: Callable[..., str],
) -> None:
    assert "end" in with_shim(BESIDE_ANOTHER)


@pytest.mark.soak
def test_backward_on_a_second_device_needs_one_thread_or_the_shim(run: Callable[..., str]) -> None:
    """The control: Python's device guard knows one device."""
    run(TWO_WITHOUT)


@pytest.mark.soak
@pytest.mark.parametrize("memory", ["shared", "opaque"])
def test_sharded_and_replicated_models_train_with_the_shim(
    with_shim: Callable[..., str], memory: str
) -> None:
    assert "end" in with_shim(SHARDED.format(memory=memory))


def build(cache: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "drivetrain.pytorch.custom.shim"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "DRIVETRAIN_CACHE": str(cache), **environment},
    )


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_of_two_builders_one_compiles_and_a_damaged_build_is_made_anew(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    both = [build(cache), build(cache)]
    ends = [each.communicate() for each in both]
    assert [each.returncode for each in both] == [0, 0], ends
    assert sum("building the C++ shim" in err for _, err in ends) == 1
    (path,) = {out.strip() for out, _ in ends}
    assert not any(os.stat(each).st_mode & 0o077 for each in (cache, cache / "shim"))
    whole = Path(path).read_bytes()
    Path(path).chmod(0o700)
    Path(path).write_bytes(whole[:-1])
    again = build(cache)
    out, err = again.communicate()
    assert again.returncode == 0, err
    assert "building the C++ shim" in err
    (library,) = (cache / "shim").glob("*.so")
    assert str(library) == out.strip()
    assert [each.name for each in (cache / "shim").iterdir() if each.name.startswith(".new")] == []
    # Another compiler's build is another one; without any compiler, what is there serves.
    none = build(cache, PATH="/nowhere", CXX="")
    assert none.communicate()[0] == out
    (cache / "shim").chmod(0o755)
    open_to_all = build(cache)
    _, err = open_to_all.communicate()
    assert open_to_all.returncode == 1
    assert "others may use it (mode 0755)" in err


@pytest.mark.soak
def test_a_compiler_that_fails_or_hangs_is_told(run: Callable[..., str], tmp_path: Path) -> None:
    broken = tmp_path / "broken-cxx"
    broken.write_text("#!/bin/sh\necho 'internal compiler error: on purpose' >&2\nexit 4\n")
    broken.chmod(0o700)
    asked = """
    raises(Unsupported, {text!r}, lambda: register_custom_device(SharedChip("npu"),
                                                                 Config(shim="require")))
    assert registered() is None
    print("end")
    """
    text = "the compiler failed (exit 4): internal compiler error: on purpose"
    assert "end" in run(asked.format(text=text), CXX=str(broken), DRIVETRAIN_CACHE=str(tmp_path))
    # What it gives is tried in another process first.
    library = tmp_path / "no-library-cxx"
    library.write_text('#!/bin/sh\nfor last; do :; done\n[ "$1" = --version ] || echo > "$last"\n')
    library.chmod(0o700)
    text = "loading what was built failed (exit 1)"
    assert "end" in run(asked.format(text=text), CXX=str(library), DRIVETRAIN_CACHE=str(tmp_path))
    # A builder that is ended takes its compiler with it, and leaves nothing that is taken for a
    # build.
    hanging = tmp_path / "hanging-cxx"
    hanging.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && exit\necho $$ > {tmp_path}/pid\nexec sleep 1000\n'
    )
    hanging.chmod(0o700)
    builder = build(tmp_path, CXX=str(hanging))
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().strip():
        time.sleep(0.05)
    builder.send_signal(2)
    builder.communicate()
    assert builder.returncode != 0
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()
    assert not list((tmp_path / "shim").glob("*.so"))
