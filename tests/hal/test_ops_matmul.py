"""Matrix products: by the vendor's BLAS or by our own kernels, with the same results."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drivetrain import hal
from drivetrain.errors import BadInput, HalError
from drivetrain.hal import blas, ops
from drivetrain.hal.blas import Product, Unusable, finding
from drivetrain.hal.blas.clblast import Clblast
from drivetrain.hal.blas.cublas import Cublas, Hipblas
from drivetrain.hal.dtype import DTYPES
from drivetrain.hal.opened import opened

np = pytest.importorskip("numpy")
pytest.importorskip("tree_sitter_cuda")

CPU = {"device": "cpu:0"}


@pytest.fixture(params=["library", "own"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """With the host's library where there is one, and with our own kernels."""
    here = opened(hal.device("cpu:0"))
    kept = here.kernels.pop("blas", None)
    if request.param == "own":
        monkeypatch.setenv(finding.ASKED, "own")
    elif ops.matmul_backend("cpu:0").startswith("own"):
        pytest.skip("no BLAS of the host is installed here")
    here.kernels.pop("blas", None)
    yield str(request.param)
    here.kernels.pop("blas", None)
    if kept is not None:
        here.kernels["blas"] = kept


def agree(found: Any, a: Any, b: Any) -> None:
    wanted = np.matmul(a.astype(np.float64), b.astype(np.float64))
    assert found.shape == wanted.shape
    assert found.dtype == np.result_type(a, b)
    rtol = {"float16": 3e-3, "float32": 1e-5, "float64": 1e-13}.get(str(found.dtype), 0.0)
    loose = rtol * max(1.0, float(a.shape[-1]))
    assert np.allclose(found.numpy(), wanted, rtol=rtol, atol=loose)


def numbers(shape: Any, dtype: str = "float32", seed: int = 0) -> Any:
    random = np.random.default_rng(seed)
    return (random.standard_normal(shape) * 4).astype(dtype)


SHAPES = [
    ((3,), (3,)), ((3,), (3, 4)), ((2, 3), (3,)), ((1, 1), (1, 1)), ((17, 33), (33, 5)),
    ((4, 2, 3), (3, 5)), ((2, 3), (4, 3, 5)), ((2, 1, 4, 3), (5, 3, 2)), ((0, 3), (3, 2)),
    ((2, 0), (0, 3)), ((130, 70), (70, 129)), ((3, 1, 2, 4), (1, 3, 4, 2)),
]  # fmt: skip


@pytest.mark.parametrize(("left", "right"), SHAPES)
def test_products_are_numpys(way: str, left: Any, right: Any) -> None:
    a, b = numbers(left), numbers(right, seed=1)
    agree(ops.asarray(a, **CPU) @ ops.asarray(b, **CPU), a, b)


@settings(max_examples=40)
@given(*(st.integers(1, 40) for _ in range(3)), st.data())
def test_any_strides_will_do(m: int, n: int, k: int, data: st.DataObject) -> None:
    """Transposed, cut and reversed operands."""
    pair = []
    for rows, columns in ((m, k), (k, n)):
        array = numbers((rows + 3, columns + 2), seed=rows)
        x = ops.asarray(array, **CPU)
        if data.draw(st.booleans()):
            x = ops.asarray(np.ascontiguousarray(array.T), **CPU).T
        key = data.draw(
            st.sampled_from(
                [
                    (slice(3, None), slice(None, -2)),
                    (slice(None, rows), slice(2, None)),
                    (slice(rows - 1, None, -1), slice(1, -1)),
                ]
            )
        )
        key = (slice(None, rows), key[1]) if key[0].step == -1 else key
        pair.append((array[key], x[key]))
    (a, x), (b, y) = pair
    agree(ops.matmul(x, y), a, b)


@pytest.mark.parametrize("dtype", ["float64", "float16", "int32", "int64", "uint8"])
def test_other_types(way: str, dtype: str) -> None:
    a, b = numbers((9, 20), dtype), numbers((20, 7), dtype, 1)
    found = ops.asarray(a, **CPU) @ ops.asarray(b, **CPU)
    if dtype == "uint8":
        assert np.array_equal(found.numpy(), a @ b)
    else:
        agree(found, a, b)
    mixed = numbers((20, 7), "float64", 2)
    if dtype == "float16":
        agree(ops.asarray(a, **CPU) @ ops.asarray(mixed, **CPU), a, mixed)


