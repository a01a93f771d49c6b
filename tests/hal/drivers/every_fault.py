"""Each fault at each call of a script, for a driver over its fake library, in a process of its own.

    every_fault.py DRIVER LIBRARY CODE [--seed N --most N] [--mutants]

CODE is a file with kernels as the fakes load them. What comes out is one JSON object: how many
faults there are, how many were tried and came, and what is wrong with how the driver took them.
``--mutants`` breaks the driver on purpose, in one way after another, and tells what is then found.

What has to hold, whatever the n-th call of a function says:

* the error is of the right class, with the library's code, its name, and the function that said it;
* when the device is closed, the library has given out no memory, stream, event, module or graph
  that it was not given back, but for what the failing call would have given back itself;
* a call that does not return holds up no other device and no other thread, and the work goes on
  as if nothing had been when it returns at last;
* the process lives.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import itertools
import json
import os
import random
import shutil
import struct
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

from fakes import HANG, Fake

from drivetrain.errors import DeviceLost, HalError, OutOfMemory, Unsupported
from drivetrain.hal.device import DeviceInfo
from drivetrain.hal.drivers import (
    cuda_api,
    cuda_context,
    cuda_memory,
    hip_api,
    level_zero_api,
    level_zero_context,
    level_zero_memory,
)
from drivetrain.hal.drivers.cuda_backend import CudaBackend
from drivetrain.hal.drivers.hip_backend import HipBackend
from drivetrain.hal.drivers.level_zero_backend import LevelZeroBackend
from drivetrain.hal.kinds import Kind, Way

LIMIT_S = 20.0
"""Whoever has not come back by then hangs."""
MUTANT_LIMIT_S = 0.5
MANY = 24
"""Calls that are tried of a function that is called often, or as often as there is time."""
MEMORY, NOT_READY, LOST, OTHER, HANGS = "memory", "not ready", "lost", "other", "hangs"


# -- the vendors -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vendor:
    """What differs between the drivers."""

    name: str
    uuid: str
    """With ``{}`` for the device's number."""
    api: Callable[[Any], Any]
    backend: Callable[..., Any]
    form: str
    """Of the code."""
    codes: dict[str, int]
    first: str
    """The call that begins all."""
    mismatch: int
    """What it says where library and kernel driver are of versions that do not fit."""
    finding: frozenset[str]
    """Calls by which a device is found; all that goes wrong there is a driver that is broken."""
    of_each: frozenset[str]
    """Those of them that are made for each device: nobody minds what one says of another one."""
    answers: frozenset[str]
    """A failure of these is an answer: a fact is not known, another way is taken."""
    tried_again: frozenset[str]
    """Where no memory is left, these are called again when more was given back."""
    put_back: frozenset[str]
    """Calls after one that did what it was asked for: they give back what was taken for it, or what
    the thread had before. The result that counts is the other one's."""
    queries: frozenset[str]
    """Of these "not ready" is an answer; how often they are called depends on time."""
    alike: frozenset[str] = frozenset()
    """Others that are called often, one time as another: of those, some calls are tried."""
    context: Any = None
    memory: Any = None
    groups: Callable[[], dict[str, str]] = dict
    """The symbols, each with the group that is off without it, or "" where nothing works."""


def _of_table(rows: Any) -> dict[str, str]:
    return {row.symbol: row.group for row in rows}


def _of_level_zero() -> dict[str, str]:
    return {
        row.name: getattr(row, "group", "") or ("a fact" if row.optional else "")
        for row in level_zero_api.FUNCTIONS
    }


