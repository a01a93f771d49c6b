"""Draw recorded terminal output as an SVG picture.

    python tools/terminal_svg.py docs/demo.txt docs/demo.svg

The picture follows from the text alone, so a test can tell when it is stale. Of progress lines that
follow each other the first and the last are drawn, with `...` for those between.
"""

from __future__ import annotations

import re
import sys
from html import escape
from pathlib import Path

FONT_PX, LINE_PX, COLUMN_PX = 13, 18, 7.8
MARGIN_PX, BAR_PX = 16, 34
BACKGROUND, BAR, LIGHTS = "#16191f", "#22262e", ("#e0605a", "#e0b34f", "#68b860")
TEXT, COMMAND, EVENT = "#d5d8de", "#8fd18f", "#7fb2ea"
FONTS = "ui-monospace, &quot;DejaVu Sans Mono&quot;, Menlo, Consolas, monospace"
EVENTS = ("move ", "SIGKILL ", "went on ", "at step ", "done: ", "stopped ")
PROGRESS = re.compile(r"\s+\S+\s+step\s+\d+/\d+")


def folded(lines: list[str]) -> list[str]:
    """The lines with long runs of progress cut to their first and last."""
    runs: list[list[str]] = []
    for line in lines:
        if runs and PROGRESS.match(line) and PROGRESS.match(runs[-1][-1]):
            runs[-1].append(line)
        else:
            runs.append([line])
    return [line for run in runs for line in (run if len(run) < 4 else [run[0], "  ...", run[-1]])]


def svg(text: str, command: str = "drivetrain demo") -> str:
    """The picture of what ``command`` wrote; events (a move, a kill, an end) stand out."""
    lines = [f"$ {command}", *folded(text.expandtabs().rstrip("\n").split("\n"))]
    width = round(2 * MARGIN_PX + COLUMN_PX * max(len(line) for line in lines))
    height = BAR_PX + 2 * MARGIN_PX + LINE_PX * len(lines)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img">',
        f"<title>{escape(command)} in a terminal</title>",
        f'<rect width="{width}" height="{height}" rx="8" fill="{BACKGROUND}"/>',
        f'<rect width="{width}" height="{BAR_PX}" rx="8" fill="{BAR}"/>',
    ]
    for i, colour in enumerate(LIGHTS):
        x, y = MARGIN_PX + 4 + 20 * i, BAR_PX // 2
        parts.append(f'<circle cx="{x}" cy="{y}" r="5.5" fill="{colour}"/>')
    parts.append(f'<g font-family="{FONTS}" font-size="{FONT_PX}" fill="{TEXT}">')
    for number, line in enumerate(lines):
        words = line.strip()
        if not words:
            continue
        colour = COMMAND if number == 0 else EVENT if words.startswith(EVENTS) else ""
        x = MARGIN_PX + COLUMN_PX * (len(line) - len(line.lstrip()))
        y = BAR_PX + MARGIN_PX + LINE_PX * number + FONT_PX
        parts.append(
            f'<text x="{x:.1f}" y="{y}" textLength="{COLUMN_PX * len(words):.1f}" '
            + (f'fill="{colour}" ' if colour else "")
            + f'xml:space="preserve">{escape(words)}</text>'
        )
    parts += ["</g>", "</svg>", ""]
    return "\n".join(parts)


def main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    source, target = map(Path, arguments)
    target.write_text(svg(source.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
