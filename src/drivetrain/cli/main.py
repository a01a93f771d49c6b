"""The ``drivetrain`` command."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from drivetrain.errors import BadInput, DiskFull, DrivetrainError

if TYPE_CHECKING:
    import typer

_SCRIPT_ARGS: list[str] = []


def _mount() -> typer.Typer:
    import typer

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

    @app.callback()
    def top(
        version: bool = typer.Option(False, "--version", help="Print the version.", is_eager=True),
    ) -> None:
        if version:
            _tell_version()
            raise typer.Exit

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


def _tell_version() -> None:
    from drivetrain import __version__

    print(f"drivetrain {__version__}")


def script_args() -> list[str]:
    """What followed ``--`` on the command line: the script's own arguments."""
    return list(_SCRIPT_ARGS)


def _click_of(command: object) -> Any:
    """The exceptions of the click that typer uses: a copy of its own in newer versions."""
    core = next(kind.__module__ for kind in type(command).__mro__ if kind.__name__ == "Command")
    return sys.modules[core.rpartition(".")[0] + ".exceptions"]


@contextmanager
def _nothing_begun() -> Iterator[None]:
    """Within the block Ctrl-C ends the process at once: nothing has to be put back, and an import
    that is broken off may raise anything."""
    ours = False
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        with suppress(ValueError):  # this is not the main thread
            signal.signal(signal.SIGINT, lambda *_: os._exit(130))
            ours = True
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _stand_in_for_closed_streams() -> None:
    """The numbers 0 to 2 go to no file of ours when the caller closed them: what a job writes is
    passed on to 1 and 2."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # Python's word for a closed one
            nowhere = os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
            setattr(sys, name, os.fdopen(nowhere, mode))


def _drop_output() -> None:
    """What nobody takes is not written once more when the interpreter ends."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def main(argv: list[str] | None = None) -> None:
    """Entry point: exit 2 for bad input, 130 for Ctrl-C, 1 for what failed."""
    words = list(sys.argv[1:] if argv is None else argv)
    _stand_in_for_closed_streams()
    try:
        code = _obey(words)
        sys.stdout.flush()
    except BrokenPipeError:
        code = 1
        _drop_output()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            _drop_output()
            print(f"drivetrain: the disk is full: {error}", file=sys.stderr)
        elif _folder_is_gone():
            print("drivetrain: the current folder is gone; go to one that exists", file=sys.stderr)
        else:
            raise
        code = 2
    sys.exit(code)


def _folder_is_gone() -> bool:
    try:
        os.getcwd()
    except OSError:
        return True
    return False


def _obey(words: list[str]) -> int:
    """Do what was typed; the exit code."""
    _SCRIPT_ARGS.clear()
    if words and words[0] in ("run", "check") and "--" in words:
        cut = words.index("--")
        _SCRIPT_ARGS.extend(words[cut + 1 :])
        words = words[:cut]
    if words == ["--version"]:
        _tell_version()
        return 0
    with _nothing_begun():
        import typer

        command = typer.main.get_command(_mount())
        click = _click_of(command)
    try:
        code: Any = command.main(args=words, prog_name="drivetrain", standalone_mode=False)
    except click.NoArgsIsHelpError as error:
        print(error.format_message())
        return 2
    except click.UsageError as error:
        hint = ""
        if words and words[0] in ("run", "check"):
            hint = " (options for the script itself go after `--`)"
        print(f"drivetrain: {error.format_message()}{hint}", file=sys.stderr)
        return 2
    except (typer.Abort, KeyboardInterrupt):
        return 130
    except (BadInput, DiskFull) as error:
        print(f"drivetrain: {error}", file=sys.stderr)
        return 2
    except DrivetrainError as error:
        print(f"drivetrain: {error}", file=sys.stderr)
        return 1
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    main()
