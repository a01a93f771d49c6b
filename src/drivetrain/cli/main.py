"""The ``drivetrain`` command."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from drivetrain.errors import BadInput, DiskFull, DrivetrainError

_SCRIPT_ARGS: list[str] = []


def _mount() -> typer.Typer:
    from drivetrain.cli import calibrate, conformance, devices, doctor, drivers, jobs, port, run
    from drivetrain.cli.capabilities import capabilities
    from drivetrain.cli.exporter import exporter
    from drivetrain.cli.optimize import optimize

    app = typer.Typer(
        name="drivetrain",
        help="One program, any accelerator: find devices, run jobs, move them while they run.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_top)
    app.command()(devices.devices)
    app.command()(capabilities)
    app.command()(doctor.doctor)
    app.command()(calibrate.calibrate)
    app.command()(optimize)
    app.command()(conformance.conformance)
    app.command()(exporter)
    app.add_typer(drivers.drivers_app, name="drivers")
    app.command()(run.run)
    app.command(name="jobs")(jobs.jobs)
    app.command()(jobs.show)
    app.command()(jobs.logs)
    app.command()(jobs.migrate)
    app.command()(jobs.pause)
    app.command()(jobs.resume)
    app.command()(jobs.stop)
    app.command()(jobs.prune)
    app.command()(run.check)
    app.command()(port.port)
    app.command()(run.demo)
    return app


def _top(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True)
    ] = False,
) -> None:
    if version:
        from drivetrain import __version__

        print(f"drivetrain {__version__}")
        raise typer.Exit


def script_args() -> list[str]:
    """What followed ``--`` on the command line: the script's own arguments."""
    return list(_SCRIPT_ARGS)


def _click_of(command: object) -> Any:
    """The exceptions of the click that typer uses: a copy of its own in newer versions."""
    core = next(kind.__module__ for kind in type(command).__mro__ if kind.__name__ == "Command")
    return sys.modules[core.rpartition(".")[0] + ".exceptions"]


def main(argv: list[str] | None = None) -> None:
    """Entry point: exit 2 for bad input, 130 for Ctrl-C, 1 for what failed."""
    words = list(sys.argv[1:] if argv is None else argv)
    _SCRIPT_ARGS.clear()
    if words and words[0] in ("run", "check") and "--" in words:
        cut = words.index("--")
        _SCRIPT_ARGS.extend(words[cut + 1 :])
        words = words[:cut]
    if words == ["--version"]:
        from drivetrain import __version__

        print(f"drivetrain {__version__}")
        sys.exit(0)
    command = typer.main.get_command(_mount())
    click = _click_of(command)
    try:
        code: Any = command.main(args=words, prog_name="drivetrain", standalone_mode=False)
    except click.NoArgsIsHelpError as error:
        print(error.format_message())
        sys.exit(2)
    except click.UsageError as error:
        hint = ""
        if words and words[0] in ("run", "check"):
            hint = " (options for the script itself go after `--`)"
        print(f"drivetrain: {error.format_message()}{hint}", file=sys.stderr)
        sys.exit(2)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except (BadInput, DiskFull) as error:
        print(f"drivetrain: {error}", file=sys.stderr)
        sys.exit(2)
    except DrivetrainError as error:
        print(f"drivetrain: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
