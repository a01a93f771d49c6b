"""What the hip driver declares is what AMD's headers say, in HIP 5.2 (Debian's libamdhip64-dev) and
in HIP 7.1 (Triton's wheel, `make test-vendors`): signatures, structures, enum values, and the
values that changed between the two and are therefore not used."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from drivetrain.hal.drivers.cuda_api import Code, Cu, Function
from drivetrain.hal.drivers.hip_api import FUNCTIONS, PROPERTIES, STRUCTURES, Hip

REPOSITORY = Path(__file__).parents[3]
NESTED = {
    "hipMemAccessDesc": {"type": "location.type", "id": "location.id"},
    "hipKernelNodeParams": {
        f"{side}Dim{axis}": f"{side}Dim.{axis.lower()}"
        for side in ("block", "grid")
        for axis in "XYZ"
    },
}
"""Fields that the headers have one level deeper."""

NOT_IN_5_2 = {"hipGetDevicePropertiesR0600", "hipMemsetD2D32Async", "hipGraphUpload"}
MADE_CONST = {"hipMemcpyHtoDAsync": "hipDeviceptr_t, void *, size_t, hipStream_t"}
"""5.2 has the source without const."""

SHARED = {
    "hipStreamNonBlocking": Cu.STREAM_NON_BLOCKING,
    "hipEventDefault": Cu.EVENT_DEFAULT,
    "hipEventDisableTiming": Cu.EVENT_DISABLE_TIMING,
    "hipMemAttachGlobal": Cu.MEM_ATTACH_GLOBAL,
    "hipHostMallocPortable": Cu.MEMHOSTALLOC_PORTABLE,
    "hipHostRegisterPortable": Cu.MEMHOSTREGISTER_PORTABLE,
    "hipMemPoolAttrReleaseThreshold": Cu.MEMPOOL_ATTR_RELEASE_THRESHOLD,
    "hipMemPoolAttrReservedMemCurrent": Cu.MEMPOOL_ATTR_RESERVED_MEM_CURRENT,
    "hipMemPoolAttrUsedMemCurrent": Cu.MEMPOOL_ATTR_USED_MEM_CURRENT,
    "hipMemLocationTypeDevice": Cu.MEM_LOCATION_TYPE_DEVICE,
    "hipMemAccessFlagsProtReadWrite": Cu.MEM_ACCESS_FLAGS_PROT_READWRITE,
    "HIP_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK": Cu.FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK,
    "HIP_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES": Cu.FUNC_ATTRIBUTE_SHARED_SIZE_BYTES,
    "HIP_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES": Cu.FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES,
    "HIP_FUNC_ATTRIBUTE_NUM_REGS": Cu.FUNC_ATTRIBUTE_NUM_REGS,
    "hipStreamCaptureStatusNone": Cu.STREAM_CAPTURE_STATUS_NONE,
    "hipStreamCaptureModeRelaxed": Cu.STREAM_CAPTURE_MODE_RELAXED,
    "hipSuccess": Code.SUCCESS,
    "hipErrorInvalidValue": Code.ERROR_INVALID_VALUE,
    "hipErrorOutOfMemory": Code.ERROR_OUT_OF_MEMORY,
    "hipErrorDeinitialized": Code.ERROR_DEINITIALIZED,
    "hipErrorNoDevice": Code.ERROR_NO_DEVICE,
    "hipErrorInvalidImage": Code.ERROR_INVALID_IMAGE,
    "hipErrorNoBinaryForGpu": Code.ERROR_NO_BINARY_FOR_GPU,
    "hipErrorECCNotCorrectable": Code.ERROR_ECC_UNCORRECTABLE,
    "hipErrorUnsupportedLimit": Code.ERROR_UNSUPPORTED_LIMIT,
    "hipErrorPeerAccessUnsupported": Code.ERROR_PEER_ACCESS_UNSUPPORTED,
    "hipErrorNotFound": Code.ERROR_NOT_FOUND,
    "hipErrorNotReady": Code.ERROR_NOT_READY,
    "hipErrorIllegalAddress": Code.ERROR_ILLEGAL_ADDRESS,
    "hipErrorLaunchOutOfResources": Code.ERROR_LAUNCH_OUT_OF_RESOURCES,
    "hipErrorLaunchTimeOut": Code.ERROR_LAUNCH_TIMEOUT,
    "hipErrorPeerAccessAlreadyEnabled": Code.ERROR_PEER_ACCESS_ALREADY_ENABLED,
    "hipErrorContextIsDestroyed": Code.ERROR_CONTEXT_IS_DESTROYED,
    "hipErrorAssert": Code.ERROR_ASSERT,
    "hipErrorLaunchFailure": Code.ERROR_LAUNCH_FAILED,
    "hipErrorNotSupported": Code.ERROR_NOT_SUPPORTED,
    "hipErrorStreamCaptureUnsupported": Code.ERROR_STREAM_CAPTURE_UNSUPPORTED,
    "hipErrorStreamCaptureWrongThread": Code.ERROR_STREAM_CAPTURE_WRONG_THREAD,
}
"""What the cuda driver's parts use by CUDA's name."""

CHANGED = {
    "hipGraphNodeTypeKernel": (1, 0),
    "hipMemoryTypeHost": (0, 1),
    "hipMemoryTypeDevice": (1, 2),
    "sizeof(hipDeviceProp_t)": (792, 1472),
    "offsetof(hipDeviceProp_t, gcnArchName)": (396, 1160),
}
"""In 5.2 and in 7.1: the reasons for what `hip_api` says about them."""


def triton() -> Path | None:
    """The folder of HIP's headers in Triton's wheel."""
    places = [os.environ.get("DRIVETRAIN_TEST_TRITON", ""), str(REPOSITORY / "build" / "vendors")]
    for place in [*places, sysconfig.get_paths()["purelib"]]:
        folder = Path(place) / "triton/backends/amd/include"
        if place and (folder / "hip/hip_runtime_api.h").is_file():
            return folder
    return None


@pytest.fixture(params=[0, 1], ids=["5.2", "7.1"])
def headers(request: pytest.FixtureRequest) -> tuple[int, Path]:
    which = int(request.param)
    if which:
        found = triton()
        if found is None:
            pytest.skip("there are no headers of HIP 7.1 (make test-vendors brings Triton's)")
        return which, found
    if not Path("/usr/include/hip/hip_runtime_api.h").is_file():
        pytest.skip("there are no headers of HIP 5.2 (Debian's package libamdhip64-dev)")
    return which, Path("/usr/include")


def values() -> dict[str, int]:
    own = {f"hip{name}": n for name, n in vars(Hip).items() if name[0].isupper()}
    return {**own, **SHARED}


def declared(which: int, functions: Iterable[Function] = FUNCTIONS) -> list[Function]:
    """The rows that a version's headers have, as it writes them."""
    if which:
        return list(functions)
    rows = [row for row in functions if row.symbol not in NOT_IN_5_2]
    return [replace(r, types=MADE_CONST.get(r.symbol, r.types)) for r in rows]


