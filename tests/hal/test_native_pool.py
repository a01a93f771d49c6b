"""The pool in C: the rules of the other one, without Python's lock, for torch as well."""

from __future__ import annotations

import ctypes
import random
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drivetrain import hal
from drivetrain.errors import BadInput, HalError, OutOfMemory, Unsupported
from drivetrain.hal import hot
from drivetrain.hal.opened import opened

if hot.BACKEND != "native":
    pytest.skip("the C code is not used", allow_module_level=True)

from drivetrain.hal.native_pool import NativePool, _library, library_path

MIB = 1 << 20


@pytest.fixture
def rig(rig_of: Callable[[str], Any]) -> Any:
    return rig_of("cuda")


@pytest.fixture
def pool(rig: Any) -> Any:
    made = NativePool(rig.device)
    yield made
    if made._handle and not opened(rig.device).closed and not made.stats().live:
        made.close()


def test_buffers_come_from_it_and_go_back(rig: Any, pool: NativePool) -> None:
    stream = rig.device.stream()
    with rig.alloc(1000, stream, pool=pool) as buffer:
        assert buffer.ptr % 512 == 0
        buffer.fill(b"\x07", stream=stream)
        assert rig.read(buffer, stream) == b"\x07" * 1000
        stats = pool.stats()
        assert (stats.live, stats.requested, stats.allocated) == (1, 1000, 1024)
        assert stats.reserved == 2 * MIB
        ptr = buffer.ptr
    again = rig.alloc(1000, stream, pool=pool)
    assert again.ptr == ptr
    again.close()
    assert pool.trim() == 2 * MIB
    stats = pool.stats()
    assert (stats.live, stats.requested, stats.allocated, stats.reserved) == (0, 0, 0, 0)
    assert (stats.peak_requested, stats.peak_reserved) == (1000, 2 * MIB)
    assert stats.fragmentation == 0


def test_it_can_be_the_devices_own_pool(rig: Any, pool: NativePool) -> None:
    rig.device.use_pool(pool)
    assert rig.device.pool() is pool
    stream = rig.device.stream()
    for _ in range(3):
        with rig.device.alloc(5000, stream=stream) as buffer:
            buffer.fill(b"\0", stream=stream)
            assert pool.stats().live == 1
    rig.slow(stream, 0.1)
    with rig.device.alloc(5000, stream=stream) as buffer:
        buffer.fill(b"\0", stream=stream)  # still to come when the pool is closed
    with pytest.raises(BadInput, match="already"):
        rig.device.use_pool(hal.Pool(hal.DriverMemory(rig.device)))


def test_another_stream_gets_memory_only_behind_an_event(rig: Any, pool: NativePool) -> None:
    one, two = rig.device.stream(), rig.device.stream()
    buffer = rig.alloc(8 * MIB, one, pool=pool)
    ptr = buffer.ptr
    rig.slow(one, 0.1)
    after = one.record()
    buffer.close()
    rig.fake.forget()
    other = rig.alloc(8 * MIB, two, pool=pool)
    assert other.ptr == ptr
    assert rig.fake.names().count("cuEventRecord") == 1
    assert rig.fake.names().count("cuStreamWaitEvent") == 1
    two.synchronize()
    assert after.done
    other.close()


def test_memory_waits_for_the_streams_that_used_it(rig: Any, pool: NativePool) -> None:
    home, user = rig.device.stream(), rig.device.stream()
    library = _library()
    ptr = pool.allocate(4096, home.handle)
    rig.slow(user, 0.1)
    after = user.record()
    for stream in (user, user, home):
        assert library.dt_pool_used_by(pool._handle, ptr, stream.handle) == 0
    pool.deallocate(ptr, 4096, home.handle, ())
    assert pool.stats().live == 0
    second = pool.allocate(4096, home.handle)
    assert second != ptr  # it is not free yet
    assert not after.done
    user.synchronize()
    third = pool.allocate(4096, home.handle)
    assert third == ptr
    for each in (second, third):
        pool.deallocate(each, 4096, home.handle, ())
    assert library.dt_pool_used_by(pool._handle, ptr, user.handle) != 0  # it is nobody's now


