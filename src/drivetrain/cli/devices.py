"""``drivetrain devices``, ``doctor``, ``calibrate`` and ``drivers``."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from drivetrain import hal
from drivetrain.errors import BadInput, HalError
from drivetrain.hal import probe as probing
from drivetrain.hal import registry
from drivetrain.hal.device import Device
from drivetrain.hal.probe import Verdict
from drivetrain.hal.telemetry import Telemetry

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

      drivetrain devices --json | jq '.devices[].address'
    """
    if watch:
        _watch(as_json, probe, all_routes)
        return
    found = report(probe=probe, all_routes=all_routes)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    _console().print(_page(found))


def _watch(as_json: bool, probe: bool, all_routes: bool) -> None:
    found = report(probe=probe, all_routes=all_routes)
    try:
        if as_json:
            while True:
                print(json.dumps(found), flush=True)
                time.sleep(_REFRESH_S)
                found = report(all_routes=all_routes, live=True)
        from rich.live import Live

        with Live(_page(found), console=_console(), auto_refresh=False) as live:
            while True:
                time.sleep(_REFRESH_S)
                found = report(all_routes=all_routes, live=True)
                live.update(_page(found), refresh=True)
    except KeyboardInterrupt:
        return


def _console() -> Console:
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

    parts: list[Any] = [_table(found["devices"])]
    parts.extend(_line(driver) for driver in found["drivers"] if driver["state"] != "usable")
    if any(device["usable"] is None for device in found["devices"]):
        parts.append("[dim]? = not checked yet: drivetrain devices --probe[/]")
    return Group(*parts)


def _line(driver: Mapping[str, Any]) -> str:
    from rich.markup import escape

    colour = {"broken": "red", "unchecked": "yellow"}.get(driver["state"], "dim")
    return f"[{colour}]{escape(driver['name'])}: {driver['state']}[/], {escape(driver['reason'])}"


def _table(devices: Iterable[Mapping[str, Any]]) -> Table:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("device", style="bold", no_wrap=True)
    table.add_column("name", overflow="fold")
    table.add_column("free / memory", justify="right")
    for title in ("busy", "power", "heat"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("usable", overflow="fold")
    for device in devices:
        now = device["telemetry"]
        busy, power, heat = now["utilisation"], now["power_w"], now["temperature_c"]
        usable = {True: "[green]yes[/]", None: "[dim]?[/]"}.get(
            device["usable"], f"[red]no[/]: {escape(device['reason'])}"
        )
        if now["throttle"]:
            usable += f" [yellow]({', '.join(now['throttle'])})[/]"
        if now["health"].startswith("degraded"):
            usable += f" [yellow]{escape(now['health'])}[/]"
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
            usable,
        )
    return table


# --- drivetrain doctor ---------------------------------------------------------------------------


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    bundle: Annotated[
        Path | None,
        typer.Option(
            "--bundle",
            metavar="FILE",
            help="Write a report to send: no environment values, no paths of yours.",
        ),
    ] = None,
) -> None:
    """Check every driver and device, and say what to do about those that cannot be used.

    Ends with 1 when something that is installed does not work.

    Examples:

      drivetrain doctor

      drivetrain doctor --bundle report.json
    """
    found = examination()
    if bundle is not None:
        text = json.dumps(redacted(found), indent=2) + "\n"
        try:
            bundle.write_text(text, encoding="utf-8")
        except OSError as error:
            raise BadInput(f"the report cannot be written to {bundle}: {error}") from error
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        _tell(found)
        if bundle is not None:
            _console().print(f"\nReport written to {bundle}", markup=False)
    broken = any(driver["state"] == "broken" for driver in found["drivers"])
    if broken or any(device["usable"] is False for device in found["devices"]):
        raise typer.Exit(1)