def program(
    rows: Iterable[Function],
    constants: Mapping[str, int],
    structures: Mapping[str, type[ctypes.Structure]] = STRUCTURES,
) -> str:
    lines = [
        "#include <stddef.h>",
        "#include <hip/hip_runtime_api.h>",
        "#define SAME(a, b, text) _Static_assert(__builtin_types_compatible_p(a, b), text)",
    ]
    for index, row in enumerate(rows):
        back = "const char *" if row.symbol.startswith("hipGetError") else "hipError_t"
        lines += [
            f"typedef {back} (*row_{index})({row.types});",
            f'SAME(row_{index}, __typeof__(&{row.symbol}), "{row.symbol}: types");',
        ]
    for name, kind in structures.items():
        lines.append(f'_Static_assert(sizeof({name}) == {ctypes.sizeof(kind)}, "{name}: size");')
        for field, *_ in kind._fields_:
            deep = NESTED.get(name, {}).get(field, field)
            here = getattr(kind, field)
            lines += [
                f'_Static_assert(offsetof({name}, {deep}) == {here.offset}, "{name}.{field}");',
                f"_Static_assert(sizeof((({name} *)0)->{deep}) == {here.size}, "
                f'"{name}.{field}: size");',
            ]
    lines += [f'_Static_assert({n} == {number}, "{n}");' for n, number in constants.items()]
    return "\n".join([*lines, "int main(void) { return 0; }", ""])


