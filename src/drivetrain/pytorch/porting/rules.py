"""What single statements and expressions say about a vendor. Each takes a node and answers."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from drivetrain.pytorch.porting import tables
from drivetrain.pytorch.porting.names import Names, text_of

__all__ = ["Tie", "demand", "device_type", "ties_of_expression", "ties_of_statement"]

Effect = Literal["fails", "skips", "differs"]

_KINDS = "|".join(tables.DEVICE_TYPES)
_DEVICE = re.compile(rf"({_KINDS})(?::(?:\d+|%d|%s|\{{\w*\}})?)?", re.ASCII)
_PLAIN = ("cuda", "xpu", "mps")
"""Kinds that a text says only when it means the device; ``hip`` is also a part of the body."""
_CAPABILITY = {
    "get_device_capability",
    "get_arch_list",
    "get_gencode_flags",
    "is_bf16_supported",
    "is_tf32_supported",
}
_HARMLESS = {
    "OutOfMemoryError",
    "amp.GradScaler",
    "amp.autocast",
    "empty_cache",
    "is_initialized",
    "manual_seed",
    "manual_seed_all",
    "max_memory_allocated",
    "max_memory_reserved",
    "memory_allocated",
    "memory_reserved",
    "memory_stats",
    "seed",
    "seed_all",
}
"""Functions of torch.cuda that run without a CUDA device, and do nothing there."""
_ASKING = {"device_count", "is_available", "is_bf16_supported"}
_RAWKERNELS = {"ElementwiseKernel", "RawKernel", "RawModule", "ReductionKernel", "SourceModule"}
_CUDA_ARGUMENTS = {"cuda_sources", "extra_cuda_cflags", "with_cuda"}
_TO_DEVICE = {"to", "to_empty", "type"}
_TOLERANT = {"torch.autocast", "torch.amp.autocast", "torch.amp.GradScaler"}
"""They warn and do nothing where the device is not there."""
_LITERALS = (ast.Constant, ast.JoinedStr)


@dataclass(frozen=True)
class Tie:
    """``covers``: parts of the node that are told by this and not looked at again."""

    code: str
    vendor: str
    text: str
    portable: str
    effect: Effect = "fails"
    device_type: str = ""
    covers: tuple[ast.AST, ...] = ()


def device_type(text: str) -> str:
    """``cuda`` for ``cuda``, ``cuda:1`` and ``cuda:{}``; "" for a text that is no device."""
    if text == "cpu":
        return text
    found = _DEVICE.fullmatch(text)
    return found[1] if found else ""


# -- statements -----------------------------------------------------------------------------------


def ties_of_statement(node: ast.stmt, names: Names) -> Iterator[Tie]:
    if isinstance(node, ast.Import):
        for each in node.names:
            yield from _import(each.name)
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
        found = list(_import(node.module))
        for each in node.names:
            found += _import(f"{node.module}.{each.name}") if not found else []
        yield from found


def demand(test: ast.AST, names: Names) -> Tie | None:
    """What a program that goes on only when ``test`` is true needs, where that is a device."""
    for node in ast.walk(test):
        dotted = names.dotted(node)
        for module, kind in tables.MODULES.items():
            if dotted == f"{module}.is_available":
                text = f"needs {dotted}()"
                form = "leave it out, or torch.accelerator.is_available()"
                return Tie("device-test", tables.DEVICE_TYPES[kind], text, form, "fails", kind)
    return None


def _import(module: str) -> Iterator[Tie]:
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        name = ".".join(parts[:end])
        if name in tables.IMPORTS:
            vendor, portable = tables.IMPORTS[name]
            yield Tie("import", vendor, f"import {name}", portable)
            return


# -- expressions ----------------------------------------------------------------------------------


def ties_of_expression(node: ast.AST, names: Names) -> Iterator[Tie]:
    if isinstance(node, ast.Call):
        yield from _call(node, names)
    elif isinstance(node, (ast.Attribute, ast.Name)):
        yield from _name(node, names)
    elif isinstance(node, ast.Constant):
        yield from _text(node, text_of(node))
    elif isinstance(node, ast.JoinedStr):
        yield from _formatted(node)
    elif isinstance(node, ast.Compare):
        yield from _comparison(node)
    elif isinstance(node, ast.Dict):
        keys = tuple(key for key in node.keys if key is not None)
        if any(device_type(text_of(key)) for key in keys):
            yield from _silent(keys)
    elif isinstance(node, (ast.List, ast.Tuple, ast.Set)):
        kinds = {device_type(text_of(each)) for each in node.elts} - {""}
        if len(kinds) > 1:
            yield from _silent(tuple(e for e in node.elts if isinstance(e, _LITERALS)))
    elif isinstance(node, ast.keyword) and node.arg == "choices":
        yield from _silent((node.value,))


def _silent(covers: tuple[ast.AST, ...]) -> Iterator[Tie]:
    """Nothing is said, and the parts are not looked at: a choice among devices ties to none."""
    yield Tie("", "", "", "", covers=covers)


def _call(node: ast.Call, names: Names) -> Iterator[Tie]:
    called = names.dotted(node.func)
    last = called.rpartition(".")[2]
    method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
    if called in ("getattr", "hasattr", "print"):
        yield from _silent(tuple(a for a in node.args if isinstance(a, _LITERALS)))
        return
    if called in _TOLERANT:
        for each in (*node.args[:1], *(k.value for k in node.keywords if k.arg == "device_type")):
            kind = device_type(text_of(each))
            if kind not in ("", "cpu"):
                yield _device(text_of(each), kind, effect="differs", covers=(each,))
    if method in tables.DEVICE_TYPES and not _is_module(called, names):
        yield Tie(
            "device-method",
            tables.DEVICE_TYPES[method],
            f".{method}()",
            f".to(device) with {tables.DEVICE}",
            device_type=method,
        )
    if called.startswith("torch.utils.cpp_extension.") or last == "CUDAExtension":
        yield from _extension(node, last)
    if last in _RAWKERNELS or called == "torch.cuda._compile_kernel":
        yield Tie("kernel", "NVIDIA", f"{last}(...)", tables.KERNELS, covers=(node.func,))
    if called == "torch._scaled_mm":
        yield Tie("fp8-switch", "NVIDIA (and AMD)", "torch._scaled_mm", tables.FLOAT8_FORM)
    if method in _TO_DEVICE or called == "torch.device" or last == "set_default_device":
        for each in node.args[:1]:
            kind = device_type(text_of(each))
            if kind not in ("", "cpu", *_PLAIN):
                yield _device(text_of(each), kind, covers=(each,))


def _is_module(called: str, names: Names) -> bool:
    """True for ``numba.cuda(...)`` and the like, where the name is a module's and no method."""
    return called in tables.MODULES or (called.count(".") == 1 and names.imported(called))


