"""The predicted downtime: what was measured once, against what moves have really taken."""

from __future__ import annotations

import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivetrain.migration.prediction import SMALL, Past, predict, slower_step_s

SECONDS = st.floats(1e-3, 10.0)
PASTS = st.lists(st.builds(Past, st.just(1 << 20), SECONDS, SECONDS, own=st.booleans()))


def test_with_no_earlier_move_the_model_is_the_prediction() -> None:
    assert predict(1 << 20, 0.030, 0.001, []) == 0.030


def test_what_other_jobs_moves_took_more_than_their_models_is_added() -> None:
    past = [Past(1 << 20, 0.010, 0.010 + extra) for extra in (0.019, 0.020, 0.5)]
    assert predict(1 << 20, 0.030, 0.001, past) == pytest.approx(0.050)


def test_moves_of_another_size_do_not_count() -> None:
    past = [Past(100 * SMALL, 0.010, 5.0, own=True)]
    assert predict(1 << 20, 0.030, 0.001, past) == 0.030


def test_a_large_state_is_predicted_by_its_own_bytes() -> None:
    """Twice the bytes at the rate of now: the fixed part is what the earlier move shows."""
    past = [Past(8 * SMALL, 0.300, 0.300, copied_s=0.250, own=True)]
    found = predict(16 * SMALL, 0.550, 0.500, past)
    assert found == pytest.approx(0.550)


@given(SECONDS, PASTS)
def test_the_prediction_lies_between_what_it_is_made_of(model: float, past: list[Past]) -> None:
    found = predict(1 << 20, model, 0.0, past)
    corrections = [0.0, *(m.real_s - m.modelled_s for m in past)]
    highest = max([model + max(corrections), *(m.real_s for m in past)])
    assert 1e-3 <= found <= highest + 1e-9


def test_own_moves_outvote_a_noisy_model() -> None:
    """Real downtimes vary by 15%, single measurements by half: eight of ten within a quarter.

    The control: with the corrected model alone, as for a job's first moves, it is fewer.
    """
    dice = random.Random(5)
    within = {True: 0, False: 0}
    rounds = 200
    for own in within:
        past: list[Past] = []
        for number in range(rounds):
            real = 0.020 * dice.gauss(1.0, 0.15)
            model = 0.012 * dice.uniform(0.5, 2.0)
            found = predict(3 << 20, model, 0.0005, past)
            within[own] += number >= 3 and abs(found - real) <= 0.25 * real
            past.append(Past(3 << 20, model, real, own=own))
    assert within[True] >= 0.8 * (rounds - 3) > within[False]


def test_a_good_model_outvotes_own_moves_of_other_conditions() -> None:
    """The machine is now twice as fast, now half: the model, measured a moment before, sees it.

    The control: the median of the job's own moves does not.
    """
    dice = random.Random(6)
    within = {"predicted": 0, "median": 0}
    past: list[Past] = []
    rounds = 200
    for number in range(rounds):
        model = 0.012 * dice.uniform(0.5, 2.0)
        real = model + 0.005 * dice.gauss(1.0, 0.2)
        if number >= 3:
            guesses = {
                "predicted": predict(3 << 20, model, 0.0005, past),
                "median": statistics.median(m.real_s for m in past[-9:]),
            }
            for name, guess in guesses.items():
                within[name] += abs(guess - real) <= 0.25 * real
        past.append(Past(3 << 20, model, real, own=True))
    assert within["predicted"] >= 0.8 * (rounds - 3) > within["median"]


def test_a_dry_step_that_is_a_little_slower_is_noise() -> None:
    assert slower_step_s(0.012, 0.010) == 0.0
    assert slower_step_s(0.100, 0.010) == pytest.approx(0.090)
    assert slower_step_s(0.0, 0.010) == 0.0


def test_the_median_forgives_one_move_that_hung() -> None:
    reals = [0.020, 0.021, 4.0, 0.019, 0.022]
    past = [Past(1 << 20, 0.020, real, own=True) for real in reals]
    assert predict(1 << 20, 0.020, 0.0, past) == pytest.approx(statistics.median(reals), rel=0.1)
