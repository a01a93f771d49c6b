"""``drivetrain drivers``: the drivers, and which of those from outside may run."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from drivetrain import hal
from drivetrain.cli.devices import console
from drivetrain.hal import registry

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
    console().print(table)


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
