"""The step contract of a TrainingJob that runs alone: when a step is complete, when not."""

# ruff: noqa: PT012 - an exception that passes through a loop needs the loop around it

import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import drivetrain
from drivetrain.errors import BadInput, JobError


def job(batches=5, *, loader=None, model=None, **options):
    if model is None:
        torch.manual_seed(0)
        model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = loader if loader is not None else [torch.full((1, 2), float(i)) for i in range(batches)]
    run = drivetrain.TrainingJob(model, optimizer, data, **options)
    run.test_model, run.test_optimizer = model, optimizer
    return run


def train(run, x):
    run.test_model(x).sum().backward()
    run.test_optimizer.step()
    run.test_optimizer.zero_grad()


def through(source):
    """A wrapper such as tqdm's: a generator around the loop."""
    yield from source


def one_by_one(source):
    for step in source:  # noqa: UP028 - another way to wrap, closed in another way
        yield step


# -- leaving the loop ---------------------------------------------------------------------


def leave(run, how, wrapped=iter, inside=False):
    """Runs three steps and leaves the loop in the third."""
    for step in wrapped(run):
        with step:
            if inside and step.index == 2:
                if how == "break":
                    break
                if how == "return":
                    return
                raise KeyError(how)
        if not inside and step.index == 2:
            if how == "break":
                break
            if how == "return":
                return
            raise KeyError(how)


@pytest.mark.parametrize("wrapped", [iter, enumerate, through, one_by_one])
@pytest.mark.parametrize("how", ["break", "return"])
def test_leaving_the_loop_on_purpose_completes_the_step(how, wrapped):
    run = job()
    if wrapped is enumerate:
        for i, step in enumerate(run):
            with step:
                pass
            if i == 2:
                break
    else:
        leave(run, how, wrapped)
    assert run.completed == 3


@pytest.mark.parametrize("wrapped", [iter, through, one_by_one])
@pytest.mark.parametrize("inside", [True, False])
def test_an_exception_does_not_complete_the_step(inside, wrapped):
    run = job()
    with pytest.raises(KeyError):
        leave(run, "raise", wrapped, inside)
    assert run.completed == 2


def test_a_break_inside_the_block_completes_the_step():
    run = job()
    leave(run, "break", inside=True)
    assert run.completed == 3


def test_a_break_before_the_block_completes_nothing():
    run = job()
    for step in run:
        if step.index == 2:
            break
        with step:
            pass
    assert run.completed == 2


def test_the_lines_after_the_block_belong_to_the_step():
    run = job(3)
    for step in run:
        with step as x:
            train(run, x)
        assert run.completed == step.index  # not complete yet
        run.vars["seen"] = step.index
    assert run.completed == 3


def test_a_loop_that_never_enters_its_step_is_told():
    with pytest.raises(JobError, match="with step as batch"):
        for _ in job():
            pass


def test_a_loop_that_has_ended_is_not_begun_again():
    run = job(2)
    for step in run:
        with step:
            pass
    with pytest.raises(JobError, match="has ended"):
        iter(run)


# -- trying again -------------------------------------------------------------------------