def test_what_does_not_fit_is_told() -> None:
    x = ops.ones((2, 3), **CPU)
    for call, words in (
        (lambda: x @ x, "3 columns meet 2 rows"),
        (lambda: ops.matmul(x, ops.asarray(1.0, **CPU)), "no dimensions"),
        (lambda: ops.matmul(x, 2.0), "two arrays"),
        (lambda: x @ ops.ones((3, 2), dtype="int32", **CPU), "do not mix"),
        (lambda: ops.matmul(*[ops.ones((2, 2), dtype="bool", **CPU)] * 2), "not for bool"),
        (lambda: ops.ones((2, 2, 3), **CPU) @ ops.ones((3, 3, 2), **CPU), "broadcast"),
    ):
        with pytest.raises(BadInput, match=words):
            call()


def test_a_product_takes_its_turn_in_the_stream(way: str) -> None:
    device = hal.device("cpu:0")
    stream, other = device.stream(), device.stream()
    a = ops.random.normal((300, 300), seed=1, stream=stream)
    for round in range(5):
        b = ops.full((300, 300), float(round), stream=other)
        found = ops.matmul(a, b, stream=stream)
        b.assign(-1.0, stream=other)  # only once the product has read it
        rows = a.numpy().astype(np.float64).sum(1, keepdims=True) * round
        assert np.allclose(found.numpy(), np.broadcast_to(rows, (300, 300)), atol=1e-3)


@pytest.mark.parametrize("dtype", ["int32", "float32"])
@pytest.mark.parametrize(
    ("left", "right"),
    [((70_001, 1, 2), (2, 1)), ((1, 1), (1, 1_100_000)), ((1_100_000, 1), (1, 1))],
)
def test_more_of_it_than_a_grid_has_blocks(dtype: str, left: Any, right: Any) -> None:
    a, b = numbers(left, dtype), numbers(right, dtype, 1)
    found = ops.asarray(a, **CPU) @ ops.asarray(b, **CPU)
    assert np.allclose(found.numpy(), a @ b, rtol=1e-5, atol=1e-5)


# -- which library ---------------------------------------------------------------------------------

ASKED = """
import json
from drivetrain import hal
from drivetrain.hal import ops
from drivetrain.hal.blas import backend
from drivetrain.hal.opened import opened
device = hal.device("cpu:0")
x = ops.asarray([[1.0, 2.0], [3.0, 4.0]], device=device)
choice = backend(opened(device))
print(json.dumps([ops.matmul_backend(device), choice.name, choice.reason, (x @ x).tolist()]))
"""


