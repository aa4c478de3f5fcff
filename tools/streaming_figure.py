"""Draws docs/streaming.svg: when layers are copied and when they are computed, in one micro step with two slots.

Run: python tools/streaming_figure.py    (the times are those of `charkha`'s own rule for what is sent for when)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

FIGURE = Path(__file__).resolve().parent.parent / "docs" / "streaming.svg"
LAYERS, SLOTS = 6, 2
FORWARD, BACKWARD, COPY = 3.0, 7.0, 2.2  # of one layer; backward runs it again first
LEFT, TOP, ROW, SCALE = 132, 46, 40, 12.4
COLOURS = ("#2f6f8f", "#c2762d")


@dataclass(frozen=True)
class Bar:
    """One layer in one row, from `begin` to `end`."""

    row: int
    layer: int
    begin: float
    end: float
    text: str


def schedule() -> list[Bar]:
    """Copies into slot (layer mod 2), each begun when the slot is free; computing waits for its layer."""
    order = [(layer, FORWARD, "forward") for layer in range(LAYERS)]
    order += [(layer, BACKWARD, "again + backward") for layer in reversed(range(LAYERS))]
    bars: list[Bar] = []
    held: dict[int, int | None] = dict.fromkeys(range(SLOTS))
    ready, clock, link = dict.fromkeys(range(SLOTS), 0.0), 0.0, 0.0

    def send(layer: int, earliest: float) -> None:
        nonlocal link
        slot = layer % SLOTS
        if held[slot] == layer:
            return
        begin = max(link, earliest)
        link = ready[slot] = begin + COPY
        held[slot] = layer
        bars.append(Bar(0, layer, begin, link, f"{layer}"))

    send(0, 0.0)
    for place, (layer, cost, what) in enumerate(order):
        begin = max(clock, ready[layer % SLOTS])
        ahead = order[place + 1][0] if place + 1 < len(order) else layer
        if ahead != layer:
            send(ahead, clock)
        clock = begin + cost
        bars.append(Bar(1, layer, begin, clock, f"{layer}" if what == "forward" else f"{layer} {what}"))
    return bars


def svg(bars: list[Bar]) -> str:
    """The picture as text."""
    width = LEFT + SCALE * max(bar.end for bar in bars) + 16
    turn = next(bar.begin for bar in bars if bar.row == 1 and "again" in bar.text)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} 172" width="{width:.0f}" height="172" '
        'font-family="sans-serif" font-size="12" role="img" aria-label="Copying layers hidden behind computing">',
        f'<rect width="{width:.0f}" height="172" fill="#ffffff"/>',
        '<text x="12" y="24" font-size="14" fill="#222">One micro step of six layers through two slots</text>',
    ]
    for row, name in enumerate(("copy to the card", "compute")):
        parts.append(f'<text x="12" y="{TOP + row * ROW + 21}" fill="#222">{name}</text>')
    for bar in bars:
        x, y, length = LEFT + SCALE * bar.begin, TOP + bar.row * ROW, SCALE * (bar.end - bar.begin)
        colour = COLOURS[bar.layer % SLOTS]
        parts.append(f'<rect x="{x:.1f}" y="{y}" width="{length - 1:.1f}" height="30" rx="3" fill="{colour}"/>')
        parts.append(
            f'<text x="{x + length / 2:.1f}" y="{y + 20}" text-anchor="middle" fill="#fff" font-size="11">'
            f"{bar.text if len(bar.text) * 6 < length else bar.text.split()[0]}</text>"
        )
    x = LEFT + SCALE * turn
    parts.append(
        f'<line x1="{x:.1f}" y1="{TOP - 6}" x2="{x:.1f}" y2="{TOP + 2 * ROW}" stroke="#222" stroke-dasharray="4 3"/>'
    )
    parts.append(
        f'<text x="{x:.1f}" y="{TOP + 2 * ROW + 14}" text-anchor="middle" fill="#222">the turn: the last two '
        "layers are still in their slots</text>"
    )
    for number, colour in enumerate(COLOURS):
        x = LEFT + 90 * number
        parts.append(f'<rect x="{x}" y="{TOP + 2 * ROW + 26}" width="14" height="14" rx="3" fill="{colour}"/>')
        parts.append(f'<text x="{x + 20}" y="{TOP + 2 * ROW + 38}" fill="#222">slot {number}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    FIGURE.write_text(svg(schedule()), encoding="utf-8")
    print(FIGURE)


if __name__ == "__main__":
    main()
