"""A step is kept when it gains and its results are right; nothing else is left behind."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from drivetrain.errors import BadInput, DeviceLost
from drivetrain.pytorch.optimize import Optimized, Report, Step, Trial, Tuned, optimize, search
from drivetrain.pytorch.optimize.capabilities import facts_of
from drivetrain.pytorch.optimize.moe import MixtureOfExperts
from drivetrain.pytorch.optimize.steps import builtin
from drivetrain.pytorch.optimize.subject import Arguments, Subject

torch.set_num_threads(1)
SLOW_S = 0.02
INPUT = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Waits in its forward, so that what is faster here is faster on every machine."""

    def __init__(self, wait_s: float = SLOW_S) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wait_s = wait_s
        self.a = nn.Linear(16, 16)
        self.b = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.wait_s)
        return self.b(torch.tanh(self.a(x)))


def no_wait(model: nn.Module) -> None:
    model.wait_s = 0.0  # type: ignore[assignment]


def run(model: nn.Module, *steps: Step, inputs: Any = INPUT, **options: Any) -> Optimized:
    """Without the compiler, and without the cache unless a folder is named; without types of half
    the size, which gain by chance on models as small as these when the machine is busy."""
    skip = ("compile-*", "flex-*", "bf16-*", "fp16-*")
    options = {"skip": skip, "cache": "home" in options, **options}
    return optimize(model, "cpu:0", inputs, steps=steps, **options)


def trial(report: Report, name: str) -> Trial:
    (found,) = [each for each in report.trials if each.step == name]
    return found