class Counting(nn.Module):
    """A layer with a buffer that changes in every forward."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 1)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.calls += 1
        return self.inner(x)


def test_retry_yields_the_same_step_with_everything_put_back():
    run = job(4, model=Counting())
    seen, drawn = [], []
    for step in run:
        with step as x:
            drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))
            step.log(attempt=step.attempt, first=not step.attempt)
            run.test_model(x).sum().backward()
            if step.index == 2 and step.attempt < 2:
                step.log(lost=1.0)
                seen.append((step.index, step.attempt, x.clone()))
                raise drivetrain.Retry("a passing fault")
            assert int(run.test_model.calls) == step.index + 1
            assert "lost" not in step.logged()
            run.test_optimizer.step()
            run.test_optimizer.zero_grad()
        if not step.ok:
            assert step.logged() == {}
            assert run.test_model.inner.weight.grad is None
            assert int(run.test_model.calls) == 2
    assert [s[:2] for s in seen] == [(2, 0), (2, 1)]
    assert torch.equal(seen[0][2], seen[1][2])
    assert drawn[2] == drawn[3] == drawn[4] != drawn[1]
    assert run.completed == 4


def test_a_retried_run_ends_where_an_untroubled_one_does():
    def end(faults):
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        run = job(6, model=nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5), nn.Linear(4, 1)))
        left = dict.fromkeys(faults, 1)
        for step in run:
            with step as x:
                run.test_model(x).sum().backward()
                if left.pop(step.index, 0):
                    raise drivetrain.Retry
                run.test_optimizer.step()
                run.test_optimizer.zero_grad()
        return run.state_hash()

    assert end([1, 4]) == end([])


class Changing(nn.Module):
    """A layer whose forward changes what its buffers are, not only what is in them."""

    def __init__(self, how):
        super().__init__()
        self.inner, self.how = nn.Linear(2, 1), how
        self.register_buffer("kept", torch.zeros(2))
        self.register_buffer("late", None)

    def forward(self, x):
        seen = x.mean(0).detach()
        match self.how:
            case "assigned":
                self.kept = 0.9 * self.kept + seen
            case "longer":
                self.kept = torch.cat([self.kept, seen])
            case "resized":
                self.kept.resize_(self.kept.numel() + 1)[-1] = seen.sum()
            case "filled late":
                self.late = seen if self.late is None else self.late + seen
            case "registered late":
                if "new" not in self._buffers:
                    self.register_buffer("new", torch.zeros(2))
                self.new += seen
        return self.inner(x)


@pytest.mark.parametrize("how", ["assigned", "longer", "resized", "filled late", "registered late"])
def test_retry_puts_back_buffers_that_are_not_the_ones_of_the_start(how):
    def end(faults):
        torch.manual_seed(1)
        model = Changing(how)
        run = job(6, model=model)
        left = set(faults)
        for step in run:
            with step as x:
                model(x).sum().backward()
                if step.index in left:
                    left.remove(step.index)
                    raise drivetrain.Retry
                run.test_optimizer.step()
                run.test_optimizer.zero_grad()
        return {name: buffer.tolist() for name, buffer in model.named_buffers()}

    whole = end([])
    assert whole
    assert end([0, 2, 5]) == whole


def test_retry_after_the_optimizer_stepped_is_the_users():
    run = job()
    with pytest.raises(drivetrain.Retry):
        for step in run:
            with step as x:
                train(run, x)
                if step.index == 2:
                    raise drivetrain.Retry
    assert run.completed == 2


def test_with_two_optimizers_the_first_ones_step_is_the_border():
    torch.manual_seed(0)
    models = {"a": nn.Linear(2, 1), "b": nn.Linear(2, 1)}
    optimizers = {n: torch.optim.Adam(m.parameters()) for n, m in models.items()}
    run = drivetrain.TrainingJob(models, optimizers, [torch.ones(1, 2)] * 3)
    with pytest.raises(drivetrain.Retry):
        for step in run:
            with step as x:
                models["a"](x).sum().backward()
                optimizers["a"].step()
                raise drivetrain.Retry


def test_an_exception_of_the_users_is_the_users():
    with pytest.raises(ZeroDivisionError):
        for step in job():
            with step:
                1 / 0


def test_a_loop_that_ends_with_the_interpreter_says_nothing_of_its_own(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import torch, drivetrain\n"
        "steps = iter(drivetrain.TrainingJob(torch.nn.Linear(1, 1), None, [1, 2]))\n"
        "with next(steps):\n"
        "    pass\n"
        "raise RuntimeError('of the script')\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("RuntimeError: of the script"), done.stderr


def test_retry_after_the_block_is_the_users():
    run = job()
    with pytest.raises(drivetrain.Retry):
        for step in run:
            with step:
                pass
            raise drivetrain.Retry
    assert run.completed == 0


# -- groups -------------------------------------------------------------------------------


def test_updates_is_true_at_the_end_of_each_group_and_of_the_epoch():
    run = job(7, accumulate=3, epochs=2)
    updates = []
    for step in run:
        with step:
            updates.append(step.updates)
    assert updates == [False, False, True, False, False, True, True] * 2


def test_cuts_fall_only_between_whole_groups(monkeypatch):
    run = job(7, accumulate=3, epochs=2)
    at = []

    def boundary():
        if run._batches.at_cut:
            at.append(run.completed)

    monkeypatch.setattr(run, "_boundary", boundary)
    for step in run:
        with step:
            pass
    assert at == [3, 6, 7, 10, 13, 14]


def test_a_retry_within_a_group_keeps_the_gradients_of_the_steps_before():
    def gradients(fault):
        run = job(4, accumulate=4)
        for step in run:
            with step as x:
                run.test_model(x).sum().backward()
                if step.index == fault and step.attempt == 0:
                    raise drivetrain.Retry
                if step.updates:
                    kept = run.test_model.weight.grad.clone()
                    run.test_optimizer.step()
                    run.test_optimizer.zero_grad()
        return kept

    clean = gradients(None)
    assert clean.abs().sum() > 0
    for fault in range(4):
        assert torch.equal(gradients(fault), clean)


# -- epochs -------------------------------------------------------------------------------


class Stream(torch.utils.data.IterableDataset):
    """Samples whose number nobody knows."""

    def __iter__(self):
        return iter([torch.full((2,), float(i)) for i in range(5)])


@pytest.mark.parametrize(
    ("loader", "length"),
    [
        (lambda: [torch.ones(1, 2)] * 4, 4),
        (lambda: torch.utils.data.DataLoader(torch.ones(7, 2), batch_size=2), 4),
        (lambda: torch.utils.data.DataLoader(Stream(), batch_size=2), 3),
    ],
    ids=["list", "loader", "unknown length"],
)
def test_ends_epoch_is_true_on_the_last_step_of_each_epoch(loader, length):
    run = job(loader=loader(), epochs=3)
    told, epochs = [], []
    for step in run:
        with step:
            told.append(step.ends_epoch)
            epochs.append(step.epoch)
    assert told == ([False] * (length - 1) + [True]) * 3
    assert epochs == [e for e in range(3) for _ in range(length)]
    assert (run.epoch, run.completed) == (3, 3 * length)


def test_an_empty_loader_is_told():
    with pytest.raises(JobError, match="empty"):
        for step in job(loader=[]):
            with step:
                pass


# -- logs ---------------------------------------------------------------------------------


def test_log_takes_numbers_texts_and_tensors_of_one_element():
    for step in job(1):
        with step:
            tensor = torch.ones(1, 1, requires_grad=True)
            step.log(a=1, b=2.5, c=True, d="text", e=tensor * 3, f=np.float32(4.0))
            with torch.no_grad():
                tensor.fill_(9.0)  # what was logged is a copy
            assert step.logged() == {"a": 1, "b": 2.5, "c": True, "d": "text", "e": 3.0, "f": 4.0}


@pytest.mark.parametrize("value", [torch.ones(2), [1.0], None, {"a": 1}])
def test_log_refuses_what_is_no_number(value):
    for step in job(1):
        with step, pytest.raises(TypeError, match="loss"):
            step.log(loss=value)


def test_nan_is_said_once_and_stops_nothing(capfd):
    run = job(5)
    for step in run:
        with step:
            step.log(loss=torch.tensor(float("nan")))
    assert run.completed == 5
    assert capfd.readouterr().err.count("NaN") == 1


def test_a_number_that_the_loop_carries_is_named_once_with_its_line(capfd):
    best = 10.0
    for step in job(5):
        with step:
            pass
        best = min(best, 5.0 - step.index)  # named: this line
    lines = [line for line in capfd.readouterr().err.splitlines() if "best" in line]
    with open(__file__) as source:
        wanted = next(i for i, line in enumerate(source, 1) if "# named: this line" in line)
    assert len(lines) == 1
    assert f"line {wanted}:" in lines[0]


# -- what cannot be meant -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"epochs": 0}, "epochs"),
        ({"epochs": True}, "epochs"),
        ({"accumulate": 1.5}, "accumulate"),
        ({"scheduler": []}, "dict"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(options, said):
    with pytest.raises(BadInput, match=said):
        job(**options)


def test_a_loader_is_needed():
    with pytest.raises(BadInput, match="loader"):
        drivetrain.TrainingJob(nn.Linear(1, 1))