def wrong(folder: Path, text: str) -> list[str]:
    """What the compiler says against the program."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    command = [compiler, "-std=gnu11", "-fsyntax-only", "-w", "-D__HIP_PLATFORM_AMD__"]
    command += ["-D__HIP_PLATFORM_HCC__", "-I", str(folder), "-xc", "-"]
    done = subprocess.run(
        command, input=text, capture_output=True, text=True, check=False, timeout=60
    )
    found = [line for line in done.stderr.splitlines() if "error:" in line]
    assert bool(found) == bool(done.returncode), done.stderr
    return found


def test_every_declared_function_structure_and_value_is_the_headers(
    headers: tuple[int, Path],
) -> None:
    which, folder = headers
    assert wrong(folder, program(declared(which), values())) == []


def test_what_changed_between_the_two_is_what_the_driver_says(headers: tuple[int, Path]) -> None:
    which, folder = headers
    now = {name: pair[which] for name, pair in CHANGED.items()}
    assert wrong(folder, program([], now, {})) == []
    name = "hipDeviceProp_tR0600" if which else "hipDeviceProp_t"
    assert PROPERTIES[name] == (
        CHANGED["sizeof(hipDeviceProp_t)"][which],
        CHANGED["offsetof(hipDeviceProp_t, gcnArchName)"][which],
    )


def test_what_5_2_is_said_to_lack_it_lacks(headers: tuple[int, Path]) -> None:
    which, folder = headers
    for symbol in NOT_IN_5_2:
        row = next(row for row in FUNCTIONS if row.symbol == symbol)
        assert bool(wrong(folder, program([row], {}, {}))) == (which == 0), symbol


def test_debians_library_has_what_its_headers_have_and_no_device() -> None:
    """5.2 is older than what is served: its graphs stay off, and nothing else is missing."""
    path = Path("/usr/lib/x86_64-linux-gnu/libamdhip64.so.5")
    if not path.is_file():
        pytest.skip("there is no libamdhip64 (Debian's package libamdhip64-5)")
    if Path("/dev/kfd").exists():
        pytest.skip("this machine has an AMD GPU")
    code = f"""
import ctypes
from drivetrain.errors import DriverMissing
from drivetrain.hal.drivers.hip_api import HipApi
from drivetrain.hal.drivers.hip_backend import initialised
api = HipApi(ctypes.CDLL({str(path)!r}))
assert api.off == {{"context_event", "tables", "graphs"}}, api.off
assert not api.is_fake
assert api.symbols["cudaGetDeviceProperties"] == "hipGetDeviceProperties"
assert api.version_text().startswith("5.2."), api.version_text()
try:
    initialised(api)
except DriverMissing as error:
    assert (error.code, error.op, error.native in (100, 101)) == ("no_device", "hipInit", True)
else:
    raise SystemExit("it sees a device")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("symbol", "types"),
    [
        ("hipMallocAsync", "void **, size_t"),
        ("hipMemsetD16Async", "hipDeviceptr_t, unsigned int, size_t, hipStream_t"),
        ("hipStreamWaitEvent", "hipEvent_t, hipStream_t, unsigned int"),
    ],
)
def test_a_wrong_signature_is_caught(headers: tuple[int, Path], symbol: str, types: str) -> None:
    which, folder = headers
    rows = [replace(r, types=types) if r.symbol == symbol else r for r in declared(which)]
    assert any(symbol in line for line in wrong(folder, program(rows, {})))


def test_a_wrong_offset_or_value_is_caught(headers: tuple[int, Path]) -> None:
    _, folder = headers

    class Swapped(ctypes.Structure):
        _fields_ = (("func", ctypes.c_void_p), ("extra", ctypes.c_void_p))

    found = wrong(folder, program([], {}, {"hipKernelNodeParams": Swapped}))
    assert any("hipKernelNodeParams.func" in line for line in found), found
    found = wrong(folder, program([], {"hipDeviceAttributeWarpSize": 88}, {}))
    assert any("WarpSize" in line for line in found), found
