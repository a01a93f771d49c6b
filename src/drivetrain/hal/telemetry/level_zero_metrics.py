"""Intel's counters through Level Zero's metrics: the group ``ComputeBasic`` sampled by time, which
has the shares of time that the engines are busy and the throughput of memory.

Names are the vendor's, in our way to write them, with the unit behind them. Functions and
structures as in ``zet_api.h``; tests compare each with that header. It makes a context and takes
the GPU's observation hardware: in a child only, started with ``ZET_ENABLE_METRICS=1``.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import byref, c_double, c_float, c_int, c_size_t, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from typing import Any

from drivetrain.errors import HalError, Unsupported
from drivetrain.hal.drivers import level_zero_api
from drivetrain.hal.drivers.level_zero_backend import seen
from drivetrain.hal.telemetry import counters, sysfs

GROUP = "ComputeBasic"
PERIOD_NS = 5_000_000
_MOST_READINGS = 32
_MOST_BYTES = 64 << 20

FUNCTIONS = {
    "zetMetricGroupGet": "zet_device_handle_t, uint32_t *, zet_metric_group_handle_t *",
    "zetMetricGroupGetProperties": "zet_metric_group_handle_t, zet_metric_group_properties_t *",
    "zetMetricGet": "zet_metric_group_handle_t, uint32_t *, zet_metric_handle_t *",
    "zetMetricGetProperties": "zet_metric_handle_t, zet_metric_properties_t *",
    "zetMetricGroupCalculateMetricValues": (
        "zet_metric_group_handle_t, zet_metric_group_calculation_type_t, size_t, const uint8_t *, "
        "uint32_t *, zet_typed_value_t *"
    ),
    "zetContextActivateMetricGroups": (
        "zet_context_handle_t, zet_device_handle_t, uint32_t, zet_metric_group_handle_t *"
    ),
    "zetMetricStreamerOpen": (
        "zet_context_handle_t, zet_device_handle_t, zet_metric_group_handle_t, "
        "zet_metric_streamer_desc_t *, ze_event_handle_t, zet_metric_streamer_handle_t *"
    ),
    "zetMetricStreamerReadData": "zet_metric_streamer_handle_t, uint32_t, size_t *, uint8_t *",
    "zetMetricStreamerClose": "zet_metric_streamer_handle_t",
}


class Zet:
    """Enum values, each under its name in ``zet_api.h`` less the ``ZET_``."""

    STRUCTURE_TYPE_METRIC_GROUP_PROPERTIES = 0x1
    STRUCTURE_TYPE_METRIC_PROPERTIES = 0x2
    STRUCTURE_TYPE_METRIC_STREAMER_DESC = 0x3
    METRIC_GROUP_SAMPLING_TYPE_FLAG_TIME_BASED = 2
    METRIC_GROUP_CALCULATION_TYPE_METRIC_VALUES = 0
    METRIC_TYPE_THROUGHPUT = 3
    METRIC_TYPE_RATIO = 6
    VALUE_TYPE_UINT32 = 0
    VALUE_TYPE_UINT64 = 1
    VALUE_TYPE_FLOAT32 = 2
    VALUE_TYPE_FLOAT64 = 3
    VALUE_TYPE_BOOL8 = 4


_HEAD = (("stype", c_int), ("pNext", c_void_p))
_TEXT = ctypes.c_char * 256


class GroupProperties(ctypes.Structure):
    _fields_ = (
        *_HEAD,
        ("name", _TEXT),
        ("description", _TEXT),
        ("samplingType", c_uint32),
        ("domain", c_uint32),
        ("metricCount", c_uint32),
    )


class MetricProperties(ctypes.Structure):
    _fields_ = (
        *_HEAD,
        ("name", _TEXT),
        ("description", _TEXT),
        ("component", _TEXT),
        ("tierNumber", c_uint32),
        ("metricType", c_int),
        ("resultType", c_int),
        ("resultUnits", _TEXT),
    )


class StreamerDesc(ctypes.Structure):
    _fields_ = (*_HEAD, ("notifyEveryNReports", c_uint32), ("samplingPeriod", c_uint32))


class Value(ctypes.Union):
    _fields_ = (
        ("ui32", c_uint32),
        ("ui64", c_uint64),
        ("fp32", c_float),
        ("fp64", c_double),
        ("b8", ctypes.c_uint8),
    )


class TypedValue(ctypes.Structure):
    _fields_ = (("type", c_int), ("value", Value))


STRUCTURES: dict[str, type[Any]] = {
    "zet_metric_group_properties_t": GroupProperties,
    "zet_metric_properties_t": MetricProperties,
    "zet_metric_streamer_desc_t": StreamerDesc,
    "zet_value_t": Value,
    "zet_typed_value_t": TypedValue,
}
_MEMBER = {
    Zet.VALUE_TYPE_UINT32: "ui32",
    Zet.VALUE_TYPE_UINT64: "ui64",
    Zet.VALUE_TYPE_FLOAT32: "fp32",
    Zet.VALUE_TYPE_FLOAT64: "fp64",
    Zet.VALUE_TYPE_BOOL8: "b8",
}
_SCALARS = {
    "uint32_t": c_uint32,
    "size_t": c_size_t,
    "zet_metric_group_calculation_type_t": c_int,
}


def _ctype(word: str) -> Any:
    return c_void_p if word.endswith(("*", "_handle_t")) else _SCALARS[word]


class Metrics:
    """The loader's functions for metrics. Raises Unsupported where it has none."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._functions: dict[str, Any] = {}
        for name, types in FUNCTIONS.items():
            try:
                function = library[name]
            except AttributeError:
                raise Unsupported(
                    f"this Level Zero loader has no {name}", code="unsupported", op=name
                ) from None
            function.argtypes = tuple(_ctype(each.strip()) for each in types.split(","))
            function.restype = c_int
            self._functions[name] = function

    def __call__(self, name: str, *arguments: Any) -> None:
        code = self._functions[name](*arguments)
        if code:
            raise HalError(
                f"{name} failed: {level_zero_api.word(code)}",
                code="error",
                driver=level_zero_api.NAME,
                native=code,
                op=name,
            )

    def handles(self, name: str, of: int) -> list[int]:
        count = c_uint32()
        self(name, of, byref(count), None)
        found = (c_void_p * max(1, count.value))()
        if count.value:
            self(name, of, byref(count), found)
        return [int(each or 0) for each in found[: count.value]]


