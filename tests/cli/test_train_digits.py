"""The demo's training script: it learns, and its two buffers tell a lost sample."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import drivetrain.cli.demo

SCRIPT = Path(drivetrain.cli.demo.__file__).with_name("train_digits.py")
HIDDEN = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
IDS = st.lists(st.integers(0, 1436), min_size=2, max_size=80)


@pytest.fixture(scope="module")
def digits():
    from drivetrain.cli.demo import train_digits

    return train_digits


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The script's result file, one run for each list of arguments."""
    kept: dict[tuple[str, ...], dict] = {}

    def train(*arguments: str) -> dict:
        if arguments not in kept:
            result = tmp_path_factory.mktemp("digits") / "result.json"
            subprocess.run(
                [sys.executable, str(SCRIPT), str(result), *arguments],
                env={**os.environ, **HIDDEN},
                check=True,
                capture_output=True,
            )
            assert [path.name for path in result.parent.iterdir()] == ["result.json"]
            kept[arguments] = json.loads(result.read_text())
        return kept[arguments]

    return train


@given(IDS)
def test_the_fold_is_the_polynomial_in_the_ids(digits, ids: list[int]):
    power = len(ids) - 1
    terms = ((i + 1) * pow(digits.FACTOR, power - k, digits.MODULUS) for k, i in enumerate(ids))
    assert digits.fold(0, ids) == sum(terms) % digits.MODULUS


@given(IDS, st.data())
def test_a_lost_doubled_or_swapped_sample_changes_the_fold(digits, ids: list[int], data):
    at = data.draw(st.integers(0, len(ids) - 1))
    whole = digits.fold(0, ids)
    assert digits.fold(0, ids[:at] + ids[at + 1 :]) != whole
    assert digits.fold(0, [*ids[: at + 1], *ids[at:]]) != whole
    swapped = [*ids[:at], *reversed(ids[at:])]
    assert (digits.fold(0, swapped) == whole) == (swapped == ids)


def test_the_buffers_fold_exactly_and_count(digits):
    import torch

    model = digits.DigitsNet(1437)
    batches = [torch.randperm(1437)[:64] for _ in range(20)]
    for batch in batches:
        model.note(batch)
    ids = [i for batch in batches for i in batch.tolist()]
    assert int(model.fold) == digits.fold(0, ids)
    assert model.seen.tolist() == [ids.count(i) for i in range(1437)]


def test_the_split_is_the_same_each_time(digits):
    first, again = digits.digits(), digits.digits()
    for one, other in zip(first, again, strict=True):
        assert all(a.equal(b) for a, b in zip(one.tensors, other.tensors, strict=True))
    assert [len(part) for part in first] == [1437, 360]


def test_each_sample_is_trained_on_exactly_once_an_epoch_and_it_learns(trained):
    result = trained("--epochs", "3")
    assert (result["steps"], result["samples"]) == (69, 3 * 1437)
    assert (result["samples_lost"], result["samples_doubled"]) == (0, 0)
    assert result["accuracy"] >= 0.9


def test_a_dropped_batch_is_found_so_that_the_test_above_can_fail(trained):
    result = trained("--epochs", "3", "--drop-step", "5")
    assert (result["samples_lost"], result["samples_doubled"]) == (64, 0)
    assert result["fold"] != trained("--epochs", "3")["fold"]
