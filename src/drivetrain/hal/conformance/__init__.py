"""The conformance kit: named checks that every driver must pass, run where it can do no harm.

``drivetrain conformance NAME`` runs all that the driver declares. Authors of drivers outside
Drivetrain can also run each check as a test of their own: see `pytest_plugin`.

A backend may offer three things for the kit alone: ``inject(text)``, which makes a later call fail
(see ``drivetrain.hal.drivers.simulated``), ``handles()``, how many streams, events and the like it
holds by name, and ``checks_addresses = True`` when freeing what is not allocated is a HalError.
"""

from drivetrain.hal.conformance.check import Check, Failed
from drivetrain.hal.conformance.report import Report, Result
from drivetrain.hal.conformance.running import run

__all__ = ["Check", "Failed", "Report", "Result", "run"]