VENDORS = {
    "cuda": Vendor(
        name="cuda",
        uuid="GPU-00112233-4455-6677-8899-aabbccddee{:02x}",
        api=cuda_api.Api,
        backend=CudaBackend,
        form="cubin",
        codes={MEMORY: 2, NOT_READY: 600, LOST: 719, OTHER: 999},
        first="cuInit",
        mismatch=803,
        finding=frozenset({"cuInit", "cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetUuid_v2"}),
        of_each=frozenset({"cuDeviceGet", "cuDeviceGetUuid_v2"}),
        answers=frozenset(
            {
                "cuDeviceGetAttribute",
                "cuDriverGetVersion",
                "cuFuncGetParamInfo",
                "cuGraphKernelNodeGetParams_v2",
                "cuMemPoolGetAttribute",
                "cuPointerGetAttribute",
            }
        ),
        tried_again=frozenset(
            {
                *("cuMemAllocAsync", "cuMemHostAlloc", "cuMemAllocManaged"),
                *("cuCtxPushCurrent_v2", "cuCtxSetCurrent"),  # on the way to them
            }
        ),
        put_back=frozenset({"cuCtxPopCurrent_v2"}),
        queries=frozenset({"cuStreamQuery", "cuEventQuery"}),
        context=cuda_context.Context,
        memory=cuda_memory.Memory,
        groups=lambda: _of_table(cuda_api.FUNCTIONS),
    ),
    "hip": Vendor(
        name="hip",
        uuid="GPU-fa4e{:012x}",
        api=hip_api.HipApi,
        backend=HipBackend,
        form="hsaco",
        codes={MEMORY: 2, NOT_READY: 600, LOST: 719, OTHER: 999},
        first="hipInit",
        mismatch=35,
        finding=frozenset({"hipInit", "hipGetDeviceCount"}),
        of_each=frozenset(),
        answers=frozenset(
            {
                "hipDeviceGetAttribute",
                "hipDeviceGetPCIBusId",
                "hipDeviceGetUuid",
                "hipGetDevicePropertiesR0600",
                "hipGraphKernelNodeGetParams",
                "hipHostGetFlags",
                "hipMemPoolGetAttribute",
            }
        ),
        tried_again=frozenset({"hipMallocAsync", "hipHostMalloc", "hipMallocManaged"}),
        put_back=frozenset({"hipSetDevice"}),
        queries=frozenset({"hipStreamQuery", "hipEventQuery"}),
        context=cuda_context.Context,
        memory=cuda_memory.Memory,
        groups=lambda: _of_table(hip_api.FUNCTIONS),
    ),
    "level_zero": Vendor(
        name="level_zero",
        uuid="ZE-" + bytes(range(0xF0, 0xFF)).hex() + "{:02x}",
        api=level_zero_api.Api,
        backend=LevelZeroBackend,
        form="spirv",
        codes={MEMORY: 0x70000003, NOT_READY: 1, LOST: 0x70000001, OTHER: 0x7FFFFFFE},
        first="zeInit",
        mismatch=0x78000002,
        finding=frozenset({"zeInit", "zeDriverGet", "zeDeviceGet", "zeDeviceGetProperties"}),
        of_each=frozenset(),
        answers=frozenset(
            {
                "zeDeviceCanAccessPeer",
                "zeDeviceGetMemoryProperties",
                "zeDevicePciGetPropertiesExt",
                "zeDriverGetProperties",
                "zeModuleBuildLogGetString",
            }
        ),
        tried_again=frozenset({"zeMemAllocDevice", "zeMemAllocHost", "zeMemAllocShared"}),
        put_back=frozenset({"zeModuleBuildLogDestroy"}),
        queries=frozenset({"zeEventQueryStatus"}),
        alike=frozenset({"zeEventCreate", "zeEventDestroy"}),
        context=level_zero_context.Context,
        memory=level_zero_memory.Memory,
        groups=_of_level_zero,
    ),
}


# -- the script ------------------------------------------------------------------------------------


def spirv(code: bytes) -> bytes:
    """A shared object as the fake of Level Zero takes it: behind a header of SPIR-V 1.0."""
    return struct.pack("<5I", 0x07230203, 0x00010000, 0, 1, 0) + code


_kept: list[Any] = []
"""Memory of the host that a copy may still come to when the script has ended early."""


def read(backend: Any, ptr: int, stream: int, nbytes: int) -> bytes:
    back = ctypes.create_string_buffer(nbytes)
    _kept.append(back)
    backend.copy(ctypes.addressof(back), ptr, nbytes, Way.DEVICE_TO_HOST, stream, False)
    assert backend.stream_synchronize(stream, LIMIT_S)
    return back.raw