def examination() -> dict[str, Any]:
    """Versions, drivers with advice, and every route probed."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from drivetrain import __version__
    from drivetrain.hal import bytes as hal_bytes

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    packages = ("torch", "torchdata", "numpy", "triton", "nvidia-ml-py", "psutil", "xxhash")
    states = hal.drivers()
    found = report(probe=True, all_routes=True)
    for driver in found["drivers"]:
        state = states[driver["name"]]
        driver["version"] = state.version
        driver["source"] = state.source
        driver["advice"] = _advice(state)
    return {
        "drivetrain": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "native": hal_bytes.BACKEND,
        "packages": {name: installed(name) for name in packages},
        **found,
    }


def _advice(state: hal.DriverInfo) -> str:
    if state.state == "usable":
        return ""
    if state.reason == "not trusted":
        return (
            f"it comes from {state.source}; to let Drivetrain run its code: "
            f"drivetrain drivers trust {state.name}"
        )
    if state.state == "unchecked":
        return "take it out of [drivers] disable to use it"
    if "did not answer within" in state.reason:
        return (
            "its software hangs or is slow: look at the system's log (dmesg), on NVIDIA turn on "
            "persistence mode (nvidia-persistenced), or give it more time with "
            "DRIVETRAIN_DISCOVERY_LIMIT_S=8"
        )
    if state.state == "broken" and state.name == "cuda":
        return "run nvidia-smi: when it fails too, reinstall the NVIDIA driver and reboot"
    if state.state == "broken":
        return f"reinstall {state.source}, or report this to its authors"
    return state.install


def _tell(found: Mapping[str, Any]) -> None:
    from rich.markup import escape

    console = _console()
    console.print(
        f"Drivetrain {found['drivetrain']}, Python {found['python']}, {found['system']}",
        markup=False,
    )
    packages = found["packages"]
    missing = [name for name, version in packages.items() if version is None]
    console.print(
        ", ".join(f"{name} {version}" for name, version in packages.items() if version),
        markup=False,
    )
    if "torch" in missing:
        console.print("[yellow]torch is not installed[/]: pip install 'drivetrain\\[torch]'")
    if found["native"] != "native":
        console.print(
            "[yellow]the C extension is not built[/]: hashing is slower; "
            "reinstall with a C compiler (Debian: apt install gcc python3-dev)"
        )
    console.print(_table(found["devices"]))
    for driver in found["drivers"]:
        if driver["state"] == "usable":
            console.print(f"[green]{escape(driver['name'])}: usable[/]")
            continue
        console.print(_line(driver))
        if driver["advice"]:
            console.print(f"  {driver['advice']}", markup=False)


def redacted(found: dict[str, Any]) -> dict[str, Any]:
    """A copy without environment values, user names, home paths or whole device ids."""
    import os

    hidden = sorted(
        ((value, name) for name, value in os.environ.items() if len(value) > 2),
        key=lambda pair: -len(pair[0]),
    )
    home = str(Path.home())

    def clean(text: str) -> str:
        text = text.replace(str(registry.state_folder()), "<state folder>")
        text = text.replace(str(Path.cwd()), "<current folder>")
        if len(home) > 1:
            text = text.replace(home, "~")
        for value, name in hidden:
            text = text.replace(value, f"<{name}>")
        return text

    devices = [
        {
            **device,
            "uuid": device["uuid"][:8] + "..." if len(device["uuid"]) > 11 else device["uuid"],
            "reason": clean(device["reason"]),
            "capabilities": {
                **device["capabilities"],
                "peer_uuids": len(device["capabilities"]["peer_uuids"]),
            },
            "telemetry": {
                **device["telemetry"],
                "health": clean(device["telemetry"]["health"]),
            },
        }
        for device in found["devices"]
    ]
    drivers = [{**driver, "reason": clean(driver["reason"])} for driver in found["drivers"]]
    return {**found, "devices": devices, "drivers": drivers}


# --- drivetrain calibrate ------------------------------------------------------------------------


def calibrate(
    addresses: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ADDRESS]...", help="Devices to measure; all when none is named."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Measure how fast devices are, so that placement need not guess.

    Each is measured in a worker that sees only it: matrix products in each type, copy bandwidth,
    the cost of a launch, and the links between devices. Results are kept until the driver changes.

    Examples:

      drivetrain calibrate

      drivetrain calibrate cuda:0 --json
    """
    from drivetrain.placement import calibration

    chosen = tuple(dict.fromkeys(hal.device(address) for address in addresses or ()))
    if not chosen:
        chosen = hal.devices()
    measured: dict[str, Any] = {}
    failed: dict[str, str] = {}
    with _Progress(sys.stderr) as progress:
        for device in chosen:
            try:
                found = calibration.calibrate(device, progress=progress.of(device.address))
                measured[device.address] = found.as_json()
            except HalError as error:
                failed[device.address] = str(error)
        try:
            calibration.calibrate_links(
                [device for device in chosen if device.address in measured],
                progress=progress.of("links"),
            )
        except HalError as error:
            failed["links"] = str(error)
    for device in chosen:
        kept = calibration.load(device)
        if device.address in measured and kept is not None:
            measured[device.address] = kept.as_json()
    if as_json:
        print(json.dumps({"devices": measured, "failed": failed}, indent=2))
    else:
        _show_calibration(measured, failed, {device.uuid: device.address for device in chosen})
    if failed:
        raise typer.Exit(1)


