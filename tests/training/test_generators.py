"""What a step's guard knows of the random generators: always their state now."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch

from drivetrain.training.generators import HostGenerators, HostStates


def same(a: HostStates, b: HostStates) -> bool:
    words = np.array_equal(a.numpy[1], b.numpy[1]) and a.numpy[2:] == b.numpy[2:]
    return a.python == b.python and torch.equal(a.torch, b.torch) and words


def now() -> HostStates:
    return HostStates(random.getstate(), torch.get_rng_state(), np.random.get_state())


DRAWS: dict[str, Callable[[], object]] = {
    "random": random.random,
    "gauss": lambda: random.gauss(0, 1),
    "shuffle": lambda: random.shuffle([1, 2, 3]),
    "seed": lambda: random.seed(7),
    "rand": lambda: torch.rand(1),
    "randn of one": lambda: torch.randn(1),
    "randn of one, double": lambda: torch.randn(1, dtype=torch.float64),
    "randn of many": lambda: torch.randn(64),
    "dropout": lambda: torch.nn.functional.dropout(torch.ones(8)),
    "randperm": lambda: torch.randperm(9),
    "manual_seed": lambda: torch.manual_seed(7),
    "numpy's rand": np.random.rand,
    "numpy's randn": np.random.randn,
    "numpy's seed": lambda: np.random.seed(7),
}


@pytest.mark.parametrize("name", DRAWS)
def test_every_draw_is_seen(name: str) -> None:
    generators = HostGenerators()
    for _ in range(1300):  # the 624 words are made anew more than once
        before = generators.states()
        assert same(before, now())
        DRAWS[name]()
        assert same(generators.states(), now())


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_draws_is_seen(seed: int) -> None:
    choose = random.Random(seed)
    generators = HostGenerators()
    for _ in range(200):
        DRAWS[choose.choice(list(DRAWS))]()
        assert same(generators.states(), now())
        assert same(generators.states(), now())


def test_states_that_did_not_change_are_not_read_again() -> None:
    np.random.seed(0)
    generators = HostGenerators()
    assert generators.states() is generators.states()


@pytest.mark.filterwarnings("ignore:get_state and legacy")
def test_a_generator_of_another_kind_is_read_in_full() -> None:
    generators = HostGenerators()
    old = np.random.mtrand.get_bit_generator()
    generators.states()
    try:
        np.random.mtrand.set_bit_generator(np.random.PCG64(5))
        first = generators.states().numpy
        np.random.rand()
        assert generators.states().numpy != first
    finally:
        np.random.mtrand.set_bit_generator(old)
    assert same(generators.states(), now())


def test_another_generator_of_numpys_is_noticed() -> None:
    generators = HostGenerators()
    old = np.random.mtrand.get_bit_generator()
    generators.states()
    try:
        np.random.mtrand.set_bit_generator(np.random.MT19937(5))
        assert same(generators.states(), now())
        np.random.rand()
        assert same(generators.states(), now())
    finally:
        np.random.mtrand.set_bit_generator(old)
    assert same(generators.states(), now())


def test_a_default_device_of_the_callers_does_not_matter() -> None:
    np.random.seed(0)
    with torch.device("meta"):
        generators = HostGenerators()
    assert same(generators.states(), now())
    assert generators.states() is generators.states()
