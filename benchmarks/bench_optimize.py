"""``optimize`` against an exhaustive search: {bf16, channels_last, compile modes, SDPA choices}.

Both search in this process, each with a compiler cache of its own that begins empty; then the two
winners are measured against each other in interleaved rounds, on inputs that neither has seen. The
control of that: the exhaustive search's winner called twice must miss the limit. A planted wrong
step is offered to ``optimize``.

python benchmarks/bench_optimize.py [convnet|transformer] [--small] [--device ADDRESS] [--limit S]
                                    [--processes N]

Tuning the kernels of the large convnet takes many minutes. So the exhaustive search tries the two
max-autotune modes last and, where there are several GPUs of one kind, first has their plans
compiled by a process on each (``--processes``: by so many), a precision at a time; it measures all
of them itself, with what those processes left in the compiler's cache. ``--limit S`` cuts it off
after S seconds; it tries the most promising of the tuned plans first, and the line says what was
left.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn

from benchmarks.common import Gate, Report
from benchmarks.optimize_models import Case, cases
from drivetrain.pytorch.devices import torch_device
from drivetrain.pytorch.optimize import Step, flags, optimize
from drivetrain.pytorch.optimize.capabilities import facts_of
from drivetrain.pytorch.optimize.measuring import Call, Comparison, compare
from drivetrain.pytorch.optimize.search import Candidate, build, with_step
from drivetrain.pytorch.optimize.steps import builtin
from drivetrain.pytorch.optimize.subject import Arguments, Subject

TOLERANCE = 1e-2
LIMIT = 1 / 0.97
"""Of the time of a call over that of the best of all."""
HALF = ("bf16-weights", "bf16-autocast")
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
ATTENTION = {"cpu": ("flash", "math"), "cuda": ("flash", "efficient", "cudnn", "math")}


def planted() -> Step:
    """Leaves out the work behind the first layers: fast, of the right shape, and wrong."""

    def change(model: nn.Module) -> nn.Module:
        kept = model.layers if hasattr(model, "layers") else model
        for index in range(len(kept) // 2, len(kept)):
            part = kept[index]
            if hasattr(part, "body"):
                part.body = nn.Sequential(nn.Identity())
                if not isinstance(part.around, nn.Identity):
                    part.body = part.around
            elif hasattr(part, "heads"):
                kept[index] = nn.Identity()
        return model

    return Step.of("planted", change)


class CutOff(BaseException):
    """The exhaustive search has had its time; not an Exception, which it takes for a plan's own."""


@contextmanager
def cut_off(seconds: float) -> Iterator[None]:
    """Ends the block after ``seconds``, in the midst of a compilation too; 0: never."""

    def ring(*_: object) -> None:
        raise CutOff

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except CutOff:
        pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


Names = tuple[str, ...]


def plans(subject: Subject, case: Case) -> list[Names]:
    """The steps of every combination; bf16 is that of the weights, or autocast where weights lose
    too much. Those that tune kernels come last, the most promising of them (half the bytes, the
    layout that the vendor's kernels like) first, so that what a cut-off leaves is the least likely
    to win."""
    steps = {step.name: step for step in builtin(subject)}
    half = build(subject, (steps["bf16-weights"],))
    right = subject.error(half.model) <= TOLERANCE
    precision = ["", HALF[0] if right else HALF[1]]
    layout = ["", "channels-last"] if case.images else [""]
    kinds = ATTENTION.get(subject.device.type, ("math",)) if case.attention else ()
    attention = ["", *(f"sdpa-{kind}" for kind in kinds)]
    execution = ["", *(f"compile-{mode}" for mode in MODES)]
    every = list(itertools.product(precision, layout, attention, execution))
    quick = [names for names in every if "autotune" not in names[-1]]
    tuned = [names for names in reversed(every) if "autotune" in names[-1]]
    return [tuple(filter(None, names)) for names in quick + tuned]


def made(subject: Subject, names: Names) -> Candidate:
    """The plan of these steps."""
    steps = {step.name: step for step in builtin(subject)}
    plan: tuple[Step, ...] = ()
    for name in names:
        plan = with_step(plan, steps[name])
    return build(subject, plan)


