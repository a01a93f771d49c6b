"""The typed JSON tree: what goes in comes out, and nothing in a tree can run."""

from __future__ import annotations

import contextlib
import enum
import math
import struct
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from drivetrain.errors import BadInput, CannotCarry
from drivetrain.pytorch import tree

torch.set_num_threads(1)

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5).map(np.str_)
    | st.binary(max_size=5).map(np.bytes_)
    | st.text(st.characters())
    | st.binary(max_size=20)
    | st.complex_numbers()
)
keys = scalars | st.tuples(st.integers(), st.text(max_size=3))
arrays = hnp.arrays(
    hnp.boolean_dtypes()
    | hnp.integer_dtypes(endianness="?")
    | hnp.floating_dtypes(endianness="?", sizes=(16, 32, 64))
    | hnp.unicode_string_dtypes(endianness="?")
    | hnp.datetime64_dtypes(endianness="?"),
    hnp.array_shapes(min_dims=0, min_side=0, max_side=3),
)
leaves = (
    scalars
    | arrays
    | arrays.filter(lambda a: a.size > 0).map(lambda a: a.reshape(-1)[0])
    | st.sampled_from([torch.float32, torch.bfloat16, torch.bool, torch.Size([2, 0])])
    | st.builds(range, st.integers(-9, 9), st.integers(-9, 9), st.integers(1, 3))
    | st.sets(keys, max_size=3)
    | st.frozensets(keys, max_size=3)
    | st.binary(max_size=5).map(bytearray)
)


def containers(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    dicts = st.dictionaries(keys, values, max_size=3)
    return (
        st.lists(values, max_size=3)
        | st.lists(values, max_size=3).map(tuple)
        | dicts
        | dicts.map(OrderedDict)
        | dicts.map(lambda d: Counter(dict(d)))
        | st.tuples(st.sampled_from([None, int, float, list, dict, set]), dicts).map(
            lambda pair: defaultdict(*pair)
        )
        | st.lists(values, max_size=3).map(lambda v: deque(v, 5))
        | st.lists(values, max_size=3).map(deque)
    )


values = st.recursive(leaves, containers, max_leaves=12)


def same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, (np.str_, np.bytes_)):
        return list(a) == list(b)
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b)
    if isinstance(a, complex):
        return same(a.real, b.real) and same(a.imag, b.imag)
    if isinstance(a, (np.ndarray, np.generic)):
        return (
            a.dtype.str == b.dtype.str
            and a.shape == b.shape
            and a.tobytes() == b.tobytes()
            and a.flags.f_contiguous == b.flags.f_contiguous
        )
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        factories = getattr(a, "default_factory", 0) is getattr(b, "default_factory", 0)
        return (
            factories
            and len(a) == len(b)
            and all(
                same(k, m) and same(v, w)
                for (k, v), (m, w) in zip(a.items(), b.items(), strict=True)
            )
        )
    if isinstance(a, (set, frozenset)):
        return tree.dumps(tree.encode(a, "", None)) == tree.dumps(tree.encode(b, "", None))
    if isinstance(a, (list, tuple, deque)):
        return (
            len(a) == len(b)
            and getattr(a, "maxlen", 0) == getattr(b, "maxlen", 0)
            and all(same(v, w) for v, w in zip(a, b, strict=True))
        )
    return bool(a == b)


@settings(max_examples=250, deadline=None)
@example(np.str_("a\0"))
@example({np.str_("\0"): np.bytes_(b"\0")})
@given(values)
def test_any_value_comes_back_with_its_types_and_exact_bits(value: Any) -> None:
    text = tree.dumps(tree.encode(value, "vars", {}))
    assert same(value, tree.decode(tree.loads(text), {}))
    assert tree.dumps(tree.encode(tree.decode(tree.loads(text), {}), "vars", {})) == text


def test_the_comparison_of_these_tests_tells_types_and_bits_apart() -> None:
    for a, b in [(1, True), (1, 1.0), (0.0, -0.0), ((1,), [1]), ({1: 2}, {"1": 2})]:
        assert not same(a, b)
    assert not same({"a": 1, "b": 2}, {"b": 2, "a": 1})
    assert not same(np.float32(1), np.float64(1))
    assert not same(deque([1], 2), deque([1], 3))


def test_nan_payloads_infinities_and_lone_surrogates_are_exact() -> None:
    (odd,) = struct.unpack(">d", bytes.fromhex("7ff8000000000abc"))
    for value in (odd, math.inf, -math.inf, "\ud83d\ude00", "\ud800", "\U0001f600", -0.0):
        back = tree.decode(tree.loads(tree.dumps(tree.encode(value, "x", {}))), {})
        assert same(value, back)


def test_integers_have_no_limit() -> None:
    value = {10**5000: -(10**5000), 2**53: 2**53 - 1}
    assert tree.decode(tree.loads(tree.dumps(tree.encode(value, "x", {}))), {}) == value


