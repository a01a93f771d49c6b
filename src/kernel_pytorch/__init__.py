"""The API of the published Hardware Abstraction Guide, on top of Drivetrain.

Code written against the guide runs as printed. Each name is a thin layer over a name of Drivetrain,
which new code uses directly: the table is in ``docs/kernel_pytorch.md``. Importing this package
imports neither torch nor a vendor's library.
"""

from drivetrain import __version__ as __version__
