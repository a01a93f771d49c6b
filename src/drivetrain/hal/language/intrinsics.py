"""CUDA's built-in functions: for each name its signatures and the word of the preludes for it.

A signature is letters: the result, then the parameters. ``f d`` float and double, ``i u l v`` int,
unsigned, 64-bit int and unsigned 64-bit, ``b`` bool, ``h`` half.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from drivetrain.hal.language.types import (
    BOOL,
    F32,
    F64,
    HALF,
    I32,
    I64,
    U32,
    U64,
    Type,
)

__all__ = ["ATOMICS", "INTRINSICS", "LETTERS", "REFUSED", "SHUFFLES", "VOTES", "Signature"]

LETTERS: dict[str, Type] = {
    "f": F32, "d": F64, "i": I32, "u": U32, "l": I64, "v": U64, "b": BOOL, "h": HALF,
}  # fmt: skip


@dataclass(frozen=True)
class Signature:
    word: str
    """``dt_WORD`` in the preludes."""
    result: Type
    params: tuple[Type, ...]


def _signature(word: str, letters: str) -> Signature:
    kinds = [LETTERS[letter] for letter in letters]
    return Signature(word, kinds[0], tuple(kinds[1:]))


_ONE = """sqrt rsqrt cbrt exp exp2 exp10 expm1 log log2 log10 log1p sin cos tan sinpi cospi asin
acos atan sinh cosh tanh asinh acosh atanh erf erfc tgamma lgamma floor ceil trunc round rint
nearbyint fabs""".split()  # noqa: SIM905
_TWO = "pow atan2 fmod fmin fmax hypot copysign fdim remainder nextafter".split()  # noqa: SIM905
_BARE = {"rsqrt", "exp10", "sinpi", "cospi"}


def _all() -> Iterator[tuple[str, Signature]]:
    for stem in _ONE:
        single = _signature(f"{stem}_f32", "ff")
        yield f"{stem}f", single
        yield stem, single
        yield stem, _signature(f"{stem}_f64", "dd")
    for stem in _TWO:
        single = _signature(f"{stem}_f32", "fff")
        yield f"{stem}f", single
        yield stem, single
        yield stem, _signature(f"{stem}_f64", "ddd")
    for name, word in (("fmaf", "fma_f32"), ("__fmaf_rn", "fma_f32"), ("fma", "fma_f32")):
        yield name, _signature(word, "ffff")
    yield "fma", _signature("fma_f64", "dddd")
    yield "__fma_rn", _signature("fma_f64", "dddd")
    # The fast versions promise less than the plain ones, so the plain ones do.
    for fast, stem in (
        ("__expf", "exp"), ("__exp10f", "exp10"), ("__logf", "log"), ("__log2f", "log2"),
        ("__log10f", "log10"), ("__sinf", "sin"), ("__cosf", "cos"), ("__tanf", "tan"),
        ("__fsqrt_rn", "sqrt"), ("__frsqrt_rn", "rsqrt"),
    ):  # fmt: skip
        yield fast, _signature(f"{stem}_f32", "ff")
    yield "__powf", _signature("pow_f32", "fff")
    for name, word in (
        ("__fdividef", "fdiv_f32"), ("fdividef", "fdiv_f32"), ("__fdiv_rn", "fdiv_f32"),
        ("__fadd_rn", "fadd_f32"), ("__fsub_rn", "fsub_f32"), ("__fmul_rn", "fmul_f32"),
    ):  # fmt: skip
        yield name, _signature(word, "fff")
    yield "__frcp_rn", _signature("frcp_f32", "ff")
    yield "__saturatef", _signature("saturate_f32", "ff")
    yield "ldexpf", _signature("ldexp_f32", "ffi")
    yield "ldexp", _signature("ldexp_f32", "ffi")
    yield "ldexp", _signature("ldexp_f64", "ddi")
    for name in ("isnan", "isinf", "isfinite", "signbit"):
        yield name, _signature(f"{name}_f32", "bf")
        yield name, _signature(f"{name}_f64", "bd")
    for name in ("min", "max"):
        for letter, word in zip("iulvfd", ("i32", "u32", "i64", "u64", "f32", "f64"), strict=True):
            stem = f"f{name}" if letter in "fd" else name
            yield name, _signature(f"{stem}_{word}", letter * 3)
        for prefix, letter, word in (("u", "u", "u32"), ("ll", "l", "i64"), ("ull", "v", "u64")):
            yield prefix + name, _signature(f"{name}_{word}", letter * 3)
    yield "abs", _signature("abs_i32", "ii")
    yield "abs", _signature("abs_i64", "ll")
    yield "abs", _signature("fabs_f32", "ff")
    yield "abs", _signature("fabs_f64", "dd")
    yield "llabs", _signature("abs_i64", "ll")
    yield "labs", _signature("abs_i64", "ll")
    for name, letters in (
        ("__popc", "iu"), ("__popcll", "iv"), ("__clz", "ii"), ("__clzll", "il"), ("__ffs", "ii"),
        ("__ffsll", "il"), ("__brev", "uu"), ("__brevll", "vv"), ("__mulhi", "iii"),
        ("__umulhi", "uuu"), ("__mul64hi", "lll"), ("__umul64hi", "vvv"), ("__mul24", "iii"),
        ("__umul24", "uuu"), ("__sad", "uiiu"), ("__usad", "uuuu"), ("__byte_perm", "uuuu"),
        ("__funnelshift_l", "uuuu"), ("__funnelshift_r", "uuuu"), ("__funnelshift_lc", "uuuu"),
        ("__funnelshift_rc", "uuuu"), ("__hadd", "iii"), ("__rhadd", "iii"),
        ("__uhadd", "uuu"), ("__urhadd", "uuu"),
        ("__float_as_int", "if"), ("__float_as_uint", "uf"), ("__int_as_float", "fi"),
        ("__uint_as_float", "fu"), ("__double_as_longlong", "ld"), ("__longlong_as_double", "dl"),
        ("__float2int_rn", "if"), ("__float2int_rz", "if"), ("__float2int_rd", "if"),
        ("__float2int_ru", "if"), ("__float2uint_rn", "uf"), ("__float2uint_rz", "uf"),
        ("__float2ll_rn", "lf"), ("__float2ll_rz", "lf"), ("__int2float_rn", "fi"),
        ("__uint2float_rn", "fu"), ("__ll2float_rn", "fl"), ("__double2int_rz", "id"),
        ("__double2int_rn", "id"), ("__double2float_rn", "fd"), ("__half2float", "fh"),
        ("__float2half", "hf"), ("__float2half_rn", "hf"),
    ):  # fmt: skip
        word = name.strip("_").replace("float2half_rn", "float2half")
        yield name, _signature(word, letters)
    for name, word, letters in (
        ("lrintf", "float2ll_rn", "lf"), ("llrintf", "float2ll_rn", "lf"),
        ("__ldg", "", ""),
    ):  # fmt: skip
        if word:
            yield name, _signature(word, letters)


def _table() -> dict[str, list[Signature]]:
    made: dict[str, list[Signature]] = {}
    for name, signature in _all():
        made.setdefault(name, []).append(signature)
    return made


INTRINSICS = _table()

ATOMICS = {
    "atomicAdd": "iuvfd", "atomicSub": "iu", "atomicMin": "iulv", "atomicMax": "iulv",
    "atomicExch": "iuvf", "atomicAnd": "iuv", "atomicOr": "iuv", "atomicXor": "iuv",
    "atomicCAS": "iuv", "atomicInc": "u", "atomicDec": "u",
}  # fmt: skip
"""What each takes, as letters. The variants ``_block`` and ``_system`` are the same here."""

SHUFFLES = {
    "__shfl_sync": "idx", "__shfl_up_sync": "up", "__shfl_down_sync": "down",
    "__shfl_xor_sync": "xor",
}  # fmt: skip
VOTES = {"__ballot_sync": "ballot", "__any_sync": "any", "__all_sync": "all"}

REFUSED = {
    "printf": "printf is not part of the subset: write to a buffer",
    "assert": "assert is not part of the subset: write a flag to a buffer",
    "malloc": "memory cannot be allocated in a kernel",
    "free": "memory cannot be freed in a kernel",
    "__activemask": "which threads are active is not known here: use a full mask",
    "__nanosleep": "a kernel cannot sleep",
    "clock": "a kernel has no clock here",
    "clock64": "a kernel has no clock here",
    "__syncthreads_count": "use __syncthreads and an atomic",
    "__syncthreads_and": "use __syncthreads and an atomic",
    "__syncthreads_or": "use __syncthreads and an atomic",
    "__shfl": "the shuffle without _sync is not part of the subset: use __shfl_sync",
    "__shfl_down": "the shuffle without _sync is not part of the subset: use __shfl_down_sync",
    "__shfl_up": "the shuffle without _sync is not part of the subset: use __shfl_up_sync",
    "__shfl_xor": "the shuffle without _sync is not part of the subset: use __shfl_xor_sync",
    "__ballot": "use __ballot_sync",
    "__any": "use __any_sync",
    "__all": "use __all_sync",
}
"""Known names that no target here can express, and what to do."""
