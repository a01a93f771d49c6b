"""``optimize`` against an exhaustive search: {bf16, channels_last, compile modes, SDPA choices}.

Both search in this process, each with a compiler cache of its own that begins empty; then the two
winners are measured against each other in interleaved rounds, on inputs that neither has seen. The
control of that: the exhaustive search's winner called twice must miss the limit. A planted wrong
step is offered to ``optimize``.

python benchmarks/bench_optimize.py [convnet|transformer] [--small] [--device ADDRESS] [--limit S]

``--limit S`` cuts the exhaustive search off after S seconds: it tries the two max-autotune modes
last, the most promising plans of them first, and tuning the kernels of the large convnet takes many
minutes a plan. The line says what was left.
"""

from __future__ import annotations

import itertools
import signal
import sys
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


def plans(subject: Subject, case: Case) -> list[tuple[Step, ...]]:
    """Every combination; bf16 is that of the weights, or autocast where weights lose too much.
    Those that tune kernels come last, the most promising of them (half the bytes, the layout that
    the vendor's kernels like) first, so that what a cut-off leaves is the least likely to win."""
    steps = {step.name: step for step in builtin(subject)}
    half = build(subject, (steps["bf16-weights"],))
    right = subject.error(half.model) <= TOLERANCE
    precision = ["", "bf16-weights" if right else "bf16-autocast"]
    layout = ["", "channels-last"] if case.images else [""]
    kinds = ATTENTION.get(subject.device.type, ("math",)) if case.attention else ()
    attention = ["", *(f"sdpa-{kind}" for kind in kinds)]
    execution = ["", *(f"compile-{mode}" for mode in MODES)]
    every = list(itertools.product(precision, layout, attention, execution))
    quick = [names for names in every if "autotune" not in names[-1]]
    tuned = [names for names in reversed(every) if "autotune" in names[-1]]
    found = []
    for names in quick + tuned:
        plan: tuple[Step, ...] = ()
        for name in filter(None, names):
            plan = with_step(plan, steps[name])
        found.append(plan)
    return found


def exhaustive(subject: Subject, case: Case, limit_s: float) -> tuple[Candidate, float, int, int]:
    """The fastest right combination, the seconds it took, how many plans were tried, and all."""
    started = time.monotonic()
    eager = build(subject, ())
    best = eager
    best.speedup = 1.0
    every = plans(subject, case)
    tried = 0
    with cut_off(limit_s):
        for plan in every:
            names = [step.name for step in plan]
            begun = time.monotonic()
            try:
                candidate = build(subject, plan)
                if subject.error(candidate.model) <= TOLERANCE:
                    found = compare(eager.call, candidate.call, subject.device)
                    candidate.speedup = found.speedup
                    took_s = time.monotonic() - begun
                    print(f"    {names}: x{found.speedup:.2f} ({took_s:.0f} s)", flush=True)
                    if candidate.speedup > best.speedup:
                        best = candidate
            except Exception as error:
                told = str(error).splitlines()[0][:120] if str(error) else ""
                print(f"    {names}: {type(error).__name__}: {told}", flush=True)
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


def measure(case: Case, device: torch.device, report: Report, limit_s: float) -> None:
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
                best, all_s, tried, count = exhaustive(subject, case, limit_s)
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


def main() -> int:
    report = Report("optimize")
    words = sys.argv[1:]
    address = words[words.index("--device") + 1] if "--device" in words else ""
    address = address or ("cuda:0" if torch.cuda.is_available() else "cpu")
    device = torch_device(address)
    limit_s = float(words[words.index("--limit") + 1]) if "--limit" in words else 0.0
    large = device.type != "cpu" and "--small" not in words
    for case in cases(large):
        if case.name in words or not {"convnet", "transformer"} & set(words):
            print(f"  {case.name} on {device}", flush=True)
            measure(case, device, report, limit_s)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
