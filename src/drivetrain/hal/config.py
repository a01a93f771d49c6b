"""Where state lives, which drivers are switched off, and which outside drivers are trusted."""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
import time
import tomllib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import platformdirs

from drivetrain.errors import BadInput

TRUST_FILE = "trusted-drivers.json"
_TURN_S = 2.0


def state_folder() -> Path:
    """``DRIVETRAIN_HOME``, else the platform's state folder. It need not exist."""
    home = os.environ.get("DRIVETRAIN_HOME")
    return Path(home) if home else Path(platformdirs.user_state_path("drivetrain"))


def boot_id() -> str:
    """Changes at each boot; empty where the system does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def read_json(path: Path) -> dict[str, Any]:
    """The object in this file; ``{}`` when it is missing or unreadable: these files are caches."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Replaces the file in one step: a reader sees the old object or the new one."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=1, sort_keys=True)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def change_json(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Replaces the file by what ``change`` makes of its object. One process at a time does so, and
    one thread, so that nobody's change is lost. Where its turn does not come within 2 s (a file
    system without locks, a holder that was stopped) it goes ahead all the same."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    turn = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)  # no file of its own is left behind
    try:
        deadline = time.monotonic() + _TURN_S
        while True:
            try:
                fcntl.flock(turn, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    break
                time.sleep(0.005)
            except OSError:
                break
        write_json(path, change(read_json(path)))
    finally:
        os.close(turn)


def disabled_drivers() -> dict[str, str]:
    """Driver -> the file whose ``[drivers] disable`` switches it off.

    ``drivetrain.toml`` is read in the current folder and in the state folder. Raises BadInput for a
    file that is no TOML or says something else there.
    """
    found: dict[str, str] = {}
    folders = [state_folder()]
    with suppress(FileNotFoundError):  # the current folder may be gone, and have said nothing
        folders.insert(0, Path.cwd())
    for folder in folders:
        path = folder / "drivetrain.toml"
        try:
            text = path.read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"{path} cannot be read: {error}") from error
        try:
            section = tomllib.loads(text).get("drivers", {})
        except tomllib.TOMLDecodeError as error:
            raise BadInput(f"{path} is no TOML: {error}") from error
        names = section.get("disable", []) if isinstance(section, dict) else None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise BadInput(
                f'{path}: [drivers] disable must be a list of names, as in disable = ["cuda"]'
            )
        for name in names:
            found.setdefault(name, str(path))
    return found


def trusted_drivers() -> dict[str, str]:
    """Outside driver -> what was trusted: ``distribution:entry point``."""
    return _trusted(read_json(state_folder() / TRUST_FILE))


def _trusted(found: dict[str, Any]) -> dict[str, str]:
    return {name: value for name, value in found.items() if isinstance(value, str)}


def write_trust(name: str, value: str | None) -> None:
    """Trusts (or, with ``None``, no longer trusts) an outside driver. Raises BadInput when the
    state folder cannot be written."""

    def change(found: dict[str, Any]) -> dict[str, Any]:
        others = {each: told for each, told in _trusted(found).items() if each != name}
        return others if value is None else {**others, name: value}

    path = state_folder() / TRUST_FILE
    try:
        change_json(path, change)
    except OSError as error:
        raise BadInput(f"{path} cannot be written, nothing was changed: {error}") from error
