"""The one thing that pyproject.toml cannot say: C extensions that an install does without.

Each ``src/drivetrain/hal/_NAME.c`` is the Python side of what the C files without an underscore
do; those know no Python. Where no compiler or no Python headers are found the build goes on, and
the pure-Python twins are used.
"""

from pathlib import Path

from setuptools import Extension, setup

HAL = Path("src/drivetrain/hal")
FREE_OF_PYTHON = [str(path) for path in sorted(HAL.glob("[!_]*.c"))]

setup(
    ext_modules=[
        Extension(
            f"drivetrain.hal.{path.stem}",
            sources=[str(path), *FREE_OF_PYTHON],
            depends=[str(path) for path in sorted(HAL.glob("*.h"))],
            include_dirs=[str(HAL)],
            extra_compile_args=["-O3", "-std=gnu11", "-pthread"],
            extra_link_args=["-pthread"],
            optional=True,
        )
        for path in sorted(HAL.glob("_*.c"))
    ]
)
