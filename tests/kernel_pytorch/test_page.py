"""The page on the published API: its code runs, and its table has every name."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from .conftest import LIMIT, Script

pytestmark = LIMIT

PAGE = (Path(__file__).resolve().parents[2] / "docs/kernel_pytorch.md").read_text()
NAMES = """
    print("--")
    import inspect
    import kernel_pytorch.hardware_abstraction as home
    from kernel_pytorch.distributed_scale import HardwareAdapter

    for name in home.__all__:
        print(name)
    public = [HardwareAdapter, home.HardwareAbstractionLayer]
    public += [home.VendorAdapter, home.ProprietaryTritonBackend, home.HardwarePluginManager]
    for kind in public:
        for name, value in vars(kind).items():
            if inspect.isfunction(value) and not name.startswith("_"):
                print(f".{name}")
"""


def test_the_code_on_the_page_runs_and_its_table_has_every_public_name(script: Script) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    shown, _, listed = script("\n".join([*blocks, textwrap.dedent(NAMES)])).stdout.partition("--")
    assert "cpu:0" in shown
    names = set(listed.split()) - {"CompiledKernel", "DeviceMesh", ".variant"}
    assert {"HardwareAbstractionLayer", ".compile_kernel", ".get_hal"} <= names
    table = PAGE[PAGE.index("## Every name") : PAGE.index("## What fits")]
    assert {name for name in names if name not in table} == set()
