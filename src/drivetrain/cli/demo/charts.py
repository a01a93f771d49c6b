"""The demo report's two pictures as inline SVG: the loss curve and the downtime bars.

Colours are the page's CSS variables, so both follow its light and dark theme. All text is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 960
_LEFT, _RIGHT = 64, 16
_MOST_POINTS = 900
_CHARACTER = 6.6  # pixels of a 12-pixel letter, on average


@dataclass(frozen=True)
class Mark:
    """Something that happened at a step: a move, or the kill."""

    step: int
    label: str
    kind: str
    """``move`` or ``kill``; also the CSS class."""


@dataclass(frozen=True)
class Bar:
    """One row of the downtime chart, in milliseconds; None where there is no such number."""

    label: str
    predicted_ms: float | None
    real_ms: float | None


def linear_ticks(high: float, most: int = 6) -> list[float]:
    """Round numbers from 0 to at most ``high``."""
    if high <= 0:
        return [0.0]
    rough = high / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [step * i for i in range(int(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten between two positive numbers; fewer when there are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [f * 10.0**p for p in powers for f in factors if low <= f * 10.0**p <= high]
        if len(ticks) <= 7:
            break
    return ticks


def by_step(losses: Iterable[tuple[int, float]]) -> list[tuple[int, float]]:
    """Losses that a logarithmic axis can show (1e-30 to 1e30), in step order.

    A repeated step counts as it was at last.
    """
    last = {int(step): float(loss) for step, loss in losses}
    return [(s, last[s]) for s in sorted(last) if 1e-30 < last[s] < 1e30]


def smooth(values: Sequence[float], reach: int) -> list[float]:
    """The running median over ``reach`` values to each side."""
    found = []
    for i in range(len(values)):
        window = sorted(values[max(0, i - reach) : i + reach + 1])
        found.append(window[len(window) // 2])
    return found


def loss_curve(losses: Iterable[tuple[int, float]], marks: Sequence[Mark]) -> str:
    """Loss over steps on a logarithmic axis, with the marks as vertical lines."""
    points = by_step(losses)
    if len(points) < 2:
        return '<p class="muted">No losses were recorded.</p>'
    height, top, bottom = 380, 64, 36
    steps = [step for step, _ in points]
    values = [loss for _, loss in points]
    middle = smooth(values, max(1, len(values) // 120))
    low, high = min(values) * 0.9, max(values) * 1.1
    last = max([steps[-1], *(mark.step for mark in marks)])

    def x(step: float) -> float:
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * step / last

    def y(loss: float) -> float:
        share = math.log(loss / low) / math.log(high / low)
        return height - bottom - (height - top - bottom) * share

    out = [_open(height, "Training loss over steps, with the moves and the kill marked")]
    for tick in log_ticks(low, high):
        out.append(_line(_LEFT, y(tick), WIDTH - _RIGHT, y(tick), "grid"))
        out.append(_text(_LEFT - 8, y(tick) + 4, f"{tick:g}", "tick", "end"))
    for tick in linear_ticks(last):
        out.append(_text(x(tick), height - bottom + 20, f"{tick:,.0f}", "tick", "middle"))
    out.append(_line(_LEFT, height - bottom, WIDTH - _RIGHT, height - bottom, "axis"))
    out.append(_text(_LEFT - 8, 16, "loss", "tick", "end"))
    out.append(_text(WIDTH - _RIGHT, height - 4, "step", "tick", "end"))
    keep = max(1, math.ceil(len(points) / _MOST_POINTS))
    for shown, kind in ((values, "raw"), (middle, "curve")):
        path = " ".join(
            f"{x(step):.1f},{y(value):.1f}"
            for step, value in list(zip(steps, shown, strict=True))[::keep]
        )
        out.append(f'<polyline class="{kind}" points="{path}"/>')
    out += _marks(marks, x, height - bottom)
    out.append("</svg>")
    return "".join(out)


def _marks(marks: Sequence[Mark], x: Callable[[float], float], foot: int) -> list[str]:
    """Lines with labels in three rows above the curve, so that near ones do not overlap."""
    out: list[str] = []
    free = [-math.inf] * 3  # the right end of the last label in each row
    for mark in sorted(marks, key=lambda mark: mark.step):
        at = x(mark.step)
        wide = len(mark.label) * _CHARACTER
        left = min(at + 5, WIDTH - _RIGHT - wide)
        row = next((i for i, end in enumerate(free) if left > end + 8), len(free) - 1)
        free[row] = left + wide
        high = 14 + 18 * row
        out.append(f'<g class="{escape(mark.kind)}"><title>step {mark.step}: ')
        out.append(f"{escape(mark.label)}</title>")
        out.append(_line(at, high - 10, at, foot, "mark"))
        out.append(_text(left, high, mark.label, "label", "start"))
        out.append("</g>")
    return out


def downtime_bars(bars: Sequence[Bar]) -> str:
    """Predicted above real, one pair a move, on one linear axis of milliseconds."""
    known = [v for bar in bars for v in (bar.predicted_ms, bar.real_ms) if v is not None]
    if not known:
        return '<p class="muted">No moves were made.</p>'
    left, thick, row, top = 250, 14, 58, 8
    height = top + row * len(bars) + 30
    most = max(known) or 1.0

    def x(ms: float) -> float:
        return left + (WIDTH - left - 90) * ms / most

    out = [_open(height, "Downtime of each move in milliseconds, predicted and real")]
    foot = top + row * len(bars)
    for tick in linear_ticks(most):
        out.append(_line(x(tick), top, x(tick), foot, "grid"))
        out.append(_text(x(tick), foot + 18, f"{tick:g} ms", "tick", "middle"))
    for index, bar in enumerate(bars):
        above = top + row * index + (row - 2 * thick - 2) / 2
        out.append(_text(left - 12, above + thick + 5, bar.label, "label", "end"))
        for order, (kind, value) in enumerate(
            (("predicted", bar.predicted_ms), ("real", bar.real_ms))
        ):
            at = above + order * (thick + 2)
            if value is None:
                out.append(_text(left + 6, at + thick - 3, f"{kind}: unknown", "tick", "start"))
                continue
            out.append(f'<rect class="{kind}" x="{left}" y="{at:.1f}" rx="2" height="{thick}"')
            out.append(f' width="{max(1.0, x(value) - left):.1f}"><title>{kind}: {value:.1f} ms')
            out.append("</title></rect>")
            out.append(_text(x(value) + 6, at + thick - 3, f"{value:.0f} ms", "value", "start"))
    out.append(_line(left, top, left, foot, "axis"))
    out.append("</svg>")
    return "".join(out)


def _open(height: float, title: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}" '
        'xmlns="http://www.w3.org/2000/svg">'
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, kind: str, anchor: str) -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )
