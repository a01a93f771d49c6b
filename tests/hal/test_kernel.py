"""Kernels, launches and plans: what arrives, and what is refused before the driver sees it."""

from __future__ import annotations

import ctypes
import gc
import math
import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivetrain import hal
from drivetrain.errors import BadInput, CompileError, HalError, Unsupported
from drivetrain.hal.opened import opened

RIGHT: dict[str, list[Any]] = {
    "i8": [-128, 127, 0],
    "i16": [-32768, 32767],
    "i32": [-(2**31), 2**31 - 1],
    "i64": [-(2**63), 2**63 - 1],
    "u8": [0, 255],
    "u16": [0, 65535],
    "u32": [0, 2**32 - 1],
    "u64": [0, 2**64 - 1, 2**63],
    "f16": [1.5, -65504.0, 2],
    "bf16": [1.0, -3.0e38, 7],
    "f32": [1.5, -3.4e38, 7, math.inf, True],
    "f64": [1e300, -2, math.inf],
    "struct": [b"abcdefghijkl", bytearray(12)],
}
WRONG: dict[str, list[Any]] = {
    "i8": [-129, 128, 1.0, "1", None],
    "i16": [-32769, 32768],
    "i32": [-(2**31) - 1, 2**31, 2**80, 10**5000, 0.5, b"1"],
    "i64": [-(2**63) - 1, 2**63],
    "u8": [-1, 256],
    "u16": [-1, 65536],
    "u32": [-1, 2**32],
    "u64": [-1, 2**64, 1.5, None],
    "f16": [1e6, "1", None],
    "bf16": ["1", b"1"],
    "f32": [1e39, -1e300, 10**400, "1", None, 1j],
    "f64": [10**400, "1", None],
    "struct": [b"short", b"much too long for it", 12, None],
}
EXPECTED = {
    "i8": "<b",
    "i16": "<h",
    "i32": "<i",
    "i64": "<q",
    "u8": "<B",
    "u16": "<H",
    "u32": "<I",
    "u64": "<Q",
    "f16": "<e",
    "f32": "<f",
    "f64": "<d",
}
ORDER = list(RIGHT)


@pytest.fixture(params=["cpu", "simulated"])
def echo(request: pytest.FixtureRequest, rig_of: Callable[[str], Any]) -> Any:
    """(rig, stream, buffer of 13 * 16 bytes, kernel that stores its arguments there)"""
    rig = rig_of(request.param)
    stream = rig.device.stream()
    return rig, stream, rig.alloc(13 * 16, stream), rig.kernel("echo")


def bytes_of(kind: str, value: Any) -> bytes:
    if kind == "struct":
        return bytes(value)
    if kind == "bf16":
        return struct.pack("<f", value)[2:] if value != -3.0e38 else b"\x62\xff"
    return struct.pack(EXPECTED[kind], value)


def test_every_type_of_argument_arrives_as_it_was_given(echo: Any) -> None:
    rig, stream, out, kernel = echo
    for turn in range(5):
        values = [RIGHT[kind][turn % len(RIGHT[kind])] for kind in ORDER]
        kernel(stream, 1, 1, out, *values)
        found = rig.read(out, stream)
        for at, (kind, value) in enumerate(zip(ORDER, values, strict=True)):
            told = bytes_of(kind, value)
            if at == 0:
                continue  # the size of dynamic shared memory is there
            assert found[16 * at : 16 * at + len(told)] == told, (kind, value)


def test_numpy_scalars_are_numbers_too(echo: Any) -> None:
    numpy = pytest.importorskip("numpy")
    rig, stream, out, kernel = echo
    of = {"f16": numpy.float16, "bf16": numpy.float32, "f32": numpy.float32, "f64": numpy.float64}
    values: list[Any] = []
    for kind in ORDER[:-1]:
        make = of.get(kind) or getattr(numpy, kind.replace("i", "int").replace("u", "uint"))
        values.append(make(1))
    kernel(stream, 1, 1, out, *values, bytes(12))
    found = rig.read(out, stream)
    for at, kind in enumerate(ORDER[1:-1], 1):
        told = bytes_of(kind, 1)
        assert found[16 * at : 16 * at + len(told)] == told, kind


