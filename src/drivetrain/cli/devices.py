"""``drivetrain devices``: the machine's devices, as a page and as JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from drivetrain import hal
from drivetrain.hal import probe as probing
from drivetrain.hal.device import Device
from drivetrain.hal.probe import Verdict
from drivetrain.hal.telemetry import Telemetry
from drivetrain.hal.telemetry import health as healthy

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.table import Table

_REFRESH_S = 1.0


# --- facts, as JSON tells them -------------------------------------------------------------------


def device_record(device: Device, verdict: Verdict, now: Telemetry | None = None) -> dict[str, Any]:
    """One device of ``drivetrain devices --json``; ``now`` defaults to the reading at discovery."""
    now = now or device.info.telemetry
    total = device.info.memory_bytes or now.memory_total_bytes or 0
    free = None if now.memory_used_bytes is None else max(0, total - now.memory_used_bytes)
    return {
        "address": device.address,
        "driver": device.driver,
        "vendor": device.vendor,
        "name": device.name,
        "uuid": device.uuid,
        "routes": list(device.routes),
        "memory_bytes": total,
        "free_bytes": free,
        "usable": verdict.usable,
        "checked_at": verdict.checked_at_text,
        "reason": verdict.reason,
        "capabilities": device.capabilities.as_json(),
        "health": healthy.verdict(now).as_json(),
        "telemetry": now.as_json(),
    }


def report(
    *, probe: bool = False, all_routes: bool = False, live: bool = False
) -> dict[str, list[dict[str, Any]]]:
    """What ``drivetrain devices --json`` prints. ``live`` reads the sensors anew."""
    states = hal.drivers()
    found = hal.devices(all_routes=all_routes)
    known = probing.probe(found) if probe else probing.verdicts(found)
    return {
        "devices": [
            device_record(each, known[each], each.telemetry() if live else None) for each in found
        ],
        "drivers": [
            {"name": state.name, "state": state.state, "reason": state.reason}
            for state in states.values()
        ],
    }


# --- drivetrain devices --------------------------------------------------------------------------


def devices(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    probe: Annotated[
        bool,
        typer.Option("--probe", help="Use each device once, in a child process, to see it work."),
    ] = False,
    all_routes: Annotated[
        bool,
        typer.Option("--all-routes", help="List every driver's way to a device, not the best."),
    ] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Go on showing the sensors until Ctrl-C.")
    ] = False,
) -> None:
    """List the devices of this machine, and why a driver has none.

    Examples:

      drivetrain devices

      drivetrain devices --probe

      drivetrain devices --watch

      drivetrain devices --json | jq '.devices[].address'
    """
    if watch:
        _watch(as_json, probe, all_routes)
        return
    found = report(probe=probe, all_routes=all_routes)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    console().print(_page(found))


def _watch(as_json: bool, probe: bool, all_routes: bool) -> None:
    found = report(probe=probe, all_routes=all_routes)
    try:
        if as_json:
            while True:
                print(json.dumps(found), flush=True)
                time.sleep(_REFRESH_S)
                found = report(all_routes=all_routes, live=True)
        page = console()
        while not page.is_terminal or page.is_dumb_terminal:  # nothing is drawn over there
            page.print(_page(found))
            time.sleep(_REFRESH_S)
            found = report(all_routes=all_routes, live=True)
        from rich.live import Live

        # A table higher than the screen is cut there, not printed again each second.
        with Live(
            _page(found), console=page, auto_refresh=False, vertical_overflow="ellipsis"
        ) as live:
            while True:
                time.sleep(_REFRESH_S)
                found = report(all_routes=all_routes, live=True)
                live.update(_page(found), refresh=True)
    except KeyboardInterrupt:
        return


def console() -> Console:
    """Where pages are printed."""
    from rich.console import Console

    return Console(highlight=False)


def _size(nbytes: int | None) -> str:
    if nbytes is None:
        return "?"
    for unit, shift in (("TiB", 40), ("GiB", 30), ("MiB", 20)):
        if nbytes >= 1 << shift:
            return f"{nbytes / (1 << shift):.{0 if nbytes >= 100 << shift else 1}f} {unit}"
    return f"{nbytes} B"


def _page(found: Mapping[str, list[dict[str, Any]]]) -> Group:
    from rich.console import Group

    parts: list[Any] = [table_of(found["devices"])]
    parts.extend(driver_line(driver) for driver in found["drivers"] if driver["state"] != "usable")
    if any(device["usable"] is None for device in found["devices"]):
        parts.append("[dim]? = not checked yet: drivetrain devices --probe[/]")
    return Group(*parts)


def driver_line(driver: Mapping[str, Any]) -> str:
    """A driver that has no devices, and why, in rich's markup."""
    from rich.markup import escape

    colour = {"broken": "red", "unchecked": "yellow"}.get(driver["state"], "dim")
    return f"[{colour}]{escape(driver['name'])}: {driver['state']}[/], {escape(driver['reason'])}"


def table_of(devices: Iterable[Mapping[str, Any]]) -> Table:
    """The devices of ``report``, one a row."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("device", style="bold", no_wrap=True)
    table.add_column("name", overflow="fold")
    table.add_column("free / memory", justify="right", no_wrap=True)
    for title in ("busy", "power", "heat"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("usable", overflow="fold")
    for device in devices:
        now = device["telemetry"]
        busy, power, heat = now["utilisation"], now["power_w"], now["temperature_c"]
        usable = {True: "[green]yes[/]", None: "[dim]?[/]"}.get(
            device["usable"], f"[red]no[/]: {escape(device['reason'])}"
        )
        others = [route for route in device["routes"] if route != device["address"]]
        name = escape(device["name"])
        extent = device["capabilities"]
        if extent["multiprocessors"]:
            name += f" [dim]{extent['multiprocessors']} SMs[/]"
        elif extent["cores"] and device["driver"] == "cpu":
            name += f" [dim]{extent['cores']} core{'s' if extent['cores'] > 1 else ''}[/]"
        if others:
            name += f" [dim](also {', '.join(others)})[/]"
        table.add_row(
            device["address"],
            name,
            f"{_size(device['free_bytes'])} / {_size(device['memory_bytes'])}",
            "" if busy is None else f"{busy:.0%}",
            "" if power is None else f"{power:.0f} W",
            "" if heat is None else f"{heat:.0f} °C",
            f"{usable} {_health(device['health'])}".rstrip(),
        )
    return table


_COLOURS = {"strained": "yellow", "degraded": "red", "lost": "red"}


def _health(found: Mapping[str, Any]) -> str:
    """The verdict and why, in rich's markup; nothing where nothing is wrong."""
    from rich.markup import escape

    why = "; ".join(reason["text"] for reason in found["reasons"])
    if not why:
        return ""
    return f"[{_COLOURS.get(found['state'], 'dim')}]{found['state']}: {escape(why)}[/]"
