"""The typed JSON tree: Python values as JSON that keeps their types, without pickle.

A JSON scalar stands for itself and a JSON list for a ``list``; every other type is an object with
one key, its type, so that nothing a user stores can be mistaken for a mark. Tensors are not in the
tree: ``encode`` puts them in a dictionary under their path and leaves a reference. ``decode`` only
looks types up in a table: no name in a tree can import or call anything.

Floats, NaN payloads and byte orders are exact. Two references to one list become two lists.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
import struct
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from drivetrain.errors import BadInput, CannotCarry

Json: TypeAlias = "bool | int | float | str | list[Any] | dict[str, Any] | None"

_MAX_DEPTH = 100
_SAFE_INT = 2**53
_BAD = (  # what Python and numpy raise for nonsense
    TypeError,
    ValueError,
    LookupError,
    OverflowError,
    MemoryError,
    RecursionError,
    struct.error,
)
_SURROGATE = re.compile("[\ud800-\udfff]")
_NUMPY_DTYPE = re.compile(
    r"\|b1|\|[iu]1|[<>][iu][248]|[<>]f[248]|[<>]c(8|16)|\|S\d{1,9}|[<>]U\d{1,9}"
    r"|[<>][mM]8(\[\d{0,9}[a-zA-Zμ]{1,7}\])?"
)
_DTYPES = {
    str(value).removeprefix("torch."): value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype)
}
_FACTORIES: dict[str, Callable[[], Any] | None] = {
    "none": None,
    "int": int,
    "float": float,
    "bool": bool,
    "str": str,
    "list": list,
    "tuple": tuple,
    "dict": dict,
    "set": set,
    "deque": deque,
    "Counter": Counter,
}
_FACTORY_NAMES = {factory: name for name, factory in _FACTORIES.items()}


def encode(value: object, path: str, tensors: dict[str, Tensor] | None) -> Json:
    """The tree of ``value``; its tensors go to ``tensors`` under their paths, starting at ``path``.

    With ``tensors=None`` tensors are written into the tree itself (small host tensors only).
    Raises CannotCarry, naming the path, for a type that has no place in a tree.
    """
    return _encode(value, path, tensors, set(), 0)


def decode(tree: object, tensors: dict[str, Tensor]) -> Any:
    """The value of a tree; references are looked up in ``tensors``. Raises BadInput."""
    try:
        return _decode(tree, tensors, 0)
    except BadInput:
        raise
    except _BAD as error:
        raise BadInput(f"this is no typed tree: {type(error).__name__}: {error}") from error


def dumps(tree: Json) -> bytes:
    """The one JSON text of a tree: ASCII, no spaces, keys sorted. Equal trees give equal bytes."""
    return json.dumps(
        tree, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    ).encode("ascii")


def loads(data: bytes) -> Any:
    """The tree in ``data``. Raises BadInput when it is no JSON."""
    try:
        return json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"a typed tree was expected, this is not JSON: {error}") from error


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is no JSON")


# --------------------------------------------------------------------------------- to the tree


def _encode(
    value: object, path: str, tensors: dict[str, Tensor] | None, open_ids: set[int], depth: int
) -> Json:
    kind = type(value)
    if value is None or kind is bool:
        return value  # type: ignore[return-value]
    if kind is int:
        return value if -_SAFE_INT < value < _SAFE_INT else {"int": hex(value)}  # type: ignore
    if kind is float:
        return _encode_float(value)  # type: ignore[arg-type]
    if kind is str:
        return _encode_str(value)  # type: ignore[arg-type]
    if kind is bytes or kind is bytearray:
        return {kind.__name__: _b64(value)}  # type: ignore[arg-type]
    if kind is complex:
        return {"complex": [_encode_float(value.real), _encode_float(value.imag)]}  # type: ignore
    if isinstance(value, Tensor):
        return _encode_tensor(value, path, tensors)
    if kind is torch.dtype:
        return {"dtype": str(value).removeprefix("torch.")}
    if kind is torch.device:
        return {"device": value.type}  # type: ignore[attr-defined]
    if kind is torch.Size:
        return {"size": [int(n) for n in value]}  # type: ignore[attr-defined]
    if kind is range:
        parts = [value.start, value.stop, value.step]  # type: ignore[attr-defined]
        return {"range": [_encode(part, path, None, open_ids, depth) for part in parts]}
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, (numpy.generic, numpy.ndarray)):
        return _encode_numpy(value, path)
    if kind not in _CONTAINERS:
        raise _refusal(value, path)
    if id(value) in open_ids:
        raise CannotCarry(f"{path} contains itself; keep a value that does not", path=path)
    if depth >= _MAX_DEPTH:
        raise CannotCarry(
            f"{path} is nested deeper than {_MAX_DEPTH} levels; flatten it", path=path
        )
    open_ids.add(id(value))
    try:
        return _encode_container(value, path, tensors, open_ids, depth + 1)
    finally:
        open_ids.discard(id(value))


def _encode_float(value: float) -> Json:
    if math.isfinite(value):
        return value
    return {"float": struct.pack(">d", value).hex()}


def _encode_str(value: str) -> Json:
    if _SURROGATE.search(value) is None:
        return value
    return {"str": _b64(value.encode("utf-8", "surrogatepass"))}


def _encode_tensor(value: Tensor, path: str, tensors: dict[str, Tensor] | None) -> Json:
    if tensors is not None:
        name, twin = path, 1
        while name in tensors:
            twin += 1
            name = f"{path}~{twin}"
        tensors[name] = value.detach()
        return {"tensor": name}
    if value.layout != torch.strided or value.is_quantized or value.is_conj() or value.is_neg():
        raise _refusal(value, path)
    host = value.detach().to("cpu").contiguous()
    data = bytes(host.reshape(-1).view(torch.uint8).tolist()) if host.numel() else b""
    return {"inline": [str(value.dtype).removeprefix("torch."), list(value.shape), _b64(data)]}


def _encode_numpy(value: Any, path: str) -> Json:
    numpy = sys.modules["numpy"]
    if type(value) is numpy.str_:  # an array of it, and its own str(), would lose NULs at its end
        return {"str_": _encode_str(str.__str__(value))}
    if type(value) is numpy.bytes_:
        return {"bytes_": _b64(bytes(value))}
    dtype = value.dtype.str
    if _NUMPY_DTYPE.fullmatch(dtype) is None or type(value).__module__ != "numpy":
        raise CannotCarry(
            f"{path} is a {type(value).__name__} of dtype {value.dtype}, which cannot be carried; "
            "keep an array of numbers, bools or fixed-width strings",
            path=path,
        )
    if isinstance(value, numpy.generic):
        return {"scalar": [dtype, _b64(value.tobytes())]}
    order = "F" if value.flags.f_contiguous and not value.flags.c_contiguous else "C"
    return {"array": [dtype, order, list(value.shape), _b64(value.tobytes(order=order))]}


def _encode_container(
    value: Any, path: str, tensors: dict[str, Tensor] | None, open_ids: set[int], depth: int
) -> Json:
    kind = type(value)

    def items(values: Iterable[Any]) -> list[Any]:
        return [
            _encode(item, f"{path}.{index}", tensors, open_ids, depth)
            for index, item in enumerate(values)
        ]

    def pairs() -> list[Any]:
        return [
            [
                _encode_key(key, path, open_ids, depth),
                _encode(item, f"{path}.{_word(key)}", tensors, open_ids, depth),
            ]
            for key, item in value.items()
        ]

    if kind is list:
        return items(value)
    if kind is tuple:
        return {"tuple": items(value)}
    if kind is deque:
        return {"deque": [value.maxlen, items(value)]}
    if kind is set or kind is frozenset:
        members = [_encode_key(item, path, open_ids, depth) for item in value]
        return {kind.__name__: sorted(members, key=dumps)}
    if kind is defaultdict:
        name = _FACTORY_NAMES.get(value.default_factory)
        if name is None:
            known = ", ".join(name for name in _FACTORIES if name != "none")
            raise CannotCarry(
                f"{path} is a defaultdict of {value.default_factory!r}, which is code and "
                f"cannot be carried; use a defaultdict of one of {known}",
                path=path,
            )
        return {"defaultdict": [name, pairs()]}
    return {kind.__name__: pairs()}


_CONTAINERS = frozenset(
    {list, tuple, dict, set, frozenset, deque, Counter, OrderedDict, defaultdict}
)


def _encode_key(key: object, path: str, open_ids: set[int], depth: int) -> Json:
    if isinstance(key, Tensor):
        raise CannotCarry(
            f"{path} has a tensor as a key or set member, which is known by identity alone; "
            "use a name or a number as the key",
            path=path,
        )
    return _encode(key, f"{path}.<key>", None, open_ids, depth)


def _word(key: object) -> str:
    if isinstance(key, str) and _SURROGATE.search(key) is None:
        return key
    return hex(key) if isinstance(key, int) and abs(key) >= _SAFE_INT else ascii(key)


def _refusal(value: object, path: str) -> CannotCarry:
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    if isinstance(value, Tensor):
        advice = "keep a plain dense tensor"
    elif isinstance(value, type) or (callable(value) and not hasattr(value, "state_dict")):
        advice = "keep code out of the state and build it again in the script"
    elif hasattr(value, "_asdict"):
        advice = "keep tuple(value) or value._asdict()"
    elif hasattr(value, "name") and hasattr(value, "value"):
        advice = "keep its .value"
    elif hasattr(value, "state_dict"):
        advice = "pass it in extra={...} by itself, or keep its state_dict()"
    else:
        advice = (
            "keep plain values (numbers, strings, lists, dicts, arrays, tensors), or give it "
            "state_dict() and load_state_dict() and pass it in extra={...}"
        )
    return CannotCarry(f"{path} is a {kind}, which cannot be carried; {advice}", path=path)


def _b64(data: bytes | bytearray) -> str:
    return base64.b64encode(data).decode("ascii")


# ------------------------------------------------------------------------------- from the tree


def _decode(tree: Any, tensors: dict[str, Tensor], depth: int) -> Any:
    if depth > 2 * _MAX_DEPTH:
        raise BadInput("this typed tree is nested too deeply")
    if tree is None or type(tree) in (bool, int, float, str):
        return tree
    if type(tree) is list:
        return [_decode(item, tensors, depth + 1) for item in tree]
    if type(tree) is not dict or len(tree) != 1:
        raise BadInput(f"a typed tree was expected, not {_short(tree)}")
    ((kind, body),) = tree.items()
    make = _DECODERS.get(kind)
    if make is None:
        raise BadInput(f"{_short(kind)} is no type of a typed tree")
    return make(body, tensors, depth + 1)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _list(body: object, length: int | None = None) -> list[Any]:
    if type(body) is not list or (length is not None and len(body) != length):
        raise BadInput(f"a list was expected in a typed tree, not {_short(body)}")
    return body


def _text(body: object) -> str:
    if type(body) is not str:
        raise BadInput(f"a string was expected in a typed tree, not {_short(body)}")
    return body


def _data(body: object) -> bytes:
    try:
        return base64.b64decode(_text(body), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadInput(f"base64 was expected in a typed tree, not {_short(body)}") from error


def _shape(body: object) -> list[int]:
    sizes = _list(body)
    if any(type(size) is not int or not 0 <= size < 2**48 for size in sizes) or len(sizes) > 64:
        raise BadInput(f"a shape was expected in a typed tree, not {_short(body)}")
    return sizes


def _decode_int(body: object, tensors: dict[str, Tensor], depth: int) -> int:
    if re.fullmatch(r"-?0x[0-9a-f]+", _text(body)) is None:
        raise BadInput(f"a hexadecimal integer was expected, not {_short(body)}")
    return int(_text(body), 16)


def _decode_float(body: object, tensors: dict[str, Tensor], depth: int) -> float:
    (value,) = struct.unpack(">d", bytes.fromhex(_text(body)))
    return float(value)


def _decode_complex(body: object, tensors: dict[str, Tensor], depth: int) -> complex:
    real, imag = (_decode(part, {}, depth) for part in _list(body, 2))
    if not all(isinstance(part, (int, float)) for part in (real, imag)):
        raise BadInput(f"two floats were expected, not {_short(body)}")
    return complex(real, imag)


def _decode_tensor(body: object, tensors: dict[str, Tensor], depth: int) -> Tensor:
    tensor = tensors.get(_text(body))
    if tensor is None:
        raise BadInput(f"the typed tree refers to tensor {_short(body)}, which is not there")
    return tensor


def _decode_inline(body: object, tensors: dict[str, Tensor], depth: int) -> Tensor:
    name, shape, data = _list(body, 3)
    dtype, sizes, raw = _dtype(name), _shape(shape), _data(data)
    if math.prod(sizes) * dtype.itemsize != len(raw):
        raise BadInput(f"a tensor of shape {sizes} and {name} does not have {len(raw)} bytes")
    if not raw:
        return torch.empty(sizes, dtype=dtype)
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(dtype).reshape(sizes)


def _dtype(name: object) -> torch.dtype:
    dtype = _DTYPES.get(_text(name))
    if dtype is None:
        raise BadInput(f"this torch knows no dtype {_short(name)}")
    return dtype


def _decode_device(body: object, tensors: dict[str, Tensor], depth: int) -> torch.device:
    if re.fullmatch("[a-z][a-z0-9]{0,31}", _text(body)) is None:
        raise BadInput(f"a type of device was expected, not {_short(body)}")
    try:
        return torch.device(_text(body))
    except RuntimeError as error:
        raise BadInput(f"this torch knows no type of device {_short(body)}") from error


def _decode_numpy(body: object, shape: object, data: object, order: str = "C") -> Any:
    import numpy as np

    if _NUMPY_DTYPE.fullmatch(_text(body)) is None or order not in ("C", "F"):
        raise BadInput(f"a dtype of numpy was expected, not {_short(body)}")
    dtype, sizes, raw = np.dtype(_text(body)), _shape(shape), _data(data)
    if math.prod(sizes) * dtype.itemsize != len(raw):
        raise BadInput(f"an array of shape {sizes} and {body} does not have {len(raw)} bytes")
    if not raw:
        return np.empty(sizes, dtype=dtype, order=order)  # type: ignore[call-overload]
    flat = np.frombuffer(raw, dtype=dtype)
    return flat.reshape(sizes, order=order).copy(order=order)  # type: ignore[call-overload]


def _decode_array(body: object, tensors: dict[str, Tensor], depth: int) -> Any:
    dtype, order, shape, data = _list(body, 4)
    return _decode_numpy(dtype, shape, data, _text(order))


def _decode_scalar(body: object, tensors: dict[str, Tensor], depth: int) -> Any:
    dtype, data = _list(body, 2)
    return _decode_numpy(dtype, [], data)[()]


def _decode_numpy_text(body: object, tensors: dict[str, Tensor], depth: int) -> Any:
    import numpy as np

    return np.str_(_text(_decode(body, {}, depth)))


def _decode_numpy_bytes(body: object, tensors: dict[str, Tensor], depth: int) -> Any:
    import numpy as np

    return np.bytes_(_data(body))


def _decode_items(body: object, tensors: dict[str, Tensor], depth: int) -> list[Any]:
    return [_decode(item, tensors, depth) for item in _list(body)]


def _decode_deque(body: object, tensors: dict[str, Tensor], depth: int) -> deque[Any]:
    maxlen, items = _list(body, 2)
    if maxlen is not None and (type(maxlen) is not int or not len(_list(items)) <= maxlen < 2**48):
        raise BadInput(f"a deque's length was expected, not {_short(maxlen)}")
    return deque(_decode_items(items, tensors, depth), maxlen)


def _decode_range(body: object, tensors: dict[str, Tensor], depth: int) -> range:
    return range(*(_decode(part, {}, depth) for part in _list(body, 3)))


def _decode_size(body: object, tensors: dict[str, Tensor], depth: int) -> torch.Size:
    return torch.Size(_shape(body))


def _decode_set(body: object, tensors: dict[str, Tensor], depth: int) -> set[Any]:
    members = _decode_items(body, {}, depth)
    value = set(members)
    if len(value) != len(members):
        raise BadInput("a set in a typed tree has a member twice")
    return value


def _pairs(body: object, tensors: dict[str, Tensor], depth: int) -> list[tuple[Any, Any]]:
    pairs = [
        (_decode(key, {}, depth), _decode(item, tensors, depth))
        for key, item in (_list(pair, 2) for pair in _list(body))
    ]
    if len({key for key, _ in pairs}) != len(pairs):
        raise BadInput("a dict in a typed tree has a key twice")
    return pairs


def _decode_defaultdict(body: object, tensors: dict[str, Tensor], depth: int) -> Any:
    name, pairs = _list(body, 2)
    if _text(name) not in _FACTORIES:
        raise BadInput(f"a defaultdict of {_short(name)} cannot be made")
    return defaultdict(_FACTORIES[name], _pairs(pairs, tensors, depth))


_DECODERS: dict[str, Callable[[object, dict[str, Tensor], int], Any]] = {
    "int": _decode_int,
    "float": _decode_float,
    "str": lambda body, tensors, depth: _data(body).decode("utf-8", "surrogatepass"),
    "bytes": lambda body, tensors, depth: _data(body),
    "bytearray": lambda body, tensors, depth: bytearray(_data(body)),
    "complex": _decode_complex,
    "tensor": _decode_tensor,
    "inline": _decode_inline,
    "dtype": lambda body, tensors, depth: _dtype(body),
    "device": _decode_device,
    "size": _decode_size,
    "range": _decode_range,
    "scalar": _decode_scalar,
    "array": _decode_array,
    "str_": _decode_numpy_text,
    "bytes_": _decode_numpy_bytes,
    "tuple": lambda body, tensors, depth: tuple(_decode_items(body, tensors, depth)),
    "deque": _decode_deque,
    "set": _decode_set,
    "frozenset": lambda body, tensors, depth: frozenset(_decode_set(body, tensors, depth)),
    "dict": lambda body, tensors, depth: dict(_pairs(body, tensors, depth)),
    "OrderedDict": lambda body, tensors, depth: OrderedDict(_pairs(body, tensors, depth)),
    "Counter": lambda body, tensors, depth: Counter(dict(_pairs(body, tensors, depth))),
    "defaultdict": _decode_defaultdict,
}
