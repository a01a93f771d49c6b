"""One kernel source for every device: CUDA C, translated where a device does not take it."""

from drivetrain.hal.language.compiling import compile

__all__ = ["compile"]
