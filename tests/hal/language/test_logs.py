"""What compilers say, in the user's lines."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivetrain.hal.language.logs import GENERATED, explain, first_error, with_lines

MAP = (0, 3, 3, 7)


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("user.cu(12): error: no", "user.cu:12: error: no"),
        ("user.cu(12): warning #177-D: unused", "user.cu:12: warning #177-D: unused"),
        ("user.cu(1): catastrophic error: gone", "user.cu:1: catastrophic error: gone"),
        ("user.cu:12:5: error: no", "user.cu:12: error: no"),
        ("user.cu:12:5: fatal error: no", "user.cu:12: fatal error: no"),
        ("<kernel>:12:5: note: here", "user.cu:12: note: here"),
        ("12:5: error: no", "user.cu:12: error: no"),
        ("/tmp/x/tempfile_a1.cl:3:4: error: no", "user.cu:3: error: no"),
        ("/tmp/comgr-1/input/CompileSource:3:4: error: no", "user.cu:3: error: no"),
        (
            "/tmp/comgr-1/include/other.h:3:4: error: no",
            "/tmp/comgr-1/include/other.h:3: error: no",
        ),
        ("include/cuda_fp16.h(99): error: no", "include/cuda_fp16.h:99: error: no"),
        ("other.cu:12:5: error: no", "other.cu:12: error: no"),
        (f"{GENERATED}:4:1: error: no", f"{GENERATED}:4: error: no"),
        ("  p[0] = q;\r\n      ^", "  p[0] = q;\n      ^"),
        ("12 errors were found", "12 errors were found"),
        ("", ""),
    ],
)
def test_places_are_the_users(said: str, shown: str) -> None:
    assert explain(said, "user.cu") == shown.strip()


def test_emitted_lines_are_the_users_where_they_have_one() -> None:
    said = "12:5: error: a\n4:5: error: b\n2:1: error: c\n1:1: error: d\n0:1: error: e"
    assert explain(said, "user.cu", MAP).splitlines() == [
        f"{GENERATED}:12: error: a",
        "user.cu:7: error: b",
        "user.cu:3: error: c",
        f"{GENERATED}:1: error: d",
        f"{GENERATED}:0: error: e",
    ]


def test_a_log_has_an_end() -> None:
    assert len(explain("user.cu(1): error: x\n" * 100_000, "user.cu")) <= 70 << 10


@given(st.text(max_size=300), st.lists(st.integers(0, 50), max_size=5))
def test_anything_is_explained(said: str, lines: list[int]) -> None:
    shown = explain(said, "user.cu", lines)
    assert isinstance(first_error(shown), str)


def test_the_first_error_is_found_behind_warnings() -> None:
    log = "user.cu:1: warning: w\n  code\nuser.cu:2: error: e\nuser.cu:3: error: f"
    assert first_error(log) == "user.cu:2: error: e"
    assert first_error("\n\nonly words\n") == "only words"
    assert first_error("") == ""


def read_back(text: str) -> list[tuple[str, str, int]]:
    """(content, file, line) of each line, as a C compiler counts by ``#line``."""
    out, file, line, continued = [], "", 1, False
    for content in text.split("\n"):
        match = None if continued else re.fullmatch(r'#line (\d+) "(.*)"', content)
        if match:
            line, file = int(match[1]), match[2]
            continue
        out.append((content, file, line))
        line += 1
        continued = content.endswith("\\")
    return out


@given(
    st.lists(
        st.tuples(st.sampled_from(["a", "b();", "", "#define X \\", "  y \\"]), st.integers(0, 9)),
        min_size=1,
        max_size=20,
    )
)
def test_each_line_is_told_as_the_users_or_as_ours(rows: list[tuple[str, int]]) -> None:
    text = "\n".join(content for content, _ in rows)
    lines = [line for _, line in rows]
    found = read_back(with_lines(text, "user.cu", lines))
    assert [content for content, _, _ in found] == [content for content, _ in rows]
    continued = False
    for (content, file, line), wanted in zip(found, lines, strict=True):
        if not continued:  # a continued line cannot be given a number of its own
            assert (file, line) == ("user.cu", wanted) if wanted else file == GENERATED
        continued = content.endswith("\\")


def test_a_real_compiler_tells_the_users_lines(tmp_path: Path) -> None:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    text = "int ours;\nint a = wrong_one;\nint b;\nint c = wrong_two;\nint d = wrong_three;"
    (tmp_path / "x.cc").write_text(with_lines(text, "user.cu", (0, 40, 41, 7, 0)))
    done = subprocess.run(
        [compiler, "-fsyntax-only", "x.cc"],
        cwd=tmp_path,
        env={"LC_ALL": "C", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    errors = [t for t in explain(done.stderr, "user.cu").splitlines() if "error" in t]
    assert [re.match(r"(.*?:\d+): error: .*wrong_\w+", text) is not None for text in errors] == [
        True
    ] * 3
    assert [text.split(": error")[0] for text in errors] == [
        "user.cu:40", "user.cu:7", f"{GENERATED}:5",
    ]  # fmt: skip
