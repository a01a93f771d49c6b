"""The same bytes for others and theirs for us, both ways, without a copy."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from drivetrain import hal
from drivetrain.errors import BadInput, HalError
from drivetrain.hal import MemoryKind, dlpack
from drivetrain.hal.bytes import native
from drivetrain.hal.opened import opened

numpy = pytest.importorskip("numpy")


@pytest.fixture(autouse=True)
def _only_the_cpu(tmp_path: Path) -> None:
    (tmp_path / "drivetrain.toml").write_text('[drivers]\ndisable = ["opencl"]\n')


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch")


def cpu() -> tuple[hal.Device, hal.Stream]:
    device = hal.device("cpu:0")
    return device, device.stream()


def test_numpy_and_torch_see_a_buffers_own_bytes(torch: Any) -> None:
    device, stream = cpu()
    buffer = device.alloc(1000, stream=stream)
    buffer.fill(b"\x05", stream=stream)  # asking for the bytes waits for it
    array, tensor = numpy.from_dlpack(buffer), torch.from_dlpack(buffer)
    assert array.ctypes.data == tensor.data_ptr() == buffer.ptr
    assert array.dtype == numpy.uint8
    assert tensor.dtype == torch.uint8
    assert array.shape == tuple(tensor.shape) == (1000,)
    assert (array == 5).all()
    tensor[10] = 77
    assert array[10] == 77
    back = bytearray(1000)
    buffer.copy_to(back, stream=stream)
    stream.synchronize()
    assert back[10] == 77


def test_arrays_and_tensors_become_buffers_of_the_same_bytes(torch: Any) -> None:
    device, stream = cpu()
    for made in (
        numpy.arange(24, dtype=numpy.float32).reshape(2, 3, 4),
        torch.arange(24, dtype=torch.bfloat16).reshape(4, 6),
        torch.arange(5, dtype=torch.int64),
        numpy.zeros((), dtype=numpy.float64),
        torch.zeros(3, 0),
        numpy.ones((3, 1, 2), dtype=bool),
        torch.ones(2, 1, 3).transpose(0, 1),
    ):
        buffer = hal.from_dlpack(made)
        assert buffer.device == device
        nbytes = made.nbytes
        assert buffer.nbytes == nbytes
        address = made.ctypes.data if isinstance(made, numpy.ndarray) else made.data_ptr()
        if nbytes:
            assert buffer.ptr == address
            buffer.fill(b"\0", stream=stream)
            stream.synchronize()
            assert not made.any()
        back = bytearray(nbytes)
        buffer.copy_to(back, stream=stream)
        stream.synchronize()
        assert back == bytes(nbytes)


def test_a_buffer_is_a_tensor_for_us_too() -> None:
    device, stream = cpu()
    one = device.alloc(64, stream=stream)
    two = hal.from_dlpack(one)
    assert (two.ptr, two.nbytes) == (one.ptr, 64)


def test_the_memory_lives_as_long_as_anybody_looks(torch: Any) -> None:
    device, stream = cpu()
    pool = hal.Pool(hal.DriverMemory(device))
    for take in (numpy.from_dlpack, torch.from_dlpack, lambda b: b.__dlpack__()):
        buffer = device.alloc(4096, stream=stream, pool=pool)
        look = take(buffer)
        del buffer
        gc.collect()
        assert pool.stats().live == 1
        del look
        gc.collect()
        assert pool.stats().live == 0
    assert dlpack._exported == {}


def test_theirs_lives_as_long_as_our_buffer_or_a_view_of_it(torch: Any) -> None:
    class Array(numpy.ndarray):
        pass

    array = numpy.zeros(100, dtype=numpy.uint8).view(Array)
    left = weakref.ref(array)
    view = hal.from_dlpack(array).view(10, 20)
    del array
    gc.collect()
    assert left() is not None
    view.close()
    del view
    gc.collect()
    assert left() is None


def test_what_is_not_contiguous_or_no_array_is_refused(torch: Any) -> None:
    for wrong, why in (
        (numpy.zeros((4, 4), dtype=numpy.int32).T[1:], "contiguous"),
        (torch.zeros(4, 6)[:, ::2], "contiguous"),
        (torch.zeros(4, 6).t(), "contiguous"),
        (torch.zeros(3, dtype=torch.complex64), "not known"),
        (b"bytes", "no __dlpack__"),
        (None, "no __dlpack__"),
        (torch.zeros(2, requires_grad=True), "does not give it"),
        (numpy.frombuffer(b"read-only bytes", dtype=numpy.uint8), "does not give it"),
    ):
        with pytest.raises(BadInput, match=why):
            hal.from_dlpack(wrong)


def test_a_capsule_is_taken_once() -> None:
    device, stream = cpu()
    capsule = device.alloc(16, stream=stream).__dlpack__()
    first = dlpack.Imported(capsule)
    assert first.shape == (16,)
    with pytest.raises(BadInput, match="fresh"):
        dlpack.Imported(capsule)


def test_what_the_protocol_lets_a_consumer_ask_for(torch: Any) -> None:
    device, stream = cpu()
    buffer = device.alloc(16, stream=stream)
    assert buffer.__dlpack_device__() == (1, 0)
    buffer.__dlpack__(max_version=(1, 1), dl_device=(1, 0), copy=False)
    with pytest.raises(BadInput, match="copy"):
        buffer.__dlpack__(copy=True)
    with pytest.raises(BadInput, match="device"):
        buffer.__dlpack__(dl_device=(2, 0))
    buffer.close()
    with pytest.raises(BadInput, match="closed"):
        buffer.__dlpack__()


def test_a_gpus_buffer_says_where_it_is(rig_of: Callable[[str], Any]) -> None:
    rig = rig_of("cuda")
    stream = rig.other.stream()
    assert rig.alloc(16, stream).__dlpack_device__() == (dlpack.CUDA, 1)
    managed = rig.alloc(16, stream, kind=MemoryKind.MANAGED)
    assert managed.__dlpack_device__() == (dlpack.CUDA_MANAGED, 1)
    pinned = rig.alloc(16, stream, kind=MemoryKind.PINNED)
    assert pinned.__dlpack_device__() == (dlpack.CPU, 0)
    assert numpy.from_dlpack(pinned).ctypes.data == pinned.ptr
    simulated = rig_of("simulated")
    with pytest.raises(BadInput, match="no word"):
        simulated.alloc(16, simulated.device.stream()).__dlpack_device__()


@pytest.mark.skipif(native is None, reason="not built: what runs at a capsule's end is Python")
def test_a_consumer_that_refuses_has_its_own_error_and_keeps_nothing(
    rig_of: Callable[[str], Any],
) -> None:
    rig = rig_of("cuda")
    stream = rig.device.stream()
    pool = hal.Pool(hal.DriverMemory(rig.device))
    with pytest.raises((BufferError, RuntimeError), match="nsupported device"):
        numpy.from_dlpack(rig.device.alloc(64, stream=stream, pool=pool))
    gc.collect()
    assert pool.stats().live == 0


def test_a_gpus_tensor_is_wrapped_on_its_device(
    rig_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = rig_of("cuda")
    stream = rig.device.stream()
    memory = rig.alloc(64, stream)
    asked: list[Any] = []

    class Tensor:
        def __dlpack_device__(self) -> tuple[int, int]:
            return (dlpack.CUDA, 0)

        def __dlpack__(self, *, stream: Any = None) -> Any:
            asked.append(stream)
            return dlpack.export(memory, (8, 8), (8, 1), "uint8")

    monkeypatch.setattr("drivetrain.hal.registry.device", lambda address: rig.device)
    found = hal.from_dlpack(Tensor(), stream=stream)
    assert (found.device, found.ptr, found.nbytes) == (rig.device, memory.ptr, 64)
    assert asked == [stream.handle]

    class Elsewhere(Tensor):
        def __dlpack__(self, *, stream: Any = None) -> Any:
            capsule = dlpack.export(memory, (8, 8), (8, 1), "uint8")
            address = dlpack._api.PyCapsule_GetPointer(capsule, b"dltensor")
            dlpack._Managed.from_address(address).tensor.device.device_type = 99
            return capsule

    with pytest.raises(HalError, match="99"):
        hal.from_dlpack(Elsewhere())


def test_threads_without_python_may_let_go_of_a_tensor(torch: Any) -> None:
    """torch frees tensors on threads of its own."""
    device, stream = cpu()
    pool = hal.Pool(hal.DriverMemory(device))

    def work() -> None:
        for _ in range(50):
            tensor = torch.from_dlpack(device.alloc(512, stream=stream, pool=pool))
            tensor.float().requires_grad_().sum().backward()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    assert pool.stats().live == 0


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_a_tensor_that_is_left_at_the_end_does_not_break_the_exit(library: str) -> None:
    pytest.importorskip(library)
    code = (
        f"import {library}\n"
        "from drivetrain import hal\n"
        "device = hal.device('cpu:0')\n"
        "stream = device.stream()\n"
        "buffer = device.alloc(64, stream=stream)\n"
        f"left = {library}.from_dlpack(buffer)\n"
        f"ours = hal.from_dlpack({library}.zeros(4))\n"
        "print('end')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "end", "")


def test_closing_a_device_leaves_wrapped_memory_alone() -> None:
    array = numpy.zeros(8, dtype=numpy.uint8)
    buffer = hal.from_dlpack(array)
    assert opened(buffer.device)
    hal.close_all()
    buffer.close()
    array[0] = 1
