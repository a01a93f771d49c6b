"""``drivetrain capabilities``: what each device can do, as one table."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from drivetrain.cli.devices import console


def capabilities(
    addresses: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ADDRESS]...", help="Devices; all listed when none is named."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """What each device can do: groups, features, types, limits, and what was measured of it.

    Opens the devices in this process. One that cannot be opened is listed with the reason.

    Examples:

      drivetrain capabilities

      drivetrain capabilities cpu:0 opencl:0 --json
    """
    from drivetrain.placement.capabilities import CapabilityMatrix

    found = CapabilityMatrix.of(addresses or None)
    if as_json:
        print(json.dumps(found.as_json(), indent=2))
        return
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("device", style="bold", no_wrap=True)
    for title in ("groups", "features", "types", "limits", "free memory"):
        table.add_column(title)
    for row in found:
        types = [name if how == "native" else f"{name}*" for name, how in row.dtypes]
        limits = row.limits
        table.add_row(
            f"{row.address}\n{row.target}",
            escape(row.reason) or " ".join(row.groups),
            " ".join(row.features),
            ", ".join(types) or "none",
            f"{limits.threads} threads, {limits.shared_bytes >> 10} KiB a block" if limits else "",
            f"{row.free_bytes / 2**30:.1f} GiB",
        )
    console().print(table)
    if any(how == "converted" for row in found for _, how in row.dtypes):
        console().print("* stored in this type, computed in float32")
