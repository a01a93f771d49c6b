"""From a source to code that a driver loads: the right compiler, and the disk cache in front."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import cast

from drivetrain import __version__
from drivetrain.errors import BadInput
from drivetrain.hal.driver import Target
from drivetrain.hal.language.cache import cache
from drivetrain.hal.language.compilers.rtc_kernels import entry_sizes
from drivetrain.hal.language.facts import Compiled, KernelFacts
from drivetrain.hal.language.options import Options, read_options
from drivetrain.hal.language.source import Source

__all__ = ["compile"]

Build = Callable[[Source, Target, Options], Compiled]
Identity = Callable[[Source, Target], str]

_COMPILERS = {
    ("cuda", "cuda"): "rtc",
    ("cuda", "hip"): "rtc",
    ("cuda", "cpu"): "cxx",
    ("cuda", "opencl"): "opencl",
    ("opencl", "opencl"): "opencl",
    ("triton", "cuda"): "triton",
    ("triton", "hip"): "triton",
}
"""(language, kind of target) -> module of ``compilers``, with two functions:

* ``identity(source, target) -> str``: which compiler would do it, and its version; a part of the
  cache's key. Raises Unsupported, naming the package, where there is none.
* ``build(source, target, options) -> Compiled``: do it, in a child process. Raises CompileError
  with the user's line.
"""


def compile(source: Source, target: Target, *, options: Sequence[str] = ()) -> Compiled:
    """Code for ``target``, from the disk cache where the same was compiled before.

    Raises BadInput for options or a source that the target does not take, CompileError with the
    user's line, Unsupported when the machine has no compiler for it.
    """
    if not isinstance(source, Source):
        raise BadInput(f"a {type(source).__name__} is no source; use hal.Source.cuda(text), ...")
    misfit = source.misfit(target)
    if misfit:
        raise BadInput(f"{source.name}: {misfit}")
    read = read_options(options, source.defines)
    if source.language == "binary":
        return Compiled(source.form, source.data, _told(source))
    own = source.language == "triton" and target.triton is not None
    name = "triton" if own else _COMPILERS[source.language, target.kind]
    compiler = import_module(f"drivetrain.hal.language.compilers.{name}")
    identity = cast(Identity, compiler.identity)(source, target)
    key = _key(source, target, read, identity)
    found = cache().get(key)
    if found is None:
        found = cast(Build, compiler.build)(source, target, read)
        cache().put(key, found)
    return found


def _told(source: Source) -> dict[str, KernelFacts]:
    """The kernels of a binary. PTX tells its own, which must be as the caller says."""
    told = dict(source.kernels)
    sizes = entry_sizes(source.data.decode()) if source.form == "ptx" else {}
    if not sizes:
        return told
    for name, facts in told.items():
        if name not in sizes:
            raise BadInput(
                f"{source.name}: there is no kernel {name!r}; there are {', '.join(sizes)}"
            )
        given = [param.nbytes for param in facts.params or ()]
        if given != sizes[name]:
            raise BadInput(
                f"{source.name}: {name} takes arguments of {sizes[name]} bytes, and types of "
                f"{given} bytes were given"
            )
    return {name: told.get(name, KernelFacts(name, None)) for name in sizes}


@lru_cache(maxsize=1)
def _own_code() -> str:
    """A digest of this room: what it translates anew must not come out of the cache as before."""
    digest = hashlib.sha256()
    room = Path(__file__).parent
    for path in sorted([*room.glob("*.[ph]*"), *room.glob("compilers/*.py")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _key(source: Source, target: Target, options: Options, identity: str) -> str:
    facts = [__version__, _own_code(), identity, asdict(target), asdict(options)]
    words = asdict(source)
    words["data"] = hashlib.sha256(source.data).hexdigest()
    text = json.dumps([*facts, words], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
