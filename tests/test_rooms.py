"""The house stands without torch: every room below the training loop imports when it is absent."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
TORCH_FREE = ("errors", "store", "hal", "migration", "placement", "runtime", "cli")
WITH_TORCH = {"drivetrain.placement.profile"}  # the profiler measures torch itself
NOT_IMPORTED = {"drivetrain.cli.demo.train_digits"}  # a script that is run, not a module

BLOCKED = """
import importlib, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "torchdata", "safetensors"}:
            raise ImportError(f"{name} is blocked here")

sys.meta_path.insert(0, Absent())
"""


def modules() -> list[str]:
    """Every module of the rooms that must do without torch."""
    found = []
    for path in sorted((SOURCE / "drivetrain").rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if len(parts) > 1 and parts[1] in TORCH_FREE and parts[-1] != "__main__":
            found.append(name)
    return [name for name in found if name not in WITH_TORCH | NOT_IMPORTED]


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(SOURCE), "PATH": "/usr/bin:/bin"},
    )


@pytest.mark.parametrize("room", TORCH_FREE)
def test_every_module_of_the_room_imports_with_torch_blocked(room: str):
    names = [name for name in modules() if name.split(".")[1] == room]
    assert names, f"the room {room} has no module"
    done = run(f"{BLOCKED}\nfor name in {names}:\n    importlib.import_module(name)")
    assert done.returncode == 0, done.stderr


def test_the_block_works_so_that_the_test_above_can_fail():
    done = run(f"{BLOCKED}\nimport drivetrain.training")
    assert done.returncode != 0
    assert "is blocked here" in done.stderr


def test_import_drivetrain_takes_neither_torch_nor_a_vendor_library():
    done = run(
        """
        import sys
        import drivetrain
        dir(drivetrain)
        heavy = {"torch", "numpy", "pynvml", "psutil", "rich", "typer", "msgpack", "xxhash"}
        print(*sorted(heavy & {name.split(".")[0] for name in sys.modules}))
        """
    )
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_the_front_door_has_every_name_that_it_lists():
    done = run(
        """
        import drivetrain
        for name in drivetrain.__all__:
            getattr(drivetrain, name)
        try:
            drivetrain.no_such_name
        except AttributeError as error:
            print(error)
        """
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "module 'drivetrain' has no attribute 'no_such_name'"
