"""The states of the random number generators: Python's, numpy's, torch's and the device's."""

from __future__ import annotations

import base64
import random
import sys
import zlib
from array import array
from typing import Any

import torch

from drivetrain.errors import BadInput
from drivetrain.pytorch import tree


def capture(device: torch.device | None, carried: dict[str, Any] | None = None) -> dict[str, Any]:
    """The states as a typed tree. ``carried``: states of device types that this process is not on,
    handed on unchanged, so that a job that comes back to a GPU goes on with the GPU's numbers."""
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {
        "python": [version, _text(array("I", words).tobytes()), tree.encode(gauss, "rng", None)],
        "torch": _text(_bytes(torch.get_rng_state())),
        "devices": dict(carried or {}),
    }
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        state["numpy"] = tree.encode(numpy.random.get_state(legacy=False), "rng.numpy", None)
    if device is not None and device.type != "cpu":
        here = torch.get_device_module(device).get_rng_state(device)
        state["devices"][device.type] = _text(_bytes(here))
    return state


def restore(state: Any, device: torch.device | None) -> dict[str, Any]:
    """Puts the states back; returns those of other device types, to be carried.

    On a device type that the states do not know, its generator is seeded from torch's state, so
    that it depends on the state alone.
    """
    try:
        version, words, gauss = state["python"]
        python = (version, tuple(array("I", _data(words))), tree.decode(gauss, {}))
        host = _tensor(state["torch"])
        devices = dict(state["devices"])
        random.setstate(python)
        torch.set_rng_state(host)
        if "numpy" in state:
            import numpy as np

            np.random.set_state(tree.decode(state["numpy"], {}))
        if device is not None and device.type != "cpu":
            module = torch.get_device_module(device)
            here = devices.pop(device.type, None)
            if here is None:
                module.manual_seed(zlib.crc32(_data(state["torch"])))
            else:
                module.set_rng_state(_tensor(here), device)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise BadInput(f"this is no state of the random number generators: {error}") from error
    return devices


def capture_generator(generator: torch.Generator) -> str:
    return _text(_bytes(generator.get_state()))


def restore_generator(generator: torch.Generator, state: str) -> None:
    generator.set_state(_tensor(state))


def is_generator(value: object) -> bool:
    """True for a generator of torch's, numpy's or Python's."""
    numpy = sys.modules.get("numpy")
    if isinstance(value, torch.Generator) or type(value) is random.Random:
        return True
    return numpy is not None and isinstance(
        value, (numpy.random.Generator, numpy.random.RandomState)
    )


def generator_state(value: object) -> Any:
    """The state, as a tree, of a generator of torch's, numpy's or Python's; None for others."""
    numpy = sys.modules.get("numpy")
    if isinstance(value, torch.Generator):
        return [value.device.type, capture_generator(value)]
    if type(value) is random.Random:
        return ["python", tree.encode(value.getstate(), "generator", None)]
    if numpy is not None and isinstance(value, numpy.random.Generator):
        return ["numpy", tree.encode(value.bit_generator.state, "generator", None)]
    if numpy is not None and isinstance(value, numpy.random.RandomState):
        return ["numpy", tree.encode(value.get_state(legacy=False), "generator", None)]
    return None


def restore_generator_of(value: Any, body: Any) -> None:
    """What ``generator_state`` gave, back into such a generator."""
    kind, state = body
    if isinstance(value, torch.Generator):
        if kind == value.device.type:  # another type's numbers cannot be continued
            restore_generator(value, state)
    elif isinstance(value, random.Random):
        value.setstate(tree.decode(state, {}))
    elif hasattr(value, "bit_generator"):
        value.bit_generator.state = tree.decode(state, {})
    else:
        value.set_state(tree.decode(state, {}))


def _bytes(state: torch.Tensor) -> bytes:
    return state.numpy().tobytes() if "numpy" in sys.modules else bytes(state.tolist())


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _data(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(_data(text)), dtype=torch.uint8)