@pytest.mark.parametrize("kind", ORDER)
def test_a_value_of_another_type_or_range_is_refused_and_named(echo: Any, kind: str) -> None:
    _, stream, out, kernel = echo
    values = [RIGHT[each][0] for each in ORDER]
    at = ORDER.index(kind)
    plan = kernel.plan(stream, 1, 1, out, *values)
    for value in WRONG[kind]:
        wrong = [*values[:at], value, *values[at + 1 :]]
        with pytest.raises(BadInput, match=f"argument {at + 1}"):
            kernel(stream, 1, 1, out, *wrong)
        with pytest.raises(BadInput, match=f"argument {at + 1}"):
            kernel.plan(stream, 1, 1, out, *wrong)
        with pytest.raises(BadInput, match=f"argument {at + 1}"):
            plan.set(at + 1, value)
    plan()


@given(st.floats(width=32, allow_nan=False), st.integers(-(2**63), 2**64 - 1))
def test_numbers_are_packed_as_struct_packs_them(number: float, whole: int) -> None:
    from drivetrain.hal.kernel import TYPES, packed

    assert packed(hal.F32, number) == struct.pack("<f", number)
    assert packed(hal.F64, number) == struct.pack("<d", number)
    for kind in TYPES.values():
        if kind.least or kind.most:
            if kind.least <= whole <= kind.most:
                assert packed(kind, whole) == struct.pack("<" + kind.code, whole)
            else:
                with pytest.raises(BadInput):
                    packed(kind, whole)


@given(st.floats(width=32))
def test_bfloat16_is_rounded_to_the_nearest(number: float) -> None:
    from drivetrain.hal.kernel import packed

    torch = pytest.importorskip("torch")
    expected = torch.tensor(number, dtype=torch.float32).to(torch.bfloat16)
    found = struct.unpack("<H", packed(hal.BF16, number))[0]
    if math.isnan(number):
        assert found & 0x7FFF > 0x7F80
    else:
        assert found == expected.view(torch.int16).item() & 0xFFFF


def test_a_grid_covers_every_block_once(rig_of: Callable[[str], Any]) -> None:
    for driver in ("cpu", "simulated"):
        rig = rig_of(driver)
        stream = rig.device.stream()
        each = rig.kernel("each")
        for grid in (1, 7, 1000, (10, 10), (3, 5, 7)):
            count = math.prod(grid) if isinstance(grid, tuple) else grid
            out = rig.alloc(4 * count, stream)
            out.fill(b"\0", stream=stream)
            each(stream, grid, 1, out)
            assert rig.read(out, stream) == struct.pack("<i", 1) * count


def test_dynamic_shared_memory_is_told_to_the_kernel(echo: Any) -> None:
    rig, stream, out, kernel = echo
    values = [RIGHT[kind][0] for kind in ORDER]
    for nbytes in (0, 1, 4096):
        kernel(stream, 1, 1, out, *values, shared=nbytes)
        assert struct.unpack("<I", rig.read(out, stream)[:4])[0] == nbytes


def test_a_plan_repeats_its_launch_with_the_arguments_of_now(rig: Any) -> None:
    stream = rig.device.stream()
    one, two = rig.alloc(4, stream), rig.alloc(4, stream)
    for buffer in (one, two):
        buffer.fill(b"\0", stream=stream)
    plan = rig.kernel("add").plan(stream, 1, 1, one, 5)
    plan()
    plan()
    plan.set(1, 7)
    plan()
    plan.set(0, two)
    plan()
    assert (rig.number(one, stream), rig.number(two, stream)) == (17, 7)
    with pytest.raises(BadInput, match="no 2"):
        plan.set(2, 1)
    with pytest.raises(BadInput):
        plan.set(-1, 1)
    with pytest.raises(TypeError):
        plan(1)
    two.close()
    with pytest.raises(BadInput, match="closed"):
        plan()
    assert rig.number(one, stream) == 17


def test_a_plan_keeps_its_buffers_alive(rig: Any) -> None:
    stream = rig.device.stream()
    plan = rig.kernel("add").plan(stream, 1, 1, rig.alloc(4, stream), 5)
    gc.collect()
    for _ in range(5):
        rig.alloc(4, stream).fill(b"\0", stream=stream)
        plan()
    stream.synchronize()


def test_none_is_a_null_pointer(rig: Any) -> None:
    stream = rig.device.stream()
    value = rig.alloc(4, stream)
    plan = rig.kernel("store").plan(stream, 1, 1, None, 3)
    plan.set(0, value)
    plan()
    assert rig.number(value, stream) == 3