def test_the_limit_holds_and_its_last_bytes_can_be_used(rig: Any) -> None:
    stream = rig.device.stream()
    with NativePool(rig.device, limit=21 * MIB) as pool:
        first = rig.alloc(2 * MIB, stream, pool=pool)
        with pytest.raises(OutOfMemory, match="limit") as caught:
            rig.alloc(20 * MIB, stream, pool=pool)
        assert caught.value.requested == 20 * MIB
        assert str(2 * MIB) in str(caught.value)
        first.close()
        rig.alloc(20 * MIB + 512, stream, pool=pool).close()
        assert pool.stats().reserved <= 21 * MIB
        assert pool.stats().failures == 1
    with pytest.raises(BadInput):
        NativePool(rig.device, limit=-1)


def test_out_of_memory_trims_and_tries_once_more(rig: Any, pool: NativePool) -> None:
    stream = rig.device.stream()
    _, total = opened(rig.device).backend.memory()
    rig.alloc(total // 2 + 2 * MIB, stream, pool=pool).close()
    with rig.alloc(total // 4 * 3, stream, pool=pool):
        assert pool.stats().retries == 1
        with pytest.raises(OutOfMemory) as caught:
            rig.alloc(total // 2, stream, pool=pool)
        assert (caught.value.total, caught.value.requested) == (total, total // 2)
        assert caught.value.free <= total // 4
        assert str(total // 4 * 3) in str(caught.value)
        assert caught.value.native == 2
    assert pool.stats().failures == 1
    with pytest.raises(OutOfMemory):
        pool.allocate(1 << 60, stream.handle)


def test_a_stream_that_is_captured_gets_nothing(rig: Any, pool: NativePool) -> None:
    stream, other = rig.device.stream(), rig.device.stream()
    let_go = rig.alloc(8 * MIB, stream, pool=pool)
    let_go.close()
    with stream.capture() as graph:
        with pytest.raises(HalError) as caught:
            pool.allocate(64, stream.handle)
        assert caught.value.code == "capturing"
        with rig.alloc(8 * MIB, other, pool=pool) as buffer:  # not what that stream let go
            buffer.fill(b"\0", stream=other)
        pool.trim()
    graph.launch(stream)
    stream.synchronize()


def test_what_a_stream_let_go_is_its_heirs(rig: Any, pool: NativePool) -> None:
    stream, other = rig.device.stream(), rig.device.stream()
    buffer = rig.alloc(8 * MIB, stream, pool=pool)
    held = rig.alloc(4096, stream, pool=pool)
    buffer.close()
    stream.close()
    held.close()
    again = rig.alloc(8 * MIB, other, pool=pool)
    again.fill(b"\x01", stream=other)
    assert rig.read(again, other)[:4] == b"\x01" * 4
    again.close()


def test_misuse_is_told(rig: Any, rig_of: Callable[[str], Any]) -> None:
    stream = rig.device.stream()
    pool = NativePool(rig.device)
    with pytest.raises(HalError) as caught:
        pool.deallocate(12345, 1, stream.handle, ())
    assert caught.value.code == "not_allocated"
    buffer = rig.alloc(64, stream, pool=pool)
    with pytest.raises(BadInput, match="1 buffers"):
        pool.close()
    buffer.close()
    pool.close()
    pool.close()
    for use in (lambda: pool.allocate(1, stream.handle), pool.stats, pool.trim):
        with pytest.raises(BadInput, match="closed"):
            use()
    assert rig.fake.live() == 0
    with pytest.raises(Unsupported, match="C functions"):
        NativePool(rig_of("simulated").device)


def test_the_context_that_was_current_is_current_again(rig: Any, pool: NativePool) -> None:
    stream = rig.device.stream()
    other = opened(rig.other).backend._context.handle  # type: ignore[attr-defined]
    rig.fake.library.cuCtxSetCurrent(ctypes.c_void_p(other))
    ptr = pool.allocate(3 * MIB, stream.handle)
    assert rig.fake.current() == other
    pool.deallocate(ptr, 3 * MIB, stream.handle, ())
    pool.trim()
    assert rig.fake.current() == other
    assert rig.fake.library.fake_depth() == 1


OPERATIONS = st.lists(
    st.tuples(
        st.integers(0, 2),  # stream
        st.one_of(st.integers(0, 4096), st.integers(0, 40 * MIB)),
        st.integers(0, 6),  # what
    ),
    max_size=60,
)


@given(operations=OPERATIONS)
@settings(max_examples=40)
def test_no_two_allocations_share_a_byte_and_the_numbers_add_up(
    operations: list[tuple[int, int, int]], fake_cuda_path: Path
) -> None:
    library = ctypes.CDLL(str(fake_cuda_path))
    with FakePool(library, limit=300 * MIB) as (pool, streams):
        live: dict[int, tuple[int, int]] = {}
        for on, nbytes, what in operations:
            stream = streams[on]
            if what < 4 or not live:
                box = ctypes.c_uint64()
                code = _library().dt_pool_alloc(pool, nbytes, stream, ctypes.byref(box))
                if code:
                    assert code in (1, 2)
                    continue
                for other, (size, _) in live.items():
                    assert box.value + max(nbytes, 1) <= other or other + max(size, 1) <= box.value
                live[box.value] = (nbytes, stream)
            elif what < 6:
                ptr = sorted(live)[nbytes % len(live)]
                _, home = live.pop(ptr)
                if what == 5:
                    assert _library().dt_pool_used_by(pool, ptr, stream) == 0
                assert _library().dt_pool_free(pool, ptr, home) == 0
            else:
                _library().dt_pool_trim(pool, nbytes)
            counts = read(pool)
            assert counts.live == len(live)
            assert counts.requested == sum(size for size, _ in live.values())
            assert counts.requested <= counts.allocated <= counts.reserved <= 300 * MIB
            assert counts.native == 0
            biggest = max((-(-max(size, 1) // 512) * 512 for size, _ in live.values()), default=0)
            assert counts.largest[0] >= biggest


def read(pool: int) -> Any:
    from drivetrain.hal.native_pool import _Counts

    counts = _Counts()
    _library().dt_pool_read(pool, ctypes.byref(counts))
    return counts


SYMBOLS = [
    *("cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2", "cuMemAlloc_v2", "cuMemFree_v2"),
    *("cuEventCreate", "cuEventDestroy_v2", "cuEventRecord", "cuEventQuery"),
    *("cuStreamWaitEvent", "cuStreamIsCapturing"),
]


class FakePool:
    """A pool over the fake library itself, and three streams; all is given back in the end."""

    def __init__(self, library: ctypes.CDLL, limit: int) -> None:
        from drivetrain.hal.native_pool import _CALLS, _Calls

        self.library = library
        for name in ("cuInit", "cuDevicePrimaryCtxRetain"):
            getattr(library, name).restype = ctypes.c_int
        assert library.cuInit(0) == 0
        context = ctypes.c_void_p()
        assert library.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) == 0
        assert library.cuCtxSetCurrent(context) == 0
        assert len(SYMBOLS) == len(_CALLS) - 1
        addresses = (ctypes.cast(library[name], ctypes.c_void_p).value for name in SYMBOLS)
        calls = _Calls(context.value, *addresses)
        self.pool = _library().dt_pool_new(ctypes.byref(calls), limit)
        self.streams: list[int] = []
        for _ in range(3):
            box = ctypes.c_void_p()
            assert library.cuStreamCreateWithPriority(ctypes.byref(box), 1, 0) == 0
            self.streams.append(box.value or 0)
        self.before = sum(library.fake_live(kind) for kind in range(4))

    def __enter__(self) -> tuple[int, list[int]]:
        return self.pool, self.streams

    def __exit__(self, *_: object) -> None:
        _library().dt_pool_close(self.pool)
        assert sum(self.library.fake_live(kind) for kind in range(4)) == self.before
        for stream in self.streams:
            self.library.cuStreamDestroy_v2(ctypes.c_void_p(stream))
        self.library.cuDevicePrimaryCtxRelease_v2(0)


# -- torch -----------------------------------------------------------------------------------------

THREADS = r"""
#include <atomic>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

typedef void *(*alloc_t)(size_t, int, void *);
typedef void (*free_t)(void *, size_t, int, void *);
typedef void (*record_t)(void *, void *);

/* As torch calls an allocator: on threads of its own, through std::function-like pointers. */
extern "C" int hammer(void *alloc, void *release, void *record, void **streams, int threads,
                      int turns) {
    std::atomic<int> wrong{0};
    std::vector<std::thread> all;
    for (int t = 0; t < threads; t++)
        all.emplace_back([=, &wrong] {
            void *stream = streams[t % 3], *other = streams[(t + 1) % 3];
            std::vector<std::pair<unsigned char *, size_t>> held;
            for (int i = 0; i < turns; i++) {
                size_t nbytes = (size_t)(1 + (i * 7919 + t) % 50000);
                auto *p = (unsigned char *)((alloc_t)alloc)(nbytes, 0, stream);
                if (!p) { wrong++; return; }
                p[0] = (unsigned char)t, p[nbytes - 1] = (unsigned char)t;
                if (i % 5 == 0) ((record_t)record)(p, other);
                held.push_back({p, nbytes});
                if (held.size() > 8) {
                    auto [q, n] = held.front();
                    if (q[0] != t || q[n - 1] != t) wrong++;
                    ((free_t)release)(q, n, 0, stream);
                    held.erase(held.begin());
                }
            }
            for (auto [q, n] : held) ((free_t)release)(q, n, 0, stream);
        });
    for (auto &each : all) each.join();
    return wrong;
}

extern "C" int refused(void *alloc, size_t nbytes, int index, void *stream, char *text) {
    try {
        ((alloc_t)alloc)(nbytes, index, stream);
    } catch (const std::runtime_error &error) {
        std::strncpy(text, error.what(), 511);
        return 1;
    }
    return 0;
}
"""


@pytest.fixture(scope="module")
def threads_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    folder = tmp_path_factory.mktemp("threads")
    (folder / "threads.cpp").write_text(THREADS)
    command = [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", "-pthread"]
    command += [str(folder / "threads.cpp"), "-o", str(folder / "threads.so")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder / "threads.so"


def pointer(library: ctypes.CDLL, name: str) -> ctypes.c_void_p:
    return ctypes.cast(library[name], ctypes.c_void_p)


def test_threads_allocate_while_another_one_holds_pythons_lock(
    fake_cuda_path: Path, threads_path: Path
) -> None:
    """PyDLL does not let go of the lock: were it asked for, the threads would wait for ever."""
    torch_side = ctypes.CDLL(library_path())
    threads = ctypes.PyDLL(str(threads_path))
    fake = ctypes.CDLL(str(fake_cuda_path))
    fake.fake_unified(1)  # the threads write into what they are given
    with FakePool(fake, limit=1 << 30) as (pool, streams):
        assert torch_side.dt_torch_serve(0, ctypes.c_void_p(pool)) == 0
        try:
            wrong = threads.hammer(
                pointer(torch_side, "dt_torch_alloc"),
                pointer(torch_side, "dt_torch_free"),
                pointer(torch_side, "dt_torch_record_stream"),
                (ctypes.c_void_p * 3)(*streams),
                4,
                1500,
            )
            assert wrong == 0
            counts = read(pool)
            assert (counts.live, counts.requested, counts.allocated) == (0, 0, 0)
            assert counts.peak_requested > 0
            assert counts.native == 0
            torch_side.dt_torch_empty_cache()
            assert read(pool).reserved < counts.reserved
        finally:
            torch_side.dt_torch_serve(0, None)
            fake.fake_unified(0)


def test_the_control_a_callback_into_python_would_wait_for_the_lock(threads_path: Path) -> None:
    """Were the allocator Python, the call above would not end; shown with a lock of a second."""
    code = (
        "import ctypes, os, threading\n"
        "F = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)\n"
        "alloc = F(lambda nbytes, index, stream: None)\n"
        f"threads = ctypes.PyDLL({str(threads_path)!r})\n"
        "print('begin', flush=True)\n"
        "threads.hammer(ctypes.cast(alloc, ctypes.c_void_p), None, None,\n"
        "               (ctypes.c_void_p * 3)(), 1, 1)\n"
        "print('end', flush=True)\n"
    )
    import sys

    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "begin\n"
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(1.0)
        child.kill()
        assert child.stdout.read() == ""


def test_torch_is_refused_by_an_exception_of_its_language(
    fake_cuda_path: Path, threads_path: Path
) -> None:
    torch_side, threads = ctypes.CDLL(library_path()), ctypes.CDLL(str(threads_path))
    fake = ctypes.CDLL(str(fake_cuda_path))
    alloc = pointer(torch_side, "dt_torch_alloc")

    def refusal(nbytes: int, index: int, stream: int) -> str:
        text = ctypes.create_string_buffer(512)
        size = ctypes.c_size_t(nbytes)
        found = threads.refused(alloc, size, index, ctypes.c_void_p(stream), text)
        return text.value.decode() if found else ""

    with FakePool(fake, limit=30 * MIB) as (pool, streams):
        assert torch_side.dt_torch_serve(0, ctypes.c_void_p(pool)) == 0
        try:
            assert "out of memory" in refusal(64 * MIB, 0, streams[0])
            assert "limit" in refusal(64 * MIB, 0, streams[0])
            assert "does not serve CUDA device 3" in refusal(64, 3, streams[0])
            assert "does not serve" in refusal(64, -1, streams[0])
            assert "does not serve" in refusal(64, 1000, streams[0])
            assert refusal(64, 0, streams[0]) == ""
            assert fake.cuStreamBeginCapture_v2(ctypes.c_void_p(streams[0]), 2) == 0
            assert "graph" in refusal(64, 0, streams[0])
            fake.cuStreamEndCapture(ctypes.c_void_p(streams[0]), ctypes.byref(ctypes.c_void_p()))
        finally:
            torch_side.dt_torch_serve(0, None)
    assert "does not serve" in refusal(64, 0, 0)
    assert torch_side.dt_torch_serve(64, None) == -1


def test_python_threads_share_it(rig: Any, pool: NativePool) -> None:
    problems: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            stream, other = rig.device.stream(), rig.device.stream()
            rng = random.Random(seed)
            held: list[hal.Buffer] = []
            for _ in range(150):
                held.append(rig.alloc(rng.randrange(3 * MIB), stream, pool=pool))
                if rng.random() < 0.3:
                    held[-1].used_by(other)
                if len(held) > 5:
                    held.pop(rng.randrange(5)).close()
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    rig.device.synchronize()
    assert pool.stats().live == 0
    pool.trim()


@pytest.mark.soak  # it waits for 10 seconds
def test_work_that_does_not_end_costs_the_memory_and_not_the_program(
    rig: Any, pool: NativePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wait for memory that is in use ends; what is in use stays in use."""
    stream, other = rig.device.stream(), rig.device.stream()
    _, total = opened(rig.device).backend.memory()
    buffer = rig.alloc(total // 2, stream, pool=pool)
    rig.kernel("hold")(stream, 1, 1, 0)
    buffer.close()
    with pytest.raises(OutOfMemory):
        rig.alloc(total // 4 * 3, other, pool=pool)
    assert pool.stats().reserved >= total // 2
    rig.fake.release()
    rig.alloc(total // 4 * 3, other, pool=pool).close()
