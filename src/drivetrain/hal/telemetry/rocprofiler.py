"""AMD's counters through rocprofiler-sdk's device counting: throughput of memory, and how busy the
vector and matrix units are, of all that runs on the GPU.

Bound is what version 0.6 (ROCm 6.4) and newer have, as in the headers that ROCm installs. It loads
the HSA runtime and takes the GPU's counters: in a child only.
"""

from __future__ import annotations

import ctypes
import os
import time
from ctypes import (
    CFUNCTYPE,
    POINTER,
    byref,
    c_char_p,
    c_double,
    c_int,
    c_size_t,
    c_uint32,
    c_uint64,
    c_void_p,
)
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drivetrain.errors import HalError, Unsupported
from drivetrain.hal.telemetry import counters

LIBRARIES = ("librocprofiler-sdk.so.1", "librocprofiler-sdk.so.0")
HSA = "libhsa-runtime64.so.1"
OLDEST = 600
"""``10000 * major + 100 * minor + patch``: before, a sample went to a buffer only."""
AGENT_INFO_VERSION_0 = 1
AGENT_TYPE_GPU = 2
COUNTER_INFO_VERSION_0 = 1
COUNTER_FLAG_NONE = 0
_MOST_RECORDS = 1 << 14


@dataclass(frozen=True)
class Counter:
    """One of AMD's derived counters: what it is called here, what its unit is multiplied by, and
    whether it counts (then it is told per second) or is a share."""

    name: str
    factor: float
    counts: bool = False


COUNTERS = (
    {
        "FETCH_SIZE": Counter("read_gbps", 1024e-9, True),
        "WRITE_SIZE": Counter("write_gbps", 1024e-9, True),
    },
    {
        "GPU_UTIL": Counter("gpu_busy_ratio", 0.01),
        "OccupancyPercent": Counter("occupancy_ratio", 0.01),
        "VALUBusy": Counter("vector_busy_ratio", 0.01),
        "MfmaUtil": Counter("matrix_busy_ratio", 0.01),
    },
)
"""Those that are counted at the same time; sizes are in KiB, shares in per cent."""


class Agent(ctypes.Structure):
    """The beginning of ``rocprofiler_agent_v0_t``."""

    _fields_ = (
        ("size", c_uint64),
        ("id", c_uint64),
        ("type", c_int),
        *(
            (name, c_uint32)
            for name in (
                *("cpu_cores_count", "simd_count", "mem_banks_count", "caches_count"),
                *("io_links_count", "cpu_core_id_base", "simd_id_base", "max_waves_per_simd"),
                *("lds_size_in_kb", "gds_size_in_kb", "num_gws", "wave_front_size", "num_xcc"),
                *("cu_count", "array_count", "num_shader_banks", "simd_arrays_per_engine"),
                *("cu_per_simd_array", "simd_per_cu", "max_slots_scratch_cu"),
                "gfx_target_version",
            )
        ),
        ("vendor_id", ctypes.c_uint16),
        ("device_id", ctypes.c_uint16),
        ("location_id", c_uint32),
        ("domain", c_uint32),
    )

    @property
    def pci(self) -> str:
        at = self.location_id
        return f"{self.domain:04x}:{at >> 8 & 0xFF:02x}:{at >> 3 & 0x1F:02x}.{at & 7}"


class CounterInfo(ctypes.Structure):
    """``rocprofiler_counter_info_v0_t``; its two last bits are a byte here."""

    _fields_ = (
        ("id", c_uint64),
        ("name", c_char_p),
        ("description", c_char_p),
        ("block", c_char_p),
        ("expression", c_char_p),
        ("flags", ctypes.c_uint8),
    )


class Record(ctypes.Structure):
    """``rocprofiler_counter_record_t``"""

    _fields_ = (
        ("id", c_uint64),
        ("counter_value", c_double),
        ("dispatch_id", c_uint64),
        ("user_data", c_uint64),
        ("agent_id", c_uint64),
    )


class ClientId(ctypes.Structure):
    _fields_ = (("name", c_char_p), ("handle", c_uint32))


_INITIALIZE = CFUNCTYPE(c_int, c_void_p, c_void_p)


