"""A TrainingJob alone: what it places, what is its state, and that the state is all there is.

``carry`` takes the state at a boundary and puts it into a second job built from other random
numbers, as a move does; both must end the same.
"""

import copy
import os
import random

import numpy as np
import pytest
import torch
from torch import nn
from torchdata.stateful_dataloader import StatefulDataLoader

import drivetrain
from drivetrain.errors import JobError
from drivetrain.training import job as job_module
from drivetrain.training.arguments import refuse_ranks


def seed(number):
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def digest(run):
    return run.state_hash()


def carry(build, at, lose=""):
    """(hash of a run that was not interrupted, hash of one carried at step ``at``)."""
    seed(0)
    first, train = build()
    taken = {}
    boundary = first._boundary

    def take():
        if first.completed == at:
            now = first._snapshot()
            taken["facts"] = now.facts
            taken["tree"] = now.tree
            taken["tensors"] = {n: t.clone() for n, t in now.capture.tensors.items()}
        boundary()

    first._boundary = take
    train(first)
    end = digest(first)

    from drivetrain.pytorch import tree as typed

    seed(1)
    second, train = build()
    second._state.materialise(typed.loads(taken["facts"]))
    for name, tensor in second._state.tensors().items():
        if name != lose:
            tensor.copy_(taken["tensors"][name])
    second._restore(typed.loads(taken["tree"]))
    assert second.completed == at
    train(second)
    return end, digest(second)


def data(shuffle=True, **options):
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(40, 4, generator=generator)
    samples = torch.utils.data.TensorDataset(inputs, inputs.sum(dim=1, keepdim=True))
    return torch.utils.data.DataLoader(samples, batch_size=4, shuffle=shuffle, **options)


def plain(optimizer=torch.optim.AdamW, **options):
    def build():
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
        stepper = optimizer(model.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(stepper, T_max=20)
        run = drivetrain.TrainingJob(
            model, stepper, data(), epochs=2, scheduler=scheduler, **options
        )

        def train(run):
            for step in run:
                with step as (x, y):
                    loss = (model(x) - y).square().mean() * (1 + 0.1 * np.random.rand())
                    loss.backward()
                    if step.updates:
                        stepper.step()
                        scheduler.step()
                        stepper.zero_grad()
                best = run.vars.get("best", float("inf"))
                run.vars["best"] = min(best, loss.item() + random.random())

        return run, train

    return build


def gan():
    models = {"generator": nn.Linear(2, 4), "critic": nn.Linear(4, 1)}
    optimizers = {n: torch.optim.Adam(m.parameters(), lr=0.02) for n, m in models.items()}
    schedulers = {n: torch.optim.lr_scheduler.StepLR(o, 3) for n, o in optimizers.items()}
    ema = copy.deepcopy(models["generator"]).requires_grad_(False)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    run = drivetrain.TrainingJob(
        models,
        optimizers,
        data(),
        epochs=2,
        scheduler=schedulers,
        scaler=scaler,
        extra={"ema": ema, "history": []},
    )

    def train(run):
        for step in run:
            with step as (x, _):
                fake = models["generator"](torch.randn(len(x), 2))
                judged = models["critic"](x).mean() - models["critic"](fake.detach()).mean()
                optimizers["critic"].zero_grad()
                scaler.scale(judged).backward()
                scaler.step(optimizers["critic"])
                optimizers["generator"].zero_grad()
                scaler.scale(models["critic"](fake).mean()).backward()
                scaler.step(optimizers["generator"])
                scaler.update()
                for each in schedulers.values():
                    each.step()
                with torch.no_grad():
                    for slow, fast in zip(
                        ema.parameters(), models["generator"].parameters(), strict=True
                    ):
                        slow.lerp_(fast, 0.1)
                run._extra["history"].append(judged.item())

    return run, train


@pytest.mark.parametrize("at", [1, 9, 10, 11, 20])
def test_a_carried_run_ends_as_one_that_was_not(at):
    one, other = carry(plain(), at)
    assert one == other


def test_a_tensor_that_is_lost_shows():
    one, other = carry(plain(), 3, lose="model.main.0.weight")
    assert one != other


@pytest.mark.parametrize("optimizer", [torch.optim.Adagrad, torch.optim.SGD, torch.optim.RMSprop])
def test_other_optimizers_are_carried_too(optimizer):
    one, other = carry(plain(optimizer), 4)
    assert one == other


def test_a_group_of_accumulated_steps_is_carried_between_groups():
    one, other = carry(plain(accumulate=3), 9)
    assert one == other


def test_two_models_two_optimizers_schedulers_a_scaler_and_an_ema_are_carried():
    one, other = carry(gan, 7)
    assert one == other


class Numbered(torch.utils.data.IterableDataset):
    """A stream that knows where it is, whose samples are drawn as they are read."""

    at = 0

    def __iter__(self):
        while self.at < 9:
            self.at += 1
            yield torch.randn(4) + self.at + random.random() + float(np.random.rand())
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


@pytest.mark.parametrize("at", [1, 3, 7])
def test_a_stream_of_unknown_length_draws_the_batch_ahead_again(at):
    def build():
        model = nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        loader = StatefulDataLoader(Numbered(), batch_size=2)
        run = drivetrain.TrainingJob(model, optimizer, loader, epochs=2)

        def train(run):
            for step in run:
                with step as x:
                    model(x + torch.rand(4)).square().mean().backward()
                    optimizer.step()
                    optimizer.zero_grad()

        return run, train

    one, other = carry(build, at)
    assert one == other


def test_layers_unfrozen_during_the_training_are_not_frozen_on_the_other_side():
    def build():
        model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1))
        model[0].requires_grad_(False)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        run = drivetrain.TrainingJob(model, optimizer, data())

        def train(run):
            for step in run:
                with step as (x, y):
                    if step.index == 3:
                        model[0].requires_grad_(True)
                    (model(x) - y).square().mean().backward()
                    optimizer.step()
                    optimizer.zero_grad()

        return run, train

    one, other = carry(build, 5)
    assert one == other


