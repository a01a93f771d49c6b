"""`ProprietaryTritonBackend`: kernels for an architecture, from Triton or CUDA C text."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping

from drivetrain.errors import BadInput, CompileError
from drivetrain.hal.language.source import Source
from kernel_pytorch._kept import kept
from kernel_pytorch.hardware_abstraction.compiled import (
    CompiledKernel,
    compile_for,
    target_named,
)

__all__ = ["ProprietaryTritonBackend", "triton_source"]

_MOST_VARIANTS = 1000
_HEAD = (
    "from __future__ import annotations",
    "import triton",
    "import triton.language as tl",
)
_TYPE = re.compile(r"\*{0,2}(i1|[iu](8|16|32|64)|fp(16|32|64)|bf16|fp8\w+)", re.ASCII)


class ProprietaryTritonBackend:
    """A compiler for one architecture; kept for the guide. Now: `drivetrain.hal.Source.triton`,
    `drivetrain.hal.Variants` and ``Device.compile``.

    ``target_arch`` is ``sm_90``, ``gfx942``, ``cpu`` or a device's address; Triton itself has
    compilers for the first two. ``optimization_level`` 0 to 3: how much CUDA C is optimised; of
    Triton the depth of the pipeline of loops, at 0 also without fused multiply-adds.
    """

    def __init__(self, target_arch: str, optimization_level: int = 3) -> None:
        kept("kernel_pytorch.ProprietaryTritonBackend", "drivetrain.hal.Source.triton and Variants")
        if optimization_level not in (0, 1, 2, 3):
            raise BadInput(f"optimization_level is {optimization_level!r}; give 0 to 3")
        self.target = target_named(target_arch)
        self.target_arch = target_arch
        self.optimization_level = optimization_level
        self.variants: dict[str, str] = {}
        """Name -> text, as registered."""
        self._compiled: dict[str, CompiledKernel] = {}

    def compile_triton_kernel(
        self,
        kernel_code: str,
        *,
        signature: Mapping[str, str] | None = None,
        constants: Mapping[str, int | float | bool | str | None] | None = None,
    ) -> CompiledKernel:
        """Compile Triton text (one function, ``@triton.jit`` or not), or CUDA C text.

        Triton wants each parameter's type. It is read from ``signature``, else from an annotation
        such as ``x: "*fp32"``; else a name that ends in ``_ptr`` is ``*fp32``, and any other
        ``i32``. A parameter annotated ``tl.constexpr`` takes its value from ``constants``, else
        its default. Raises BadInput for what is no kernel, CompileError with the line, Unsupported
        where the compiler is not installed or the architecture has none.
        """
        if not isinstance(kernel_code, str):
            raise BadInput(f"the kernel is a {type(kernel_code).__name__}; give its text")
        if "__global__" in kernel_code:
            level = f"-O{self.optimization_level}"
            return compile_for(Source.cuda(kernel_code), self.target_arch, (level,))
        source = triton_source(
            kernel_code, signature or {}, constants or {}, max(1, self.optimization_level)
        )
        options = () if self.optimization_level else ("--fmad=false",)
        return compile_for(source, self.target_arch, options)

    def register_kernel_variants(self, kernels: Mapping[str, str]) -> None:
        """Keep several texts of one kernel by name; `variant` compiles one when it is first asked
        for. Raises BadInput, and keeps none, for a name that is taken or a text that is none."""
        if not isinstance(kernels, Mapping) or not kernels:
            raise BadInput("give the variants as a dict of names and texts")
        if len(self.variants) + len(kernels) > _MOST_VARIANTS:
            raise BadInput(f"more than {_MOST_VARIANTS} variants")
        for name, text in kernels.items():
            if not isinstance(name, str) or not isinstance(text, str) or not text.strip():
                raise BadInput(f"the variant {name!r} is no name with a text")
            if self.variants.get(name, text) != text:
                raise BadInput(f"there is a variant {name!r} already, with another text")
        self.variants.update(kernels)

    def variant(self, name: str) -> CompiledKernel:
        """The compiled variant of that name. Raises as `compile_triton_kernel` does."""
        if name not in self.variants:
            there = ", ".join(self.variants) or "none"
            raise BadInput(f"there is no variant {name!r}; there are: {there}")
        if name not in self._compiled:
            self._compiled[name] = self.compile_triton_kernel(self.variants[name])
        return self._compiled[name]


def triton_source(
    text: str,
    signature: Mapping[str, str],
    constants: Mapping[str, int | float | bool | str | None],
    num_stages: int = 3,
) -> Source:
    """A `Source` of one Triton function's text; nothing of it is run. Raises BadInput,
    CompileError."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None) or 1
        raise CompileError(f"line {line}: not valid Python: {error}", log=str(error)) from error
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    jitted = [node for node in functions if _is_jitted(node)]
    chosen = jitted or functions
    if len(chosen) != 1:
        raise BadInput(
            f"the text has {len(chosen)} kernels; give one function, decorated by triton.jit"
        )
    (kernel,) = chosen
    if kernel.args.vararg or kernel.args.kwarg:
        raise BadInput(f"{kernel.name}: a kernel takes no *args and no **kwargs")
    types, values = _parameters(kernel, signature, constants)
    module, lines = _standing_alone(text, kernel)
    return Source(
        "triton",
        kernel.name,
        module,
        form=kernel.name,
        signature=tuple(types.items()),
        constants=tuple(values.items()),
        num_warps=4,
        num_stages=num_stages,
        lines=lines,
    )