@dataclass(frozen=True)
class Metric:
    """One of a group: its place in each report, what it is called here, what its unit is
    multiplied by."""

    at: int
    name: str
    factor: float


def read(pci: str) -> counters.Readings:
    """The counters of the GPU at this PCI address over `counters.WINDOW_S`. Raises HalError."""
    api = level_zero_api.load()
    path = os.environ.get(level_zero_api.SELECTED, "") or level_zero_api.find(
        [level_zero_api.LOADER]
    )
    metrics = Metrics(ctypes.CDLL(path or level_zero_api.LOADER))
    wanted = pci.lower()[-12:]
    here = next((each for each in seen(api) if each.pci == wanted), None)
    if here is None:
        raise Unsupported(f"Level Zero shows no device at {pci}", code="no_device", op="counters")
    group = _group(metrics, here.handle)
    every = metrics.handles("zetMetricGet", group)
    listed = _listed(metrics, every)
    described = level_zero_api.ContextDesc(level_zero_api.Ze.STRUCTURE_TYPE_CONTEXT_DESC)
    context = c_void_p()
    code = api.zeContextCreate(here.driver, byref(described), byref(context))
    if code:
        raise HalError(
            f"zeContextCreate failed: {level_zero_api.word(code)}", code="error", native=code
        )
    try:
        with _streamer(metrics, context, here.handle, group) as streamer:
            time.sleep(counters.WINDOW_S)
            data = _data(metrics, streamer)
    finally:
        api.zeContextDestroy(context)
    return _averages(_values(metrics, group, data), listed, len(every))


