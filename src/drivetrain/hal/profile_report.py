"""A profile as a table, as JSON, and as a Chrome trace."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drivetrain import __version__

if TYPE_CHECKING:
    from drivetrain.hal.profile import Line, Peaks, Profile
    from drivetrain.hal.timeline import Span

__all__ = ["as_json", "chrome_trace", "roof", "table"]

_KINDS = ("kernel", "graph", "copy", "link", "fill", "range", "wait")
_TITLES = {
    "kernel": "kernels",
    "graph": "graphs",
    "copy": "copies",
    "link": "copies between devices",
    "fill": "fills",
    "range": "ranges (host)",
    "wait": "waits (host)",
}
_HOST = 1
"""The host's ``pid``; devices follow. 0 is the idle process for viewers of traces."""
_MOST_ROWS = 512
"""Streams of one device, or threads, with a row of their own; the rest share the last one."""


def roof(line: Line, peaks: Peaks | None) -> tuple[float, str] | None:
    """(share of the roofline that was reached, ``memory`` or ``compute``: what bounds it)."""
    if peaks is None or not line.seconds or line.kind != "kernel":
        return None
    bounds = []
    if line.nbytes and peaks.memory_gbps > 0:
        bounds.append((line.nbytes / (peaks.memory_gbps * 1e9), "memory"))
    peak = peaks.flops.get(line.dtype, 0.0)
    if line.flops and peak > 0:
        bounds.append((line.flops / peak, "compute"))
    if not bounds:
        return None
    least_s, bound = max(bounds)
    return least_s / line.seconds, bound


# -- table ----------------------------------------------------------------------------------------


def table(profile: Profile) -> str:
    text = [
        f"profile of {profile.ended - profile.started:.3f} s, "
        f"{len(profile.spans)} spans kept, {profile.dropped} beyond the limit"
    ]
    estimated = False
    for kind in _KINDS:
        lines = profile.lines(kind)
        if not lines:
            continue
        rows = [_row(line, profile.peaks(line.device) if line.device else None) for line in lines]
        estimated |= any(line.bytes_are == "estimated" for line in lines)
        titles = (_TITLES[kind], "device", "calls", "total ms", "mean us", "min us", "max us")
        rows.insert(0, (*titles, "MB", "GB/s", "GFLOP/s", "of roofline"))
        if kind in ("range", "wait"):
            rows = [(*row[:5], "", "", "", "", "", "") for row in rows]
        text += ["", *_columns(rows)]
    text += ["", *_notes(profile, estimated)]
    return "\n".join(text)


def _row(line: Line, peaks: Peaks | None) -> tuple[str, ...]:
    host = line.kind in ("range", "wait")
    seconds, calls = (line.call_s, line.calls) if host else (line.seconds, line.timed)
    times = ("-",) * 4
    if calls:
        numbers = (seconds * 1e3, seconds / calls * 1e6, line.least_s * 1e6, line.most_s * 1e6)
        times = tuple(f"{number:.3f}" for number in numbers)  # type: ignore[assignment]
    mark = "~" if line.bytes_are == "estimated" else ""
    reached = roof(line, peaks)
    return (
        line.name + (f" ({line.failed} failed)" if line.failed else ""),
        line.device or "host",
        str(line.calls) if line.timed in (0, line.calls) else f"{line.timed} of {line.calls}",
        *times,
        "-" if line.nbytes is None else f"{mark}{line.nbytes / 1e6:.3f}",
        "-" if line.gbps is None else f"{mark}{line.gbps:.2f}",
        "-" if line.flops_per_s is None else f"{line.flops_per_s / 1e9:.2f}",
        "-" if reached is None else f"{mark}{reached[0]:.0%} {reached[1]}",
    )


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _clocks(profile: Profile) -> dict[str, str]:
    """Device -> whose clock told its times."""
    found: dict[str, str] = {}
    for kind in _KINDS:
        for line in profile.lines(kind):
            if line.device and line.clock:
                found[line.device] = line.clock
    return found


def _notes(profile: Profile, estimated: bool) -> list[str]:
    notes = []
    for device, clock in sorted(_clocks(profile).items()):
        if clock == "device":
            room = profile.clocks.get(device)
            much = "" if room is None else f"up to {room * 1e6:.0f} us "
            notes.append(
                f"{device}: times by events on the device; its row may lie {much}too early against "
                "the host's"
            )
        else:
            notes.append(
                f"{device}: its driver tells no times; each call was waited for, and the times are "
                "the host's"
            )
    untimed = sum(
        line.calls - line.timed - line.failed
        for kind in ("kernel", "graph", "copy", "fill")
        for line in profile.lines(kind)
    )
    if untimed > 0:
        notes.append(f"{untimed} calls without times: not done when the profile ended, or too many")
    if estimated:
        notes.append("~: no bytes were declared (Kernel.work); each buffer counts once, whole")
    return notes


# -- JSON -----------------------------------------------------------------------------------------


