"""A text that was written with drafts: which tokens were drafted and accepted, which the model wrote, which were thrown away.

Derivation: whiteboard/plots/speculation.md
"""
if not __package__:  # run as a script: take the package from this repository, and nothing from this folder
    import os, sys; sys.path[0:1] = [os.path.abspath(__file__ + "/../../..")]

from typing import NamedTuple

from minideepseek.plots.canvas import HIDDEN, ORANGE, SKY, new_axes, save, try_out

KINDS = {"accepted": (SKY, "drafted and accepted"), "own": ("white", "the model's own"), "rejected": (ORANGE, "drafted and thrown away")}


class Piece(NamedTuple):
    """A token on the page."""
    text: str
    kind: str        # accepted, own or rejected
    line: int
    column: int      # in characters


def lay_out(rounds, spell, width=76):
    """Where each token stands, in lines of at most `width` characters: a list of Piece.

    rounds: each with tokens, drafts and n_accepted, see model/speculative   spell: token -> its text
    What was thrown away stands before the token that took its place. A line end in a token begins a new line.
    Raises ValueError when a Round accepted more drafts than it had.
    """
    pieces, line, column = [], 0, 0
    for number, one in enumerate(rounds):
        if not 0 <= one.n_accepted <= len(one.drafts):
            raise ValueError(f"rounds[{number}] accepted {one.n_accepted} of {len(one.drafts)} drafts")
        accepted, own = one.tokens[:one.n_accepted], one.tokens[one.n_accepted:]
        for token, kind in [*[(t, "accepted") for t in accepted], *[(t, "rejected") for t in one.drafts[one.n_accepted:]], *[(t, "own") for t in own]]:
            text = spell(token)
            shown = text.replace("\n", "\\n")
            if column and column + len(shown) > width:
                line, column = line + 1, 0
            pieces.append(Piece(shown, kind, line, column))
            column += len(shown) + 1
            if "\n" in text and kind != "rejected":
                line, column = line + 1, 0
    return pieces


def accepted_and_rejected(rounds, spell, *, width=76, ax=None, path=None):
    """The text of some Rounds, token by token, coloured by where each came from; what was thrown away is struck through.

    rounds, spell: see lay_out   Raises ValueError when there is no token to draw.
    """
    from matplotlib.patches import Patch, Rectangle

    pieces = lay_out(rounds, spell, width)
    if not pieces:
        raise ValueError(f"rounds = {list(rounds)} hold no token")
    lines = pieces[-1].line + 1
    ax = new_axes(size=(0.125 * width + 0.4, 0.34 * lines + 0.9))[0] if ax is None else ax
    ax.set(xlim=(-1, width + 1), ylim=(lines - 0.4, -0.6), xticks=[], yticks=[], title="one text, written with drafts")
    ax.spines[:].set_visible(False)
    for piece in pieces:
        colour, _ = KINDS[piece.kind]
        n = len(piece.text)
        ax.add_patch(Rectangle((piece.column - 0.3, piece.line - 0.4), n + 0.6, 0.8, facecolor=colour, edgecolor=HIDDEN, linewidth=0.6,
                               hatch="//" if piece.kind == "rejected" else None))
        for i, letter in enumerate(piece.text):                    # one by one: then columns fit, whatever the font
            ax.text(piece.column + i + 0.5, piece.line, letter, ha="center", va="center", fontsize=8, family="monospace", parse_math=False)
        if piece.kind == "rejected":
            ax.plot([piece.column, piece.column + n], [piece.line, piece.line], color="black", linewidth=1)
    counts = {kind: sum(piece.kind == kind for piece in pieces) for kind in KINDS}
    ax.legend([Patch(facecolor=colour, edgecolor=HIDDEN, hatch="//" if kind == "rejected" else None) for kind, (colour, _) in KINDS.items()],
              [f"{words}: {counts[kind]}" for kind, (_, words) in KINDS.items()], loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=3, fontsize=8)
    return save(ax, path)


def demo():
    """A sentence in four rounds. --plot FILE.png keeps the picture."""
    class Round(NamedTuple):
        tokens: list
        drafts: list
        n_accepted: int

    rounds = [Round(["Anna"], [], 0), Round([" goes", " to"], [" goes"], 1), Round([" the"], [" a"], 0), Round([" mill", ".\n"], [" mill"], 1)]
    pieces = lay_out(rounds, str)
    width, height, size = try_out(lambda path: accepted_and_rejected(rounds, str, path=path))
    print("by hand  ", " ".join(f"{piece.text}={piece.kind}" for piece in pieces))
    written = "".join(piece.text for piece in pieces if piece.kind != "rejected")
    print(f"claim     without what was thrown away it is the text: {written!r}; {width} x {height} pixels, {size:,} bytes")
    assert written == "Anna goes to the mill.\\n" and sum(piece.kind == "rejected" for piece in pieces) == 1


if __name__ == "__main__":
    from minideepseek.plots.speculation import demo  # the imported copy, so that every name exists once
    demo()
