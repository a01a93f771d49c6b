"""NVIDIA's counters of how well a GPU is used (GPM, Hopper and newer): occupancy, tensor cores,
memory bandwidth, links.

A metric is what happened between two samples, so the first reading has none; later ones tell of the
time since the last, at least 100 ms of it.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

_SHORTEST_S = 0.1
_MOST_SAMPLES = 64

_METRICS = {
    "GRAPHICS_UTIL": ("graphics_busy_ratio", 0.01),
    "SM_UTIL": ("sm_busy_ratio", 0.01),
    "SM_OCCUPANCY": ("sm_occupancy_ratio", 0.01),
    "ANY_TENSOR_UTIL": ("tensor_busy_ratio", 0.01),
    "FP64_UTIL": ("fp64_busy_ratio", 0.01),
    "FP32_UTIL": ("fp32_busy_ratio", 0.01),
    "FP16_UTIL": ("fp16_busy_ratio", 0.01),
    "DRAM_BW_UTIL": ("dram_bandwidth_ratio", 0.01),
    "PCIE_TX_PER_SEC": ("pcie_sent_mibps", 1.0),
    "PCIE_RX_PER_SEC": ("pcie_received_mibps", 1.0),
    "NVLINK_TOTAL_TX_PER_SEC": ("nvlink_sent_mibps", 1.0),
    "NVLINK_TOTAL_RX_PER_SEC": ("nvlink_received_mibps", 1.0),
}
"""NVML_GPM_METRIC_* -> our name, and what its unit (per cent, MiB/s) is multiplied by."""


@dataclass
class _Sample:
    handle: Any
    at: float
    readings: tuple[tuple[str, float], ...] = ()


_lock = threading.Lock()
_samples: OrderedDict[str, _Sample] = OrderedDict()
_unsupported: set[str] = set()
_process = 0


def read(nv: Any, uuid: str, handle: Any) -> tuple[tuple[str, float], ...]:
    """The counters since the last call for this GPU; empty at the first call and without GPM."""
    global _process
    with _lock:
        if _process != os.getpid():  # NVML was initialised anew: samples of the parent are void
            _process = os.getpid()
            _samples.clear()
            _unsupported.clear()
        if uuid in _unsupported:
            return ()
        before = _samples.get(uuid)
        now = time.monotonic()
        if before is not None and now - before.at < _SHORTEST_S:
            return before.readings
        taken = _taken(nv, uuid, handle)
        if taken is None:
            return ()
        readings: tuple[tuple[str, float], ...] = ()
        if before is not None:
            readings = _between(nv, before.handle, taken)
            _freed(nv, before.handle)
        while len(_samples) >= _MOST_SAMPLES:
            _freed(nv, _samples.popitem(last=False)[1].handle)
        _samples[uuid] = _Sample(taken, now, readings)
        return readings


def _asked(nv: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    """None for an error of NVML, and where this NVML or its binding is older than GPM."""
    try:
        return function(*arguments)
    except (nv.NVMLError, AttributeError):
        return None


def _taken(nv: Any, uuid: str, handle: Any) -> Any:
    """A new sample; None, remembered, on a GPU without GPM."""
    try:
        query = nv.nvmlGpmQueryDeviceSupport
        alloc, get = nv.nvmlGpmSampleAlloc, nv.nvmlGpmSampleGet
    except AttributeError:
        return None
    told = _asked(nv, query, handle)
    if told is None or not told.isSupportedDevice:
        _unsupported.add(uuid)
        return None
    sample = _asked(nv, alloc)
    if sample is None:
        return None
    try:
        get(handle, sample)
    except nv.NVMLError:
        _freed(nv, sample)
        return None
    return sample


def _freed(nv: Any, sample: Any) -> None:
    with suppress(nv.NVMLError):
        nv.nvmlGpmSampleFree(sample)


def _between(nv: Any, first: Any, second: Any) -> tuple[tuple[str, float], ...]:
    wanted = [
        (getattr(nv, f"NVML_GPM_METRIC_{name}"), told)
        for name, told in _METRICS.items()
        if hasattr(nv, f"NVML_GPM_METRIC_{name}")
    ]
    question = nv.c_nvmlGpmMetricsGet_t()
    question.version = nv.NVML_GPM_METRICS_GET_VERSION
    question.sample1, question.sample2 = first, second
    question.numMetrics = len(wanted)
    for slot, (metric, _) in enumerate(wanted):
        question.metrics[slot].metricId = metric
    if _asked(nv, nv.nvmlGpmMetricsGet, question) is None:
        return ()
    found = []
    for slot, (_, (name, factor)) in enumerate(wanted):
        answer = question.metrics[slot]
        if not answer.nvmlReturn and answer.value == answer.value:  # NaN: not counted
            found.append((name, float(answer.value) * factor))
    return tuple(found)


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # a thread of the parent may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