def _extension(node: ast.Call, last: str) -> Iterator[Tie]:
    words = {keyword.arg for keyword in node.keywords}
    files = [text_of(part) for part in ast.walk(node)]
    kernels = any(text.endswith((".cu", ".cuh")) for text in files)
    if last == "CUDAExtension" or kernels or words & _CUDA_ARGUMENTS:
        yield Tie("extension", "NVIDIA", f"{last}(...)", tables.KERNELS, covers=(node.func,))


def _name(node: ast.Attribute | ast.Name, names: Names) -> Iterator[Tie]:
    dotted = names.dotted(node)
    if not dotted.startswith(("torch.", "numba.")) and isinstance(node, ast.Name):
        return
    for switch, (code, vendor, portable) in tables.SWITCHES.items():
        if dotted == switch or dotted.startswith(f"{switch}."):
            yield Tie(code, vendor, dotted, portable, "differs", covers=_inner(node))
            return
    for module, kind in tables.MODULES.items():
        if dotted.startswith(f"{module}."):
            yield _of_module(dotted, dotted.removeprefix(f"{module}."), kind, node)
            return
    if dotted == "numba.cuda.jit":
        yield Tie("kernel", "NVIDIA", "numba.cuda.jit", tables.KERNELS)
    elif dotted in ("torch.version.cuda", "torch.version.hip", "torch.version.xpu"):
        portable = "torch.accelerator.current_accelerator()"
        vendor = tables.DEVICE_TYPES[dotted.rpartition(".")[2]]
        yield Tie("device-test", vendor, dotted, portable, "skips", covers=_inner(node))
    elif isinstance(node, ast.Attribute) and node.attr in ("is_cuda", "is_xpu"):
        vendor = tables.DEVICE_TYPES[node.attr.removeprefix("is_")]
        yield Tie("device-test", vendor, f".{node.attr}", "not tensor.is_cpu", "skips")
    elif dotted.startswith("torch.float8") or (
        isinstance(node, ast.Attribute) and node.attr in tables.FLOAT8
    ):
        text = dotted or f".{node.attr}"  # type: ignore[union-attr]
        yield Tie("fp8-switch", "NVIDIA (and AMD)", text, tables.FLOAT8_FORM, "differs")


