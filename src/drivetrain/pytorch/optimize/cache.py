"""Plans that were found, by model signature, torch version and device."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from drivetrain.hal import config
from drivetrain.pytorch.optimize.report import Report
from drivetrain.pytorch.optimize.steps import Step
from drivetrain.pytorch.optimize.subject import Subject

__all__ = ["FILE", "fatal", "forget", "key_of", "load", "note_fatal", "save", "signature"]

FILE = "optimize.json"
ENTRIES = 256
"""The oldest go first."""
FORM = 1
_NONE: frozenset[str] = frozenset()


def signature(model: nn.Module) -> str:
    """A hash of the structure: classes, what they print of themselves, their plain attributes, the
    code of ``forward`` where it is not torch's, and each tensor's name, shape, type and sharing;
    not its values."""
    digest = hashlib.sha256()
    for name, part in model.named_modules():
        kind = type(part)
        digest.update(
            f"{name}|{kind.__module__}.{kind.__qualname__}|{part.extra_repr()}\n".encode()
        )
        plain = {k: v for k, v in vars(part).items() if isinstance(v, (int, float, str))}
        digest.update(repr(sorted(plain.items())).encode())
        code = getattr(kind.forward, "__code__", None)
        if code is not None and not kind.__module__.startswith("torch."):
            digest.update(code.co_code + repr(code.co_names).encode() + _constants(code))
    first: dict[int, str] = {}
    for name, tensor in (*_all(model.named_parameters), *_all(model.named_buffers)):
        shared = first.setdefault(id(tensor), name)
        facts = (name, tuple(tensor.shape), tuple(tensor.stride()), str(tensor.dtype), shared)
        digest.update(repr((*facts, tensor.requires_grad)).encode())
    return digest.hexdigest()


def _constants(code: Any) -> bytes:
    """Without addresses, which a nested function's repr has."""
    plain = [
        c for c in code.co_consts if isinstance(c, (int, float, str, bytes, type(None), tuple))
    ]
    nested = [c.co_code for c in code.co_consts if hasattr(c, "co_code")]
    return repr(plain).encode() + b"".join(nested)


def _all(named: Any) -> Any:
    return named(remove_duplicate=False)


def key_of(
    subject: Subject, model: nn.Module, steps: tuple[Step, ...], objective: str, tolerance: float
) -> str:
    """What an entry is good for."""
    leaves, shape = tree_flatten((subject.inputs.args, subject.inputs.kwargs))
    inputs = [
        (tuple(leaf.shape), tuple(leaf.stride()), str(leaf.dtype))
        if isinstance(leaf, Tensor)
        else repr(leaf)[:200]
        for leaf in leaves
    ]
    optimizer = subject.optimizer
    facts = (
        FORM,
        signature(model),
        str(torch.__version__),
        str(subject.device),
        subject.facts.name,
        torch.get_num_threads() if subject.device.type == "cpu" else 0,
        torch.version.cuda,
        subject.training,
        "" if optimizer is None else type(optimizer).__qualname__,
        repr(shape),
        inputs,
        objective,
        tolerance,
        [(step.name, step.code if step.group == "own" else "") for step in steps],
    )
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _path(home: Path | None) -> Path:
    return (home or config.state_folder()) / FILE


def load(key: str, *, home: Path | None = None) -> Report | None:
    """The report of an earlier search; None where there is none that can be read."""
    entry = config.read_json(_path(home)).get(key)
    return Report.read(entry.get("report")) if isinstance(entry, dict) else None


def save(key: str, report: Report, *, home: Path | None = None) -> None:
    _put(key, {"report": json.loads(json.dumps(report.as_json()))}, home)


def _put(key: str, facts: dict[str, Any], home: Path | None) -> None:
    path = _path(home)

    def change(found: dict[str, Any]) -> dict[str, Any]:
        known = {k: v for k, v in found.items() if isinstance(v, dict)}
        known[key] = {**known.get(key, {}), **facts, "at": time.time()}
        newest = sorted(known, key=lambda k: -float(known[k].get("at", 0)))[:ENTRIES]
        return {k: known[k] for k in newest}

    try:
        config.change_json(path, change)
    except OSError as error:  # no reason to throw away what a search has found
        warnings.warn(f"the plan is not kept: {path}: {error}", RuntimeWarning, stacklevel=3)


def fatal(key: str, *, home: Path | None = None) -> frozenset[str]:
    """Steps that took the device down when this search was made before."""
    entry = config.read_json(_path(home)).get(key)
    names = entry.get("fatal") if isinstance(entry, dict) else None
    return frozenset(n for n in names if isinstance(n, str)) if isinstance(names, list) else _NONE


def note_fatal(key: str, step: str, *, home: Path | None = None) -> None:
    """The next search leaves ``step`` out."""
    _put(key, {"fatal": sorted({*fatal(key, home=home), step})}, home)


def forget(*, home: Path | None = None) -> None:
    """Forgets every plan."""
    _path(home).unlink(missing_ok=True)
