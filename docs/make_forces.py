"""Draw the forces of the NNA loss as an animation: ``python docs/make_forces.py`` writes
docs/forces.gif, the one animation of the project.

Six predictions on a circle follow the force of the loss: on the left each is pulled to the other
view of its own image, on the right the first one to that view's neighbour.
"""

import sys
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.animation import FuncAnimation, PillowWriter

from mimrefiner.study import figures, forces, pictures

STEPS, HOLD, RATE = 40, 12, 12  # frames that move, that stand at the end; per second


def animation() -> FuncAnimation:
    """The animation, a frame per step."""
    z, neighbour, start = forces.example()
    positives = {"own view as positive": z, "neighbour as positive (NNA)": neighbour}
    ways = {n: forces.paths(z, x, start, steps=STEPS, rate=0.3) for n, x in positives.items()}
    panels = {}
    for name, way in ways.items():
        arrows = 5 * forces.force(z, positives[name], way[0])[0].numpy()
        panels[name] = pictures.circle_points(z, neighbour, way[0]), way[0].numpy(), arrows
    figure = pictures.plot_circles(panels, title="Where the loss moves the predictions")

    def draw(frame: int) -> None:
        step = min(frame, STEPS)
        for axes, (name, way) in zip(figure.axes, ways.items(), strict=True):
            p = way[step]
            axes.lines[-1].set_data(*p.T.numpy())  # the predictions were drawn last
            quiver = axes.collections[0]
            quiver.set_offsets(p.numpy())
            quiver.set_UVC(*(5 * forces.force(z, positives[name], p)[0].T.numpy()))

    return FuncAnimation(figure, draw, frames=STEPS + HOLD)


def main() -> None:
    mpl.use("Agg")
    figures.use_style()
    file = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_name("forces.gif"))
    animation().save(file, PillowWriter(fps=RATE), dpi=90)
    plt.close("all")


if __name__ == "__main__":
    main()
