"""The one thing that pyproject.toml cannot say: a C extension that an install does without.

``drivetrain.hal._native`` makes the hot calls cheap. Where no compiler or no Python headers are
found the build goes on and the pure-Python twin is used.
"""

from pathlib import Path

from setuptools import Extension, setup

HAL = Path("src/drivetrain/hal")
SOURCES = [str(HAL / name) for name in ("_native.c", "core.c") if (HAL / name).exists()]

extensions = []
if str(HAL / "_native.c") in SOURCES:
    extensions.append(
        Extension(
            "drivetrain.hal._native",
            sources=SOURCES,
            depends=[str(path) for path in sorted(HAL.glob("*.h"))],
            include_dirs=[str(HAL)],
            extra_compile_args=["-O3"],
            optional=True,
        )
    )

setup(ext_modules=extensions)
