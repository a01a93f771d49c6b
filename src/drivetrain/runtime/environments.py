"""Which interpreter a job's worker runs in: ``--env`` and ``[environments]`` in drivetrain.toml."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

from drivetrain.errors import BadInput
from drivetrain.store.home import home


def _configured() -> dict[str, str]:
    for folder in (Path.cwd(), home()):
        path = folder / "drivetrain.toml"
        if not path.is_file():
            continue
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8")).get("environments", {})
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise BadInput(f"{path} is not valid TOML: {error}") from error
        if not isinstance(table, dict) or not all(isinstance(v, str) for v in table.values()):
            raise BadInput(f"[environments] in {path} maps names to paths")
        return table
    return {}


def interpreter(environment: str | None) -> str:
    """The python of an environment: a name from drivetrain.toml, a virtual environment's folder,
    or an interpreter; None is this process's own."""
    if not environment:
        return sys.executable
    named = _configured()
    path = Path(named.get(environment, environment)).expanduser()
    candidates = [path / "bin" / "python", path] if path.is_dir() else [path]
    for candidate in candidates:
        if candidate.is_file():
            # Not resolved: a virtual environment is known by the link it was started through.
            return str(candidate.absolute())
    known = ", ".join(sorted(named)) or "none"
    raise BadInput(
        f"there is no environment {environment!r}: give a folder with bin/python, an interpreter, "
        f"or a name from [environments] in drivetrain.toml (named there: {known})"
    )
