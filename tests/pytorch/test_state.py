"""A state that is taken from one copy of a job and put into another goes on the same way."""

from __future__ import annotations

import copy
import json
import math
import random
import warnings
from collections import Counter, OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler as lrs
from torch.optim.swa_utils import SWALR, AveragedModel

from drivetrain.errors import BadInput, CannotCarry, MigrationError
from drivetrain.pytorch import tree as typed
from drivetrain.pytorch.dense import flat
from drivetrain.pytorch.place import place, place_batch
from drivetrain.pytorch.state import TrainingState

torch.set_num_threads(1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.3)
        self.b = nn.Linear(6, 4)
        self.b.weight = nn.Parameter(self.a.weight.detach().t().contiguous())
        self.tied = nn.Linear(4, 6)
        self.tied.weight = self.a.weight
        self.register_buffer("secret", torch.zeros(3), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.secret += x.detach().mean()
        return self.b(self.drop(self.norm(self.a(x) + self.tied(x))))


class Job:
    """A small training job; ``seed`` differs between copies, so that nothing is equal by chance."""

    def __init__(
        self,
        seed: int,
        optimizer: Callable[..., Any] = torch.optim.AdamW,
        scheduler: Callable[..., Any] | None = None,
        scaler: Any = None,
    ) -> None:
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        self.model = Net()
        self.optimizer = optimizer(self.model.parameters())
        self.scheduler = scheduler(self.optimizer) if scheduler else None
        self.scaler = scaler
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.counts: Counter[str] = Counter()
        self.extra: dict[str, Any] = {
            "ema": self.ema,
            "counts": self.counts,
            "queue": {"data": torch.randn(5), "places": [1, 2]},
            "generator": torch.Generator().manual_seed(seed),
            "numpy": np.random.default_rng(seed),
            "python": random.Random(seed),
        }
        self.vars: dict[str, Any] = {"best": math.inf, "sum": torch.zeros(2)}
        self.state = TrainingState(
            {"main": self.model},
            {"main": self.optimizer},
            {"main": self.scheduler} if self.scheduler else {},
            {"main": scaler} if scaler else {},
            self.extra,
            self.vars,
        )

    def step(self) -> float:
        x = torch.randn(8, 4) * random.random() + float(np.random.rand())
        x = x + torch.randn(4, generator=self.extra["generator"]) + self.extra["python"].random()

        def closure() -> torch.Tensor:
            self.optimizer.zero_grad()
            loss = F.mse_loss(self.model(x), x)
            (self.scaler.scale(loss) if self.scaler else loss).backward()
            return loss

        if self.scaler:
            loss = closure()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            loss = self.optimizer.step(closure)
        if isinstance(self.scheduler, lrs.ReduceLROnPlateau):
            self.scheduler.step(float(loss.detach()))
        elif self.scheduler:
            self.scheduler.step()
        with torch.no_grad():
            for new, old in zip(self.model.parameters(), self.ema.parameters(), strict=True):
                old.lerp_(new, 0.1)
        self.counts["steps"] += 1
        self.extra["queue"]["data"].add_(loss.detach())
        self.vars["best"] = min(self.vars["best"], float(loss.detach()))
        self.vars["sum"] += loss.detach()
        return float(loss.detach())


def hash_of(state: TrainingState) -> tuple[bytes, dict[str, bytes]]:
    moment = state.capture()
    data = {name: bytes(flat(t).tolist()) for name, t in moment.tensors.items()}
    return typed.dumps(moment.tree), data


def move(source: TrainingState, target: TrainingState, counters: Any = None) -> dict[str, Any]:
    """As a move does it: JSON and bytes, nothing else, go from one to the other."""
    moment = source.capture(counters)
    facts = json.loads(json.dumps(source.manifest_facts()))
    text = typed.dumps(moment.tree)
    data = [bytes(f.tolist()) for f in moment.flats()]
    target.materialise(facts)
    flats = target.flats()
    assert [f.numel() for f in flats] == [len(d) for d in data]
    for into, raw in zip(flats, data, strict=True):
        if raw:
            into.copy_(torch.frombuffer(bytearray(raw), dtype=torch.uint8))
    tree = typed.loads(text)
    back = target.restore_tree(tree)
    target.restore_loader(tree)
    target.restore_rng(tree)
    for side in (arrived := target.manifest_facts(), facts):
        for fact in side["tensors"]:
            fact.pop("host")  # where it lies on its own side
    assert arrived == facts
    return back


OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True),
    "plain sgd": lambda p: torch.optim.SGD(p, 0.05),
    "adam": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "fused adamw": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "tensor rate": lambda p: torch.optim.Adam(p, torch.tensor(0.01), foreach=False),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.05),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "asgd": lambda p: torch.optim.ASGD(p, 0.05),
    "rprop": lambda p: torch.optim.Rprop(p),
    "nadam": lambda p: torch.optim.NAdam(p),
    "adafactor": lambda p: torch.optim.Adafactor(p),
    "lbfgs": lambda p: torch.optim.LBFGS(p, 0.1, max_iter=3, history_size=4),
    "groups": lambda p: torch.optim.RMSprop(
        [{"params": list(p)[:2], "lr": 0.01}, {"params": [], "lr": 0.1}], centered=True
    ),
}


