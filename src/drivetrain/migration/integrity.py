"""What a state is made of, where its bytes lie, and how two sides show that they have the same.

*Layout*: where each tensor lies in the image (see `drivetrain.pytorch.image`, which has the chunks
and their hashes too). *State hash*: xxh3_128 over the chunk hashes and the tree.
"""

from __future__ import annotations

import json
import struct
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

import xxhash

from drivetrain.errors import IntegrityError
from drivetrain.pytorch import image

Klass = Literal["replace", "append_only", "read_only"]
_KLASSES = ("replace", "append_only", "read_only")


@dataclass(frozen=True)
class TensorSpec:
    """One named tensor. ``stride`` counts elements; ``nbytes`` is what it takes in the image.

    ``alias_of`` names the tensor whose bytes it shares, from ``alias_offset`` on; then it has no
    place of its own in the image. ``lazy``: optimizer state, which one side may not have made yet.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    nbytes: int
    klass: Klass = "replace"
    alias_of: str | None = None
    alias_offset: int = 0
    lazy: bool = False


@dataclass(frozen=True)
class Manifest:
    """What both sides of a move must agree on. ``groups``, ``loader`` and ``extra`` are JSON."""

    tensors: tuple[TensorSpec, ...] = ()
    groups: Any = None
    loader: Any = None
    fingerprint: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            **self.extra,
            "tensors": [
                asdict(t) | {"shape": list(t.shape), "stride": list(t.stride)} for t in self.tensors
            ],
            "groups": self.groups,
            "loader": self.loader,
            "fingerprint": self.fingerprint,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Manifest:
        """Raises IntegrityError for what is no manifest; unknown facts of a tensor are ignored."""
        try:
            known = {"tensors", "groups", "loader", "fingerprint"}
            return cls(
                tuple(_spec(tensor) for tensor in value["tensors"]),
                value.get("groups"),
                value.get("loader"),
                value.get("fingerprint"),
                {key: item for key, item in value.items() if key not in known},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise IntegrityError(f"This is no manifest of a state: {error!r}") from error


def _spec(value: Mapping[str, Any]) -> TensorSpec:
    klass = value.get("klass", "replace")
    nbytes = int(value["nbytes"])
    if klass not in _KLASSES or nbytes < 0:
        raise ValueError(f"{value['name']}: class {klass!r}, {nbytes} bytes")
    return TensorSpec(
        str(value["name"]),
        str(value["dtype"]).removeprefix("torch."),
        tuple(int(n) for n in value["shape"]),
        tuple(int(n) for n in value["stride"]),
        nbytes,
        klass,
        value.get("alias_of"),
        int(value.get("alias_offset") or 0),
        bool(value.get("lazy") or value.get("state_of")),
    )


# -- layout ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """Bytes of one tensor that lie in one chunk of the image.

    ``offset`` counts from the tensor's first byte, ``start`` from the image's; ``first_word`` is
    the index of the first 4-byte word within the chunk.
    """

    chunk: int
    tensor: int
    offset: int
    start: int
    nbytes: int
    first_word: int


@dataclass(frozen=True)
class Layout:
    """Where each tensor lies in the image. Aliases have no entry."""

    names: tuple[str, ...]
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]
    offsets: tuple[int, ...]
    nbytes: int
    """Size of the image: the end of the last tensor, rounded up to the alignment."""

    @classmethod
    def of(cls, tensors: Iterable[TensorSpec] | Manifest) -> Layout:
        specs = tensors.tensors if isinstance(tensors, Manifest) else tensors
        own = [spec for spec in specs if spec.alias_of is None]
        offsets, end = image.layout(spec.nbytes for spec in own)
        return cls(
            tuple(spec.name for spec in own),
            tuple(spec.dtype for spec in own),
            tuple(spec.shape for spec in own),
            tuple(spec.nbytes for spec in own),
            tuple(offsets),
            end,
        )

    @property
    def chunks(self) -> int:
        return image.chunks(self.nbytes)

    @cached_property
    def index(self) -> dict[str, int]:
        """The position of each tensor by name."""
        return {name: i for i, name in enumerate(self.names)}

    def pieces(self, start: int = 0, stop: int | None = None) -> Iterator[Piece]:
        """The pieces of the image's bytes ``[start, stop)``, in order. Padding is in none.

        ``start`` must be a multiple of 4 bytes.
        """
        stop = self.nbytes if stop is None else min(stop, self.nbytes)
        if start % 4 or start < 0:
            raise ValueError(f"pieces start at a multiple of 4 bytes, not at {start}")
        for tensor in range(max(0, bisect_right(self.offsets, start) - 1), len(self.offsets)):
            first = self.offsets[tensor]
            if first >= stop:
                break
            at, end = max(first, start), min(first + self.sizes[tensor], stop)
            for chunk, word, offset, nbytes in image.cut(at, end - at):
                yield Piece(chunk, tensor, at + offset - first, at + offset, nbytes, word)


# -- hashes ---------------------------------------------------------------------------------------


def state_hash(chunk_hashes: Sequence[int], tree_json: bytes) -> str:
    """Hex xxh3_128 over the chunk hashes (little-endian u64s), then the tree's canonical JSON."""
    packed = struct.pack(f"<{len(chunk_hashes)}Q", *chunk_hashes)
    return xxhash.xxh3_128_hexdigest(packed + tree_json)