def compile_ahead(case: Case, device: torch.device, each: list[Names], processes: int) -> None:
    """Have these plans compiled by ``processes`` at a time, on a GPU each, those of one precision
    by the same one (their kernels are tuned once), and take over the compiler's caches."""
    groups: dict[str, list[Names]] = {}
    for names in reversed(each):  # full precision takes longest
        groups.setdefault(names[0] if names[0] in HALF else "", []).insert(0, names)
    given = list(groups.values())
    running: dict[int, tuple[subprocess.Popen[bytes], Path]] = {}
    visible = (os.environ.get("CUDA_VISIBLE_DEVICES") or "").split(",")
    gpus = visible if len(visible) >= processes else [str(i) for i in range(processes)]
    with tempfile.TemporaryDirectory() as folder:
        try:
            while given or running:
                for place in set(range(processes)) - set(running):
                    if given:
                        group = given.pop(0)
                        path = Path(folder) / f"{len(given)}"
                        words = [case.name, "--device", str(device), "--ahead", str(path)]
                        words += ["--small"] if "--small" in sys.argv else []
                        words += ["+".join(names) for names in group]
                        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": f"{path}-cache"}
                        environment["TRITON_CACHE_DIR"] = f"{path}-cache/triton"
                        if device.type == "cuda":
                            words[2] = "cuda:0"
                            environment["CUDA_VISIBLE_DEVICES"] = gpus[place]
                        command = [sys.executable, __file__, *words]
                        running[place] = subprocess.Popen(command, env=environment), path
                time.sleep(0.1)
                for place, (process, path) in list(running.items()):
                    if process.poll() is not None:
                        del running[place]
                        if path.exists():
                            torch.compiler.load_cache_artifacts(path.read_bytes())
        finally:
            for process, _ in running.values():
                process.kill()
                process.wait()


def ahead(case: Case, device: torch.device, each: list[Names], path: Path) -> None:
    """In a process of its own: compile the plans, and leave the compiler's caches at ``path``."""
    with flags.kept(device), torch.no_grad():
        subject = Subject(case.model, facts_of(device), Arguments.of(case.inputs), None, None)
        for names in each:
            begun = time.monotonic()
            try:
                subject.error(made(subject, names).model)
                told = "compiled ahead"
            except Exception as error:
                told = type(error).__name__
            print(f"    {list(names)}: {told} ({time.monotonic() - begun:.0f} s)", flush=True)
    found = torch.compiler.save_cache_artifacts()
    if found is not None:
        path.with_suffix(".part").write_bytes(found[0])
        path.with_suffix(".part").rename(path)


def exhaustive(
    subject: Subject, case: Case, limit_s: float, processes: int
) -> tuple[Candidate, float, int, int]:
    """The fastest right combination, the seconds it took, how many plans were tried, and all."""
    started = time.monotonic()
    eager = build(subject, ())
    best = eager
    best.speedup = 1.0
    every = plans(subject, case)
    tuned = [names for names in every if names and "autotune" in names[-1]]
    tried = 0
    with cut_off(limit_s):
        for names in every:
            if processes > 1 and names in tuned:
                compile_ahead(case, subject.device, tuned, processes)
                tuned = []
            begun = time.monotonic()
            try:
                candidate = made(subject, names)
                if subject.error(candidate.model) <= TOLERANCE:
                    found = compare(eager.call, candidate.call, subject.device)
                    candidate.speedup = found.speedup
                    took_s = time.monotonic() - begun
                    print(f"    {list(names)}: x{found.speedup:.2f} ({took_s:.0f} s)", flush=True)
                    if candidate.speedup > best.speedup:
                        best = candidate
            except Exception as error:
                told = str(error).splitlines()[0][:120] if str(error) else ""
                print(f"    {list(names)}: {type(error).__name__}: {told}", flush=True)
            tried += 1
    return best, time.monotonic() - started, tried, len(every)


def fresh() -> object:
    from torch._inductor.utils import fresh_cache

    torch._dynamo.reset()
    return fresh_cache()


def times(call: Call, other: Call, device: torch.device) -> tuple[float, Comparison]:
    """The time of ``call`` over that of ``other``, and what was measured."""
    found = compare(other, call, device, rounds=21)
    return 1 / found.speedup, found


