"""Closing a device: all that can be given back is, whatever fails of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from drivetrain.errors import HalError


class GivingBack:
    """Calls one thing after another and keeps what fails; `end` raises the first failure."""

    def __init__(self) -> None:
        self._failures: list[HalError] = []

    def __call__(self, function: Callable[..., object], *arguments: Any) -> None:
        try:
            function(*arguments)
        except HalError as error:
            self._failures.append(error)

    def end(self) -> None:
        if self._failures:
            raise self._failures[0]