def test_tensors_become_references_under_their_path() -> None:
    tensors: dict[str, torch.Tensor] = {}
    a, b, c = torch.ones(2), torch.zeros(3), torch.arange(4)
    encoded = tree.encode({"a": a, "list": [1, b], 1: c, "1": a}, "vars", tensors)
    assert list(tensors) == ["vars.a", "vars.list.1", "vars.1", "vars.1~2"]
    assert tensors["vars.a"].data_ptr() == a.data_ptr()
    back = tree.decode(tree.loads(tree.dumps(encoded)), tensors)
    assert all(torch.equal(x, y) for x, y in [(back["list"][1], b), (back[1], c), (back["1"], a)])
    with pytest.raises(BadInput, match=r"vars\.a"):
        tree.decode(encoded, {})


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.int64, torch.complex64])
def test_tensors_can_be_inside_a_tree(dtype: torch.dtype) -> None:
    for value in (torch.arange(6).reshape(2, 3).to(dtype).t(), torch.empty(0, 3, dtype=dtype)):
        back = tree.decode(tree.loads(tree.dumps(tree.encode(value, "x", None))), {})
        assert back.shape == value.shape
        assert same(value, back)


def test_sets_have_one_text_whatever_the_order_they_were_filled_in() -> None:
    words = [f"word{i}" for i in range(50)]
    texts = {tree.dumps(tree.encode(set(w), "x", {})) for w in (words, words[::-1])}
    assert len(texts) == 1


class Colour(enum.Enum):
    RED = 1


class Number(enum.IntEnum):
    ONE = 1


class Thing:
    pass


Point = namedtuple("Point", "x y")


class MyDict(dict):  # type: ignore[type-arg]
    pass


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (Colour.RED, "its .value"),
        (Number.ONE, "its .value"),
        (Thing(), "Thing"),
        (Point(1, 2), "_asdict"),
        (len, "code"),
        (Thing, "code"),
        (lambda: 1, "code"),
        (MyDict(), "MyDict"),
        (defaultdict(Thing), "defaultdict"),
        (np.array([object()]), "dtype object"),
        (np.zeros(1, dtype=[("a", "i4")]), "dtype"),
        (np.ma.masked_array([1], [True]), "MaskedArray"),
        (torch.nn.Linear(1, 1), "Linear"),
        ({torch.ones(1): 1}, "tensor as a key"),
        ({torch.ones(1)}, "tensor as a key"),
    ],
)
def test_what_cannot_be_carried_is_refused_with_its_path_and_advice(value: Any, word: str) -> None:
    with pytest.raises(CannotCarry, match=r"carried|identity") as refusal:
        tree.encode({"outer": [0, value]}, "vars", {})
    assert word in str(refusal.value)
    assert refusal.value.path.startswith("vars.outer.1")
    assert "vars.outer.1" in str(refusal.value)


def test_a_value_that_contains_itself_is_refused() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(CannotCarry, match="contains itself"):
        tree.encode(value, "vars", {})
    deep: Any = 1
    for _ in range(500):
        deep = [deep]
    with pytest.raises(CannotCarry, match="nested deeper"):
        tree.encode(deep, "vars", {})
    shared = [1]
    assert tree.decode(tree.encode([shared, shared], "vars", {}), {}) == [[1], [1]]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(sorted(tree._DECODERS)) | st.text(max_size=4),
            inner,
            min_size=1,
            max_size=1,
        )
        | st.dictionaries(st.text(max_size=4), inner, max_size=2)
    ),
    max_leaves=15,
)


@settings(max_examples=600, deadline=None)
@given(json_values)
def test_a_made_up_tree_is_decoded_or_refused_with_bad_input(bad: Any) -> None:
    with contextlib.suppress(BadInput):
        tree.decode(bad, {})


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60))
def test_made_up_bytes_are_refused_with_bad_input(data: bytes) -> None:
    with contextlib.suppress(BadInput):
        tree.decode(tree.loads(data), {})


@settings(max_examples=200, deadline=None)
@given(values, st.data())
def test_a_damaged_text_is_decoded_or_refused(value: Any, data: st.DataObject) -> None:
    text = bytearray(tree.dumps(tree.encode(value, "x", {})))
    text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(BadInput):
        tree.decode(tree.loads(bytes(text)), {})


@pytest.mark.parametrize(
    "bad",
    [
        {"os.system": "true"},
        {"dtype": "nn"},
        {"dtype": "_dynamo"},
        {"device": "cpu; rm"},
        {"device": "nosuchdevice"},
        {"defaultdict": ["eval", []]},
        {"array": ["|O8", "C", [1], "AAAAAAAAAAA="]},
        {"array": ["<f4", "C", [10**12], "AAAA"]},
        {"array": ["<f4", "X", [1], "AAAAAA=="]},
        {"set": [1, 1]},
        {"set": [[1]]},
        {"dict": [[1, 2], [1, 3]]},
        {"dict": [[[1], 2]]},
        {"float": "00"},
        {"int": "1e5"},
        {"size": [-1]},
        {"deque": [1, [1, 2]]},
        {"a": 1, "b": 2},
        {},
    ],
)
def test_each_kind_of_bad_tree_is_refused(bad: Any) -> None:
    with pytest.raises(BadInput):
        tree.decode(bad, {})


def test_deep_and_wrong_texts_are_refused() -> None:
    for data in (b"[" * 100_000, b"NaN", b"", b"\xff", b"[" * 400 + b"]" * 400):
        with pytest.raises(BadInput):
            tree.decode(tree.loads(data), {})
