"""``drivetrain calibrate``: how fast devices are, measured and kept."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from drivetrain import hal
from drivetrain.cli.devices import console
from drivetrain.errors import HalError


def calibrate(
    addresses: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ADDRESS]...", help="Devices to measure; all when none is named."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Measure how fast devices are, so that placement need not guess.

    Each is measured in a worker that sees only it: matrix products in each type (by the vendor's
    BLAS, or else our own kernels), copy bandwidth, the cost of a launch, and the links between
    devices. torch measures only what neither does as the device can, where it is installed.
    Results are kept until the driver changes.

    Examples:

      drivetrain calibrate

      drivetrain calibrate cuda:0 --json
    """
    from drivetrain.placement import calibration

    chosen = tuple(dict.fromkeys(hal.device(address) for address in addresses or ()))
    if not chosen:
        chosen = tuple(each for each in hal.devices() if not each.info.by_name_only)
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
    from rich.markup import escape
    from rich.table import Table

    out = console()
    if measured:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("device", style="bold", no_wrap=True)
        for title in ("matrix products", "copy", "launch", "links"):
            table.add_column(title)
        for address, found in measured.items():
            table.add_row(
                address,
                escape("\n".join(_products(found["peak_flops"], found.get("measured_with", {})))),
                f"{found['copy_gbps']:.0f} GB/s",
                f"{found['launch_us']:.1f} µs",
                "\n".join(
                    f"{'to ' + addresses[end] if end in addresses else end} {gbps:.0f} GB/s"
                    for end, gbps in found["links"].items()
                ),
            )
        out.print(table)
    for name, reason in failed.items():
        out.print(f"{name}: {reason}", markup=False, style="red")


def _products(peaks: Mapping[str, float], told: Mapping[str, str]) -> list[str]:
    """One line a type, with what measured it; and the types that were not, with the reason."""
    lines = []
    for dtype, rate in peaks.items():
        by = told.get(dtype, "").partition(" (")[0]
        lines.append(f"{dtype} {_flops(rate)}" + (f" ({by})" if by else ""))
    lines += [f"{dtype} {why}" for dtype, why in told.items() if why.startswith("not measured")]
    return lines


def _flops(rate: float) -> str:
    for unit, size in (("PFLOP/s", 1e15), ("TFLOP/s", 1e12), ("GFLOP/s", 1e9)):
        if rate >= size:
            return f"{rate / size:.3g} {unit}"
    return f"{rate:.3g} FLOP/s"