def measure(
    case: Case, device: torch.device, report: Report, limit_s: float, processes: int
) -> None:
    inputs = Arguments.of(case.inputs)
    facts = facts_of(device)
    with fresh():  # the compiler's own start, which neither should pay for
        small = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).to(device)  # one kernel is generated
        torch.compile(small)(torch.ones(2, 4, device=device))
    started = time.monotonic()
    with fresh():
        ours = optimize(
            case.model, device, case.inputs, tolerance=TOLERANCE, steps=[planted()], cache=False
        )
        ours_s = time.monotonic() - started
        print(f"{ours.report}\n", flush=True)
        with flags.kept(device), torch.no_grad():
            subject = Subject(case.model, facts, inputs, None, None)
            with fresh():
                best, all_s, tried, count = exhaustive(subject, case, limit_s, processes)
                unseen = Subject(case.model, facts, Arguments.of(case.unseen(99)), None, None)
                our_call = unseen.workload(ours.model, None)
                their_call = unseen.workload(best.model, None)
                eager_call = unseen.workload(unseen.model, None)

                def twice() -> None:
                    their_call()
                    their_call()

                ratio, found = times(our_call, their_call, device)
                slow, _ = times(twice, their_call, device)
                over_eager, eager = times(our_call, eager_call, device)
                error = unseen.error(ours.model)
    kept = "+".join(ours.report.kept)
    names = "+".join(best.names) or "eager"
    left = f"; cut off with {count - tried} plans left" if tried < count else ""
    report.add(
        Gate(
            f"{case.name}: time of a call against the best of all",
            ratio if kept or best.names else 1.0,
            LIMIT,
            "x",
            found.spread,
            LIMIT - 1,
            f"{kept or 'eager'}, {found.new_s * 1e3:.3g} ms, against {names}, "
            f"{found.old_s * 1e3:.3g} ms{left}",
        )
    )
    report.add(
        Gate(f"{case.name}: controls that held: the best of all called twice", slow <= LIMIT, 0)
    )
    report.add(
        Gate(
            f"{case.name}: time of the search against all",
            ours_s / all_s,
            1 / 3,
            "x",
            detail=f"{ours_s:.0f} s against {all_s:.0f} s for {tried} of {count} plans",
        )
    )
    report.add(Gate(f"{case.name}: error on unseen inputs", error, TOLERANCE))
    report.add(
        Gate(
            f"{case.name}: time of a call against eager",
            over_eager if kept else 1.0,
            1.0,
            "x",
            eager.spread,
            0.03,
            f"{eager.old_s * 1e3:.3g} ms -> {eager.new_s * 1e3:.3g} ms"
            + ("" if kept else "; nothing was kept, so it is eager itself"),
        )
    )
    wrong = [t for t in ours.report.trials if t.step == "planted" and t.verdict != "rejected"]
    report.add(Gate(f"{case.name}: planted wrong steps that were not rejected", len(wrong), 0))


def alike(device: torch.device) -> int:
    """How many GPUs of this one's kind there are; 1 on a processor."""
    if device.type != "cuda":
        return 1
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return len(names) if len(set(names)) == 1 else 1


def main() -> int:
    report = Report("optimize")
    words = sys.argv[1:]

    def after(option: str) -> str:
        return words[words.index(option) + 1] if option in words else ""

    address = after("--device") or ("cuda:0" if torch.cuda.is_available() else "cpu")
    device = torch_device(address)
    limit_s = float(after("--limit") or 0)
    processes = int(after("--processes") or alike(device))
    large = device.type != "cpu" and "--small" not in words
    for case in cases(large):
        if "--ahead" in words and case.name in words:
            each = [tuple(word.split("+")) for word in words if "autotune" in word]
            ahead(case, device, each, Path(after("--ahead")))
        elif case.name in words or not {"convnet", "transformer"} & set(words):
            print(f"  {case.name} on {device}", flush=True)
            measure(case, device, report, limit_s, processes)
    return 0 if "--ahead" in words else report.finish()


if __name__ == "__main__":
    sys.exit(main())