class ConfigureResult(ctypes.Structure):
    """``rocprofiler_tool_configure_result_t``"""

    _fields_ = (
        ("size", c_size_t),
        ("initialize", _INITIALIZE),
        ("finalize", c_void_p),
        ("tool_data", c_void_p),
    )


# An id is a structure of one 64-bit number, passed as that number is.
_CONFIGURE = CFUNCTYPE(c_void_p, c_uint32, c_char_p, c_uint32, POINTER(ClientId))
_AGENTS = CFUNCTYPE(c_int, c_int, POINTER(POINTER(Agent)), c_size_t, c_void_p)
_LISTED = CFUNCTYPE(c_int, c_uint64, POINTER(c_uint64), c_size_t, c_void_p)
_SET = CFUNCTYPE(c_int, c_uint64, c_uint64)
_CHOOSE = CFUNCTYPE(None, c_uint64, c_uint64, _SET, c_void_p)

FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "rocprofiler_force_configure": (_CONFIGURE,),
    "rocprofiler_query_available_agents": (c_int, _AGENTS, c_size_t, c_void_p),
    "rocprofiler_create_context": (POINTER(c_uint64),),
    "rocprofiler_start_context": (c_uint64,),
    "rocprofiler_stop_context": (c_uint64,),
    "rocprofiler_configure_device_counting_service": (
        *(c_uint64, c_uint64, c_uint64, _CHOOSE, c_void_p),
    ),
    "rocprofiler_iterate_agent_supported_counters": (c_uint64, _LISTED, c_void_p),
    "rocprofiler_query_counter_info": (c_uint64, c_int, c_void_p),
    "rocprofiler_query_record_counter_id": (c_uint64, POINTER(c_uint64)),
    "rocprofiler_create_counter_config": (
        *(c_uint64, POINTER(c_uint64), c_size_t, POINTER(c_uint64)),
    ),
    "rocprofiler_sample_device_counting_service": (
        *(c_uint64, c_uint64, c_int, POINTER(Record), POINTER(c_size_t)),
    ),
}
_EARLIER = {"rocprofiler_create_counter_config": "rocprofiler_create_profile_config"}
"""Names before version 1.0, of the same functions."""


def _loaded(names: tuple[str, ...]) -> ctypes.CDLL:
    folder = Path(os.environ.get("ROCM_PATH") or "/opt/rocm") / "lib"
    problems = []
    for name in (*(str(folder / each) for each in names), *names):
        try:
            return ctypes.CDLL(name)
        except OSError as error:
            problems.append(str(error))
    raise Unsupported(problems[-1], code="unsupported", op="counters")


