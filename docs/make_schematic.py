"""Draw the method in one picture: ``python docs/make_schematic.py`` writes docs/schematic.svg.

An image becomes views, the views pass the encoder, and in every head the prediction of one view is
pulled towards the nearest neighbour of another (MIM-Refiner, arXiv 2402.10093, Figure 4).
"""

import sys
from html import escape
from pathlib import Path

WIDTH, HEIGHT = 900, 396
INK, FAINT, LINE = "#24292f", "#57606a", "#8c959f"
FROZEN, TRAINED, QUEUE, PULL = "#d8dee4", "#f6b26b", "#cfe3f5", "#d55e00"
FONT = "font-family='Helvetica, Arial, sans-serif'"
BLOCKS, HEADS = 12, 4
BLOCK_X, BLOCK_Y, BLOCK_WIDTH, BLOCK_HEIGHT, STEP = 252, 138, 19, 74, 24


def text(x: float, y: float, words: str, size=12, ink=INK, anchor="middle", weight="normal") -> str:
    return (
        f"<text x='{x}' y='{y}' font-size='{size}' text-anchor='{anchor}' fill='{ink}' "
        f"font-weight='{weight}' {FONT}>{escape(words)}</text>"
    )


def box(x: float, y: float, w: float, h: float, fill: str, radius=3, stroke=LINE) -> str:
    return (
        f"<rect x='{x}' y='{y}' width='{w}' height='{h}' rx='{radius}' fill='{fill}' "
        f"stroke='{stroke}'/>"
    )


def arrow(x1: float, y1: float, x2: float, y2: float, ink=LINE, width=1.5, dash="") -> str:
    dashes = f" stroke-dasharray='{dash}'" if dash else ""
    tip = "pull" if ink == PULL else "tip"
    return (
        f"<line x1='{x1}' y1='{y1}' x2='{x2}' y2='{y2}' stroke='{ink}' stroke-width='{width}'"
        f"{dashes} marker-end='url(#{tip})'/>"
    )


def tip(name: str, ink: str) -> str:
    return (
        f"<marker id='{name}' viewBox='0 0 8 8' refX='7' refY='4' markerWidth='9' markerHeight='9' "
        f"markerUnits='userSpaceOnUse' "
        f"orient='auto-start-reverse'><path d='M0,0 L8,4 L0,8 z' fill='{ink}'/></marker>"
    )


def photograph(x: float, y: float, size: float, window: tuple[float, float, float]) -> str:
    """A small landscape; ``window`` is the part of it that is seen: left, top, side (of 1)."""
    left, top, side = window
    scale = size / (100 * side)
    return (
        f"<svg x='{x}' y='{y}' width='{size}' height='{size}' "
        f"viewBox='0 0 {size} {size}'><g transform='scale({scale:.4f}) "
        f"translate({-100 * left:.1f} {-100 * top:.1f})'>"
        "<rect width='100' height='100' fill='#bfe0f5'/>"
        "<circle cx='74' cy='24' r='11' fill='#f5c542'/>"
        "<path d='M0,72 L30,38 L52,64 L66,50 L100,78 L100,100 L0,100 z' fill='#7d9b76'/>"
        "<rect x='36' y='66' width='22' height='20' fill='#c75b4a'/>"
        "<path d='M32,67 L47,52 L62,67 z' fill='#7a4a3a'/></g>"
        f"<rect width='{size}' height='{size}' fill='none' stroke='{LINE}' stroke-width='2'/></svg>"
    )