def check_it_goes_on(make: Callable[[int], Job], steps: int = 4) -> None:
    source, target = make(1), make(2)
    for _ in range(steps):
        source.step()
    torch.manual_seed(99)
    counters = {"step": steps, "epoch": 0}
    random_state = typed.loads(typed.dumps(source.state.tree()["rng"]))
    assert move(source.state, target.state, counters) == counters
    assert hash_of(source.state) == hash_of(target.state)
    source.state.restore_rng({"rng": random_state})
    expected = [source.step() for _ in range(3)]
    after = hash_of(source.state)
    source.state.restore_rng({"rng": random_state})
    assert [target.step() for _ in range(3)] == expected
    assert hash_of(target.state) == after


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_on_bit_for_bit_in_a_fresh_copy(name: str) -> None:
    check_it_goes_on(lambda seed: Job(seed, OPTIMIZERS[name]))


SCHEDULERS: dict[str, Callable[..., Any]] = {
    "lambda": lambda o: lrs.LambdaLR(o, lambda k: 0.9**k),
    "plateau": lambda o: lrs.ReduceLROnPlateau(o, patience=0, factor=0.5),
    "one cycle": lambda o: lrs.OneCycleLR(o, 0.1, total_steps=40),
    "cosine": lambda o: lrs.CosineAnnealingWarmRestarts(o, 3),
    "cyclic": lambda o: lrs.CyclicLR(o, 0.01, 0.1, 2, 3, cycle_momentum=False),
    "sequential": lambda o: lrs.SequentialLR(
        o, [lrs.LinearLR(o, 0.1, total_iters=2), lrs.ExponentialLR(o, 0.9)], [2]
    ),
    "chained": lambda o: lrs.ChainedScheduler([lrs.StepLR(o, 2), lrs.ConstantLR(o)]),
    "swa": lambda o: SWALR(o, 0.02, anneal_epochs=5),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("optimizer", ["sgd", "tensor rate"])
def test_every_scheduler_goes_on_bit_for_bit(name: str, optimizer: str) -> None:
    if (name, optimizer) in (("cyclic", "tensor rate"), ("one cycle", "tensor rate")):
        optimizer = "sgd"
    check_it_goes_on(lambda seed: Job(seed, OPTIMIZERS[optimizer], SCHEDULERS[name]))


def test_a_gradient_scaler_goes_on_and_one_that_is_off_hands_its_state_on() -> None:
    def make(seed: int) -> Job:
        return Job(seed, scaler=torch.amp.GradScaler("cpu", growth_interval=2))

    check_it_goes_on(make)
    source = make(1)
    source.step()
    off = Job(2, scaler=torch.amp.GradScaler("cpu", enabled=False))
    move(source.state, off.state)
    back = make(3)
    move(off.state, back.state)
    assert back.scaler.state_dict() == source.scaler.state_dict()


@pytest.mark.parametrize(
    "damage", ["rng", "optimizers", "vars", "extra", "models", "a tensor", "nothing"]
)
def test_leaving_out_any_part_is_seen(damage: str) -> None:
    source, target = Job(1), Job(2)
    source.model.eval()
    for _ in range(3):
        source.step()
        source.optimizer.param_groups[0]["lr"] *= 0.5
    before = torch.get_rng_state()
    torch.manual_seed(77)
    fresh = target.state.tree()
    torch.set_rng_state(before)
    moment = source.state.capture()
    target.state.materialise(source.state.manifest_facts())
    for name, into in zip(moment.tensors, target.state.flats(), strict=True):
        if damage != "a tensor" or name != "model.main.a.bias":
            into.copy_(flat(moment.tensors[name]))
    tree = dict(moment.tree)
    if damage in tree:
        tree[damage] = fresh[damage]
    target.state.restore_tree(tree)
    expected = hash_of(source.state)
    target.state.restore_rng(tree)
    assert (hash_of(target.state) == expected) == (damage == "nothing")


def test_names_classes_and_windows() -> None:
    job = Job(1)
    job.model.b.bias.requires_grad_(False)
    job.optimizer = torch.optim.AdamW([p for p in job.model.parameters() if p.requires_grad])
    job.state.optimizers = {"main": job.optimizer}
    job.step()
    specs = {spec.name: spec for spec in job.state.specs()}
    assert specs["optimizer.main.0.exp_avg"].window
    assert specs["optimizer.main.0.exp_avg"].klass == "replace"
    assert specs["model.main.a.weight"].window
    assert specs["model.main.b.bias"].klass == "read_only"
    assert not specs["model.main.norm.running_mean"].window
    assert not specs["model.main.secret"].window
    assert specs["extra.ema.a.weight"].klass == "replace"
    assert not specs["extra.ema.a.weight"].window
    assert specs["model.main.tied.weight"].alias_of == "model.main.a.weight"
    assert "model.main.tied.weight" not in job.state.tensors()
    order = [(s.klass == "read_only", s.window) for s in specs.values()]
    assert order == sorted(order)
    groups = job.state.manifest_facts()["groups"]["main"]
    assert groups[0]["params"][0] == "model.main.a.weight"
    assert "lr" in groups[0]["keys"]


def test_a_frozen_parameter_that_is_written_is_no_longer_read_only_here_or_there() -> None:
    source, target = Job(1), Job(2)
    for job in (source, target):
        job.model.b.bias.requires_grad_(False)
        job.state.optimizers["main"] = torch.optim.SGD(
            [p for p in job.model.parameters() if p.requires_grad], 0.1
        )
        assert {s.name: s.klass for s in job.state.specs()}["model.main.b.bias"] == "read_only"
    with torch.no_grad():
        source.model.b.bias.mul_(0.5)
    assert {s.name: s.klass for s in source.state.specs()}["model.main.b.bias"] == "replace"
    move(source.state, target.state)
    assert {s.name: s.klass for s in target.state.specs()}["model.main.b.bias"] == "replace"
    move(Job(3).state, Job(4).state)


def test_values_come_back_into_the_objects_that_the_script_holds() -> None:
    source, target = Job(1), Job(2)
    source.step()
    source.vars["history"] = [1.5, (2, {3: b"x"})]
    held = (target.vars, target.vars["sum"], target.counts, target.extra["queue"]["data"])
    weight = target.model.a.weight
    move(source.state, target.state)
    assert target.vars is held[0]
    assert target.vars["sum"] is held[1]
    assert target.counts is held[2]
    assert target.extra["queue"]["data"] is held[3]
    assert target.model.a.weight is weight
    assert target.vars["history"] == [1.5, (2, {3: b"x"})]
    assert target.counts == {"steps": 1}


def test_state_that_the_source_does_not_have_is_dropped() -> None:
    source, target = Job(1), Job(2)
    target.step()
    target.vars["old"] = 1
    move(source.state, target.state)
    assert not target.optimizer.state
    assert "old" not in target.vars
    assert hash_of(source.state) == hash_of(target.state)


class Ema:
    def __init__(self, model: nn.Module) -> None:
        self.shadow = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.decay = 0.9

    def state_dict(self) -> dict[str, Any]:
        return {"decay": self.decay, "shadow": {k: v.clone() for k, v in self.shadow.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.decay = state["decay"]
        for key, value in state["shadow"].items():
            self.shadow[key].copy_(value)


def test_objects_with_a_state_dict_and_averaged_models_are_carried_in_extra() -> None:
    def make(seed: int) -> tuple[TrainingState, Ema, AveragedModel]:
        torch.manual_seed(seed)
        model = nn.Linear(3, 3)
        ema, average = Ema(model), AveragedModel(nn.Linear(3, 3))
        return TrainingState({"main": model}, extra={"e": ema, "swa": average}), ema, average

    (a, ema, average), (b, ema_b, average_b) = make(1), make(2)
    ema.decay = 0.5
    average.update_parameters(nn.Linear(3, 3))
    move(a, b)
    assert ema_b.decay == 0.5
    assert all(torch.equal(ema.shadow[k], ema_b.shadow[k]) for k in ema.shadow)
    assert int(average_b.n_averaged) == 1
    assert hash_of(a) == hash_of(b)


class Weighted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words: dict[int, str] = {}
        self.register_buffer("cache", None)

    def get_extra_state(self) -> dict[str, Any]:
        return {"words": self.words, "t": torch.ones(2)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.words = state["words"]
        assert torch.equal(state["t"], torch.ones(2))


def test_extra_state_of_modules_and_buffers_filled_late_are_carried() -> None:
    a, b = Weighted(), Weighted()
    a.words, a.cache = {1: "x"}, torch.arange(3)
    move(TrainingState({"m": nn.Sequential(a)}), TrainingState({"m": nn.Sequential(b)}))
    assert b.words == {1: "x"}
    assert torch.equal(b.cache, torch.arange(3))


def test_a_compiled_model_has_the_names_of_a_plain_one() -> None:
    plain, outer, inner = Net(), Net(), nn.Sequential(nn.Linear(2, 2))
    names = list(TrainingState({"m": plain}).tensors())
    assert list(TrainingState({"m": torch.compile(outer)}).tensors()) == names
    expected = list(TrainingState({"m": inner}).tensors())
    inner[0] = torch.compile(inner[0])
    assert list(TrainingState({"m": inner}).tensors()) == expected
    compiled = torch.compile(Net())
    move(TrainingState({"m": plain}), TrainingState({"m": compiled}))
    assert torch.equal(compiled._orig_mod.a.weight, plain.a.weight)


def test_a_parameter_that_no_module_owns_is_carried() -> None:
    def make(value: float) -> tuple[TrainingState, torch.Tensor]:
        alpha = torch.full((1,), value, requires_grad=True)
        o = torch.optim.Adam([alpha])
        alpha.grad = torch.ones(1)
        o.step()
        return TrainingState({}, {"o": o}, extra={"alpha": alpha}), alpha

    (a, alpha), (b, beta) = make(1.0), make(2.0)
    assert {s.name: s.alias_of for s in a.specs()}["extra.alpha"] == "optimizer.o.0.(parameter)"
    move(a, b)
    assert torch.equal(alpha, beta)
    assert b.extra["alpha"] is beta


def test_memory_formats_follow_the_source() -> None:
    a, b = nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 3)
    a.to(memory_format=torch.channels_last)
    weight = b.weight
    move(TrainingState({"m": a}), TrainingState({"m": b}))
    assert b.weight is weight
    assert torch.equal(a.weight, b.weight)
    assert a.weight.stride() == b.weight.stride()


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (torch.ones(3, 1).expand(3, 4), "not dense"),
        (torch.ones(4, 4)[:, ::2], "not dense"),
        (torch.eye(3).to_sparse(), "sparse"),
        (torch.ones(2, dtype=torch.complex64).conj(), "conjugate"),
        (torch.empty(2, device="meta"), "meta"),
        (nn.LazyLinear(2), "not initialised"),
        (torch.optim.SGD([torch.ones(1)], 0.1), "optimizer"),
        (lambda: 1, "code"),
    ],
)
def test_what_cannot_be_carried_is_named(value: Any, word: str) -> None:
    with pytest.raises(CannotCarry, match=word) as refusal:
        TrainingState({"m": nn.Linear(1, 1)}, extra={"odd": value}).capture()
    assert refusal.value.path.startswith("extra.odd")


def test_tensors_that_overlap_in_part_are_refused_and_views_are_aliases() -> None:
    base = torch.arange(10.0)
    with pytest.raises(CannotCarry, match="overlaps"):
        TrainingState({}, vars={"a": base[:6], "b": base[4:]}).capture()
    state = TrainingState({}, vars={"a": base, "b": base[4:8].view(2, 2), "c": base[:0]})
    specs = {s.name: s for s in state.specs()}
    assert (specs["vars.b"].alias_of, specs["vars.b"].alias_offset) == ("vars.a", 16)
    target = TrainingState({}, vars={})
    move(state, target)
    target.vars["a"][4] = 77
    assert target.vars["b"][0, 0] == 77
    assert target.vars["c"].shape == (0,)


def test_different_models_and_jobs_are_refused_by_name_and_nothing_changes() -> None:
    source = TrainingState({"m": nn.Linear(2, 3)})
    for other, word in [
        (TrainingState({"m": nn.Linear(2, 4)}), "m.bias|m.weight"),
        (TrainingState({"m": nn.Linear(2, 3, bias=False)}), "bias"),
        (TrainingState({"m": nn.Linear(2, 3), "n": nn.Linear(1, 1)}), "model.n"),
        (TrainingState({"m": nn.Linear(2, 3).double()}), "float64"),
    ]:
        before = hash_of(other)[1]
        with pytest.raises(MigrationError, match=word):
            other.materialise(source.manifest_facts())
        assert hash_of(other)[1] == before
    tied, loose = Net(), Net()
    loose.tied.weight = nn.Parameter(torch.ones(6, 4))
    with pytest.raises(MigrationError, match="tie"):
        TrainingState({"m": tied}).materialise(TrainingState({"m": loose}).manifest_facts())
    with pytest.raises(MigrationError, match="lr"):
        TrainingState({}, extra={"lr": 1}).restore_tree(TrainingState({}).tree())
    with pytest.raises(BadInput):
        TrainingState({}).restore_tree({"format": 1})
    with pytest.raises(MigrationError, match="format 2"):
        TrainingState({}).restore_tree({"format": 2})


def test_evaluation_mode_of_each_part_is_carried() -> None:
    a, b = Net(), Net()
    a.norm.eval()
    move(TrainingState({"m": a}), TrainingState({"m": b}))
    assert b.training
    assert not b.norm.training
    assert b.drop.training


def test_which_parameters_want_gradients_is_carried() -> None:
    """Layers are unfrozen, and frozen, in the middle of a training."""
    a, b = Net(), Net()
    for net in (a, b):
        net.a.requires_grad_(False)
    ema_a, ema_b = copy.deepcopy(a), copy.deepcopy(b)
    a.a.requires_grad_(True)
    a.norm.requires_grad_(False)
    ema_a.requires_grad_(False)
    source = TrainingState({"m": a}, extra={"ema": ema_a})
    move(source, TrainingState({"m": b}, extra={"ema": ema_b}))
    for here, there in ((b, a), (ema_b, ema_a)):
        assert [p.requires_grad for p in here.parameters()] == [
            p.requires_grad for p in there.parameters()
        ]


def test_groups_that_came_after_the_first_step_are_named() -> None:
    sides = []
    for late in (True, False):
        body, head = nn.Linear(2, 2), nn.Linear(2, 1)
        optimizer = torch.optim.SGD(body.parameters(), 0.1, momentum=0.9)
        if late:
            optimizer.add_param_group({"params": list(head.parameters())})
            head(body(torch.ones(1, 2))).sum().backward()
            optimizer.step()
        sides.append(TrainingState({"body": body, "head": head}, {"o": optimizer}))
    with pytest.raises(MigrationError, match="add all groups before the first step"):
        move(*sides)


def test_random_states_of_devices_that_are_not_here_are_carried_on() -> None:
    a, b = TrainingState({}), TrainingState({})
    tree = a.tree()
    tree["rng"]["devices"]["cuda"] = "AAAA"
    b.restore_rng(tree)
    assert b.tree()["rng"]["devices"] == {"cuda": "AAAA"}


def test_place_keeps_identity_and_shared_memory() -> None:
    net, whole = Net(), nn.Module()
    base = torch.arange(8.0)
    whole.register_buffer("whole", base)
    whole.register_buffer("part", base[4:])
    optimizer = torch.optim.Adagrad(net.parameters())
    parameters = list(net.parameters())
    for thing in (net, whole, optimizer):
        place(thing, torch.device("cpu"))
    assert all(p is q for p, q in zip(net.parameters(), parameters, strict=True))
    meta = torch.device("meta")  # a second device that every torch has
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        place(net, meta)
    assert all(p is q for p, q in zip(net.parameters(), parameters, strict=True))
    assert {p.device for p in parameters} == {meta}
    place(optimizer, meta)
    state = optimizer.state[parameters[0]]
    assert state["sum"].device == meta
    assert state["step"].device.type == "cpu"
    place(whole, meta)
    assert whole.part.device == meta
    assert whole.part.storage_offset() == 4


Pair = namedtuple("Pair", "x y")


@dataclass(frozen=True)
class Sample:
    x: torch.Tensor
    name: str


def test_a_batch_keeps_its_structure() -> None:
    meta, x = torch.device("meta"), torch.ones(3)
    packed = nn.utils.rnn.pack_sequence([torch.ones(3, 1), torch.ones(2, 1)])
    other = object()
    batch = {
        "t": x,
        "pair": Pair(x, 1),
        "list": [x, (x, "s")],
        "o": OrderedDict(a=x),
        "m": MappingProxyType({"a": x}),
        "d": Sample(x, "n"),
        "other": other,
        "rest": (1, [2]),
    }
    placed = place_batch(batch, meta)
    assert placed["t"].device == meta
    assert type(placed["pair"]) is Pair
    assert placed["pair"].x.device == meta
    assert placed["list"][1][0].device == meta
    assert type(placed["o"]) is OrderedDict
    assert placed["o"]["a"].device == meta
    assert type(placed["m"]) is MappingProxyType
    assert type(placed["d"]) is Sample
    assert placed["d"].x.device == meta
    assert placed["other"] is other
    assert placed["rest"] is batch["rest"]
    assert batch["t"].device.type == "cpu"
    assert place_batch(packed, meta).data.device == meta
    same = place_batch(batch, torch.device("cpu"))
    assert same is batch


@pytest.mark.gpu
def test_a_state_goes_to_a_gpu_and_back_and_keeps_every_bit_and_the_gpus_generator() -> None:
    gpu = torch.device("cuda")
    source, there, back = Job(1), Job(2), Job(3)
    for _ in range(3):
        source.step()
    place(there.model, gpu)
    place(there.ema, gpu)
    place(there.optimizer, gpu)
    there.state.device = gpu
    expected = hash_of(source.state)[1]
    move(source.state, there.state)
    assert there.optimizer.state[there.model.a.weight]["exp_avg"].device.type == "cuda"
    assert there.optimizer.state[there.model.a.weight]["step"].device.type == "cpu"
    assert hash_of(there.state)[1] == expected
    torch.rand(5, device=gpu)
    generator = there.state.tree()["rng"]["devices"]["cuda"]
    move(there.state, back.state)
    assert hash_of(back.state)[1] == expected
    assert back.state.tree()["rng"]["devices"] == {"cuda": generator}
