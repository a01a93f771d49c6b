"""The code on the page of custom devices runs as printed; the table of failures is the judge's."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/custom_devices.md").read_text(encoding="utf-8")


def test_the_code_on_the_page_runs(tmp_path: Path) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "DRIVETRAIN_HOME": str(tmp_path / "home")},
    )
    assert done.returncode == 0, done.stderr
    assert "left my_chip" in done.stdout


def test_every_expected_failure_is_on_the_page() -> None:
    expected = json.loads((ROOT / "tools/judge/expected.json").read_text(encoding="utf-8"))
    assert expected
    for key, why in expected.items():
        assert f"`{key.split('/')[1]}`" in PAGE
        assert why in PAGE
