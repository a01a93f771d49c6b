"""``drivetrain check``: read a script, then rehearse a move, and name what would go wrong in one.

The script is run twice on a private stage (``rehearsal``): once for ten steps, and once for five,
a move, and five more, where the second copy is started under another hash seed. Both runs show
their state after five and after ten steps. What differs after five steps does not depend on a
move: the script is not repeatable. What differs only after ten did not move.
"""

from __future__ import annotations

import ast
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from drivetrain.errors import BadInput, MigrationError
from drivetrain.runtime import Runtime
from drivetrain.training import static_check
from drivetrain.training.rehearsal import Rehearsal, State, counted, stage
from drivetrain.training.static_check import Finding

STEPS = 5
_HASH_SEED = 20011
_CHOSEN = ("vars.", "extra.")  # may hold the time of day, say
_CAUSES = ("unseeded", "set-order")


def rehearse(
    script: str | os.PathLike[str],
    args: Sequence[str] = (),
    *,
    on_progress: Callable[[str], None] | None = None,
) -> list[Finding]:
    """What a move of this script would double, lose or fail at, by line; empty when nothing.

    Runs the script (about ten steps, three copies) in a copy of the current folder; absolute
    paths that it writes are the real ones. Code after the loop is not run. Raises BadInput when
    there is no such script, it is not Python, or the machine has no two devices to move between.
    """
    path = Path(script).resolve()
    if not path.is_file():
        raise BadInput(f"there is no script {os.fspath(script)!r}")
    check = _Check(path, args, on_progress or (lambda text: None))
    with stage() as (root, devices):
        check.run(root, devices)
    return sorted(check.found)