def _inner(node: ast.Attribute | ast.Name) -> tuple[ast.AST, ...]:
    return (node.value,) if isinstance(node, ast.Attribute) else ()


def _of_module(dotted: str, rest: str, kind: str, node: ast.Attribute | ast.Name) -> Tie:
    vendor, covers = tables.DEVICE_TYPES[kind], _inner(node)
    if rest in _CAPABILITY or rest.partition(".")[0] in _CAPABILITY:
        effect: Effect = "skips" if rest in _ASKING else "fails"
        needs = kind if effect == "fails" else ""
        return Tie("capability-test", vendor, dotted, tables.CAPABILITY, effect, needs, covers)
    words = rest.split(".")
    known = (tables.CALLS.get(".".join(words[:end])) for end in range(len(words), 0, -1))
    portable = next(filter(None, known), tables.OTHER_CALL)
    if rest in _ASKING:
        return Tie("device-module", vendor, dotted, portable, "skips", covers=covers)
    if rest in _HARMLESS:
        return Tie("device-module", vendor, dotted, portable, "differs", covers=covers)
    return Tie("device-module", vendor, dotted, portable, "fails", kind, covers)


def _device(
    text: str, kind: str, *, effect: Effect = "fails", covers: tuple[ast.AST, ...] = ()
) -> Tie:
    vendor, needs = tables.DEVICE_TYPES[kind], kind if effect == "fails" else ""
    return Tie("device", vendor, repr(text), tables.DEVICE, effect, needs, covers)


def _text(node: ast.Constant, text: str) -> Iterator[Tie]:
    if not text or len(text) > 300:
        return
    kind = device_type(text)
    if kind in _PLAIN or (kind and ":" in text):
        yield _device(text, kind)
        return
    first = text.split(maxsplit=1)[0] if text.strip() else ""
    if first in tables.TOOLS:
        portable = "`drivetrain devices --json`, or drivetrain.hal.device(address).telemetry()"
        if first in ("nvcc", "hipcc"):
            portable = tables.KERNELS
        yield Tie("vendor-tool", tables.TOOLS[first], first, portable)
    elif text in tables.COLLECTIVES:
        yield Tie("collectives", tables.COLLECTIVES[text], repr(text), tables.BACKEND)
    elif any(part.partition(":")[2] in tables.COLLECTIVES for part in text.split(",")):
        yield Tie("collectives", "several", repr(text), tables.BACKEND, "differs")
    elif text in tables.ENVIRONMENT:
        yield Tie(
            "visible-devices",
            tables.ENVIRONMENT[text],
            text,
            "leave it out: `drivetrain run --on ADDRESS` shows a job its device and no other",
            "differs",
        )
    elif text in tables.TUNING_NAMES or (
        text.startswith(tables.TUNING) and re.fullmatch(r"[A-Z0-9_]+", text)
    ):
        portable = "set it outside the program, where the vendor is known"
        yield Tie("tuning", "one vendor", text, portable, "differs")


def _formatted(node: ast.JoinedStr) -> Iterator[Tie]:
    """``f"cuda:{rank}"``."""
    kind, colon, rest = text_of(node.values[0] if node.values else None).partition(":")
    if kind in tables.DEVICE_TYPES and colon and not rest and len(node.values) == 2:
        yield _device(f"{kind}:{{}}", kind, covers=tuple(node.values))


def _comparison(node: ast.Compare) -> Iterator[Tie]:
    """``device.type == "cuda"``, ``kind in ("cuda", "xpu")``."""
    sides = [node.left, *node.comparators]
    texts = [text_of(part) for side in sides for part in ast.walk(side)]
    kinds = [kind for kind in map(device_type, texts) if kind not in ("", "cpu")]
    backends = [text for text in texts if text in tables.COLLECTIVES]
    said = tuple(side for side in sides if any(device_type(text_of(p)) for p in ast.walk(side)))
    if kinds:
        vendor, text = tables.DEVICE_TYPES[kinds[0]], ast.unparse(node)[:80]
        yield Tie("device-test", vendor, text, "device.type != 'cpu'", "skips", covers=said)
    elif backends:
        vendor, text = tables.COLLECTIVES[backends[0]], ast.unparse(node)[:80]
        yield Tie("collectives", vendor, text, tables.BACKEND, "skips", covers=tuple(sides))
