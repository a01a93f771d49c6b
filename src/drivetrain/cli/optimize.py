"""``drivetrain optimize``: what a device offers to a model, tried and measured."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from drivetrain.cli.devices import console
from drivetrain.errors import BadInput

if TYPE_CHECKING:
    from drivetrain.pytorch.optimize import Report

TORCH = "this command needs PyTorch: pip install 'drivetrain[torch]'"


def optimize(
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:FACTORY",
            help="A function without arguments that returns (model, example inputs), or those and "
            "an optimizer. MODULE is a module's name or a file.",
        ),
    ],
    on: Annotated[str, typer.Option("--on", metavar="ADDRESS", help="The device.")],
    objective: Annotated[
        str, typer.Option("--objective", help="latency, throughput or memory.")
    ] = "latency",
    tolerance: Annotated[
        float, typer.Option("--tolerance", help="Relative error that is allowed.")
    ] = 1e-2,
    seconds: Annotated[
        float | None, typer.Option("--seconds", help="What the search may take; unlimited.")
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option("--skip", metavar="PATTERN", help="Steps not to try, as in 'compile-*'."),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Search anew, whatever was found before.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Try what a device offers to a model, and print what was kept and why.

    Each step (types, layouts, attention, compilation, ...) is measured on the device, compared with
    the model in float32, and kept only where it gains. In eval mode a call is measured, in training
    a whole step. The plan is remembered: drivetrain.pytorch.optimize.optimize finds it at once.

    Examples:

      drivetrain optimize models.py:resnet --on cuda:0

      drivetrain optimize my.package:factory --on cpu:0 --objective memory --json
    """
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise BadInput(TORCH) from error
    from drivetrain.pytorch.optimize import optimize as search

    model, inputs, optimizer = _made(target)
    found = search(
        model,
        on,
        inputs,
        objective=objective,  # type: ignore[arg-type]
        tolerance=tolerance,
        optimizer=optimizer,
        seconds=seconds,
        skip=tuple(skip or ()),
        cache="refresh" if fresh else True,
        progress=_progress,
    )
    if as_json:
        print(json.dumps(found.report.as_json(), indent=2))
    else:
        _show(found.report)


def _made(target: str) -> tuple[Any, Any, Any]:
    """What the factory returns. Raises BadInput for what is none."""
    module_name, colon, name = target.rpartition(":")
    if not colon or not module_name or not name:
        raise BadInput(f"{target!r} is no MODULE:FACTORY; write models.py:make or package.module:f")
    module = _module(module_name)
    factory = getattr(module, name, None)
    if not callable(factory):
        there = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")][:10]
        raise BadInput(f"{module_name} has no function {name!r}; there are: {', '.join(there)}")
    found = factory()
    if not isinstance(found, (tuple, list)) or len(found) not in (2, 3):
        raise BadInput(
            f"{target} returned a {type(found).__name__}; it must return (model, example inputs) "
            "or (model, example inputs, optimizer)"
        )
    model, inputs, *rest = found
    return model, inputs, rest[0] if rest else None


def _module(name: str) -> Any:
    path = Path(name).resolve() if name.endswith(".py") else None
    if path is not None and not path.is_file():
        raise BadInput(f"there is no file {name}")
    if path is None and name.startswith("."):
        raise BadInput(f"{name!r} is relative to no package; write the module's whole name")
    folder = str(Path.cwd() if path is None else path.parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return importlib.import_module(name) if path is None else _of_file(path)
    except ModuleNotFoundError as error:
        raise BadInput(f"{name} cannot be imported: {error}") from error


def _of_file(path: Path) -> Any:
    """The module in this file, also when another one of its name is there already."""
    name = path.stem
    known = sys.modules.get(name)
    if known is not None:
        if getattr(known, "__file__", None) == str(path):
            return known
        name += "_to_optimize"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _progress(what: str) -> None:
    print(f"trying {what}", file=sys.stderr, flush=True)


def _show(report: Report) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from drivetrain.pytorch.optimize.report import error, speed

    out = console()
    head, _, _ = str(report).partition("\n\n")
    out.print(head, markup=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("step", style="bold", no_wrap=True)
    table.add_column("speed", justify="right", no_wrap=True)
    table.add_column("error", justify="right", no_wrap=True)
    table.add_column("verdict", overflow="fold")
    colours = {"kept": "green", "rejected": "red", "failed": "red", "not tried": "dim"}
    for trial in report.trials:
        verdict = Text(trial.verdict, style=colours.get(trial.verdict, ""))
        verdict.append(f": {trial.reason}" if trial.reason else "", style="dim")
        table.add_row(trial.step, speed(trial), error(trial), verdict)
    out.print(table)