class Sampler:
    """Counts on one GPU. Raises Unsupported without the library, HalError when it refuses."""

    def __init__(self, pci: str) -> None:
        self._library = _loaded(LIBRARIES)
        self._functions = {name: self._bound(name, types) for name, types in FUNCTIONS.items()}
        self._pci = pci.lower()[-12:]
        self._version = 0
        self._agents: list[int] = []
        """Of the GPU, once it is seen."""
        self._context = c_uint64()
        self._config = 0
        self._failures: list[Exception] = []
        # The library keeps what it is given.
        self._kept: tuple[Any, ...] = (_CHOOSE(self._choose), _INITIALIZE(self._initialize))
        self._result = ConfigureResult(ctypes.sizeof(ConfigureResult), self._kept[1], None, None)
        self._kept += (_CONFIGURE(self._configure),)
        self.call("rocprofiler_force_configure", self._kept[2])
        for failure in self._failures:
            raise failure
        if not self._agents:
            raise Unsupported(f"rocprofiler-sdk shows no GPU at {pci}", code="no_device")
        code = int(_loaded((HSA,)).hsa_init())
        if code:
            raise HalError(f"hsa_init failed: {code:#x}", code="error", native=code)
        self._ids: dict[str, int] = self._supported()

    def _bound(self, name: str, types: tuple[Any, ...]) -> Any:
        for each in (name, _EARLIER.get(name, name)):
            try:
                function = self._library[each]
            except AttributeError:
                continue
            function.argtypes, function.restype = types, c_int
            return function
        raise Unsupported(f"this rocprofiler-sdk has no {name}", code="unsupported", op=name)

    def call(self, name: str, *arguments: Any) -> None:
        code = self._functions[name](*arguments)
        if code:
            raise HalError(f"{name} failed: {code}", code="error", native=code, op=name)

    # -- called by the library --------------------------------------------------------------------

    def _configure(self, version: int, text: bytes, priority: int, client: Any) -> int:
        self._version = version
        client[0].name = b"drivetrain"
        return ctypes.addressof(self._result)

    def _initialize(self, finalize: int | None, data: int | None) -> int:
        try:
            self._prepare()
        except Exception as error:  # raised again behind the library's back
            self._failures.append(error)
            return -1
        return 0

    def _choose(self, context: int, agent: int, take: Any, data: int | None) -> None:
        take(context, self._config)

    # -- ours -------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        if self._version < OLDEST:
            raise Unsupported(
                f"rocprofiler-sdk {self._version} is too old (ROCm 6.4 has 600)", code="unsupported"
            )

        def seen(version: int, agents: Any, count: int, data: int | None) -> int:
            for at in range(count if version == AGENT_INFO_VERSION_0 else 0):
                agent = agents[at].contents
                if agent.type == AGENT_TYPE_GPU and agent.pci == self._pci:
                    self._agents.append(int(agent.id))
            return 0

        callback = _AGENTS(seen)
        size = ctypes.sizeof(Agent)
        self.call("rocprofiler_query_available_agents", AGENT_INFO_VERSION_0, callback, size, None)
        if not self._agents:
            return
        self.call("rocprofiler_create_context", byref(self._context))
        self.call(
            "rocprofiler_configure_device_counting_service",
            *(self._context.value, 0, self._agents[0], self._kept[0], None),
        )

    def _supported(self) -> dict[str, int]:
        """The counters that the GPU has, by name."""
        found: list[int] = []

        def listed(agent: int, ids: Any, count: int, data: int | None) -> int:
            found.extend(int(ids[at]) for at in range(count))
            return 0

        self.call(
            "rocprofiler_iterate_agent_supported_counters", self._agents[0], _LISTED(listed), None
        )
        names = {}
        for each in found:
            info = CounterInfo()
            self.call("rocprofiler_query_counter_info", each, COUNTER_INFO_VERSION_0, byref(info))
            names[(info.name or b"").decode(errors="replace")] = each
        return names

    def counted(self, wanted: dict[str, Counter]) -> dict[str, float]:
        """The counters over `counters.WINDOW_S`: together, or one by one where the hardware cannot
        do all at once."""
        ids = {self._ids[name]: told for name, told in wanted.items() if name in self._ids}
        if not ids:
            return {}
        try:
            return self._sampled(ids)
        except HalError:
            if len(ids) == 1:
                return {}
        found: dict[str, float] = {}
        for name in wanted:
            found |= self.counted({name: wanted[name]})
        return found

    def _sampled(self, ids: dict[int, Counter]) -> dict[str, float]:
        every, config = (c_uint64 * len(ids))(*ids), c_uint64()
        self.call(
            "rocprofiler_create_counter_config", self._agents[0], every, len(ids), byref(config)
        )
        self._config = config.value
        records, count = (Record * _MOST_RECORDS)(), c_size_t(_MOST_RECORDS)
        self.call("rocprofiler_start_context", self._context)
        try:
            began = time.monotonic()
            time.sleep(counters.WINDOW_S)
            self.call(
                "rocprofiler_sample_device_counting_service",
                *(self._context, 0, COUNTER_FLAG_NONE, records, byref(count)),
            )
            seconds = time.monotonic() - began
        finally:
            self.call("rocprofiler_stop_context", self._context)
        values: dict[int, list[float]] = {}
        for record in records[: count.value]:
            of = c_uint64()
            self.call("rocprofiler_query_record_counter_id", record.id, byref(of))
            values.setdefault(of.value, []).append(float(record.counter_value))
        found = {}
        for which, told in ids.items():
            parts = values.get(which)  # one for each part of the chip that has the counter
            if parts:
                whole = sum(parts) / (seconds if told.counts else len(parts))
                found[told.name] = whole * told.factor
        return found


def read(pci: str) -> counters.Readings:
    """The counters of the GPU at this PCI address. Raises HalError."""
    sampler = Sampler(pci)
    found: dict[str, float] = {}
    for together in COUNTERS:
        found |= sampler.counted(together)
    return tuple(found.items())
