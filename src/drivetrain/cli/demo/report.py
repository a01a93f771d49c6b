"""demo-report.json as a page for people: one file, no script, no request to any network.

``write_html`` takes the report as it is written to demo-report.json. A migration and the failover
may carry ``step``, the number of completed steps when it happened; then the loss curve marks it.
What is missing from the report is shown as missing, never made up.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from drivetrain.cli.demo.charts import Bar, Mark, downtime_bars, loss_curve

_NONE = "–"
_DEVICE_COLUMNS = ("address", "name", "vendor", "driver", "memory_bytes", "usable")
_MOVE_COLUMNS = (
    "strategy",
    "from",
    "to",
    "downtime_ms",
    "predicted_downtime_ms",
    "state_bytes",
    "steps_lost",
    "steps_repeated",
    "hash_source",
    "hash_target",
    "ok",
)

_STYLE = """
:root { color-scheme: light dark;
  --page: #fbfbf9; --card: #ffffff; --ink: #16150f; --soft: #5c5b55; --line: #e3e2dc;
  --real: #2a6fd0; --predicted: #b4b8bf; --kill: #c8352f; --move: #7a4fc4; --good: #1a7f42; }
@media (prefers-color-scheme: dark) { :root {
  --page: #161613; --card: #1f1f1b; --ink: #f1f0ea; --soft: #a9a79d; --line: #383731;
  --real: #5b9bf0; --predicted: #6b6f77; --kill: #f0706a; --move: #b08cf0; --good: #55c07f; } }
* { box-sizing: border-box; }
body { margin: 0; padding: 32px 20px 48px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1040px; margin: auto; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 17px; margin: 36px 0 10px; }
.muted, caption { color: var(--soft); } caption { text-align: left; padding: 0 0 6px; }
.verdict { font-size: 17px; margin: 0 0 20px; } .good { color: var(--good); }
.bad { color: var(--kill); font-weight: 600; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 12px; }
.tile, figure { background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
.tile { padding: 12px 14px; } .tile b { display: block; font-size: 22px; line-height: 1.3; }
.tile span { color: var(--soft); font-size: 13px; }
figure { margin: 0; padding: 14px; } figcaption { color: var(--soft); font-size: 13px; }
svg { display: block; width: 100%; height: auto; font: 12px system-ui, sans-serif; }
.key { display: inline-block; width: 12px; height: 12px; border-radius: 2px; margin: 0 5px 0 12px;
  vertical-align: -1px; }
.table { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th, td { text-align: left; padding: 6px 12px 6px 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { color: var(--soft); font-weight: 500; white-space: nowrap; }
.facts th { width: 240px; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
code { font: 12.5px ui-monospace, monospace; overflow-wrap: anywhere; }
svg .grid { stroke: var(--line); } svg .axis { stroke: var(--soft); }
svg text { fill: var(--soft); } svg .label, svg .value { fill: var(--ink); }
svg .raw { fill: none; stroke: var(--real); opacity: .22; }
svg .curve { fill: none; stroke: var(--real); stroke-width: 2; stroke-linejoin: round; }
svg rect.real, .key.real { fill: var(--real); background: var(--real); }
svg rect.predicted, .key.predicted { fill: var(--predicted); background: var(--predicted); }
svg .mark { stroke-width: 1.5; } svg .move .mark { stroke: var(--move); }
svg .kill .mark { stroke: var(--kill); stroke-dasharray: 5 3; }
svg .move .label { fill: var(--move); } svg .kill .label { fill: var(--kill); }
"""


def write_html(
    report: Mapping[str, Any], losses: Iterable[tuple[int, float]], path: str | Path
) -> None:
    """Write the page; an older one is replaced only by a whole new one."""
    file = Path(path)
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(page(report, losses), encoding="utf-8")
    partial.replace(file)


def page(report: Mapping[str, Any], losses: Iterable[tuple[int, float]]) -> str:
    """The page's text."""
    moves: Sequence[Mapping[str, Any]] = report.get("migrations") or []
    failover: Mapping[str, Any] = report.get("failover") or {}
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Drivetrain demo</title><style>{_STYLE}</style></head><body><main>",
        "<h1>Drivetrain demo</h1>",
        _verdict(report),
        _tiles(report),
        "<h2>Loss</h2><figure>",
        loss_curve(losses, _marks(moves, failover)),
        "<figcaption>Each step (faint) and its running median, on a logarithmic axis.</figcaption>",
        "</figure><h2>Downtime</h2><figure>",
        downtime_bars([_bar(number, move) for number, move in enumerate(moves, 1)]),
        '<figcaption><i class="key predicted"></i>predicted before the move',
        '<i class="key real"></i>real, on the clock</figcaption></figure>',
        "<h2>Moves</h2>",
        _table(_MOVE_COLUMNS, moves),
        "<h2>Lost worker</h2>",
        _facts(failover, "Killed with SIGKILL while it trained."),
        *_chip(report.get("chip")),
        "<h2>The end</h2>",
        _facts(report.get("final"), "Compared with the same training that was never moved."),
        "<h2>Cost of the loop</h2>",
        _facts(report.get("overhead"), "A plain loop against the same loop as a job."),
        "<h2>Devices</h2>",
        _table(_DEVICE_COLUMNS, report.get("devices") or []),
        "<h2>Placement</h2>",
        _placement(report.get("placement") or {}),
        "</main></body></html>\n",
    ]
    return "".join(parts)


def _chip(chip: Mapping[str, Any] | None) -> list[str]:
    """The second job, on a device that torch does not know; nothing where there was none."""
    if not chip:
        return []
    rest = {name: given for name, given in chip.items() if name != "migrations"}
    return [
        "<h2>A chip that torch does not know</h2>",
        _table(_MOVE_COLUMNS, chip.get("migrations") or []),
        _facts(rest, "Other kernels and random numbers: samples are counted, bits not compared."),
    ]


def _verdict(report: Mapping[str, Any]) -> str:
    final = report.get("final") or {}
    failover = report.get("failover") or {}
    ours, theirs = final.get("state_hash"), final.get("unmoved_state_hash")
    identical = final.get("bit_identical")
    said = []
    if identical is True:
        said.append(("good", "The moved model is the unmoved one, bit for bit."))
    elif identical is None:
        said.append(("muted", "Not compared bit for bit: the devices are of unlike types."))
    if identical is False or (identical is True and ours != theirs):
        said = [("bad", "The moved model differs from the unmoved one.")]
    lost, doubled = failover.get("samples_lost"), failover.get("samples_doubled")
    if lost == 0 and doubled == 0:
        said.append(("good", "No sample was lost, none came twice."))
    elif lost is not None and doubled is not None:
        said.append(("bad", f"{lost} samples were lost, {doubled} came twice."))
    failed = [m for m in report.get("migrations") or [] if not m.get("ok")]
    if failed:
        said.append(("bad", f"{len(failed)} of the moves failed."))
    spans = " ".join(f'<span class="{kind}">{escape(text)}</span>' for kind, text in said)
    return f'<p class="verdict">{spans}</p>'


def _tiles(report: Mapping[str, Any]) -> str:
    final = report.get("final") or {}
    failover = report.get("failover") or {}
    overhead = report.get("overhead") or {}
    moves = report.get("migrations") or []
    pauses = [m["downtime_ms"] for m in moves if m.get("downtime_ms") is not None]
    accuracy, ratio = final.get("accuracy"), overhead.get("ratio")
    tiles = [
        (_NONE if accuracy is None else f"{accuracy:.2%}", "accuracy on held-out digits"),
        (str(len(moves)), "moves while it trained"),
        (value("downtime_ms", max(pauses)) if pauses else _NONE, "longest pause of a move"),
        (value("resumed_ms", failover.get("resumed_ms")), "from the kill to the next step's end"),
        (_NONE if ratio is None else f"{ratio:.3f} ×", "step time as a job"),
    ]
    inner = "".join(
        f'<div class="tile"><b>{escape(big)}</b><span>{escape(small)}</span></div>'
        for big, small in tiles
    )
    return f'<div class="tiles">{inner}</div>'


def _marks(moves: Sequence[Mapping[str, Any]], failover: Mapping[str, Any]) -> list[Mark]:
    marks = [
        Mark(int(move["step"]), f"{number} {move.get('strategy', 'move')}", "move")
        for number, move in enumerate(moves, 1)
        if move.get("step") is not None
    ]
    if failover.get("step") is not None:
        marks.append(Mark(int(failover["step"]), "killed", "kill"))
    return marks


def _bar(number: int, move: Mapping[str, Any]) -> Bar:
    label = f"{number} {move.get('strategy', '')} {move.get('from', '?')} → {move.get('to', '?')}"
    return Bar(label, move.get("predicted_downtime_ms"), move.get("downtime_ms"))


# -- tables -------------------------------------------------------------------------------


def value(name: str, given: Any) -> str:
    """A value as people read it; ``ms`` or ``bytes`` in its name is the unit."""
    if given is None:
        return _NONE
    if isinstance(given, bool):
        return "yes" if given else "no"
    if isinstance(given, (int, float)):
        if "bytes" in name.split("_"):
            return _bytes(float(given))
        if "ms" in name.split("_"):
            return f"{given / 1e3:.2f} s" if given >= 10_000 else f"{given:.4g} ms"
        return f"{given:,}" if isinstance(given, int) else f"{given:.4g}"
    if isinstance(given, str):
        return given
    return json.dumps(given, ensure_ascii=False)


def _bytes(given: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if given < 1024:
            return f"{given:.4g} {unit}"
        given /= 1024
    return f"{given:.4g} TiB"


def _heading(name: str) -> str:
    return " ".join(word for word in name.split("_") if word not in {"bytes", "ms"})


def _cell(name: str, given: Any) -> str:
    text = escape(value(name, given))
    if isinstance(given, (int, float)) and not isinstance(given, bool):
        return f'<td class="number">{text}</td>'
    return f"<td><code>{text}</code></td>" if "hash" in name else f"<td>{text}</td>"


def _table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return '<p class="muted">None.</p>'
    head = "".join(f"<th{_numeric(name, rows)}>{escape(_heading(name))}</th>" for name in columns)
    body = "".join(
        "<tr>" + "".join(_cell(name, row.get(name)) for name in columns) + "</tr>" for row in rows
    )
    return f'<div class="table"><table><tr>{head}</tr>{body}</table></div>'


def _numeric(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    given = next((row[name] for row in rows if row.get(name) is not None), None)
    number = isinstance(given, (int, float)) and not isinstance(given, bool)
    return ' class="number"' if number else ""


def _facts(facts: Mapping[str, Any] | None, caption: str) -> str:
    if not facts:
        return '<p class="muted">None.</p>'
    rows = "".join(
        f"<tr><th>{escape(_heading(name))}</th>{_plain_cell(name, given)}</tr>"
        for name, given in facts.items()
    )
    table = f"<table><caption>{escape(caption)}</caption>{rows}</table>"
    return f'<div class="table facts">{table}</div>'


def _plain_cell(name: str, given: Any) -> str:
    return _cell(name, given).replace(' class="number"', "", 1)


def _placement(placement: Mapping[str, Any]) -> str:
    """The reason in its sentence, the other facts, and the alternatives as their own table."""
    reason = placement.get("reason")
    out = f"<p>{escape(str(reason))}</p>" if reason else ""
    others = placement.get("alternatives")
    rows = [row for row in others or [] if isinstance(row, Mapping)]
    rest = {name: given for name, given in placement.items() if name != "reason"}
    if rows:
        del rest["alternatives"]
    out += _facts(rest, "The device that was chosen.")
    if rows:
        columns = list(dict.fromkeys(name for row in rows for name in row))
        out += "<h2>Alternatives</h2>" + _table(columns, rows)
    return out