def test_a_name_in_extra_that_is_not_given_does_not_come_along():
    """The control: the same script without ``extra`` loses its EMA."""

    def build():
        run, train = gan()
        run._extra.pop("ema")
        run._state.extra.pop("ema", None)
        return run, train

    seed(0)
    run, train = build()
    train(run)
    assert not any("ema" in name for name in run._snapshot().capture.tensors)


# -- placing ------------------------------------------------------------------------------


def test_batches_are_placed_and_keep_their_structure():
    batch = {"x": torch.ones(2), "more": [(torch.zeros(1), "text", 3)]}
    run = drivetrain.TrainingJob(nn.Linear(1, 1), None, [batch])
    for step in run:
        with step as given:
            assert given["x"].device == run.device
            assert type(given["more"][0]) is tuple
            assert given["more"][0][1:] == ("text", 3)


def test_place_false_leaves_batches_where_they_are(monkeypatch):
    meta = torch.device("meta")
    monkeypatch.setattr(job_module, "device_for_this_job", lambda: meta)
    batch = torch.ones(2)
    for place, where in ((True, "meta"), (False, "cpu")):
        run = drivetrain.TrainingJob(nn.Linear(1, 1, device="meta"), None, [batch], place=place)
        for step in run:
            with step as placed:
                assert placed.device.type == where
        assert run.completed == 1


def test_a_device_that_the_script_asks_for_is_the_jobs():
    device = drivetrain.device_for_this_job()
    assert device == drivetrain.TrainingJob(nn.Linear(1, 1), None, [1]).device
    if not torch.accelerator.is_available():
        assert device == torch.device("cpu")


# -- once ---------------------------------------------------------------------------------


def test_once_calls_at_most_once_and_keeps_the_result():
    calls = []

    def begin(name="run"):
        calls.append(name)
        return {"id": len(calls)}

    run = drivetrain.TrainingJob(nn.Linear(1, 1), None, [1, 2, 3])
    assert run.owner
    assert run.handle is None
    for step in run:
        with step:
            assert run.once(begin) == {"id": 1}
    assert run.once(begin, "other") == {"id": 2}
    assert run.once(lambda: "one") + run.once(
        lambda: "two",
    )
    assert calls == ["run", "other"]


# -- several ranks ------------------------------------------------------------------------


def test_several_ranks_are_refused_in_one_sentence(monkeypatch):
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    with pytest.raises(JobError) as refused:
        refuse_ranks()
    assert "several ranks" in str(refused.value)
    assert ". " not in str(refused.value)
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "1")
    refuse_ranks()