def test_a_buffer_of_another_stream_is_used_and_noted(rig: Any) -> None:
    """Launched on a stream that is not the buffer's: the memory waits for it."""
    home, user = rig.device.stream(), rig.device.stream()
    value = rig.alloc(4, home)
    value.fill(b"\0", stream=home)
    user.wait(home)
    rig.slow(user, 0.05)
    for _ in range(3):
        rig.kernel("add")(user, 1, 1, value, 1)
    done = user.record()
    value.close()
    again = rig.alloc(4, home)
    again.fill(b"\0", stream=home)
    home.synchronize()
    assert done.done


def launches(rig: Any) -> dict[str, Callable[[], object]]:
    """Every call here is wrong."""
    stream, far = rig.device.stream(), rig.other.stream()
    closed_stream = rig.device.stream()
    closed_stream.close()
    buffer, closed = rig.alloc(64, stream), rig.alloc(64, stream)
    whole = rig.alloc(64, stream)
    part = whole.view(0, 8)
    whole.close()
    closed.close()
    far_buffer = rig.alloc(64, far)
    add, nothing = rig.kernel("add"), rig.kernel("nothing")
    limits = opened(rig.device).backend.limits

    def plan_closed() -> None:
        held = rig.alloc(64, stream)
        plan = add.plan(stream, 1, 1, held, 1)
        held.close()
        plan()

    return {
        "too few": lambda: add(stream, 1, 1, buffer),
        "too many": lambda: add(stream, 1, 1, buffer, 1, 2),
        "far too many": lambda: add(stream, 1, 1, buffer, *range(200)),
        "none for some": lambda: add(stream, 1, 1),
        "some for none": lambda: nothing(stream, 1, 1, 1),
        "number for a pointer": lambda: add(stream, 1, 1, 4096, 1),
        "buffer for a number": lambda: add(stream, 1, 1, buffer, buffer),
        "freed": lambda: add(stream, 1, 1, closed, 1),
        "part of a freed": lambda: add(stream, 1, 1, part, 1),
        "freed after planning": plan_closed,
        "other device's buffer": lambda: add(stream, 1, 1, far_buffer, 1),
        "other device's stream": lambda: add(far, 1, 1, buffer, 1),
        "other device's stream, plan": lambda: add.plan(far, 1, 1, buffer, 1),
        "closed stream": lambda: add(closed_stream, 1, 1, buffer, 1),
        "no stream": lambda: add(None, 1, 1, buffer, 1),
        "buffer for a stream": lambda: add(buffer, 1, 1, buffer, 1),
        "grid of 0": lambda: nothing(stream, 0, 1),
        "grid below 0": lambda: nothing(stream, -1, 1),
        "grid too large": lambda: nothing(stream, limits.grid[0] + 1, 1),
        "grid far too large": lambda: nothing(stream, 1 << 70, 1),
        "grid too large in y": lambda: nothing(stream, (1, limits.grid[1] + 1), 1),
        "grid too large in z": lambda: nothing(stream, (1, 1, limits.grid[2] + 1), 1),
        "grid of four": lambda: nothing(stream, (1, 1, 1, 1), 1),
        "grid of none": lambda: nothing(stream, (), 1),
        "grid of halves": lambda: nothing(stream, 1.5, 1),
        "grid of text": lambda: nothing(stream, "12", 1),
        "no grid": lambda: nothing(stream, None, 1),
        "grid of mixed": lambda: nothing(stream, (1, "2"), 1),
        "block of 0": lambda: nothing(stream, 1, 0),
        "block too large": lambda: nothing(stream, 1, limits.block[0] + 1),
        "block too large in z": lambda: nothing(stream, 1, (1, 1, limits.block[2] + 1)),
        "too many threads": lambda: nothing(stream, 1, (limits.threads, 2)),
        "shared below 0": lambda: nothing(stream, 1, 1, shared=-1),
        "shared too large": lambda: nothing(stream, 1, 1, shared=limits.shared_bytes + 1),
        "shared of halves": lambda: nothing(stream, 1, 1, shared=0.5),
        "no such kernel": lambda: rig.modules[rig.device.address].kernel("nothin", []),
        "no name": lambda: rig.modules[rig.device.address].kernel("", []),
        "no types": lambda: rig.modules[rig.device.address].kernel("add"),
        "wrong types": lambda: rig.modules[rig.device.address].kernel("add", ["ptr", int]),
        "no source": lambda: rig.device.compile("__global__ void f() {}"),
    }


