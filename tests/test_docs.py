"""What the pages say exists: links, commands, variables, files, names, and the example driver."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from drivetrain import hal
from drivetrain.hal import probe, registry

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"`([^`\n]+)`")
COMMAND = re.compile(r"(?<![\w./-])(?:\.venv/bin/)?drivetrain +([^\n#|;]*)")
VARIABLE = re.compile(r"\bDRIVETRAIN_[A-Z]\w*[A-Z]\b")
FOLDERS = "src|tests|tools|benchmarks|docs|examples"


def each_page() -> list[Any]:
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES]


def prose(text: str) -> str:
    return FENCE.sub("", text)


def shell(text: str) -> Iterator[str]:
    """Each line or span of a page in which a command may stand."""
    for language, body in FENCE.findall(text):
        if language in ("", "sh", "bash", "console"):
            yield from body.splitlines()
    yield from SPAN.findall(prose(text))


# -- links ----------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The fragments of a page's headings, as the common renderers make them."""
    found = set()
    for heading in re.findall(r"^#+ (.*)$", prose(page.read_text()), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        found.add(re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-"))
    return found


def broken_links(text: str, folder: Path) -> list[str]:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, fragment = target.partition("#")
        if not path:
            continue  # a heading of the same page: see below
        file = (folder / path).resolve()
        if not file.exists() or (fragment and fragment not in anchors(file)):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", each_page())
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    assert broken_links(page.read_text(), page.parent) == []


@pytest.mark.parametrize("page", each_page())
def test_links_within_a_page_lead_to_a_heading(page: Path) -> None:
    own = re.findall(r"\]\(#([^)]+)\)", prose(page.read_text()))
    assert set(own) <= anchors(page)


def test_a_broken_link_is_noticed() -> None:
    text = "[a](nowhere.md) [b](tour.md#no-such-heading) [c](tour.md#crash-points)"
    assert broken_links(text, ROOT / "docs") == ["nowhere.md", "tour.md#no-such-heading"]


# -- commands -------------------------------------------------------------------------------------


@cache
def the_command() -> Any:
    import typer

    from drivetrain.cli.main import _mount

    return typer.main.get_command(_mount())


def wrong_commands(text: str) -> list[str]:
    """Uses of the command line that it would not understand: (sub)commands and options."""
    wrong = []
    text = re.sub(r"<!-- table:.*?<!-- end -->", "", text, flags=re.S)  # what commands printed
    for line in shell(text):
        for used in COMMAND.findall(line):
            words = used.partition(" -- ")[0].split()
            command = the_command()
            while words and hasattr(command, "commands") and not words[0].startswith("-"):
                name = words.pop(0).rstrip(",")
                if name not in command.commands:
                    wrong.append(f"drivetrain {used}")
                    command = None
                    break
                command = command.commands[name]
            if command is None:
                continue
            known = {"-h", "--help", *(o for p in command.params for o in p.opts)}
            given = [re.match(r"-[\w-]*", w)[0] for w in words if w.startswith("-")]  # type: ignore[index]
            wrong += [f"drivetrain {used}: {option}" for option in given if option not in known]
    return wrong


@pytest.mark.parametrize("page", each_page())
def test_every_command_on_the_page_exists(page: Path) -> None:
    assert wrong_commands(page.read_text()) == []


def test_an_unknown_command_or_option_is_noticed() -> None:
    text = (
        "`drivetrain fly` `drivetrain jobs --json`\n```sh\ndrivetrain drivers trust x --now\n```\n"
    )
    assert wrong_commands(text) == ["drivetrain drivers trust x --now: --now", "drivetrain fly"]


def test_every_command_that_exists_is_on_the_page_of_commands() -> None:
    page = (ROOT / "docs/operations.md").read_text()
    for name, command in the_command().commands.items():
        names = [f"{name} {sub}" for sub in getattr(command, "commands", {})] or [name]
        for each in names:
            assert f"`drivetrain {each}" in page


# -- variables, files, names ----------------------------------------------------------------------


def source(*folders: str) -> str:
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return "\n".join(path.read_text(encoding="utf-8") for path in files)


def test_every_variable_of_the_source_is_documented() -> None:
    used = set(VARIABLE.findall(source("src")))
    assert "DRIVETRAIN_HOME" in used
    assert used - set(VARIABLE.findall((ROOT / "docs/operations.md").read_text())) == set()


def test_every_documented_variable_is_used() -> None:
    documented = set(VARIABLE.findall((ROOT / "docs/operations.md").read_text()))
    assert documented - set(VARIABLE.findall(source("src"))) == set()


@pytest.mark.parametrize("page", each_page())
def test_every_file_that_is_named_exists(page: Path) -> None:
    named = re.findall(rf"`((?:{FOLDERS})/[\w./-]*)`", page.read_text())
    named = [name for name in named if "NAME" not in name]
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("name", ["tour.md", "how_a_move_works.md"])
def test_every_method_that_is_named_exists(name: str) -> None:
    text = source("src")
    named = re.findall(r"`([A-Z]\w+)\.(\w+)[^`]*`", prose((ROOT / "docs" / name).read_text()))
    assert named
    for kind, method in named:
        assert re.search(rf"^class {kind}\b", text, re.MULTILINE), kind
        assert re.search(rf"\b(def {method}\b|{method}\s*[:=])", text), f"{kind}.{method}"


@pytest.mark.parametrize("page", each_page())
def test_no_page_names_a_folder_of_somebodys_machine(page: Path) -> None:
    assert re.findall(r"(?<![\w.])/(?:work|root|home)/\S*", page.read_text()) == []


# -- the picture, the tables, the examples --------------------------------------------------------


def test_the_terminal_picture_shows_the_recorded_text() -> None:
    spec = importlib.util.spec_from_file_location("terminal_svg", ROOT / "tools/terminal_svg.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    recorded = (ROOT / "docs/demo.txt").read_text()
    assert (ROOT / "docs/demo.svg").read_text() == tool.svg(recorded)


def test_the_tables_for_measured_numbers_are_closed_and_named_once() -> None:
    text = (ROOT / "docs/benchmarks.md").read_text()
    marks = re.findall(r"^<!-- (table: \w+|end) -->$", text, re.MULTILINE)
    names = marks[::2]
    assert all(name.startswith("table: ") for name in names)
    assert len(set(names)) == len(names)
    assert marks[1::2] == ["end"] * len(names)


def test_the_script_in_the_readme_is_python_and_short() -> None:
    (script,) = [
        body
        for language, body in FENCE.findall((ROOT / "README.md").read_text())
        if language == "python"
    ]
    compile(script, "README.md", "exec")
    assert len([line for line in script.splitlines() if line]) <= 20


def test_the_code_on_the_page_of_the_hal_runs(tmp_path: Path) -> None:
    blocks = [
        body
        for language, body in FENCE.findall((ROOT / "docs/hal.md").read_text())
        if language == "python"
    ]
    assert len(blocks) >= 5
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks))
    more = {"DRIVETRAIN_HOME": str(tmp_path / "home"), "DRIVETRAIN_CPU_PARTITIONS": "2"}
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env={**os.environ, **more},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "page.py" in done.stdout  # the line that holds memory
    assert (tmp_path / "trace.json").stat().st_size > 0


CHIPS = {
    "a": '{"name": "Toy A", "serial": "1", "memory_bytes": 1024, "used_bytes": 24, '
    '"level": "2", "two_and_two": 4, "temperature_c": 40.0}',
    "b": '{"name": "Toy B", "serial": "2", "memory_bytes": 2048, "used_bytes": 48, '
    '"level": "2", "two_and_two": 5}',
}


@pytest.fixture
def installed_toychip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The driver on the page as an installed package, two chips (one adds wrongly), own state."""
    text = (ROOT / "docs/write_a_driver.md").read_text()
    code, *_ = [body for language, body in FENCE.findall(text) if language == "python"]
    (toml,) = [body for language, body in FENCE.findall(text) if language == "toml"]
    site, chips = tmp_path / "site", tmp_path / "chips"
    metadata = site / "toychip_drivetrain-1.0.dist-info"
    for folder in (metadata, chips):
        folder.mkdir(parents=True)
    (site / "toychip_drivetrain.py").write_text(code)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: toychip\nVersion: 1.0\n")
    entry = re.search(r'^(toychip) = "(.*)"$', toml, re.MULTILINE)
    assert entry is not None
    assert '[project.entry-points."drivetrain.drivers"]' in toml
    (metadata / "entry_points.txt").write_text(f"[drivetrain.drivers]\n{entry[1]} = {entry[2]}\n")
    for name, chip in CHIPS.items():
        (chips / f"{name}.json").write_text(chip)
    monkeypatch.setenv("DRIVETRAIN_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TOYCHIP_FOLDER", str(chips))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(site))
    paths = [str(site), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    registry.refresh()
    yield
    registry.refresh()


@pytest.mark.usefixtures("installed_toychip")
def test_the_driver_on_the_page_is_listed_trusted_and_used() -> None:
    assert (hal.drivers()["toychip"].state, hal.devices("toychip")) == ("unchecked", ())
    registry.trust("toychip")
    assert hal.drivers()["toychip"].state == "usable", hal.drivers()["toychip"].reason
    good, bad = hal.devices("toychip")
    assert [str(good), good.name, good.info.memory_bytes] == ["toychip:0", "Toy A", 1024]
    found = probe.probe([good, bad])
    assert found[good].usable is True
    assert (found[bad].usable, "adds wrongly" in found[bad].reason) == (False, True)
    assert good.telemetry().temperature_c == 40.0
    assert bad.memory().free_bytes == 2000
