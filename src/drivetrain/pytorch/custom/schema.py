"""What an operation's schema says about its arguments, read once an operation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Plan:
    """An overload, prepared for running it elsewhere."""

    op: Any
    name: str
    """``aten::add.Tensor``; ``default`` is said."""
    returns: tuple[tuple[int, str] | None, ...]
    """For each result: the argument that it is (in-place, out), None for a new one."""
    is_view: bool
    """A result shares memory with an argument that is not written."""
    written: tuple[tuple[int, str], ...]
    generator: bool
    """It takes a ``generator``."""
    random: bool
    """It draws random numbers."""
    tensors: tuple[bool, ...]
    """Which arguments are a Tensor or none."""
    plain: bool
    """Every argument that can hold tensors is one, nothing is written or drawn, no argument is a
    device, and each result is a new tensor without conj or neg bits."""
    bits: bool
    """Tensors may come with conj or neg bits, or as autograd's zeros."""
    mixes: bool
    """Tensors of the CPU may come beside tensors of the device (indices)."""


def words(text: str) -> list[str]:
    """A list of names, written as a text."""
    return text.split()


_MIXING = frozenset(
    words(
        """
    aten::index aten::index_put_ aten::_index_put_impl_ aten::index_put aten::_unsafe_index
    aten::_unsafe_index_put
    """
    )
)
_WRITES_UNSAID = frozenset(words("aten::native_batch_norm aten::batch_norm_update_stats"))
"""They write the running statistics that they are given, and their schemas do not say so."""
_MAY_RETURN_BITS = ("linalg", "fft")
_plans: dict[Any, Plan] = {}


def plan_of(op: Any) -> Plan:
    found = _plans.get(op)
    if found is None:
        found = _plans[op] = _read(op)
    return found


def overload(name: str) -> Any:
    """The overload object of ``aten::add.Tensor``; None when this torch has none."""
    namespace, _, rest = name.partition("::")
    packet, _, which = rest.partition(".")
    try:
        return getattr(getattr(getattr(torch.ops, namespace), packet), which or "default")
    except AttributeError:
        return None


def _read(op: Any) -> Plan:
    schema = op._schema
    name = str(schema.name)
    arguments = schema.arguments
    returns: list[tuple[int, str] | None] = []
    is_view = False
    for result in schema.returns:
        alias, place = result.alias_info, None
        if alias is not None:
            is_view = is_view or not alias.is_write
            for position, argument in enumerate(arguments):
                given = argument.alias_info
                if given is not None and given.before_set & alias.before_set:
                    place = (position, argument.name)
                    break
        returns.append(place)
    written = tuple(
        (position, argument.name)
        for position, argument in enumerate(arguments)
        if (argument.alias_info is not None and argument.alias_info.is_write)
        or (name in _WRITES_UNSAID and argument.name in ("running_mean", "running_var"))
    )
    types = [str(argument.type) for argument in arguments]
    tensors = tuple(each in ("Tensor", "Optional[Tensor]") for each in types)
    generator = any(argument.name == "generator" for argument in arguments)
    random = torch.Tag.nondeterministic_seeded in op.tags
    new = all(str(r.type) == "Tensor" and r.alias_info is None for r in schema.returns)
    lists = any("Tensor" in each and not one for each, one in zip(types, tensors, strict=True))
    elsewhere = any(argument.name in ("device", "names") for argument in arguments)
    keys = ("Conjugate", "Negative", "ZeroTensor")
    registered = f"{name}.{schema.overload_name}" if schema.overload_name else name
    return Plan(
        op=op,
        name=f"{name}.{schema.overload_name or 'default'}",
        returns=tuple(returns),
        is_view=is_view,
        written=written,
        generator=generator,
        random=random,
        tensors=tensors,
        plain=new
        and bool(schema.returns)
        and any(tensors)
        and not (written or generator or random or lists or elsewhere)
        and not any(word in name for word in _MAY_RETURN_BITS),
        bits=any(torch._C._dispatch_has_kernel_for_dispatch_key(registered, key) for key in keys),
        mixes=name in _MIXING,
    )


def argument_at(place: tuple[int, str], args: Any, kwargs: dict[str, Any]) -> Any:
    position, name = place
    return args[position] if position < len(args) else kwargs.get(name)
