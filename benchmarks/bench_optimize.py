"""``optimize`` against an exhaustive search: {bf16, channels_last, compile modes, SDPA choices}.

Both search in this process, each with a compiler cache of its own that begins empty; then the two
winners are measured against each other in interleaved rounds, on inputs that neither has seen. A
planted wrong step is offered to ``optimize``.

python benchmarks/bench_optimize.py [convnet|transformer] [--small] [--device ADDRESS] [--untuned]

``--untuned`` leaves the two max-autotune modes out of the exhaustive search: tuning the kernels of
the large convnet takes many minutes. The line says so, and times of searches are not compared.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn

from benchmarks.common import Gate, Report
from benchmarks.optimize_models import Case, cases
from drivetrain.pytorch.devices import torch_device
from drivetrain.pytorch.optimize import Step, flags, optimize
from drivetrain.pytorch.optimize.capabilities import facts_of
from drivetrain.pytorch.optimize.measuring import compare
from drivetrain.pytorch.optimize.search import Candidate, build, with_step
from drivetrain.pytorch.optimize.steps import builtin
from drivetrain.pytorch.optimize.subject import Arguments, Subject

TOLERANCE = 1e-2
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


def plans(subject: Subject, case: Case, modes: Sequence[str]) -> list[tuple[Step, ...]]:
    """Every combination; bf16 is that of the weights, or autocast where weights lose too much."""
    steps = {step.name: step for step in builtin(subject)}
    half = build(subject, (steps["bf16-weights"],))
    right = subject.error(half.model) <= TOLERANCE
    precision = ["", "bf16-weights" if right else "bf16-autocast"]
    layout = ["", "channels-last"] if case.images else [""]
    kinds = ATTENTION.get(subject.device.type, ("math",)) if case.attention else ()
    attention = ["", *(f"sdpa-{kind}" for kind in kinds)]
    execution = ["", *(f"compile-{mode}" for mode in modes)]
    found = []
    for names in itertools.product(precision, layout, attention, execution):
        plan: tuple[Step, ...] = ()
        for name in filter(None, names):
            plan = with_step(plan, steps[name])
        found.append(plan)
    return found


def exhaustive(subject: Subject, case: Case, modes: Sequence[str]) -> tuple[Candidate, float, int]:
    """The fastest right combination, the seconds it took to find, and how many were tried."""
    started = time.monotonic()
    eager = build(subject, ())
    best = eager
    best.speedup = 1.0
    every = plans(subject, case, modes)
    for plan in every:
        try:
            candidate = build(subject, plan)
            if not subject.error(candidate.model) <= TOLERANCE:
                continue
            found = compare(eager.call, candidate.call, subject.device)
        except Exception as error:
            told = str(error).splitlines()[0][:120] if str(error) else ""
            print(f"    {[s.name for s in plan]}: {type(error).__name__}: {told}", flush=True)
            continue
        candidate.speedup = found.speedup
        print(f"    {[s.name for s in plan]}: x{found.speedup:.2f}", flush=True)
        if candidate.speedup > best.speedup:
            best = candidate
    return best, time.monotonic() - started, len(every)


def fresh() -> object:
    from torch._inductor.utils import fresh_cache

    torch._dynamo.reset()
    return fresh_cache()


def measure(case: Case, device: torch.device, report: Report, modes: Sequence[str]) -> None:
    beside = "" if tuple(modes) == MODES else f"; of the compile modes only {', '.join(modes)}"
    inputs = Arguments.of(case.inputs)
    facts = facts_of(device)
    with fresh():  # the compiler's own start, which neither should pay for
        torch.compile(nn.Linear(4, 4).to(device))(torch.ones(2, 4, device=device))
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
                best, all_s, count = exhaustive(subject, case, modes)
                unseen = Subject(case.model, facts, Arguments.of(case.unseen(99)), None, None)
                our_call = unseen.workload(ours.model, None)
                their_call = unseen.workload(best.model, None)
                eager_call = unseen.workload(unseen.model, None)
                found = compare(our_call, their_call, device, rounds=21)
                eager = compare(eager_call, our_call, device, rounds=21)
                error = unseen.error(ours.model)
    kept = "+".join(ours.report.kept)
    names = "+".join(best.names) or "eager"
    report.add(
        Gate(
            f"{case.name}: time of a call against the best of all",
            1 / found.speedup if kept or best.names else 1.0,
            1 / 0.97,
            "x",
            found.spread,
            0.03,
            f"{kept or 'eager'} against {names}{beside}",
        )
    )
    if not beside:
        report.add(
            Gate(
                f"{case.name}: time of the search against all",
                ours_s / all_s,
                1 / 3,
                "x",
                detail=f"{ours_s:.0f} s against {all_s:.0f} s for {count} plans",
            )
        )
    report.add(Gate(f"{case.name}: error on unseen inputs", error, TOLERANCE))
    report.add(
        Gate(
            f"{case.name}: time of a call against eager",
            1 / eager.speedup if kept else 1.0,
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
    modes = [mode for mode in MODES if "--untuned" not in words or "autotune" not in mode]
    large = device.type != "cpu" and "--small" not in words
    for case in cases(large):
        if case.name in words or not {"convnet", "transformer"} & set(words):
            print(f"  {case.name} on {device}", flush=True)
            measure(case, device, report, modes)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
