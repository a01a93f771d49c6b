"""An OpenCL platform's compiler, in a process of its own: it may hang or crash.

``python -m drivetrain.hal.drivers.opencl_build`` reads ``job.json`` and ``code`` in the current
folder; it writes ``result.json``, with facts of the kernels where the job asks for them, and
``binary`` where the platform gives one.
"""

from __future__ import annotations

import ctypes
import json
import os
from pathlib import Path
from typing import Any, NoReturn

from drivetrain.errors import HalError
from drivetrain.hal.drivers.opencl_api import Api, Cl, Code, load, name_of
from drivetrain.hal.drivers.opencl_platforms import (
    Found,
    answer,
    devices,
    number_of,
    text_of,
)

KERNEL_ARG_INFO = "-cl-kernel-arg-info"
_PLACES = {
    Cl.KERNEL_ARG_ADDRESS_GLOBAL: "global",
    Cl.KERNEL_ARG_ADDRESS_LOCAL: "local",
    Cl.KERNEL_ARG_ADDRESS_CONSTANT: "constant",
    Cl.KERNEL_ARG_ADDRESS_PRIVATE: "private",
}


def find(api: Api, uuid: str) -> Found:
    """The device that is known by this. Raises HalError when it is not to be seen."""
    seen = devices(api)
    for found in seen:
        if found.known_as == uuid:
            return found
    there = ", ".join(f"{f.name} of {f.platform.name}" for f in seen)
    raise HalError(
        f"the OpenCL loader does not show {uuid} in this process; it shows {there}. It reads "
        "OCL_ICD_VENDORS and the like once, when it is first used",
        code="not_visible",
        driver="opencl",
        op="open",
        device=uuid,
    )


def create(api: Api, found: Found, context: int, code: bytes, form: str) -> tuple[int, int]:
    """(a program that is not built yet, OpenCL's code) of source, SPIR-V or a binary."""
    status = ctypes.c_int()
    size = ctypes.c_size_t(len(code))
    text = ctypes.c_char_p(code)
    where = ctypes.byref(ctypes.cast(text, ctypes.c_void_p))
    if form == "cl":
        made = api.clCreateProgramWithSource(
            context, 1, where, ctypes.byref(size), ctypes.byref(status)
        )
    elif form == "spirv":
        if found.platform.version >= 210 and "il" not in api.off:
            function: Any = api.clCreateProgramWithIL
        else:
            extended = api.extended(found.platform.handle, "il")
            if extended is None:
                return 0, Code.INVALID_OPERATION
            function = extended.clCreateProgramWithILKHR
        made = function(context, text, len(code), ctypes.byref(status))
    else:
        device, loaded = ctypes.c_void_p(found.handle), ctypes.c_int()
        made = api.clCreateProgramWithBinary(
            *(context, 1, ctypes.byref(device), ctypes.byref(size), where),
            *(ctypes.byref(loaded), ctypes.byref(status)),
        )
        status.value = status.value or loaded.value
    return int(made or 0), status.value


def build(api: Api, found: Found, program: int, options: str) -> tuple[int, str]:
    """(OpenCL's code, what the compiler said)."""
    device = ctypes.c_void_p(found.handle)
    code = api.clBuildProgram(
        program, 1, ctypes.byref(device), options.encode() or None, None, None
    )

    def ask(handle: int, number: int, *rest: Any) -> int:
        return int(api.clGetProgramBuildInfo(handle, found.handle, number, *rest))

    return int(code), text_of(answer(ask, program, Cl.PROGRAM_BUILD_LOG))


def binary(api: Api, program: int) -> bytes:
    """What the platform made; empty where it gives nothing."""
    sizes = answer(api.clGetProgramInfo, program, Cl.PROGRAM_BINARY_SIZES)
    size = int.from_bytes((sizes or b"")[:8], "little")
    if not size:
        return b""
    data = ctypes.create_string_buffer(size)
    table = (ctypes.c_void_p * 1)(ctypes.addressof(data))
    where = ctypes.addressof(table)
    if api.clGetProgramInfo(program, Cl.PROGRAM_BINARIES, ctypes.sizeof(table), where, None):
        return b""
    return data.raw


def kernels(api: Api, found: Found, program: int) -> dict[str, dict[str, Any]]:
    """By each kernel's name: ``arguments``, a word for each of where it lies (``global``,
    ``constant``, ``local``, ``private``) or "" where that is not told, and ``shared_bytes``."""
    names = text_of(answer(api.clGetProgramInfo, program, Cl.PROGRAM_KERNEL_NAMES)).split(";")
    facts = {}
    for name in filter(None, names):
        status = ctypes.c_int()
        kernel = api.clCreateKernel(program, name.encode(), ctypes.byref(status))
        if status.value or not kernel:
            continue
        count = number_of(answer(api.clGetKernelInfo, kernel, Cl.KERNEL_NUM_ARGS))
        places = []
        for index in range(count):
            box = ctypes.c_uint()
            code = api.clGetKernelArgInfo(
                *(kernel, index, Cl.KERNEL_ARG_ADDRESS_QUALIFIER),
                *(ctypes.sizeof(box), ctypes.addressof(box), None),
            )
            places.append("" if code else _PLACES.get(box.value, ""))

        def ask(handle: int, number: int, *rest: Any) -> int:
            return int(api.clGetKernelWorkGroupInfo(handle, found.handle, number, *rest))

        shared = number_of(answer(ask, kernel, Cl.KERNEL_LOCAL_MEM_SIZE))
        facts[name] = {"arguments": places, "shared_bytes": shared}
        api.clReleaseKernel(kernel)
    return facts


def _compile(job: dict[str, Any]) -> dict[str, Any]:
    api = load()
    found = find(api, job["uuid"])
    status, device = ctypes.c_int(), ctypes.c_void_p(found.handle)
    context = api.clCreateContext(None, 1, ctypes.byref(device), None, None, ctypes.byref(status))
    if status.value or not context:
        return {"unusable": f"clCreateContext failed: {name_of(status.value)}"}
    code = Path("code").read_bytes()
    program, failed = create(api, found, context, code, job["form"])
    if failed or not program:
        return {"status": failed or Code.INVALID_PROGRAM, "log": "", "op": "clCreateProgram"}
    failed, log = build(api, found, program, job["options"])
    result = {"status": failed, "log": log, "op": "clBuildProgram"}
    if not failed:
        Path("binary").write_bytes(binary(api, program))
        if job["kernels"]:
            result["kernels"] = kernels(api, found, program)
    return result


def main() -> NoReturn:
    job = json.loads(Path("job.json").read_text(encoding="utf-8"))
    try:
        result = _compile(job)
    except (HalError, OSError) as error:
        result = {"unusable": str(error)}
    Path("result.new").write_text(json.dumps(result), encoding="utf-8")
    Path("result.new").rename("result.json")
    # A platform may hang or crash in its exit handlers; the answer is out.
    os._exit(0)


if __name__ == "__main__":
    main()
