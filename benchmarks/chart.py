"""The chart of the front page: accuracy lost and speed gained, ours beside plain quantisation."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

PLACE = Path(__file__).parents[1] / "docs" / "images" / "speed-accuracy.svg"
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 440, 70, 250, 64, 96
TICKS = (0, 1, 3, 10, 30, 100)  # percent more perplexity
MOST = 120.0
FASTEST = 50.0  # tokens a second
OURS, OTHERS = "#0969da", "#57606a"


def chart(read: Callable[[str], dict[str, Any]]) -> str:
    """Return the SVG of what `read` has under `chart`, a row for each point.

    A row has a name, percent more perplexity, tokens a second, whether the point is ours, and the side of its name.
    """
    data = read("chart")
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#ffffff"/>',
        _text(LEFT - 46, 30, data["title"], size=16, weight="bold"),
    ]
    for tick in TICKS:
        parts.append(_line(_x(tick), TOP, _x(tick), HEIGHT - BOTTOM))
        parts.append(_text(_x(tick), HEIGHT - BOTTOM + 18, f"+{tick} %", anchor="middle", fill=OTHERS))
    for tick in range(0, int(FASTEST) + 1, 10):
        parts.append(_line(LEFT, _y(tick), WIDTH - RIGHT, _y(tick)))
        parts.append(_text(LEFT - 8, _y(tick) + 4, str(tick), anchor="end", fill=OTHERS))
    parts.append(_text(LEFT - 46, TOP - 12, "tokens per second, decoding on one thread", fill=OTHERS))
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        _text(
            middle,
            HEIGHT - BOTTOM + 38,
            "more perplexity than the dense model, WikiText-2",
            anchor="middle",
            fill=OTHERS,
        )
    )
    for name, loss, speed, ours, side in (
        [cell if isinstance(cell, str) else cell[0] for cell in row] for row in data["rows"]
    ):
        colour = OURS if ours == "yes" else OTHERS
        parts.append(f'<circle cx="{_x(loss):.1f}" cy="{_y(speed):.1f}" r="6" fill="{colour}"/>')
        left = side == "left"
        parts.append(
            _text(_x(loss) + (-11 if left else 11), _y(speed) + 4, name, anchor="end" if left else "start", fill=colour)
        )
    for number, line in enumerate(data["note"].split(". ")):
        parts.append(_text(LEFT - 46, HEIGHT - 34 + 16 * number, line.rstrip(".") + ".", size=11, fill=OTHERS))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _x(loss: float) -> float:
    return LEFT + (WIDTH - RIGHT - LEFT) * math.log1p(loss) / math.log1p(MOST)


def _y(speed: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * speed / FASTEST


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#d0d7de"/>'


def _text(
    x: float,
    y: float,
    text: str,
    *,
    anchor: str = "start",
    fill: str = "#1f2328",
    size: int = 13,
    weight: str = "normal",
) -> str:
    style = f'text-anchor="{anchor}" fill="{fill}" font-size="{size}" font-weight="{weight}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'
