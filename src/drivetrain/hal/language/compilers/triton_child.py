"""Triton, in a process of its own: from ``job.json`` and ``kernel.py`` here to ``result.json``.

Run as a script by `triton.py`; it imports nothing of the package. A driver's own stages may.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

_STEERS = ("TRITON_", "AMDGCN_", "NVPTX_", "MLIR_", "LLVM_", "PTXAS_", "DISABLE_", "USE_IR_LOC")
"""Variables that change what Triton makes: none of the caller's, but for the paths of its tools,
since no key of the cache has them."""


def _settle(job: dict[str, Any]) -> None:
    for name in list(os.environ):
        if name.startswith(_STEERS) and not name.endswith("_PATH"):
            del os.environ[name]
    here = str(Path.cwd())
    os.environ["TRITON_HOME"] = here
    os.environ["TRITON_CACHE_DIR"] = str(Path(here) / "triton-cache")
    # Its default changes from one version to the next, and the numbers with it.
    os.environ["TRITON_DEFAULT_FP_FUSION"] = str(int(job["fusion"]))
    os.environ["TRITON_DISABLE_LINE_INFO"] = str(int(not job["lineinfo"]))
    sys.path += [job["site"], *job.get("paths", ())]


def _function(name: str) -> Any:
    """The function of ``kernel.py``: Triton reads its source from the file."""
    spec = importlib.util.spec_from_file_location("kernel", "kernel.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["kernel"] = module
    spec.loader.exec_module(module)
    return getattr(module, name)


def _compile(job: dict[str, Any]) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target = GPUTarget(*job["target"])
    if "form" in job:
        _with_stages(job, target)
    function = _function(job["function"])
    source = ASTSource(
        fn=function, signature=dict(job["signature"]), constexprs=dict(job["constants"])
    )
    made = triton.compile(source, target=target, options=job["options"])
    for form in ("cubin", "hsaco", "ptx", "amdgcn"):
        data = made.asm.get(form) if hasattr(made.asm, "get") else None
        if data is not None:
            Path(f"code.{form}").write_bytes(data.encode() if isinstance(data, str) else data)
    if "form" in job:
        code = made.asm[job["form"]]
        Path("code").write_bytes(code.encode() if isinstance(code, str) else code)
    facts = made.metadata
    return {
        "name": facts.name,
        "shared": facts.shared,
        "num_warps": facts.num_warps,
        "scratch": int(getattr(facts, "global_scratch_size", 0) or 0),
        "version": triton.__version__,
    }


class _NoStages(ImportError):
    """What a driver names as its stages cannot be used."""


def _with_stages(job: dict[str, Any], target: Any) -> None:
    """Puts a driver's stages behind those of Triton's back end for the target."""
    from dataclasses import replace

    from triton.backends import backends

    keys = [key for key, each in backends.items() if each.compiler.supports_target(target)]
    if len(keys) != 1:
        raise _NoStages(f"it has {keys or 'no back end'} for {target.backend!r}")
    form, hook = job["form"], None
    if job["stages"]:
        module, _, name = job["stages"].partition(":")
        try:
            hook = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise _NoStages(f"the driver's stages {job['stages']}: {error}") from error
    compiler: Any = backends[keys[0]].compiler

    class Hooked(compiler):  # type: ignore[misc]
        def __init__(self, target: Any) -> None:
            super().__init__(target)
            self.binary_ext = form

        def add_stages(self, stages: Any, options: Any, *language: Any) -> None:
            super().add_stages(stages, options, *language)
            if hook is not None:
                hook(stages, options)
            if list(stages)[-1:] != [form]:
                raise TypeError(f"the stages end with {list(stages)[-1:]}, not with {form!r}")

    backends[keys[0]] = replace(backends[keys[0]], compiler=Hooked)


def _place(error: BaseException) -> dict[str, Any]:
    """Where in ``kernel.py`` an error lies, and what it says."""
    text = Path("kernel.py").read_text(encoding="utf-8")
    line, said = 0, ""
    seen: BaseException | None = error
    while seen is not None:
        node, source = getattr(seen, "node", None), getattr(seen, "src", None)
        if node is not None and isinstance(source, str):
            # Lines count from the function's own first; the innermost call is the one at fault.
            at = text.find(source.strip())
            line = text.count("\n", 0, at) + node.lineno if at >= 0 else 0
            said = str(getattr(seen, "error_message", None) or "")
        elif not isinstance(getattr(seen, "src", None), str):
            said = str(seen) or type(seen).__name__
            frames = traceback.extract_tb(seen.__traceback__)
            ours = [frame for frame in frames if Path(frame.filename).name == "kernel.py"]
            line = (ours[-1].lineno or line) if ours else line
        seen = seen.__cause__
    compilation = any(kind.__name__ == "CompilationError" for kind in type(error).__mro__)
    kind = type(error).__name__
    return {"line": line, "said": said or str(error), "kind": kind, "compilation": compilation}


def main() -> None:
    job = json.loads(Path("job.json").read_text(encoding="utf-8"))
    _settle(job)
    try:
        result = _compile(job)
    except ImportError as error:
        result = {"unusable": str(error)}
    except Exception as error:
        # What Triton raises has no one class: its own, those of its tools, Python's.
        result = {"error": _place(error)}
        if not result["error"]["compilation"]:
            traceback.print_exc()
    Path("result.new").write_text(json.dumps(result), encoding="utf-8")
    Path("result.new").rename("result.json")


if __name__ == "__main__":
    main()
    sys.stdout.flush()