def as_json(profile: Profile) -> dict[str, Any]:
    clocks = _clocks(profile)
    return {
        "format": 1,
        "drivetrain": __version__,
        "seconds": profile.ended - profile.started,
        "spans": len(profile.spans),
        "dropped": profile.dropped,
        "devices": {
            device: {"clock": clock, "uncertainty_s": profile.clocks.get(device)}
            for device, clock in sorted(clocks.items())
        },
        **{
            _TITLES[kind].split(" (")[0].replace(" ", "_"): [
                _line_json(line, profile) for line in profile.lines(kind)
            ]
            for kind in _KINDS
        },
    }


def _line_json(line: Line, profile: Profile) -> dict[str, Any]:
    peaks = profile.peaks(line.device) if line.device else None
    reached = roof(line, peaks)
    return {
        "name": line.name,
        "device": line.device or None,
        "calls": line.calls,
        "timed": line.timed,
        "failed": line.failed,
        "seconds": line.seconds if line.timed else None,
        "least_s": line.least_s if line.timed else None,
        "most_s": line.most_s if line.timed else None,
        "call_s": line.call_s,
        "clock": line.clock or None,
        "bytes": line.nbytes,
        "bytes_are": line.bytes_are or None,
        "gbps": line.gbps,
        "flops": line.flops,
        "dtype": line.dtype or None,
        "flops_per_s": line.flops_per_s,
        "roofline_share": reached[0] if reached else None,
        "bound": reached[1] if reached else None,
    }


# -- Chrome trace ---------------------------------------------------------------------------------


class _Rows:
    """Small numbers for streams or threads, in the order in which they come."""

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}

    def of(self, key: int) -> int:
        return self._numbers.setdefault(key, min(len(self._numbers) + 1, _MOST_ROWS))

    def names(self) -> list[tuple[int, int]]:
        return [(number, key) for key, number in self._numbers.items()]


def chrome_trace(profile: Profile) -> dict[str, Any]:
    """``traceEvents``: complete events (``ph: "X"``), times in microseconds from the profile's
    begin. Process 1 is the host, with its threads; each device is a process, with its streams."""
    threads = _Rows()
    devices: dict[str, tuple[int, _Rows]] = {}
    events: list[dict[str, Any]] = []
    queued: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for span in profile.spans:
        call = _event(span, span.called_at - profile.started, span.call_s)
        events.append({**call, "pid": _HOST, "tid": threads.of(span.thread)})
        if span.at is None or span.seconds is None or span.kind == "link":
            continue
        pid, rows = devices.setdefault(span.device, (_HOST + 1 + len(devices), _Rows()))
        work = _event(span, span.at - profile.started, span.seconds)
        work |= {"pid": pid, "tid": rows.of(span.stream)}
        queued.setdefault((pid, work["tid"]), []).append(work)
    for row in queued.values():
        events += _in_order(row)
    events.sort(key=lambda event: (event["ts"], -event["dur"]))
    named = _names(
        _HOST, "host", [(n, profile.threads.get(k) or f"thread {k}") for n, k in threads.names()]
    )
    for address, (pid, rows) in devices.items():
        named += _names(pid, address, [(n, f"stream {n}") for n, _ in rows.names()])
    return {
        "traceEvents": named + events,
        "displayTimeUnit": "ns",
        "otherData": {
            "drivetrain": __version__,
            "clocks": _clocks(profile),
            "uncertainty_us": {k: v * 1e6 for k, v in profile.clocks.items()},
            "dropped": profile.dropped,
        },
    }


def _event(span: Span, at_s: float, seconds: float) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    if span.nbytes is not None:
        facts["bytes"] = span.nbytes
        facts["bytes are"] = span.bytes_are
        if span.seconds:
            facts["GB/s"] = round(span.nbytes / span.seconds / 1e9, 3)
    if span.flops is not None:
        facts["FLOP"] = span.flops
        if span.seconds:
            facts["GFLOP/s"] = round(span.flops / span.seconds / 1e9, 3)
    if span.clock:
        facts["clock"] = span.clock
    if span.failed:
        facts["failed"] = True
    return {
        "name": span.name,
        "cat": span.kind,
        "ph": "X",
        "ts": round(max(at_s, 0.0) * 1e6, 3),
        "dur": round(seconds * 1e6, 3),
        "args": facts,
    }


def _in_order(row: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Work of one stream does not overlap; what rounding and two segments of a clock do is undone,
    since viewers drop events that overlap without one lying in the other."""
    end = 0.0
    row.sort(key=lambda event: event["ts"])
    for event in row:
        late = end - event["ts"]
        if late > 0:
            event["ts"] = round(end, 3)
            event["dur"] = round(max(event["dur"] - late, 0.0), 3)
        end = event["ts"] + event["dur"]
    return row


def _names(pid: int, name: str, rows: list[tuple[int, str]]) -> list[dict[str, Any]]:
    told: dict[int, str] = {}
    for number, text in rows:
        told.setdefault(number, text)
    facts = [("process_name", 0, {"name": name}), ("process_sort_index", 0, {"sort_index": pid})]
    facts += [("thread_name", number, {"name": text}) for number, text in told.items()]
    return [{"name": n, "ph": "M", "pid": pid, "tid": tid, "args": a} for n, tid, a in facts]