def test_bad_launches_are_told_and_the_driver_is_not_called(
    rig: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = launches(rig)
    seen: list[str] = []
    for device in (rig.device, rig.other):
        monkeypatch.setattr(opened(device).backend, "launch", lambda *a: seen.append("launch"))
    if rig.fake is not None:
        rig.fake.forget()
    wrong: dict[str, str] = {}
    for what, call in calls.items():
        try:
            call()
        except BadInput as error:
            if len(str(error)) < 20:
                wrong[what] = f"says only {error}"
        except TypeError as error:
            if "takes" not in str(error) and "too many" not in str(error):
                wrong[what] = repr(error)
        except Exception as error:
            wrong[what] = repr(error)
        else:
            wrong[what] = "was taken"
    assert wrong == {}
    assert seen == []
    if rig.fake is not None:
        assert "cuLaunchKernel" not in rig.fake.names()
    monkeypatch.undo()


def test_the_control_a_right_launch_reaches_the_driver(
    rig: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = rig.device.stream()
    kernel = rig.kernel("nothing")
    if rig.fake is not None:
        rig.fake.forget()
        kernel(stream, 1, 1)
        assert rig.fake.names().count("cuLaunchKernel") == 1
        return
    value = rig.alloc(4, stream)
    rig.kernel("store")(stream, 1, 1, value, 9)
    assert rig.number(value, stream) == 9


def test_code_that_is_none_is_refused_in_words(rig: Any) -> None:
    if rig.driver == "cuda":
        bad = hal.Source.binary(b".version 7.0\n.target sm_90\n", "ptx")
        with pytest.raises(CompileError, match="line 3") as caught:
            rig.device.compile(bad)
        assert "a word that the fake does not know" in caught.value.log
        with pytest.raises(BadInput, match="so"):
            rig.device.compile(hal.Source.binary(b"\x7fELF", "so"))
        return
    with pytest.raises(CompileError):
        rig.device.compile(hal.Source.binary(b"\x7fELF" + bytes(100), "so"))
    with pytest.raises(BadInput, match="ptx"):
        rig.device.compile(hal.Source.binary(b".version 7.0\n.target sm_90\n", "ptx"))


def test_a_device_without_compute_has_no_kernels(
    rig_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = rig_of("simulated")
    monkeypatch.setenv("DRIVETRAIN_SIMULATED", "count=2 groups=pinned")
    with pytest.raises(Unsupported, match="compute"):
        rig.device.compile(rig.source)


def test_a_kernel_keeps_its_module_and_the_module_goes_with_the_last(rig: Any) -> None:
    stream = rig.device.stream()
    module = rig.device.compile(rig.source)
    kernel = module.kernel("add", [hal.PTR, hal.I32])
    value = rig.alloc(4, stream)
    value.fill(b"\0", stream=stream)
    del module
    gc.collect()
    kernel(stream, 1, 1, value, 2)
    assert rig.number(value, stream) == 2
    if rig.fake is not None:
        rig.fake.forget()
        del kernel
        gc.collect()
        assert "cuModuleUnload" in rig.fake.names()


def test_arguments_are_read_before_a_launch_returns(rig: Any) -> None:
    stream = rig.device.stream()
    value = rig.alloc(4, stream)
    value.fill(b"\0", stream=stream)
    rig.slow(stream, 0.05)
    plan = rig.kernel("add").plan(stream, 1, 1, value, 1)
    for n in (1, 10, 100):
        plan.set(1, n)
        plan()
    plan.set(1, 1000)
    assert rig.number(value, stream) == 111


def test_a_type_of_argument_tells_what_it_is() -> None:
    assert repr(hal.PTR) == "PTR"
    assert repr(hal.I32) == "I32"
    assert repr(hal.struct_of(12)) == "struct_of(12)"
    assert hal.struct_of(12) == hal.struct_of(12)
    for wrong in (0, -1, 5000):
        with pytest.raises(BadInput):
            hal.struct_of(wrong)
    assert ctypes.sizeof(ctypes.c_void_p) == hal.PTR.nbytes


def test_a_launch_that_fails_is_an_error_of_the_driver(
    rig_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = rig_of("simulated")
    stream = rig.device.stream()
    kernel = rig.kernel("nothing")
    opened(rig.device).backend.inject("launch:1:error")  # type: ignore[attr-defined]
    with pytest.raises(HalError, match="injected"):
        kernel(stream, 1, 1)
    kernel(stream, 1, 1)
