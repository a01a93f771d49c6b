"""Reductions over any dimensions: sum, prod, max, min, any, all, mean, and where the extreme lies.

A long reduction goes in stages: parts of it are reduced beside each other, then the parts. So the
order of a sum depends on the shape alone, and its rounding error grows with the logarithm.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drivetrain.hal.dtype import DTYPES, DType
from drivetrain.hal.kernels import text
from drivetrain.hal.kernels.family import (
    Family,
    Launch,
    agree,
    blocks,
    generator,
    get,
    kernel,
    launch,
    numpy,
    put,
    room,
)
from drivetrain.hal.language.source import Source

if TYPE_CHECKING:
    from drivetrain.hal.device import Device
    from drivetrain.hal.layout import Shape
    from drivetrain.hal.stream import Stream

BLOCK = 256
EACH = 16
"""Elements that one thread of a block reduces before the block's threads join."""
SERIAL = 128
"""Elements that one thread reduces by itself."""
_MOST = 65535
_HEAD = 6

_JOIN = {
    "sum": "a + b",
    "mean": "a + b",
    "prod": "a * b",
    "max": "(a != a || a > b ? a : b)",
    "min": "(a != a || a < b ? a : b)",
    "any": "(a || b)",
    "all": "(a && b)",
}
NAMES = tuple(_JOIN)


def _start(name: str, dtype: DType) -> str:
    if name in ("sum", "mean", "any"):
        return "0"
    if name in ("prod", "all"):
        return "1"
    sign = "f" if name == "max" else "7"
    if dtype.computed == "float":
        return f"__int_as_float(0x{sign}f800000)"
    if dtype.computed == "double":
        return f"__longlong_as_double(0x{sign}ff0000000000000LL)"
    least, most = dtype.limits
    if name == "min":
        return f"{most}{'ull' if dtype.name == 'uint64' else 'u' if dtype.kind == 'uint' else 'll'}"
    return f"({least + 1}ll - 1)" if least else "0"


ONE_A_THREAD = """
/* Each thread reduces one part of one row. */
extern "C" __global__ void NAME(OUT *out, const IN *in, Walk w) {
    long long rows = w.n[0], count = w.n[1], parts = w.n[2];
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= rows * parts) return;
#if ROWS_FIRST
    long long row = i % rows, part = i / rows;
#else
    long long row = i / parts, part = i % parts;
#endif
    long long slot = row * parts + part;
    long long at = w.n[3];
    WALK_ROWS
    T a = START;
#if RANGES
    long long each = (count + parts - 1) / parts;
    long long stop = (part + 1) * each < count ? (part + 1) * each : count;
    for (long long e = part * each; e < stop; ++e) {
#else
    for (long long e = part; e < count; e += parts) {
#endif
        long long from = at, rest = e;
        WALK_COLUMNS
        T b = (T)LOAD(in[from]);
        a = JOIN;
    }
    out[w.n[4] + slot] = STORE(LAST);
}
"""

ONE_A_BLOCK = """
/* Each block reduces one part of one row: its threads stride over it, then join as a tree. */
extern "C" __global__ void NAME(OUT *out, const IN *in, Walk w) {
    __shared__ T joined[256];
    long long rows = w.n[0], count = w.n[1], parts = w.n[2];
    long long row = (long long)blockIdx.z * gridDim.y + blockIdx.y, part = blockIdx.x;
    if (row >= rows) return;
    long long slot = row * parts + part;
    long long at = w.n[3];
    WALK_ROWS
    int t = threadIdx.x;
    T a = START;
    for (long long e = part * 256 + t; e < count; e += parts * 256) {
        long long from = at, rest = e;
        WALK_COLUMNS
        T b = (T)LOAD(in[from]);
        a = JOIN;
    }
    joined[t] = a;
    __syncthreads();
    for (int half = 128; half > 0; half >>= 1) {
        if (t < half) {
            T a = joined[t], b = joined[t + half];
            joined[t] = JOIN;
        }
        __syncthreads();
    }
    if (t == 0) {
        T a = joined[0];
        out[w.n[4] + slot] = STORE(LAST);
    }
}
"""

POSITION = """
/* Each thread finds the first extreme of one row, or its first NaN. */
extern "C" __global__ void NAME(long long *out, const IN *in, Walk w) {
    long long rows = w.n[0], count = w.n[1];
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= rows) return;
    long long row = i, at = w.n[3];
    WALK_ROWS
    long long best = 0;
    T a = 0;
    for (long long e = 0; e < count; ++e) {
        long long from = at, rest = e;
        WALK_COLUMNS
        T b = (T)LOAD(in[from]);
        if (e == 0 || BETTER) {
            a = b;
            best = e;
        }
    }
    out[w.n[4] + i] = best;
}
"""


def _common(dtype: DType, kept: int, reduced: int, body: str, truth: bool) -> str:
    head, width = _HEAD, kept
    rows = text.walk("w", "row", kept, head, [("at", head + width)])
    first = head + 2 * width
    columns = text.walk("w", "rest", reduced, first, [("from", first + reduced)])
    element = text.load(dtype, "x")
    return (
        text.prelude(dtype)
        + f"#define IN {dtype.stored}\n"
        + f"#define LOAD(x) {f'({element} != 0)' if truth else element}\n"
        + text.record("Walk", head + 2 * (kept + reduced))
        + body.replace("WALK_ROWS", rows).replace("WALK_COLUMNS", columns)
    )


def kernel_name(name: str, dtype: DType) -> str:
    """What timelines call the kernel."""
    return f"{name}_{dtype}"