def _group(metrics: Metrics, device: int) -> int:
    for group in metrics.handles("zetMetricGroupGet", device):
        about = GroupProperties(Zet.STRUCTURE_TYPE_METRIC_GROUP_PROPERTIES)
        metrics("zetMetricGroupGetProperties", group, byref(about))
        timed = about.samplingType & Zet.METRIC_GROUP_SAMPLING_TYPE_FLAG_TIME_BASED
        if timed and about.name.decode(errors="replace") == GROUP:
            return group
    raise Unsupported(f"there is no group {GROUP} sampled by time", code="unsupported")


def _listed(metrics: Metrics, every: list[int]) -> list[Metric]:
    """The shares and throughputs among a group's metrics."""
    found = []
    for at, metric in enumerate(every):
        about = MetricProperties(Zet.STRUCTURE_TYPE_METRIC_PROPERTIES)
        metrics("zetMetricGetProperties", metric, byref(about))
        if about.metricType not in (Zet.METRIC_TYPE_RATIO, Zet.METRIC_TYPE_THROUGHPUT):
            continue
        name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", about.name.decode(errors="replace"))
        unit = about.resultUnits.decode(errors="replace").strip()
        if unit in ("percent", "%"):
            found.append(Metric(at, f"{sysfs.reading_name(name)}_ratio", 0.01))
        else:
            word = re.sub(r"[^a-z0-9]+", "_", unit.lower().replace("/", "_per_")).strip("_")
            found.append(Metric(at, f"{sysfs.reading_name(name)}_{word}".rstrip("_"), 1.0))
    return found[:_MOST_READINGS]


@contextmanager
def _streamer(metrics: Metrics, context: c_void_p, device: int, group: int) -> Iterator[c_void_p]:
    """A streamer of the group, which has the hardware until it is closed."""
    groups = (c_void_p * 1)(group)
    metrics("zetContextActivateMetricGroups", context, device, 1, groups)
    try:
        described = StreamerDesc(Zet.STRUCTURE_TYPE_METRIC_STREAMER_DESC, None, 1 << 15, PERIOD_NS)
        streamer = c_void_p()
        metrics(
            "zetMetricStreamerOpen",
            *(context, device, group, byref(described), None, byref(streamer)),
        )
        try:
            yield streamer
        finally:
            metrics("zetMetricStreamerClose", streamer)
    finally:
        metrics("zetContextActivateMetricGroups", context, device, 0, None)


def _data(metrics: Metrics, streamer: c_void_p) -> bytes:
    """All reports so far, as the hardware wrote them."""
    size, every = c_size_t(), 0xFFFFFFFF
    metrics("zetMetricStreamerReadData", streamer, every, byref(size), None)
    if not 0 < size.value <= _MOST_BYTES:
        return b""
    data = (ctypes.c_uint8 * size.value)()
    metrics("zetMetricStreamerReadData", streamer, every, byref(size), data)
    return bytes(data[: size.value])


def _values(metrics: Metrics, group: int, data: bytes) -> list[float]:
    """Of each report in turn, the value of each metric; NaN where the type is not known."""
    if not data:
        return []
    raw = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
    kind, count = Zet.METRIC_GROUP_CALCULATION_TYPE_METRIC_VALUES, c_uint32()
    name = "zetMetricGroupCalculateMetricValues"
    metrics(name, group, kind, len(data), raw, byref(count), None)
    if not 0 < count.value * ctypes.sizeof(TypedValue) <= _MOST_BYTES:
        return []
    values = (TypedValue * count.value)()
    metrics(name, group, kind, len(data), raw, byref(count), values)
    return [
        float(getattr(each.value, _MEMBER[each.type])) if each.type in _MEMBER else math.nan
        for each in values[: count.value]
    ]


def _averages(values: list[float], listed: list[Metric], width: int) -> counters.Readings:
    """Over the reports, which are equally long."""
    found = []
    for metric in listed:
        column = [value for value in values[metric.at :: width] if math.isfinite(value)]
        if column:
            found.append((metric.name, sum(column) / len(column) * metric.factor))
    return tuple(found)
