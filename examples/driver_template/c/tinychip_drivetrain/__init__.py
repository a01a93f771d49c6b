"""All the Python that a driver in C needs: where its library lies."""

from pathlib import Path

from drivetrain.hal import shared_library

(_LIBRARY,) = Path(__file__).parent.glob("libtinychip*.so")
DRIVER = shared_library.driver(_LIBRARY)