class _Progress:
    """A bar on a terminal, one line a device elsewhere; on standard error."""

    def __init__(self, stream: Any) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._console = Console(file=stream, highlight=False)
        self._bars = Progress(
            TextColumn("[bold]{task.fields[device]}[/]"),
            BarColumn(),
            TextColumn("{task.description}"),
            console=self._console,
            transient=True,
        )

    def __enter__(self) -> _Progress:
        if self._console.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._bars.stop()

    def of(self, name: str) -> Any:
        """A callback for ``calibration.calibrate``."""
        if not self._console.is_terminal:
            told: list[str] = []

            def once(what: str, share: float) -> None:
                if not told:
                    self._console.print(f"measuring {name}", markup=False)
                    told.append(what)

            return once
        task = self._bars.add_task("starts", total=1.0, device=name)

        def advance(what: str, share: float) -> None:
            self._bars.update(task, description=what, completed=share)

        return advance


def _show_calibration(
    measured: Mapping[str, Any], failed: Mapping[str, str], addresses: Mapping[str, str]
) -> None:
    from rich import box
    from rich.table import Table

    console = _console()
    if measured:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("device", style="bold", no_wrap=True)
        for title in ("matrix products", "copy", "launch", "links"):
            table.add_column(title)
        for address, found in measured.items():
            table.add_row(
                address,
                "\n".join(f"{dtype} {_flops(rate)}" for dtype, rate in found["peak_flops"].items()),
                f"{found['copy_gbps']:.0f} GB/s",
                f"{found['launch_us']:.1f} µs",
                "\n".join(
                    f"{'to ' + addresses[end] if end in addresses else end} {gbps:.0f} GB/s"
                    for end, gbps in found["links"].items()
                ),
            )
        console.print(table)
    for name, reason in failed.items():
        console.print(f"{name}: {reason}", markup=False, style="red")


def _flops(rate: float) -> str:
    for unit, size in (("PFLOP/s", 1e15), ("TFLOP/s", 1e12), ("GFLOP/s", 1e9)):
        if rate >= size:
            return f"{rate / size:.3g} {unit}"
    return f"{rate:.3g} FLOP/s"


# --- drivetrain drivers --------------------------------------------------------------------------

drivers_app = typer.Typer(
    name="drivers",
    help="Drivers, and which of those from outside may run.",
    no_args_is_help=True,
    add_completion=False,
)


@drivers_app.command("list")
def list_drivers(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """List every driver with its state.

    Example: drivetrain drivers list --json
    """
    states = [
        {"name": s.name, "state": s.state, "reason": s.reason, "source": s.source}
        for s in hal.drivers().values()
    ]
    if as_json:
        print(json.dumps({"drivers": states}, indent=2))
        return
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("driver", "state", "from", "reason"):
        table.add_column(title)
    for state in states:
        table.add_row(*(escape(state[key]) for key in ("name", "state", "source", "reason")))
    _console().print(table)


@drivers_app.command("trust")
def trust(
    name: Annotated[str, typer.Argument(help="The driver's name, as `devices` lists it.")],
) -> None:
    """Let Drivetrain run an outside driver's code from now on.

    Example: drivetrain drivers trust mychip
    """
    source = registry.trust(name)
    print(f"driver {name} from {source} is trusted")


@drivers_app.command("untrust")
def untrust(
    name: Annotated[str, typer.Argument(help="The driver's name.")],
) -> None:
    """No longer run an outside driver's code.

    Example: drivetrain drivers untrust mychip
    """
    registry.untrust(name)
    print(f"driver {name} is no longer trusted")
