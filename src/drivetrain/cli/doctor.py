"""``drivetrain doctor``: every driver and device checked, with advice, and a report to send."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from drivetrain import hal
from drivetrain.cli.devices import console, driver_line, report, table_of
from drivetrain.errors import BadInput
from drivetrain.hal import loading, missing, registry


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
            console().print(f"\nReport written to {bundle}", markup=False)
    broken = any(driver["state"] == "broken" for driver in found["drivers"])
    silent = any(driver["complaints"] for driver in found["drivers"])
    if broken or silent or any(device["usable"] is False for device in found["devices"]):
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
    complaints = registry.examine()
    for driver in found["drivers"]:
        state = states[driver["name"]]
        driver["complaints"] = complaints.get(state.name, [])
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
    ours = state.name in loading.BUILT_IN
    if "did not answer within" in state.reason:
        who = (
            "look at the system's log (dmesg)"
            if ours
            else f"report it to the authors of {state.source}, or run drivetrain drivers untrust "
            f"{state.name}"
        )
        if state.name == "cuda":
            who += ", turn on persistence mode (nvidia-persistenced)"
        return (
            f"its software hangs or is slow: {who}, or give it more time with "
            "DRIVETRAIN_DISCOVERY_LIMIT_S=8"
        )
    if state.state == "absent":
        return state.install
    if not ours and "of the driver interface" in state.reason:
        return f"it comes from {state.source}: install a version that fits, or untrust it"
    lacking = missing.remedy(state.reason)
    if lacking:
        return lacking
    if state.name == "cuda":
        return "run nvidia-smi: when it fails too, reinstall the NVIDIA driver and reboot"
    if ours:
        return f"its vendor's software is here and does not work, install it again: {state.install}"
    return f"reinstall {state.source}, or report this to its authors"


def _tell(found: Mapping[str, Any]) -> None:
    from rich.markup import escape

    out = console()
    out.print(
        f"Drivetrain {found['drivetrain']}, Python {found['python']}, {found['system']}",
        markup=False,
    )
    packages = found["packages"]
    missing = [name for name, version in packages.items() if version is None]
    out.print(
        ", ".join(f"{name} {version}" for name, version in packages.items() if version),
        markup=False,
    )
    if "torch" in missing:
        out.print("[yellow]torch is not installed[/]: pip install 'drivetrain\\[torch]'")
    if found["native"] != "native":
        out.print(
            "[yellow]the C extension is not built[/]: hashing is slower; "
            "reinstall with a C compiler (Debian: apt install gcc python3-dev)"
        )
    out.print(table_of(found["devices"]))
    for driver in found["drivers"]:
        if driver["state"] == "usable":
            out.print(f"[green]{escape(driver['name'])}: usable[/]")
            for complaint in driver["complaints"]:
                out.print(f"  {complaint}", markup=False)
            continue
        out.print(driver_line(driver))
        if driver["advice"]:
            out.print(f"  {driver['advice']}", markup=False)


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
            "health": {
                "state": device["health"]["state"],
                "reasons": [
                    {"kind": reason["kind"], "text": clean(reason["text"])}
                    for reason in device["health"]["reasons"]
                ],
            },
            "telemetry": {
                **device["telemetry"],
                "health": clean(device["telemetry"]["health"]),
            },
        }
        for device in found["devices"]
    ]
    drivers = [
        {
            **driver,
            "reason": clean(driver["reason"]),
            "advice": clean(driver["advice"]),
            "complaints": [clean(each) for each in driver["complaints"]],
        }
        for driver in found["drivers"]
    ]
    return {**found, "devices": devices, "drivers": drivers}
