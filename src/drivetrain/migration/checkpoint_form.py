"""What a checkpoint looks like on disk: its name, its data file, its manifest.

``<directory>/step-<12 digits>-e<epoch>/`` holds ``state.safetensors``, which any safetensors
reader opens (aliases left out, a tensor with permuted strides in its order in memory), and
``manifest.json``: what the tensors are, the tree, the state hash, xxh3_64 of each 4 MiB of the data
file, and an xxh3_64 of the manifest itself, whose text is canonical to the byte.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from drivetrain.errors import IntegrityError, StoreError
from drivetrain.migration.integrity import Layout, Manifest, TensorSpec, canonical_json

FORMAT = 1
DATA, MANIFEST = "state.safetensors", "manifest.json"
_NAME = re.compile(r"step-(\d{12})-e(\d+)")
_DTYPES = {  # name -> (safetensors' name, bytes of an element)
    "float64": ("F64", 8),
    "float32": ("F32", 4),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "float8_e4m3fn": ("F8_E4M3", 1),
    "float8_e5m2": ("F8_E5M2", 1),
    "complex64": ("C64", 8),
    "int64": ("I64", 8),
    "int32": ("I32", 4),
    "int16": ("I16", 2),
    "int8": ("I8", 1),
    "uint64": ("U64", 8),
    "uint32": ("U32", 4),
    "uint16": ("U16", 2),
    "uint8": ("U8", 1),
    "bool": ("BOOL", 1),
}


def folder_name(step: int, epoch: int) -> str:
    """What the folder of a checkpoint is called."""
    return f"step-{step:012d}-e{epoch}"


def order_of(path: Path) -> tuple[int, int] | None:
    """(epoch, step) by the folder's name: a later owner's steps are the newer ones."""
    match = _NAME.fullmatch(path.name)
    return (int(match[2]), int(match[1])) if match else None


# -- the data file --------------------------------------------------------------------------------


def _stored_as(spec: TensorSpec) -> tuple[str, list[int], int]:
    """(dtype, shape, bytes of an element) in the header; raw bytes if it has no word for it."""
    dtype, width = _DTYPES.get(spec.dtype, ("", 0))
    if not width or math.prod(spec.shape) * width != spec.nbytes:
        return "U8", [spec.nbytes], 1
    in_memory = sorted(range(len(spec.shape)), key=lambda i: -spec.stride[i] if spec.stride else 0)
    expected = 1
    for i in reversed(range(len(spec.shape))):
        if spec.shape[i] != 1 and spec.stride[i] != expected:
            return dtype, [spec.shape[i] for i in in_memory], width
        expected *= spec.shape[i]
    return dtype, list(spec.shape), width


@dataclass(frozen=True)
class DataFile:
    """Where each tensor of a layout lies in the data file.

    Tensors with wide elements come first: safetensors allows no gap, and readers want each
    tensor aligned to its elements.
    """

    header: bytes
    offsets: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, manifest: Manifest, layout: Layout, step: int, epoch: int) -> DataFile:
        own = [spec for spec in manifest.tensors if spec.alias_of is None]
        stored = [_stored_as(spec) for spec in own]
        entries: dict[str, Any] = {
            "__metadata__": {"format": "pt", "step": str(step), "epoch": str(epoch)}
        }
        starts, end = [0] * len(own), 0
        for i in sorted(range(len(own)), key=lambda i: -stored[i][2]):
            dtype, shape, _ = stored[i]
            starts[i], end = end, end + layout.sizes[i]
            if own[i].name in entries:
                raise StoreError(f"Two tensors of the state are called {own[i].name!r}")
            entries[own[i].name] = {
                "dtype": dtype,
                "shape": shape,
                "data_offsets": [starts[i], end],
            }
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % 64)
        header = len(text).to_bytes(8, "little") + text
        return cls(header, tuple(len(header) + start for start in starts), len(header) + end)


# -- the manifest ---------------------------------------------------------------------------------


def sealed(body: Mapping[str, Any]) -> bytes:
    """The manifest's text: the body and the hash of its canonical JSON."""
    digest = xxhash.xxh3_64_hexdigest(canonical_json(body))
    return canonical_json({**body, "xxh3_64": digest})


def unsealed(path: Path, text: bytes) -> dict[str, Any]:
    """The body of a manifest's text. Raises IntegrityError when it is damaged."""
    try:
        body = json.loads(text)
        body.pop("xxh3_64")
        same = sealed(body) == text
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        same, body = False, {}
    if not same:
        raise IntegrityError(f"{path / MANIFEST} is damaged: it does not match its own hash")
    if body.get("format") != FORMAT:
        raise StoreError(
            f"{path} has format {body.get('format')}; this Drivetrain reads {FORMAT}. Use the "
            "Drivetrain that wrote it"
        )
    return dict(body)