def source(
    name: str,
    dtype: DType,
    total: DType,
    out: DType,
    kept: int = 0,
    reduced: int = 1,
    form: str = "block",
) -> Source:
    """``NAME(out, in, walk)``, where NAME is `kernel_name`: ``name`` is one of `NAMES`, ``total``
    the type that is calculated in, ``kept`` and ``reduced`` count dimensions.

    ``form`` is ``block``, or for one thread a part: ``spread`` (neighbours take neighbouring
    elements), ``rows`` (neighbouring rows) or ``ranges`` (each a range of its own).
    """
    truth = name in ("any", "all")
    last = "a / (T)w.n[5]" if name == "mean" and out.kind == "float" else "a"
    defines = (
        f"#define NAME {kernel_name(name, dtype)}\n"
        f"#define T {total.computed}\n#define OUT {out.stored}\n"
        f"#define JOIN {_JOIN[name]}\n#define START {_start(name, total)}\n"
        f"#define STORE(x) {text.store(out, 'x')}\n#define LAST {last}\n"
        f"#define ROWS_FIRST {int(form == 'rows')}\n#define RANGES {int(form == 'ranges')}\n"
    )
    body = ONE_A_BLOCK if form == "block" else ONE_A_THREAD
    stored = text.prelude(out) if out.name != dtype.name else ""
    return Source.cuda(
        stored + defines + _common(dtype, kept, reduced, body, truth), name=f"{name}.cu"
    )


def position(name: str, dtype: DType, kept: int, reduced: int) -> Source:
    """``NAME(out, in, walk)`` for ``argmax`` and ``argmin``; out is int64."""
    sign = ">" if name == "argmax" else "<"
    better = (
        f"(b {sign} a || (b != b && a == a)) && a == a"
        if dtype.kind == "float"
        else (f"b {sign} a")
    )
    defines = f"#define NAME {kernel_name(name, dtype)}\n#define T {dtype.computed}\n"
    defines += f"#define BETTER ({better})\n"
    return Source.cuda(defines + _common(dtype, kept, reduced, POSITION, False), name=f"{name}.cu")


def rule(rows: int, parts: int, form: str) -> Launch:
    if form != "block":
        return Launch((blocks(rows * parts, BLOCK),), (BLOCK,))
    high = min(rows, _MOST)
    return Launch((parts, high, blocks(rows, high)), (BLOCK,))


def parts(rows: int, count: int, form: str) -> int:
    """How many parts each row is reduced in, in this stage."""
    if form == "block":
        return min(4096, blocks(count, BLOCK * EACH))
    return blocks(count, SERIAL)


def walk(
    rows: int,
    count: int,
    pieces: int,
    offset: int,
    total: int,
    kept: tuple[Shape, Shape],
    reduced: tuple[Shape, Shape],
) -> bytes:
    """The structure: extents and strides of the kept and of the reduced dimensions."""
    return text.packed(
        [rows, count, pieces, offset, 0, total, *kept[0], *kept[1], *reduced[0], *reduced[1]]
    )


def reference(name: str, array: Any, axis: Any = None) -> Any:
    """By numpy, in double precision where the type is floating."""
    np = numpy()
    if array.dtype.kind == "f" and name in ("sum", "prod", "mean"):
        return getattr(np, name)(array.astype(np.float64), axis=axis).astype(array.dtype)
    return getattr(np, name)(array, axis=axis)


def _check(device: Device, stream: Stream, size: int) -> None:
    """Rows and columns of a matrix, in every form."""
    np, random = numpy(), generator(size)
    matrix = random.standard_normal((3, size)).astype(np.float32)
    whole = random.integers(-1000, 1000, (3, size), dtype=np.int32)
    f32, i32, i64 = DTYPES["float32"], DTYPES["int32"], DTYPES["int64"]
    cases: list[tuple[str, Any, DType, DType, str]] = [
        ("sum", matrix, f32, f32, "block"), ("sum", matrix, f32, f32, "spread"),
        ("mean", matrix, f32, f32, "ranges"), ("max", matrix, f32, f32, "block"),
        ("min", whole, i32, i32, "block"), ("sum", whole, i32, i64, "spread"),
    ]  # fmt: skip
    for name, array, dtype, total, form in cases:
        wanted = reference(name, array, axis=1).astype(total.name)
        made = room(device, stream, wanted.nbytes)
        found = kernel(
            device, kernel_name(name, dtype), source, name, dtype, total, total, 1, 1, form
        )
        packed = walk(3, size, 1, 0, size, ((3,), (size,)), ((size,), (1,)))
        launch(found, stream, rule(3, 1, form), made, put(device, stream, array), packed)
        loose = 1e-5 * float(np.sqrt(size)) if dtype.kind == "float" else 0.0
        agree(f"{name}, {form}", get(made, stream, 3, total.name), wanted, rtol=loose, atol=loose)
    wanted = reference("max", matrix, axis=0)
    made = room(device, stream, wanted.nbytes)
    found = kernel(device, kernel_name("max", f32), source, "max", f32, f32, f32, 1, 1, "rows")
    packed = walk(size, 3, 1, 0, 3, ((size,), (1,)), ((3,), (size,)))
    launch(found, stream, rule(size, 1, "rows"), made, put(device, stream, matrix), packed)
    agree("max of columns", get(made, stream, size, np.float32), wanted)
    wanted = np.argmax(whole, axis=1)
    made = room(device, stream, wanted.nbytes)
    found = kernel(device, kernel_name("argmax", i32), position, "argmax", i32, 1, 1)
    packed = walk(3, size, 1, 0, size, ((3,), (size,)), ((size,), (1,)))
    launch(found, stream, rule(3, 1, "rows"), made, put(device, stream, whole), packed)
    agree("argmax", get(made, stream, 3, np.int64), wanted)


FAMILIES = (
    Family("reduction", "rows and columns, by blocks and threads", source, rule, reference, _check),
)
