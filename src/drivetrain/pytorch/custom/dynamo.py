"""``torch.compile`` on the device: a backend's ``compile_graph`` is a backend of Dynamo's.

``torch.compile(model, backend=NAME)`` gives each graph to ``compile_graph(gm, example_inputs)``:
``gm`` a `torch.fx.GraphModule` of torch's operations, the inputs fake or real tensors of the
device, the result a callable of the same inputs that gives a list or tuple of the outputs. It may
give ``gm.forward`` back for what it does not compile. With autograd, ``aot`` gives it forward and
backward as graphs of aten operations. The eager backends of torch need nothing of this.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from drivetrain.errors import CompileError
from drivetrain.pytorch.custom.runtime import Runtime


def register(runtime: Runtime) -> None:
    """For a backend that has ``compile_graph``; importing Dynamo takes a second or two."""
    backend = runtime.backends[0]
    if not callable(getattr(backend, "compile_graph", None)):
        return
    from torch._dynamo import register_backend
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch import aot_autograd as parts

    boxes: Any = parts
    compiled = _compiled(runtime, backend)

    def boxed(gm: Any, inputs: Any) -> Any:
        return boxes.make_boxed_func(compiled(gm, inputs))

    name_it: Any = register_backend
    # Forward and backward apart: a graph that needs gradients is two graphs of plain operations.
    name_it(compiler_fn=aot_autograd(fw_compiler=boxed, bw_compiler=boxed), name=runtime.name)


def _compiled(runtime: Runtime, backend: Any) -> Callable[[Any, Any], Callable[..., Any]]:
    def compiled(gm: Any, inputs: Any) -> Callable[..., Any]:
        made: Callable[..., Any] = backend.compile_graph(gm, inputs)
        if not callable(made):
            raise CompileError(
                f"compile_graph of {runtime.name} gave {made!r} for a graph of "
                f"{len(gm.graph.nodes)} nodes; give a function, or gm.forward to leave it"
            )
        return made

    return compiled
