"""Elements by position: gathered, scattered, added up; and lines of rows added up (embeddings).

Sums of what falls to one place go in the order of the positions, so that they are the same in every
run: a thread owns what it adds to. Positions are int64; negative ones count from the end.
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
    from drivetrain.hal.stream import Stream

BLOCK = 64
WIDE = 256
_MOST = 65535

TEXT = """
#define INSIDE(position, extent) \\
    if (position < 0) position += extent; \\
    if (position < 0 || position >= extent) continue;

/* out has (rows, columns): to row positions[j] is added line j of in, (count, columns). A thread
   owns a column of every gridDim.y-th row; what a row has before stays in the sum. Lines with the
   position skipped are left out. */
extern "C" __global__ void add_rows(E *out, const E *in, const long long *positions,
                                    long long skipped, Lines w) {
    long long column = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    long long rows = w.n[0], columns = w.n[1], count = w.n[2];
    if (column >= columns) return;
    long long each = (rows + gridDim.y - 1) / gridDim.y;
    long long from = blockIdx.y * each, to = from + each < rows ? from + each : rows;
    for (long long j = 0; j < count; ++j) {
        long long row = positions[j];
        if (row < 0) row += rows;
        if (row < from || row >= to || row == skipped) continue;
        out[row * columns + column] =
            STORE(LOAD(out[row * columns + column]) + LOAD(in[j * columns + column]));
    }
}

/* out[i] = start + i step */
extern "C" __global__ void count(E *out, T start, T step, long long n) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = STORE(start + (T)i * step);
}

/* out[o, j, i] = in[o, positions[o, j, i], i]: n = outer, extent of in, of positions, inner. */
extern "C" __global__ void gather_along(E *out, const E *in, const long long *positions, Along w) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= w.n[0] * w.n[2] * w.n[3]) return;
    long long inner = i % w.n[3], outer = i / w.n[3] / w.n[2];
    long long position = positions[i];
    if (position < 0) position += w.n[1];
    if (position < 0) position = 0;
    if (position >= w.n[1]) position = w.n[1] - 1;
    out[i] = in[(outer * w.n[1] + position) * w.n[3] + inner];
}

/* out[o, positions[o, j, i], i] = or += in[o, j, i], in the order of j; a thread owns (o, i). */
extern "C" __global__ void scatter_along(E *out, const E *in, const long long *positions, int adds,
                                         Along w) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= w.n[0] * w.n[3]) return;
    long long inner = i % w.n[3], outer = i / w.n[3];
    for (long long j = 0; j < w.n[2]; ++j) {
        long long from = (outer * w.n[2] + j) * w.n[3] + inner;
        long long position = positions[from];
        INSIDE(position, w.n[1])
        long long to = (outer * w.n[1] + position) * w.n[3] + inner;
        if (adds) out[to] = STORE(LOAD(out[to]) + LOAD(in[from]));
        else out[to] = in[from];
    }
}
"""


def source(dtype: DType) -> Source:
    """``add_rows(out, in, positions, skipped, lines)``, ``count(out, start, step, n)``,
    ``gather_along(out, in, positions, along)`` (positions beyond an end go to it) and
    ``scatter_along(out, in, positions, adds, along)`` (such positions are left out)."""
    return Source.cuda(
        text.prelude(dtype)
        + f"#define E {dtype.stored}\n#define T {dtype.computed}\n"
        + f"#define LOAD(x) {text.load(dtype, 'x')}\n#define STORE(x) {text.store(dtype, 'x')}\n"
        + text.record("Lines", 3)
        + text.record("Along", 4)
        + TEXT,
        name="indexing.cu",
    )


def rule(elements: int) -> Launch:
    return Launch((blocks(elements, WIDE),), (WIDE,))


def rows_rule(rows: int, columns: int, units: int) -> Launch:
    """For ``add_rows``: each part of the rows goes over all positions, so no more parts than give
    each of the device's ``units`` something to do."""
    across = blocks(columns, BLOCK)
    parts = max(1, min(rows, _MOST, blocks(4 * units, across)))
    return Launch((across, parts), (BLOCK,))


def reference(array: Any, values: Any, positions: Any) -> Any:
    """``array`` with ``values[j]`` added to row ``positions[j]``, in double precision."""
    np = numpy()
    found = array.astype(np.float64)
    np.add.at(found, positions, values.astype(np.float64))
    return found.astype(array.dtype)


def _check(device: Device, stream: Stream, size: int) -> None:
    np, random = numpy(), generator(size)
    f32 = DTYPES["float32"]
    rows, columns, count = 9, 5 + size % 60, size
    array = random.standard_normal((rows, columns)).astype(np.float32)
    values = random.standard_normal((count, columns)).astype(np.float32)
    positions = random.integers(0, rows, count)
    wanted = reference(array, values, positions)
    wanted[3] = array[3]
    made, lines, where = (put(device, stream, each) for each in (array, values, positions))
    found = kernel(device, "add_rows", source, f32)
    packed = text.packed([rows, columns, count])
    launch(found, stream, rows_rule(rows, columns, 2), made, lines, where, 3, packed)
    got = get(made, stream, array.shape, np.float32)
    agree("add_rows", got, wanted, rtol=1e-4, atol=1e-4)
    along = random.integers(-rows, rows, (4, columns))
    packed = text.packed([1, rows, 4, columns])
    made, where = put(device, stream, array), put(device, stream, along)
    out = room(device, stream, 16 * columns)
    found = kernel(device, "gather_along", source, f32)
    launch(found, stream, rule(along.size), out, made, where, packed)
    wanted = np.take_along_axis(array, along, 0)
    agree("gather_along", get(out, stream, along.shape, np.float32), wanted)
    numbers = room(device, stream, 4 * size)
    found = kernel(device, "count", source, f32)
    launch(found, stream, rule(size), numbers, 2.0, 0.5, size)
    wanted = 2 + np.arange(size, dtype=np.float32) / 2
    agree("count", get(numbers, stream, size, np.float32), wanted)
    lines = put(device, stream, values[:4])
    found = kernel(device, "scatter_along", source, f32)
    for adds in (0, 1):
        wanted = array.copy()
        for j in range(4):
            for column in range(columns):
                start = wanted[along[j, column], column] if adds else 0
                wanted[along[j, column], column] = start + values[j, column]
        made = put(device, stream, array)
        launch(found, stream, rule(columns), made, lines, where, adds, packed)
        agree("scatter_along", get(made, stream, array.shape, np.float32), wanted, rtol=1e-6)


FAMILIES = (
    Family(
        "indexing",
        "elements and rows by position, and sums of them in order",
        source,
        rule,
        reference,
        _check,
    ),
)
