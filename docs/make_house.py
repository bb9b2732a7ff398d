"""Draw the rooms of the package from its code: ``python docs/make_house.py`` writes docs/house.svg.

Rooms stand in floors; every import points down. The purpose of a room is the first line of its
docstring, its modules are its files, and the path of an image to the loss is numbered.
"""

import ast
import sys
from html import escape
from pathlib import Path

CHECKOUT = Path(__file__).parent.parent
FLOORS = (  # from the top; rooms side by side do not meet
    ("experiments",),
    ("commands",),
    ("batch",),
    ("study",),
    ("probes",),
    ("training",),
    ("method",),
    ("models", "data"),
    ("",),
)
PATH = (  # an image on its way to the loss
    "data/views",
    "method/refiner",
    "models/blocks",
    "method/heads",
    "method/nn_queue",
    "method/losses",
)
ROOT = "What every room may use: settings, files, devices, processes, progress."
WIDTH, LEFT, CHIP, LINE, GAP = 860, 16, 22, 16, 10
INK, FAINT, ROOM, WAY = "#24292f", "#57606a", "#f6f8fa", "#0072b2"
FONT = "font-family='Helvetica, Arial, sans-serif'"


def folder_of(room: str) -> Path:
    return CHECKOUT / room if room == "experiments" else CHECKOUT / "mimrefiner" / room


def purpose(room: str) -> str:
    """The first line of the room's docstring."""
    if not room:
        return ROOT
    tree = ast.parse((folder_of(room) / "__init__.py").read_text(encoding="utf-8"))
    return ast.get_docstring(tree).splitlines()[0]


def module_names(room: str) -> list[str]:
    """The modules of a room, those of the path first and in its order, the others by name."""
    names = {file.stem for file in folder_of(room).glob("*.py") if not file.stem.startswith("__")}
    way = [step.split("/")[1] for step in PATH if step.split("/")[0] == room]
    return [*way, *sorted(names - set(way) - {"_torchvision"})]


def chips(room: str, x: float, y: float, right: float) -> tuple[list[str], float]:
    """The modules as labelled boxes between ``x`` and ``right``; also where the last row ends."""
    parts, left = [], x
    for name in module_names(room):
        step = f"{room}/{name}"
        number = f"{PATH.index(step) + 1}  " if step in PATH else ""
        width = 7.1 * len(number + name) + 14
        if x + width > right:
            x, y = left, y + CHIP + 6
        fill, ink = (WAY, "white") if number else ("white", INK)
        parts.append(
            f"<rect x='{x:.1f}' y='{y:.1f}' width='{width:.1f}' height='{CHIP}' rx='4' "
            f"fill='{fill}' stroke='#d0d7de'/>"
            f"<text x='{x + width / 2:.1f}' y='{y + 15:.1f}' font-size='12' text-anchor='middle' "
            f"fill='{ink}' {FONT} xml:space='preserve'>{number}{name}</text>"
        )
        x += width + 6
    return parts, y + CHIP


def draw() -> str:
    """The picture as SVG."""
    parts, y = [], 46.0
    for rooms in FLOORS:
        width = (WIDTH - 2 * LEFT - GAP * (len(rooms) - 1)) / len(rooms)
        inside, bottoms = [], []
        for i, room in enumerate(rooms):
            x = LEFT + i * (width + GAP)
            title = f"{room}/" if room else "root files"
            inside.append(
                f"<text x='{x + 12}' y='{y + 20}' font-size='14' font-weight='bold' fill='{INK}' "
                f"{FONT}>{title}</text>"
                f"<text x='{x + 24 + 8.6 * len(title):.1f}' y='{y + 20}' font-size='12' "
                f"fill='{FAINT}' {FONT}>{escape(purpose(room))}</text>"
            )
            found, bottom = chips(room, x + 12, y + 30, x + width - 12)
            inside += found
            bottoms.append(bottom)
        height = max(bottoms) + 10 - y
        for i in range(len(rooms)):
            x = LEFT + i * (width + GAP)
            parts.append(
                f"<rect x='{x}' y='{y}' width='{width}' height='{height:.1f}' rx='6' "
                f"fill='{ROOM}' stroke='#d0d7de'/>"
            )
        parts += inside
        y += height + GAP
    head = (
        f"<text x='{LEFT}' y='28' font-size='13' fill='{INK}' {FONT}>"
        "Every import points down. Blue: the path of an image to the loss.</text>"
    )
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {y + 6:.0f}' "
        f"width='{WIDTH}' role='img' aria-label='The rooms of mimrefiner'>"
        f"<rect width='100%' height='100%' rx='8' fill='white'/>{head}{''.join(parts)}</svg>\n"
    )


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else CHECKOUT / "docs" / "house.svg"
    target.write_text(draw(), encoding="utf-8")