def same(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# -- kept, not kept, rejected, failed ------------------------------------------------------------


def test_a_right_and_faster_step_is_kept_and_the_model_given_stays_as_it_was() -> None:
    model = Net().eval()
    before = copy.deepcopy(model)
    found = run(model, Step.of("no-wait", no_wait))
    assert found.report.kept == ("no-wait",)
    assert trial(found.report, "no-wait").verdict == "kept"
    assert found.report.speedup > 1
    assert model.wait_s == SLOW_S
    assert same(model, before)
    with torch.no_grad():
        assert torch.equal(found.model(INPUT), model(INPUT))
    shared = {p.data_ptr() for p in model.parameters()}
    assert not shared & {p.data_ptr() for p in found.model.parameters()}


def test_a_slower_step_is_not_kept() -> None:
    def wait_more(model: nn.Module) -> None:
        model.wait_s = 4 * SLOW_S  # type: ignore[assignment]

    found = run(Net().eval(), Step.of("wait-more", wait_more))
    assert found.report.kept == ()
    assert trial(found.report, "wait-more").verdict == "not kept"
    assert not isinstance(found.model, Tuned)


class Remembers(nn.Module):
    """Right on the inputs that it has seen, and on no others: it answers from memory."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        with torch.no_grad():
            self.register_buffer("answer", inner(INPUT))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.answer.clone()


def scaled(model: nn.Module) -> None:
    no_wait(model)
    with torch.no_grad():
        model.b.weight.mul_(1.05)


def shorter(model: nn.Module) -> nn.Module:
    return nn.Sequential(model.a)


def nan(model: nn.Module) -> None:
    no_wait(model)
    with torch.no_grad():
        model.b.bias[0] = float("nan")


@pytest.mark.parametrize("wrong", [Remembers, scaled, shorter, nan])
def test_a_planted_wrong_step_is_rejected_however_fast(wrong: Callable[..., Any]) -> None:
    found = run(Net().eval(), Step.of("planted", wrong))
    assert found.report.kept == ()
    assert trial(found.report, "planted").verdict == "rejected"
    with torch.no_grad():
        assert torch.equal(found.model(INPUT), Net()(INPUT))


def test_the_same_step_is_kept_when_the_tolerance_allows_it_so_that_the_test_above_can_fail() -> (
    None
):
    found = run(Net().eval(), Step.of("planted", scaled), tolerance=0.2)
    assert found.report.kept == ("planted",)
    assert 0.01 < found.report.error < 0.2


def test_a_step_that_fails_says_why_and_the_others_go_on() -> None:
    def broken(model: nn.Module) -> None:
        raise ValueError("no such kernel\nmore")

    found = run(Net().eval(), Step.of("broken", broken), Step.of("no-wait", no_wait))
    assert trial(found.report, "broken") == Trial(
        "broken",
        "failed",
        "ValueError: no such kernel",
        spent_s=trial(found.report, "broken").spent_s,
    )
    assert found.report.kept == ("no-wait",)


def test_every_step_that_is_not_tried_has_its_reason() -> None:
    report = run(Net().eval()).report
    assert {t.step for t in report.trials} >= {"tf32", "sdpa-flash", "cuda-graph", "fp8"}
    assert all(t.reason for t in report.trials)
    assert "CUDA" in trial(report, "cuda-graph").reason
    assert "no 2-D convolution" in trial(report, "channels-last").reason
    assert "no optimizer" in trial(report, "fused-optimizer").reason


def test_kernels_are_tuned_where_the_arithmetic_is_in_matrix_products() -> None:
    """On a GPU not where it is in convolutions; the controls are a linear layer and a processor."""
    convolved = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 14 * 14, 2)).eval()
    facts = facts_of(torch.device("cpu"))

    def said(model: nn.Module, inputs: torch.Tensor, device: str) -> str:
        subject = Subject(model, facts, Arguments.of(inputs), None, None)
        subject.device = torch.device(device)  # a gate only asks of which kind it is
        steps = {step.name: step for step in builtin(subject)}
        return steps["compile-max-autotune-no-cudagraphs"].gate(subject)

    image = torch.rand(1, 3, 16, 16)
    assert "of the arithmetic is convolutions" in said(convolved, image, "cuda")
    assert "convolutions" not in said(convolved, image, "cpu")
    assert "convolutions" not in said(Net().eval(), INPUT, "cuda")


def test_on_a_processor_no_products_of_half_the_size_are_tuned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(search, "HALVED", ("halves",))
    compiling = [f"compile-{mode}" for mode in ("default", "reduce-overhead", "max-autotune")]
    half = Step("halves", Step.of("halves", no_wait).change, "precision")
    options = {"skip": ("flex-*", "bf16-*", "fp16-*", *compiling), "seconds": 60}
    report = run(Net().eval(), half, **options).report
    assert "halves" in report.kept
    tuning = trial(report, "compile-max-autotune-no-cudagraphs")
    assert (tuning.verdict, "half the size" in tuning.reason) == ("not tried", True)
    monkeypatch.setattr(search, "HALVED", ())
    monkeypatch.setattr(search, "COMPILATIONS", 0)  # it would be tried, were there any left
    tuning = trial(run(Net().eval(), half, **options).report, tuning.step)
    assert "half the size" not in tuning.reason


def test_what_lost_by_little_is_measured_once_more_at_the_end() -> None:
    def slow(model: nn.Module) -> None:
        model.wait_s = 0.01  # type: ignore[assignment]

    report = run(Net(0.03).eval(), Step.of("fast", slow), Step.of("as-fast", slow)).report
    assert "fast" in report.kept
    lost, best = trial(report, "as-fast"), trial(report, "fast")
    # By little, as far as a busy machine has measured it.
    if lost.verdict == "not kept" and (lost.speedup or 0) * 1.03 > (best.speedup or 0):
        assert "measured once more" in trial(report, "fast + as-fast").reason


# -- nothing is left behind -----------------------------------------------------------------------


def switches() -> tuple[Any, ...]:
    cuda = torch.backends.cuda
    return (
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        cuda.flash_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.matmul.allow_tf32,
        torch.backends.cudnn.benchmark,
        torch.get_num_threads(),
        torch.get_rng_state().tolist(),
    )


def turns_everything(model: nn.Module) -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.set_autocast_enabled("cpu", True)
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_math_sdp(False)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    torch.rand(3)


@pytest.fixture
def restored() -> Iterator[None]:
    from drivetrain.pytorch.optimize import flags

    with flags.kept(torch.device("cpu")):
        yield


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("ends_by", [None, ValueError, KeyboardInterrupt])
def test_global_switches_and_random_states_are_put_back(ends_by: Any) -> None:
    def change(model: nn.Module) -> None:
        turns_everything(model)
        if ends_by is not None:
            raise ends_by

    model, before = Net(0).eval(), switches()
    try:
        run(model, Step.of("turns", change))
    except KeyboardInterrupt:
        assert ends_by is KeyboardInterrupt
    else:
        assert ends_by is not KeyboardInterrupt
    assert switches() == before
    assert same(model, Net(0))
    turns_everything(model)
    assert switches() != before  # so that the comparison can fail


# -- training -------------------------------------------------------------------------------------


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = model(INPUT).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_a_training_step_is_measured_and_values_are_those_from_before() -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    trained(model, optimizer, 2)
    before = copy.deepcopy((model, optimizer.state_dict()))
    found = run(model, Step.of("no-wait", no_wait), optimizer=optimizer)
    assert "no-wait" in found.report.kept
    assert found.report.training
    assert same(model, before[0])
    assert isinstance(found.model, Tuned)
    assert same(found.model.module, model)
    assert found.optimizer is not optimizer
    assert all(p.grad is None for p in found.model.parameters())
    expected = trained(model, optimizer)
    assert trained(found.model, found.optimizer) == pytest.approx(expected, rel=1e-5)


def test_wrong_gradients_are_rejected_where_results_are_right() -> None:
    class Detached(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.a, self.b = inner.a, inner.b

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = torch.tanh(self.a(x))
            return self.b(hidden.detach() + 0.5 * (hidden - hidden.detach()))

    report = run(Net(), Step.of("detached", Detached)).report
    assert trial(report, "detached").verdict == "rejected"


def test_dropout_does_not_hide_errors_nor_make_them() -> None:
    model = nn.Sequential(Net(), nn.Dropout(0.5), nn.Linear(4, 4))

    def wrong(copied: nn.Module) -> None:
        no_wait(copied[0])
        with torch.no_grad():
            copied[2].weight.mul_(1.2)

    report = run(model, Step.of("wrong", wrong), Step.of("right", lambda m: no_wait(m[0]))).report
    assert trial(report, "wrong").verdict == "rejected"
    assert "right" in report.kept
    assert report.own_error == 0


def test_in_place_the_plan_goes_to_the_model_and_the_optimizer_that_were_passed() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = run(model, Step.of("no-wait", no_wait), optimizer=optimizer, in_place=True)
    assert found.optimizer is optimizer
    assert isinstance(found.model, Tuned)
    assert found.model.module is model
    assert model.wait_s == 0
    losses = trained(found.model, optimizer)
    assert losses[-1] < losses[0]


# -- the built-in steps on this device ------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.shared = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.first(x)))
        y = self.second(x)
        return self.shared(y) + y  # not foldable: somebody else reads y


def test_only_a_norm_that_alone_reads_its_convolution_is_folded() -> None:
    from drivetrain.pytorch.optimize.transforms import conv_bn, foldable
    from drivetrain.pytorch.optimize.wrapped import Build

    model = Block().train()
    image = torch.randn(2, 3, 8, 8)
    model(image)
    model.eval()
    pairs = foldable(model, lambda module: module(image))
    assert pairs == (("first", "norm"),)
    build = Build(copy.deepcopy(model))
    conv_bn(pairs)(build)
    assert isinstance(build.module.norm, nn.Identity)
    with torch.no_grad():
        torch.testing.assert_close(build.module(image), model(image), atol=1e-4, rtol=1e-4)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.experts = nn.Linear(16, 48), MixtureOfExperts(16, 32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(2, 8, 3, 2, 8).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.experts(y.transpose(1, 2).reshape(2, 8, 16))


def test_attention_and_routing_are_choices_where_the_model_has_them() -> None:
    torch.manual_seed(0)
    report = run(Attention().eval(), inputs=torch.randn(2, 8, 16)).report
    for name in ("sdpa-math", "routing-grouped", "routing-dense"):
        tried = trial(report, name)
        assert tried.verdict in ("kept", "not kept"), tried
        assert tried.error is not None
        assert tried.error < 1e-5
    assert "taken by itself" in trial(report, "sdpa-flash").reason


@pytest.mark.parametrize("routing", ["grouped", "dense"])
def test_every_routing_gives_the_results_and_gradients_of_the_loop(routing: str) -> None:
    torch.manual_seed(0)
    model = MixtureOfExperts(16, 32, 4)
    tokens = torch.randn(20, 16)
    found = []
    for how in ("loop", routing):
        model.routing = how
        model.zero_grad()
        out = model(tokens)
        out.square().sum().backward()
        found.append((out.detach(), [p.grad.clone() for p in model.parameters()]))
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-5, rtol=1e-4)
    for other, first in zip(found[1][1], found[0][1], strict=True):
        torch.testing.assert_close(other, first, atol=1e-4, rtol=1e-3)


def test_a_fused_optimizer_takes_the_same_steps() -> None:
    from drivetrain.pytorch.optimize.transforms import fuse

    losses = []
    for fused in (False, True):
        model = Net(0)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        trained(model, optimizer, 2)
        if fused:
            fuse(optimizer)
            assert optimizer.param_groups[0]["fused"]
        losses.append(trained(model, optimizer))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_weights_of_half_the_size_are_kept_for_memory_and_results_have_the_type_that_they_had() -> (
    None
):
    layers = [nn.Linear(256, 256) for _ in range(3)]
    model = nn.Sequential(*layers, nn.Linear(256, 4)).eval()
    x = torch.randn(4, 256)
    found = run(model, inputs=x, objective="memory", skip=("compile-*", "fp16-*"))
    assert found.report.kept == ("bf16-weights",)
    assert found.report.nbytes_before is not None
    assert found.report.nbytes_after is not None
    assert found.report.nbytes_after < 0.7 * found.report.nbytes_before
    with torch.no_grad():
        assert found.model(x).dtype == torch.float32


def test_a_step_that_took_the_device_down_ends_the_search_and_is_left_out_of_the_next(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from drivetrain.pytorch.optimize import search

    def breaks(model: nn.Module) -> None:
        monkeypatch.setattr(search, "lost", lambda device: "unspecified launch failure")
        raise RuntimeError("CUDA error")

    steps = Step.of("breaks", breaks), Step.of("no-wait", no_wait)
    with pytest.raises(DeviceLost, match=r"skip=\['breaks'\]"):
        run(Net().eval(), *steps, home=tmp_path)
    monkeypatch.undo()
    report = run(Net().eval(), *steps, home=tmp_path).report
    assert trial(report, "breaks").verdict == "not tried"
    assert "took the device down" in trial(report, "breaks").reason
    assert report.kept == ("no-wait",)


def test_a_model_optimised_for_inference_refuses_to_be_trained() -> None:
    found = run(Net().eval(), Step.of("no-wait", no_wait))
    with pytest.raises(BadInput, match="optimised for inference"):
        found.model.train()
    found.model.eval()


def test_a_missing_or_broken_compiler_is_a_reason(tmp_path: Path) -> None:
    from torch._inductor import config

    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\n[ $# = 1 ] && exec g++ $1\nexit 1\n")
    broken.chmod(0o700)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU()).eval()
    skip = ("compile-max*", "flex-*")
    for compiler, verdict in (("no-such-compiler", "not tried"), (str(broken), "failed")):
        with config.patch({"cpp.cxx": (compiler,), "force_disable_caches": True}):
            found = run(model, inputs=torch.randn(3, 5), skip=skip)
        tried = trial(found.report, "compile-default")
        assert tried.verdict == verdict
        assert tried.reason
        assert found.report.kept == ()


def test_a_compiled_model_is_right() -> None:
    from drivetrain.pytorch.optimize.transforms import compiled
    from drivetrain.pytorch.optimize.wrapped import Build

    build = Build(nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), output_dtype=torch.float32)
    compiled("default")(build)
    with torch.no_grad():
        x = torch.randn(3, 4)
        torch.testing.assert_close(build.tuned()(x), build.module(x))


@pytest.mark.soak
def test_a_compiled_model_is_right_also_for_other_shapes() -> None:
    from drivetrain.pytorch.optimize.transforms import channels_last, compiled
    from drivetrain.pytorch.optimize.wrapped import Build

    build = Build(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), output_dtype=torch.float32)
    channels_last(build)
    compiled("default")(build)
    tuned = build.tuned()
    with torch.no_grad():
        for images in (1, 3):
            x = torch.randn(images, 3, 8, 8)
            torch.testing.assert_close(tuned(x), build.module(x))


# -- the budget and the cache ---------------------------------------------------------------------


def test_what_the_seconds_do_not_allow_is_not_tried() -> None:
    first = Step.of("first", no_wait)
    report = run(Net().eval(), first, seconds=1e-6).report
    assert trial(report, "first").verdict == "not tried"
    assert "are left" in trial(report, "first").reason


@pytest.mark.soak
def test_a_plan_is_found_again_for_the_same_structure_and_checked_anew(tmp_path: Path) -> None:
    calls: list[str] = []

    def counted(model: nn.Module) -> None:
        calls.append("change")
        no_wait(model)

    step = Step.of("counted", counted)
    first = run(Net().eval(), step, home=tmp_path)
    assert not first.report.cached
    other = Net().eval()
    with torch.no_grad():
        other.a.weight.mul_(2)  # other values, the same structure
    again = run(other, step, home=tmp_path)
    assert again.report.cached
    assert again.report.kept == ("counted",)
    with torch.no_grad():
        assert torch.equal(again.model(INPUT), other(INPUT))
    assert not run(Net().eval(), step, home=tmp_path, tolerance=1e-3).report.cached
    assert not run(Net().eval(), step, home=tmp_path, inputs=INPUT[:4]).report.cached
    assert not run(Net(2 * SLOW_S).eval(), step, home=tmp_path).report.cached
    wider = nn.Sequential(Net(), nn.Identity()).eval()
    assert not run(wider, home=tmp_path).report.cached


def test_a_cached_plan_that_is_wrong_for_the_new_weights_is_searched_anew(tmp_path: Path) -> None:
    def drops_bias(model: nn.Module) -> None:
        no_wait(model)
        with torch.no_grad():
            model.b.bias.zero_()

    step = Step.of("drops-bias", drops_bias)
    unbiased, biased = Net().eval(), Net().eval()
    with torch.no_grad():
        unbiased.b.bias.zero_()
        biased.b.bias.fill_(1.0)
    assert run(unbiased, step, home=tmp_path).report.kept == ("drops-bias",)
    found = run(biased, step, home=tmp_path).report
    assert not found.cached
    assert trial(found, "drops-bias").verdict == "rejected"


def test_a_damaged_cache_is_as_none(tmp_path: Path) -> None:
    step = Step.of("no-wait", no_wait)
    run(Net(0).eval(), step, home=tmp_path)
    file = tmp_path / "optimize.json"
    kept = json.loads(file.read_text())
    for damage in ({"report": {"kept": 3}}, 7):
        file.write_text(json.dumps(dict.fromkeys(kept, damage)))
        assert not run(Net(0).eval(), step, home=tmp_path).report.cached
    file.write_text("{")
    assert not run(Net(0).eval(), step, home=tmp_path).report.cached


def test_a_plan_that_cannot_be_kept_is_found_all_the_same(tmp_path: Path) -> None:
    no_folder = tmp_path / "file"
    no_folder.touch()
    with pytest.warns(RuntimeWarning, match="is not kept"):
        found = run(Net().eval(), Step.of("no-wait", no_wait), home=no_folder)
    assert found.report.kept == ("no-wait",)


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"model": lambda x: x}, "torch.nn.Module"),
        ({"device": "nowhere:0"}, "nowhere"),
        ({"device": 3}, "is no device"),
        ({"device": "cuda:7"}, "cannot use cuda:7"),
        ({"inputs": ()}, "no tensor"),
        ({"inputs": torch.randn(2, 3)}, "does not run"),
        ({"objective": "beauty"}, "latency, throughput, memory"),
        ({"tolerance": 0}, "tolerance must be"),
        ({"tolerance": float("nan")}, "tolerance must be"),
        ({"seconds": -1}, "seconds must be"),
        ({"steps": [no_wait]}, "is no step"),
        ({"steps": [Step.of("a", no_wait), Step.of("a", no_wait)]}, "two steps"),
        ({"optimizer": torch.optim.SGD(Net().parameters(), lr=1)}, "model in eval mode"),
    ],
)
def test_bad_input_is_refused_with_what_to_do(arguments: dict[str, Any], says: str) -> None:
    given = {"model": Net(0).eval(), "device": "cpu", "inputs": INPUT, **arguments}
    model, device, inputs = given.pop("model"), given.pop("device"), given.pop("inputs")
    with pytest.raises(BadInput, match=says):
        optimize(model, device, inputs, cache=False, **given)


def test_the_report_is_a_table_and_json() -> None:
    report = run(Net().eval(), Step.of("no-wait", no_wait)).report
    assert "kept: no-wait" in str(report)
    assert "not tried: " in str(report)
    found = json.loads(json.dumps(report.as_json()))
    assert Report.read(found) == report