class _Check:
    def __init__(self, script: Path, args: Sequence[str], tell: Callable[[str], None]) -> None:
        self.found: list[Finding] = static_check.findings(script)
        self._script = script
        self._args = args
        self._tell = tell
        self._runs: list[Rehearsal] = []

    def run(self, root: Path, devices: tuple[str, str]) -> None:
        every = STEPS
        with Runtime() as runtime:
            try:
                unmoved = self._unmoved(runtime, root, devices[0], every)
                if isinstance(unmoved, int):  # it ended after so many steps: take fewer
                    every = (unmoved - 1) // 2
                    unmoved = self._unmoved(runtime, root, devices[0], every) if every else None
                    if every == 0 or isinstance(unmoved, int):
                        self._add(
                            1,
                            "not-rehearsed",
                            "the script ends before there are two stretches of steps",
                            "let it train for at least three groups of steps",
                        )
                        return
                if unmoved is not None:
                    self._moved(runtime, root, devices, every, unmoved)
            finally:
                for run in self._runs:
                    run.end()
                    self._take_events(run)

    # -- the runs -------------------------------------------------------------------------

    def _start(self, runtime: Runtime, root: Path, on: str, every: int, what: str) -> Rehearsal:
        run = Rehearsal(
            runtime,
            self._script,
            self._args,
            folder=root / "folder",
            on=on,
            every=every,
            hash_seed=_HASH_SEED,
            tell=lambda text: self._tell(f"{what}: {text}"),
        )
        self._runs.append(run)
        return run

    def _unmoved(
        self, runtime: Runtime, root: Path, on: str, every: int
    ) -> tuple[State, State] | int | None:
        """The states of a run that does not move; the number of steps of one that ended early;
        None for one that failed (which is a finding then)."""
        run = self._start(runtime, root, on, every, "without a move")
        first = run.held_after(0)
        if first is not None:
            early = run.state()
            run.go_on()
            if run.held_after(first) is not None:
                late = run.state()
                run.end()
                return early, late
        run.end()
        if run.job.exit_code:
            self._failed(run, "the script fails")
            return None
        return run.job.step

    def _moved(
        self,
        runtime: Runtime,
        root: Path,
        devices: tuple[str, str],
        every: int,
        unmoved: tuple[State, State],
    ) -> None:
        run = self._start(runtime, root, devices[0], every, "with a move")
        first = run.held_after(0)
        if first is None:
            run.end()
            self._failed(run, "the script fails when it is run a second time")
            return
        early = run.state()
        known = unmoved[0].differences(early)
        if any(not name.startswith(_CHOSEN) for name in known):
            self._not_repeatable(run, known)
        self._tell(f"moving to {devices[1]}")
        try:
            run.job.migrate(devices[1], reason="rehearsal")
        except MigrationError as error:
            run.end()
            self._did_not_move(run, str(error), same=unmoved[0].facts == early.facts)
            return
        if run.held_after(first) is None:
            run.end()
            self._failed(run, "the script fails after a move")
            return
        late = run.state()
        run.end()
        lost = [name for name in unmoved[1].differences(late) if name not in known]
        if lost and not any(not name.startswith(_CHOSEN) for name in known):
            self._does_not_move(lost)

    # -- findings -------------------------------------------------------------------------

    def _add(self, line: int, code: str, message: str, remedy: str) -> None:
        if not any((f.line, f.code) == (line, code) for f in self.found):
            self.found.append(Finding(line, code, message, remedy))

    def _explained(self, codes: Sequence[str]) -> bool:
        """True when the reading of the script has named a line for it already."""
        return any(finding.code in codes for finding in self.found)

    def _failed(self, run: Rehearsal, what: str) -> None:
        line, raised = run.failure() or (1, self._given_up(run))
        if not any(f.line == line and f.code != "unseeded" for f in self.found):
            self._add(line, "fails", f"{what}: {raised}", "make it run alone first")

    def _given_up(self, run: Rehearsal) -> str:
        reasons = [str(event.get("reason", "")) for event in run.events("gave_up")]
        return reasons[-1] if reasons else "it ended without an error"

    def _did_not_move(self, run: Rehearsal, error: str, *, same: bool) -> None:
        self._take_events(run)  # a copy may have been stopped from emptying a file
        failure = run.failure()
        if failure is not None:
            line, raised = failure
            if not any(finding.line == line for finding in self.found):
                self._add(
                    line,
                    "fails-twice",
                    f"a second copy of the script fails here: {raised}",
                    "guard it with `if run.owner:`, or do it in run.once(...)",
                )
            return
        _, unlike, what = error.partition("the script builds something else on ")
        if not unlike:
            self._add(self._loop_line(), "does-not-move", error, "")
            return
        if self._explained((*_CAUSES, "not-repeatable")):
            return
        what = what.partition(": ")[2]
        if same:  # the two runs under one hash seed built the same
            self._add(
                self._job_line(),
                "set-order",
                f"a copy with another hash seed builds something else: {what}",
                "sort sets before their order counts",
            )
            return
        for line in self._entropy(run) or [self._job_line()]:
            self._add(
                line,
                "unseeded",
                f"gives each copy of the script something else: {what}",
                "give it a fixed seed, or keep one result for the whole job: run.once(...)",
            )

    def _not_repeatable(self, run: Rehearsal, names: list[str]) -> None:
        if self._explained(_CAUSES):
            return
        for line in self._entropy(run) or [self._loop_line()]:
            self._add(
                line,
                "not-repeatable",
                f"two runs with the same seed differ before any move, in {counted(names)}",
                "seed it; what draws from a clock or the system is not repeatable",
            )

    def _does_not_move(self, names: list[str]) -> None:
        if self._explained(_CAUSES):
            return
        self._add(
            self._loop_line(),
            "does-not-move",
            f"after a move the run goes on otherwise than without one: {counted(names)}",
            "give TrainingJob what the loop changes: run.vars, extra={...}, the loader's generator",
        )

    def _take_events(self, run: Rehearsal) -> None:
        for event in run.events("carried"):
            self._add(
                int(event["line"]),
                "does-not-move",
                f"{event['name']} changes from step to step and starts anew after a move",
                f"keep it in run.vars[{event['name']!r}]",
            )
        touched = [event for event in run.touched() if _counts(event)]
        owners = {event["path"] for event in touched if event["role"] == "owner"}
        for event in touched:
            if event["role"] != "owner":
                self._doubled(event, event["path"] in owners)

    def _doubled(self, event: dict[str, Any], both: bool) -> None:
        line, action, path = int(event["line"]), str(event["action"]), str(event["path"])
        if any(f.line == line and f.code not in _CAUSES for f in self.found):
            return
        if not both and path.startswith(tempfile.gettempdir()):
            return
        if event["phase"] == "loop" and action in ("writes", "truncates"):
            self._add(
                line,
                "unguarded-output",
                f"writes {path} in the loop: a copy that does not own the job does it too",
                "guard it with `if run.owner:`, or use step.log(...)",
            )
        elif action == "binds":
            self._add(
                line,
                "binds",
                f"binds {path}, which the other copy of the script holds",
                "guard it with `if run.owner:`, or take a free port",
            )
        elif action != "writes":
            how = "opens it anew" if action == "truncates" else "removes it"
            self._add(
                line,
                action,
                f"{path}: a second copy of the script {how} while the first one uses it",
                "guard it with `if run.owner:`, or do it in run.once(...)",
            )

    # -- lines ----------------------------------------------------------------------------

    def _entropy(self, run: Rehearsal) -> list[int]:
        """Lines that asked the system for randomness before the loop."""
        return sorted({int(e["line"]) for e in run.events("entropy") if e["phase"] == "before"})

    def _job_line(self) -> int:
        """The line that makes the TrainingJob."""
        tree = ast.parse(self._script.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("TrainingJob"):
                return node.lineno
        return 1

    def _loop_line(self) -> int:
        """The line of ``for step in run``: the first loop that has a ``with`` on its target."""
        tree = ast.parse(self._script.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.For) and isinstance(node.target, ast.Name):
                for part in node.body:
                    if isinstance(part, ast.With) and any(
                        ast.unparse(item.context_expr) == node.target.id for item in part.items
                    ):
                        return node.lineno
        return self._job_line()


def _counts(event: dict[str, Any]) -> bool:
    """False for what processes are meant to share: caches, byte code, locks, free ports."""
    path = str(event["path"])
    home = os.path.expanduser("~")
    caches = (os.environ.get("XDG_CACHE_HOME") or f"{home}/.cache", f"{home}/.triton")
    if event["action"] == "binds":
        return not path.endswith(", 0)")
    return not (
        "__pycache__" in path or path.endswith((".lock", ".pyc")) or path.startswith(caches)
    )