def _is_jitted(node: ast.FunctionDef) -> bool:
    return any("jit" in ast.unparse(each) for each in node.decorator_list)


def _standing_alone(text: str, kernel: ast.FunctionDef) -> tuple[str, tuple[int, ...]]:
    """The text as a module of its own, and the user's line of each of its lines (0: ours)."""
    out = [(line, 0) for line in _HEAD]
    first = min([kernel.lineno, *(node.lineno for node in kernel.decorator_list)])
    for number, line in enumerate(text.splitlines(), 1):
        if number == first and not _is_jitted(kernel):
            out.append(("@triton.jit", 0))
        out.append(("" if line.startswith("from __future__") else line, number))
    return "".join(f"{line}\n" for line, _ in out), tuple(number for _, number in out)


def _parameters(
    kernel: ast.FunctionDef,
    signature: Mapping[str, str],
    constants: Mapping[str, int | float | bool | str | None],
) -> tuple[dict[str, str], dict[str, int | float | bool | str | None]]:
    arguments = [*kernel.args.posonlyargs, *kernel.args.args]
    defaults = dict(zip([a.arg for a in arguments[::-1]], kernel.args.defaults[::-1], strict=False))
    arguments += kernel.args.kwonlyargs
    defaults |= {
        a.arg: d
        for a, d in zip(kernel.args.kwonlyargs, kernel.args.kw_defaults, strict=True)
        if d is not None
    }
    types: dict[str, str] = {}
    values: dict[str, int | float | bool | str | None] = {}
    for each in arguments:
        name, told = each.arg, each.annotation
        if name in constants or (told is not None and "constexpr" in ast.unparse(told)):
            types[name] = "constexpr"
            if name in constants:
                values[name] = constants[name]
                continue
            default = defaults.get(name)
            if not isinstance(default, ast.Constant):
                raise BadInput(
                    f"{kernel.name}: the constant {name!r} has no value: give it in constants=, or "
                    f"write {name}: tl.constexpr = 1024"
                )
            values[name] = default.value  # type: ignore[assignment]
        elif name in signature:
            types[name] = signature[name]
        elif isinstance(told, ast.Constant) and isinstance(told.value, str):
            types[name] = told.value
        else:
            types[name] = "*fp32" if name.endswith("_ptr") else "i32"
        if types[name] != "constexpr" and not _TYPE.fullmatch(types[name]):
            raise BadInput(f"{kernel.name}: {types[name]!r} is no type of Triton's, such as *fp32")
    strange = {*signature, *constants} - {each.arg for each in arguments}
    if strange:
        raise BadInput(f"{kernel.name} has no parameter {', '.join(sorted(strange))}")
    return types, values
