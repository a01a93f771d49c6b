"""Hypothesis: the same examples in every run; ``make soak`` draws others, and ten times as many.

The machines that run these tests are shared, so single examples have no deadline.
"""

from __future__ import annotations

import pytest
from hypothesis import settings

settings.register_profile("fixed", deadline=None, max_examples=60, derandomize=True)
settings.register_profile("soak", deadline=None, max_examples=600)


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--hypothesis-profile"):
        settings.load_profile("fixed")
