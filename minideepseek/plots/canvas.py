"""The canvas of every picture: colours that all can tell apart, axes without a window, tables of colours, the option --plot.

Derivation: whiteboard/plots/canvas.md
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

import struct
import sys
import tempfile
from pathlib import Path

import numpy as np

BLUE, ORANGE, GREEN, PINK, SKY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9"     # Okabe and Ito's colours
GREY, HIDDEN = "#666666", "#BBBBBB"                                      # what is given, like a floor; what cannot be seen
STYLES = list(zip((BLUE, ORANGE, GREEN, PINK, SKY), ("-", "--", "-.", (0, (5, 1)), ":")))  # lines differ in grey print too


def style(n):
    """Colour and dashes of line n, as options of plot: those of STYLES first, then other pairs of the same, 25 in all.

    The dashes move back one place after every five lines: so the first nine differ in grey print too.
    """
    return {"color": STYLES[n % 5][0], "linestyle": STYLES[(n - n // 5) % 5][1]}


def brightness(colour):
    """How light a colour is in grey print: 0 black, 1 white. Source: ITU-R BT.601, the weights of luma."""
    from matplotlib.colors import to_rgb

    return float(np.dot(to_rgb(colour), (0.299, 0.587, 0.114)))


def plot_path():
    """The FILE.png after --plot on the command line, or None without one. Ends the program when the file is missing."""
    if sys.argv[-1:] == ["--plot"]:
        sys.exit("--plot needs the name of a file: --plot FILE.png")
    return sys.argv[sys.argv.index("--plot") + 1] if "--plot" in sys.argv else None


def new_axes(rows=1, columns=1, size=(6.4, 4.0), **options):
    """Axes (rows * columns,) of a new figure that needs no window and no pyplot; size in inches, of one panel.

    options: those of matplotlib's subplots, such as sharex=True
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure.subplots(rows, columns, squeeze=False, **options).ravel()


def save(ax, path):
    """Write the figure that holds `ax` as a PNG when there is a path; return the axes."""
    if path is not None:
        ax.figure.savefig(path, dpi=110, format="png")
    return ax


def panels(path, *draws, columns=2, size=(6.4, 4.4)):
    """One PNG of several pictures: each of `draws` is called with the axes of its panel."""
    rows = -(-len(draws) // columns)
    axes = new_axes(rows, min(columns, len(draws)), size)
    for ax, draw in zip(axes, draws):
        draw(ax)
    for ax in axes[len(draws):]:
        ax.set_visible(False)
    return save(axes[0], path)


def png_size(path):
    """(width, height) of a PNG in pixels, from its first 24 bytes. Raises ValueError when the file is none."""
    head = Path(path).read_bytes()[:24]
    if len(head) < 24 or head[:8] != b"\x89PNG\r\n\x1a\n" or head[12:16] != b"IHDR":
        raise ValueError(f"{path} is no PNG, it starts with {head[:8]!r}")
    return struct.unpack(">II", head[16:])


def try_out(draw):
    """For demos: call draw(path) with the file after --plot, or one that is thrown away -> (width, height, bytes) of the PNG."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(plot_path() or Path(folder, "picture.png"))
        draw(path)
        return *png_size(path), path.stat().st_size


def vector(name, values):
    """`values` as a float64 vector. Raises ValueError when it is none, or empty."""
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not values.size:
        raise ValueError(f"{name} has shape {values.shape}, it must be a vector of at least one number")
    return values


def matrix(name, values, letters):
    """`values` as a float64 matrix; letters: its axes in words, for the error. Raises ValueError when it is none, or empty."""
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"{name} has shape {values.shape}, it must be {letters} with a row and a column at least")
    return values


def heat(ax, values, seen, *, label, colours=("white", BLUE), limits=None):
    """A matrix as a table of colours, with a bar beside it; what is not `seen` is grey and hatched. Returns the image.

    values: (n, m)   seen: (n, m), booleans   limits: numbers of the first and the last colour, by default 0 (or the least) and the largest
    """
    from matplotlib.colors import LinearSegmentedColormap

    low, high = limits or (values[seen].min(initial=0.0), max(values[seen].max(initial=0.0), 1e-12))
    ax.patch.set(facecolor=HIDDEN, hatch="////", edgecolor="#CCCCCC")    # shines through where nothing is seen
    scale = LinearSegmentedColormap.from_list("canvas", colours).with_extremes(bad=(0, 0, 0, 0))
    image = ax.imshow(np.ma.array(np.where(seen, values, 0), mask=~seen), cmap=scale, vmin=low, vmax=high)
    ax.figure.colorbar(image, ax=ax, shrink=0.9, label=label)
    return image


def write_cells(image, texts):
    """Write into cells of a table of colours, black or, where the cell is dark, white. texts: {(row, column): text}"""
    colours = image.to_rgba(image.get_array())
    for (i, j), text in texts.items():
        dark = colours[i, j, 3] > 0 and brightness(colours[i, j]) < 0.5
        image.axes.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")


def token_ticks(axis, words):
    """Tokens as the labels of an axis, 0, 1, 2, ...: line ends and blanks made visible, dollars left alone."""
    axis.set_ticks(range(len(words)), [str(word).replace("\n", "\\n").replace(" ", "\u2423") for word in words], parse_math=False)


def demo():
    """The first nine styles, in colour and as a grey printer shows them. --plot FILE.png keeps the picture."""
    def lines(ax, grey):
        for n in range(9):
            look = style(n)
            look["color"] = str(brightness(look["color"])) if grey else look["color"]
            ax.plot([0, 1], [n, n], linewidth=2, **look)
        ax.set(xticks=[], yticks=range(9), ylabel="line", title="in grey print" if grey else "in colour")

    greys = sorted(brightness(colour) for colour, _ in STYLES)
    same_dashes = [abs(brightness(style(m)["color"]) - brightness(style(n)["color"]))
                   for n in range(9) for m in range(n) if style(m)["linestyle"] == style(n)["linestyle"]]
    width, height, size = try_out(lambda path: panels(path, lambda ax: lines(ax, False), lambda ax: lines(ax, True)))
    print(f"shapes    two panels of 6.4 by 4.4 inches, 110 dots each -> {width} x {height} pixels, {size:,} bytes of PNG")
    print("by hand   blue #0072B2 in grey: 0.587 * 0x72/255 + 0.114 * 0xB2/255 =", round(brightness(BLUE), 3))
    print(f"claim     in grey two of the five colours differ by {min(np.diff(greys)):.3f} only; "
          f"of nine lines, those of equal dashes by {min(same_dashes):.2f} and more")
    assert (width, height) == (1408, 484) and min(np.diff(greys)) < 0.05 and len(same_dashes) == 4 and min(same_dashes) > 0.15


if __name__ == "__main__":
    from minideepseek.plots.canvas import demo  # the imported copy, so that every name exists once
    demo()
