"""Metrics as text: Prometheus' exposition format, version 0.0.4."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MOST_SAMPLES = 2048
"""Of one metric; more are left out and counted."""

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_LONGEST_LABEL = 128


@dataclass
class Metric:
    """A metric and its samples. ``kind``: ``gauge``, ``counter`` or ``histogram``."""

    name: str
    kind: str
    help: str
    samples: list[tuple[str, dict[str, str], float]] = field(default_factory=list)
    """(what follows the name, labels, value)"""
    left_out: int = 0

    def add(self, value: float | None, /, **labels: str) -> None:
        """One sample; None, for a sensor that is absent, adds nothing."""
        if value is not None:
            self._add("", labels, float(value))

    def _add(self, suffix: str, labels: Mapping[str, str], value: float) -> None:
        if len(self.samples) < MOST_SAMPLES:
            self.samples.append((suffix, dict(labels), value))
        else:
            self.left_out += 1

    def add_histogram(
        self, edges: Sequence[float], counts: Sequence[int], total: float, /, **labels: str
    ) -> None:
        """``counts`` has one more than ``edges``: how many fell in each bucket, and beyond."""
        sum_so_far = 0
        for edge, count in zip((*edges, math.inf), counts, strict=True):
            sum_so_far += count
            self._add("_bucket", {**labels, "le": number(edge)}, sum_so_far)
        self._add("_sum", labels, total)
        self._add("_count", labels, sum_so_far)


def number(value: float) -> str:
    """As Prometheus writes it."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return str(int(value)) if value == int(value) and abs(value) < 1 << 53 else repr(value)


def _escaped(text: str) -> str:
    """A label's value: no control characters, no endless names, no half surrogate pairs."""
    text = text[:_LONGEST_LABEL].encode(errors="replace").decode()
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def render(metrics: Iterable[Metric]) -> str:
    """The page. Metrics without samples are left out."""
    lines: list[str] = []
    for metric in metrics:
        if not metric.samples:
            continue
        assert _NAME.fullmatch(metric.name), metric.name
        told = metric.help.replace("\\", r"\\").replace("\n", " ")
        lines += [f"# HELP {metric.name} {told}", f"# TYPE {metric.name} {metric.kind}"]
        for suffix, labels, value in metric.samples:
            inside = ",".join(f'{name}="{_escaped(text)}"' for name, text in labels.items())
            braces = f"{{{inside}}}" if inside else ""
            lines.append(f"{metric.name}{suffix}{braces} {number(value)}")
    return "\n".join(lines) + "\n"