def asked(value: str, **more: str) -> list[Any]:
    done = subprocess.run(
        [sys.executable, "-c", ASKED],
        env={**os.environ, finding.ASKED: value, **more},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(done.stdout.splitlines()[-1])
    assert found[-1] == [[7, 10], [15, 22]]
    return found


def test_our_own_kernels_are_taken_when_asked_for() -> None:
    shown, name, reason, _ = asked("own")
    assert (shown, name, reason) == ("own (DRIVETRAIN_BLAS=own)", "own", "DRIVETRAIN_BLAS=own")


@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
def test_a_library_that_is_absent_or_wrong_is_passed_over_with_its_reason(tmp_path: Path) -> None:
    shown, name, reason, _ = asked("/nowhere/libopenblas.so")
    assert name == "own"
    assert "/nowhere/libopenblas.so: " in reason
    assert "No such file" in reason
    assert reason in shown
    for text, words in (
        ("int other;", "no cblas_sgemm"),
        ("void cblas_sgemm(void){} void cblas_dgemm(void){}", "one thread"),
        (
            "void cblas_sgemm(void){} void cblas_dgemm(void){}"
            " void openblas_set_num_threads(int n){(void)n;}",
            "a product gave",
        ),
    ):
        asked_for = library(tmp_path, "wrong", text)
        _, name, reason, _ = asked(str(asked_for))
        assert name == "own"
        assert words in reason


def test_numpys_library_keeps_its_threads() -> None:
    code = (
        "import ctypes, numpy as np; np.ones((2, 2)) @ np.ones((2, 2));"
        "from drivetrain.hal import blas, ops; from drivetrain.hal.blas import finding;"
        "paths = [l.path for l in finding.host() if 'numpy.libs' in l.path];"
        "libs = [ctypes.CDLL(p) for p in paths];"
        "get = [getattr(l, 'scipy_openblas_get_num_threads64_', None) for l in libs];"
        "before = [g() for g in get if g]; name = ops.matmul_backend('cpu:0');"
        "x = ops.ones((64, 64), device='cpu:0'); (x @ x).numpy();"
        "print(before == [g() for g in get if g], len(before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    same, count = done.stdout.split()
    assert same == "True"
    if count == "0":
        pytest.skip("numpy brings no OpenBLAS with 64-bit names here")


def library(folder: Path, name: str, text: str) -> Path:
    """A shared object made from C."""
    source, made = folder / f"{name}.c", folder / f"lib{name}{abs(hash(text))}.so"
    source.write_text(text)
    command = ["cc", "-shared", "-fPIC", "-O1", str(source), "-o", str(made), "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return made


# -- cuBLAS, hipBLAS and CLBlast, over libraries of our own that multiply on the host ------------

MULTIPLY = """
#include <stddef.h>
#include <string.h>
#define PLAIN(op) ((op) == 0 || (op) == 111)
static int calls, streams, destroyed; static void *last;
int seen_destroyed(void) { return destroyed; }
int seen_calls(void) { return calls; }
int seen_streams(void) { return streams; }
void *seen_stream(void) { return last; }
#define COLUMNS_FIRST(T, name) \\
static void name(int ta, int tb, int m, int n, int k, const T *a, long lda, const T *b, \\
                 long ldb, T *c, long ldc) { \\
    for (int j = 0; j < n; j++) for (int i = 0; i < m; i++) { \\
        T sum = 0; \\
        for (int l = 0; l < k; l++) \\
            sum += a[PLAIN(ta) ? i + l * lda : l + i * lda] * \\
                   b[PLAIN(tb) ? l + j * ldb : j + l * ldb]; \\
        c[i + j * ldc] = sum; \\
    } \\
}
COLUMNS_FIRST(float, single)
COLUMNS_FIRST(double, twice)
"""

CUBLAS = (
    MULTIPLY
    + """
int cublasCreate_v2(void **h) { *h = &calls; return FAILS; }
int cublasDestroy_v2(void *h) { destroyed++; return 0; }
int cublasSetStream_v2(void *h, void *s) { last = s; streams++; return h != &calls; }
int cublasGetVersion_v2(void *h, int *v) { *v = VERSION; return 0; }
int cublasGemmStridedBatchedEx(void *h, int ta, int tb, int m, int n, int k, const void *alpha,
    const char *a, int at, int lda, long long sa, const char *b, int bt, int ldb, long long sb,
    const void *beta, char *c, int ct, int ldc, long long sc, int count, int compute, int algo) {
    calls++;
    if (h != &calls || at != bt || at != ct || algo != -1) return 7;
    if (at == 0 && (compute != 68 || *(float *)alpha != 1 || *(float *)beta)) return 7;
    if (at == 1 && (compute != 70 || *(double *)alpha != 1 || *(double *)beta)) return 7;
    if (at > 1) return 15;
    for (int z = 0; z < count; z++) {
        if (at) twice(ta, tb, m, n, k, (const double *)a + z * sa, lda, (const double *)b + z * sb,
                      ldb, (double *)c + z * sc, ldc);
        else single(ta, tb, m, n, k, (const float *)a + z * sa, lda, (const float *)b + z * sb,
                    ldb, (float *)c + z * sc, ldc);
    }
    return 0;
}
"""
)

HIPBLAS = (
    MULTIPLY
    + """
int hipblasCreate(void **h) { *h = &calls; return 0; }
int hipblasDestroy(void *h) { destroyed++; return 0; }
int hipblasSetStream(void *h, void *s) { last = s; streams++; return h != &calls; }
#define GEMM(T, LETTER, name) \\
int hipblas##LETTER##gemmStridedBatched(void *h, int ta, int tb, int m, int n, int k, \\
    const T *alpha, const T *a, int lda, long long sa, const T *b, int ldb, long long sb, \\
    const T *beta, T *c, int ldc, long long sc, int count) { \\
    calls++; \\
    if (h != &calls || *alpha != 1 || *beta || ta < 111 || tb < 111) return 3; \\
    for (int z = 0; z < count; z++) \\
        name(ta, tb, m, n, k, a + z * sa, lda, b + z * sb, ldb, c + z * sc, ldc); \\
    return 0; \\
}
GEMM(float, S, single)
GEMM(double, D, twice)
"""
)

CLBLAST = (
    MULTIPLY
    + """
#define GEMM(T, LETTER, name) \\
int CLBlast##LETTER##gemmStridedBatched(int layout, int ta, int tb, size_t m, size_t n, size_t k, \\
    T alpha, T *a, size_t ao, size_t lda, size_t sa, T *b, size_t bo, size_t ldb, size_t sb, \\
    T beta, T *c, size_t co, size_t ldc, size_t sc, size_t count, void **queue, void *event) { \\
    calls++; last = *queue; \\
    if (layout != 101 || alpha != 1 || beta != 0 || event) return -1; \\
    for (size_t z = 0; z < count; z++) \\
        name(tb, ta, (int)n, (int)m, (int)k, b + bo + z * sb, (long)ldb, a + ao + z * sa, \\
             (long)lda, c + co + z * sc, (long)ldc); \\
    return 0; \\
}
GEMM(float, S, single)
GEMM(double, D, twice)
"""
)

FAKES: dict[str, tuple[str, Any]] = {
    "cublas": (CUBLAS.replace("FAILS", "0").replace("VERSION", "130100"), Cublas),
    "hipblas": (HIPBLAS, Hipblas),
    "clblast": (CLBLAST, Clblast),
}


class Host:
    """An open device whose memory the fake libraries can touch: the cpu's."""

    def __init__(self) -> None:
        self.real = opened(hal.device("cpu:0"))
        self.device = self.real.device
        self.contexts = 0
        features = SimpleNamespace(features=("fp64",))
        self.backend = SimpleNamespace(
            in_context=self.in_context, memory_object=lambda ptr: (ptr, 0), target=features
        )

    def in_context(self, function: Any, *arguments: Any) -> int:
        self.contexts += 1
        return int(function(*arguments))


@pytest.fixture(scope="module")
def fakes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    if not shutil.which("cc"):
        pytest.skip("needs a C compiler")
    folder = tmp_path_factory.mktemp("blas")
    return {name: library(folder, name, text) for name, (text, _) in FAKES.items()}


@pytest.mark.parametrize("name", FAKES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_vendors_functions_are_called_as_their_headers_say(
    fakes: dict[str, Path], name: str, dtype: str
) -> None:
    host = Host()
    made = FAKES[name][1](host, finding.Library(name, str(fakes[name])))
    assert str(fakes[name]) in made.name
    if name == "cublas":
        assert "13.1" in made.name
    seen = ctypes.CDLL(str(fakes[name]))
    seen.seen_stream.restype = ctypes.c_void_p
    stream = host.device.stream()
    for turned_a in (False, True):
        for turned_b in (False, True):
            a, b = numbers((3, 5, 4), dtype), numbers((3, 4, 6), dtype, 1)
            left = np.ascontiguousarray(a.swapaxes(1, 2)) if turned_a else a
            right = np.ascontiguousarray(b.swapaxes(1, 2)) if turned_b else b
            x, y = ops.asarray(left, stream=stream), ops.asarray(right, stream=stream)
            out = ops.zeros((4, 5, 6), dtype=dtype, stream=stream)
            stream.synchronize()
            product = Product(
                DTYPES[dtype], 5, 6, 4, turned_a, turned_b, left.shape[2], right.shape[2], 6,
                offsets=(30, 0, 0), count=3, steps=(30, 20, 24),
            )  # fmt: skip
            buffers = (out.memory.buffer, x.memory.buffer, y.memory.buffer)
            made.multiply(product, *buffers, stream)
            assert np.allclose(out.numpy()[1:], a @ b, rtol=1e-5, atol=1e-4)
            assert not out.numpy()[0].any()
            assert seen.seen_stream() == stream.handle
    assert seen.seen_calls() >= 4
    if name != "clblast":
        before = seen.seen_destroyed()
        assert host.contexts == 1 + (name == "cublas") + 2 * 4
        del made
        assert seen.seen_destroyed() == before + 1


def test_a_failing_call_is_named(fakes: dict[str, Path], tmp_path: Path) -> None:
    host = Host()
    made = Cublas(host, finding.Library("cublas", str(fakes["cublas"])))  # type: ignore[arg-type]
    x = ops.ones((2, 2), dtype="float16", **CPU)
    buffer = x.memory.buffer
    product = Product(DTYPES["float16"], 2, 2, 2, False, False, 2, 2, 2)
    with pytest.raises(HalError, match=r"CUBLAS_STATUS_NOT_SUPPORTED \(15\)") as caught:
        made.multiply(product, buffer, buffer, buffer, x.stream)
    assert (caught.value.native, caught.value.op) == (15, "matmul")
    for fails, version, words in (("1", "130000", "NOT_INITIALIZED"), ("0", "10020", "older")):
        text = CUBLAS.replace("FAILS", fails).replace("VERSION", version)
        path = library(tmp_path, "old", text)
        with pytest.raises((HalError, Unusable), match=words):
            Cublas(host, finding.Library("cublas", str(path)))  # type: ignore[arg-type]


def test_each_kind_of_device_has_a_place_to_look(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {each.name for each in finding.host()} <= {"openblas", "mkl"}
    assert [each.path for each in finding.cuda()][-3:] == [
        f"libcublas.so.{major}" for major in (13, 12, 11)
    ]
    assert list(finding.hip())
    assert list(finding.opencl())
    assert set(blas._KINDS) == {"cpu", "cuda", "hip", "opencl"}


def test_a_wheels_cublas_is_found_with_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "nvidia" / "cublas" / "lib"
    folder.mkdir(parents=True)
    for name in ("libcublas.so.12", "libcublasLt.so.12", "libnvblas.so.12"):
        (folder / name).touch()
    finding._folders.cache_clear()
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        first = next(iter(finding.cuda()))
    finally:
        finding._folders.cache_clear()
    assert first.path == str(folder / "libcublas.so.12")
    assert first.before == (str(folder / "libcublasLt.so.12"),)
