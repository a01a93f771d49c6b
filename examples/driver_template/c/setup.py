"""Builds the library beside its three lines of Python."""

from setuptools import Extension, setup

from drivetrain.hal import shared_library

setup(
    ext_modules=[
        Extension(
            "tinychip_drivetrain.libtinychip",
            sources=["tinychip.c"],
            include_dirs=[shared_library.INCLUDE],
            extra_compile_args=["-O2", "-std=gnu11", "-pthread"],
            extra_link_args=["-pthread"],
        )
    ]
)