def script(backend: Any, other: Any, form: str, code: bytes) -> Iterator[str]:
    """Uses each group once; nothing is left over at its end."""
    stream, second = backend.stream_create(0), backend.stream_create(-1)
    for kind in Kind:
        if kind is Kind.DEVICE or kind.name.lower() in backend.groups:
            ptr = backend.alloc(4096, kind, stream)
            for pattern in (b"\1", b"ab", b"abcd", bytes(range(8)), bytes(range(16))):
                backend.fill(ptr, pattern, 4096 // len(pattern), stream)
            assert read(backend, ptr, stream, 4096) == bytes(range(16)) * 256
            source = ctypes.create_string_buffer(b"\x22" * 16, 16)
            _kept.append(source)
            at = ctypes.addressof(source)
            backend.copy(ptr, at, 16, Way.HOST_TO_DEVICE, stream, True)
            backend.copy(ptr + 64, ptr, 16, Way.DEVICE_TO_DEVICE, stream, False)
            assert read(backend, ptr + 64, stream, 16) == b"\x22" * 16
            backend.free(ptr, kind, stream)
    yield "memory"
    assert 0 < backend.memory()[0] <= 1 << 30
    start, end = backend.event_create(True), backend.event_create(True)
    backend.event_record(start, stream)
    backend.stream_wait(second, start)
    backend.event_record(end, second)
    assert backend.event_synchronize(end, LIMIT_S)
    if "timing" in backend.groups:
        assert 0 <= backend.event_seconds(start, end) < 60
    for event in (start, end):
        assert backend.event_synchronize(event, LIMIT_S)
        backend.event_destroy(event)
    yield "events"
    if "compute" in backend.groups:
        yield from compute(backend, stream, form, code)
    if "peer" in backend.groups:
        beyond = other.stream_create(0)
        far = other.alloc(4096, Kind.DEVICE, beyond)
        other.fill(far, b"\x07", 4096, beyond)
        assert other.stream_synchronize(beyond, LIMIT_S)
        assert backend.peer_enable(other)
        near = backend.alloc(4096, Kind.DEVICE, stream)
        backend.copy_peer(near, far, 4096, other, stream)
        assert read(backend, near, stream, 4096) == b"\x07" * 4096
        backend.free(near, Kind.DEVICE, stream)
        other.free(far, Kind.DEVICE, beyond)
        assert other.synchronize(LIMIT_S)
        other.stream_destroy(beyond)
        yield "peer"
    assert backend.synchronize(LIMIT_S)
    for each in (second, stream):
        assert backend.stream_synchronize(each, LIMIT_S)
        backend.stream_destroy(each)
    yield "end"


def compute(backend: Any, stream: int, form: str, code: bytes) -> Iterator[str]:
    value = backend.alloc(4, Kind.DEVICE, stream)
    backend.fill(value, b"\0", 4, stream)
    module = backend.module_load(code, form)
    function = backend.function(module, "add")
    backend.function_arguments(function, (-8, 4))
    assert backend.function_facts(function).threads > 0
    boxes = [ctypes.c_uint64(value), ctypes.c_uint64(3)]
    table = (ctypes.c_void_p * 2)(*(ctypes.addressof(box) for box in boxes))
    at, one = ctypes.addressof(table), (1, 1, 1)
    backend.launch(function, one, one, 0, stream, at, (-8, 4))
    assert int.from_bytes(read(backend, value, stream, 4), "little") == 3
    yield "compute"
    if "graphs" in backend.groups:
        backend.graph_begin(stream)
        backend.launch(function, one, one, 0, stream, at, (-8, 4))
        graph = backend.graph_end(stream)
        backend.graph_launch(graph, stream)
        boxes[1].value = 100
        backend.graph_set(graph, 0, function, one, one, 0, at, (-8, 4))
        backend.graph_launch(graph, stream)
        assert int.from_bytes(read(backend, value, stream, 4), "little") == 106
        backend.graph_destroy(graph)
        yield "graphs"
    backend.module_unload(module)
    backend.free(value, Kind.DEVICE, stream)


# -- one fault -------------------------------------------------------------------------------------


@dataclass
class Run:
    """The script on a library, with all that was raised."""

    vendor: Vendor
    library: Fake
    code: bytes
    refused: frozenset[str] = frozenset()
    raised: list[HalError] = field(default_factory=list)
    wrong: str = ""
    """What was no error of the driver's and should not have been."""
    reached: str = ""
    api: Any = None

    def info(self, index: int) -> DeviceInfo:
        return DeviceInfo(self.vendor.name, index, "fake", "v", self.vendor.uuid.format(index))

    def open(self, index: int) -> Any:
        if self.api is None:
            self.library.refused = set(self.refused)
            self.api = self.vendor.api(self.library)
        return self.vendor.backend(self.info(index), self.api)

    def __call__(self) -> Run:
        opened = []
        try:
            for index in range(2):
                opened.append(self.open(index))
            for reached in script(opened[0], opened[1], self.vendor.form, self.code):
                self.reached = reached
        except HalError as error:
            self.raised.append(error)
        except Exception as error:
            self.wrong = f"the script saw {error!r} after {self.reached!r}"
        for backend in opened:  # the first one may still be copying from the other one's memory
            try:
                backend.close()
            except HalError as error:
                self.raised.append(error)
            except Exception as error:
                self.wrong = self.wrong or f"close raised {error!r}"
        return self


class Library:
    """Copies of a fake, each as if it were in a process of its own."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.path, self.folder, self._number = path, folder, itertools.count()

    @contextlib.contextmanager
    def copy(self) -> Iterator[Fake]:
        path = self.folder / f"{next(self._number)}.so"  # the loader goes by its name
        shutil.copy(self.path, path)
        fake = Fake(path)
        try:
            yield fake
        finally:
            fake.end()
            path.unlink()
            _kept.clear()


def calls(vendor: Vendor, library: Library, code: bytes) -> list[tuple[str, int]]:
    """(function, which call of it) of all that the script calls."""
    with library.copy() as fake:
        fake.log()
        run = Run(vendor, fake, code)()
        assert run.reached == "end", (run.raised, run.wrong)
        assert (fake.live(), fake.things(), run.raised) == (0, 0, [])
        names = fake.names()
    often = vendor.alike | vendor.queries | vendor.put_back | vendor.tried_again
    found = []
    for name, count in Counter(names).items():
        step = max(1, -(-count // MANY)) if name in often else 1
        found += [(name, nth) for nth in sorted({*range(1, count + 1, step), count})]
    return found


def left(vendor: Vendor, fake: Fake, symbol: str) -> str:
    """What was not given back. A call that gives something back and fails kept that."""
    fake.forgive()
    kept = int(any(word in symbol for word in ("Free", "Destroy", "Unload")))
    kept += symbol in ("zeEventDestroy", "zeKernelDestroy")  # the pool or module that it lies in
    counts = fake.live(), fake.things()
    return f"{counts} are left of memory and things" if sum(counts) > kept else ""


def returns(vendor: Vendor, library: Library, code: bytes, symbol: str, nth: int, what: str) -> str:
    """What is wrong with how the driver takes one result; "" when nothing is, "-" where it did not
    come: how often something is asked depends on time."""
    native = vendor.codes[what]
    with library.copy() as fake:
        fake.fail(symbol, native, nth)
        run = Run(vendor, fake, code)()
        if not fake.library.fake_fired():
            return "-"
        if run.wrong and not (symbol in vendor.answers and what != LOST):
            return run.wrong
        if not run.raised:
            silent = (
                symbol in vendor.answers | vendor.put_back | vendor.of_each
                or (what == MEMORY and symbol in vendor.tried_again)
                or (what == NOT_READY and symbol in vendor.queries)
            )
            if not silent:
                return "it went unnoticed"
        else:
            found = wrong_error(vendor, run.raised[0], symbol, what, native)
            if found:
                return found
        if what == LOST:
            return ""  # its memory went with it
        return left(vendor, fake, symbol)


def wrong_error(vendor: Vendor, error: HalError, symbol: str, what: str, native: int) -> str:
    kind = {MEMORY: OutOfMemory, LOST: DeviceLost}.get(what, HalError)
    if what == LOST and symbol in vendor.put_back | vendor.of_each and type(error) is DeviceLost:
        return "" if error.native == native else f"{error!r} says {error.native}"  # the next call
    if symbol in vendor.finding:
        if error.code != "broken" and what != LOST:
            return f"{error!r} does not call the driver broken"
    elif symbol in vendor.answers:
        return ""
    elif what == NOT_READY and symbol in vendor.queries and error.code == "invalid":
        return ""  # what needs it done says that it is not
    elif type(error) is not kind:
        return f"{error!r} is no {kind.__name__}"
    facts = (error.native, error.op, error.driver, bool(error.native_name))
    if facts != (native, symbol, vendor.name, True):
        return f"{error!r} says {facts}"
    return ""


def hangs(vendor: Vendor, library: Library, code: bytes, symbol: str, nth: int) -> str:
    """What is wrong when one call does not return for a while."""
    with library.copy() as fake:
        run = Run(vendor, fake, code)
        bystander = run.open(2)
        fake.fail(symbol, HANG, nth)
        worker = threading.Thread(target=run, daemon=True)
        worker.start()
        while worker.is_alive() and not fake.library.fake_fired():
            time.sleep(2e-4)
        if not fake.library.fake_fired():
            fake.forgive()  # it would come now
            bystander.close()
            return "-"
        seen: list[bytes] = []
        beside = threading.Thread(target=lambda: seen.append(used(bystander)), daemon=True)
        beside.start()
        beside.join(LIMIT_S)
        held_up = not seen
        fake.forgive()
        for thread in (beside, worker):
            thread.join(LIMIT_S)
            if thread.is_alive():
                return "it never came back"
        bystander.close()
        if held_up:
            return "another device is held up"
        if run.raised or run.wrong or run.reached != "end":
            return f"{run.raised or run.wrong} came of a call that returned late"
        return left(vendor, fake, "")


def used(backend: Any) -> bytes:
    stream = backend.stream_create(0)
    ptr = backend.alloc(4096, Kind.DEVICE, stream)
    backend.fill(ptr, b"\5", 4096, stream)
    found = read(backend, ptr, stream, 4096)
    backend.free(ptr, Kind.DEVICE, stream)
    backend.stream_destroy(stream)
    return found


# -- the library as it is loaded -------------------------------------------------------------------


def mismatched(vendor: Vendor, library: Library, code: bytes) -> str:
    with library.copy() as fake:
        fake.fail(vendor.first, vendor.mismatch, 0)
        run = Run(vendor, fake, code)()
        if not run.raised:
            return "it went unnoticed"
        error = run.raised[0]
        facts = (error.code, error.native, error.op, error.driver, type(error))
        if facts != ("broken", vendor.mismatch, vendor.first, vendor.name, HalError):
            return f"{error!r} says {facts}"
        return left(vendor, fake, "")


def lacking(vendor: Vendor, library: Library, code: bytes, symbol: str, group: str) -> str:
    """What is wrong when the library has no such function."""
    with library.copy() as fake:
        run = Run(vendor, fake, code, refused=frozenset({symbol}))()
        if run.raised:
            error = run.raised[0]
            if isinstance(error, Unsupported):
                return f"{error!r}: the group {group!r} was on"
            if error.code != "broken" or symbol not in str(error) or group:
                return repr(error)
        elif run.wrong or run.reached != "end":
            return run.wrong or f"it ended after {run.reached!r}"
        elif not group and not older(vendor, symbol):
            return "nobody missed it"
        return left(vendor, fake, "")


def older(vendor: Vendor, symbol: str) -> bool:
    """Whether the same function goes by another symbol, too."""
    if vendor.name == "level_zero":
        return False
    rows = (cuda_api if vendor.name == "cuda" else hip_api).FUNCTIONS
    name = next(row.name for row in rows if row.symbol == symbol)
    return sum(row.name == name for row in rows) > 1


# -- all of it -------------------------------------------------------------------------------------

Case = tuple[str, int, str]


def cases(vendor: Vendor, library: Library, code: bytes) -> list[Case]:
    kinds = (*vendor.codes, HANGS)
    found = [(s, n, what) for s, n in calls(vendor, library, code) for what in kinds]
    found.append((vendor.first, 0, "mismatch"))
    return found + [(symbol, 0, "missing") for symbol in vendor.groups()]


def problem(vendor: Vendor, library: Library, code: bytes, case: Case) -> str:
    symbol, nth, what = case
    if what == "mismatch":
        return mismatched(vendor, library, code)
    if what == "missing":
        return lacking(vendor, library, code, symbol, vendor.groups()[symbol])
    if what == HANGS:
        return hangs(vendor, library, code, symbol, nth)
    return returns(vendor, library, code, symbol, nth, what)


def sample(every: Sequence[Case], seed: int, most: int) -> list[Case]:
    """About so many of the cases (0: all); a case that is in it once is so each time."""
    share = most / len(every) if most else 1.0
    return [case for case in every if random.Random(f"{seed} {case}").random() < share]


def proof(
    vendor: Vendor, library: Library, code: bytes, every: Sequence[Case], tried: Sequence[Case]
) -> dict[str, Any]:
    wrong, came = [], 0
    for case in tried:
        found = problem(vendor, library, code, case)
        came += found != "-"
        if found not in ("", "-"):
            wrong.append(f"{case[2]} from call {case[1]} of {case[0]}: {found}")
    return {"all": len(every), "tried": len(tried), "came": came, "wrong": wrong}


@dataclass(frozen=True)
class Mutant:
    """A driver with a fault of its own, the words that tell it, and where to look for it."""

    words: str
    of: Any
    name: str
    broken: Callable[..., Any]
    shows: Callable[[Case], bool]


def mutants(vendor: Vendor) -> list[Mutant]:
    context, memory = vendor.context, vendor.memory
    right, code, failure = context.call, context.code, context.failure
    one_for_all = threading.Lock()
    swallowed = {"cuda": "cuMemset", "hip": "hipMemset", "level_zero": "zeCommandListAppend"}

    def swallows(self: Any, function: Any, *arguments: Any) -> None:
        mine = function.__name__.startswith(swallowed[vendor.name])
        (code if mine else right)(self, function, *arguments)

    def alone(self: Any, function: Any, *arguments: Any) -> int:
        with one_for_all:
            return int(code(self, function, *arguments))

    def plain(self: Any, op: str, code: int, **facts: Any) -> HalError:
        error = failure(self, op, code, **facts)
        words = ("code", "driver", "native", "native_name", "op", "device")
        return HalError(str(error), **{word: getattr(error, word) for word in words})

    def other_code(self: Any, op: str, code: int, **facts: Any) -> Any:
        return failure(self, op, code + 7, **facts)

    def returned(case: Case) -> bool:
        return case[2] in vendor.codes and case[0] not in vendor.finding | vendor.answers

    return [
        Mutant(
            "unnoticed",
            context,
            "call",
            swallows,
            lambda c: c[2] == OTHER and c[0].startswith(swallowed[vendor.name]),
        ),
        Mutant("says", context, "failure", other_code, lambda c: c[2] == OTHER and returned(c)),
        Mutant("is no", context, "failure", plain, lambda c: c[2] == MEMORY and returned(c)),
        Mutant("are left", memory, "close", lambda self: None, returned),
        Mutant("held up", context, "code", alone, lambda c: c[2] == HANGS),
    ]


def controls(
    vendor: Vendor, library: Library, code: bytes, every: Sequence[Case], seed: int
) -> dict[str, str]:
    """What tells each mutant first; "" for one that looks like a right driver."""
    found: dict[str, str] = {}
    for mutant in mutants(vendor):
        order = [case for case in every if mutant.shows(case)]
        random.Random(seed).shuffle(order)
        with mock.patch.object(mutant.of, mutant.name, mutant.broken):
            told = (problem(vendor, library, code, case) for case in order[:MANY])
            found[mutant.words] = next((text for text in told if mutant.words in text), "")
    return found


def main(words: Sequence[str]) -> dict[str, Any]:
    global LIMIT_S
    parser = argparse.ArgumentParser()
    parser.add_argument("driver", choices=VENDORS)
    parser.add_argument("library", type=Path)
    parser.add_argument("code", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--most", type=int, default=0)
    parser.add_argument("--mutants", action="store_true")
    given = parser.parse_args(words)
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        os.environ.pop(name, None)
    os.environ.pop("ZE_AFFINITY_MASK", None)
    for fake in ("CUDA", "HIP", "ZE"):
        os.environ[f"FAKE_{fake}_DEVICES"] = "3"  # one is not in the script
    vendor, code = VENDORS[given.driver], given.code.read_bytes()
    if vendor.form == "spirv":
        code = spirv(code)
    with tempfile.TemporaryDirectory() as folder:
        library = Library(given.library, Path(folder))
        every = cases(vendor, library, code)
        if given.mutants:
            LIMIT_S = MUTANT_LIMIT_S  # they do hang
            return controls(vendor, library, code, every, given.seed)
        return proof(vendor, library, code, every, sample(every, given.seed, given.most))


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:])), flush=True)
    os._exit(0)  # not even a thread that hangs holds it up