def canonical_json(value: Any) -> bytes:
    """The one JSON text of a value: ASCII, no spaces, keys sorted, no NaN."""
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )
    return text.encode("ascii")


# -- comparing ------------------------------------------------------------------------------------


def first_difference(
    source: Manifest | Mapping[str, Any], target: Manifest | Mapping[str, Any]
) -> str | None:
    """The first difference between the two sides in a sentence, None when there is none.

    The order of tensors does not count, nor does optimizer state that one side has not made yet.
    """
    a = source if isinstance(source, Manifest) else Manifest.from_json(source)
    b = target if isinstance(target, Manifest) else Manifest.from_json(target)
    return (
        _tensor_difference(a, b)
        or _json_difference("parameter groups", a.groups, b.groups)
        or _json_difference("loader", a.loader, b.loader)
        or (
            None
            if a.fingerprint == b.fingerprint
            else "the data set's fingerprint is "
            f"{_shown(a.fingerprint)} on the source and {_shown(b.fingerprint)} on the target: "
            "the two copies would train on different samples"
        )
        or _json_difference("", dict(a.extra), dict(b.extra))
    )


def _tensor_difference(a: Manifest, b: Manifest) -> str | None:
    ours = {spec.name: spec for spec in a.tensors}
    theirs = {spec.name: spec for spec in b.tensors}
    for here, there, side in ((ours, theirs, "source"), (theirs, ours, "target")):
        for name, spec in here.items():
            if name not in there and not spec.lazy:
                return f"the tensor {name!r} exists on the {side} only"
    for name, spec in ours.items():
        other = theirs.get(name)
        if other is None:
            continue
        for what, one, two in (
            ("shape", list(spec.shape), list(other.shape)),
            ("dtype", spec.dtype, other.dtype),
            ("strides", list(spec.stride), list(other.stride)),
            ("size in bytes", spec.nbytes, other.nbytes),
        ):
            if one != two:
                return f"the {what} of {name!r}: {one} on the source and {two} on the target"
        one_alias = (spec.alias_of, spec.alias_offset)
        if one_alias != (other.alias_of, other.alias_offset):
            return (
                f"the aliasing of {name!r}: on the source it {_aliased(spec)}, on the target it "
                f"{_aliased(other)}"
            )
    return None


def _aliased(spec: TensorSpec) -> str:
    if spec.alias_of is None:
        return "has memory of its own"
    return f"shares the memory of {spec.alias_of!r} from byte {spec.alias_offset} on"


def _json_difference(path: str, a: Any, b: Any) -> str | None:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in [*a, *(key for key in b if key not in a)]:
            inner = f"{path} {key}".strip()
            if key not in b or key not in a:
                side, value = ("source", a[key]) if key in a else ("target", b[key])
                return f"{inner}: {_shown(value)} on the {side}, absent on the other side"
            found = _json_difference(inner, a[key], b[key])
            if found:
                return found
        return None
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        for i, (one, two) in enumerate(zip(a, b, strict=False)):
            found = _json_difference(f"{path}[{i}]", one, two)
            if found:
                return found
        if len(a) != len(b):
            return f"{path}: {len(a)} entries on the source and {len(b)} on the target"
        return None
    if type(a) is type(b) and a == b:
        return None
    return f"{path}: {_shown(a)} on the source and {_shown(b)} on the target"


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