def views() -> list[str]:
    parts = [photograph(16, 130, 84, (0, 0, 1)), text(58, 230, "image")]
    parts += [arrow(106, 172, 130, 172)]
    parts += [photograph(140, 62, 62, (0.05, 0.1, 0.8)), photograph(140, 132, 62, (0.2, 0.2, 0.75))]
    parts += [text(171, 54, "2 global views")]
    windows = ((0.3, 0.5, 0.35), (0.6, 0.1, 0.3), (0.1, 0.35, 0.32), (0.45, 0.45, 0.3))
    for i, window in enumerate(windows):
        parts.append(photograph(140 + 33 * (i % 2), 206 + 33 * (i // 2), 29, window))
    parts += [text(171, 286, "10 local views"), arrow(212, 175, 242, 175)]
    return parts


def encoder() -> list[str]:
    parts, end = [], BLOCK_X + STEP * BLOCKS - (STEP - BLOCK_WIDTH)
    for i in range(BLOCKS):
        x, last = BLOCK_X + STEP * i, i >= BLOCKS - HEADS
        middle = x + BLOCK_WIDTH / 2
        parts.append(box(x, BLOCK_Y, BLOCK_WIDTH, BLOCK_HEIGHT, "white" if not last else "#fdebd3"))
        parts.append(text(middle, BLOCK_Y + BLOCK_HEIGHT + 15, str(i + 1), 10, FAINT))
        if last:
            parts.append(arrow(middle, BLOCK_Y, middle, 113))
            parts.append(box(x - 1, 72, BLOCK_WIDTH + 2, 38, TRAINED))
    parts.append(text(end, 54, "a head on each of the last blocks", 12, INK, "end"))
    middle = (BLOCK_X + end) / 2
    parts.append(text(middle, BLOCK_Y + BLOCK_HEIGHT + 33, "ViT, pre-trained by masking"))
    parts.append(
        text(
            middle,
            BLOCK_Y + BLOCK_HEIGHT + 49,
            "its best features sit before the last block",
            11,
            FAINT,
        )
    )
    zoom = f"M{end + 3},72 L588,34 L588,288 L{end + 3},110 z"
    parts.append(f"<path d='{zoom}' fill='#f6f8fa' stroke='none'/>")
    return parts


def head() -> list[str]:
    """What happens inside one head."""
    parts = [
        box(588, 34, 296, 254, "#f6f8fa", 6, "#d0d7de"),
        text(736, 54, "in every head", 12, INK),
    ]
    parts += [text(604, 96, "view a", 12, FAINT, "start"), arrow(644, 92, 668, 92)]
    parts += [
        f"<circle cx='682' cy='92' r='12' fill='white' stroke='{INK}'/>",
        text(682, 96, "z", 12),
    ]
    slots = [box(738, 72 + 17 * i, 26, 14, PULL if i == 1 else QUEUE, 2) for i in range(7)]
    parts += [*slots, text(751, 207, "queue", 11, FAINT)]
    parts += [arrow(695, 93, 734, 95), text(714, 86, "nearest", 9.5, FAINT)]
    parts += [arrow(766, 95, 799, 95), text(783, 87, "swap", 9.5, FAINT)]
    parts += [f"<circle cx='815' cy='95' r='13' fill='{PULL}' stroke='{INK}'/>"]
    parts += [text(815, 74, "neighbour", 11, INK)]
    parts += [text(604, 248, "view b", 12, FAINT, "start"), arrow(644, 244, 668, 244)]
    parts += [
        f"<circle cx='682' cy='244' r='12' fill='white' stroke='{INK}'/>",
        text(682, 248, "z", 12),
    ]
    parts += [arrow(697, 244, 797, 244), text(747, 236, "predictor", 10, FAINT)]
    parts += [
        f"<circle cx='815' cy='244' r='13' fill='white' stroke='{INK}'/>",
        text(815, 248, "p", 12),
    ]
    parts += [arrow(815, 229, 815, 112, PULL, 3), text(825, 150, "pull", 12, PULL, "start", "bold")]
    for x, y in ((672, 166), (684, 174), (694, 164)):
        parts.append(f"<circle cx='{x}' cy='{y}' r='4.5' fill='#c8ced5' stroke='{LINE}'/>")
    parts += [arrow(682, 106, 682, 154, LINE, 1.5, "4 3"), text(676, 134, "push", 11, FAINT, "end")]
    parts += [text(680, 196, "p of other images", 10, FAINT)]
    return parts


def stages() -> list[str]:
    parts = []
    rows = (
        ("stage 2", 0, "heads learn, the encoder is frozen"),
        ("stage 3", 6, "heads and encoder learn; early blocks may stay frozen"),
    )
    for row, (name, trained, words) in enumerate(rows):
        y = 318 + 34 * row
        parts.append(text(140, y + 13, name, 12, INK, "start", "bold"))
        for i in range(BLOCKS):
            fill = TRAINED if trained and i >= BLOCKS - trained else FROZEN
            parts.append(box(BLOCK_X + STEP * i, y, BLOCK_WIDTH, 18, fill))
            if i >= BLOCKS - HEADS:
                parts.append(box(BLOCK_X + STEP * i + 3, y - 8, BLOCK_WIDTH - 6, 6, TRAINED, 1))
        parts.append(text(588, y + 13, words, 12, INK, "start"))
    for x, fill, words in ((16, TRAINED, "trained"), (16, FROZEN, "frozen")):
        y = 318 if fill == TRAINED else 340
        parts += [box(x, y, 14, 14, fill), text(x + 20, y + 11, words, 11, FAINT, "start")]
    return parts


def draw() -> str:
    """The picture as SVG."""
    title = text(16, 26, "MIM-Refiner: from an image to the loss", 14, INK, "start", "bold")
    parts = [title, *views(), *encoder(), *head(), *stages()]
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {HEIGHT}' width='{WIDTH}' "
        "role='img' aria-label='Views of an image pass the encoder; in every head the prediction "
        "of one view is pulled towards the nearest neighbour of another view'>"
        f"<defs>{tip('tip', LINE)}{tip('pull', PULL)}</defs>"
        f"<rect width='100%' height='100%' rx='8' fill='white'/>{''.join(parts)}</svg>\n"
    )


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("schematic.svg"))
    target.write_text(draw(), encoding="utf-8")
